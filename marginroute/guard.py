"""The guard: when a learned decision must not be trusted, the fallback heuristic decides, and the decision says so."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from marginroute import features
from marginroute import view as v
from marginroute.decision import Decision
from marginroute.features import CLIP
from marginroute.heuristics import MarginRule, RuleOfThumb
from marginroute.policy import Policy, ResidualPolicy
from marginroute.view import Array, Layout, View


@dataclass(frozen=True)
class GuardLimits:
    """Limits beyond which the fallback decides.

    Attributes:
        telemetry_age_s: oldest scrape of any replica that is still trusted.
        drift_features: number of context features that may sit at the clip (more than CLIP standard deviations away
            from training) at once.
    """

    telemetry_age_s: float = 60.0
    drift_features: int = 1

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for a bundle's manifest."""
        return asdict(self)


@dataclass(frozen=True, eq=False)
class GuardedPolicy:
    """A policy with its guard and fallback; what a bundle loads as.

    Attributes:
        policy: the policy that decides as long as the guard agrees.
        fallback: the heuristic that takes over.
        limits: the guard's limits.
    """

    policy: Policy
    fallback: MarginRule | RuleOfThumb
    limits: GuardLimits

    @property
    def name(self) -> str:
        """Name of the guarded policy."""
        return self.policy.name

    def objection(self, view: View) -> str:
        """Why the policy must not decide this view: `stale`, `not-finite`, `drift`; empty if it may."""
        ages = view.signals[v.TELEMETRY_AGE_S]
        if not ages.max() <= self.limits.telemetry_age_s:
            return "stale"
        if not (np.isfinite(view.signals).all() and not np.isnan(view.request).any()):
            return "not-finite"
        if isinstance(self.policy, ResidualPolicy):
            spec = self.policy.spec
            context = features.context_features(view, self.policy.advice.assess(view))
            z = np.abs((context - spec.context_mean) / spec.context_std)
            if (z >= CLIP).sum() > self.limits.drift_features:
                return "drift"
        return ""

    def decide(self, view: View) -> Decision:
        """The policy's decision, or the fallback's with the guard's reason."""
        objection = self.objection(view)
        if objection:
            return replace(self.fallback.decide(view), guard=objection)
        return self.policy.decide(view)

    def decide_batch(self, view: View) -> Array:
        """As `decide`, world by world only where the guard objects."""
        if view.legal.ndim == 1:
            return np.asarray(self.decide(view).candidate)
        choice = self.policy.decide_batch(view)
        objected = np.array([bool(self.objection(view[w])) for w in range(len(choice))])
        if objected.any():
            choice = np.where(objected, self.fallback.decide_batch(view), choice)
        return choice

    def in_flight_caps(self, layout: Layout, slots: Array) -> Array | None:
        """The policy's caps."""
        return self.policy.in_flight_caps(layout, slots)
