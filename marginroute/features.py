"""View -> arrays: the only home of feature definitions, their transforms and the normaliser.

An observation of one decision is the concatenation of

    candidates (C * F) | context (G) | advice logits (C) | legal mask (C)

where the advice is a margin rule (see `heuristics`) whose assessment supplies P(good), latencies, costs and scores, and
the advice logit of candidate c is (score_c - max score) / temperature, the starting point that a residual policy
corrects. `FeatureSpec.version` changes whenever the meaning of any column changes; a bundle refuses another version.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from marginroute import view as v
from marginroute.assessment import Assessment
from marginroute.view import KINDS, Array, Layout, View

FEATURE_VERSION = 7
CLIP = 10.0  # every feature stays inside +-CLIP before it is normalised
MIN_STD = 0.05  # of a normalised feature, so that a nearly constant column cannot swamp the others
MIN_LOGIT = -30.0  # advice logits below this are as good as never


@dataclass(frozen=True)
class Feature:
    """One column: its name, the unit of what goes in, and the transform that is applied (all clipped to +-CLIP)."""

    name: str
    unit: str
    transform: str


@dataclass(frozen=True, eq=False)
class FeatureSpec:
    """Columns of the observation and the fitted normaliser (x - mean) / std of the C*F and G parts.

    Attributes:
        candidate: F features of a candidate.
        context: G features of the request and the fleet.
        candidate_mean, candidate_std: (F,); context_mean, context_std: (G,).
        temperature_share: advice temperature as a share of the request's value.
    """

    candidate: tuple[Feature, ...]
    context: tuple[Feature, ...]
    candidate_mean: Array
    candidate_std: Array
    context_mean: Array
    context_std: Array
    temperature_share: float = 0.03
    version: int = field(default=FEATURE_VERSION)

    @cached_property
    def drift_limit(self) -> Array:
        """(G,) distance of a context feature from its mean beyond which it is far outside training."""
        return CLIP * self.context_std

    @property
    def n_candidate(self) -> int:
        """F."""
        return len(self.candidate)

    @property
    def n_context(self) -> int:
        """G."""
        return len(self.context)

    def size(self, n_candidates: int) -> int:
        """D, the length of a flat observation with C candidates."""
        return n_candidates * (self.n_candidate + 2) + self.n_context

    def with_normaliser(self, candidate: Array, context: Array) -> FeatureSpec:
        """Fits mean and standard deviation on (B, C, F) and (B, G) samples; constant columns keep std 1."""

        def moments(x: Array) -> tuple[Array, Array]:
            std = x.std(axis=0)
            return x.mean(axis=0), np.where(std > 1e-6, np.maximum(std, MIN_STD), 1.0)

        candidate_mean, candidate_std = moments(candidate.reshape(-1, self.n_candidate).astype(np.float64))
        context_mean, context_std = moments(context.reshape(-1, self.n_context).astype(np.float64))
        return replace(
            self,
            candidate_mean=candidate_mean,
            candidate_std=candidate_std,
            context_mean=context_mean,
            context_std=context_std,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for a bundle's manifest."""

        def rows(features: tuple[Feature, ...], mean: Array, std: Array) -> list[dict[str, Any]]:
            return [
                {"name": f.name, "unit": f.unit, "transform": f.transform, "mean": float(m), "std": float(s)}
                for f, m, s in zip(features, mean, std, strict=True)
            ]

        return {
            "version": self.version,
            "clip": CLIP,
            "temperature_share": self.temperature_share,
            "candidate": rows(self.candidate, self.candidate_mean, self.candidate_std),
            "context": rows(self.context, self.context_mean, self.context_std),
        }

    @staticmethod
    def from_dict(data: dict[str, Any]) -> FeatureSpec:
        """The inverse of `to_dict`."""

        def columns(rows: list[dict[str, Any]]) -> tuple[tuple[Feature, ...], Array, Array]:
            return (
                tuple(Feature(r["name"], r["unit"], r["transform"]) for r in rows),
                np.array([r["mean"] for r in rows], dtype=np.float64),
                np.array([r["std"] for r in rows], dtype=np.float64),
            )

        candidate, candidate_mean, candidate_std = columns(data["candidate"])
        context, context_mean, context_std = columns(data["context"])
        return FeatureSpec(
            candidate,
            context,
            candidate_mean,
            candidate_std,
            context_mean,
            context_std,
            data["temperature_share"],
            data["version"],
        )


CANDIDATE_FEATURES = (
    Feature("legal", "0/1", "identity"),
    Feature("p_good", "probability", "identity"),
    Feature("cost", "share of value", "identity"),
    Feature("credit", "share of value", "identity"),
    Feature("refund", "share of value", "identity"),
    Feature("congestion", "share of value", "identity"),
    Feature("fill", "in flight per slot", "identity"),
    Feature("kv_usage", "share, scraped", "identity"),
    Feature("cached_share", "share of the prompt expected to be cached", "identity"),
    Feature("surprise", "good answers to the task beyond expectation, per root of those judged lately", "identity"),
    Feature("confidence", "n / (n + 10) of the n judged", "identity"),
    Feature("tier_surprise", "the same surprise over all tasks", "identity"),
    Feature("tier_confidence", "the same confidence over all tasks", "identity"),
    Feature("recent_errors", "share of recent calls", "identity"),
    Feature("similarity", "of the prompt and that of the stored answer", "identity"),
    Feature("ttft_to_slo", "ratio", "ln(x + 0.001)"),
    Feature("tpot_to_slo", "ratio", "ln(x + 0.001)"),
    Feature("ttft_s", "s", "ln(x + 0.001)"),
    Feature("tpot_s", "s per token", "ln(x + 0.001)"),
    Feature("recent_ttft_s", "s", "ln(x + 0.001)"),
    Feature("recent_tpot_s", "s per token", "ln(x + 0.001)"),
    Feature("below_best", "advice score below the best legal one, tenths of the value", "ln(1 + x)"),
    Feature("entry_age_s", "s since the stored answer was given", "ln(1 + x)"),
    Feature("held", "requests", "ln(1 + x)"),
    Feature("pending_prefill", "tokens", "ln(1 + x)"),
    Feature("waiting", "requests, scraped", "ln(1 + x)"),
    Feature("telemetry_age_s", "s", "ln(1 + x)"),
    Feature("tried", "0/1", "ln(1 + x)"),
)
_LOG_FROM, _LOG1P_FROM = 15, 21  # rows of the two groups of transforms above
TIER_CONFIDENCE = [feature.name for feature in CANDIDATE_FEATURES].index("tier_confidence")
CONTEXT_FEATURES = (
    Feature("difficulty_signal", "standard deviations", "identity"),
    Feature("fleet_fill", "mean in flight per slot over legal replicas", "identity"),
    Feature("urgency", "1 / (1 s + time to the deadline)", "identity"),
    Feature("prompt_tokens", "tokens", "ln(1 + x)"),
    Feature("expected_output_tokens", "tokens", "ln(1 + x)"),
    Feature("waited_s", "s", "ln(1 + x)"),
    Feature("arrival_rate_per_s", "requests/s", "ln(1 + x)"),
    Feature("value_usd", "millionths of a USD", "ln(1 + x)"),
    Feature("turned_down", "answers", "ln(1 + x)"),
    Feature("verifier_score", "of the answer in hand", "ln(1 + x)"),
    Feature("task_value_usd", "USD", "ln(1 + x)"),
)
_CONTEXT_LOG1P_FROM = 3
_CONTEXT_ROWS = np.array(
    [
        v.DIFFICULTY_SIGNAL,
        v.SEQUENCE,  # computed
        v.DEADLINE_LEFT_S,  # computed
        v.PROMPT_TOKENS,
        v.EXPECTED_OUTPUT_TOKENS,
        v.WAITED_S,
        v.ARRIVAL_RATE_PER_S,
        v.REQUEST_VALUE_USD,  # computed
        v.TURNED_DOWN,
        v.VERIFIER_SCORE,
        v.TASK_VALUE_USD,
    ]
)
_ZERO, _MIN_LOGIT = np.array(0.0), np.array(MIN_LOGIT)  # see `View.asked`
_LOW, _HIGH, _SHIFT = (np.array(x, dtype=np.float32) for x in (-CLIP, CLIP, 1e-3))


def feature_spec(layout: Layout, temperature_share: float = 0.03) -> FeatureSpec:
    """The specification for a fleet's tiers, classes and tasks, with an identity normaliser."""
    constant = (*(f"kind_{kind}" for kind in KINDS), *(f"tier_{name}" for name in layout.tier_names))
    candidate = (*CANDIDATE_FEATURES, *(Feature(name, "0/1", "identity") for name in constant))
    context = (
        *(Feature(f"class_{name}", "0/1", "identity") for name in layout.class_names),
        *(Feature(f"task_{name}", "0/1", "identity") for name in layout.task_names),
        *CONTEXT_FEATURES,
    )
    f, g = len(candidate), len(context)
    return FeatureSpec(candidate, context, np.zeros(f), np.ones(f), np.zeros(g), np.ones(g), temperature_share)


def _clip(rows: Array) -> Array:
    """Clips in place; `np.clip` costs several times as much on the few numbers of one decision."""
    np.maximum(rows, _LOW, out=rows)
    return np.minimum(rows, _HIGH, out=rows)


def _last(rows: Array) -> Array:
    """(F, C) -> (C, F), (F, N, C) -> (N, C, F), a view."""
    return rows.T if rows.ndim == 2 else rows.transpose(1, 2, 0)


def candidate_features(view: View, assessment: Assessment) -> Array:
    """(..., C, F) float32, clipped, not normalised."""
    s, a, layout, request = view.signals, assessment, view.layout, view.request
    per_value = np.asarray(1.0 / np.maximum(a.value_usd, 1e-9))
    n, alone = len(CANDIDATE_FEATURES), view.legal.ndim == 1
    rows = np.empty((n + len(layout.one_hot), *view.legal.shape), dtype=np.float32)
    rows[0] = view.legal
    rows[1] = a.p_good
    np.multiply(a.parts_usd, per_value, out=rows[2:6], casting="same_kind")
    rows[6] = a.fill
    rows[7] = s[v.KV_USAGE]
    np.divide(s[v.CACHED_TOKENS], view.asked(v.PROMPT_TOKENS), out=rows[8], casting="same_kind")
    rows[9:15] = s[v.SURPRISE : v.SIMILARITY + 1]
    slo_s = request[v.SLO_TTFT_S : v.SLO_TPOT_S + 1, ..., None]
    np.divide(a.latency_s, slo_s, out=rows[15:17], casting="same_kind")
    rows[17:19] = a.latency_s
    rows[19:21] = s[v.RECENT_TTFT_S : v.RECENT_TPOT_S + 1]
    below_usd = np.maximum(a.best_usd - a.score_usd, _ZERO)
    np.multiply(below_usd, np.asarray(10.0 * per_value), out=rows[21], casting="same_kind")
    rows[22:28] = s[v.ENTRY_AGE_S : v.TRIED + 1]
    logs = rows[_LOG_FROM:_LOG1P_FROM]
    logs += _SHIFT
    np.log(logs, out=logs)
    logs = rows[_LOG1P_FROM:n]
    np.log1p(logs, out=logs)
    _clip(rows[:n])
    rows[n:] = layout.one_hot if alone else layout.one_hot[:, None]
    return _last(rows)


def context_features(view: View, assessment: Assessment) -> Array:
    """(..., G) float32, clipped, not normalised."""
    q, layout = view.request, view.layout
    class_index, task_index = q[v.CLASS_INDEX : v.TASK_INDEX + 1].astype(np.int64)
    one_hot = layout.class_and_task[class_index, task_index]
    n, replicas = one_hot.shape[-1], layout.n_replicas
    rows = q.take(_CONTEXT_ROWS, axis=0)  # (11, ...)
    there = view.legal[..., :replicas]
    rows[1] = np.add.reduce(assessment.fill[..., :replicas] * there, axis=-1)
    rows[1] /= np.maximum(np.add.reduce(there, axis=-1), 1)
    rows[2] = 1.0 / (1.0 + np.maximum(q[v.DEADLINE_LEFT_S], 0.0))
    rows[7] = 1e6 * assessment.value_usd.reshape(q.shape[1:])
    rows = rows.astype(np.float32)
    logs = rows[_CONTEXT_LOG1P_FROM:]
    np.log1p(logs, out=logs)
    out = np.empty((*q.shape[1:], n + len(rows)), dtype=np.float32)
    out[..., :n] = one_hot
    out[..., n:] = _clip(rows).T
    return out


def advice_logits(assessment: Assessment, temperature_share: float) -> Array:
    """(..., C) float32: (score - best legal score) / temperature, from MIN_LOGIT to 0."""
    temperature_usd = np.asarray(np.maximum(temperature_share * assessment.value_usd, 1e-9))
    logits = assessment.score_usd - assessment.best_usd
    logits /= temperature_usd
    np.maximum(logits, _MIN_LOGIT, out=logits)
    return np.minimum(logits, _ZERO).astype(np.float32)


def observe(view: View, assessment: Assessment, spec: FeatureSpec) -> Array:
    """The flat observation (..., D) float32: candidates | context | advice logits | legal mask; not normalised."""
    lead, c = view.legal.shape[:-1], view.layout.n_candidates
    out = np.empty((*lead, spec.size(c)), dtype=np.float32)
    candidate, context, advice, legal = split(out, c, spec)
    candidate[...] = candidate_features(view, assessment)
    context[...] = context_features(view, assessment)
    advice[...] = advice_logits(assessment, spec.temperature_share)
    legal[...] = view.legal
    return out


def split(observation: Array, n_candidates: int, spec: FeatureSpec) -> tuple[Array, Array, Array, Array]:
    """Takes a flat observation (or tensor) apart: candidates (..., C, F), context, advice logits, legal mask."""
    wide = n_candidates * spec.n_candidate
    candidate = observation[..., :wide].reshape(*observation.shape[:-1], n_candidates, spec.n_candidate)
    context = observation[..., wide : wide + spec.n_context]
    advice = observation[..., wide + spec.n_context : wide + spec.n_context + n_candidates]
    return candidate, context, advice, observation[..., wide + spec.n_context + n_candidates :]
