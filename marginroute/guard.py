"""The guard: when a learned decision must not be trusted, the fallback heuristic decides, and the decision says so.

A replica whose scrape is too old is nobody's choice, the fallback's neither, while there are others: a replica with a
fresh one, or a provider if no second replica is as old. Where all of several replicas are too old, it is telemetry that
has failed and not they: then the fallback decides among all of them. The same where the request of a hedge timer is
under way at such a replica, which may be waited for.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from marginroute import view as v
from marginroute.decision import Decision, best_legal
from marginroute.fast_path import FastPath, prepared
from marginroute.features import FeatureSpec
from marginroute.margin_rule import MarginRule
from marginroute.policy import Policy, ResidualPolicy
from marginroute.quality import FittedQuality
from marginroute.rules import RuleOfThumb
from marginroute.view import Array, Layout, View


@dataclass(frozen=True)
class GuardLimits:
    """Limits beyond which the fallback decides.

    Attributes:
        telemetry_age_s: oldest scrape that is still trusted, of the replicas that may be chosen.
        drift_features: number of context features that may lie more than ten standard deviations away from training.
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
        fast: the policy prepared for one fleet, which decides single views where it can; None: it never does.
    """

    policy: Policy
    fallback: MarginRule | RuleOfThumb
    limits: GuardLimits
    fast: FastPath | None = None

    def prepared(self, layout: Layout, static_signals: Array) -> GuardedPolicy:
        """The same, quicker where candidates and their constants (S_static, C) are these."""
        limits = self.limits.telemetry_age_s, self.limits.drift_features
        return replace(self, fast=prepared(self.policy, layout, static_signals, *limits))

    @property
    def name(self) -> str:
        """Name of the guarded policy."""
        return self.policy.name

    def trusted(self, view: View) -> View:
        """The same without replicas whose scrape is too old, where others can answer; itself if there are none."""
        stale = view.legal & (view.signals[v.TELEMETRY_AGE_S] > self.limits.telemetry_age_s)
        if not stale.any():
            return view
        stale &= view.signals[v.UNDER_WAY_S] == 0.0
        able = view.legal & ~stale & (view.layout.kind <= v.PROVIDER)
        alone = stale.sum(axis=-1) == 1
        others = able[..., : view.layout.n_replicas].any(axis=-1) | (alone & able.any(axis=-1))
        return View(view.layout, view.signals, view.request, view.legal & ~(stale & others[..., None]))

    def _stale(self, view: View) -> Array:
        """(...,) whether a scrape of a candidate that may be chosen is older than the limit, or of unknown age."""
        age_s = np.maximum.reduce(np.where(view.legal, view.signals[v.TELEMETRY_AGE_S], 0.0), axis=-1)
        return np.logical_not(age_s <= self.limits.telemetry_age_s)

    def drift(self, context: Array, spec: FeatureSpec) -> Array:
        """(...,) whether too many context features (..., G) lie far outside what was trained on."""
        far = np.abs(context - spec.context_mean) >= spec.drift_limit
        return np.add.reduce(far, axis=-1, dtype=np.int64) > self.limits.drift_features

    def decide(self, view: View) -> Decision:
        """The policy's decision, or the fallback's with the guard's reason."""
        if self.fast is not None and (decision := self.fast.decide(view)) is not None:
            return decision
        trusted = self.trusted(view)
        if trusted is view:
            return self._decide(view)
        decision = None if self.fast is None else self.fast.decide(trusted)
        return replace(decision or self._decide(trusted), left_out=_left_out(view, trusted))

    def _decide(self, view: View) -> Decision:
        if self._stale(view):
            return self.hand_over(view, "stale")
        if isinstance(self.policy, ResidualPolicy):
            inputs = self.policy.inputs(view)
            if self.drift(inputs.context, self.policy.spec):
                return self.hand_over(view, "drift")
            decision = self.policy.decide_on(view, inputs)
        else:
            decision = self.policy.decide(view)
        if not math.isfinite(sum(decision.reason_usd.values())):  # a NaN anywhere wins the argmax and shows here
            return self.hand_over(view, "not-finite")
        return decision

    def hand_over(self, view: View, reason: str) -> Decision:
        """The fallback's decision, on signals without NaN."""
        legal = self.trusted(view).legal
        clean = View(view.layout, np.nan_to_num(view.signals), np.nan_to_num(view.request, posinf=np.inf), legal)
        return replace(self.fallback.decide(clean), guard=reason, left_out=_left_out(view, clean))

    def objects(self, view: View) -> Array:
        """(N,) whether the fallback decides in each of N worlds."""
        view = self.trusted(view)
        objected: Array = self._broken(view)
        if isinstance(self.policy, ResidualPolicy):
            objected = objected | self.drift(self.policy.inputs(view).context, self.policy.spec)
        return objected

    def _broken(self, view: View) -> Array:
        return self._stale(view) | np.isnan(view.signals.sum(axis=(0, -1))) | np.isnan(view.request.sum(axis=0))

    def decide_batch(self, view: View) -> Array:
        """As `decide` for N worlds at once."""
        view = self.trusted(view)
        objected = self._broken(view)
        if isinstance(self.policy, ResidualPolicy):
            inputs = self.policy.inputs(view)
            objected = objected | self.drift(inputs.context, self.policy.spec)
            choice = best_legal(self.policy.logits(inputs), view.legal)
        else:
            choice = self.policy.decide_batch(view)
        return np.where(objected, self.fallback.decide_batch(view), choice) if objected.any() else choice

    def in_flight_caps(self, layout: Layout, slots: Array) -> Array | None:
        """The policy's caps."""
        return self.policy.in_flight_caps(layout, slots)

    @property
    def quality(self) -> FittedQuality | None:
        """The policy's."""
        return self.policy.quality


def _left_out(view: View, trusted: View) -> tuple[str, ...]:
    """Names of the candidates of one decision that are legal in the first alone."""
    return tuple(view.layout.names[c] for c in np.flatnonzero(view.legal & ~trusted.legal))
