"""A replica's life: off, starting, active, draining, failed, leaving; and how long its machine is paid.

    off --start--> starting --provision_s + load_s--> active --drain--> draining --empty--> off
    active, starting --fail--> down --repair--> starting --load_s--> active;   draining --fail--> off
    active --notice--> leaving --notice_s--> down --capacity--> starting --provision_s + load_s--> active      (spot)

Only an active replica makes iterations and answers scrapes. A starting one has an empty KV and prefix cache. A draining
one takes nothing new and goes off when its last request ends, at that very instant. For `detect_s` after a failure the
gateway does not know that a replica is down: it may still send requests there (`takes_requests`). With
`connection_errors` those, and everything that the engine had, end at once as LOST, and what waits in the gateway's hold
queue when the failure is detected (a crash closes its sockets). Without them all requests hang until then (a host that
vanished). A repair before that also ends what hangs.

Paid is a machine from asking for it (or, with `paid_from_load`, from its arrival) until it goes off: through starts,
drains and repairs, since a host that is being repaired stays rented. Reserved replicas, the first ones of a pool, are
paid all the time; they are started first and drained last.

Spot replicas, the last ones of a pool, lose their machine when it is reclaimed. From the notice on they take nothing
new; what they have not ended `notice_s` later is lost like by a crash. Until there is capacity again they are down,
known to be so and unpaid, and then they ask for another machine. One that fails while it leaves is gone at once.

Changes that time brings (ready, detected, repaired, drained) are applied by `advance` here, which stops at each of
them; the engine's own `advance` does not look at them.
"""

# ruff: noqa: ANN001, ANN201, ANN202, D417 (Numba infers the types of kernels)
from __future__ import annotations

import math

from envs.fleet import engine
from envs.fleet.faults import lose_requests
from envs.fleet.prefix import empty_prefix_cache
from envs.fleet.segment import go_idle
from envs.fleet.state import ACTIVE, DOWN, DRAINING, LEAVING, OFF, STARTING
from envs.kernels import kernel


@kernel
def takes_requests(rep):
    """Whether the gateway may send a request: active, as far as it knows."""
    return rep.state == ACTIVE or (rep.state == DOWN and rep.detected == 0)


@kernel
def paid_seconds(pool, rep, r, now_s):
    """Seconds for which the machine of replica r has been paid up to now."""
    if r - pool.first_replica < pool.reserved_replicas:
        return now_s
    return rep.paid_s + max(now_s - rep.paid_from_s, 0.0)


@kernel
def _note_next_change(world, replicas, w):
    world.next_change_s = math.inf
    for r in range(replicas.shape[1]):
        world.next_change_s = min(world.next_change_s, replicas[w, r].change_s)


@kernel
def _switch_off(world, rep, at_s):
    """The machine goes; the replica is empty."""
    if rep.state == DRAINING:
        world.draining -= 1
    rep.state = OFF
    rep.paid_s += max(at_s - rep.paid_from_s, 0.0)
    rep.paid_from_s = rep.change_s = rep.wake_s = rep.iteration_end_s = math.inf
    rep.planned = rep.done = 0


@kernel
def _wait_for_capacity(rep):
    """There is no spot machine to be had before `absent_until_s`."""
    rep.state = DOWN
    rep.detected = 1
    rep.change_s = rep.repaired_s = rep.absent_until_s


@kernel
def _start(pool, rep, slots, w, now_s):
    """Asks for a machine."""
    if rep.absent_until_s > now_s:
        _wait_for_capacity(rep)
        return
    rep.state = STARTING
    rep.change_s = now_s + pool.provision_s + pool.load_s
    rep.paid_from_s = now_s + (pool.provision_s if pool.paid_from_load == 1 else 0.0)
    empty_prefix_cache(pool, rep, slots, w)


@kernel
def _activate(pool, rep, at_s):
    """The weights are loaded. Until the first scrape the gateway knows as much: the engine is empty."""
    rep.state = ACTIVE
    rep.detected = 0
    rep.change_s = rep.repaired_s = rep.iteration_end_s = math.inf
    rep.planned = rep.done = 0
    rep.scraped_waiting = rep.scraped_running = 0
    rep.scraped_kv_usage = 0.0
    rep.scraped_at_s = at_s
    rep.scrape_index = engine.last_scrape(pool, rep, at_s) + 1
    engine.set_wake(pool, rep)


@kernel
def _stop_engine(pool, world, rep, slots, requests, w, at_s):
    """Everything that the replica has is lost, as the gateway knows at once."""
    if rep.busy_from_s <= at_s:
        go_idle(rep, at_s)
    lose_requests(pool, world, rep, slots, requests, w, True, at_s)


@kernel
def _hang(rep):
    """An iteration that never ends: nothing that is sent can start the engine."""
    rep.iteration_end_s = engine.LAST_INSTANT_S
    rep.done, rep.planned = 0, 1
    rep.wake_s = math.inf


@kernel
def _lose_machine(pool, world, rep, slots, requests, w, at_s):
    """The machine of a spot replica is taken away, and not paid any more."""
    _stop_engine(pool, world, rep, slots, requests, w, at_s)
    rep.paid_s += max(at_s - rep.paid_from_s, 0.0)
    rep.paid_from_s = math.inf
    _hang(rep)
    _wait_for_capacity(rep)


@kernel
def _pass_changes(pool, world, rep, slots, requests, w, now_s):
    """Everything that time has brought to a replica up to now."""
    if rep.state == DOWN and rep.change_s <= now_s:
        if rep.detected == 0:
            rep.detected = 1
            lose_requests(pool, world, rep, slots, requests, w, True, rep.change_s)
            rep.change_s = rep.repaired_s
        if rep.change_s <= now_s:
            if math.isinf(rep.paid_from_s):
                _start(pool, rep, slots, w, rep.repaired_s)
            else:
                rep.state = STARTING
                rep.change_s = rep.repaired_s + pool.load_s
    elif rep.state == LEAVING and rep.change_s <= now_s:
        _lose_machine(pool, world, rep, slots, requests, w, rep.change_s)
    elif rep.state == DRAINING and rep.change_s <= now_s and rep.in_flight > 0:
        _stop_engine(pool, world, rep, slots, requests, w, rep.change_s)
        _switch_off(world, rep, rep.change_s)
    if rep.state == STARTING and rep.change_s <= now_s:
        _activate(pool, rep, rep.change_s)


@kernel
def settle_changes(pools, tables, worlds, replicas, slots, providers, requests, w, now_s):
    """Applies what time has brought up to now; the world must have been advanced to it, and stopped at each change."""
    world = worlds[w]
    if world.next_change_s <= now_s:
        for r in range(replicas.shape[1]):
            rep = replicas[w, r]
            if rep.change_s <= now_s:
                _pass_changes(pools[rep.pool], world, rep, slots, requests, w, now_s)
        _note_next_change(world, replicas, w)
    if world.draining > 0:
        for r in range(replicas.shape[1]):
            rep = replicas[w, r]
            if rep.state == DRAINING and rep.in_flight == 0:
                if not math.isinf(rep.iteration_end_s):
                    go_idle(rep, rep.iteration_end_s)
                _switch_off(world, rep, rep.idle_from_s)


@kernel
def advance(pools, tables, worlds, replicas, slots, providers, requests, w, until_s):
    """`engine.advance` for a fleet whose replicas come and go: stops at every change on the way."""
    while worlds[w].next_change_s <= until_s:
        now_s = worlds[w].next_change_s
        engine.advance(pools, tables, worlds, replicas, slots, providers, requests, w, now_s)
        settle_changes(pools, tables, worlds, replicas, slots, providers, requests, w, now_s)
    engine.advance(pools, tables, worlds, replicas, slots, providers, requests, w, until_s)
    settle_changes(pools, tables, worlds, replicas, slots, providers, requests, w, until_s)


@kernel
def fail_replica(pools, tables, worlds, replicas, slots, providers, requests, w, r, until_s, now_s):
    """Replica r fails now; its machine works again at `until_s`, the engine `load_s` later. Nothing fails that is off.

    Args:
        pools, tables, worlds, replicas, slots, providers, requests: `Fleet.arrays`.
        w: World.
        r: Replica.
        until_s: End of the repair, after now; of two failures at once the later one counts.
        now_s: Time; the world must have been advanced to it.
    """
    world, rep = worlds[w], replicas[w, r]
    pool = pools[rep.pool]
    if rep.state == OFF or (rep.state == DOWN and math.isinf(rep.paid_from_s)):
        return
    if rep.state == LEAVING:
        _lose_machine(pool, world, rep, slots, requests, w, now_s)
        _note_next_change(world, replicas, w)
        return
    if rep.state == DOWN:
        rep.repaired_s = max(rep.repaired_s, until_s)
        rep.change_s = rep.change_s if rep.detected == 0 else rep.repaired_s
        _note_next_change(world, replicas, w)
        return
    if rep.busy_from_s <= now_s:
        go_idle(rep, now_s)
    if rep.state == DRAINING:
        lose_requests(pool, world, rep, slots, requests, w, True, now_s)
        _switch_off(world, rep, now_s)
        return
    rep.detected = 1 if rep.state == STARTING else 0
    if pool.connection_errors == 1:
        lose_requests(pool, world, rep, slots, requests, w, False, now_s)
    rep.state = DOWN
    rep.repaired_s = until_s
    rep.change_s = until_s if rep.detected == 1 else min(now_s + pool.detect_s, until_s)
    _hang(rep)
    _pass_changes(pool, world, rep, slots, requests, w, now_s)
    _note_next_change(world, replicas, w)


@kernel
def reclaim_replica(pools, tables, worlds, replicas, slots, providers, requests, w, r, until_s, now_s):
    """The machine of spot replica r is reclaimed: notice is given now; there is no other one before `until_s`.

    Args:
        pools, tables, worlds, replicas, slots, providers, requests: `Fleet.arrays`.
        w: World.
        r: Replica.
        until_s: When there is capacity again, after now; of two reclaims at once the later one counts.
        now_s: Time; the world must have been advanced to it.
    """
    world, rep = worlds[w], replicas[w, r]
    pool = pools[rep.pool]
    rep.absent_until_s = max(rep.absent_until_s, until_s)
    if rep.state == OFF or rep.state == LEAVING:
        return
    if rep.state == STARTING or rep.state == DOWN:
        _lose_machine(pool, world, rep, slots, requests, w, now_s)
    else:
        rep.state = LEAVING if rep.state == ACTIVE else DRAINING
        rep.change_s = min(rep.change_s, now_s + pool.notice_s)
        _pass_changes(pool, world, rep, slots, requests, w, now_s)
    _note_next_change(world, replicas, w)


@kernel
def _to_start(pool, replicas, w):
    """The replica that comes back first: one that drains, else the lowest that is off; -1 if there is none."""
    first = int(pool.first_replica)
    for state in (DRAINING, OFF):
        for r in range(first, first + pool.max_replicas):
            if replicas[w, r].state == state:
                return r
    return -1


@kernel
def _to_stop(pool, replicas, w):
    """The replica that goes first: the one that started last, else a failed one, else the emptiest, reserved last."""
    first = int(pool.first_replica)
    best, lowest = -1, (3.0, 0.0)
    for r in range(first, first + pool.max_replicas):
        rep = replicas[w, r]
        rank = (3.0, 0.0)
        if rep.state == STARTING:
            rank = (0.0, -rep.change_s)
        elif rep.state == DOWN:
            rank = (1.0, 0.0)
        elif rep.state == LEAVING:
            rank = (1.5, float(rep.in_flight))
        elif rep.state == ACTIVE:
            reserved = r - first < pool.reserved_replicas
            rank = (2.5 if reserved else 2.0, float(rep.in_flight))
        if rank[0] < 3.0 and rank <= lowest:
            best, lowest = r, rank
    return best


@kernel
def set_replicas(pools, tables, worlds, replicas, slots, providers, requests, w, p, target, now_s):
    """Scales pool p towards `target` replicas that are, or will be, active; bounded by min_replicas and max_replicas.

    Up: replicas that drain are kept, then the lowest ones that are off start. Down: the latest start is called off,
    then failed replicas are given up, then the emptiest ones drain, those that leave anyway before others.

    Args:
        pools, tables, worlds, replicas, slots, providers, requests: `Fleet.arrays`.
        w: World.
        p: Pool.
        target: Replicas wanted; starting and failed ones count.
        now_s: Time; the world must have been advanced to it.
    """
    world, pool = worlds[w], pools[p]
    settle_changes(pools, tables, worlds, replicas, slots, providers, requests, w, now_s)
    wanted = min(max(target, pool.min_replicas), pool.max_replicas)
    present = 0
    for r in range(pool.first_replica, pool.first_replica + pool.max_replicas):
        present += 1 if replicas[w, r].state != OFF and replicas[w, r].state != DRAINING else 0
    while present < wanted:
        rep = replicas[w, _to_start(pool, replicas, w)]
        if rep.state == DRAINING:
            rep.state = ACTIVE if math.isinf(rep.change_s) else LEAVING
            world.draining -= 1
        else:
            _start(pool, rep, slots, w, now_s)
            _pass_changes(pool, world, rep, slots, requests, w, now_s)
        present += 1
    while present > wanted:
        rep = replicas[w, _to_stop(pool, replicas, w)]
        if rep.state == DOWN:
            lose_requests(pool, world, rep, slots, requests, w, True, now_s)
        runs = rep.state == ACTIVE or rep.state == LEAVING
        if runs and rep.in_flight > 0:
            rep.state = DRAINING
            world.draining += 1
        else:
            if runs and not math.isinf(rep.iteration_end_s):
                go_idle(rep, rep.iteration_end_s)
            _switch_off(world, rep, now_s)
        present -= 1
    _note_next_change(world, replicas, w)
