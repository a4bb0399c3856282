"""What a world does with a choice: a request is sent, answered from the cache, held back or shed."""

# ruff: noqa: ANN001, ANN201, ANN202 (Numba infers the types of kernels)
from __future__ import annotations

import math

import numpy as np

from envs import prefix_kernel
from envs import world_cache as answers
from envs import world_gateways as gateways
from envs import world_hedge as hedge
from envs import world_hold as held_queue
from envs import world_sessions as sessions
from envs import world_tasks as tasks
from envs.economics import ledger as books
from envs.fleet import engine
from envs.fleet.provider import submit_provider
from envs.kernels import kernel
from envs.world_completions import deliver_in_hand, post_unserved
from marginroute import view as v


@kernel
def provider_latency(static, sigmas, load, c, p):
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
    ttft_s, tpot_s = provider_latency(static, sigmas, load, c, p)
    submit_provider(
        pools, tables, worlds, replicas, slots, providers, requests, w, p, row, desks[w].now_s, ttft_s, tpot_s
    )


@kernel
def send_second(
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
def act(
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
            deliver_in_hand(config, terms, requests, desks, loads, entries, follow, ledger_usd, counts, w, i)
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
        post_unserved(terms, follow, lengths, desks, loads, ledger_usd, counts, w, i, books.SHED, books.CACHE, 0.0)
        tasks.book(follow, ledger_usd, loads, w, i)
