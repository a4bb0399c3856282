"""One world, from decision to decision: joins the served fleet (queues) with the ledger (money).

A world is a gateway in front of a fleet. Between two decisions it (1) carries out the last one, (2) advances the fleet
to the next decision epoch (an arrival, or a held batch job that is offered again), (3) posts every request that ended
on the way and the seconds that passed, and (4) writes what the gateway can know now into the View's buffers
(world_decisions.py, this module, world_completions.py, world_view.py).

The batch queue is first in, first out: a deferred request comes back as a new decision after `hold_s`, and may be
deferred again while its deadline leaves room; under a controller it comes back when that releases it (world_hold.py).
A request of a session arrives once the one before it has been answered (world_sessions.py). A request that a fault has
ended comes back as a new decision too (world_elastic.py), and one that waits too long may be sent twice
(world_hedge.py). At the horizon the backlog is settled in the last step (world_settling.py).

Everything here is compiled and takes record arrays with the world as leading axis; the same functions serve one world
and thousands; `terms` is `envs.world_terms.Terms`. Shapes: N worlds, M requests, R replicas, V providers, C candidates,
T tiers, K classes, J tasks. `begin` and `step` take the constants of every member of a family of scenarios, one row
each (`plant.Family`), and pass on those of the member that a world plays.
"""

# ruff: noqa: ANN001, ANN201, ANN202 (Numba infers the types of kernels)
from __future__ import annotations

import numpy as np

from envs import prefix_kernel
from envs import world_accounts as contracts
from envs import world_cache as answers
from envs import world_elastic as elastic
from envs import world_gateways as gateways
from envs import world_hedge as hedge
from envs import world_hold as held_queue
from envs import world_sessions as sessions
from envs import world_tasks as tasks
from envs.economics import ledger as books
from envs.economics.formulas import running_mean
from envs.fleet import engine, scaling
from envs.kernels import kernel
from envs.world_completions import collect
from envs.world_decisions import act, send_second
from envs.world_settling import settle
from envs.world_terms import of_member
from envs.world_view import show
from marginroute import latency
from marginroute import view as v

WAIT = np.iinfo(np.int64).min  # a choice that leaves its world where it is
BEGIN = WAIT + 1  # takes a freshly loaded world to its first decision


@kernel
def _note_arrival(desk, load, counts, w):
    """A request is there for the first time, now."""
    load.arrival = sessions.ARRIVED
    counts[w, books.CALLS, load.class_index] += 1
    gap_s = desk.now_s - desk.last_arrival_s
    desk.arrival_gap_s, _ = running_mean(desk.arrival_gap_s, desk.arrivals, gap_s, latency.RECENT_ARRIVALS)
    desk.arrivals += 1
    desk.last_arrival_s = desk.now_s


@kernel
def _next_arrival(requests, desk, loads, counts, w, follows, now_s):
    """Takes the request that arrives now: a follow-up, or the next of those that follow no other."""
    if follows:
        i = sessions.pop_ready(desk, loads, w)
        requests[w, i].patience_until_s = now_s + loads[w, i].patience_s
        return i
    i = int(desk.cursor)
    desk.cursor += 1
    while desk.cursor < desk.n_requests and loads[w, desk.cursor].follows == 1:
        desk.cursor += 1
    counts[w, books.FIRST_CALLS, loads[w, i].class_index] += 1
    return i


@kernel
def _go_on(
    config, terms, static, sigmas, tiers, pools, tables, worlds, replicas, slots, providers, requests,
    desks, loads, truth, good, own, entries, follow, lengths, ledger_usd, counts, changes, w,
):  # fmt: skip
    """Advances the world to its next decision, or settles it if there is none before the horizon."""
    desk = desks[w]
    begun_s = desk.now_s
    desk.offered = 0
    while True:
        change_s = np.inf
        if desk.elastic == 1:
            collect(
                config, terms, static, tiers, worlds, requests, desks, loads, truth, good, own, entries, follow,
                lengths, ledger_usd, counts, w,
            )  # fmt: skip
            change_s = elastic.next_change_s(worlds, desks, changes, w)
        arrival_s = loads[w, desk.cursor].arrived_at_s if desk.cursor < desk.n_requests else np.inf
        offer_s = loads[w, desk.held_head].offer_at_s if desk.held_head >= 0 else np.inf
        if desk.gated == 1:
            offer_s = held_queue.offer_s(desk, loads, w)
        retry_s = loads[w, desk.retry_head].offer_at_s if desk.retry_head >= 0 else np.inf
        ready_s = sessions.ready_s(desk, loads, w)
        next_s = min(arrival_s, offer_s, retry_s, ready_s)
        pause_s = min(change_s, desk.window_closes_s, sessions.safe_until_s(worlds, replicas, desk, own, w))
        if follow.hedges.shape[1] > 0:
            pause_s = min(pause_s, hedge.due_s(follow, requests, desk, loads, w))
            pause_s = min(pause_s, hedge.safe_until_s(replicas, requests, desk, follow, w, desk.now_s))
        last = min(next_s, pause_s) >= desk.horizon_s
        until_s = desk.horizon_s if last else min(next_s, pause_s)
        if desk.elastic == 1:
            scaling.advance(pools, tables, worlds, replicas, slots, providers, requests, w, until_s)
        else:
            engine.advance(pools, tables, worlds, replicas, slots, providers, requests, w, until_s)
        if desk.race_head >= 0:
            hedge.decide_races(
                pools, tables, worlds, replicas, slots, providers, requests, desk, loads, follow, counts, w, until_s
            )  # fmt: skip
        collect(
            config, terms, static, tiers, worlds, requests, desks, loads, truth, good, own, entries, follow, lengths,
            ledger_usd, counts, w,
        )  # fmt: skip
        gpu_usd_per_s = config[0].gpu_usd_per_s if desk.elastic == 0 else 0.0
        books.post_time(ledger_usd, terms.by_class, w, gpu_usd_per_s, until_s - desk.now_s)
        desk.now_s = until_s
        if desk.elastic == 1:
            elastic.post_gpu_hours(pools, replicas, desks, own, ledger_usd, w)
        if not last and next_s >= pause_s:
            elastic.apply_changes(pools, tables, worlds, replicas, slots, providers, requests, desks, own, changes, w)
            if desk.window_closes_s <= desk.now_s:
                contracts.close_windows(terms, desk, ledger_usd, w, desk.now_s)
            if follow.hedges.shape[1] > 0:
                i = hedge.pop_due(terms, replicas, providers, requests, desk, loads, follow, w)
                if i >= 0:
                    desk.current, desk.hedging, desk.elapsed_s = i, 1, until_s - begun_s
                    return
            continue
        desk.elapsed_s = until_s - begun_s
        if last:
            settle(
                config, terms, static, sigmas, tiers, pools, tables, worlds, replicas, slots, providers, requests,
                desks, loads, truth, good, own, entries, follow, lengths, ledger_usd, counts, w,
            )  # fmt: skip
            return
        if retry_s == next_s:
            desk.current = elastic.pop_retry(desks, loads, w)
            return
        if offer_s == next_s:
            desk.current = desk.held_head
            desk.held_head = loads[w, desk.current].next_held
            if desk.held_head < 0:
                desk.held_tail = -1
            if desk.gated == 1:
                held_queue.note_offer(desk, loads, w, desk.current, next_s)
            return
        i = _next_arrival(requests, desk, loads, counts, w, ready_s < arrival_s, next_s)
        _note_arrival(desk, loads[w, i], counts, w)
        if config[0].gateways > 1:
            gateways.note_arrival(lengths, loads[w, i].gateway, next_s)
        tasks.note_arrival(follow, loads, w, i)
        if config[0].keeps_accounts == 0 or contracts.arrive(terms, loads, counts, w, i, next_s):
            break
        if loads[w, i].first_child >= 0:
            sessions.not_answered(loads, counts, w, i)
        tasks.note_lost(follow, loads, w, i)
    if config[0].cache_semantic == 1:
        tasks.mark(follow, ledger_usd, loads, w, i)
        answers.charge(entries, loads, ledger_usd, w, i)
        tasks.book(follow, ledger_usd, loads, w, i)
    desk.current = i


@kernel
def set_in_flight_caps(pools, tables, worlds, replicas, slots, providers, requests, desks, caps):
    """Sets the in-flight cap of every replica, `caps` (N, R); held requests go through where it rose."""
    for w in range(caps.shape[0]):
        for r in range(caps.shape[1]):
            engine.set_in_flight_cap(
                pools, tables, worlds, replicas, slots, providers, requests, w, r, caps[w, r], desks[w].now_s
            )


@kernel
def _account(desks, ledger_usd, w):
    """Reward equals report: the change of the ledger since the last decision."""
    total = 0.0
    for account in range(ledger_usd.shape[1]):
        for k in range(ledger_usd.shape[2]):
            total += ledger_usd[w, account, k]
    desks[w].reward_usd = total - desks[w].margin_usd
    desks[w].margin_usd = total


@kernel
def step(
    configs, all_terms, statics, all_sigmas, kinds, tiers, pools, tables, worlds, replicas, slots, providers, requests,
    desks, loads, index, prior, truth, good, own, entries, follow, lengths, ledger_usd, counts, changes, actions,
    signals, request_view, legal, p_true, choices,
):  # fmt: skip
    """Carries out one choice in every world, `choices` (N,), and takes each to its next decision; skips ended ones.

    What is posted on the way to the first decision enters the first reward.
    """
    for w in range(desks.shape[0]):
        c = choices[w]
        if c == WAIT:
            continue
        if desks[w].done == 1:
            _account(desks, ledger_usd, w)  # nothing, unless the episode ended before its first decision
            desks[w].elapsed_s = 0.0
            continue
        member = desks[w].variant
        config, terms, static, sigmas = (
            configs[member],
            of_member(all_terms, member),
            statics[member],
            all_sigmas[member],
        )
        if desks[w].hedging == 1:
            send_second(
                config, static, sigmas, kinds, pools, tables, worlds, replicas, slots, providers, requests, desks,
                loads, index, own, follow, lengths, counts, actions, signals, legal, w, c,
            )  # fmt: skip
            desks[w].sequence += 1
        elif c != BEGIN:
            if 0 <= c < kinds.shape[0] and kinds[c] <= v.PROVIDER and legal[w, c]:
                sessions.sent(desks[w], loads[w, desks[w].current], own[w, c])
                loads[w, desks[w].current].price_times = own[w, c].price_times
                if config[0].gateways > 1:
                    gateways.sent(own, loads, w, hedge.row_of(follow, w, desks[w].current), c)
                    if kinds[c] == v.REPLICA:
                        gateways.note_prefill(lengths, loads[w, desks[w].current], signals[v.CACHED_TOKENS, w, c])
                tasks.note_send(follow, desks, loads, w, c)
                if desks[w].prefix_block_tokens > 0:
                    row = hedge.row_of(follow, w, desks[w].current)
                    prefix_kernel.note_send(index, desks, loads, requests, signals, w, c, row)
            act(
                config, terms, static, sigmas, kinds, pools, tables, worlds, replicas, slots, providers, requests,
                desks, loads, entries, follow, lengths, ledger_usd, counts, actions, legal, w, c,
            )  # fmt: skip
            desks[w].sequence += 1
        _go_on(
            config, terms, static, sigmas, tiers, pools, tables, worlds, replicas, slots, providers, requests,
            desks, loads, truth, good, own, entries, follow, lengths, ledger_usd, counts, changes, w,
        )  # fmt: skip
        if c != BEGIN:
            _account(desks, ledger_usd, w)
        if desks[w].done == 0:
            show(
                config, terms, tiers, replicas, providers, requests, desks, loads, prior, truth, good, own, entries,
                follow, lengths, signals, request_view, legal, p_true, w,
            )  # fmt: skip
            if desks[w].prefix_block_tokens > 0:
                prefix_kernel.show_cached(index, replicas, desks, loads, signals, legal, w)
        elif desks[w].shown_at >= 0:
            hedge.show_nothing(desks[w], signals, w)
            legal[w, kinds.shape[0] - 1] = True
