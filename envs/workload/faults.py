"""Faults of an episode: drawn before it starts, the same for every policy, and hidden from all of them.

A fault hits one replica (by its row in the fleet) or one provider from `starts_at_s` to `ends_at_s`. An infinite
slowdown means that it is down. Random faults alternate: exponential times of service with mean `mean_time_between_s`,
exponential repairs with mean `mean_repair_s`, starting in service, so that after a while the share

    mean_repair_s / (mean_time_between_s + mean_repair_s)

of the time is lost. What a fault does stands in envs/fleet/faults.py. That a spot machine is reclaimed is a fault of
the replica, too: it starts with the notice and lasts until there is capacity again (envs/fleet/scaling.py).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

OF_REPLICA, OF_PROVIDER, OF_PRICE, OF_SPOT = 0, 1, 2, 3

FAULT = np.dtype(
    [
        ("kind", "i4"),  # OF_REPLICA, OF_PROVIDER, OF_PRICE of a provider, or OF_SPOT: a replica's machine is reclaimed
        ("index", "i4"),  # of the replica over all pools, or of the provider
        ("starts_at_s", "f8"),
        ("ends_at_s", "f8"),
        ("slowdown", "f8"),  # factor on its latency, or on its price; inf: down
    ]
)

CHANGE = np.dtype(
    [
        ("at_s", "f8"),
        ("kind", "i4"),
        ("index", "i4"),
        ("down", "i4"),  # 1: fails now (a replica until `until_s`), 0: a provider works again, -1: `slowdown` changes
        ("slowdown", "f8"),
        ("until_s", "f8"),
    ]
)
"""One step of what faults do to a fleet, in order of time; see `changes`."""


@dataclasses.dataclass(frozen=True)
class FaultLaw:
    """How often one replica or provider fails, and for how long.

    Attributes:
        kind: OF_REPLICA, OF_PROVIDER or OF_SPOT.
        index: Of the replica or provider.
        mean_time_between_s: Mean time of service between two faults.
        mean_repair_s: Mean length of a fault.
        slowdown: Factor on its latency meanwhile; inf: down.
    """

    kind: int
    index: int
    mean_time_between_s: float
    mean_repair_s: float
    slowdown: float = math.inf


def no_faults() -> Array:
    """(0,) `FAULT`."""
    return np.zeros(0, dtype=FAULT)


def fault(kind: int, index: int, starts_at_s: float, ends_at_s: float, slowdown: float = math.inf) -> Array:
    """(1,) `FAULT`."""
    return np.array([(kind, index, starts_at_s, ends_at_s, slowdown)], dtype=FAULT)


def draw_faults(laws: tuple[FaultLaw, ...], horizon_s: float, entropy: Sequence[int]) -> Array:
    """(F,) `FAULT` of one episode, ordered by start.

    Every law has a stream of its own, so that adding one, or a replica, leaves the faults of all others as they are.

    Args:
        laws: At most one failure and one slow spell law per replica or provider.
        horizon_s: Faults start before it.
        entropy: Integers that tell the episode from others.
    """
    rows = []
    for law in laws:
        stream = np.random.default_rng([*entropy, law.kind, law.index, int(math.isinf(law.slowdown))])
        at_s = stream.exponential(law.mean_time_between_s)
        while at_s < horizon_s:
            ends_at_s = at_s + stream.exponential(law.mean_repair_s)
            rows.append((law.kind, law.index, at_s, ends_at_s, law.slowdown))
            at_s = ends_at_s + stream.exponential(law.mean_time_between_s)
    return in_order(np.array(rows, dtype=FAULT))


def in_order(faults: Array) -> Array:
    """The same faults, ordered by start, kind and index."""
    if len(faults) < 2:
        return faults
    return faults[np.argsort(faults, order=("starts_at_s", "kind", "index"), kind="stable")]


def changes(faults: Array) -> Array:
    """(E,) `CHANGE`: what faults do step by step, ordered by time; overlapping slowdowns multiply.

    A replica that fails is told until when; whoever applies that brings it back. All other states are announced at
    both ends.
    """
    if not len(faults):
        return np.zeros(0, dtype=CHANGE)
    rows = []
    down = np.isinf(faults["slowdown"])
    for row in faults[down & np.isin(faults["kind"], (OF_REPLICA, OF_SPOT))]:
        rows.append((row["starts_at_s"], row["kind"], row["index"], 1, 1.0, row["ends_at_s"]))
    for kind, index in sorted({(int(row["kind"]), int(row["index"])) for row in faults}):
        mine = faults[(faults["kind"] == kind) & (faults["index"] == index)]
        slow = mine[~np.isinf(mine["slowdown"])]
        for at_s in np.unique([slow["starts_at_s"], slow["ends_at_s"]]):
            now = slow[(slow["starts_at_s"] <= at_s) & (at_s < slow["ends_at_s"])]
            rows.append((at_s, kind, index, -1, np.prod(now["slowdown"]), 0.0))
        gone = mine[np.isinf(mine["slowdown"])]
        for at_s in np.unique([gone["starts_at_s"], gone["ends_at_s"]]) if kind == OF_PROVIDER else ():
            now_down = np.any((gone["starts_at_s"] <= at_s) & (at_s < gone["ends_at_s"]))
            rows.append((at_s, kind, index, int(now_down), 1.0, 0.0))
    table = np.array(rows, dtype=CHANGE)
    return table[np.argsort(table["at_s"], kind="stable")]
