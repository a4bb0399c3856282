"""Heuristic controllers: what operators run, each by its published formula, and their best combination.

A rule has three parts, each with few parameters, all of which `agents.control_tuning` tunes.

*Replicas* (`scaling`); U requests are in flight or waiting at a pool, s its slots, c its requests per second:

    static      n
    hpa         ceil(current * utilisation / target), utilisation = U / (ready s); within 10 % of the target nothing
                changes; what is not ready yet counts with 0 if the pool grows; the largest recommendation of the last
                `hold_down_s` counts (Kubernetes, HorizontalPodAutoscaler, "Algorithm details")
    keda        ceil(queue / target), queue = U and what is held: a queue's AverageValue (KEDA 2, queue scalers)
    predictive  ceil(demand / (c target) - slack): demand is the largest forecast (season times level plus trend)
                between now and when a replica ordered now is ready, and a share of the release rate that is required

*Release of held work* (`release`):

    at-once     everything
    off-peak    everything while usual traffic is below `fill` times its mean, else what is required
    edf         what is required, and what fills ready replicas up to `fill`: fill * ready c - forecast

What is required is EDF's demand bound, max over t of (held work due within t) / t, times `urgency` (Liu and Layland,
J. ACM 20(1), 1973; Baruah, Rosier and Howell 1990). What is due leaves in any case.

*Spill* (`spill_from`): the share of each class that is above `spill_from` times the throughput of what is ready, as far
as the budget goes: a provider's allowance is spent evenly over `pace_s`, beside what it is refilled with.

Parameters may hold one value per world, (N,): tuning plays many sets at once.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np

from marginroute.control import (
    IN_FLIGHT,
    READY,
    STARTING,
    WAITING,
    Array,
    ControlLayout,
    ControlView,
    Levers,
    decode,
    encode,
)
from marginroute.errors import InputError

SCALINGS = ("static", "hpa", "keda", "predictive")
RELEASES = ("at-once", "off-peak", "edf")
TOLERANCE = 0.1  # kube-controller-manager's --horizontal-pod-autoscaler-tolerance
_ROUNDS_UP = 0.5 - 1e-6  # levers are rounded; with the part of a replica, a correction shifts when it comes or goes
_STEPS = 4  # instants at which the forecast is looked at until new replicas are ready


@runtime_checkable
class Controller(Protocol):
    """Decides the levers of N worlds at a tick."""

    @property
    def name(self) -> str:
        """The name used by every flag and table."""

    @property
    def layout(self) -> ControlLayout:
        """What it controls."""

    def act(self, view: ControlView) -> Array:
        """Actions (N, A) in [-1, 1]; worlds that are `fresh` begin anew."""

    def decide(self, view: ControlView) -> Levers:
        """The same in physical units: what a gateway carries out."""

    def anew(self) -> Controller:
        """The same without memory of earlier ticks."""


@dataclass(frozen=True)
class ControlParameters:
    """Parameters of a rule; each may also be (N,), one per world.

    Attributes:
        replicas: static: of every pool, as a share of its largest number.
        target: hpa: utilisation of the slots; keda: requests per replica, as a share of its slots; predictive: load.
        hold_down_s: for so long the largest recommendation counts.
        trend: weight of the fast level over the slow one in forecasts.
        slack: predictive: replicas that demand may exceed before another one is ordered.
        held_share: predictive: share of the required release rate that replicas are ordered for.
        fill: edf: load up to which released work fills replicas; off-peak: traffic relative to its mean.
        urgency: multiplies the release rate that deadlines require.
        cap_share: in-flight cap as a multiple of the slots.
        spill_from: load of what is ready above which requests go to providers.
        pace_s: time over which a provider's allowance is spent evenly.
    """

    replicas: float | Array = 0.5
    target: float | Array = 0.7
    hold_down_s: float | Array = 300.0
    trend: float | Array = 0.5
    slack: float | Array = 0.0
    held_share: float | Array = 1.0
    fill: float | Array = 0.8
    urgency: float | Array = 1.2
    cap_share: float | Array = 1.0
    spill_from: float | Array = 1.5
    pace_s: float | Array = 3600.0


def required_per_s(held: Array, deadline_s: Array) -> Array:
    """Smallest release rate (N,) at which held work (N, K, G) leaves before it is due.

    Work of a class whose part g of the deadline has passed is due after (1 - (g + 1) / G) of it at the earliest, at
    least a quarter of a part; for every due time all work due by then has to leave until then.
    """
    k, parts = held.shape[-2:]
    holds = np.isfinite(deadline_s)
    left = np.maximum(1.0 - (np.arange(parts) + 1.0) / parts, 0.25 / parts)
    due_s = (np.where(holds, deadline_s, 0.0)[:, None] * left).reshape(-1)
    order = np.argsort(due_s, kind="stable")
    work = np.cumsum(held.reshape(*held.shape[:-2], k * parts)[..., order], axis=-1)
    due_s = due_s[order]
    rate = np.where(due_s > 0.0, work / np.maximum(due_s, 1e-9), 0.0)
    return rate.max(axis=-1) if holds.any() else np.zeros(held.shape[:-2])


def hpa_replicas(ready: Array, current: Array, usage: Array, target: Array) -> Array:
    """Kubernetes' recommendation.

    Args:
        ready: replicas whose utilisation is measured.
        current: those and the ones on their way, which count with no utilisation where the pool grows.
        usage: sum of the utilisations of all replicas.
        target: utilisation wanted.

    Returns:
        Replicas, unchanged (`current`) within `TOLERANCE` of the target, or where the ones on their way turn growth
        into its opposite.
    """
    ratio = usage / np.maximum(ready, 1.0) / target
    grown = usage / np.maximum(current, 1.0) / target
    growing = ratio > 1.0
    ratio, count = np.where(growing, grown, ratio), np.where(growing, current, ready)
    wanted = np.ceil(ratio * count - 1e-9)
    still = (np.abs(ratio - 1.0) <= TOLERANCE) | (growing & (grown < 1.0))
    return np.where(still, current, wanted)


def keda_replicas(queue: Array, per_replica: Array) -> Array:
    """Kubernetes' recommendation for an AverageValue: ceil(queue / target per replica)."""
    return np.ceil(queue / per_replica - 1e-9)


def paced_per_s(allowance: Array, refill_per_s: Array, pace_s: float | Array) -> Array:
    """Calls per second (N, V) that spend an allowance evenly over `pace_s`, beside what is refilled meanwhile."""
    return refill_per_s + allowance / np.asarray(pace_s)[..., None]


@dataclass(frozen=True, eq=False)
class RuleController:
    """A heuristic controller.

    Attributes:
        name: its name.
        layout: what it controls.
        scaling, release: which rules, of `SCALINGS` and `RELEASES`.
        parameters: of the rules.
    """

    name: str
    layout: ControlLayout
    scaling: str
    release: str
    parameters: ControlParameters = field(default_factory=ControlParameters)
    _recent: dict[str, Array] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        for what, legal in ((self.scaling, SCALINGS), (self.release, RELEASES)):
            if what not in legal:
                raise InputError(f"controller {self.name!r} has rule {what!r}; legal is {', '.join(legal)}")

    def act(self, view: ControlView) -> Array:
        """Actions (N, A)."""
        n, layout = len(view.time_s), self.layout
        p = ControlParameters(**{key: np.asarray(x, dtype=np.float64) for key, x in vars(self.parameters).items()})
        required = np.asarray(p.urgency) * required_per_s(view.held, layout.deadline_s)
        replicas = self._stable(view, np.clip(self._replicas(view, p, required), layout.min_replicas, None))
        ones = np.ones((n, len(layout.pool_names)))
        return encode(
            layout,
            Levers(
                caps=ones * layout.slots * np.asarray(p.cap_share)[..., None],
                replicas=np.clip(replicas, layout.min_replicas, layout.max_replicas),
                release_per_s=self._release(view, p, required),
                spill_share=self._spill(view, p),
                shed_share=np.zeros((n, len(layout.class_names))),
            ),
        )

    def decide(self, view: ControlView) -> Levers:
        """The levers of this tick in physical units."""
        return decode(self.layout, self.act(view))

    def anew(self) -> RuleController:
        """The same rule without memory of earlier ticks."""
        return replace(self, _recent={})

    def of_worlds(self, worlds: Array) -> RuleController:
        """The same rule with the memory of these worlds (n,), each as often as it is named."""
        values = {key: x[worlds] if np.ndim(x) else x for key, x in vars(self.parameters).items()}
        recent = {key: past[:, worlds] for key, past in self._recent.items()}
        return replace(self, parameters=ControlParameters(**values), _recent=recent)

    def _demand(self, view: ControlView, p: ControlParameters, ahead_s: float) -> Array:
        """(N,) forecast of the work that nobody can hold back, requests per second."""
        usual = view.forecast_per_s(ahead_s, np.asarray(p.trend)[..., None])
        at_once = np.ones(usual.shape[-1]) if self.release == "at-once" else ~self.layout.holds
        return (usual * at_once).sum(axis=-1)

    def _replicas(self, view: ControlView, p: ControlParameters, required: Array) -> Array:
        """(N, P) replicas by the scaling rule, to be rounded, before the window and the limits."""
        layout, pools = self.layout, view.pools
        target = np.asarray(p.target)[..., None]
        if self.scaling == "static":
            return np.rint(np.asarray(p.replicas)[..., None] * layout.max_replicas * np.ones_like(pools[..., 0]))
        usage = (pools[..., IN_FLIGHT] + pools[..., WAITING]) / layout.slots
        if self.scaling == "hpa":
            current = pools[..., READY] + pools[..., STARTING]
            return hpa_replicas(pools[..., READY], current, usage, target)
        if self.scaling == "keda":
            power = layout.slots * layout.max_replicas
            held = view.held.sum(axis=(-1, -2))[..., None] * power / power.sum() / layout.slots
            return keda_replicas(usage + held, target)
        lag_s = float(layout.lag_s.max()) + layout.tick_s
        demand = np.max([self._demand(view, p, share * lag_s) for share in np.linspace(0.0, 1.0, _STEPS)], axis=0)
        power = layout.max_replicas * layout.requests_per_s
        per_s = (demand + np.asarray(p.held_share) * required)[..., None] * power / power.sum()
        return per_s / (layout.requests_per_s * target) - np.asarray(p.slack)[..., None] + _ROUNDS_UP

    def _stable(self, view: ControlView, wanted: Array) -> Array:
        """(N, P) the largest of what was wanted within `hold_down_s`."""
        ticks = np.floor(np.asarray(self.parameters.hold_down_s) / self.layout.tick_s)
        longest = int(np.max(ticks)) + 1
        past = self._recent.get("wanted")
        if past is None or past.shape != (longest, *wanted.shape):
            past = np.zeros((longest, *wanted.shape))
        past = np.concatenate([wanted[None], np.where(view.fresh[:, None], 0.0, past[:-1])])
        self._recent["wanted"] = past
        counts = np.arange(longest)[:, None] <= np.broadcast_to(ticks, wanted.shape[:1])
        return np.where(counts[..., None], past, 0.0).max(axis=0)

    def _release(self, view: ControlView, p: ControlParameters, required: Array) -> Array:
        """(N,) held requests released per second."""
        layout = self.layout
        if self.release == "at-once":
            return np.full(len(view.time_s), layout.top_per_s)
        if self.release == "off-peak":
            usual = layout.season(view.time_s).sum(axis=-1) / layout.season_per_s.sum(axis=-1).mean()
            return np.where(usual < np.asarray(p.fill), layout.top_per_s, required)
        ready_per_s = (view.pools[..., READY] * layout.requests_per_s).sum(axis=-1)
        spare = np.asarray(p.fill) * ready_per_s - self._demand(view, p, 0.5 * layout.tick_s)
        return np.maximum(required, spare)

    def _spill(self, view: ControlView, p: ControlParameters) -> Array:
        """(N, K) share of every class that the providers get."""
        layout = self.layout
        if not layout.provider_names:
            return np.zeros(view.fast.shape)
        ready_per_s = (view.pools[..., READY] * layout.requests_per_s).sum(axis=-1)
        demand = np.maximum(self._demand(view, p, 0.5 * layout.tick_s), 1e-9)
        above = np.clip(1.0 - np.asarray(p.spill_from) * ready_per_s / demand, 0.0, 1.0)
        budget = paced_per_s(view.allowance, layout.refill_per_s, p.pace_s).sum(axis=-1) / demand
        spilled = ~layout.holds if self.release != "at-once" else np.ones(len(layout.class_names), dtype=np.bool_)
        return np.minimum(above, budget)[..., None] * spilled

    def to_dict(self) -> dict[str, Any]:
        """Plain data without the layout."""
        values = {key: float(np.asarray(x)) for key, x in asdict(self.parameters).items()}
        return {"name": self.name, "scaling": self.scaling, "release": self.release, **values}

    @classmethod
    def from_dict(cls, data: dict[str, Any], layout: ControlLayout) -> RuleController:
        """The controller that `to_dict` wrote."""
        values = {key: float(data[key]) for key in ControlParameters.__dataclass_fields__}
        return cls(data["name"], layout, data["scaling"], data["release"], ControlParameters(**values))

    def with_parameters(self, **values: float | Array) -> RuleController:
        """The same rule with other parameters and no memory."""
        return replace(self, parameters=replace(self.parameters, **values), _recent={})


def standard_rules(layout: ControlLayout) -> dict[str, RuleController]:
    """The untuned baselines by name; those that release by deadline only where something can be held."""
    rows = [("static", "static", "at-once"), ("hpa", "hpa", "at-once"), ("keda", "keda", "at-once")]
    rows.append(("predictive", "predictive", "at-once"))
    if layout.holds.any():
        rows += [("static-edf", "static", "edf"), ("hpa-edf", "hpa", "edf")]
        rows += [("predictive-off-peak", "predictive", "off-peak"), ("predictive-edf", "predictive", "edf")]
    return {name: RuleController(name, layout, scaling, release) for name, scaling, release in rows}
