"""What every policy can do, and the learned one: a network that corrects a margin rule, run by NumPy.

The network scores each candidate with shared weights, so one set serves fleets of any size:

    x_c = (f_c - mean) / std                             normalised candidate features, (C, F)
    y   = (g - mean) / std                               normalised context, (G,)
    h_c = relu(x_c W1 + y Wg + b1)
    logit_c = kappa * advice_c + (trust_0 + trust_1 * tier_confidence_c) * relu(h_c W2 + b2) . head

The normaliser is folded into W1, Wg and b1 before it runs. The head starts at zero in training, so that the untrained
policy is the advice itself. With trust (0, t) it stays the advice where nobody has judged an answer yet.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol, runtime_checkable

import numpy as np

from marginroute import features
from marginroute.assessment import Assessment
from marginroute.decision import Decision, best_legal, explain
from marginroute.features import TIER_CONFIDENCE, FeatureSpec
from marginroute.margin_rule import MarginRule
from marginroute.quality import FittedQuality
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

    @property
    def quality(self) -> FittedQuality | None:
        """How it fits P(good); None: it takes the prior. Judged answers surprise it by as much as they differ."""


_ZERO = np.zeros((), dtype=np.float32)  # see `View.asked`
WEIGHT_NAMES = ("candidate", "context", "bias_1", "hidden", "bias_2", "head", "kappa", "trust")


@dataclass(frozen=True, eq=False)
class Network:
    """Weights of the candidate scorer, float32.

    Attributes:
        candidate: (F, H); context: (G, H); bias_1: (H,); hidden: (H, H); bias_2: (H,); head: (H,); kappa: (1,).
        trust: (2,) in the correction, always and per `tier_confidence`.
    """

    candidate: Array
    context: Array
    bias_1: Array
    hidden: Array
    bias_2: Array
    head: Array
    kappa: Array
    trust: Array

    def arrays(self) -> dict[str, Array]:
        """The weights by name."""
        return {name: getattr(self, name) for name in WEIGHT_NAMES}

    def folded(self, spec: FeatureSpec) -> Network:
        """The same function of raw features: normaliser folded into the first layer."""
        candidate = self.candidate / spec.candidate_std[:, None].astype(np.float32)
        context = self.context / spec.context_std[:, None].astype(np.float32)
        shift = spec.candidate_mean.astype(np.float32) @ candidate + spec.context_mean.astype(np.float32) @ context
        return replace(self, candidate=candidate, context=context, bias_1=self.bias_1 - shift)

    def logits(self, candidate: Array, context: Array, advice: Array) -> Array:
        """Logits (..., C) of a folded network from (..., C, F) and (..., G) features and advice logits (..., C)."""
        h = candidate @ self.candidate
        h += (context @ self.context + self.bias_1)[..., None, :]
        np.maximum(h, _ZERO, out=h)
        h = h @ self.hidden
        h += self.bias_2
        np.maximum(h, _ZERO, out=h)
        correction = h @ self.head
        correction *= self.trust[0] + self.trust[1] * candidate[..., TIER_CONFIDENCE]
        return advice * self.kappa + correction


@dataclass(slots=True, eq=False)
class Inputs:
    """What the network of a residual policy looks at.

    Attributes:
        assessment: the advice's view of every candidate.
        candidate: (..., C, F) features; context: (..., G) features; advice: (..., C) logits.
    """

    assessment: Assessment
    candidate: Array
    context: Array
    advice: Array


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

    @property
    def quality(self) -> FittedQuality | None:
        """Its advice's."""
        return self.advice.quality

    @cached_property
    def folded(self) -> Network:
        """The network on raw features."""
        return self.network.folded(self.spec)

    def inputs(self, view: View) -> Inputs:
        """Everything the network looks at."""
        assessment = self.advice.assess(view)
        return Inputs(
            assessment,
            features.candidate_features(view, assessment),
            features.context_features(view, assessment),
            features.advice_logits(assessment, self.spec.temperature_share),
        )

    def logits(self, inputs: Inputs) -> Array:
        """Logits (..., C), legal or not."""
        return self.folded.logits(inputs.candidate, inputs.context, inputs.advice)

    def decide_batch(self, view: View) -> Array:
        """The most probable legal candidate of each view."""
        return best_legal(self.logits(self.inputs(view)), view.legal)

    def decide(self, view: View) -> Decision:
        """The most probable legal candidate, with the advice's parts and the network's correction in USD."""
        return self.decide_on(view, self.inputs(view))

    def decide_on(self, view: View, inputs: Inputs) -> Decision:
        """As `decide`, on inputs that have been computed already."""
        logits, assessment = self.logits(inputs), inputs.assessment
        scale_usd = self.spec.temperature_share * float(assessment.value_usd)

        def reason(c: int) -> dict[str, float]:
            learned_usd = logits[c] * scale_usd - (assessment.score_usd[c] - assessment.best_usd)
            parts = assessment.parts(c)
            parts["learned"] = float(learned_usd)
            return parts

        return explain(self.name, view, logits, reason, scale_usd)

    def in_flight_caps(self, layout: Layout, slots: Array) -> Array | None:
        """The advice's tuned caps."""
        return self.advice.in_flight_caps(layout, slots)
