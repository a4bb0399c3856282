"""The steps of a prepared decision, one function each: they make their arrays once and return what runs every time.

Steps read and write rows of the thread's `Buffer`. Each says which general formula it stands for; `fast_path` puts them
in order.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable

import numpy as np

from marginroute import view as v
from marginroute.assessment import usd_by_part
from marginroute.decision import Decision, decided
from marginroute.fast_rows import AT, BARRED, COPIED, Buffer, Fleet, signals_of_copied_rows
from marginroute.margin_rule import CACHE_COLUMN, DEFER_COLUMN, MAX_FILL, NEVER_USD
from marginroute.view import KINDS, Array, View

MIN_USD = 1e-9  # what a value or temperature is at least where something is divided by it, as in `features`
MOST_MASKS = 256  # legal masks that are kept, of all that a thread has seen

_ONE, _TOP = (np.array(x) for x in (1.0, MAX_FILL))  # see `View.asked`
_NEVER, _DEFER = -math.inf, KINDS[v.DEFER]

Usd = tuple[float, float, float, float, float]
"""Of the request: what the customer pays for the answer; its value; credit without one; loss by a bad one; and one over
the value, which is the unit of rows."""


def reader(fleet: Fleet, buffer: Buffer, max_age_s: float) -> Callable[[View], tuple[list[float], Array] | None]:
    """Copies what changes into the rows; the request's numbers, and the weights (R,) of a mean over legal replicas.

    None where telemetry is too old.
    """
    copied, copied_from = buffer.span(COPIED[0], COPIED[-1]), signals_of_copied_rows()
    ages_s, where, replicas = buffer.row["telemetry_age_s"], np.where, fleet.layout.n_replicas
    barred_and_legal = buffer.span("barred", "legal")
    masks: dict[bytes, tuple[Array, Array]] = {}

    def note(legal: Array) -> tuple[Array, Array]:
        if len(masks) >= MOST_MASKS:
            masks.clear()
        there = legal[:replicas]
        mask = masks[legal.tobytes()] = np.stack([legal - 1.0, legal]), there / max(int(there.sum()), 1)
        return mask

    def read(view: View) -> tuple[list[float], Array] | None:
        legal = view.legal
        view.signals.take(copied_from, 0, copied, "clip")
        if not ages_s.item(ages_s.argmax()) <= max_age_s and not where(legal, ages_s, 0.0).max() <= max_age_s:
            return None
        barred_and_legal[...], mean_by = masks.get(legal.tobytes()) or note(legal)
        return view.request.tolist(), mean_by

    return read


def asker(fleet: Fleet, buffer: Buffer) -> Callable[[list[float]], Usd]:
    """Works out what the request fixes: USD, and the numbers that weigh rows."""
    numbers, parameters = buffer.numbers, fleet.rule.parameters
    ttft_scale, tpot_scale = float(parameters.ttft_scale), float(parameters.tpot_scale)
    write, memory = struct.Struct(f"{len(numbers)}d").pack_into, numbers.data

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
        per_value = 1.0 / (value_usd if value_usd > MIN_USD else MIN_USD)
        credited, bad, per_token = value_usd * per_value, bad_usd * per_value, 1.0 / (p + o)
        per_ttft, per_tpot = 1.0 / slo_ttft_s, 1.0 / slo_tpot_s
        per_e2e, per_patience = 1.0 / slo_e2e_s, 1.0 / patience_s
        gone, to_patience = waited_s * per_patience, ttft_scale * per_patience
        write(
            memory, 0,
            1.0, p, o, o * (p + 0.5 * o),
            per_token, per_token,
            o, 1.0, 0.5,
            waited_s * per_e2e, ttft_scale * per_e2e, tpot_scale * o * per_e2e,
            0.0, 0.0, tpot_scale * per_tpot,
            waited_s * per_ttft, ttft_scale * per_ttft, 0.0,
            gone, to_patience, 0.0,
            gone, to_patience, 0.0,
            0.0, per_ttft, 0.0,
            0.0, 0.0, per_tpot,
            0.0, (ttft_share + tpot_share + e2e_share) * credited,
            -e2e_share * credited, -tpot_share * credited, -ttft_share * credited,
            -bad, bad, 0.0, 0.0, 0.0,
            -1.0, -1.0, -1.0, -1.0, (usage_usd + unserved_usd) * per_value, BARRED,
            per_value,
        )  # fmt: skip
        return usage_usd, value_usd, unserved_usd, bad_usd, per_value

    return ask


def estimator(fleet: Fleet, buffer: Buffer) -> Callable[[list[float]], None]:
    """TTFT and TPOT of every candidate, as `latency.estimate`; fill, cost and work as far as rows are linear."""
    s, n, row = fleet.static, fleet.layout.n_candidates, buffer.row
    slots, decode_seq_s, fixed_tpot_s = s[v.SLOTS], s[v.DECODE_SEQ_S], s[v.FIXED_TPOT_S]
    has_room = bool((s[v.TOKEN_BUDGET] - slots >= 1.0).all())  # for prompt tokens, however full the batch
    row["token_budget"][:] = s[v.TOKEN_BUDGET]
    linear, per_unit = fleet.linear(), fleet.per_unit()
    cached_share_by = per_unit[AT["cached_share"] - AT["one_more"]]
    source, net = buffer.span("in_flight", "of_congestion"), buffer.span("of_pending", "of_prefill")
    cached_2, found = buffer.span("cached", "of_cost"), buffer.span("one_more", "congestion")
    constant, scaled = np.empty(linear.shape[1]), np.empty(found.shape)
    constant_rows, in_flight_cap = constant.reshape(found.shape), row["in_flight_cap"]
    crowded_and_pending, crowded = buffer.span("crowded", "pending"), row["crowded"]
    budget_and_one_more, one_more_decoding = buffer.span("token_budget", "one_more"), row["one_more_decoding"]
    batch, used_slots, room, _ = slots_4 = np.empty((4, n))
    batch_and_used, used_and_room, room_and_ahead, ahead = slots_4[:2], slots_4[1:3], slots_4[2:], slots_4[3]
    turns, least, together = np.ones((3, n)), np.repeat([[0.0], [1.0]], n, axis=1), np.empty(n)
    wait_and_iterations = turns[:2]
    ttft_s, tpot_s, decode_s, prefill_s = row["ttft_s"], row["tpot_s"], row["decode_s"], row["prefill_s"]
    linear_by, crowd_by, turns_by = buffer.linear_by, buffer.crowd_by, buffer.turns_by
    add, subtract, multiply, divide = np.add, np.subtract, np.multiply, np.divide
    maximum, minimum, dot = np.maximum, np.minimum, np.dot

    def estimate(request: list[float]) -> None:
        cached_share_by.fill(1.0 / request[v.PROMPT_TOKENS])
        subtract(net, cached_2, net)
        multiply(source, per_unit, scaled)
        dot(linear_by, linear, constant)
        add(scaled, constant_rows, found)
        dot(crowd_by, crowded_and_pending, together)
        minimum(in_flight_cap, slots, out=used_slots)
        minimum(one_more_decoding, used_slots, out=batch)
        subtract(budget_and_one_more, batch_and_used, room_and_ahead)
        if not has_room:
            maximum(room, _ONE, out=room)
        maximum(ahead, together, out=crowded)
        divide(crowded_and_pending, used_and_room, wait_and_iterations)
        maximum(wait_and_iterations, least, out=wait_and_iterations)
        dot(turns_by, turns, ttft_s)
        multiply(batch, decode_seq_s, tpot_s)
        add(tpot_s, decode_s, tpot_s)
        multiply(ttft_s, tpot_s, ttft_s)
        add(ttft_s, prefill_s, ttft_s)
        add(tpot_s, fixed_tpot_s, tpot_s)

    return estimate


def assessor(fleet: Fleet, buffer: Buffer) -> Callable[[View, list[float], Usd], None]:
    """Score of every candidate, as `margin_rule.assess`, without the credit of an unserved request, common to all."""
    s, n, row, layout = fleet.static, fleet.layout.n_candidates, buffer.row, fleet.layout
    parameters, quality = fleet.rule.parameters, fleet.rule.quality
    sharpness, fill_power = np.array(float(parameters.sharpness)), np.array(float(parameters.fill_power))
    is_square_of_square, is_linear = sharpness == 4.0, fill_power == 1.0
    fill, cost, cost_and_congestion = row["fill"], row["cost"], buffer.span("cost", "congestion")
    limit_spent, is_limited = row["limit_spent"], bool(s[v.LIMIT_CALL_S : v.LIMIT_TOKEN_S + 1].any())
    one_and_rise, per_unit, spare = np.ones((2, n)), np.empty((2, n)), np.empty(n)
    rise, per_value, cached_share = one_and_rise[1], buffer.per_value, row["cached_share"]
    one_and_latency_s, ratios = buffer.span("one", "tpot_s"), buffer.span("keep_e2e", "over_tpot_slo")
    to_slo, over_slo = buffer.span("ttft_to_slo", "tpot_to_slo"), buffer.span("over_ttft_slo", "over_tpot_slo")
    kept, able = buffer.span("keep_e2e", "patience_again"), np.ones((5, n))
    keep_e2e, keep_tpot, keep_ttft, keep_patience, _ = kept
    stay_2, able_2, errors_2 = kept[3:], able[3:], buffer.span("recent_errors", "errors_again")
    answers_2, stay = np.repeat(layout.answers[None], 2, axis=0), row["stay"]
    good_and_kept, p_good, p_good_again = buffer.span("p_good_again", "keep_ttft"), row["p_good"], row["p_good_again"]
    credited, _ = credited_and_bad = np.empty((2, n))
    credit_and_refund, ranked_by, score = buffer.span("credit", "refund"), buffer.span("cost", "barred"), buffer.score
    ratios_by, credit_by, score_by = buffer.ratios_by, buffer.credit_by, buffer.score_by
    add, subtract, multiply, divide, power = np.add, np.subtract, np.multiply, np.divide, np.power
    minimum, dot = np.minimum, np.dot

    def assess(view: View, request: list[float], usd: Usd) -> None:
        if quality is not None:
            p_good[:] = p_good_again[:] = quality.p_good(view)
        if request[v.CACHED_INPUT_PRICE_USD] != request[v.INPUT_PRICE_USD]:  # what the customer saves
            saved_usd = request[v.INPUT_PRICE_USD] - request[v.CACHED_INPUT_PRICE_USD]
            multiply(cached_share, saved_usd * request[v.PROMPT_TOKENS], spare)
            add(cost, spare, cost)
        if is_limited:
            add(fill, limit_spent, fill)
        minimum(fill, _TOP, out=rise)
        if not is_linear:
            power(rise, fill_power, rise)
        multiply(one_and_rise, per_value, per_unit)
        multiply(cost_and_congestion, per_unit, cost_and_congestion)
        dot(ratios_by, one_and_latency_s, ratios)
        to_slo[...] = over_slo
        if is_square_of_square:
            multiply(kept, kept, kept)
            multiply(kept, kept, kept)
        else:
            power(kept, sharpness, kept)
        add(kept, _ONE, kept)
        subtract(answers_2, errors_2, able_2)
        divide(able, kept, kept)
        stay[...] = keep_patience
        dot(credit_by, good_and_kept, credited_and_bad)
        if request[v.TTFT_CREDIT_SHARE] + request[v.TPOT_CREDIT_SHARE] + request[v.E2E_CREDIT_SHARE] > 1.0:
            minimum(credited, usd[1] * usd[4], out=credited)
        if request[v.MISS_USD] != 0.0:
            multiply(keep_ttft, keep_tpot, spare)
            multiply(spare, keep_e2e, spare)
            subtract(_ONE, spare, spare)
            multiply(spare, request[v.MISS_USD] * usd[4], spare)
            add(credited, spare, credited)
        multiply(credited_and_bad, stay_2, credit_and_refund)
        dot(score_by, ranked_by, score)

    return assess


def later_and_floors(fleet: Fleet, buffer: Buffer) -> Callable[[View, list[float], Usd], float]:
    """Corrects the scores of *defer*, of a stored answer that is too far, and by floors; USD of a later answer."""
    row, layout, parameters = buffer.row, fleet.layout, fleet.rule.parameters
    serving, defer_column = int((layout.kind <= v.PROVIDER).sum()), layout.n_candidates + DEFER_COLUMN
    defer_share, similarity = float(parameters.defer_share), float(parameters.cache_similarity)
    floors = None if parameters.multipliers is None else parameters.multipliers.T.tolist()
    cost, p_good, stay, congestion = row["cost"], row["p_good"], row["stay"], row["congestion"]
    keep_e2e, keep_tpot, keep_ttft = buffer.span("keep_e2e", "keep_ttft")
    score, floor = buffer.score, buffer.floors
    similar = row["similarity"][CACHE_COLUMN, ...]
    add, multiply = np.add, np.multiply

    def later(view: View, request: list[float], usd: Usd) -> float:
        usage_usd, _, unserved_usd, bad_usd, per_value = usd
        legal, later_usd = view.legal, 0.0
        may_defer = legal.item(defer_column)
        if may_defer:
            able = legal[:serving]
            idle_usd = (usage_usd - (1.0 - p_good[:serving]) * bad_usd - cost[:serving] / per_value)[able]
            later_usd = defer_share * max(-unserved_usd, idle_usd.max() if len(idle_usd) else _NEVER)
            score[DEFER_COLUMN] = (later_usd + unserved_usd) * per_value - congestion[DEFER_COLUMN]
        if similarity > 0.0 and similar < similarity:
            score[CACHE_COLUMN] -= NEVER_USD * per_value
        if floors is not None:
            slo, good, served = (usd_each * per_value for usd_each in floors[int(request[v.CLASS_INDEX])])
            multiply(keep_ttft, keep_tpot, floor)
            multiply(floor, keep_e2e, floor)
            multiply(floor, slo, floor)
            add(floor, good * p_good + served, floor)
            multiply(floor, stay, floor)
            if may_defer:
                best = p_good[:serving][legal[:serving]].max(initial=0.0)
                floor[DEFER_COLUMN] = defer_share * (slo + good * best + served)
            add(score, floor, score)
        return later_usd

    return later


def explainer(
    name: str, fleet: Fleet, buffer: Buffer
) -> Callable[[Array, int, float, float, Usd, float], Decision | None]:
    """The reason of a choice, as `decision.explain`; None where a number is not finite."""
    layout, row = fleet.layout, buffer.row
    names, kinds = layout.names, [KINDS[kind] for kind in layout.kind]
    stay, cost, congestion, credit, refund = (row[x].item for x in ("stay", "cost", "congestion", "credit", "refund"))
    scores, floors = buffer.score, buffer.floors
    has_floors, ttft_s, tpot_s = fleet.rule.parameters.multipliers is not None, row["ttft_s"], row["tpot_s"]
    isfinite = math.isfinite

    def explain(
        ranked: Array, choice: int, scale_usd: float, best: float, usd: Usd, later_usd: float
    ) -> Decision | None:
        usage_usd, _, unserved_usd, _, per_value = usd
        unit_usd, stays = 1.0 / per_value, stay(choice)
        cost_usd, credit_usd, refund_usd = unit_usd * cost(choice), unit_usd * credit(choice), unit_usd * refund(choice)
        margin_usd = stays * (usage_usd + unserved_usd) - unserved_usd - cost_usd - credit_usd - refund_usd
        if kinds[choice] == _DEFER:
            margin_usd = later_usd
        top = ranked.item(choice)
        if not isfinite(top + margin_usd):
            return None
        reason_usd = usd_by_part(
            stays,
            margin_usd,
            usage_usd,
            unserved_usd,
            (cost_usd, credit_usd, refund_usd, unit_usd * congestion(choice)),
            unit_usd * floors.item(choice) if has_floors else None,
        )
        if ranked is not scores:
            reason_usd["learned"] = top * scale_usd - unit_usd * (scores.item(choice) - best)
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
