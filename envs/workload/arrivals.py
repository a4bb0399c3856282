"""Arrival times of one episode: renewal with Gamma gaps, and Markov-modulated Poisson.

Both are drawn as arrays, without a loop over requests. With a fixed number of requests the same process is rescaled:
gaps are stretched so that exactly that many fall into the horizon (Gamma), or the times are drawn from the modulated
intensity given their number, which is the exact conditional law on a given path of states (MMPP).

Closed forms used by the tests. Two-state MMPP with rates r1, r2 and mean dwell times t1, t2, b = 1/t1 + 1/t2:

    stationary rate  r = (r1 t1 + r2 t2) / (t1 + t2)
    Fano factor of the count in a window w  1 + 2 v / (r b) (1 - (1 - exp(-b w)) / (b w)),  v = Var of the rate

(Fischer and Meier-Hellstern, "The Markov-modulated Poisson process (MMPP) cookbook", 1993.)
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class GammaArrivals:
    """Renewal process with Gamma gaps.

    Attributes:
        rate_per_s: mean arrivals per second.
        gap_cv: coefficient of variation of the gaps; 1 is Poisson, above 1 bursty.
    """

    rate_per_s: float
    gap_cv: float

    def mean_rate_per_s(self) -> float:
        """Long-run arrivals per second."""
        return self.rate_per_s

    def scaled(self, factor: float) -> GammaArrivals:
        """The same process with `factor` times the rate."""
        return GammaArrivals(self.rate_per_s * factor, self.gap_cv)

    def draw(self, rng: np.random.Generator, horizon_s: float, count: int | None = None) -> Array:
        """Ascending arrival times (M,) in [0, horizon_s); exactly `count` of them if given."""
        shape = self.gap_cv**-2
        if count is not None:
            total_s = np.cumsum(rng.gamma(shape, 1.0, count + 1))
            return inside_horizon(total_s[:-1] * (horizon_s / total_s[-1]), horizon_s)
        arrived_s = np.cumsum(self._gaps_s(rng, shape, horizon_s))
        while arrived_s[-1] < horizon_s:
            more_s = self._gaps_s(rng, shape, horizon_s)
            arrived_s = np.concatenate([arrived_s, arrived_s[-1] + np.cumsum(more_s)])
        return arrived_s[: np.searchsorted(arrived_s, horizon_s)]

    def _gaps_s(self, rng: np.random.Generator, shape: float, horizon_s: float) -> Array:
        expected = self.rate_per_s * horizon_s
        size = int(expected + 4.0 * self.gap_cv * np.sqrt(expected)) + 16
        return rng.gamma(shape, 1.0 / (shape * self.rate_per_s), size)


@dataclass(frozen=True)
class MmppArrivals:
    """Markov-modulated Poisson process: the rate jumps between states with exponential dwell times.

    Attributes:
        rate_per_s: (S,) arrivals per second in each state.
        dwell_s: (S,) mean time in each state.
        jump: (S, S) probability of the next state, zero diagonal; rows add up to 1.
    """

    rate_per_s: tuple[float, ...]
    dwell_s: tuple[float, ...]
    jump: tuple[tuple[float, ...], ...]

    def stationary(self) -> Array:
        """(S,) long-run share of time in each state."""
        return self._stationary

    @cached_property
    def _stationary(self) -> Array:
        jump = np.array(self.jump)
        size = len(jump)
        balance = np.vstack([(jump.T - np.eye(size)), np.ones(size)])
        visits = np.linalg.lstsq(balance, np.append(np.zeros(size), 1.0), rcond=None)[0]
        share = visits * np.array(self.dwell_s)
        return share / share.sum()

    def mean_rate_per_s(self) -> float:
        """Long-run arrivals per second."""
        return float(self.stationary() @ np.array(self.rate_per_s))

    def scaled(self, factor: float) -> MmppArrivals:
        """The same states with `factor` times the rates."""
        return MmppArrivals(tuple(rate * factor for rate in self.rate_per_s), self.dwell_s, self.jump)

    def path(self, rng: np.random.Generator, horizon_s: float) -> tuple[Array, Array]:
        """States (D,) in order and times (D + 1,) between which they hold, from 0 to horizon_s; starts stationary."""
        jump = np.cumsum(np.array(self.jump), axis=1).tolist()
        last = len(jump) - 1
        state = min(bisect_left(np.cumsum(self.stationary()).tolist(), rng.random()), last)
        states, edges_s = [], [0.0]
        while edges_s[-1] < horizon_s:
            states.append(state)
            edges_s.append(edges_s[-1] + self.dwell_s[state] * rng.exponential())
            state = min(bisect_right(jump[state], rng.random()), last)
        edges_s[-1] = horizon_s
        return np.array(states), np.array(edges_s)

    def draw(self, rng: np.random.Generator, horizon_s: float, count: int | None = None) -> Array:
        """Ascending arrival times (M,) in [0, horizon_s); exactly `count` of them if given."""
        states, edges_s = self.path(rng, horizon_s)
        expected = np.append(0.0, np.cumsum(np.array(self.rate_per_s)[states] * np.diff(edges_s)))
        if count is not None and expected[-1] <= 0.0:  # a path that stays silent: spread them evenly at random
            return inside_horizon(np.sort(rng.random(count)) * horizon_s, horizon_s)
        size = rng.poisson(expected[-1]) if count is None else count
        return inside_horizon(np.interp(np.sort(rng.random(size)) * expected[-1], expected, edges_s), horizon_s)


def unit_gaps(rng: np.random.Generator, law: str, shape: float, total: float) -> Array:
    """Gaps of mean 1 that together pass `total`; `law` is gamma or weibull with the given shape."""
    scale = 1.0 / shape if law == "gamma" else 1.0 / math.gamma(1.0 + 1.0 / shape)
    parts: list[Array] = []
    reached = 0.0
    while reached <= total:
        size = int(1.05 * (total - reached)) + 16
        drawn = rng.gamma(shape, scale, size) if law == "gamma" else scale * rng.weibull(shape, size)
        parts.append(drawn)
        reached += float(drawn.sum())
    return np.concatenate(parts)


def inside_horizon(arrived_s: Array, horizon_s: float) -> Array:
    """Keeps rounding from putting an arrival on the horizon itself."""
    return np.minimum(arrived_s, np.nextafter(horizon_s, 0.0))


class Arrivals(Protocol):
    """An arrival process."""

    def mean_rate_per_s(self) -> float:
        """Long-run arrivals per second."""
        ...

    def scaled(self, factor: float) -> Arrivals:
        """The same process with `factor` times the rate."""
        ...

    def draw(self, rng: np.random.Generator, horizon_s: float, count: int | None = None) -> Array:
        """Ascending arrival times (M,) in [0, horizon_s); exactly `count` of them if given."""
        ...
