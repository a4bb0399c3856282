"""Requests that wait in the gateway, in two lines; the world's (`envs.world_hold`, `envs.fleet`) with real callers.

*Held* is batch work: earliest deadline first, one every 1 / `release_per_s` seconds; what is due leaves whatever the
rate says, and takes none of it. *Queued* is a request whose replica is full: it leaves, by priority and then in order,
when fewer than the replica's in-flight cap are at the engine.

Only a request whose caller is on the line is let through, since nobody else would send it. A caller that hangs up may
come back and finds its place, for `lease_s`; after that the place is given up.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import count

import numpy as np

from marginroute.view import Array

HELD, QUEUED, RELEASED = "held", "queued", "released"
Wake = Callable[[], object]


@dataclass(slots=True)
class Place:
    """A request that waits.

    Attributes:
        line: `HELD`, `QUEUED`, or `RELEASED` once its turn has come.
        of: customer class of held work; candidate of a queued request.
        rank: what the line is ordered by: when it is due; priority and order of arrival.
        arrived_s: own clock.
        deadline_s: from arrival, of held work.
        seen_s: when its caller was last on the line.
        wake: called once when its turn comes; None: its caller is not on the line.
    """

    line: str
    of: str
    rank: tuple[float, int]
    arrived_s: float
    deadline_s: float
    seen_s: float
    wake: Wake | None = None


class HoldQueue:
    """Both lines; not thread-safe (its gateway's lock is held).

    Args:
        hold_s: held work is due twice this long before its deadline; without a release rate it comes back after this.
        lease_s: that a place is kept for a caller who is not on the line.

    Attributes:
        release_per_s: held requests per second; None: there is no controller.
        caps: in-flight cap by candidate; one that has none is never full.
    """

    def __init__(self, hold_s: float = 60.0, lease_s: float = 30.0) -> None:
        self.hold_s, self._lease_s = hold_s, lease_s
        self.release_per_s: float | None = None
        self.caps: Mapping[str, float] = {}
        self._places: dict[str, Place] = {}
        self._lines: dict[str, list[tuple[tuple[float, int], str]]] = {}  # heaps of who is on the line; "": held
        self._queued: dict[str, int] = {}
        self._released_s, self._looked_s = -math.inf, -math.inf
        self._numbers = count()

    def __len__(self) -> int:
        return len(self._places)

    def place(self, id: str) -> Place | None:
        """Where a request waits, if it does."""
        return self._places.get(id)

    def hold(self, id: str, class_name: str, deadline_left_s: float, arrived_s: float, now_s: float) -> None:
        """Batch work that has `deadline_left_s` until its deadline waits for its release."""
        due_s = now_s + deadline_left_s - 2.0 * self.hold_s
        if self.release_per_s is None:
            due_s = min(due_s, now_s + self.hold_s)
        rank = max(due_s, now_s), next(self._numbers)
        self._places[id] = Place(HELD, class_name, rank, arrived_s, now_s + deadline_left_s - arrived_s, now_s)

    def full(self, candidate: str, in_flight: float) -> bool:
        """Whether one more has to wait; `in_flight` counts those that wait for the candidate, too."""
        return in_flight >= self.caps.get(candidate, math.inf)

    def queue(self, id: str, candidate: str, priority: float, now_s: float) -> None:
        """A request waits for room at a candidate; a smaller `priority` goes first."""
        self._queued[candidate] = self.queued(candidate) + 1
        self._places[id] = Place(QUEUED, candidate, (priority, next(self._numbers)), now_s, math.inf, now_s)

    def on_line(self, id: str, wake: Wake | None, now_s: float) -> bool:
        """The caller of a request is there (to be woken), or hangs up (None); False if its turn has come already."""
        place = self._places.get(id)
        if place is None or place.line == RELEASED:
            return False
        place.seen_s, place.wake = now_s, wake
        if wake is not None:
            heapq.heappush(self._lines.setdefault(place.of if place.line == QUEUED else "", []), (place.rank, id))
        return True

    def leave(self, id: str) -> None:
        """A request waits no longer, for whatever reason; a second time does nothing."""
        place = self._places.pop(id, None)
        if place is not None and place.line == QUEUED:
            self._queued[place.of] -= 1

    def counts(self) -> tuple[int, int]:
        """Held, and queued requests."""
        queued = sum(self._queued.values())
        return len(self._places) - queued, queued

    def full_ones(self) -> list[str]:
        """Candidates that somebody waits for."""
        return [name for name, number in self._queued.items() if number]

    def queued(self, candidate: str) -> int:
        """Requests that wait for a candidate."""
        return self._queued.get(candidate, 0)

    def pump(self, in_flight: Mapping[str, float], now_s: float) -> tuple[list[Wake], list[str]]:
        """Lets through whose turn it is.

        Args:
            in_flight: by candidate, with those that wait for it.
            now_s: own clock.

        Returns:
            What to call (outside any lock), and the requests whose callers have not come back: their places are gone.
        """
        wakes = self._let_go(now_s)
        for candidate, number in in_flight.items():
            cap = self.caps.get(candidate, math.inf)
            while self.queued(candidate) and number - self.queued(candidate) < cap:
                if (id := self._first(candidate)) is None:
                    break
                wakes.append(self._woken(self._places[id]))
                self.leave(id)
        lost: list[str] = []
        if now_s - self._looked_s > 0.25 * self._lease_s:
            self._looked_s = now_s
            lost = [i for i, p in self._places.items() if p.wake is None and now_s - p.seen_s > self._lease_s]
        for id in lost:
            self.leave(id)
        return wakes, lost

    def next_s(self, now_s: float) -> float:
        """When `pump` has something to do at the latest, by own clock; inf: nothing waits."""
        if not self._places:
            return math.inf
        soonest_s = now_s + 0.25 * self._lease_s
        if (id := self._first("")) is not None:
            soonest_s = min(soonest_s, self._places[id].rank[0], self._turn_s())
        return max(soonest_s, now_s)

    def held_by_age(self, class_names: tuple[str, ...], parts: int, now_s: float) -> Array:
        """(K, G) held requests by class and by the G-th parts of their deadlines that have passed."""
        held = np.zeros((len(class_names), parts))
        for place in self._places.values():
            if place.line == HELD and place.of in class_names:
                part = int((now_s - place.arrived_s) / max(place.deadline_s, 1e-9) * parts)
                held[class_names.index(place.of), min(max(part, 0), parts - 1)] += 1.0
        return held

    def _let_go(self, now_s: float) -> list[Wake]:
        """Held work that is due, or whose turn by the release rate has come."""
        wakes: list[Wake] = []
        while (id := self._first("")) is not None:
            place = self._places[id]
            if place.rank[0] > now_s:
                turn_s = self._turn_s()
                if turn_s > now_s:
                    break
                self._released_s = turn_s if turn_s + 1.0 / (self.release_per_s or 1.0) > now_s else now_s
            place.line, place.seen_s = RELEASED, now_s
            wakes.append(self._woken(place))
        return wakes

    def _turn_s(self) -> float:
        """When the release rate has room for one more."""
        return self._released_s + 1.0 / self.release_per_s if self.release_per_s else math.inf

    def _first(self, name: str) -> str | None:
        """The first of a line, of those who are on it."""
        line = self._lines.get(name, [])
        while line:
            rank, id = line[0]
            place = self._places.get(id)
            if place is not None and place.rank == rank and place.wake is not None:
                return id
            heapq.heappop(line)
        return None

    @staticmethod
    def _woken(place: Place) -> Wake:
        wake, place.wake = place.wake, None
        assert wake is not None
        return wake
