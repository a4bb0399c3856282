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
from marginroute.heuristics import Assessment
from marginroute.view import KINDS, Array, Layout, View

FEATURE_VERSION = 2
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
    Feature("recent_errors", "share of recent calls", "identity"),
    Feature("ttft_to_slo", "ratio", "ln(x + 0.001)"),
    Feature("tpot_to_slo", "ratio", "ln(x + 0.001)"),
    Feature("ttft_s", "s", "ln(x + 0.001)"),
    Feature("tpot_s", "s per token", "ln(x + 0.001)"),
    Feature("recent_ttft_s", "s", "ln(x + 0.001)"),
    Feature("below_best", "advice score below the best legal one, tenths of the value", "ln(1 + x)"),
    Feature("held", "requests", "ln(1 + x)"),
    Feature("pending_prefill", "tokens", "ln(1 + x)"),
    Feature("waiting", "requests, scraped", "ln(1 + x)"),
    Feature("telemetry_age_s", "s", "ln(1 + x)"),
)
_LOG_FROM, _LOG1P_FROM = 10, 15  # rows of the two groups of transforms above
CONTEXT_FEATURES = (
    Feature("difficulty_signal", "standard deviations", "identity"),
    Feature("fleet_fill", "mean in flight per slot over legal replicas", "identity"),
    Feature("urgency", "1 / (1 s + time to the deadline)", "identity"),
    Feature("prompt_tokens", "tokens", "ln(1 + x)"),
    Feature("expected_output_tokens", "tokens", "ln(1 + x)"),
    Feature("waited_s", "s", "ln(1 + x)"),
    Feature("arrival_rate_per_s", "requests/s", "ln(1 + x)"),
    Feature("value_usd", "millionths of a USD", "ln(1 + x)"),
)
_CONTEXT_LOG1P_FROM = 3


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
    np.maximum(rows, -CLIP, out=rows)
    return np.minimum(rows, CLIP, out=rows)


def _last(rows: Array) -> Array:
    """(F, ...) -> (..., F), a view."""
    return rows.transpose(*range(1, rows.ndim), 0)


def candidate_features(view: View, assessment: Assessment) -> Array:
    """(..., C, F) float32, clipped, not normalised."""
    s, q, a, layout = view.signals, view.request[..., None], assessment, view.layout
    per_value = 1.0 / np.maximum(a.value_usd, 1e-9)
    n = len(CANDIDATE_FEATURES)
    rows = np.empty((n + len(layout.one_hot), *view.legal.shape), dtype=np.float32)
    rows[0] = view.legal
    rows[1] = a.p_good
    rows[2:6] = a.parts_usd * per_value
    rows[6] = a.fill
    rows[7] = s[v.KV_USAGE]
    rows[8] = s[v.CACHED_TOKENS] / q[v.PROMPT_TOKENS]
    rows[9] = s[v.RECENT_ERRORS]
    rows[10:12] = a.latency_s / q[v.SLO_TTFT_S : v.SLO_TPOT_S + 1]
    rows[12:14] = a.latency_s
    rows[14] = s[v.RECENT_TTFT_S]
    rows[15] = np.maximum(a.best_usd - a.score_usd, 0.0) * (10.0 * per_value)
    rows[16:20] = s[v.HELD : v.TELEMETRY_AGE_S + 1]
    logs = rows[_LOG_FROM:_LOG1P_FROM]
    logs += 1e-3
    np.log(logs, out=logs)
    np.log1p(rows[_LOG1P_FROM:n], out=rows[_LOG1P_FROM:n])
    _clip(rows[:n])
    rows[n:] = layout.one_hot.reshape(-1, *([1] * (view.legal.ndim - 1)), layout.n_candidates)
    return _last(rows)


def context_features(view: View, assessment: Assessment) -> Array:
    """(..., G) float32, clipped, not normalised."""
    q, layout = view.request, view.layout
    one_hot = layout.class_and_task[q[v.CLASS_INDEX].astype(np.int64), q[v.TASK_INDEX].astype(np.int64)]
    n, replicas = one_hot.shape[-1], layout.n_replicas
    out = np.empty((*q.shape[1:], n + len(CONTEXT_FEATURES)), dtype=np.float32)
    out[..., :n] = one_hot
    rest = out[..., n:]
    rest[..., 0] = q[v.DIFFICULTY_SIGNAL]
    there = view.legal[..., :replicas]
    rest[..., 1] = np.add.reduce(assessment.fill[..., :replicas] * there, axis=-1)
    rest[..., 1] /= np.maximum(np.add.reduce(there, axis=-1), 1)
    rest[..., 2] = 1.0 / (1.0 + np.maximum(q[v.DEADLINE_LEFT_S], 0.0))
    rest[..., 3] = q[v.PROMPT_TOKENS]
    rest[..., 4] = q[v.EXPECTED_OUTPUT_TOKENS]
    rest[..., 5] = q[v.WAITED_S]
    rest[..., 6] = q[v.ARRIVAL_RATE_PER_S]
    rest[..., 7] = 1e6 * assessment.value_usd[..., 0]
    logs = rest[..., _CONTEXT_LOG1P_FROM:]
    np.log1p(logs, out=logs)
    return _clip(out)


def advice_logits(assessment: Assessment, temperature_share: float) -> Array:
    """(..., C) float32: (score - best legal score) / temperature, from MIN_LOGIT to 0."""
    temperature_usd = np.maximum(temperature_share * assessment.value_usd, 1e-9)
    logits = (assessment.score_usd - assessment.best_usd) / temperature_usd
    return np.minimum(np.maximum(logits, MIN_LOGIT), 0.0).astype(np.float32)


def observe(view: View, assessment: Assessment, spec: FeatureSpec) -> Array:
    """The flat observation (..., D) float32: candidates | context | advice logits | legal mask; not normalised."""
    candidate = candidate_features(view, assessment)
    lead = view.legal.shape[:-1]
    return np.concatenate(
        [
            candidate.reshape(*lead, -1),
            context_features(view, assessment),
            advice_logits(assessment, spec.temperature_share),
            view.legal.astype(np.float32),
        ],
        axis=-1,
    )


def split(observation: Array, n_candidates: int, spec: FeatureSpec) -> tuple[Array, Array, Array, Array]:
    """Takes a flat observation (or tensor) apart: candidates (..., C, F), context, advice logits, legal mask."""
    wide = n_candidates * spec.n_candidate
    candidate = observation[..., :wide].reshape(*observation.shape[:-1], n_candidates, spec.n_candidate)
    context = observation[..., wide : wide + spec.n_context]
    advice = observation[..., wide + spec.n_context : wide + spec.n_context + n_candidates]
    return candidate, context, advice, observation[..., wide + spec.n_context + n_candidates :]
