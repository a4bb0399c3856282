"""Model-predictive control by simulation, the strongest baseline of a controller: it plans, a tuned rule does not.

At a decision (every `every_s`) it begins fluid worlds where the view says that the fleet stands, on futures that are
cut out of training days (`envs.control_lookahead`), and plays a few plans in each, on the same futures:

    levers of a plan = clip(tuned rule's levers + shift, -1, 1) while it lasts, then the tuned rule's until the horizon
    value            = margin up to the horizon + sum over stocks of (what is left * price)      `envs.control_stocks`
    gain, error      = mean and standard error over futures of value - value of the tuned rule

The plan with the highest mean gain is carried out until the next decision, if gain > `sure` * error; otherwise the rule
decides. What is being carried out is one of the plans at the next decision, with what is left of it: with the right
state, the one future that comes, `sure` = 0 and a horizon until the end, no decision can lower the margin (rollout:
Bertsekas, Dynamic Programming and Optimal Control I, section 6.4).

Since it needs the surrogate it is no controller for a gateway: bundles hold rules and networks. Its settings are fixed,
not tuned: one set of them on one day costs half a million ticks of the surrogate, a quarter of a rule's restart.
The horizon is one and a half hours, since plans last 48 minutes at most, a replica of `day_night` needs six minutes to
come, and held work beyond has its price.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from envs.control_lookahead import Futures, Lookahead, view_of
from envs.control_plant import ControlPlant
from envs.control_stocks import StockPrices, measure
from envs.scenario import Scenario
from marginroute.control import Array, ControlLayout, ControlView, Levers, decode
from marginroute.control_rules import RuleController

NAME = "mpc"
RELEASE_STEP, CAP_STEP, SPILL_STEP = 0.25, 0.2, 0.2  # in lever units, whose range is 2


@dataclass(frozen=True)
class MpcSettings:
    """How far, how often and how surely it plans.

    Attributes:
        horizon_s: how far plans are played.
        every_s: between two decisions.
        lasting_s: how long plans last.
        futures: how many are drawn.
        sure: standard errors that a gain must exceed.
        levers: kinds of levers that plans move.
    """

    horizon_s: float = 5400.0
    every_s: float = 720.0
    lasting_s: tuple[float, ...] = (720.0, 2880.0)
    futures: int = 5
    sure: float = 1.0
    levers: tuple[str, ...] = ("cap", "replicas", "release", "spill")


@dataclass(frozen=True, eq=False)
class Plan:
    """What is done beside the rule.

    Attributes:
        name: levers that are moved, and how.
        shift: (A,) in lever units.
        lasting_s: for so long.
    """

    name: str
    shift: Array
    lasting_s: float


def plans(layout: ControlLayout, settings: MpcSettings) -> list[Plan]:
    """Single moves of every kind of lever that a scenario has, and the pairs that make and use room."""
    names = layout.lever_names
    moved = np.array([name.partition(":")[0] in settings.levers for name in names])
    of = {name: np.array([x == name for x in names]) * 1.0 for name in names}
    at_once = [name for name, holds in zip(layout.class_names, layout.holds, strict=True) if not holds]
    spill = np.sum([of[f"spill:{name}"] for name in at_once], axis=0)
    span = np.maximum(layout.max_replicas - layout.min_replicas, 1.0)
    moves: dict[str, Array] = {}
    for p, pool in enumerate(layout.pool_names):
        one = 2.0 / span[p] * of[f"replicas:{pool}"]
        less = RELEASE_STEP * of["release"]
        moves |= {f"replicas:{pool} -1": -one, f"replicas:{pool} +1": one}
        moves |= {f"replicas:{pool} -1, release -": -one - less, f"replicas:{pool} +1, release +": one + less}
        moves |= {f"cap:{pool} -": -CAP_STEP * of[f"cap:{pool}"], f"cap:{pool} +": CAP_STEP * of[f"cap:{pool}"]}
    moves |= {"release none": -2.0 * of["release"], "release -": -RELEASE_STEP * of["release"]}
    moves |= {"release +": RELEASE_STEP * of["release"], "spill +": SPILL_STEP * spill}
    legal = {name: np.where(layout.mask, shift, 0.0) for name, shift in moves.items()}
    legal = {name: shift for name, shift in legal.items() if np.any(shift) and not np.any(shift[~moved])}
    return [Plan(name, shift, s) for name, shift in legal.items() for s in settings.lasting_s]


class Believed:
    """What the plans are tried in: the surrogate, futures, and what stocks are worth.

    Args:
        scenario: what is controlled, or its plant.
        rule: what plans end with.
        settings: how far, and how many futures.
    """

    def __init__(self, scenario: Scenario | ControlPlant, rule: RuleController, settings: MpcSettings) -> None:
        self.plant = scenario if isinstance(scenario, ControlPlant) else ControlPlant(scenario)
        self.futures: Futures = Futures.of(self.plant)
        self.prices: StockPrices = measure(self.plant, rule)
        self._lookaheads: dict[int, Lookahead] = {}
        self._settings = settings

    def arrivals(self, view: ControlView, w: int) -> Array:
        """(F, h, K) futures of world `w`."""
        ticks = max(round(self._settings.horizon_s / view.layout.tick_s), 1)
        return self.futures.draw(view, w, self._settings.futures, ticks)

    def begin(self, view: ControlView, w: int, arrivals: Array) -> Lookahead:
        """Worlds that stand where world `w` of a view does, one for each of the arrivals (R, h, K)."""
        rows = len(arrivals)
        if rows not in self._lookaheads:
            self._lookaheads[rows] = Lookahead(self.plant, rows)
        self._lookaheads[rows].begin(view_of(view, np.full(rows, w)), arrivals)
        return self._lookaheads[rows]

    def value_usd(self, worlds: Lookahead) -> Array:
        """(R,) what was earned, and what is left where the episode goes on."""
        left = np.where(worlds.done, 0.0, self.prices.value_usd(worlds.view()))
        return np.asarray(worlds.ledger_usd.sum(axis=(1, 2)) + left)


@dataclass(eq=False)
class MpcController:
    """Model-predictive control around a tuned rule.

    Attributes:
        scenario: what is controlled.
        rule: the tuned rule.
        settings: how it plans.
        name: its name.
        taken: plans that were begun, by name.
    """

    scenario: Scenario
    rule: RuleController
    settings: MpcSettings = field(default_factory=MpcSettings)
    name: str = NAME
    taken: dict[str, int] = field(default_factory=dict, repr=False)
    _believed: Believed | None = field(default=None, repr=False)
    _memory: dict[str, Array] = field(default_factory=dict, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        """What decides on what it does: all else is made again."""
        return {**vars(self), "rule": self.rule.anew(), "taken": {}, "_believed": None, "_memory": {}}

    @property
    def layout(self) -> ControlLayout:
        """What it controls."""
        return self.rule.layout

    def prepare(self, plant: ControlPlant | None = None) -> Believed:
        """What plans are tried in: made at the first decision, or now (seconds); `plant`: the scenario's."""
        if self._believed is None:
            self._believed = Believed(plant or self.scenario, self.rule.anew(), self.settings)
        return self._believed

    def anew(self) -> MpcController:
        """The same without memory of earlier ticks."""
        return replace(self, rule=self.rule.anew(), taken={}, _memory={})

    def decide(self, view: ControlView) -> Levers:
        """The levers of this tick in physical units."""
        return decode(self.layout, self.act(view))

    def act(self, view: ControlView) -> Array:
        """Actions (N, A)."""
        n, tick_s = len(view.time_s), self.layout.tick_s
        if self._memory.get("left", np.zeros(0)).shape != (n,):
            self._memory = {"left": np.zeros(n), "wait": np.zeros(n), "shift": np.zeros((n, len(self.layout.mask)))}
        left, wait, shift = (self._memory[name] for name in ("left", "wait", "shift"))
        left[view.fresh], wait[view.fresh] = 0.0, 0.0
        before = self.rule.of_worlds(np.arange(n))
        advice = self.rule.act(view)
        for w in np.flatnonzero(wait <= 0.0):
            shift[w], left[w] = self._plan(view, int(w), before, shift[w], float(left[w]))
            wait[w] = max(round(self.settings.every_s / tick_s), 1)
        action = np.clip(advice + np.where(left > 0.0, 1.0, 0.0)[:, None] * shift, -1.0, 1.0)
        left -= 1.0
        wait -= 1.0
        return np.asarray(action)

    def _plan(self, view: ControlView, w: int, rule: RuleController, shift: Array, left: float) -> tuple[Array, float]:
        """Shift (A,) of world `w` from now on, and for how many ticks."""
        tick_s = self.layout.tick_s
        tried = [Plan("rule", np.zeros_like(shift), 0.0)]
        tried += [Plan("as before", shift.copy(), left * tick_s)] if left > 0.0 and np.any(shift) else []
        tried += plans(self.layout, self.settings)
        values_usd = self.values_usd(view, w, rule, tried)
        gains_usd = values_usd[1:] - values_usd[0]
        futures = gains_usd.shape[1]
        error_usd = gains_usd.std(axis=1, ddof=1) / np.sqrt(futures) if futures > 1 else np.zeros(len(gains_usd))
        sure = gains_usd.mean(axis=1) > np.maximum(self.settings.sure * error_usd, 1e-9)
        best = 1 + int(np.where(sure, gains_usd.mean(axis=1), -np.inf).argmax()) if sure.any() else 0
        chosen = tried[best]
        self.taken[chosen.name] = self.taken.get(chosen.name, 0) + 1
        return chosen.shift, max(round(chosen.lasting_s / tick_s), 0)

    def values_usd(self, view: ControlView, w: int, rule: RuleController, tried: list[Plan]) -> Array:
        """(M, F) value of each plan on each future of world `w`; `rule` has the memory of the view's worlds."""
        arrivals = self.prepare().arrivals(view, w)
        rows = len(tried) * len(arrivals)
        worlds = self.prepare().begin(view, w, np.tile(arrivals, (len(tried), 1, 1)))
        rule = rule.of_worlds(np.full(rows, w))
        shifts = np.repeat([plan.shift for plan in tried], len(arrivals), axis=0)
        ticks = np.repeat([round(plan.lasting_s / self.layout.tick_s) for plan in tried], len(arrivals))
        for tick in range(arrivals.shape[1]):
            if worlds.done.all():
                break
            advice = rule.act(worlds.view())
            worlds.step(np.clip(advice + np.where(tick < ticks, 1.0, 0.0)[:, None] * shifts, -1.0, 1.0))
        return self.prepare().value_usd(worlds).reshape(len(tried), -1)
