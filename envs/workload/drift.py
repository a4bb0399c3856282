"""What changes inside an episode without notice: how well a model answers, how fast an API is, what it bills.

A drift follows a course over the seconds since it began: values at knots, straight lines between them, nothing before
the first knot, the last value from the last one on. It begins at a time that is drawn for each episode, or not at all,
the same for every policy. Nothing of it enters a View: a gateway sees what follows from it, such as the latencies that
it measures. What is added where:

- ability: probits of a tier's P(good answer), by the arrival of a request (of a follow-up its nominal one);
- latency: a factor on TTFT and TPOT of the calls that are sent meanwhile, as a slow spell of `faults` is;
- price: a factor on what the calls that are sent meanwhile are billed; the gateway's price table stays as it was.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from envs.workload.faults import FAULT, OF_PRICE, OF_PROVIDER

Array = np.ndarray[Any, Any]

STAIRS = 16  # of a factor that changes steadily between two knots


@dataclass(frozen=True)
class DriftLaw:
    """One course of change; values are empty where nothing of the kind changes.

    Attributes:
        after_s: (N,) knots, seconds since it began, ascending.
        starts_at_s: earliest second of an episode at which it begins.
        start_spread_s: it begins up to so much later, evenly.
        episode_share: share of episodes in which it happens.
        tier: whose ability changes; -1: none.
        tasks: (J,) whether the ability for a task changes.
        ability_by: (N,) probits that are added.
        provider: whose latency or price changes; -1: none.
        latency_times, price_times: (N,) factors.
    """

    after_s: tuple[float, ...]
    starts_at_s: float = 0.0
    start_spread_s: float = 0.0
    episode_share: float = 1.0
    tier: int = -1
    tasks: tuple[bool, ...] = ()
    ability_by: tuple[float, ...] = ()
    provider: int = -1
    latency_times: tuple[float, ...] = ()
    price_times: tuple[float, ...] = ()


@dataclass(frozen=True)
class Drift:
    """A law and when it begins in one episode."""

    law: DriftLaw
    begins_at_s: float

    def value(self, values: Sequence[float], nothing: float, at_s: Array) -> Array:
        """What a course stands at, any shape."""
        knots_s = self.begins_at_s + np.array(self.law.after_s)
        return np.interp(at_s, knots_s, values, left=nothing)


def draw_drifts(laws: Sequence[DriftLaw], entropy: Sequence[int]) -> tuple[Drift, ...]:
    """The drifts of one episode; every law has a stream of its own, so that others do not move it."""
    drifts = []
    for number, law in enumerate(laws):
        happens, late = np.random.default_rng([*entropy, number]).random(2)
        if happens < law.episode_share:
            drifts.append(Drift(law, law.starts_at_s + late * law.start_spread_s))
    return tuple(drifts)


def ability_shift(drifts: Sequence[Drift], at_s: Array, task_index: Array, n_tiers: int) -> Array | None:
    """(M, T) probits that are added to abilities for requests of (M,) tasks at (M,) times; None: nothing is."""
    moving = [drift for drift in drifts if drift.law.ability_by]
    if not moving:
        return None
    shift = np.zeros((len(at_s), n_tiers))
    for drift in moving:
        meant = np.array(drift.law.tasks)[task_index]
        shift[:, drift.law.tier] += meant * drift.value(drift.law.ability_by, 0.0, at_s)
    return shift


def as_faults(drifts: Sequence[Drift]) -> Array:
    """(F,) `FAULT`: latencies and prices as stairs, in order of the drifts."""
    rows = []
    for drift in drifts:
        for kind, values in ((OF_PROVIDER, drift.law.latency_times), (OF_PRICE, drift.law.price_times)):
            for starts_at_s, ends_at_s, factor in _stairs(drift, values) if values else ():
                rows.append((kind, drift.law.provider, starts_at_s, ends_at_s, factor))
    return np.array(rows, dtype=FAULT)


def _stairs(drift: Drift, values: Sequence[float]) -> list[tuple[float, float, float]]:
    """Start, end and factor of every stair that is not at 1."""
    knots_s = [drift.begins_at_s + after_s for after_s in drift.law.after_s]
    stairs = []
    for k in range(len(knots_s) - 1):
        steps = 1 if values[k] == values[k + 1] else STAIRS
        edges_s = np.linspace(knots_s[k], knots_s[k + 1], steps + 1)
        factors = drift.value(values, 1.0, 0.5 * (edges_s[:-1] + edges_s[1:]))
        stairs += list(zip(edges_s[:-1].tolist(), edges_s[1:].tolist(), factors.tolist(), strict=True))
    stairs.append((knots_s[-1], math.inf, values[-1]))
    return [stair for stair in stairs if stair[2] != 1.0]


def least_factor(faults: Array, kind: int, index: int, from_s: Array, until_s: Array) -> Array:
    """(M,) lowest factor that holds for a provider at any time in (M,) spans; 1 where none does."""
    mine = faults[(faults["kind"] == kind) & (faults["index"] == index) & ~np.isinf(faults["slowdown"])]
    edges_s = np.unique(
        np.concatenate([[-math.inf], mine["starts_at_s"], mine["ends_at_s"][np.isfinite(mine["ends_at_s"])]])
    )
    inside = (mine["starts_at_s"] <= edges_s[:, None]) & (edges_s[:, None] < mine["ends_at_s"])
    factor = np.where(inside, mine["slowdown"], 1.0).prod(axis=1)  # (E,) from each edge to the next
    ends_s = np.append(edges_s[1:], math.inf)
    touches = (edges_s <= until_s[:, None]) & (ends_s > from_s[:, None])  # (M, E)
    return np.asarray(np.where(touches, factor, math.inf).min(axis=1))
