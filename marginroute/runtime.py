"""A bundle at work in a gateway: the View of one request, the decision on it, and what it is held against."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace

import numpy as np

from marginroute import features, latency
from marginroute import view as v
from marginroute.bundle import Bundle
from marginroute.decision import Decision
from marginroute.drift import DriftMonitor
from marginroute.exploration import ExploringPolicy
from marginroute.facts import Facts
from marginroute.feedback import QualityPosterior
from marginroute.guard import GuardedPolicy
from marginroute.limits import Breach
from marginroute.margin_rule import MarginRule
from marginroute.rate_limits import RateLimit
from marginroute.response_cache import Hit
from marginroute.telemetry import GatewayState
from marginroute.view import View

CALLS = v.KINDS[v.REPLICA], v.KINDS[v.PROVIDER]
RETRY_AFTER_S = 1.0, 60.0  # bounds of what a shed request is told


@dataclass(frozen=True, eq=False)
class Runtime:
    """A bundle at work; replaced as a whole.

    Attributes:
        bundle: the bundle.
        state: what the gateway knows, in the order of its candidates.
        policy: under its guard.
        explorer: the same with exploration, or None.
        estimate: puts USD on candidates, or None if the bundle cannot.
        index: candidate by name.
        drift: judges the distribution of requests; None: the bundle does not say what training has seen.
    """

    bundle: Bundle
    state: GatewayState
    policy: GuardedPolicy
    explorer: ExploringPolicy | None
    estimate: MarginRule | None
    index: dict[str, int]
    drift: DriftMonitor | None = None

    def saw(self, view: View) -> None:
        """Shows the drift monitor a request."""
        if self.drift is not None and self.estimate is not None:
            self.drift.saw(features.context_features(view, self.estimate.assess(view)))

    def begin(
        self,
        id: str,
        candidate: int,
        facts: Facts,
        estimate_s: tuple[float, float] | None = None,
        session: str = "",
    ) -> None:
        """A call leaves for a candidate (see `GatewayState.begin`); a class or task that is unknown is the first."""
        layout = self.bundle.layout
        self.state.begin(
            id,
            candidate,
            facts.prompt_tokens,
            facts.class_name if facts.class_name in layout.class_names else None,
            facts.task_name if facts.task_name in layout.task_names else None,
            estimate_s,
            facts.hashes,
            facts.block_tokens,
            session,
        )


@dataclass(frozen=True)
class Setup:
    """What a gateway was set up for, whichever bundle is at work.

    Attributes:
        clock: seconds that never jump.
        can: what it could carry out beside sending a request on (see `telemetry.GatewayState`).
        hold_s: seconds after which a deferred request is decided again.
        stale_after_s: silence after which a request is written off.
        prefix_block_tokens: tokens per block hash of a prompt (see `telemetry.GatewayState`).
        rate_limits: by provider, in place of a bundle's.
        explore: share of the decisions acted on that are drawn, and the USD that one may cost at most; None: none is.
    """

    clock: Callable[[], float]
    can: frozenset[str]
    hold_s: float
    stale_after_s: float
    prefix_block_tokens: int
    rate_limits: Mapping[str, RateLimit]
    explore: tuple[float, float] | None

    def runtime(self, bundle: Bundle, posterior: QualityPosterior | None) -> Runtime:
        """A bundle at work in this gateway, with what feedback says of its P(good), if anything.

        Raises:
            InputError: the bundle cannot do what the gateway was set up for, or the posterior is of another one.
        """
        state = GatewayState(
            bundle,
            self.clock,
            can=self.can,
            hold_s=self.hold_s,
            stale_after_s=self.stale_after_s,
            prefix_block_tokens=self.prefix_block_tokens,
            posterior=posterior,
            rate_limits=self.rate_limits,
        )
        guarded, explorer = bundle.guarded(), None
        if self.explore is not None:
            share, limit_usd = self.explore
            seed = int.from_bytes(os.urandom(8), "big")
            explorer = ExploringPolicy(guarded, bundle.required_estimate(), share, limit_usd, seed)
        index = {name: c for c, name in enumerate(bundle.layout.names)}
        blind = () if bundle.predictor is not None else ("difficulty_signal",)
        drift = None if bundle.histograms is None else DriftMonitor(bundle.histograms, blind)
        return Runtime(bundle, state, guarded, explorer, bundle.estimate, index, drift)


def view_of(
    runtime: Runtime,
    facts: Facts,
    attempt: int,
    waited_s: float,
    tried: Collection[str],
    under_way: tuple[int, float] | None = None,
) -> View:
    """What is known for a decision; candidates that have failed this request are left out while there are others.

    `under_way`: at a hedge timer, who has the request and for how many seconds.
    """
    layout, index = runtime.bundle.layout, runtime.index
    able = [name for c, name in enumerate(layout.names) if layout.kind[c] <= v.PROVIDER] if tried else ()
    names: Collection[str] | None = facts.available
    if tried:
        names = [name for name in (able if names is None else names) if name not in tried] or names
    cached = None
    if facts.cached_tier is not None:
        cached = Hit("", facts.similarity, facts.entry_age_s, layout.tier_names.index(facts.cached_tier))
    return runtime.state.view(
        facts.prompt_tokens,
        facts.class_name,
        facts.task_name,
        facts.difficulty_signal,
        waited_s=waited_s if facts.trial is None else waited_s + facts.trial.waited_s,
        deadline_left_s=facts.deadline_left_s,
        attempt=attempt,
        available=None if names is None else [index[name] for name in names if name in index],
        cached=cached,
        hashes=facts.hashes,
        block_tokens=facts.block_tokens,
        standing=facts.standing,
        quota_left=facts.quota_left,
        prompt=facts.prompt,
        session=facts.session,
        trial=facts.trial,
        under_way=under_way,
    )


def decision_of(runtime: Runtime, view: View, acting: bool, breach: Breach | None = None, reason: str = "") -> Decision:
    """The policy's; another call now and then, where it is acted on, makes a call and the guard agrees.

    Args:
        runtime: decides.
        view: what is known; a limit that refuses leaves *shed* alone legal in it, the guard takes out what is too old.
        acting: whether it is carried out.
        breach: a limit that the request is beyond.
        reason: why the fallback decides, if it does for a reason of the gateway's.
    """
    if breach is not None and breach.refuse:
        view.legal[:] = view.layout.kind == v.SHED
        return replace(runtime.policy.decide(view), guard=breach.reason)
    reason = breach.reason if breach is not None else reason
    decision = runtime.policy.hand_over(view, reason) if reason else runtime.policy.decide(view)
    if decision.left_out:
        view.legal[[runtime.index[name] for name in decision.left_out]] = False
    if acting and runtime.explorer is not None and not decision.guard and decision.kind in CALLS:
        return runtime.explorer.explore(view, decision)
    return decision


def retry_after_s(view: View) -> float:
    """Seconds until the shortest queue is worked off, within `RETRY_AFTER_S`."""
    serving = view.layout.kind <= v.PROVIDER
    (ttft_s, _), _ = latency.estimate(view)
    able = ttft_s[serving & view.legal] if (serving & view.legal).any() else ttft_s[serving]
    low, high = RETRY_AFTER_S
    return float(np.clip(np.nan_to_num(able.min(), nan=high), low, high))


def fallback_usd_of(runtime: Runtime, view: View) -> float | None:
    """Margin that is expected of the fallback's choice."""
    if runtime.estimate is None:
        return None
    choice = runtime.policy.fallback.decide(view).candidate
    return float(runtime.estimate.assess(view).margin_usd[choice])
