"""What the gateway can know at a decision, written into the View's buffers."""

# ruff: noqa: ANN001, ANN201 (Numba infers the types of kernels)
from __future__ import annotations

from envs import world_accounts as contracts
from envs import world_cache as answers
from envs import world_elastic as elastic
from envs import world_feedback as feedback
from envs import world_gateways as gateways
from envs import world_hedge as hedge
from envs import world_tasks as tasks
from envs.fleet import scaling
from envs.fleet.provider import limit_spent, provider_available
from envs.kernels import kernel
from marginroute import view as v


@kernel
def show(
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
