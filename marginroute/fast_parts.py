"""The steps of a prepared decision, one function each: they make their arrays once and return what runs every time.

Steps read and write rows of the thread's `Buffer`. Each says which general formula it stands for; `fast_path` puts them
in order.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from marginroute import view as v
from marginroute.decision import Decision, decided
from marginroute.fast_rows import AT, COPIED_ROWS, LOGS, ROWS, SHOWN, Buffer, Fleet, Scorer, signals_of_copied_rows
from marginroute.features import CLIP, CONTEXT_FEATURES, MIN_LOGIT
from marginroute.heuristics import CACHE_COLUMN, DEFER_COLUMN, MAX_FILL, NEVER_USD, usd_by_part
from marginroute.view import KINDS, Array, View

BARRED = 1e12  # by how much an illegal candidate ranks below the others
MIN_USD = 1e-9  # what a value or temperature is at least where something is divided by it, as in `features`

_ZERO, _HALF, _ONE, _TOP = (np.array(x) for x in (0.0, 0.5, 1.0, MAX_FILL))  # see `View.asked`
_ZERO_4, _LOW_4, _HIGH_4 = (np.array(x, dtype=np.float32) for x in (0.0, -CLIP, CLIP))
_NEVER, _DEFER = -math.inf, KINDS[v.DEFER]

Usd = tuple[float, float, float, float]
"""Of the request: what the customer pays for the answer; its value; credit without one; loss by a bad one."""


def reader(buffer: Buffer, max_age_s: float) -> Callable[[View], list[float] | None]:
    """Copies what changes into the rows and returns the request's numbers; None where telemetry is too old."""
    copied, copied_from = buffer.rows[: len(COPIED_ROWS)], signals_of_copied_rows()
    ages_s, where = buffer.row["telemetry_age_s"], np.where

    def read(view: View) -> list[float] | None:
        view.signals.take(copied_from, 0, copied, "clip")
        if not ages_s.item(ages_s.argmax()) <= max_age_s and not where(view.legal, ages_s, 0.0).max() <= max_age_s:
            return None
        found: list[float] = view.request.tolist()
        return found

    return read


def asker(fleet: Fleet, buffer: Buffer) -> Callable[[list[float]], Usd]:
    """Works out what the request fixes: USD, and the numbers that weigh rows."""
    numbers, parameters = buffer.numbers, fleet.rule.parameters
    ttft_scale, tpot_scale = float(parameters.ttft_scale), float(parameters.tpot_scale)

    def ask(request: list[float]) -> Usd:
        (
            p, o, _, _, _, waited_s, _, _, _, _, _, _, _, input_usd, output_usd, request_usd, refund_share,
            bad_answer_usd, slo_ttft_s, slo_tpot_s, slo_e2e_s, patience_s, ttft_share, tpot_share, e2e_share,
            unserved_share, unserved_call_usd, _, per_call_usd, _, _, _,
        ) = request  # fmt: skip
        usage_usd = per_call_usd + (p * input_usd + o * output_usd)
        value_usd = usage_usd + request_usd
        unserved_usd = unserved_share * value_usd + unserved_call_usd
        bad_usd = refund_share * value_usd + bad_answer_usd
        per_token, all_shares = 1.0 / (p + o), ttft_share + tpot_share + e2e_share
        per_ttft, per_tpot = 1.0 / slo_ttft_s, 1.0 / slo_tpot_s
        per_e2e, per_patience = 1.0 / slo_e2e_s, 1.0 / patience_s
        numbers[:] = (
            p, o, per_token, per_token, -per_token,
            1.0, p, o, o * (p + 0.5 * o),
            0.0, per_ttft, 0.0,
            0.0, 0.0, per_tpot,
            waited_s * per_patience, ttft_scale * per_patience, 0.0,
            waited_s * per_ttft, ttft_scale * per_ttft, 0.0,
            0.0, 0.0, tpot_scale * per_tpot,
            waited_s * per_e2e, ttft_scale * per_e2e, tpot_scale * o * per_e2e,
            0.0, -ttft_share * value_usd, -tpot_share * value_usd, -e2e_share * value_usd, all_shares * value_usd,
            BARRED, usage_usd + unserved_usd, -1.0, -1.0, -1.0, -bad_usd,
        )  # fmt: skip
        return usage_usd, value_usd, unserved_usd, bad_usd

    return ask


def estimator(fleet: Fleet, buffer: Buffer) -> Callable[[], None]:
    """TTFT and TPOT of every candidate, as `latency.estimate`."""
    s, n, row = fleet.static, fleet.layout.n_candidates, buffer.row
    slots, token_budget, base_s, fixed_s = s[v.SLOTS], s[v.TOKEN_BUDGET], s[v.BASE_S], s[v.FIXED_TTFT_S : v.BASE_S]
    per_unit_s = s[[v.DECODE_SEQ_S, v.KV_TOKEN_S, v.PREFILL_TOKEN_S]]
    has_room = bool((token_budget - slots >= 1.0).all())  # for prompt tokens, however full the batch
    prompt, output, crowd_by = buffer.prompt, buffer.output, buffer.crowd_by
    in_flight_cap, cached_tokens = row["in_flight_cap"], row["cached_share"]
    in_flight_and_decoding, one_more = buffer.span("in_flight", "decoding"), np.empty((2, n))
    one_more_in_flight, one_more_decoding = one_more
    apart = AT["pending_prefill"] - AT["decoding_tokens"]
    decoding_and_pending = buffer.span("decoding_tokens", "pending_prefill", apart)
    used_slots, ahead, crowded_out, iterations = np.empty((4, n))
    loads, times_s = np.zeros((4, n)), np.empty((3, n))
    loads[3] = s[v.KV_CAPACITY_TOKENS]
    batch, _, pending, _ = loads  # the others: KV tokens, KV capacity
    loads_3, tokens, tokens_and_capacity = loads[:3], loads[1:3], loads[1:]
    batch_s, tokens_s, prefill_s = times_s
    ttft_s, tpot_s = latency_s = buffer.span("ttft_s", "tpot_s")
    add, subtract, multiply, divide = np.add, np.subtract, np.multiply, np.divide
    maximum, minimum, dot = np.maximum, np.minimum, np.dot

    def estimate() -> None:
        minimum(in_flight_cap, slots, out=used_slots)
        add(in_flight_and_decoding, _ONE, one_more)
        minimum(one_more_decoding, used_slots, out=batch)
        add(decoding_and_pending, prompt, tokens)
        subtract(pending, cached_tokens, pending)
        multiply(loads_3, per_unit_s, times_s)
        add(batch_s, tokens_s, tpot_s)
        add(tpot_s, base_s, tpot_s)
        subtract(token_budget, batch, iterations)
        if not has_room:
            maximum(iterations, _ONE, out=iterations)
        divide(pending, iterations, iterations)
        maximum(iterations, _ONE, out=iterations)
        add(iterations, _HALF, iterations)
        dot(crowd_by, tokens_and_capacity, crowded_out)
        subtract(one_more_in_flight, used_slots, ahead)
        maximum(ahead, crowded_out, out=ahead)
        maximum(ahead, _ZERO, out=ahead)
        multiply(ahead, output, ahead)
        divide(ahead, used_slots, ahead)
        add(iterations, ahead, iterations)
        multiply(iterations, tpot_s, ttft_s)
        add(ttft_s, prefill_s, ttft_s)
        add(latency_s, fixed_s, latency_s)

    return estimate


def assessor(fleet: Fleet, buffer: Buffer) -> Callable[[View, list[float], Usd], None]:
    """USD of every candidate, as `heuristics.assess`, less the credit of an unserved request, common to all."""
    s, n, row, layout = fleet.static, fleet.layout.n_candidates, buffer.row, fleet.layout
    parameters, quality = fleet.rule.parameters, fleet.rule.quality
    sharpness, fill_power = np.array(float(parameters.sharpness)), np.array(float(parameters.fill_power))
    is_square_of_square, is_linear = sharpness == 4.0, fill_power == 1.0
    per_slot, answers, linear, saved = 1.0 / s[v.SLOTS], layout.answers, fleet.linear(), fleet.saved()
    linear_by, ratios_by, credit_by, score_by = buffer.linear_by, buffer.ratios_by, buffer.credit_by, buffer.score_by
    money, saved_usd, cost_and_congestion = np.empty(2 * n), np.empty((2, n)), buffer.span("cost", "congestion")
    money_2, cost_usd, congestion_usd, fill = money.reshape(2, n), row["cost"], row["congestion"], row["fill"]
    in_flight, cached_tokens, (rise, less_usd) = row["in_flight"], row["cached_share"], np.empty((2, n))
    limit_spent, is_limited = row["limit_spent"], bool(s[v.LIMIT_CALL_S : v.LIMIT_TOKEN_S + 1].any())
    one_and_latency_s, ratios = buffer.span("one", "tpot_s"), buffer.span("ttft_to_slo", "keep_e2e")
    keep_patience, keep_ttft, keep_tpot, keep_e2e = kept = buffer.span("keep_patience", "keep_e2e")
    kept_and_one = buffer.span("keep_patience", "one_again")
    good_and_errors, p_good = buffer.span("p_good", "recent_errors"), row["p_good"]
    credited_usd, _, ok = credited_bad_ok = buffer.credited_bad_ok
    credited_and_bad, bad_and_ok = credited_bad_ok[:2], credited_bad_ok[1:]
    credit_and_refund = buffer.span("credit", "refund")
    stay, ranked_by, score_usd = row["stay"], buffer.span("barred", "refund"), buffer.score_usd
    barred, legal_row = row["barred"], row["legal"]
    add, subtract, multiply, divide, power = np.add, np.subtract, np.multiply, np.divide, np.power
    minimum, dot = np.minimum, np.dot

    def assess(view: View, request: list[float], usd: Usd) -> None:
        if quality is not None:
            p_good[:] = quality.p_good(view)
        legal_row[:] = view.legal
        dot(linear_by, linear, money)
        multiply(saved, cached_tokens, saved_usd)
        add(money_2, saved_usd, cost_and_congestion)
        if request[v.CACHED_INPUT_PRICE_USD] != request[v.INPUT_PRICE_USD]:  # what the customer saves
            multiply(cached_tokens, request[v.INPUT_PRICE_USD] - request[v.CACHED_INPUT_PRICE_USD], less_usd)
            add(cost_usd, less_usd, cost_usd)
        multiply(in_flight, per_slot, fill)
        if is_limited:
            add(fill, limit_spent, fill)
        minimum(fill, _TOP, out=rise)
        if not is_linear:
            power(rise, fill_power, rise)
        multiply(congestion_usd, rise, congestion_usd)
        dot(ratios_by, one_and_latency_s, ratios)
        if is_square_of_square:
            multiply(kept, kept, kept)
            multiply(kept, kept, kept)
        else:
            power(kept, sharpness, kept)
        add(kept, _ONE, kept)
        divide(_ONE, kept, kept)
        subtract(_ONE, good_and_errors, bad_and_ok)
        multiply(ok, answers, ok)
        multiply(keep_patience, ok, stay)
        dot(credit_by, kept_and_one, credited_usd)
        if request[v.TTFT_CREDIT_SHARE] + request[v.TPOT_CREDIT_SHARE] + request[v.E2E_CREDIT_SHARE] > 1.0:
            minimum(credited_usd, usd[1], out=credited_usd)
        if request[v.MISS_USD] != 0.0:
            multiply(keep_ttft, keep_tpot, less_usd)
            multiply(less_usd, keep_e2e, less_usd)
            subtract(_ONE, less_usd, less_usd)
            multiply(less_usd, request[v.MISS_USD], less_usd)
            add(credited_usd, less_usd, credited_usd)
        multiply(credited_and_bad, stay, credit_and_refund)
        subtract(legal_row, _ONE, barred)
        dot(score_by, ranked_by, score_usd)

    return assess


def later_and_floors(fleet: Fleet, buffer: Buffer) -> Callable[[View, list[float], Usd], float]:
    """Corrects the scores of *defer*, of a stored answer that is too far, and by floors; USD of a later answer."""
    row, layout, parameters = buffer.row, fleet.layout, fleet.rule.parameters
    serving, defer_column = int((layout.kind <= v.PROVIDER).sum()), layout.n_candidates + DEFER_COLUMN
    defer_share, similarity = float(parameters.defer_share), float(parameters.cache_similarity)
    floors = None if parameters.multipliers is None else parameters.multipliers.T.tolist()
    cost_usd, bad_share, p_good, stay = row["cost"], buffer.credited_bad_ok[1], row["p_good"], row["stay"]
    keep_ttft, keep_tpot, keep_e2e = buffer.span("keep_ttft", "keep_e2e")
    score_usd, floor_usd, congestion_usd = buffer.score_usd, buffer.floor_usd, row["congestion"]
    similar = row["similarity"][CACHE_COLUMN, ...]
    add, multiply = np.add, np.multiply

    def later(view: View, request: list[float], usd: Usd) -> float:
        usage_usd, _, unserved_usd, bad_usd = usd
        legal, later_usd = view.legal, 0.0
        may_defer = legal.item(defer_column)
        if may_defer:
            able = legal[:serving]
            idle_usd = (usage_usd - bad_share[:serving] * bad_usd - cost_usd[:serving])[able]
            later_usd = defer_share * max(-unserved_usd, idle_usd.max() if len(idle_usd) else _NEVER)
            score_usd[DEFER_COLUMN] = later_usd + unserved_usd - congestion_usd[DEFER_COLUMN]
        if similarity > 0.0 and similar < similarity:
            score_usd[CACHE_COLUMN] -= NEVER_USD
        if floors is not None:
            slo_usd, good_usd, served_usd = floors[int(request[v.CLASS_INDEX])]
            multiply(keep_ttft, keep_tpot, floor_usd)
            multiply(floor_usd, keep_e2e, floor_usd)
            multiply(floor_usd, slo_usd, floor_usd)
            add(floor_usd, good_usd * p_good + served_usd, floor_usd)
            multiply(floor_usd, stay, floor_usd)
            if may_defer:
                good = p_good[:serving][legal[:serving]].max(initial=0.0)
                floor_usd[DEFER_COLUMN] = defer_share * (slo_usd + good_usd * good + served_usd)
            add(score_usd, floor_usd, score_usd)
        return later_usd

    return later


def ranker(
    fleet: Fleet, buffer: Buffer, scorer: Scorer, max_far: int
) -> Callable[[list[float], Usd, float], Array | None]:
    """Logits of the network, as `features` and `policy.Network.logits`; None where too much lies outside training."""
    rows, row, layout, n = buffer.rows, buffer.row, fleet.layout, fleet.layout.n_candidates
    n_shown, width = len(ROWS[SHOWN]), len(scorer.head)
    last = np.ones((1, n), dtype=np.float32)  # for the bias and the context
    seen = np.concatenate([np.zeros((n_shown, n), dtype=np.float32), layout.one_hot, last])
    shown, shown_rows, logs = seen[:n_shown], rows[SHOWN], seen[:n_shown][LOGS]
    with_unit = seen[AT["cached_share"] - SHOWN.start : AT["below_best"] - SHOWN.start + 1]
    units = np.ones(len(with_unit), dtype=np.float32)
    units_column, below_seen, most_below = units[:, None], with_unit[-1], np.array(0.0, dtype=np.float32)
    hidden_1 = np.ones((width + 1, n), dtype=np.float32)  # its last row is for the bias of the second layer
    hidden_2 = np.empty((width + 2, n), dtype=np.float32)  # its last rows are the advice and `barred`
    sum_1, sum_2, advice, barred_2 = hidden_1[:width], hidden_2[:width], hidden_2[width], hidden_2[width + 1]
    head = np.concatenate([scorer.head, np.array([0.0, BARRED], dtype=np.float32)])
    context = np.ones(1 + len(CONTEXT_FEATURES), dtype=np.float32)
    weights = np.concatenate([scorer.first, np.zeros((1, width), dtype=np.float32)])
    first, from_context, context_numbers, second = weights.T, weights[-1], context[1:], scorer.second
    contexts = [list(x) for x in scorer.context]
    shift, logits = np.repeat(scorer.shift, n, axis=1), np.empty(n, dtype=np.float32)
    score_usd, below_usd, barred = buffer.score_usd, row["below_best"], row["barred"]
    kappa, temperature_share, (trust_always, trust_told) = scorer.kappa, scorer.temperature_share, scorer.trust
    told, trust = seen[AT["tier_confidence"] - SHOWN.start], np.empty(n, dtype=np.float32)
    describe = describer(fleet, buffer, scorer)
    add, subtract, multiply, maximum, minimum, dot = np.add, np.subtract, np.multiply, np.maximum, np.minimum, np.dot

    def rank(request: list[float], usd: Usd, best_usd: float) -> Array | None:
        _, value_usd, _, bad_usd = usd
        # As features.candidate_features.
        subtract(best_usd, score_usd, below_usd)
        maximum(below_usd, _ZERO, out=below_usd)
        per_value = 1.0 / max(value_usd, MIN_USD)
        shown[...] = shown_rows
        per_prompt = 1.0 / request[v.PROMPT_TOKENS]
        units[:] = per_prompt, 1.0, 1.0, per_value, per_value, per_value, bad_usd * per_value, 10.0 * per_value
        multiply(with_unit, units_column, with_unit)
        # As features.advice_logits, in the unit of `below_best`.
        per_below = 0.1 / (per_value * max(temperature_share * value_usd, MIN_USD))
        most_below[...] = -MIN_LOGIT / per_below
        minimum(below_seen, most_below, out=advice)
        barred_2[:] = barred
        head[width] = -kappa * per_below
        add(logs, shift, logs)
        np.log(logs, logs)
        maximum(shown, _LOW_4, out=shown)
        minimum(shown, _HIGH_4, out=shown)
        k, j = int(request[v.CLASS_INDEX]), int(request[v.TASK_INDEX])
        of_context, far = describe(request, value_usd, k, j)
        if far > max_far:
            return None
        # As policy.Network.logits.
        context_numbers[:] = of_context
        dot(contexts[k][j], context, from_context)
        dot(first, seen, sum_1)
        maximum(sum_1, _ZERO_4, out=sum_1)
        dot(second, hidden_1, sum_2)
        maximum(sum_2, _ZERO_4, out=sum_2)
        multiply(told, trust_told, trust)
        add(trust, trust_always, trust)
        multiply(sum_2, trust, sum_2)
        dot(head, hidden_2, logits)
        return logits

    return rank


def describer(
    fleet: Fleet, buffer: Buffer, scorer: Scorer
) -> Callable[[list[float], float, int, int], tuple[tuple[float, ...], int]]:
    """The context, as `features.context_features`, and how many of its columns lie far outside training."""
    of_replicas = slice(0, fleet.layout.n_replicas)
    fill_and_legal, legal_replicas = buffer.span("fill", "legal")[:, of_replicas], buffer.row["legal"][of_replicas]
    filled, far_columns, near, log1p = np.empty(2), scorer.far.tolist(), scorer.near, math.log1p

    def describe(request: list[float], value_usd: float, k: int, j: int) -> tuple[tuple[float, ...], int]:
        fill_and_legal.dot(legal_replicas, filled)
        fills, replicas = filled.tolist()
        found: tuple[float, ...] = (
            request[v.DIFFICULTY_SIGNAL],
            fills / max(replicas, 1.0),
            1.0 / (1.0 + max(request[v.DEADLINE_LEFT_S], 0.0)),
            log1p(request[v.PROMPT_TOKENS]),
            log1p(request[v.EXPECTED_OUTPUT_TOKENS]),
            log1p(request[v.WAITED_S]),
            log1p(request[v.ARRIVAL_RATE_PER_S]),
            log1p(1e6 * value_usd),
            log1p(request[v.TURNED_DOWN]),
            log1p(request[v.VERIFIER_SCORE]),
            log1p(request[v.TASK_VALUE_USD]),
        )
        if max(found) > CLIP or min(found) < -CLIP:
            found = tuple(min(max(x, -CLIP), CLIP) for x in found)
        far = far_columns[k][j]
        for x, (low, high) in zip(found, near, strict=True):
            if not low < x < high:
                far += 1
        return found, far

    return describe


def explainer(
    name: str, fleet: Fleet, buffer: Buffer
) -> Callable[[Array, int, float, float, Usd, float], Decision | None]:
    """The reason of a choice, as `decision.explain`; None where a number is not finite."""
    layout, row = fleet.layout, buffer.row
    names, kinds = layout.names, [KINDS[kind] for kind in layout.kind]
    earned, score_usd, floor_usd = buffer.span("stay", "refund"), buffer.score_usd, buffer.floor_usd
    has_floors, ttft_s, tpot_s = fleet.rule.parameters.multipliers is not None, row["ttft_s"], row["tpot_s"]
    isfinite = math.isfinite

    def explain(
        ranked: Array, choice: int, scale_usd: float, best_usd: float, usd: Usd, later_usd: float
    ) -> Decision | None:
        usage_usd, _, unserved_usd, bad_usd = usd
        stays, cost, congestion, credit, refunded = earned[:, choice].tolist()
        refund_usd = bad_usd * refunded
        margin_usd = stays * (usage_usd + unserved_usd) - unserved_usd - cost - credit - refund_usd
        if kinds[choice] == _DEFER:
            margin_usd = later_usd
        top, score = ranked.item(choice), score_usd.item(choice)
        if not isfinite(top + margin_usd):
            return None
        reason_usd = usd_by_part(
            stays,
            margin_usd,
            usage_usd,
            unserved_usd,
            (cost, credit, refund_usd, congestion),
            floor_usd.item(choice) if has_floors else None,
        )
        if ranked is not score_usd:
            reason_usd["learned"] = top * scale_usd - (score - best_usd)
        ranked[choice] = _NEVER
        second_best = int(ranked.argmax())
        its = ranked.item(second_best)
        another = its > -0.5 * BARRED
        return decided(
            choice,
            names[choice],
            kinds[choice],
            name,
            reason_usd,
            names[second_best] if another else "",
            (top - its) * scale_usd if another else 0.0,
            (ttft_s.item(choice), tpot_s.item(choice)),
        )

    return explain
