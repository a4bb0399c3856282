"""The upper bound for prices of capacity: any non-negative prices give one, and a search looks for the lowest.

Let q[s, b] >= 0 be a price per second of engine work of station s in time bucket b (per call for a provider). Whatever
a policy does, its margin is at most

    U(q) = shared + sum_s capacity_usd(q[s]) + sum_groups max over what the group's requests could do
           of  value - prefill_s min q[s, window] - decode_s min q[s, window]

since work done never exceeds the capacity that the first sum sells (Lagrangian duality; the maximum is taken request
by request, task by task, or by dynamic programming over the requests that may share a stored answer). A pool sells
what it is paid for, and what it rents at price p where that pays: dt max(q[b] - p, 0). A provider's token bucket of
size B fills at rate r and carries over: it sells r dt sum_b q[b] + B (q[0] + sum_b (q[b + 1] - q[b])^+) at best.
Buckets end some time after the horizon, when engines still work, unpaid; whatever is later is free.

The search is a projected subgradient descent (the slope at a price is capacity less the work that the maximum demands
there) from no prices, or from those of the cheapest rent; first over blocks of buckets, then over single ones. Each
evaluation is a valid bound, the lowest is kept. Longer buckets give a looser one and are faster.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from evaluation.bound_cache import SharedAnswers
from evaluation.bound_options import Options
from evaluation.bound_tasks import TaskAnswers

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

BUCKET_S, MOST_BUCKETS = 1.0, 10_000
"""Length of a bucket; longer where an episode would have more of them."""
AFTER_HORIZON_S = 120.0
BLOCKS = ((32, 60), (8, 100), (1, 400))
"""(buckets that share a price, steps) of each phase of the search."""
MANY_OPTIONS, LEAST_SHARE = 300_000, 0.4
"""With more options an evaluation is slow: fewer steps are taken, down to this share."""
JITTER = 1e-6
FIRST_GAP_SHARE = 0.5
"""First guess of how far the bound can fall, per contribution; halved when PATIENCE_STEPS steps bring nothing."""
PATIENCE_STEPS = 12
LAST_GAP_SHARE = 1e-4
"""A phase of the search ends when the guess has fallen to this share of the first."""
MOMENTUM = 0.6


@dataclass(frozen=True)
class Dual:
    """The best prices found.

    Attributes:
        bound_usd: upper bound of the margin.
        prices_usd: (S, B) per second of work or call.
    """

    bound_usd: float
    prices_usd: Floats


class DualBound:
    """U(q) of one workload.

    Args:
        options: what could be done.
        bucket_s: length of a time bucket; None: BUCKET_S, or what makes MOST_BUCKETS.
    """

    def __init__(self, options: Options, bucket_s: float | None = None) -> None:
        self.options, capacity = options, options.capacity
        end_s = options.horizon_s + AFTER_HORIZON_S
        self.bucket_s = max(BUCKET_S, end_s / MOST_BUCKETS) if bucket_s is None else bucket_s
        self.stations = len(capacity.paid)
        self.buckets = int(np.ceil(end_s / self.bucket_s - 1e-9))  # one more is free
        starts_s = self.bucket_s * np.arange(self.buckets)
        within_s = np.clip(options.horizon_s - starts_s, 0.0, self.bucket_s)
        self.sold = capacity.paid[:, None] * np.full(self.buckets, self.bucket_s)
        np.add.at(self.sold, capacity.rented_from, capacity.rented[:, None] * (self.bucket_s - within_s))
        self.rented = capacity.rented[:, None] * within_s
        self.limited = np.isfinite(capacity.paid)
        self.sold[(capacity.burst > 0.0)[:, None] & (within_s <= 0.0)] = 0.0  # nothing is sent after the horizon
        self.sold[~self.limited] = 0.0
        first = self._bucket(options.from_s)
        self.prefill = _Windows(options.station, first, self._bucket(options.prefill_until_s), self.buckets + 1)
        self.decode = _Windows(options.station, first, self._bucket(options.decode_until_s), self.buckets + 1)
        self.answers, self.task_answers = SharedAnswers(options), TaskAnswers(options)

    def _bucket(self, time_s: Floats) -> Ints:
        return np.minimum(np.minimum(time_s, 1e12) / self.bucket_s, self.buckets).astype(np.int64)

    def evaluate(self, prices_usd: Floats) -> tuple[float, Floats]:
        """U(q) and its slope (S, B) at prices (S, B) >= 0; prices of unlimited stations are not used."""
        o = self.options
        prices = np.where(self.limited[:, None], prices_usd, 0.0)
        free_after = np.concatenate([prices, np.zeros((self.stations, 1))], axis=1)
        table = _RangeMin(free_after)
        prefill_usd, prefill_at = table.lowest(self.prefill)
        decode_usd, decode_at = table.lowest(self.decode)
        net_usd = o.value_usd - o.prefill_s * prefill_usd - o.decode_s * decode_usd
        answers_usd, taken = self.answers.best(net_usd)
        tasks_usd, taken_too = self.task_answers.best(net_usd)
        taken = np.concatenate([taken, taken_too])
        demand = np.zeros(free_after.size)
        np.add.at(demand, prefill_at[taken], o.prefill_s[taken])
        np.add.at(demand, decode_at[taken], o.decode_s[taken])
        slope = self.sold - demand.reshape(free_after.shape)[:, :-1]
        capacity_usd = float((prices * self.sold).sum())
        profit_usd = prices[o.capacity.rented_from] - o.capacity.rent_usd[:, None]
        capacity_usd += float((self.rented * np.maximum(profit_usd, 0.0)).sum())
        np.add.at(slope, o.capacity.rented_from, self.rented * (profit_usd > 0.0))
        burst = o.capacity.burst
        for s in np.flatnonzero(burst > 0.0):
            rises = np.diff(prices[s], append=0.0)
            capacity_usd += burst[s] * (prices[s, 0] + float(np.maximum(rises, 0.0).sum()))
            slope[s, 0] += burst[s]
            slope[s, 1:] += burst[s] * (rises[:-1] > 0.0)
            slope[s] -= burst[s] * (rises > 0.0)
        slope[~self.limited] = 0.0
        return o.shared_usd + capacity_usd + answers_usd + tasks_usd, slope

    def search(self, blocks: tuple[tuple[int, int], ...] = BLOCKS, seed: int = 0) -> Dual:
        """Lowers U(q) from where it is lower: no prices, or those of the cheapest rent."""
        rng = np.random.default_rng(seed)
        scale = self._scale()[:, None]
        starts = [np.zeros((self.stations, self.buckets))] + [self._rent()] * bool(len(self.rented))
        best, kept = min(((self.evaluate(prices)[0], prices) for prices in starts), key=lambda found: found[0])
        first_gap_usd = FIRST_GAP_SHARE * max(abs(best - self.options.shared_usd), 1e-9)
        share = min(1.0, max(LEAST_SHARE, MANY_OPTIONS / max(len(self.options.request), 1)))
        for width, steps in blocks:
            gap_usd = first_gap_usd
            prices, direction, failures = kept, np.zeros_like(kept), 0
            for _ in range(round(share * steps)):
                jittered = prices + JITTER * scale * rng.random(prices.shape)
                bound, slope = self.evaluate(jittered)
                failures += 1
                if bound < best:
                    failures = 0 if bound < best - 0.05 * gap_usd else failures
                    best, kept = bound, jittered
                elif failures > PATIENCE_STEPS:
                    gap_usd, failures, prices, direction = 0.5 * gap_usd, 0, kept, np.zeros_like(kept)
                    if gap_usd < LAST_GAP_SHARE * first_gap_usd:
                        break
                    continue
                direction = scale * _by_block(slope, width) + MOMENTUM * direction
                direction[(prices <= 0.0) & (direction > 0.0)] = 0.0
                size = float(np.square(direction).sum())
                if size == 0.0:
                    break
                prices = np.maximum(prices - (bound - best + gap_usd) / size * scale * direction, 0.0)
        return Dual(best, kept)

    def _rent(self) -> Floats:
        """(S, B) price of the cheapest replica that each pool can rent, 0 if none, or after the horizon."""
        cheapest_usd = np.full(self.stations, np.inf)
        np.minimum.at(cheapest_usd, self.options.capacity.rented_from, self.options.capacity.rent_usd)
        paid = self.bucket_s * np.arange(self.buckets) < self.options.horizon_s
        return np.where(np.isfinite(cheapest_usd), cheapest_usd, 0.0)[:, None] * paid

    def _scale(self) -> Floats:
        """(S,) a typical price: what a request is worth over the work it takes."""
        o = self.options
        scale = np.full(self.stations, 1e-9)
        for s in range(self.stations):
            mine = (o.station == s) & (o.prefill_s + o.decode_s > 0.0)
            if mine.any():
                scale[s] = max(float(np.median(np.abs(o.value_usd[mine]) / (o.prefill_s + o.decode_s)[mine])), 1e-9)
        return scale


class _Windows:
    """Ranges of buckets [first, last] of a station, prepared for range minima."""

    def __init__(self, station: Ints, first: Ints, last: Ints, buckets: int) -> None:
        self.first, self.last = first, last
        self.level = np.floor(np.log2(last - first + 1)).astype(np.int64)
        self.left = station * buckets + first
        self.right = station * buckets + last - (1 << self.level) + 1


class _RangeMin:
    """Sparse table: the cheapest bucket of every run of 2^k buckets."""

    def __init__(self, prices: Floats) -> None:
        self.flat = prices.ravel()
        stations, buckets = prices.shape
        at = np.arange(stations * buckets).reshape(stations, buckets)
        levels = [at]
        width = 1
        while 2 * width <= buckets:
            left, right = levels[-1][:, : buckets - width], levels[-1][:, width:]
            cheaper = np.where(self.flat[left] <= self.flat[right], left, right)
            levels.append(np.concatenate([cheaper, levels[-1][:, buckets - width :]], axis=1))
            width *= 2
        self.cheapest = np.stack([level.ravel() for level in levels])

    def lowest(self, windows: _Windows) -> tuple[Floats, Ints]:
        """Price and flat index of the cheapest bucket of each window."""
        left = self.cheapest[windows.level, windows.left]
        right = self.cheapest[windows.level, windows.right]
        at = np.where(self.flat[left] <= self.flat[right], left, right)
        return self.flat[at], at


def _by_block(slope: Floats, width: int) -> Floats:
    """The mean slope over blocks of `width` buckets."""
    if width == 1:
        return slope
    starts = np.arange(0, slope.shape[1], width)
    lengths = np.diff(np.append(starts, slope.shape[1]))
    return np.asarray(np.repeat(np.add.reduceat(slope, starts, axis=1) / lengths, lengths, axis=1))
