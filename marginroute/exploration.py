"""Guarded exploration: now and then another candidate, so that a log can tell what other policies would have earned.

An argmax policy logs probabilities of 0 and 1, with which nothing else can be evaluated. Here a share of the decisions
is drawn evenly from the candidates whose expected USD is close enough to the best, and every decision carries the
probability with which it was made:

    P(c) = (1 - share) [c is the policy's choice] + share / |S| [c in S],   S = {c legal: score_c >= score_best - limit}
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field, replace

import numpy as np

from marginroute import view as v
from marginroute.decision import Decision
from marginroute.errors import InputError
from marginroute.margin_rule import MarginRule
from marginroute.policy import Policy
from marginroute.quality import FittedQuality
from marginroute.view import KINDS, Array, Layout, View


@dataclass(frozen=True, eq=False)
class ExploringPolicy:
    """A policy that explores within limits.

    Attributes:
        policy: who decides otherwise.
        estimate: margin rule that says what a candidate is expected to earn.
        share: of the decisions that are drawn.
        limit_usd: how much less than the best a drawn candidate may be expected to earn.
        seed: of the draws.
    """

    policy: Policy
    estimate: MarginRule
    share: float
    limit_usd: float
    seed: int = 0
    _rng: np.random.Generator = field(init=False, repr=False)
    _lock: threading.Lock = field(init=False, repr=False, default_factory=threading.Lock)

    def __post_init__(self) -> None:
        if not 0.0 < self.share < 1.0:
            raise InputError(f"exploration share {self.share} is not legal; legal is above 0 and below 1")
        if not self.limit_usd >= 0.0:
            raise InputError(f"exploration limit {self.limit_usd} USD is not legal; legal is 0 or more")
        object.__setattr__(self, "_rng", np.random.default_rng(self.seed))

    @property
    def name(self) -> str:
        """Name of the policy that explores."""
        return self.policy.name

    def probabilities(self, view: View, choice: Array) -> Array:
        """(..., C) probability of every candidate, given the policy's own choice (...,)."""
        return mixed(self.safe(view), choice, self.share)

    def safe(self, view: View) -> Array:
        """(..., C) replicas and providers that may be tried."""
        score_usd = self.estimate.assess(view).score_usd
        able = view.legal & (view.layout.kind <= v.PROVIDER)
        best_usd = np.where(able, score_usd, -np.inf).max(axis=-1, keepdims=True)
        return able & (score_usd >= best_usd - self.limit_usd)

    def _draw(self, probability: Array) -> Array:
        with self._lock:
            uniform = self._rng.random(probability.shape[:-1])
        edges = probability.cumsum(axis=-1)
        return (edges <= uniform[..., None] * edges[..., -1:]).sum(axis=-1)

    def decide(self, view: View) -> Decision:
        """The policy's decision or a drawn one, with its probability."""
        return self.explore(view, self.policy.decide(view))

    def explore(self, view: View, decision: Decision) -> Decision:
        """The policy's given decision or a drawn one, with its probability."""
        probability = self.probabilities(view, np.array(decision.candidate))
        c, names = int(self._draw(probability)), view.layout.names
        support = tuple(name for name, p in zip(names, probability, strict=True) if p > 0.0)
        decision = replace(decision, support=support, probability=float(probability[c]))
        if c == decision.candidate:
            return decision
        parts = self.estimate.assess(view).parts(c)
        kind = KINDS[int(view.layout.kind[c])]
        return replace(
            decision,
            candidate=c,
            name=names[c],
            kind=kind,
            reason_usd=parts,
            runner_up=decision.name,
            runner_up_usd=0.0,
            estimate_s=None,
        )

    def decide_batch(self, view: View) -> Array:
        """As `decide`, for N worlds."""
        return self._draw(self.probabilities(view, self.policy.decide_batch(view)))

    def in_flight_caps(self, layout: Layout, slots: Array) -> Array | None:
        """The policy's caps."""
        return self.policy.in_flight_caps(layout, slots)

    @property
    def quality(self) -> FittedQuality | None:
        """The policy's."""
        return self.policy.quality


def mixed(safe: Array, choice: Array, share: float) -> Array:
    """(..., C) probabilities of a choice (...,) that is replaced by an even draw from `safe` (..., C) with `share`.

    Where nothing is safe the choice stays.
    """
    chosen = np.arange(safe.shape[-1]) == choice[..., None]
    count = safe.sum(axis=-1, keepdims=True)
    drawn = np.where(count > 0, share, 0.0)
    return (1.0 - drawn) * chosen + drawn * safe / np.maximum(count, 1)
