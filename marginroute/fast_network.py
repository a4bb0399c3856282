"""The steps of a prepared decision that run the network over the rows of a thread's `Buffer`; see `fast_parts`."""

from __future__ import annotations

import math
import operator
import struct
from collections.abc import Callable, Sequence

import numpy as np

from marginroute import view as v
from marginroute.fast_parts import MIN_USD, Usd
from marginroute.fast_rows import AT, LOGS, SHOWN, Buffer, Fleet, Scorer
from marginroute.features import CLIP, CONTEXT_FEATURES, MIN_LOGIT
from marginroute.view import Array

_CLIP = np.array(CLIP)  # see `View.asked`
_ZERO_4, _LOW_4, _HIGH_4 = (np.array(x, dtype=np.float32) for x in (0.0, -CLIP, CLIP))


def ranker(
    fleet: Fleet, buffer: Buffer, scorer: Scorer, max_far: int
) -> Callable[[list[float], Array, Usd, float], Array | None]:
    """Logits of the network, as `features` and `policy.Network.logits`; None where too much lies outside training."""
    layout, n, width = fleet.layout, fleet.layout.n_candidates, len(scorer.second)
    shown_rows = buffer.rows[SHOWN]
    last = np.ones((1, n), dtype=np.float32)  # for the bias and the context
    seen = np.concatenate([shown_rows.astype(np.float32), layout.one_hot, last])
    shown = seen[: len(shown_rows)]
    logs, told = shown[LOGS], shown[AT["tier_confidence"] - SHOWN.start]
    hidden_1, hidden_2 = np.ones((width + 1, n), dtype=np.float32), np.empty((width, n), dtype=np.float32)
    sum_1, weights = hidden_1[:-1], scorer.first.copy()
    context, from_context = np.ones(1 + len(CONTEXT_FEATURES), dtype=np.float32), weights[-1, :-2]
    contexts = [list(of_class) for of_class in scorer.context]
    first, second, head = weights.T, scorer.second, scorer.head
    logits, advised = ranked = np.empty((2, n), dtype=np.float32)
    shift, trust, (trust_always, trust_told) = np.repeat(scorer.shift, n, axis=1), told, scorer.trust
    if trust_always:
        trust = np.empty(n, dtype=np.float32)
    below_by, advice_and_below, advice = np.empty((2, 2)), buffer.span("advice", "below_best"), buffer.row["advice"]
    told_row, nothing, unlearned_by = buffer.row["tier_confidence"], np.zeros(n).tobytes(), np.zeros(len(shown_rows))
    unlearned_by[[AT["advice"] - SHOWN.start, AT["barred"] - SHOWN.start]] = head[1, -2], -head[1, -1]
    unlearned = np.empty(n)
    one_and_score, temperature_share = buffer.one_and_score, scorer.temperature_share
    write, write_context, clip = struct.Struct("4d").pack_into, struct.Struct("11f").pack_into, CLIP / MIN_LOGIT
    below_memory, context_memory = below_by.data, context.data
    describe = describer(fleet, buffer, scorer)
    add, multiply, maximum, minimum, dot, log = np.add, np.multiply, np.maximum, np.minimum, np.dot, np.log

    def rank(request: list[float], mean_by: Array, usd: Usd, best: float) -> Array | None:
        _, value_usd, _, _, per_value = usd
        k, j = int(request[v.CLASS_INDEX]), int(request[v.TASK_INDEX])
        of_context, far = describe(request, value_usd, mean_by, k, j)
        if far > max_far:
            return None
        # As features.advice_logits, in the unit that is clipped where those are, and features.candidate_features.
        per_advice = clip / (max(temperature_share * value_usd, MIN_USD) * per_value)
        write(below_memory, 0, -best * per_advice, per_advice, 10.0 * best, -10.0)
        dot(below_by, one_and_score, advice_and_below)
        if not trust_always and told_row.tobytes() == nothing:  # the correction is 0, if nothing is infinite
            minimum(advice, _CLIP, out=advice)
            dot(unlearned_by, shown_rows, unlearned)
            return unlearned
        shown[...] = shown_rows
        add(logs, shift, logs)
        log(logs, logs)
        maximum(shown, _LOW_4, out=shown)
        minimum(shown, _HIGH_4, out=shown)
        # As policy.Network.logits.
        write_context(context_memory, 4, *of_context)
        dot(contexts[k][j], context, from_context)
        dot(first, seen, sum_1)
        maximum(sum_1, _ZERO_4, out=sum_1)
        dot(second, hidden_1, hidden_2)
        maximum(hidden_2, _ZERO_4, out=hidden_2)
        dot(head, hidden_2, ranked)
        if trust_always:
            multiply(told, trust_told, trust)
            add(trust, trust_always, trust)
        multiply(logits, trust, logits)
        add(logits, advised, logits)
        return logits

    return rank


def describer(
    fleet: Fleet, buffer: Buffer, scorer: Scorer
) -> Callable[[list[float], float, Array, int, int], tuple[Sequence[float], int]]:
    """The context, as `features.context_features`, and how many of its columns lie far outside training."""
    fills, far_columns, (low, high) = buffer.row["fill"][: fleet.layout.n_replicas], scorer.far.tolist(), scorer.near
    near_low, near_high = [max(x, -CLIP) for x in low], [min(x, CLIP) for x in high]
    less, log1p = operator.lt, math.log1p

    def describe(request: list[float], value_usd: float, mean_by: Array, k: int, j: int) -> tuple[Sequence[float], int]:
        p, o, _, _, signal, waited_s, left_s, per_s, _, turned_down, score, task_usd = request[: v.TASK_CALL]
        found: Sequence[float] = (
            signal,
            fills.dot(mean_by),
            1.0 / (1.0 + max(left_s, 0.0)),
            log1p(p),
            log1p(o),
            log1p(waited_s),
            log1p(per_s),
            log1p(1e6 * value_usd),
            log1p(turned_down),
            log1p(score),
            log1p(task_usd),
        )
        far = far_columns[k][j]
        if not (all(map(less, near_low, found)) and all(map(less, found, near_high))):
            found = [x if -CLIP <= x <= CLIP else min(max(x, -CLIP), CLIP) for x in found]
            far += sum([not a < x < b for a, x, b in zip(low, found, high, strict=True)])
        return found, far

    return describe
