"""The end of an episode: the backlog is settled in its last step.

The fleet runs dry without new arrivals, and jobs still in the batch queue are bought from the dearest provider (or go
unserved), so that nothing is gained by parking work at the end.
"""

# ruff: noqa: ANN001, ANN201, ANN202 (Numba infers the types of kernels)
from __future__ import annotations

import math

import numpy as np

from envs import world_accounts as contracts
from envs import world_elastic as elastic
from envs import world_gateways as gateways
from envs import world_hedge as hedge
from envs import world_sessions as sessions
from envs import world_tasks as tasks
from envs.economics import ledger as books
from envs.fleet import engine, scaling
from envs.fleet.state import COMPLETED, FAILED
from envs.kernels import kernel
from envs.world_completions import collect, deliver_in_hand, post_finished, post_unserved
from envs.world_decisions import provider_latency


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
        deliver_in_hand(config, terms, requests, desks, loads, entries, follow, ledger_usd, counts, w, i)
        tasks.book(follow, ledger_usd, loads, w, i)
        return
    if p < 0:
        request.status = FAILED if count == books.FAILED else request.status
        post_unserved(terms, follow, lengths, desks, loads, ledger_usd, counts, w, i, count, books.CACHE, 0.0)
        tasks.book(follow, ledger_usd, loads, w, i)
        return
    c = config[0].n_replicas + p
    ttft_s, tpot_s = provider_latency(static, sigmas, load, c, p)
    load.answered_by, load.cached_tokens, load.price_times = c, 0, own[w, c].price_times
    sessions.sent(desks[w], load, own[w, c])
    if config[0].gateways > 1:
        gateways.sent(own, loads, w, hedge.row_of(follow, w, i), c)
    request.status, request.dispatched_at_s = COMPLETED, desks[w].now_s
    request.first_token_at_s = desks[w].now_s + ttft_s
    request.completed_at_s = request.first_token_at_s + tpot_s * (load.output_tokens - 1)
    post_finished(
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
def settle(
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
    collect(
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
