"""One world, from decision to decision: joins the served fleet (queues) with the ledger (money).

A world is a gateway in front of a fleet. Between two decisions it (1) carries out the last one, (2) advances the fleet
to the next decision epoch (an arrival, or a held batch job that is offered again), (3) posts every request that ended
on the way and the seconds that passed, and (4) writes what the gateway can know now into the View's buffers.

The batch queue is first in, first out: a deferred request comes back as a new decision after `hold_s`, and may be
deferred again while its deadline leaves room; under a controller it comes back when that releases it (world_hold.py).
A request of a session arrives once the one before it has been answered (world_sessions.py). A request that a fault has
ended comes back as a new decision too (world_elastic.py), and one that waits too long may be sent twice
(world_hedge.py). At the horizon the backlog is settled in the last step: the
fleet runs dry without new arrivals, and jobs still in the batch queue are bought from the dearest provider (or go
unserved), so that nothing is gained by parking work at the end.

Everything here is compiled and takes record arrays with the world as leading axis; the same functions serve one world
and thousands; `terms` is `envs.world_terms.Terms`. Shapes: N worlds, M requests, R replicas, V providers, C candidates,
T tiers, K classes, J tasks. `begin` and `step` take the constants of every member of a family of scenarios, one row
each (`worlds.Family`), and pass on those of the member that a world plays.
"""

# ruff: noqa: ANN001, ANN201, ANN202 (Numba infers the types of kernels)
from __future__ import annotations

import math

import numpy as np

from envs import prefix_kernel
from envs import world_accounts as contracts
from envs import world_cache as answers
from envs import world_elastic as elastic
from envs import world_feedback as feedback
from envs import world_gateways as gateways
from envs import world_hedge as hedge
from envs import world_hold as held_queue
from envs import world_sessions as sessions
from envs import world_tasks as tasks
from envs.economics import ledger as books
from envs.fleet import engine, scaling
from envs.fleet.provider import limit_spent, provider_available, submit_provider
from envs.fleet.state import ABANDONED, COMPLETED, FAILED, LOST
from envs.kernels import kernel
from envs.world_terms import of_member
from marginroute import latency
from marginroute import view as v

WAIT = np.iinfo(np.int64).min  # a choice that leaves its world where it is
BEGIN = WAIT + 1  # takes a freshly loaded world to its first decision

running_mean = kernel(latency.running_mean, inline="always")


@kernel
def _post_unserved(terms, follow, lengths, desks, loads, ledger_usd, counts, w, i, count, account, cost_usd):
    contracts.post_no_answer(terms, lengths, loads, ledger_usd, counts, w, i, count, account, cost_usd, desks[w].now_s)
    if loads[w, i].first_child >= 0:
        sessions.not_answered(loads, counts, w, i)
    tasks.note_lost(follow, loads, w, i)


@kernel
def _post_finished(
    config, terms, static, tiers, requests, desks, loads, truth, good, own, entries, follow, lengths, ledger_usd,
    counts, w, i,
):  # fmt: skip
    """Posts request `i`, which left the fleet, and learns from it what the gateway can learn."""
    row = hedge.row_of(follow, w, i)
    load, request = loads[w, i], requests[w, row]
    k, c = load.class_index, load.answered_by
    account = books.ENERGY if c < config[0].n_replicas else books.API_SPEND
    cached_tokens = request.cached_tokens if c < config[0].n_replicas else load.cached_tokens
    counts[w, books.RESTARTS, k] += request.restarts
    sessions.ended(desks[w], load, own[w, c])
    mine = own[load.gateway, c]
    if config[0].gateways > 1:
        gateways.ended(own, loads, w, row, c)
    if request.status == LOST:
        elastic.note_call(mine, True, request.completed_at_s)
        prompt_tokens = min(request.computed, load.prompt_tokens)
        cost_usd = 0.0  # a provider bills no call that failed
        if c < config[0].n_replicas:
            cost_usd = books.tokens_usd(
                max(prompt_tokens - cached_tokens, 0), request.computed - prompt_tokens,
                static[v.INPUT_USD, c], static[v.OUTPUT_USD, c],
            )  # fmt: skip
        if not elastic.try_again(config, requests, desks, loads, ledger_usd, counts, w, i, row, account, cost_usd):
            request.status = FAILED
            _post_unserved(
                terms, follow, lengths, desks, loads, ledger_usd, counts, w, i, books.FAILED, account, cost_usd
            )
        return
    if request.status != COMPLETED:
        count = books.ABANDONED if request.status == ABANDONED else books.FAILED
        if c < config[0].n_replicas:
            cost_usd = max(request.computed - cached_tokens, 0) * static[v.INPUT_USD, c]
        else:
            prompt_tokens = load.prompt_tokens if request.status == ABANDONED else 0
            cached_tokens = min(cached_tokens, prompt_tokens)
            cost_usd = books.answer_usd(
                prompt_tokens, cached_tokens, 0, static[v.INPUT_USD, c], static[v.CACHED_INPUT_USD, c], 0.0
            )
            cost_usd *= load.price_times
        _post_unserved(terms, follow, lengths, desks, loads, ledger_usd, counts, w, i, count, account, cost_usd)
        return
    tpot_s = (request.completed_at_s - request.first_token_at_s) / max(load.output_tokens - 1, 1)
    since_sent_s = request.first_token_at_s - request.dispatched_at_s
    mine.recent_ttft_s, weight = running_mean(mine.recent_ttft_s, mine.weight, since_sent_s, latency.RECENT_ANSWERS)
    mine.recent_tpot_s, weight = running_mean(mine.recent_tpot_s, mine.weight, tpot_s, latency.RECENT_ANSWERS)
    mine.weight = weight
    elastic.note_call(mine, False, request.completed_at_s)
    mean = lengths[load.gateway, k, load.task_index]
    mean.value, mean.weight = running_mean(mean.value, mean.weight, load.output_tokens, latency.RECENT_LENGTHS)
    cost_usd = static[v.CALL_USD, c] + books.answer_usd(
        load.prompt_tokens, cached_tokens, load.output_tokens,
        static[v.INPUT_USD, c], static[v.CACHED_INPUT_USD, c], static[v.OUTPUT_USD, c],
    )  # fmt: skip
    if c >= config[0].n_replicas:
        cost_usd *= load.price_times
    answer = good[w, i, tiers[c]]
    if load.verified > 0:
        answer = tasks.outcome(follow, loads, truth, good, w, i, tiers[c])
        if not tasks.passes(follow, requests, loads, ledger_usd, w, i, answer):
            if not tasks.turn_down(
                follow, requests, desks, loads, ledger_usd, counts, w, i, tiers[c], answer, account, cost_usd
            ):
                request.status = ABANDONED
                _post_unserved(
                    terms, follow, lengths, desks, loads, ledger_usd, counts, w, i, books.ABANDONED, account, cost_usd
                )
            return
    arrived_at_s = load.arrived_at_s - answers.embedding_s(entries, load)
    ttft_s = request.first_token_at_s - arrived_at_s
    e2e_s = request.completed_at_s - arrived_at_s
    contracts.post_answer(
        terms, loads, ledger_usd, counts, w, i, cached_tokens, load.output_tokens, ttft_s, tpot_s, e2e_s, answer == 1,
        account, cost_usd, request.completed_at_s,
    )  # fmt: skip
    if load.first_child >= 0:
        sessions.answered(config, follow.results, desks[w], loads, ledger_usd, counts, w, i, request.completed_at_s)
    tasks.note_answer(follow, ledger_usd, loads, w, i, answer)
    if load.judged == 1:
        feedback.answered(config, desks, loads, w, i, tiers[c], answer, request.completed_at_s)
    if load.prompt_key >= 0 and config[0].cache_capacity > 0:
        answers.store(config, desks, entries, loads, ledger_usd, w, i, tiers[c], answer, request.completed_at_s)


@kernel
def _deliver_in_hand(config, terms, requests, desks, loads, entries, follow, ledger_usd, counts, w, i):
    """Request `i` gets the answer that was turned down last."""
    trial = follow.trials[w, i]
    tasks.deliver_in_hand(config, terms, follow, requests, desks, loads, ledger_usd, counts, w, i)
    tasks.note_answer(follow, ledger_usd, loads, w, i, trial.good)
    if loads[w, i].prompt_key >= 0 and config[0].cache_capacity > 0:
        answers.store(config, desks, entries, loads, ledger_usd, w, i, trial.tier, trial.good, desks[w].now_s)


@kernel
def _provider_latency(static, sigmas, load, c, p):
    """TTFT and TPOT in seconds that provider `p` will take for a request; the same whenever it is asked."""
    ttft_s = static[v.FIXED_TTFT_S, c] * math.exp(sigmas[p, 0] * load.ttft_noise)
    return ttft_s, static[v.FIXED_TPOT_S, c] * math.exp(sigmas[p, 1] * load.tpot_noise)


@kernel
def _hold(config, desks, loads, w, i):
    """Appends request `i` to the batch queue; it is offered again after `hold_s`."""
    desk, load = desks[w], loads[w, i]
    load.offer_at_s, load.next_held = desk.now_s + config[0].hold_s, -1
    if desk.held_tail >= 0:
        loads[w, desk.held_tail].next_held = i
    else:
        desk.held_head = i
    desk.held_tail = i


@kernel
def _send(
    config, static, sigmas, pools, tables, worlds, replicas, slots, providers, requests, desks, load, row, w, c
):  # fmt: skip
    """Sends a request, `row` of `requests`, to replica or provider `c` now."""
    p = c - config[0].n_replicas
    if p < 0:
        engine.submit(pools, tables, worlds, replicas, slots, providers, requests, w, c, row, desks[w].now_s)
        return
    ttft_s, tpot_s = _provider_latency(static, sigmas, load, c, p)
    submit_provider(
        pools, tables, worlds, replicas, slots, providers, requests, w, p, row, desks[w].now_s, ttft_s, tpot_s
    )


@kernel
def _hedge(
    config, static, sigmas, kinds, pools, tables, worlds, replicas, slots, providers, requests, desks, loads, index,
    own, follow, lengths, counts, actions, signals, legal, w, c,
):  # fmt: skip
    """Carries out the choice at a hedge timer: another candidate gets the request too; any other choice is to wait."""
    desk = desks[w]
    i = desk.current
    load = loads[w, i]
    desk.hedging = 0
    if c < 0 or c >= kinds.shape[0] or not legal[w, c]:
        desk.illegal += 1
        return
    if c == load.answered_by:
        return
    cached_tokens = 0
    if desk.prefix_block_tokens > 0:
        cached_tokens = int(signals[v.CACHED_TOKENS, w, c])
        prefix_kernel.insert(index, loads, w, c, i, desk.now_s)
    sessions.sent(desk, load, own[w, c])
    counts[w, books.HEDGED, load.class_index] += 1
    actions[w, kinds[c]] += 1
    row = hedge.take_row(requests, desk, loads, follow, w, i, c, cached_tokens, own[w, c].price_times)
    if config[0].gateways > 1:
        gateways.sent(own, loads, w, row, c)
        if c < config[0].n_replicas:
            gateways.note_prefill(lengths, load, cached_tokens)
    _send(config, static, sigmas, pools, tables, worlds, replicas, slots, providers, requests, desks, load, row, w, c)


@kernel
def _act(
    config, terms, static, sigmas, kinds, pools, tables, worlds, replicas, slots, providers, requests,
    desks, loads, entries, follow, lengths, ledger_usd, counts, actions, legal, w, c,
):  # fmt: skip
    """Carries out the choice of candidate `c` for the current request; an illegal choice sheds the request."""
    desk = desks[w]
    i, now_s = desk.current, desk.now_s
    if c < 0 or c >= kinds.shape[0] or not legal[w, c]:
        desk.illegal += 1
        c = kinds.shape[0] - 1
    kind = kinds[c]
    actions[w, kind] += 1
    load = loads[w, i]
    k = load.class_index
    if kind <= v.PROVIDER:
        load.answered_by = c
        _send(config, static, sigmas, pools, tables, worlds, replicas, slots, providers, requests, desks, load,
              hedge.row_of(follow, w, i), w, c)  # fmt: skip
        if follow.hedges.shape[1] > 0:
            hedge.set_timer(follow, loads, w, i, now_s)
    elif kind == v.CACHE:
        tasks.mark(follow, ledger_usd, loads, w, i)
        if load.turned_down > 0:
            _deliver_in_hand(config, terms, requests, desks, loads, entries, follow, ledger_usd, counts, w, i)
        else:
            good, at_s = answers.serve(config, terms, desks, loads, entries, ledger_usd, counts, w, i)
            if load.first_child >= 0:
                sessions.answered(config, follow.results, desk, loads, ledger_usd, counts, w, i, at_s)
            tasks.note_answer(follow, ledger_usd, loads, w, i, np.uint8(good))
        tasks.book(follow, ledger_usd, loads, w, i)
    elif kind == v.DEFER:
        counts[w, books.DEFERRED, k] += 1
        if desk.gated == 1:
            held_queue.hold(config, desks, loads, w, i)
        else:
            _hold(config, desks, loads, w, i)
    else:
        tasks.mark(follow, ledger_usd, loads, w, i)
        _post_unserved(terms, follow, lengths, desks, loads, ledger_usd, counts, w, i, books.SHED, books.CACHE, 0.0)
        tasks.book(follow, ledger_usd, loads, w, i)


@kernel
def _post_spare(config, static, requests, desks, loads, own, follow, ledger_usd, counts, w, i, row):
    """Posts what the call in `row`, which ended without answering request `i`, has cost."""
    load, call, calls = loads[w, i], requests[w, row], follow.hedges[w, i]
    k, c = load.class_index, calls.second
    sessions.ended(desks[w], load, own[w, c])
    if config[0].gateways > 1:
        gateways.ended(own, loads, w, row, c)
    counts[w, books.RESTARTS, k] += call.restarts
    prompt_tokens, tokens = load.prompt_tokens, 0
    if call.status == COMPLETED:
        tokens = load.output_tokens
    elif not math.isnan(call.first_token_at_s):
        tokens = 1  # it was cancelled at that instant
    tasks.mark(follow, ledger_usd, loads, w, i)
    if c < config[0].n_replicas:
        prompt_tokens = max(min(call.computed, prompt_tokens) - call.cached_tokens, 0)
        usd = books.tokens_usd(prompt_tokens, tokens, static[v.INPUT_USD, c], static[v.OUTPUT_USD, c])
        books.post(ledger_usd, w, books.ENERGY, k, -usd)
    elif call.status == COMPLETED or call.status == ABANDONED:
        usd = books.answer_usd(
            prompt_tokens, min(calls.second_cached, prompt_tokens), tokens,
            static[v.INPUT_USD, c], static[v.CACHED_INPUT_USD, c], static[v.OUTPUT_USD, c],
        )  # fmt: skip
        books.post(ledger_usd, w, books.API_SPEND, k, -calls.second_times * usd)
    tasks.book(follow, ledger_usd, loads, w, i)
    calls.second = -1


@kernel
def _note_end(config, static, requests, desks, loads, own, follow, ledger_usd, counts, w, row):
    """The call in `row` has ended; returns the request that is over with it, or -1 if that has another call."""
    i = row - desks[w].n_requests if row >= desks[w].n_requests else row
    calls = follow.hedges[w, i]
    if calls.state == hedge.RACING:  # and it has ended without a token
        hedge.end_race(desks[w], follow, w, i)
        if row == calls.row:
            hedge.change_over(desks[w], loads, follow, w, i)
        if requests[w, row].status == LOST:
            elastic.note_call(own[loads[w, i].gateway, calls.second], True, requests[w, row].completed_at_s)
    elif row == calls.row:
        if calls.state == hedge.TIMED:
            hedge.drop_timer(follow, loads, w, i)
        return i
    _post_spare(config, static, requests, desks, loads, own, follow, ledger_usd, counts, w, i, row)
    return -1


@kernel
def _collect(
    config, terms, static, tiers, worlds, requests, desks, loads, truth, good, own, entries, follow, lengths,
    ledger_usd, counts, w,
):  # fmt: skip
    """Posts every request that finished since the last call."""
    i = engine.pop_finished(worlds, requests, w)
    while i >= 0:
        if follow.hedges.shape[1] > 0:
            i = _note_end(config, static, requests, desks, loads, own, follow, ledger_usd, counts, w, i)
        if i >= 0:
            tasks.mark(follow, ledger_usd, loads, w, i)
            _post_finished(
                config, terms, static, tiers, requests, desks, loads, truth, good, own, entries, follow, lengths,
                ledger_usd, counts, w, i,
            )  # fmt: skip
            tasks.book(follow, ledger_usd, loads, w, i)
        i = engine.pop_finished(worlds, requests, w)


@kernel
def _buy_out(
    config, terms, static, sigmas, tiers, requests, desks, loads, truth, good, own, entries, follow, lengths,
    ledger_usd, counts, w, i, count,
):  # fmt: skip
    """After the horizon: the dearest provider that may answers request `i`; else it goes unserved as `count`.

    A request with an answer in hand gets that.
    """
    load, request = loads[w, i], requests[w, hedge.row_of(follow, w, i)]
    p = terms.last_provider[load.class_index]
    tasks.mark(follow, ledger_usd, loads, w, i)
    if load.turned_down > 0:
        _deliver_in_hand(config, terms, requests, desks, loads, entries, follow, ledger_usd, counts, w, i)
        tasks.book(follow, ledger_usd, loads, w, i)
        return
    if p < 0:
        request.status = FAILED if count == books.FAILED else request.status
        _post_unserved(terms, follow, lengths, desks, loads, ledger_usd, counts, w, i, count, books.CACHE, 0.0)
        tasks.book(follow, ledger_usd, loads, w, i)
        return
    c = config[0].n_replicas + p
    ttft_s, tpot_s = _provider_latency(static, sigmas, load, c, p)
    load.answered_by, load.cached_tokens, load.price_times = c, 0, own[w, c].price_times
    sessions.sent(desks[w], load, own[w, c])
    if config[0].gateways > 1:
        gateways.sent(own, loads, w, hedge.row_of(follow, w, i), c)
    request.status, request.dispatched_at_s = COMPLETED, desks[w].now_s
    request.first_token_at_s = desks[w].now_s + ttft_s
    request.completed_at_s = request.first_token_at_s + tpot_s * (load.output_tokens - 1)
    _post_finished(
        config, terms, static, tiers, requests, desks, loads, truth, good, own, entries, follow, lengths, ledger_usd,
        counts, w, i,
    )  # fmt: skip
    tasks.book(follow, ledger_usd, loads, w, i)


@kernel
def _run_races(pools, tables, worlds, replicas, slots, providers, requests, desk, loads, follow, counts, w):
    """At the horizon: runs the fleet until no race can be decided any more."""
    now_s = desk.now_s
    while True:
        now_s = hedge.safe_until_s(replicas, requests, desk, follow, w, now_s)
        if math.isinf(now_s):
            return
        engine.advance(pools, tables, worlds, replicas, slots, providers, requests, w, now_s)
        hedge.decide_races(
            pools, tables, worlds, replicas, slots, providers, requests, desk, loads, follow, counts, w, now_s
        )  # fmt: skip


@kernel
def _settle(
    config, terms, static, sigmas, tiers, pools, tables, worlds, replicas, slots, providers, requests,
    desks, loads, truth, good, own, entries, follow, lengths, ledger_usd, counts, w,
):  # fmt: skip
    """Ends the episode at its horizon: buys out the batch queue, runs the fleet dry, posts what is left."""
    desk = desks[w]
    for r in range(config[0].n_replicas):
        own[w, r].busy_s = engine.busy_seconds(replicas[w, r], desk.horizon_s)
        own[w, r].powered_s = scaling.paid_seconds(pools[replicas[w, r].pool], replicas[w, r], r, desk.horizon_s)
    while desk.held_head >= 0:
        i = int(desk.held_head)
        desk.held_head = loads[w, i].next_held
        _buy_out(
            config, terms, static, sigmas, tiers, requests, desks, loads, truth, good, own, entries, follow, lengths,
            ledger_usd, counts, w, i, books.SHED,
        )  # fmt: skip
    desk.held_tail = -1
    if desk.elastic == 1:
        elastic.lose_hanging(pools, worlds, replicas, slots, requests, w, desk.now_s)
    if desk.race_head >= 0:
        _run_races(
            pools, tables, worlds, replicas, slots, providers, requests, desk, loads, follow, counts, w
        )  # fmt: skip
    engine.drain(pools, tables, worlds, replicas, slots, providers, requests, w)
    _collect(
        config, terms, static, tiers, worlds, requests, desks, loads, truth, good, own, entries, follow, lengths,
        ledger_usd, counts, w,
    )  # fmt: skip
    while desk.retry_head >= 0:
        i = elastic.pop_retry(desks, loads, w)
        _buy_out(
            config, terms, static, sigmas, tiers, requests, desks, loads, truth, good, own, entries, follow, lengths,
            ledger_usd, counts, w, i, books.FAILED,
        )  # fmt: skip
    if follow.workflows.shape[0] > 0:
        tasks.end_episode(follow, ledger_usd, w)
    if follow.hedges.shape[1] > 0:
        hedge.end_episode(requests, desk, follow, w)
    if desk.window_closes_s < np.inf:
        contracts.close_windows(terms, desk, ledger_usd, w, np.inf)
    desk.done = 1


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
            _collect(
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
        _collect(
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
            _settle(
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
def _show(
    config, terms, tiers, replicas, providers, requests, desks, loads, prior, truth, good, own, entries, follow,
    lengths, signals, request_view, legal, p_true, w,
):  # fmt: skip
    """Writes the View of the current decision, and beside it the hidden P(good) that only the learner reads."""
    desk = desks[w]
    i = desk.current
    load = loads[w, i]
    allowed = terms.allowed[load.class_index]
    n_replicas, n_providers = config[0].n_replicas, config[0].n_providers
    for c in range(n_replicas + n_providers):
        mine = own[load.gateway, c]
        if c < n_replicas:
            replica = replicas[w, c]
            signals[v.IN_FLIGHT, w, c] = replica.in_flight
            signals[v.IN_FLIGHT_CAP, w, c] = replica.in_flight_cap
            signals[v.HELD, w, c] = replica.held
            signals[v.PENDING_PREFILL_TOKENS, w, c] = replica.pending_prefill_tokens
            signals[v.DECODING, w, c] = replica.decoding
            signals[v.DECODING_TOKENS, w, c] = replica.decoding_tokens
            signals[v.WAITING, w, c] = replica.scraped_waiting
            signals[v.RUNNING, w, c] = replica.scraped_running
            signals[v.KV_USAGE, w, c] = replica.scraped_kv_usage
            signals[v.TELEMETRY_AGE_S, w, c] = desk.now_s - replica.scraped_at_s
            legal[w, c] = allowed[c] and scaling.takes_requests(replica)
        else:
            p = c - n_replicas
            signals[v.IN_FLIGHT, w, c] = providers[w, p].in_flight
            signals[v.LIMIT_SPENT, w, c] = limit_spent(providers, w, p, desk.now_s)
            legal[w, c] = allowed[c] and provider_available(providers, w, p, desk.now_s, load.prompt_tokens)
        signals[v.RECENT_ERRORS, w, c] = 0.0
        if mine.error_share > 0.0:
            signals[v.RECENT_ERRORS, w, c] = elastic.recent_errors(mine.error_share, desk.now_s - mine.error_at_s)
        signals[v.RECENT_TTFT_S, w, c] = mine.recent_ttft_s
        signals[v.RECENT_TPOT_S, w, c] = mine.recent_tpot_s
        signals[v.P_GOOD_PRIOR, w, c] = prior[w, i, tiers[c]]
        p_true[w, c] = truth[w, i, tiers[c]]
    c = n_replicas + n_providers
    legal[w, c] = answers.find(config, terms, desks, entries, loads, w, i)
    if legal[w, c]:
        answers.show(config, desks, entries, prior, signals, p_true, w, c, i)
    else:
        answers.show_nothing(signals, p_true, w, c)
    if config[0].feedback_delay_s >= 0.0:
        feedback.hear(desks, loads, prior, lengths, terms.by_class.shape[0], w)
        feedback.show(config, tiers, lengths, signals, terms.by_class.shape[0], w, load)
    if load.turned_down > 0:
        tasks.show_trial(follow, desks, loads, tiers, prior, truth, good, signals, request_view, legal, p_true, w, c)
    elif desk.tried == 1:
        tasks.show_nothing(signals, request_view, w)
        desk.tried = 0
    if desk.shown_at >= 0:
        hedge.show_nothing(desk, signals, w)
    term = terms.by_class[load.class_index]
    deadline_left_s = load.arrived_at_s + load.deadline_s - desk.now_s
    legal[w, c + 1] = term.delay_tolerant > 0.0 and deadline_left_s > 2.0 * config[0].hold_s
    legal[w, c + 2] = True
    if desk.hedging == 1:
        hedge.show(requests, desk, loads, follow, signals, legal, w, c)

    request_view[v.PROMPT_TOKENS, w] = load.prompt_tokens
    request_view[v.EXPECTED_OUTPUT_TOKENS, w] = lengths[load.gateway, load.class_index, load.task_index].value
    request_view[v.CLASS_INDEX, w] = load.class_index
    request_view[v.TASK_INDEX, w] = load.task_index
    request_view[v.DIFFICULTY_SIGNAL, w] = load.difficulty_signal
    request_view[v.WAITED_S, w] = desk.now_s - load.arrived_at_s + answers.embedding_s(entries, load)
    request_view[v.DEADLINE_LEFT_S, w] = deadline_left_s
    request_view[v.ARRIVAL_RATE_PER_S, w] = 1.0 / max(desk.arrival_gap_s, 1e-6)
    request_view[v.SEQUENCE, w] = desk.sequence
    request_view[v.INPUT_PRICE_USD, w] = term.input_usd_per_token
    request_view[v.OUTPUT_PRICE_USD, w] = term.output_usd_per_token
    request_view[v.REQUEST_VALUE_USD, w] = term.request_value_usd
    request_view[v.REFUND_SHARE, w] = term.refund_share
    request_view[v.BAD_ANSWER_USD, w] = term.bad_answer_usd + term.bad_lifetime_usd
    request_view[v.SLO_TTFT_S, w] = term.slo_ttft_s
    request_view[v.SLO_TPOT_S, w] = term.slo_tpot_s
    request_view[v.SLO_E2E_S, w] = term.slo_e2e_s
    request_view[v.TTFT_CREDIT_SHARE, w] = term.ttft_credit_share
    request_view[v.TPOT_CREDIT_SHARE, w] = term.tpot_credit_share
    request_view[v.E2E_CREDIT_SHARE, w] = term.e2e_credit_share
    request_view[v.UNSERVED_CREDIT_SHARE, w] = term.unserved_credit_share
    request_view[v.UNSERVED_CREDIT_USD, w] = term.unserved_credit_usd + term.unserved_lifetime_usd
    request_view[v.PATIENCE_S, w] = term.patience_s
    contracts.show(config, terms, loads, request_view, w, i, desk.now_s)
    if follow.tasks.shape[1] > 0:
        tasks.show_session(follow, desks, loads, signals, request_view, w)
    if config[0].gateways > 1:
        gateways.show(config, replicas, requests, desks, loads, own, lengths, signals, request_view, w)


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
            _hedge(
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
            _act(
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
            _show(
                config, terms, tiers, replicas, providers, requests, desks, loads, prior, truth, good, own, entries,
                follow, lengths, signals, request_view, legal, p_true, w,
            )  # fmt: skip
            if desks[w].prefix_block_tokens > 0:
                prefix_kernel.show_cached(index, replicas, desks, loads, signals, legal, w)
        elif desks[w].shown_at >= 0:
            hedge.show_nothing(desks[w], signals, w)
            legal[w, kinds.shape[0] - 1] = True
