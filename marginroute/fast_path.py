"""One decision of a margin rule, with or without the network that corrects it, prepared for the candidates of a fleet.

`latency`, `heuristics`, `features` and `policy.Network` are the home of the formulas, over any batch shape. On a dozen
candidates they spend their time in calls of NumPy and little of it in loops. Here the same sums are arranged anew for
a single decision:

- What the fleet fixes is worked out once: reciprocals, differences of prices, one-hots, and the normaliser, which is
  folded into the first layer.
- What the request fixes are Python numbers, worked out before any array is touched.
- The rest runs over rows (C,) of one buffer per thread, in such an order that neighbours go through a call together,
  and that a sum of rows, weighted by numbers of the request, is one product of a vector and a matrix.

A fast path says None wherever it does not apply (other constants, stale telemetry, drift, a number that is not
finite, a price of cached prompt tokens, a cost of missing any SLO): then the general path decides. A property test
holds the two to each other.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import numpy as np

from marginroute import features
from marginroute import view as v
from marginroute.decision import Decision, decided
from marginroute.fast_rows import (
    AT,
    COPIED_ROWS,
    LOGS,
    ROWS,
    SHOWN,
    Fleet,
    Scorer,
    covers_features,
    scorer_of,
    signals_of_copied_rows,
)
from marginroute.features import CLIP, CONTEXT_FEATURES, MIN_LOGIT
from marginroute.heuristics import CACHE_COLUMN, DEFER_COLUMN, MAX_FILL, NEVER_USD, MarginRule, usd_by_part
from marginroute.policy import ResidualPolicy
from marginroute.view import KINDS, Array, Layout, View

COVERED_VERSION = 4  # of the features; any other takes the general path
BARRED = 1e12  # by how much an illegal candidate ranks below the others
MIN_USD = 1e-9  # what a value or temperature is at least where something is divided by it, as in `features`
PER_ITEM = ("station_usd_per_s", "slo_usd", "good_usd", "served_usd")  # parameters with one value per station or class

_ZERO, _HALF, _ONE, _TOP = (np.array(x) for x in (0.0, 0.5, 1.0, MAX_FILL))  # see `View.asked`
_ZERO_4, _LOW_4, _HIGH_4 = (np.array(x, dtype=np.float32) for x in (0.0, -CLIP, CLIP))
_NEVER, _DEFER = -math.inf, KINDS[v.DEFER]

Worker = Callable[[View], Decision | None]


def worker_of(name: str, fleet: Fleet, scorer: Scorer | None, max_age_s: float, max_far: int) -> Worker:
    """The function that decides in one thread; its arrays are made here, once."""
    s, layout, rule = fleet.static, fleet.layout, fleet.rule
    n, names, kinds = layout.n_candidates, layout.names, [KINDS[kind] for kind in layout.kind]
    serving = int((layout.kind <= v.PROVIDER).sum())

    # Constants of the fleet.
    slots, token_budget, base_s, fixed_s = s[v.SLOTS], s[v.TOKEN_BUDGET], s[v.BASE_S], s[v.FIXED_TTFT_S : v.BASE_S]
    per_unit_s = s[[v.DECODE_SEQ_S, v.KV_TOKEN_S, v.PREFILL_TOKEN_S]]
    per_slot, answers, linear, saved = 1.0 / slots, layout.answers, fleet.linear(), fleet.saved()
    has_room = bool((token_budget - slots >= 1.0).all())  # for prompt tokens, however full the batch
    parameters, quality = rule.parameters, rule.quality
    ttft_scale, tpot_scale = float(parameters.ttft_scale), float(parameters.tpot_scale)
    sharpness, fill_power = np.array(float(parameters.sharpness)), np.array(float(parameters.fill_power))
    is_square_of_square, is_linear = sharpness == 4.0, fill_power == 1.0
    defer_share, similarity = float(parameters.defer_share), float(parameters.cache_similarity)
    floors = None if parameters.multipliers is None else parameters.multipliers.T.tolist()

    # Rows of the buffer by name, and those that go through a call together.
    rows = np.zeros((len(ROWS), n))
    row = dict(zip(ROWS, rows, strict=True))
    row["one"][:] = row["one_again"][:] = 1.0

    def span(first: str, last: str, step: int = 1) -> Array:
        return rows[AT[first] : AT[last] + 1 : step]

    copied, copied_from = rows[: len(COPIED_ROWS)], signals_of_copied_rows()
    in_flight_cap, in_flight, cached_tokens = row["in_flight_cap"], row["in_flight"], row["cached_share"]
    in_flight_and_decoding, one_more = span("in_flight", "decoding"), np.empty((2, n))
    one_more_in_flight, one_more_decoding = one_more
    decoding_and_pending = span("decoding_tokens", "pending_prefill", AT["pending_prefill"] - AT["decoding_tokens"])
    used_slots, ahead, crowded_out, iterations, rise, score_usd = np.empty((6, n))
    loads, times_s = np.zeros((4, n)), np.empty((3, n))
    loads[3] = s[v.KV_CAPACITY_TOKENS]
    batch, _, pending, _ = loads  # the others: KV tokens, KV capacity
    loads_3, tokens, tokens_and_capacity = loads[:3], loads[1:3], loads[1:]
    batch_s, tokens_s, prefill_s = times_s
    ttft_s, tpot_s = latency_s = span("ttft_s", "tpot_s")
    one_and_latency_s, ratios = span("one", "tpot_s"), span("ttft_to_slo", "keep_e2e")
    money, saved_usd, cost_and_congestion = np.empty(2 * n), np.empty((2, n)), span("cost", "congestion")
    money_2, cost_usd, congestion_usd, fill = money.reshape(2, n), row["cost"], row["congestion"], row["fill"]
    keep_patience, keep_ttft, keep_tpot, keep_e2e = kept = span("keep_patience", "keep_e2e")
    kept_and_one = span("keep_patience", "one_again")
    good_and_errors, p_good, credited_bad_ok = span("p_good", "recent_errors"), row["p_good"], np.empty((3, n))
    credited_usd, bad_share, ok = credited_bad_ok
    credited_and_bad, bad_and_ok, credit_and_refund = credited_bad_ok[:2], credited_bad_ok[1:], span("credit", "refund")
    stay, earned, below_usd = row["stay"], span("stay", "refund"), row["below_best"]
    barred, ranked_by = row["barred"], span("barred", "refund")
    legal_row, ages_s, floor_usd = row["legal"], row["telemetry_age_s"], np.empty(n)
    add, subtract, multiply, divide, power = np.add, np.subtract, np.multiply, np.divide, np.power
    maximum, minimum, dot, log1p, isfinite = np.maximum, np.minimum, np.dot, math.log1p, math.isfinite

    # Numbers of the request: written in one go, then each product takes its part.
    numbers = np.zeros(38)
    prompt, output, crowd_by, linear_by = numbers[0, ...], numbers[1, ...], numbers[2:5], numbers[5:9]
    ratios_by, credit_by, score_by = numbers[9:27].reshape(6, 3), numbers[27:32], numbers[32:38]

    if scorer is not None:
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
        contexts, far_columns = [list(x) for x in scorer.context], scorer.far.tolist()
        shift, near, logits = np.repeat(scorer.shift, n, axis=1), scorer.near, np.empty(n, dtype=np.float32)
        of_replicas = slice(0, layout.n_replicas)
        fill_and_legal, legal_replicas = span("fill", "legal")[:, of_replicas], legal_row[of_replicas]
        filled = np.empty(2)

    def decide(view: View) -> Decision | None:
        legal = view.legal
        view.signals.take(copied_from, 0, copied, "clip")
        if not ages_s.item(ages_s.argmax()) <= max_age_s:
            return None
        (
            p, o, class_index, task_index, difficulty, waited_s, deadline_left_s, arrival_rate_per_s, _, turned_down,
            verifier_score, task_value_usd, _, input_usd, output_usd, request_usd, refund_share, bad_answer_usd,
            slo_ttft_s, slo_tpot_s, slo_e2e_s, patience_s, ttft_share, tpot_share, e2e_share, unserved_share,
            unserved_call_usd, cached_input_usd, per_call_usd, miss_usd, _, _,
        ) = view.request.tolist()  # fmt: skip
        if miss_usd != 0.0 or cached_input_usd != input_usd:
            return None
        k, j = int(class_index), int(task_index)
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

        # As latency.estimate.
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

        # As heuristics.assess, less the credit of an unserved request, which all candidates have in common.
        if quality is not None:
            p_good[:] = quality.p_good(view)
        legal_row[:] = legal
        dot(linear_by, linear, money)
        multiply(saved, cached_tokens, saved_usd)
        add(money_2, saved_usd, cost_and_congestion)
        multiply(in_flight, per_slot, fill)
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
        if all_shares > 1.0:
            minimum(credited_usd, value_usd, out=credited_usd)
        multiply(credited_and_bad, stay, credit_and_refund)
        subtract(legal_row, _ONE, barred)
        dot(score_by, ranked_by, score_usd)
        later_usd = 0.0
        may_defer = legal.item(n + DEFER_COLUMN)
        if may_defer:
            able = legal[:serving]
            idle_usd = (usage_usd - bad_share[:serving] * bad_usd - cost_usd[:serving])[able]
            later_usd = defer_share * max(-unserved_usd, idle_usd.max() if len(idle_usd) else _NEVER)
            score_usd[DEFER_COLUMN] = later_usd + unserved_usd - congestion_usd[DEFER_COLUMN]
        if similarity > 0.0 and row["similarity"][CACHE_COLUMN] < similarity:
            score_usd[CACHE_COLUMN] -= NEVER_USD
        if floors is not None:
            slo_usd, good_usd, served_usd = floors[k]
            multiply(keep_ttft, keep_tpot, floor_usd)
            multiply(floor_usd, keep_e2e, floor_usd)
            multiply(floor_usd, slo_usd, floor_usd)
            add(floor_usd, good_usd * p_good + served_usd, floor_usd)
            multiply(floor_usd, stay, floor_usd)
            if may_defer:
                good = p_good[:serving][legal[:serving]].max(initial=0.0)
                floor_usd[DEFER_COLUMN] = defer_share * (slo_usd + good_usd * good + served_usd)
            add(score_usd, floor_usd, score_usd)
        choice, scale_usd = int(score_usd.argmax()), 1.0
        ranked: Array = score_usd
        best_usd = score_usd.item(choice)

        if scorer is not None:
            # As features.candidate_features.
            subtract(best_usd, score_usd, below_usd)
            maximum(below_usd, _ZERO, out=below_usd)
            per_value = 1.0 / max(value_usd, MIN_USD)
            shown[...] = shown_rows
            units[:] = 1.0 / p, 1.0, 1.0, per_value, per_value, per_value, bad_usd * per_value, 10.0 * per_value
            multiply(with_unit, units_column, with_unit)
            # As features.advice_logits, in the unit of `below_best`.
            per_below = 0.1 / (per_value * max(scorer.temperature_share * value_usd, MIN_USD))
            most_below[...] = -MIN_LOGIT / per_below
            minimum(below_seen, most_below, out=advice)
            barred_2[:] = barred
            head[width] = -scorer.kappa * per_below
            add(logs, shift, logs)
            np.log(logs, logs)
            maximum(shown, _LOW_4, out=shown)
            minimum(shown, _HIGH_4, out=shown)
            # As features.context_features, and the guard's drift.
            fill_and_legal.dot(legal_replicas, filled)
            fills, replicas = filled.tolist()
            of_context: tuple[float, ...] = (
                difficulty,
                fills / max(replicas, 1.0),
                1.0 / (1.0 + max(deadline_left_s, 0.0)),
                log1p(p),
                log1p(o),
                log1p(waited_s),
                log1p(arrival_rate_per_s),
                log1p(1e6 * value_usd),
                log1p(turned_down),
                log1p(verifier_score),
                log1p(task_value_usd),
            )
            if max(of_context) > CLIP or min(of_context) < -CLIP:
                of_context = tuple(min(max(x, -CLIP), CLIP) for x in of_context)
            far = far_columns[k][j]
            for x, (low, high) in zip(of_context, near, strict=True):
                if not low < x < high:
                    far += 1
            if far > max_far:
                return None
            # As policy.Network.logits.
            context_numbers[:] = of_context
            dot(contexts[k][j], context, from_context)
            dot(first, seen, sum_1)
            maximum(sum_1, _ZERO_4, out=sum_1)
            dot(second, hidden_1, sum_2)
            maximum(sum_2, _ZERO_4, out=sum_2)
            dot(head, hidden_2, logits)
            ranked, choice = logits, int(logits.argmax())
            scale_usd = scorer.temperature_share * value_usd

        # As decision.explain.
        of_choice = earned[:, choice].tolist()
        stays, refund_usd = of_choice[0], bad_usd * of_choice[4]
        margin_usd = stays * (usage_usd + unserved_usd) - unserved_usd - of_choice[1] - of_choice[3] - refund_usd
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
            (of_choice[1], of_choice[3], refund_usd, of_choice[2]),
            None if floors is None else floor_usd.item(choice),
        )
        if scorer is not None:
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

    return decide


class FastPath:
    """A policy prepared for one fleet; shared by threads, each with buffers of its own.

    Args:
        policy: a margin rule, or a network that corrects one.
        layout: the candidates.
        static: (S_static, C) their constants.
        max_age_s: oldest scrape, and
        max_far: most context features far outside training, that it decides on.
    """

    def __init__(
        self, policy: MarginRule | ResidualPolicy, layout: Layout, static: Array, max_age_s: float, max_far: int
    ) -> None:
        rule = policy if isinstance(policy, MarginRule) else policy.advice
        self._name, self._limits = policy.name, (max_age_s, max_far)
        self._fleet = Fleet(rule, layout, static)
        self._scorer = None if isinstance(policy, MarginRule) else scorer_of(policy, layout)
        self._static = static.astype(np.float64).tobytes()
        self._threads = threading.local()

    def __getstate__(self) -> dict[str, Any]:
        return {name: part for name, part in vars(self).items() if name != "_threads"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._threads = threading.local()

    def decide(self, view: View) -> Decision | None:
        """The decision, or None where the general path must decide."""
        if view.layout is not self._fleet.layout or view.signals[: v.N_STATIC_SIGNALS].tobytes() != self._static:
            return None
        try:
            worker: Worker = self._threads.worker
        except AttributeError:
            worker = self._threads.worker = worker_of(self._name, self._fleet, self._scorer, *self._limits)
        try:
            return worker(view)
        except (ValueError, ZeroDivisionError, OverflowError, IndexError):  # NaN for a class, a length of 0, ...
            return None


def prepared(policy: object, layout: Layout, static: Array, max_age_s: float, max_far: int) -> FastPath | None:
    """The fast path of a policy, or None where it has none."""
    rule = policy.advice if isinstance(policy, ResidualPolicy) else policy
    if not isinstance(rule, MarginRule) or features.FEATURE_VERSION != COVERED_VERSION or not covers_features():
        return None
    if not isinstance(policy, MarginRule | ResidualPolicy) or (np.diff(layout.kind) < 0).any():
        return None
    if isinstance(policy, ResidualPolicy) and policy.spec.candidate != features.feature_spec(layout).candidate:
        return None
    several = any(
        np.ndim(value) > (name in PER_ITEM)
        for name, value in ((f.name, getattr(rule.parameters, f.name)) for f in fields(rule.parameters))
    )
    return None if several else FastPath(policy, layout, static, max_age_s, max_far)
