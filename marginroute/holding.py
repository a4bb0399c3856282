"""Carries out at one gateway what cannot be carried out at once: batch work, full replicas, and a controller's levers.

A `Holding` belongs to a `gateway.Gateway` whose caller can wait (`defer`, `hold`), or whose bundle has a controller.
The gateway calls it under its lock; what takes time (ticks, turns that come with time) happens in a thread of its own.
A controller that fails leaves the levers as they are, and is counted.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Collection
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from marginroute import view as v
from marginroute.control import AGES
from marginroute.control_loop import FREE, TO_SHED, ControlLoop, Report
from marginroute.facts import Facts
from marginroute.hold_queue import QUEUED, RELEASED, HoldQueue, Wake
from marginroute.view import View

if TYPE_CHECKING:
    from marginroute.following import Following
    from marginroute.runtime import Runtime

log = logging.getLogger("marginroute.gateway")

LONGEST_SLEEP_S = 1.0


class Holding:
    """See above.

    Args:
        gateway: whose requests wait.
        can: what its caller can do.
        hold_s, lease_s: of the queue.

    Attributes:
        queue: who waits.
        loop: of the bundle's controller; None: it has none.
        errors: ticks that failed.
    """

    def __init__(self, gateway: Following, can: Collection[str], hold_s: float, lease_s: float) -> None:
        self._gateway, self._can = gateway, frozenset(can)
        self.queue = HoldQueue(hold_s, lease_s)
        self.loop: ControlLoop | None = None
        self.errors = 0
        self._runtime: Runtime | None = None
        self._wake, self._stopped = threading.Event(), False
        self._thread = threading.Thread(target=self._run, name="marginroute-control", daemon=True)
        self._seen: set[str] | None = set()  # candidates that the last tick's requests could go to; None: all

    def take(self, runtime: Runtime) -> None:
        """A bundle takes over, at the start or at a swap; who waits goes on waiting."""
        self._runtime, old = runtime, self.loop
        bundle = runtime.bundle
        self.loop = None
        if bundle.controller is not None:
            self.loop = ControlLoop(bundle.controller.anew(), bundle.layout, self._gateway.clock)
            if old is not None:
                self.loop.go_on(old)
            self._apply()
        elif "hold" in self._can and (caps := bundle.policy.in_flight_caps(bundle.layout, bundle.slots)) is not None:
            stations = bundle.layout.station[: bundle.layout.n_replicas]
            names = bundle.layout.names
            self.queue.caps = {names[c]: float(caps[s]) for c, s in enumerate(stations.tolist())}

    def start(self) -> Holding:
        """Starts the thread."""
        self._thread.start()
        return self

    def stop(self) -> None:
        """Ends the thread."""
        self._stopped = True
        self._wake.set()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(LONGEST_SLEEP_S + 1.0)

    def released(self, id: str) -> bool:
        """Whether a held request's turn has come, so that it is decided again."""
        place = self.queue.place(id)
        return place is not None and place.line == RELEASED

    def facts_of(self, facts: Facts, began_s: float | None) -> Facts:
        """Facts with the deadline that the controller knows for the class, where the caller names none."""
        if self.loop is None or math.isfinite(facts.deadline_left_s):
            return facts
        waited_s = 0.0 if began_s is None else self._gateway.clock() - began_s
        return replace(facts, deadline_left_s=self.loop.deadline_s(facts.class_name) - waited_s)

    def narrow(self, view: View, facts: Facts, first: bool) -> None:
        """Leaves legal in a view what the levers leave of it."""
        names, kind, legal = view.layout.names, view.layout.kind, view.legal
        if self._seen is not None:
            self._seen = None if facts.available is None else self._seen | set(facts.available)
        if self.loop is None:
            return
        if not first:
            legal &= kind != v.DEFER
        else:
            self.loop.arrived(facts.class_name)
            spills = legal & (kind == v.PROVIDER)
            order = self.loop.order(facts.class_name, "shed" in self._can, bool(spills.any()))
            if order != FREE:
                legal[:] = (kind == v.SHED) if order == TO_SHED else spills
            elif (held := legal & (kind == v.DEFER)).any():
                legal[:] = held
        if not legal.any():
            legal[names.index(names[-1])] = True

    def decided(self, facts: Facts, kind: str, arrived_s: float) -> bool:
        """An acting verdict on a request; True if its caller has to wait for its release."""
        self.queue.leave(facts.id)
        if kind != v.KINDS[v.DEFER]:
            return False
        classes = self._gateway.bundle.layout.class_names
        name = facts.class_name or classes[0]
        self.queue.hold(facts.id, name, facts.deadline_left_s, arrived_s, self._gateway.clock())
        return True

    def sent(self, id: str, candidate: str, in_flight: float, priority: float) -> bool:
        """A request is bound for a candidate where `in_flight` others are; True if its caller has to wait for room."""
        if self.loop is not None:
            self.loop.sent(candidate)
        self.queue.leave(id)
        if "hold" not in self._can or not self.queue.full(candidate, in_flight):
            return False
        self.queue.queue(id, candidate, priority, self._gateway.clock())
        return True

    def ended(self, facts: Facts, status: str, slos_met: bool | None) -> None:
        """A request has ended."""
        self.queue.leave(facts.id)
        if self.loop is not None:
            self.loop.ended(facts.class_name, status, slos_met)

    def waits(self, id: str) -> bool:
        """Whether a request waits for room."""
        place = self.queue.place(id)
        return place is not None and place.line == QUEUED

    def on_line(self, id: str, wake: Wake | None) -> bool:
        """See `HoldQueue.on_line`."""
        waits = self.queue.on_line(id, wake, self._gateway.clock())
        self._wake.set()
        return waits

    def reported(self, pool: str, report: Report) -> bool:
        """An autoscaler says what there is of a pool; False if nobody wants to know."""
        return self.loop is not None and self.loop.reported(pool, report)

    def status(self) -> dict[str, Any]:
        """Who waits, and the levers in force, as plain data."""
        held, queued = self.queue.counts()
        levers = {} if self.loop is None else self.loop.status()
        return {"held": held, "queued": queued, "control_errors": self.errors, **levers}

    def tick(self) -> None:
        """Asks the controller, if it is time."""
        loop, runtime = self.loop, self._runtime
        if loop is None or runtime is None or self._gateway.clock() < loop.next_s:
            return
        layout, state = runtime.bundle.layout, runtime.state
        in_flight, age_s = state.counters()["in_flight"], state.telemetry_age_s()
        queued = np.array([float(self.queue.queued(name)) for name in layout.names])
        up = age_s <= runtime.policy.limits.telemetry_age_s
        if self._seen:
            up &= np.array([name in self._seen for name in layout.names])
        self._seen = set()
        held = self.queue.held_by_age(loop.layout.class_names, AGES, self._gateway.clock())
        loop.tick(in_flight, queued, up, held)
        self._apply()

    def _apply(self) -> None:
        loop, runtime = self.loop, self._runtime
        assert loop is not None and runtime is not None
        release_per_s = float(loop.levers.release_per_s[0])
        self.queue.release_per_s = release_per_s if math.isfinite(release_per_s) else 1e6
        if "hold" in self._can:
            self.queue.caps = loop.caps(runtime.bundle.layout)
            runtime.state.set_caps([self.queue.caps.get(name, v.UNLIMITED) for name in runtime.bundle.layout.names])

    def _run(self) -> None:
        while not self._stopped:
            try:
                sleep_s = self._gateway.turn()
            except Exception as error:
                self.errors += 1
                sleep_s = LONGEST_SLEEP_S
                if self.errors == 1:
                    log.warning("marginroute: a control tick failed; later ones are only counted (%r)", error)
            self._wake.wait(min(max(sleep_s, 0.001), LONGEST_SLEEP_S))
            self._wake.clear()

    def pump(self, runtime: Runtime) -> tuple[list[Wake], list[str]]:
        """See `HoldQueue.pump`."""
        index, state = runtime.index, runtime.state
        in_flight = {name: state.in_flight_at(index[name]) for name in self.queue.full_ones() if name in index}
        return self.queue.pump(in_flight, self._gateway.clock())

    def next_s(self) -> float:
        """Own clock's time at which something may be due."""
        ticks_s = math.inf if self.loop is None else self.loop.next_s
        return min(self.queue.next_s(self._gateway.clock()), ticks_s)
