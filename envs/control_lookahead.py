"""What a controller can believe of a fleet: where its view says that it stands, and what may arrive.

*State*: `Lookahead` begins fluid worlds at a `ControlView`, and at nothing else. What the view does not say is filled
in: requests in a pool have the mix that was served last and keep their SLOs as those did; held work is spread evenly
over the ages that it is told by; replicas on their way are ready one after the other, from the first one's time to the
lag.

*Futures*: `Futures` cuts them out of training days. Of each day it takes the moment whose two levels of traffic (all
classes together, relative to the season) were most like those of now; the days that come nearest are the futures, what
followed there relative to the season, times the season from now on. That has the spread, the persistence and the
changes that traffic has, without a model of them.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from envs.control_plant import HISTORY_EPISODES, ControlPlant, traffic_of
from envs.control_worlds import FluidControl
from envs.fleet.fluid_tick import LAST_AGES
from marginroute.control import (
    CAP,
    DRAINING,
    IN_FLIGHT,
    NEXT_READY_S,
    READY,
    SERVED,
    SLO_OK,
    STARTING,
    TARGET,
    WAITING,
    Array,
    ControlLayout,
    ControlView,
    Levels,
)


def view_of(view: ControlView, worlds: Array) -> ControlView:
    """The rows (n,) of a view, each as often as it is named."""
    arrays = {f.name: getattr(view, f.name) for f in fields(ControlView) if f.name != "layout"}
    return replace(view, **{name: array[worlds] for name, array in arrays.items() if array is not None})


class Lookahead(FluidControl):
    """Fluid worlds that begin where views say.

    Args:
        plant: the scenario.
        n_worlds: N.
    """

    def begin(self, view: ControlView, arrivals: Array) -> None:
        """Starts world w where row w of a view (N rows) says, with arrivals (N, h, K) in the ticks that follow.

        The money is that of the member of the family whose prices are nearest.
        """
        layout, fluid, worlds = self.layout, self.worlds.fluid, self.worlds
        for array in (worlds.ledger_usd, worlds.counts, worlds.margins_usd, worlds.rewards_usd, self._before):
            array[:] = 0.0
        self.rewards_usd[:] = 0.0
        self.tick[:] = np.rint((view.time_s - self._start_s) / layout.tick_s)
        self._levels.reset(slice(None), view.time_s, np.stack([view.fast, view.slow]))
        self._classes, self._pools[:] = view.classes.copy(), view.pools
        if view.prices_usd is not None and self.layout.price_names:
            apart = np.log(view.prices_usd[:, None] / self.plant.member_usd)
            worlds.variant[:], self._prices_usd[:] = np.square(apart).sum(axis=-1).argmin(axis=1), view.prices_usd
        self._begin_pools(fluid.stations, fluid.orders, view.pools)
        self._begin_flows(fluid.flows, view)
        self._begin_held(fluid.held, view.held)
        fluid.clocks_s[:], fluid.spills[:] = 0.0, 0.0
        fluid.spills[:, :, -1] = view.allowance
        for w in range(self.n_worlds):
            now = int(self.tick[w])
            some = arrivals[w, : self.ticks - now]
            self.arrivals[w, now : now + len(some)] = some

    def _begin_pools(self, stations: Any, orders: Any, pools: Array) -> None:
        stations[:], orders[:] = np.zeros((), stations.dtype), np.zeros((), orders.dtype)
        stations["ready"], stations["draining"] = pools[..., READY], pools[..., DRAINING]
        stations["in_flight_cap"], stations["replica_target"] = pools[..., CAP], pools[..., TARGET]
        stations["variance"] = pools[..., IN_FLIGHT] + pools[..., WAITING]
        starting, first_s, last = pools[..., STARTING], pools[..., NEXT_READY_S], orders.shape[2] - 1
        for o in range(last + 1):
            orders["replicas"][..., o] = np.clip(starting - o, 0.0, 1.0 if o < last else np.inf)
            orders["left_s"][..., o] = first_s + (self.layout.lag_s - first_s) * o / np.maximum(starting, 1.0)

    def _begin_flows(self, flows: Any, view: ControlView) -> None:
        flows[:] = np.zeros((), flows.dtype)
        mix = view.classes[..., SERVED] + 1e-6 * self.layout.season(view.time_s)
        mix = (mix / np.maximum(mix.sum(axis=-1, keepdims=True), 1e-12))[:, None, :]
        served = view.classes[..., SERVED]
        kept = np.where(served > 0.5, view.classes[..., SLO_OK] / np.maximum(served, 1e-9), 1.0)[:, None, :]
        pools = view.pools
        amount = pools[..., IN_FLIGHT] + pools[..., WAITING]
        room = (pools[..., READY] + pools[..., DRAINING]) * np.minimum(pools[..., CAP], self.layout.slots)
        running = np.minimum(amount, room)[..., None] * mix
        waiting = np.maximum(amount - room, 0.0)[..., None] * mix
        flows["running"], flows["waiting"] = running, waiting
        for name in ("ttft_ok", "tpot_ok", "e2e_ok", "slo_ok"):
            flows[name] = (running + waiting) * kept
        flows["credited"] = (running + waiting) * (1.0 - kept)

    def _begin_held(self, held: Array, seen: Array) -> None:
        """Age a stands in bucket -a of a clock at 0; what is older than a controller may hold is none of its."""
        held[:] = 0.0
        buckets, parts = held.shape[-1], seen.shape[-1]
        share = self._share()[:, :, None]
        for part in range(parts):
            ages = np.arange(part * buckets // parts, min((part + 1) * buckets // parts, LAST_AGES))
            for age in ages:
                held[..., -age % buckets] += share * seen[:, None, :, part] / len(ages)


@dataclass(frozen=True, eq=False)
class Futures:
    """Training days to cut futures from.

    Attributes:
        layout: what an operator knows.
        relative: (E, T, K) arrivals of a tick over what the season let expect.
        levels: (E, T, 2) fast and slow level of all classes together before each tick.
    """

    layout: ControlLayout
    relative: Array
    levels: Array

    @classmethod
    def of(cls, plant: ControlPlant, days: int = HISTORY_EPISODES) -> Futures:
        """From the training days that the season is known from."""
        layout, tick_s = plant.layout, plant.layout.tick_s
        counts = np.stack([traffic_of(plant.plant.scenario, seed, "train", tick_s).arrivals for seed in range(days)])
        times_s = plant.start_s + np.arange(plant.ticks) * tick_s
        usual = layout.season(times_s + 0.5 * tick_s) * tick_s
        moving, seen = Levels(layout, days), np.zeros((days, plant.ticks, 2))
        moving.reset(slice(None), np.full(days, plant.start_s))
        for t, now_s in enumerate(times_s):
            seen[:, t] = _together(layout, now_s, moving.fast, moving.slow)
            moving.update(counts[:, t], np.full(days, now_s + tick_s))
        return cls(layout, counts / np.maximum(usual, 1e-9), seen)

    def draw(self, view: ControlView, w: int, count: int, ticks: int) -> Array:
        """(count, ticks, K) arrivals that may follow on what world `w` of a view has seen; count is E at most."""
        layout, length = self.layout, self.levels.shape[1]
        now = _together(layout, view.time_s[w], view.fast[w], view.slow[w])
        unit = np.maximum(self.levels.std(axis=(0, 1)), 1e-9)
        apart = np.square((self.levels - now) / unit).sum(axis=-1)
        begin = apart.argmin(axis=1)
        days = np.argsort(apart.min(axis=1), kind="stable")[:count]
        at = (begin[days, None] + np.arange(ticks)) % length
        times_s = view.time_s[w] + (np.arange(ticks) + 0.5) * layout.tick_s
        return self.relative[days[:, None], at] * layout.season(times_s) * layout.tick_s


def _together(layout: ControlLayout, time_s: float, fast: Array, slow: Array) -> Array:
    """(..., 2) levels of all classes together, from those of classes (..., K)."""
    usual = np.maximum(layout.season(np.asarray(time_s)), 1e-9)
    return np.stack([(level * usual).sum(axis=-1) / usual.sum() for level in (fast, slow)], axis=-1)
