"""What the end of a call brings to a world: it is posted, and the gateway learns from it what it can learn."""

# ruff: noqa: ANN001, ANN201, ANN202 (Numba infers the types of kernels)
from __future__ import annotations

import math

from envs import world_accounts as contracts
from envs import world_cache as answers
from envs import world_elastic as elastic
from envs import world_feedback as feedback
from envs import world_gateways as gateways
from envs import world_hedge as hedge
from envs import world_sessions as sessions
from envs import world_tasks as tasks
from envs.economics import ledger as books
from envs.economics.formulas import answer_usd, running_mean, tokens_usd
from envs.fleet import engine
from envs.fleet.state import ABANDONED, COMPLETED, FAILED, LOST
from envs.kernels import kernel
from marginroute import latency
from marginroute import view as v


@kernel
def post_unserved(terms, follow, lengths, desks, loads, ledger_usd, counts, w, i, count, account, cost_usd):
    """Posts that request `i` gets no answer, counted as `count`, and what it has cost."""
    contracts.post_no_answer(terms, lengths, loads, ledger_usd, counts, w, i, count, account, cost_usd, desks[w].now_s)
    if loads[w, i].first_child >= 0:
        sessions.not_answered(loads, counts, w, i)
    tasks.note_lost(follow, loads, w, i)


@kernel
def post_finished(
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
            cost_usd = tokens_usd(
                max(prompt_tokens - cached_tokens, 0), request.computed - prompt_tokens,
                static[v.INPUT_USD, c], static[v.OUTPUT_USD, c],
            )  # fmt: skip
        if not elastic.try_again(config, requests, desks, loads, ledger_usd, counts, w, i, row, account, cost_usd):
            request.status = FAILED
            post_unserved(
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
            cost_usd = answer_usd(
                prompt_tokens, cached_tokens, 0, static[v.INPUT_USD, c], static[v.CACHED_INPUT_USD, c], 0.0
            )
            cost_usd *= load.price_times
        post_unserved(terms, follow, lengths, desks, loads, ledger_usd, counts, w, i, count, account, cost_usd)
        return
    tpot_s = (request.completed_at_s - request.first_token_at_s) / max(load.output_tokens - 1, 1)
    since_sent_s = request.first_token_at_s - request.dispatched_at_s
    mine.recent_ttft_s, weight = running_mean(mine.recent_ttft_s, mine.weight, since_sent_s, latency.RECENT_ANSWERS)
    mine.recent_tpot_s, weight = running_mean(mine.recent_tpot_s, mine.weight, tpot_s, latency.RECENT_ANSWERS)
    mine.weight = weight
    elastic.note_call(mine, False, request.completed_at_s)
    mean = lengths[load.gateway, k, load.task_index]
    mean.value, mean.weight = running_mean(mean.value, mean.weight, load.output_tokens, latency.RECENT_LENGTHS)
    cost_usd = static[v.CALL_USD, c] + answer_usd(
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
                post_unserved(
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
def deliver_in_hand(config, terms, requests, desks, loads, entries, follow, ledger_usd, counts, w, i):
    """Request `i` gets the answer that was turned down last."""
    trial = follow.trials[w, i]
    tasks.deliver_in_hand(config, terms, follow, requests, desks, loads, ledger_usd, counts, w, i)
    tasks.note_answer(follow, ledger_usd, loads, w, i, trial.good)
    if loads[w, i].prompt_key >= 0 and config[0].cache_capacity > 0:
        answers.store(config, desks, entries, loads, ledger_usd, w, i, trial.tier, trial.good, desks[w].now_s)


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
        usd = tokens_usd(prompt_tokens, tokens, static[v.INPUT_USD, c], static[v.OUTPUT_USD, c])
        books.post(ledger_usd, w, books.ENERGY, k, -usd)
    elif call.status == COMPLETED or call.status == ABANDONED:
        usd = answer_usd(
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
def collect(
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
            post_finished(
                config, terms, static, tiers, requests, desks, loads, truth, good, own, entries, follow, lengths,
                ledger_usd, counts, w, i,
            )  # fmt: skip
            tasks.book(follow, ledger_usd, loads, w, i)
        i = engine.pop_finished(worlds, requests, w)
