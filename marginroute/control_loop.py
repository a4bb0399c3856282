"""The controller at one gateway: a view every tick, and the levers that are in force until the next.

A `ControlLoop` counts what a controller has to see (`control.ControlView` with N = 1), asks it once per tick, and keeps
the levers in force. It holds nothing back and scales nothing itself: `holding` carries out what a gateway can, and an
autoscaler reads how many replicas are wanted. The hour of the season is that of the process's time zone (TZ).

Replicas that are ready are those that requests may be sent to and whose telemetry, if they have any, is not stale; what
was ordered beyond them is on its way. An autoscaler that knows better may report (`reported`).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from marginroute import control
from marginroute.control import Array, ControlLayout, ControlView, Levels, Levers, decode, encode
from marginroute.control_rules import Controller
from marginroute.errors import InputError
from marginroute.view import PROVIDER, REPLICA, Layout

FREE, TO_SHED, TO_SPILL, TO_HOLD = "", "shed", "spill", "hold"
MOST_DEBT = 2.0  # requests by which a class may be behind its share, as in the world's plain gateway


@dataclass(frozen=True)
class Report:
    """What an autoscaler says of a pool: replicas by state, and seconds until the next one is ready."""

    ready: float
    starting: float = 0.0
    draining: float = 0.0
    next_ready_s: float = 0.0


def second_of_week(unix_s: float) -> float:
    """Seconds since Monday 0:00 by the process's time zone."""
    at = time.localtime(unix_s)
    return 86400.0 * at.tm_wday + 3600.0 * at.tm_hour + 60.0 * at.tm_min + at.tm_sec + unix_s % 1.0


class ControlLoop:
    """A controller's eyes and hands at a gateway; not thread-safe (its gateway's lock is held).

    Args:
        controller: decides.
        layout: candidates of the bundle; its stations and classes have the controller's names.
        clock: own clock.

    Attributes:
        levers: in force, N = 1; before the first tick: nothing is held back, replicas as at the start.
        ticks: so far.

    Raises:
        InputError: the controller is for other pools, providers or classes.
    """

    def __init__(self, controller: Controller, layout: Layout, clock: Callable[[], float] = time.monotonic) -> None:
        self.controller, self.layout = controller, controller.layout
        of = self.layout
        check_controller(of, layout)
        self._clock = clock
        self._class = {name: k for k, name in enumerate(of.class_names)}
        self._pool = {name: p for p, name in enumerate(of.pool_names)}
        pools = [layout.station_names.index(name) for name in of.pool_names]
        self._rows = [np.flatnonzero((layout.kind == REPLICA) & (layout.station == s)) for s in pools]
        providers = {layout.station_names.index(name): i for i, name in enumerate(of.provider_names)}
        self._provider = {
            layout.names[c]: providers[int(layout.station[c])]
            for c in np.flatnonzero(layout.kind == PROVIDER)
            if int(layout.station[c]) in providers
        }
        self._levels = Levels(of, 1)
        self._counts = np.zeros((len(of.class_names), len(control.CLASS_SIGNALS)))
        self._allowance, self._filled_s = of.allowance.astype(np.float64), clock()
        self._debts = np.zeros((2, len(of.class_names)))
        self._targets, self._ordered_s = of.start_replicas.astype(np.float64), np.full(len(of.pool_names), clock())
        self._reports: dict[str, Report] = {}
        self.levers = _at_rest(of)
        self.ticks, self._next_s = 0, clock()

    @property
    def next_s(self) -> float:
        """Own clock's time of the next tick."""
        return self._next_s

    def class_of(self, name: str | None) -> int:
        """Index of a class; the first for one that is not named."""
        return self._class.get(name or "", 0)

    def deadline_s(self, class_name: str | None) -> float:
        """Until which a request of a class may be held, from its arrival; inf: not at all."""
        return float(self.layout.deadline_s[self.class_of(class_name)])

    def arrived(self, class_name: str | None) -> None:
        """A new request."""
        self._counts[self.class_of(class_name), control.ARRIVED] += 1.0

    def ended(self, class_name: str | None, status: str, slos_met: bool | None) -> None:
        """A request has ended."""
        row = self._counts[self.class_of(class_name)]
        if status == "completed":
            row[control.SERVED] += 1.0
            row[control.SLO_OK] += slos_met is not False
        else:
            row[control.LOST] += 1.0

    def sent(self, candidate: str) -> None:
        """A call leaves; one to a provider takes of its allowance."""
        if (i := self._provider.get(candidate)) is not None:
            self._fill(self._clock())
            self._allowance[i] = max(self._allowance[i] - 1.0, 0.0)

    def reported(self, pool: str, report: Report) -> bool:
        """An autoscaler says what there is of a pool; False if the controller has no such pool."""
        if pool not in self._pool:
            return False
        self._reports[pool] = report
        return True

    def order(self, class_name: str | None, can_shed: bool, can_spill: bool) -> str:
        """What the levers ask of a new request: `TO_SHED`, `TO_SPILL` or nothing; shares are spread evenly."""
        k = self.class_of(class_name)
        shed, spill = self._debts[0], self._debts[1]
        shed[k] = min(shed[k] + float(self.levers.shed_share[0, k]), MOST_DEBT)
        if can_shed and shed[k] >= 1.0 - 1e-9:
            shed[k] -= 1.0
            return TO_SHED
        spill[k] = min(spill[k] + float(self.levers.spill_share[0, k]), MOST_DEBT)
        if can_spill and spill[k] >= 1.0 - 1e-9:
            spill[k] -= 1.0
            return TO_SPILL
        return FREE

    def tick(self, in_flight: Array, queued: Array, up: Array, held: Array) -> Levers:
        """Asks the controller.

        Args:
            in_flight: (C,) requests by candidate, those that wait for it included.
            queued: (C,) of those, the ones that wait in the gateway.
            up: (C,) bool, candidates that requests may be sent to.
            held: (K, G) held work by class and age.
        """
        now_s, of = self._clock(), self.layout
        time_s = np.array([second_of_week(time.time())])
        if self.ticks == 0:
            self._levels.reset(slice(None), time_s)
        else:
            self._levels.update(self._counts[None, :, control.ARRIVED], time_s)
        self._fill(now_s)
        view = ControlView(
            layout=of,
            time_s=time_s,
            fresh=np.array([self.ticks == 0]),
            pools=self._pools(in_flight, queued, up, now_s)[None],
            classes=self._counts[None].copy(),
            held=held[None],
            fast=self._levels.fast,
            slow=self._levels.slow,
            allowance=self._allowance[None].copy(),
        )
        self.levers = self.controller.decide(view)
        wanted = self.levers.replicas[0]
        self._ordered_s[wanted > self._targets] = now_s
        self._targets = wanted
        self._counts[:] = 0.0
        self.ticks += 1
        self._next_s = max(self._next_s + of.tick_s, now_s)
        return self.levers

    def go_on(self, old: ControlLoop) -> None:
        """Takes over where the controller of an earlier bundle ends, if it sees the same things."""
        if old.layout.lever_names != self.layout.lever_names:
            return
        if old.ticks and np.array_equal(old.layout.season_per_s, self.layout.season_per_s):
            self._levels, self.ticks = old._levels, old.ticks
        self._counts, self._debts, self._reports = old._counts, old._debts, old._reports
        self._targets, self._ordered_s, self.levers = old._targets, old._ordered_s, old.levers
        self._allowance = np.minimum(old._allowance, self.layout.allowance)

    def replicas(self) -> dict[str, int]:
        """Wanted, by pool."""
        return {name: int(n) for name, n in zip(self.layout.pool_names, self._targets, strict=True)}

    def caps(self, layout: Layout) -> dict[str, float]:
        """In-flight cap by candidate."""
        return {
            layout.names[c]: float(self.levers.caps[0, p]) for p, rows in enumerate(self._rows) for c in rows.tolist()
        }

    def status(self) -> dict[str, object]:
        """Levers in force, as plain data."""
        of, levers = self.layout, self.levers

        def by(names: tuple[str, ...], values: Array) -> dict[str, float]:
            return {name: round(float(x), 6) for name, x in zip(names, values[0], strict=True)}

        release_per_s = float(levers.release_per_s[0])
        return {
            "controller": self.controller.name,
            "ticks": self.ticks,
            "replicas": self.replicas(),
            "in_flight_caps": by(of.pool_names, levers.caps),
            "release_per_s": release_per_s if np.isfinite(release_per_s) else None,
            "spill_share": by(of.class_names, levers.spill_share),
            "shed_share": by(of.class_names, levers.shed_share),
        }

    def _fill(self, now_s: float) -> None:
        """Providers' token buckets run on."""
        of = self.layout
        self._allowance = np.minimum(self._allowance + of.refill_per_s * (now_s - self._filled_s), of.allowance)
        self._filled_s = now_s

    def _pools(self, in_flight: Array, queued: Array, up: Array, now_s: float) -> Array:
        """(P, 8) `POOL_SIGNALS`."""
        of, pools = self.layout, np.zeros((len(self._rows), len(control.POOL_SIGNALS)))
        for p, rows in enumerate(self._rows):
            report = self._reports.get(of.pool_names[p])
            if report is None:
                there, wanted = float(up[rows].sum()), float(self._targets[p])
                left_s = max(float(of.lag_s[p]) - (now_s - self._ordered_s[p]), 0.0) if wanted > there else 0.0
                report = Report(min(there, wanted), max(wanted - there, 0.0), max(there - wanted, 0.0), left_s)
            waiting = float(queued[rows].sum())
            pools[p] = (
                report.ready,
                report.starting,
                report.draining,
                report.next_ready_s,
                float(in_flight[rows].sum()) - waiting,
                waiting,
                self._targets[p],
                float(self.levers.caps[0, p]),
            )
        return pools


def check_controller(controls: ControlLayout, layout: Layout) -> None:
    """Raises InputError unless a controller's pools, providers and classes are those of a bundle."""
    stations = layout.station_names
    for what, names, known in (
        ("pool", controls.pool_names, stations),
        ("provider", controls.provider_names, stations),
        ("class", controls.class_names, layout.class_names),
    ):
        missing = next((name for name in names if name not in known), None)
        if missing is not None:
            raise InputError(f"the controller has a {what} {missing!r} that is not in the bundle: {', '.join(known)}")
    missing = next((name for name in layout.class_names if name not in controls.class_names), None)
    if missing is not None:
        raise InputError(f"the controller knows nothing of class {missing!r}: {', '.join(controls.class_names)}")


def _at_rest(layout: ControlLayout) -> Levers:
    """Caps at the slots, replicas as at the start, nothing spilled or shed."""
    k = len(layout.class_names)
    zero = np.zeros((1, k))
    rest = Levers(layout.slots[None], layout.start_replicas[None], np.array([layout.top_per_s]), zero, zero)
    return decode(layout, encode(layout, rest))
