"""What every policy can do, and the learned one: a network that corrects a margin rule, run by NumPy.

The network scores each candidate with shared weights, so one set serves fleets of any size:

    x_c = clip((f_c - mean) / std)                       normalised candidate features, (C, F)
    y   = clip((g - mean) / std)                         normalised context, (G,)
    h_c = relu(x_c W1 + y Wg + b1)
    logit_c = kappa * advice_c + relu(h_c W2 + b2) . head

The head starts at zero in training, so that the untrained policy is the advice itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from marginroute import features
from marginroute.decision import Decision, best_legal, explain
from marginroute.features import CLIP, FeatureSpec
from marginroute.heuristics import Assessment, MarginRule
from marginroute.view import Array, Layout, View


@runtime_checkable
class Policy(Protocol):
    """A decider: a heuristic, or an exported network with its heuristic."""

    @property
    def name(self) -> str:
        """The name used by every flag and table."""

    def decide(self, view: View) -> Decision:
        """Decides one request and says why."""

    def decide_batch(self, view: View) -> Array:
        """Decides for N worlds; returns candidate indices, (N,) int64 (or a scalar array for one decision)."""

    def in_flight_caps(self, layout: Layout, slots: Array) -> Array | None:
        """In-flight cap per pool, (P,) float64, for replicas with `slots` (P,) sequences; None leaves them."""


WEIGHT_NAMES = ("candidate", "context", "bias_1", "hidden", "bias_2", "head", "kappa")


@dataclass(frozen=True, eq=False)
class Network:
    """Weights of the candidate scorer, float32.

    Attributes:
        candidate: (F, H); context: (G, H); bias_1: (H,); hidden: (H, H); bias_2: (H,); head: (H,); kappa: (1,).
    """

    candidate: Array
    context: Array
    bias_1: Array
    hidden: Array
    bias_2: Array
    head: Array
    kappa: Array

    def arrays(self) -> dict[str, Array]:
        """The weights by name."""
        return {name: getattr(self, name) for name in WEIGHT_NAMES}

    def logits(self, candidate: Array, context: Array, advice: Array, spec: FeatureSpec) -> Array:
        """Logits (..., C) from raw features (..., C, F) and (..., G) and advice logits (..., C)."""
        x = ((candidate - spec.candidate_mean) / spec.candidate_std).astype(np.float32)
        y = ((context - spec.context_mean) / spec.context_std).astype(np.float32)
        np.clip(x, -CLIP, CLIP, out=x)
        np.clip(y, -CLIP, CLIP, out=y)
        h = x @ self.candidate + (y @ self.context + self.bias_1)[..., None, :]
        np.maximum(h, 0.0, out=h)
        h = h @ self.hidden + self.bias_2
        np.maximum(h, 0.0, out=h)
        return advice * self.kappa + h @ self.head


@dataclass(frozen=True, eq=False)
class ResidualPolicy:
    """A margin rule corrected by a trained network.

    Attributes:
        name: the policy's name.
        advice: the margin rule whose scores are the starting point.
        spec: feature columns and normaliser.
        network: the weights.
    """

    name: str
    advice: MarginRule
    spec: FeatureSpec
    network: Network

    def logits(self, view: View) -> tuple[Array, Assessment]:
        """Logits (..., C) and the advice's assessment that they start from."""
        assessment = self.advice.assess(view)
        logits = self.network.logits(
            features.candidate_features(view, assessment),
            features.context_features(view, assessment),
            features.advice_logits(view, assessment, self.spec.temperature_share),
            self.spec,
        )
        return logits, assessment

    def decide_batch(self, view: View) -> Array:
        """The most probable legal candidate of each view."""
        return best_legal(self.logits(view)[0], view.legal)

    def decide(self, view: View) -> Decision:
        """The most probable legal candidate, with the advice's parts and the network's correction in USD."""
        logits, assessment = self.logits(view)
        scale_usd = self.spec.temperature_share * float(assessment.value_usd[0])
        parts = assessment.parts()
        best = np.where(view.legal, assessment.score_usd, -np.inf).max()
        parts["learned"] = logits * scale_usd - (assessment.score_usd - best)
        return explain(self.name, view, logits, parts, scale_usd)

    def in_flight_caps(self, layout: Layout, slots: Array) -> Array | None:
        """The advice's tuned caps."""
        return self.advice.in_flight_caps(layout, slots)
