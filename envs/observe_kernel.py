"""What `MarginRule.assess` and `features.observe` say of every world, in one compiled pass.

The formulas and their meaning are those of `marginroute` (latency.py, margin_rule.py, features.py), which a gateway
runs as numpy; here they are once more, decision by decision, because thousands of worlds spend most of numpy's time on
passing over memory. tests/parity/test_observe_kernel.py holds every number to the original, on views with every feature
on.
"""

# ruff: noqa: ANN001, ANN201, ANN202 (Numba infers the types of kernels)
from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from envs.economics.formulas import answer_usd, refund_usd, tokens_usd, unserved_credit_usd
from envs.fleet.state import record_array
from envs.kernels import kernel
from marginroute import quality
from marginroute import view as v
from marginroute.features import CLIP, MIN_LOGIT, FeatureSpec
from marginroute.margin_rule import MAX_FILL, NEVER_USD, MarginRule
from marginroute.view import Array, Layout

told_change = kernel(quality.told_change, inline="always")

_LOG_OF_NONE = np.log(np.float32(1e-3))

RULE = np.dtype(
    [
        ("fill_power", "f8"),
        ("ttft_scale", "f8"),
        ("tpot_scale", "f8"),
        ("sharpness", "f8"),
        ("defer_share", "f8"),
        ("cache_similarity", "f8"),
        ("temperature_share", "f8"),
        ("fitted", "i8"),  # 1: P(good) is fitted, 0: the public prior
        ("fitted_reuse", "i8"),  # 1: that of a stored answer too
        ("fit_worth", "f8"),  # judged answers that the fit is worth
        ("floors", "i8"),  # 1: multipliers of floors enter the score
        ("n_replicas", "i8"),
        ("n_classes", "i8"),
        ("n_tasks", "i8"),
    ]
)


class Rule(NamedTuple):
    """A margin rule over a layout, and the columns of the observation, as the kernel takes them. J tasks.

    R is 1, or N where every world has parameters of its own.
    """

    numbers: Array  # (R,) RULE
    price_usd_per_s: Array  # (R, C)
    floor_usd: Array  # (3, R, K) multipliers of floors
    intercept: Array  # (J, C) of the fitted P(good)
    slope: Array  # (J, C)
    length: Array  # (C,)
    reuse: Array  # (J, 4) of a stored answer
    kind: Array  # (C,)
    one_hot: Array  # (C, 5 + T) float32


def rule_of(advice: MarginRule, layout: Layout, spec: FeatureSpec) -> Rule:
    """The constants of a rule."""
    parameters = advice.parameters
    price = np.atleast_2d(parameters.price.take(layout.station, axis=-1))
    numbers = record_array(len(price), RULE)
    for name in ("fill_power", "ttft_scale", "tpot_scale", "sharpness", "defer_share", "cache_similarity"):
        numbers[name] = np.ravel(getattr(parameters, name))
    numbers["temperature_share"], numbers["n_replicas"] = spec.temperature_share, layout.n_replicas
    numbers["n_classes"], numbers["n_tasks"] = len(layout.class_names), len(layout.task_names)
    shape = (len(layout.task_names), layout.n_candidates)
    fitted = np.zeros(shape), np.ones(shape), np.zeros(layout.n_candidates), np.zeros((shape[0], 4))
    if advice.quality is not None:
        reuse = advice.quality.reuse
        numbers["fitted"], numbers["fitted_reuse"] = 1, reuse is not None
        numbers["fit_worth"] = advice.quality.fit_worth
        fitted = (*advice.quality.by_candidate(layout), fitted[3] if reuse is None else reuse)
    floor_usd = np.zeros((3, len(price), len(layout.class_names)))
    if parameters.multipliers is not None:
        numbers["floors"], floor_usd = 1, parameters.multipliers.reshape(floor_usd.shape)
    one_hot = np.ascontiguousarray(layout.one_hot.T)
    return Rule(numbers, *map(np.ascontiguousarray, (price, floor_usd, *fitted)), layout.kind, one_hot)


class Seen(NamedTuple):
    """What the kernel writes; N worlds."""

    observation: Array  # (N, D) float32
    p_good: Array  # (N, C)
    bad_usd: Array  # (N, C)
    score_usd: Array  # (N, C)
    stay: Array  # (N, C)
    congestion_usd: Array  # (N, C), price of the capacity taken
    kept: Array  # (3, N, C), filled in where the rule has floors
    value_usd: Array  # (N,), revenue of a good answer


def buffers(n_worlds: int, n_candidates: int, observation: Array) -> Seen:
    """What the kernel writes, around an observation (N, D) float32."""
    of_candidates = (np.zeros((n_worlds, n_candidates)) for _ in range(5))
    return Seen(observation, *of_candidates, np.zeros((3, n_worlds, n_candidates)), np.zeros(n_worlds))


@kernel(error_model="numpy")
def _p_exceeds(estimate, limit, sharpness):
    if math.isinf(limit) or estimate == 0.0:
        return 0.0
    ratio = (estimate / limit) ** sharpness
    return ratio / (ratio + 1.0)


@kernel(error_model="numpy")
def _clip(x):
    return min(max(x, np.float32(-CLIP)), np.float32(CLIP))


@kernel(error_model="numpy")
def _log(x):
    return np.log(np.float32(x) + np.float32(1e-3)) if x != 0.0 else _LOG_OF_NONE


@kernel(error_model="numpy")
def _log1p(x):
    return np.log1p(np.float32(x)) if x != 0.0 else np.float32(0.0)


@kernel(error_model="numpy")
def _fitted(rule, s, q, w, c, task):
    """`FittedQuality.p_good`."""
    prior = min(max(s[v.P_GOOD_PRIOR, w, c], 1e-6), 1.0 - 1e-6)
    prior_logit = math.log(prior / (1.0 - prior))
    logit = rule.intercept[task, c] + rule.slope[task, c] * prior_logit
    if c == len(rule.kind) - 3 and rule.numbers[0].fitted_reuse == 1:
        weight = rule.reuse[task]
        logit = weight[0] + weight[1] * prior_logit + weight[2] * 10.0 * (1.0 - s[v.SIMILARITY, w, c])
        logit += weight[3] * math.log1p(s[v.ENTRY_AGE_S, w, c] / 60.0)
    elif rule.length[c] != 0.0:
        logit += rule.length[c] * math.log(q[v.PROMPT_TOKENS, w] * 1e-3)
    p_good = 1.0 / (1.0 + math.exp(-logit))
    if rule.numbers[0].fit_worth == math.inf:
        return p_good
    change = told_change(s[v.SURPRISE, w, c], s[v.CONFIDENCE, w, c], rule.numbers[0].fit_worth)
    return min(max(p_good + change, 0.0), 1.0)


@kernel(error_model="numpy", inline="always")
def _latency(s, w, c, prompt_tokens, output_tokens):
    """`latency.estimate`: TTFT, TPOT and work in seconds."""
    prefill_tokens = prompt_tokens - s[v.CACHED_TOKENS, w, c]
    slots = min(s[v.SLOTS, w, c], s[v.IN_FLIGHT_CAP, w, c])
    batch = min(s[v.DECODING, w, c] + 1.0, slots)
    kv_tokens = s[v.DECODING_TOKENS, w, c] + prompt_tokens
    decode_seq_s, kv_token_s = s[v.DECODE_SEQ_S, w, c], s[v.KV_TOKEN_S, w, c]
    decode_s = s[v.BASE_S, w, c] + decode_seq_s * batch + kv_token_s * kv_tokens
    pending_tokens = s[v.PENDING_PREFILL_TOKENS, w, c] + prefill_tokens
    iterations = max(pending_tokens / max(s[v.TOKEN_BUDGET, w, c] - batch, 1.0), 1.0) + 0.5
    crowded_out = (kv_tokens + pending_tokens - s[v.KV_CAPACITY_TOKENS, w, c]) / (prompt_tokens + output_tokens)
    ahead = max(max(s[v.IN_FLIGHT, w, c] + 1.0 - slots, crowded_out), 0.0)
    wait_s = ahead * output_tokens * decode_s / slots
    ttft_s = iterations * decode_s + (pending_tokens * s[v.PREFILL_TOKEN_S, w, c] + wait_s)
    per_output_token_s = decode_seq_s + kv_token_s * (prompt_tokens + 0.5 * output_tokens)
    per_output_token_s += s[v.BASE_S, w, c] / s[v.SLOTS, w, c]
    work_s = prefill_tokens * s[v.PREFILL_TOKEN_S, w, c] + output_tokens * per_output_token_s
    work_s += s[v.LIMIT_CALL_S, w, c] + (prompt_tokens + output_tokens) * s[v.LIMIT_TOKEN_S, w, c]
    return ttft_s + s[v.FIXED_TTFT_S, w, c], decode_s + s[v.FIXED_TPOT_S, w, c], work_s


@kernel(error_model="numpy")
def _candidates(rule, s, q, legal, w, value_usd, usage_usd, unserved_usd, row, n_features, seen):
    """`margin_rule.assess` for world `w`, with most candidate features; returns the highest legal score."""
    own = w if len(rule.numbers) > 1 else 0
    numbers = rule.numbers[own]
    prompt_tokens, output_tokens = q[v.PROMPT_TOKENS, w], q[v.EXPECTED_OUTPUT_TOKENS, w]
    bad_now_usd = refund_usd(value_usd, q[v.REFUND_SHARE, w], q[v.BAD_ANSWER_USD, w])
    task, n = int(q[v.TASK_INDEX, w]), len(rule.kind)
    slo_ttft_s, slo_tpot_s, per_value = q[v.SLO_TTFT_S, w], q[v.SLO_TPOT_S, w], 1.0 / max(value_usd, 1e-9)
    sharpness, best_usd, later_usd, later_good = numbers.sharpness, -np.inf, -np.inf, 0.0
    k, miss_usd = int(q[v.CLASS_INDEX, w]), q[v.MISS_USD, w]
    discount_usd = q[v.INPUT_PRICE_USD, w] - q[v.CACHED_INPUT_PRICE_USD, w]
    for c in range(n):
        p_good = _fitted(rule, s, q, w, c, task) if numbers.fitted == 1 else s[v.P_GOOD_PRIOR, w, c]
        ttft_s, tpot_s, work_s = _latency(s, w, c, prompt_tokens, output_tokens)
        felt_ttft_s = ttft_s * numbers.ttft_scale + q[v.WAITED_S, w]
        felt_tpot_s = tpot_s * numbers.tpot_scale
        stay = 0.0
        if rule.kind[c] <= v.CACHE:
            stay = (1.0 - _p_exceeds(felt_ttft_s, q[v.PATIENCE_S, w], sharpness)) * (1.0 - s[v.RECENT_ERRORS, w, c])
        late = _p_exceeds(felt_ttft_s, slo_ttft_s, sharpness)
        slow = _p_exceeds(felt_tpot_s, slo_tpot_s, sharpness)
        long = _p_exceeds(felt_ttft_s + felt_tpot_s * output_tokens, q[v.SLO_E2E_S, w], sharpness)
        share = late * q[v.TTFT_CREDIT_SHARE, w] + slow * q[v.TPOT_CREDIT_SHARE, w] + long * q[v.E2E_CREDIT_SHARE, w]
        fill = s[v.IN_FLIGHT, w, c] / s[v.SLOTS, w, c] + s[v.LIMIT_SPENT, w, c]
        bad_usd, bad_share = stay * bad_now_usd, 1.0 - p_good
        cost_usd = s[v.CALL_USD, w, c] + answer_usd(
            prompt_tokens, s[v.CACHED_TOKENS, w, c], output_tokens,
            s[v.INPUT_USD, w, c], s[v.CACHED_INPUT_USD, w, c], s[v.OUTPUT_USD, w, c],
        )  # fmt: skip
        cost_usd += s[v.CACHED_TOKENS, w, c] * discount_usd
        credit_usd, refunds_usd, congestion_usd = stay * value_usd * min(share, 1.0), bad_share * bad_usd, 0.0
        if miss_usd > 0.0:
            credit_usd += stay * (1.0 - (1.0 - late) * (1.0 - slow) * (1.0 - long)) * miss_usd
        if rule.price_usd_per_s[own, c] != 0.0:
            congestion_usd = rule.price_usd_per_s[own, c] * work_s * min(fill, MAX_FILL) ** numbers.fill_power
        margin_usd = stay * (usage_usd + unserved_usd) - unserved_usd - (cost_usd + credit_usd + refunds_usd)
        idle_usd = -unserved_usd
        if legal[w, c] and rule.kind[c] <= v.PROVIDER:
            idle_usd = usage_usd - bad_share * bad_now_usd - cost_usd
            later_good = max(later_good, p_good)
        later_usd = max(later_usd, idle_usd)
        seen.p_good[w, c], seen.bad_usd[w, c], seen.stay[w, c] = p_good, bad_usd, stay
        seen.score_usd[w, c], seen.congestion_usd[w, c] = margin_usd - congestion_usd, congestion_usd
        if numbers.floors == 1:
            seen.bad_usd[w, c] += stay * rule.floor_usd[1, own, k]
            seen.kept[0, w, c] = stay * (1.0 - late) * (1.0 - slow) * (1.0 - long)
            seen.kept[1, w, c], seen.kept[2, w, c] = stay * p_good, stay
        at = c * n_features
        row[at] = legal[w, c]
        row[at + 1] = p_good
        row[at + 2] = cost_usd * per_value
        row[at + 3] = credit_usd * per_value
        row[at + 4] = refunds_usd * per_value
        row[at + 5] = congestion_usd * per_value
        row[at + 6] = fill
        row[at + 7] = s[v.KV_USAGE, w, c]
        row[at + 8] = s[v.CACHED_TOKENS, w, c] / prompt_tokens
        for i in range(6):
            row[at + 9 + i] = s[v.SURPRISE + i, w, c]
        row[at + 15] = _log(ttft_s / slo_ttft_s)
        row[at + 16] = _log(tpot_s / slo_tpot_s)
        row[at + 17] = _log(ttft_s)
        row[at + 18] = _log(tpot_s)
        row[at + 19] = _log(s[v.RECENT_TTFT_S, w, c])
        row[at + 20] = _log(s[v.RECENT_TPOT_S, w, c])
        for i in range(6):
            row[at + 22 + i] = _log1p(s[v.ENTRY_AGE_S + i, w, c])
    if legal[w, n - 2]:
        seen.score_usd[w, n - 2] = numbers.defer_share * later_usd
        seen.kept[0, w, n - 2] = seen.kept[2, w, n - 2] = numbers.defer_share
        seen.kept[1, w, n - 2] = numbers.defer_share * later_good
    if s[v.SIMILARITY, w, n - 3] < numbers.cache_similarity:
        seen.score_usd[w, n - 3] -= NEVER_USD
    for c in range(n):
        for i in range(3 * numbers.floors):
            seen.score_usd[w, c] += rule.floor_usd[i, own, k] * seen.kept[i, w, c]
        if legal[w, c]:
            best_usd = max(best_usd, seen.score_usd[w, c])
    return best_usd


@kernel(error_model="numpy")
def assess(rule, s, q, legal, w, n_features, seen):
    """Assesses the candidates of world `w`; returns the highest legal score and the answer's value in USD.

    With `n_features` 0 the features of all candidates overwrite one another.
    """
    prompt_tokens, output_tokens = q[v.PROMPT_TOKENS, w], q[v.EXPECTED_OUTPUT_TOKENS, w]
    usage_usd = tokens_usd(prompt_tokens, output_tokens, q[v.INPUT_PRICE_USD, w], q[v.OUTPUT_PRICE_USD, w])
    usage_usd += q[v.REQUEST_USD, w]
    value_usd = usage_usd + q[v.REQUEST_VALUE_USD, w]
    unserved_usd = unserved_credit_usd(value_usd, q[v.UNSERVED_CREDIT_SHARE, w], q[v.UNSERVED_CREDIT_USD, w])
    row = seen.observation[w]
    return _candidates(rule, s, q, legal, w, value_usd, usage_usd, unserved_usd, row, n_features, seen), value_usd


@kernel(error_model="numpy")
def _context(rule, s, q, legal, w, value_usd, row):
    """`features.context_features`."""
    numbers = rule.numbers[0]
    n, row[:] = numbers.n_classes + numbers.n_tasks, np.float32(0.0)
    row[int(q[v.CLASS_INDEX, w])] = 1.0
    row[numbers.n_classes + int(q[v.TASK_INDEX, w])] = 1.0
    fill, there = 0.0, 0
    for r in range(numbers.n_replicas):
        if legal[w, r]:
            fill += s[v.IN_FLIGHT, w, r] / s[v.SLOTS, w, r] + s[v.LIMIT_SPENT, w, r]
            there += 1
    row[n] = _clip(np.float32(q[v.DIFFICULTY_SIGNAL, w]))
    row[n + 1] = _clip(np.float32(fill / max(there, 1)))
    row[n + 2] = _clip(np.float32(1.0 / (1.0 + max(q[v.DEADLINE_LEFT_S, w], 0.0))))
    row[n + 3] = _clip(_log1p(q[v.PROMPT_TOKENS, w]))
    row[n + 4] = _clip(_log1p(q[v.EXPECTED_OUTPUT_TOKENS, w]))
    row[n + 5] = _clip(_log1p(q[v.WAITED_S, w]))
    row[n + 6] = _clip(_log1p(q[v.ARRIVAL_RATE_PER_S, w]))
    row[n + 7] = _clip(_log1p(1e6 * value_usd))
    row[n + 8] = _clip(_log1p(q[v.TURNED_DOWN, w]))
    row[n + 9] = _clip(_log1p(q[v.VERIFIER_SCORE, w]))
    row[n + 10] = _clip(_log1p(q[v.TASK_VALUE_USD, w]))


@kernel(error_model="numpy")
def observe(rule, s, q, legal, n_features, n_context, seen):
    """Fills `seen` for every world, from signals (S, N, C), request (Q, N) and legal (N, C)."""
    worlds, n = legal.shape
    fixed, wide = n_features - rule.one_hot.shape[1], n * n_features
    for w in range(worlds):
        row = seen.observation[w]
        best_usd, value_usd = assess(rule, s, q, legal, w, n_features, seen)
        seen.value_usd[w] = value_usd
        _context(rule, s, q, legal, w, value_usd, row[wide : wide + n_context])
        tenth = 10.0 / max(value_usd, 1e-9)
        temperature_usd = max(rule.numbers[0].temperature_share * value_usd, 1e-9)
        advice, mask = row[wide + n_context : wide + n_context + n], row[wide + n_context + n :]
        for c in range(n):
            at = c * n_features
            below_usd = best_usd - seen.score_usd[w, c]
            row[at + 21] = _log1p(max(below_usd, 0.0) * tenth)
            for i in range(fixed):
                row[at + i] = _clip(row[at + i])
            for i in range(rule.one_hot.shape[1]):
                row[at + fixed + i] = rule.one_hot[c, i]
            advice[c] = min(max(-below_usd / temperature_usd, MIN_LOGIT), 0.0)
            mask[c] = legal[w, c]
