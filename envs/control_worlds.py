"""N worlds on the controller's clock: one step is one control tick, on the fluid surrogate or on the engine.

Both clocks have the same view, levers, rewards and end; `marginroute.control` turns them into observations and actions.
`FluidControl` moves amounts of requests and is what a controller is trained on; `EngineControl` plays every request,
with the plain gateway (`envs.control_kernel`) or any router, and is what it is selected and judged on.

Levers that a tick sets hold until the next one. On the engine they take effect at the first decision of the tick.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import numpy as np

from envs import control_kernel, rule_kernel, world_hold
from envs.control_plant import ControlPlant, Traffic, prices_usd, traffic_of
from envs.economics import ledger as books
from envs.fluid_worlds import FluidWorlds
from envs.scenario import Split
from envs.workload.requests import Workload
from envs.world import WAIT
from envs.worlds import FleetWorlds
from marginroute import control
from marginroute import view as v
from marginroute.control import AGES, POOL_SIGNALS, ControlLayout, ControlView, Levels, Levers, decode
from marginroute.control_rules import Controller
from marginroute.policy import Policy

Array = np.ndarray[Any, Any]
_COUNTED = (books.CALLS, books.SERVED, books.SLO_OK)


class ControlWorlds(ABC):
    """What both clocks share.

    Args:
        layout: what there is to control.
        n_worlds: N.
        ticks: T, of an episode.
        start_s: second of the week at which episodes begin.

    Attributes:
        tick: (N,) ticks played.
        rewards_usd: (N,) change of the ledger by the last tick; the last one settles the backlog.
    """

    ledger_usd: Array
    counts: Array

    def __init__(self, layout: ControlLayout, n_worlds: int, ticks: int, start_s: float) -> None:
        p, k = len(layout.pool_names), len(layout.class_names)
        self.layout, self.n_worlds, self.ticks, self._start_s = layout, n_worlds, ticks, start_s
        self.tick = np.zeros(n_worlds, dtype=np.int64)
        self.rewards_usd = np.zeros(n_worlds)
        self._levels = Levels(layout, n_worlds)
        self._pools = np.zeros((n_worlds, p, len(POOL_SIGNALS)))
        self._held = np.zeros((n_worlds, k, AGES))
        self._allowance = np.zeros((n_worlds, len(layout.provider_names)))
        self._prices_usd = np.tile(layout.usual_usd, (n_worlds, 1))
        self._classes = np.zeros((n_worlds, k, 4))
        self._before = np.zeros((n_worlds, 4, k))

    @property
    def done(self) -> Array:
        """(N,) bool."""
        return self.tick >= self.ticks

    @property
    def last_tick(self) -> Array:
        """(N, K, 4) calls that arrived, were answered, met their SLOs, and were lost, by the last tick."""
        return self._classes

    @property
    def time_s(self) -> Array:
        """(N,) second of the week."""
        return self._start_s + self.tick * self.layout.tick_s

    def _begun(self, w: int) -> None:
        """World `w` stands at its first tick."""
        self.tick[w], self.rewards_usd[w], self._classes[w], self._before[w] = 0, 0.0, 0.0, 0.0
        self._levels.reset(np.array([w]), self.time_s[w : w + 1])

    def view(self) -> ControlView:
        """What a controller sees now."""
        self._read()
        return ControlView(
            layout=self.layout,
            time_s=self.time_s,
            fresh=self.tick == 0,
            pools=self._pools.copy(),
            classes=self._classes.copy(),
            held=self._held.copy(),
            fast=self._levels.fast,
            slow=self._levels.slow,
            allowance=self._allowance.copy(),
            prices_usd=self._prices_usd.copy(),
        )

    def step(self, action: Array) -> None:
        """Carries out actions (N, A) for one tick; worlds that are done stay as they are."""
        running = ~self.done
        self._carry_out(decode(self.layout, np.asarray(action, dtype=np.float64)), running)
        self.rewards_usd[~running] = 0.0
        self.tick[running] += 1
        counts = self.counts
        lost = counts[:, books.SHED] + counts[:, books.ABANDONED] + counts[:, books.FAILED]
        now = np.stack([*(counts[:, row] for row in _COUNTED), lost], axis=1).astype(np.float64)
        self._classes = np.moveaxis(now - self._before, 1, 2)
        self._before = now
        self._levels.update(self._classes[..., control.ARRIVED], self.time_s)

    def run(self, controller: Controller, max_ticks: int | None = None) -> None:
        """Lets a controller act, from its start, until all worlds are done (or for `max_ticks`)."""
        controller = controller.anew()
        while not self.done.all() and (max_ticks is None or max_ticks > 0):
            self.step(controller.act(self.view()))
            max_ticks = None if max_ticks is None else max_ticks - 1

    def _share(self) -> Array:
        """(N, P) share of the requests that a pool gets: its part of the throughput of what is ready."""
        power = np.maximum(self._pools[..., control.READY], 1e-6) * self.layout.requests_per_s
        return power / power.sum(axis=1, keepdims=True)

    @abstractmethod
    def _read(self) -> None:
        """Fills `_pools`, `_held` and `_allowance`."""

    @abstractmethod
    def _carry_out(self, levers: Levers, running: Array) -> None:
        """One tick of the worlds that are `running` (N,); sets `rewards_usd`."""


class FluidControl(ControlWorlds):
    """Worlds on the fluid surrogate.

    Args:
        plant: the scenario.
        n_worlds: N.
    """

    def __init__(self, plant: ControlPlant, n_worlds: int) -> None:
        super().__init__(plant.layout, n_worlds, plant.ticks, plant.start_s)
        self.plant = plant
        self.worlds = FluidWorlds(plant.plant, n_worlds, plant.sample)
        self.ledger_usd, self.counts = self.worlds.ledger_usd, self.worlds.counts
        self.arrivals = np.zeros((n_worlds, plant.ticks, len(plant.layout.class_names)))
        self._pool_levers, self._class_levers = self.worlds.default_levers()

    def load(self, w: int, traffic: Traffic) -> None:
        """Starts an episode in world `w`."""
        self.worlds.reset(w, traffic.variant)
        self.arrivals[w] = traffic.arrivals
        self._prices_usd[w] = self.plant.member_usd[traffic.variant]
        self._begun(w)

    def load_seed(self, w: int, seed: int, split: Split) -> None:
        """Starts an episode of the scenario in world `w`."""
        self.load(w, traffic_of(self.plant.plant.scenario, seed, split, self.layout.tick_s))

    def _read(self) -> None:
        fluid = self.worlds.fluid
        control_kernel.read_fluid(
            fluid.flows, fluid.stations, fluid.orders, fluid.held, fluid.deadline_s, fluid.clocks_s, fluid.spills,
            self._pools, self._held, self._allowance,
        )  # fmt: skip

    def _carry_out(self, levers: Levers, running: Array) -> None:
        share = self._share()
        self._pool_levers[..., 0], self._pool_levers[..., 1] = levers.caps, levers.replicas
        self._pool_levers[..., 2] = levers.release_per_s[:, None] * share
        self._class_levers[..., 0], self._class_levers[..., 1] = levers.shed_share, levers.spill_share
        rows = np.arange(self.n_worlds)
        arrived = self.arrivals[rows, np.minimum(self.tick, self.ticks - 1)]
        self.worlds.step(
            share[..., None] * arrived[:, None, :],
            self._pool_levers,
            self._class_levers,
            self.layout.tick_s,
            running,
        )
        self.rewards_usd[:] = self.worlds.rewards_usd
        for w in np.flatnonzero(running & (self.tick == self.ticks - 1)):
            self.worlds.settle(int(w))
            self.rewards_usd[w] += self.worlds.rewards_usd[w]


class EngineControl(ControlWorlds):
    """Worlds on the engine.

    Args:
        worlds: the worlds of requests.
        layout: what there is to control.
        router: who decides on requests; None: the plain gateway. It and margin rules are compiled, except where some
            request may be hedged.
    """

    def __init__(self, worlds: FleetWorlds, layout: ControlLayout, router: Policy | None = None) -> None:
        scenario = worlds.plant.scenario
        season = scenario.workload.season
        start_s = 3600.0 * season.start_h if season is not None and season.start_h is not None else 0.0
        ticks = math.ceil(scenario.horizon_s / layout.tick_s - 1e-9)
        super().__init__(layout, worlds.n_worlds, ticks, start_s)
        self.worlds, self.router = worlds, router
        self._debts = np.zeros((worlds.n_worlds, len(layout.class_names), 2 + len(layout.pool_names)))
        self._targets = np.zeros((worlds.n_worlds, len(layout.pool_names)))
        self._margins_usd = np.zeros(worlds.n_worlds)
        self._choices = np.zeros(worlds.n_worlds, dtype=np.int64)
        routed = rule_kernel.is_compiled(router, worlds)
        rule = router if routed else rule_kernel.default_advice(worlds.plant)
        self._rule = rule_kernel.arguments_of(rule, worlds)
        self._compiled = router is None or routed
        for w in range(worlds.n_worlds):
            self.begin(w)

    @property
    def ledger_usd(self) -> Array:  # type: ignore[override]
        """(N, A, K + 1)."""
        return self.worlds.ledger_usd

    @property
    def counts(self) -> Array:  # type: ignore[override]
        """(N, len(COUNTS), K)."""
        return self.worlds.counts

    def load(self, w: int, workload: Workload) -> None:
        """Starts an episode with these requests in world `w`."""
        self.worlds.load(w, workload)
        self.begin(w)

    def load_seed(self, w: int, seed: int, split: Split) -> None:
        """Starts an episode of the scenario in world `w`."""
        self.load(w, self.worlds.plant.scenario.generate(seed, split))

    def begin(self, w: int) -> None:
        """Takes over world `w`, which stands at its first decision."""
        self._debts[w], self._margins_usd[w] = 0.0, 0.0
        usd = prices_usd(self.worlds.plant.members[int(self.worlds.desks["variant"][w])])
        self._prices_usd[w] = [usd[name] for name in self.layout.price_names]
        self._targets[w] = self.layout.start_replicas
        self._begun(w)

    def _read(self) -> None:
        fleet, worlds = self.worlds.fleet, self.worlds
        control_kernel.read_engine(
            fleet.replicas, fleet.providers, worlds.desks, worlds.loads, self._targets,
            self._pools, self._held, self._allowance,
        )  # fmt: skip

    def _carry_out(self, levers: Levers, running: Array) -> None:
        self._targets = np.where(running[:, None], levers.replicas, self._targets)
        self.worlds.set_in_flight_caps(levers.caps)
        self.worlds.set_replicas(self._targets)
        world_hold.set_release(self.worlds.desks, np.ascontiguousarray(levers.release_per_s, dtype=np.float64))
        until_s = np.where(self.tick == self.ticks - 1, np.inf, (self.tick + 1) * self.layout.tick_s)
        until_s = np.where(running, until_s, -np.inf)
        class_levers = np.ascontiguousarray(np.stack([levers.shed_share, levers.spill_share], axis=-1))
        if self._compiled:
            self._run_compiled(class_levers, until_s)
        elif self.router is not None:
            self._run_router(self.router, class_levers, until_s)
        margins_usd = self.worlds.ledger_usd.sum(axis=(1, 2))
        self.rewards_usd[:] = margins_usd - self._margins_usd
        self._margins_usd = margins_usd

    def _run_compiled(self, class_levers: Array, until_s: Array) -> None:
        control_kernel.run_tick(
            *self.worlds.arguments,
            self.worlds.plant.layout.station,
            self._debts,
            self._share(),
            class_levers,
            until_s,
            self._choices,
            self.router is not None,
            *self._rule,
        )

    def _run_router(self, router: Policy, class_levers: Array, until_s: Array) -> None:
        """Lets the router decide what the levers leave open."""
        worlds, rows = self.worlds, np.arange(self.n_worlds)
        kinds = worlds.plant.layout.kind
        defer, shed = len(kinds) - 2, len(kinds) - 1
        while True:
            desks = worlds.desks
            active = (desks["done"] == 0) & (desks["now_s"] < until_s)
            if not active.any():
                return
            current = desks["current"]
            k = worlds.loads["class_index"][rows, current]
            load = worlds.loads[rows, current]
            new = active & (desks["offered"] == 0) & (load["attempts"] + load["turned_down"] == 0)
            self._debts[rows, k, :2] += np.where(new[:, None], class_levers[rows, k], 0.0)
            to_shed = new & (self._debts[rows, k, control_kernel.SHED_DEBT] >= 1.0)
            able = worlds.legal & (kinds == v.PROVIDER)
            spill = new & ~to_shed & (self._debts[rows, k, control_kernel.SPILL_DEBT] >= 1.0) & able.any(axis=1)
            self._debts[rows, k, control_kernel.SHED_DEBT] -= to_shed
            self._debts[rows, k, control_kernel.SPILL_DEBT] -= spill
            self._debts[..., control_kernel.SPILL_DEBT] = np.minimum(self._debts[..., control_kernel.SPILL_DEBT], 2.0)
            hold = new & ~to_shed & ~spill & worlds.legal[:, defer] & (kinds[defer] == v.DEFER)
            worlds.legal[:, defer] &= hold | ~active
            worlds.legal[spill] = able[spill]
            choices = np.asarray(router.decide_batch(worlds.view()))
            choices = np.where(to_shed, shed, np.where(hold, defer, choices))
            worlds.step(np.where(active, choices, WAIT))
