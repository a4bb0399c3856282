"""View -> arrays: the only home of feature definitions, their transforms and the normaliser.

An observation of one decision is the concatenation of

    candidates (C * F) | context (G) | advice logits (C) | legal mask (C)

where the advice is a margin rule (see `heuristics`) whose assessment supplies P(good), latencies, costs and scores, and
the advice logit of candidate c is (score_c - max score) / temperature, the starting point that a residual policy
corrects. `FeatureSpec.version` changes whenever the meaning of any column changes; a bundle refuses another version.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from marginroute import view as v
from marginroute.heuristics import Assessment
from marginroute.view import KINDS, Array, Layout, View

FEATURE_VERSION = 1
CLIP = 10.0  # every feature stays inside +-CLIP, before and after normalisation
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
            return x.mean(axis=0), np.where(std > 1e-6, std, 1.0)

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
    *(Feature(f"kind_{kind}", "0/1", "identity") for kind in KINDS),
    Feature("legal", "0/1", "identity"),
    Feature("p_good", "probability", "identity"),
    Feature("ttft_to_slo", "ratio", "ln(x + 0.01)"),
    Feature("tpot_to_slo", "ratio", "ln(x + 0.01)"),
    Feature("ttft_s", "s", "ln(x + 0.001)"),
    Feature("tpot_s", "s per token", "ln(x + 0.001)"),
    Feature("cost", "share of value", "identity"),
    Feature("credit", "share of value", "identity"),
    Feature("refund", "share of value", "identity"),
    Feature("congestion", "share of value", "identity"),
    Feature("advice", "score below the best legal one, share of value", "-ln(1 + 10 x)"),
    Feature("fill", "in flight per slot", "identity"),
    Feature("held", "requests", "ln(1 + x)"),
    Feature("pending_prefill", "tokens", "ln(1 + x) / 4"),
    Feature("waiting", "requests, scraped", "ln(1 + x)"),
    Feature("kv_usage", "share, scraped", "identity"),
    Feature("telemetry_age_s", "s", "ln(1 + x)"),
    Feature("recent_ttft_s", "s", "ln(x + 0.001)"),
)


def feature_spec(layout: Layout, temperature_share: float = 0.03) -> FeatureSpec:
    """The specification for a fleet's tiers, classes and tasks, with an identity normaliser."""
    candidate = (*CANDIDATE_FEATURES, *(Feature(f"tier_{name}", "0/1", "identity") for name in layout.tier_names))
    context = (
        *(Feature(f"class_{name}", "0/1", "identity") for name in layout.class_names),
        *(Feature(f"task_{name}", "0/1", "identity") for name in layout.task_names),
        Feature("prompt_tokens", "tokens", "ln(x) - 6"),
        Feature("expected_output_tokens", "tokens", "ln(x) - 5"),
        Feature("difficulty_signal", "standard deviations", "identity"),
        Feature("value_usd", "USD", "ln(x) + 6"),
        Feature("waited_s", "s", "ln(1 + x)"),
        Feature("deadline_left_s", "s", "ln(1 + x), 0 if none"),
        Feature("arrival_rate_per_s", "requests/s", "ln(1 + x)"),
        Feature("fleet_fill", "mean in flight per slot over replicas", "identity"),
    )
    f, g = len(candidate), len(context)
    return FeatureSpec(candidate, context, np.zeros(f), np.ones(f), np.zeros(g), np.ones(g), temperature_share)


def _one_hot(index: Array, size: int) -> Array:
    """(..., size) of 0/1; an index outside 0..size-1 gives zeros."""
    return (index[..., None] == np.arange(size)).astype(np.float32)


def candidate_features(view: View, assessment: Assessment) -> Array:
    """(..., C, F) float32, clipped, not normalised."""
    s, q = view.signals, view.request[..., None]
    a, layout = assessment, view.layout
    value = np.maximum(a.value_usd, 1e-9)
    best = np.where(view.legal, a.score_usd, -np.inf).max(axis=-1, keepdims=True)
    below = np.maximum((best - a.score_usd) / value, 0.0)
    columns = (
        view.legal,
        a.p_good,
        np.log((q[v.WAITED_S] + a.ttft_s) / q[v.SLO_TTFT_S] + 0.01),
        np.log(a.tpot_s / q[v.SLO_TPOT_S] + 0.01),
        np.log(a.ttft_s + 1e-3),
        np.log(a.tpot_s + 1e-3),
        a.cost_usd / value,
        a.credit_usd / value,
        a.refund_usd / value,
        a.congestion_usd / value,
        -np.log1p(10.0 * below),
        s[v.IN_FLIGHT] / s[v.SLOTS],
        np.log1p(s[v.HELD]),
        np.log1p(s[v.PENDING_PREFILL_TOKENS]) / 4.0,
        np.log1p(s[v.WAITING]),
        s[v.KV_USAGE],
        np.log1p(s[v.TELEMETRY_AGE_S]),
        np.log(s[v.RECENT_TTFT_S] + 1e-3),
    )
    n_kinds, n_tiers = len(KINDS), len(layout.tier_names)
    out = np.empty((*view.legal.shape, n_kinds + len(columns) + n_tiers), dtype=np.float32)
    out[..., :n_kinds] = _one_hot(layout.kind, n_kinds)
    for j, column in enumerate(columns):
        out[..., n_kinds + j] = column
    out[..., n_kinds + len(columns) :] = _one_hot(layout.tier, n_tiers)
    return np.clip(out, -CLIP, CLIP, out=out)


def context_features(view: View, assessment: Assessment) -> Array:
    """(..., G) float32, clipped, not normalised."""
    s, q, layout = view.signals, view.request, view.layout
    replicas = layout.n_replicas
    deadline = q[v.DEADLINE_LEFT_S]
    fill = (s[v.IN_FLIGHT][..., :replicas] / s[v.SLOTS][..., :replicas]).mean(axis=-1)
    columns = (
        np.log(q[v.PROMPT_TOKENS]) - 6.0,
        np.log(q[v.EXPECTED_OUTPUT_TOKENS]) - 5.0,
        q[v.DIFFICULTY_SIGNAL],
        np.log(np.maximum(assessment.value_usd[..., 0], 1e-9)) + 6.0,
        np.log1p(q[v.WAITED_S]),
        np.log1p(np.where(np.isfinite(deadline), np.maximum(deadline, 0.0), 0.0)),
        np.log1p(q[v.ARRIVAL_RATE_PER_S]),
        fill,
    )
    n_classes, n_tasks = len(layout.class_names), len(layout.task_names)
    out = np.empty((*q.shape[1:], n_classes + n_tasks + len(columns)), dtype=np.float32)
    out[..., :n_classes] = _one_hot(q[v.CLASS_INDEX], n_classes)
    out[..., n_classes : n_classes + n_tasks] = _one_hot(q[v.TASK_INDEX], n_tasks)
    for j, column in enumerate(columns):
        out[..., n_classes + n_tasks + j] = column
    return np.clip(out, -CLIP, CLIP, out=out)


def advice_logits(view: View, assessment: Assessment, temperature_share: float) -> Array:
    """(..., C) float32: (score - best legal score) / temperature, from MIN_LOGIT to 0."""
    best = np.where(view.legal, assessment.score_usd, -np.inf).max(axis=-1, keepdims=True)
    temperature_usd = np.maximum(temperature_share * assessment.value_usd, 1e-9)
    logits = (assessment.score_usd - best) / temperature_usd
    return np.clip(logits, MIN_LOGIT, 0.0).astype(np.float32)


def observe(view: View, assessment: Assessment, spec: FeatureSpec) -> Array:
    """The flat observation (..., D) float32: candidates | context | advice logits | legal mask; not normalised."""
    candidate = candidate_features(view, assessment)
    lead = view.legal.shape[:-1]
    return np.concatenate(
        [
            candidate.reshape(*lead, -1),
            context_features(view, assessment),
            advice_logits(view, assessment, spec.temperature_share),
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
