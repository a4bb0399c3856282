"""What a world does where replicas come and go or things fail: stops, retries, errors that it remembers, GPU-hours.

A lost attempt (envs/fleet/faults.py) comes back as a new decision of the same request, `backoff_s` after the error,
until `max_attempts` have failed; then it goes unserved as failed. The energy of what a lost attempt computed is posted;
its tokens are computed again. Patience and SLOs count from the arrival of the request, not of the attempt.

Faults are applied at their instant: a world stops there, and where a replica gets ready, where a failure is detected,
and where a call that a provider's outage has doomed ends, since a decision may follow from each.

Nothing here is called in a world without faults whose replicas all stay (`desk.elastic` is 0).
"""

# ruff: noqa: ANN001, ANN201 (Numba infers the types of kernels)
from __future__ import annotations

import math

from envs.economics import ledger as books
from envs.fleet import engine, scaling
from envs.fleet.faults import lose_requests, slow_replica
from envs.fleet.state import ACTIVE, DRAINING, LEAVING
from envs.kernels import kernel
from envs.workload.faults import OF_PRICE, OF_REPLICA, OF_SPOT
from marginroute import latency

recent_errors = kernel(latency.recent_errors, inline="always")


@kernel
def note_call(mine, failed, at_s):
    """The gateway learns that a call to a replica or provider failed, or did not."""
    if failed or mine.error_share > 0.0:
        share = recent_errors(mine.error_share, max(at_s - mine.error_at_s, 0.0))
        mine.error_share = share + ((1.0 if failed else 0.0) - share) / latency.RECENT_CALLS
        mine.error_at_s = max(at_s, mine.error_at_s)


@kernel
def queue_retry(desks, loads, w, i, at_s):
    """Offers request `i` again at `at_s`, behind those that are due by then."""
    behind, ahead = -1, int(desks[w].retry_head)
    while ahead >= 0 and loads[w, ahead].offer_at_s <= at_s:
        behind, ahead = ahead, int(loads[w, ahead].next_held)
    loads[w, i].offer_at_s, loads[w, i].next_held = at_s, ahead
    if behind >= 0:
        loads[w, behind].next_held = i
    else:
        desks[w].retry_head = i


@kernel
def pop_retry(desks, loads, w):
    """The request that is offered again first; there must be one."""
    i = int(desks[w].retry_head)
    desks[w].retry_head = loads[w, i].next_held
    return i


@kernel
def try_again(config, requests, desks, loads, ledger_usd, counts, w, i, row, account, cost_usd):
    """Posts what a lost attempt, `row` of `requests`, has cost, and queues the next one; False if that was the last."""
    load, request = loads[w, i], requests[w, row]
    load.attempts += 1
    if load.attempts >= config[0].max_attempts:
        return False
    books.post(ledger_usd, w, account, load.class_index, -cost_usd)
    counts[w, books.RETRIES, load.class_index] += 1
    at_s = request.completed_at_s + config[0].backoff_s
    engine.reset_request(requests, w, row)
    queue_retry(desks, loads, w, i, at_s)
    return True


@kernel
def next_change_s(worlds, desks, changes, w):
    """When the world must stop next, whether or not a decision is due."""
    world, desk = worlds[w], desks[w]
    at_s = changes[w, desk.change].at_s if desk.change < desk.n_changes else math.inf
    if world.doomed_calls > 0:
        at_s = min(at_s, world.next_call_s)
    return min(at_s, world.next_change_s)


@kernel
def apply_changes(pools, tables, worlds, replicas, slots, providers, requests, desks, own, changes, w):
    """Carries out the faults that are due now, and what drifts come to."""
    desk = desks[w]
    while desk.change < desk.n_changes and changes[w, desk.change].at_s <= desk.now_s:
        change = changes[w, desk.change]
        desk.change += 1
        i, now_s = int(change.index), desk.now_s
        if change.kind == OF_REPLICA:
            if change.down == 1:
                scaling.fail_replica(
                    pools, tables, worlds, replicas, slots, providers, requests, w, i, change.until_s, now_s
                )
            else:
                slow_replica(pools, tables, worlds, replicas, slots, providers, requests, w, i, change.slowdown, now_s)
        elif change.kind == OF_SPOT:
            scaling.reclaim_replica(
                pools, tables, worlds, replicas, slots, providers, requests, w, i, change.until_s, now_s
            )
        elif change.kind == OF_PRICE:
            own[w, replicas.shape[1] + i].price_times = change.slowdown
        elif change.down >= 0:
            providers[w, i].down = change.down
        else:
            providers[w, i].slowdown = change.slowdown


@kernel
def post_gpu_hours(pools, replicas, desks, own, ledger_usd, w):
    """Posts the seconds for which machines were paid since the last call."""
    usd = 0.0
    for r in range(replicas.shape[1]):
        mine, rep = own[w, r], replicas[w, r]
        paid_s = scaling.paid_seconds(pools[rep.pool], rep, r, desks[w].now_s)
        usd += (paid_s - mine.paid_s) * mine.gpu_usd_per_s
        mine.paid_s = paid_s
    books.post(ledger_usd, w, books.GPU_HOURS, ledger_usd.shape[2] - 1, -usd)


@kernel
def lose_hanging(pools, worlds, replicas, slots, requests, w, now_s):
    """At the horizon: nobody waits for the detection of a failure any more."""
    for r in range(replicas.shape[1]):
        rep = replicas[w, r]
        if rep.state != ACTIVE and rep.state != DRAINING and rep.state != LEAVING:
            lose_requests(pools[rep.pool], worlds[w], rep, slots, requests, w, True, now_s)


@kernel
def set_replicas(
    pools, tables, worlds, replicas, slots, providers, requests, desks, loads, own, allowed, legal, targets
):  # fmt: skip
    """Scales every pool of every world that is under way, `targets` (N, P), and says in `legal` who takes requests.

    `allowed` (K, C) bool: who may answer a class.
    """
    for w in range(targets.shape[0]):
        desk = desks[w]
        if desk.done == 1:
            continue
        for r in range(replicas.shape[1]):
            if desk.elastic == 0:  # until now its GPU-hours were posted by the clock
                own[w, r].paid_s = scaling.paid_seconds(pools[replicas[w, r].pool], replicas[w, r], r, desk.now_s)
        desk.elastic = 1
        for p in range(targets.shape[1]):
            scaling.set_replicas(
                pools, tables, worlds, replicas, slots, providers, requests, w, p, targets[w, p], desk.now_s
            )
        for r in range(replicas.shape[1]):
            load = loads[w, desk.current]
            legal[w, r] = allowed[load.class_index, r] and scaling.takes_requests(replicas[w, r])
            legal[w, r] |= desk.hedging == 1 and r == load.answered_by
