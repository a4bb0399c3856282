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
from evaluation.bound_windows import Ways, downhill, fill_table, net_values, runs, sales, undominated, work_done

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

BUCKET_S, MOST_BUCKETS = 1.0, 10_000
"""Length of a bucket; longer where an episode would have more of them."""
AFTER_HORIZON_S = 120.0
BLOCKS = ((32, 100), (8, 150), (1, 400))
"""(buckets that share a price, steps) of each phase of the search."""
ALONE, TOGETHER = ((8, 60), (1, 100)), ((1, 150),)
"""More phases where replicas are rented: each station alone, then all; a price at the kink of rent holds the others."""
JITTER = 1e-6
FIRST_GAP_SHARE = 0.1
"""First guess of how far the bound can fall, per contribution; halved when PATIENCE_STEPS steps bring nothing."""
PATIENCE_STEPS = 8
LEAST_PROGRESS = 0.01
"""Share of the guess from which a step counts as bringing something."""
LAST_GAP_SHARE = 5e-4
"""A phase of the search ends when the guess has fallen to this share of the first."""
FINER_GAP = 64.0
"""How many times the guess that a phase ends with the next one begins with, at most the first."""
MOMENTUM = 0.9


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
        self._prepare(options)

    def _prepare(self, options: Options) -> None:
        """Windows, and the options that are worth looking at, in the form that kernels take."""
        first = self._bucket(options.from_s)
        last = [self._bucket(until_s) for until_s in (options.prefill_until_s, options.decode_until_s)]
        begins = np.searchsorted(options.request, np.arange(len(options.unserved_usd) + 1))
        kept = np.empty(len(options.request), dtype=np.bool_)
        work_s = options.prefill_s, options.decode_s
        undominated(begins, options.station, options.good, options.value_usd, *work_s, *last, kept)
        self.options = options = options.where(kept)
        self.first, self.prefill_last, self.decode_last = first[kept], last[0][kept], last[1][kept]
        shape = self.stations, self.buckets + 1
        *prefill, levels = runs(options.station, self.first, self.prefill_last, *shape)
        *decode, deeper = runs(options.station, self.first, self.decode_last, *shape)
        self.ways = Ways(options.value_usd, options.prefill_s, options.decode_s, *prefill, *decode)
        self.answers, self.task_answers = SharedAnswers(options), TaskAnswers(options)
        self._usd = np.empty((max(levels, deeper), *shape))
        self._at = np.empty(self._usd.shape, dtype=np.int32)
        self._net_usd = np.empty(len(options.request))
        self._taken = np.empty(len(options.unserved_usd), dtype=np.int64)

    def _bucket(self, time_s: Floats) -> Ints:
        return np.minimum(np.minimum(time_s, 1e12) / self.bucket_s, self.buckets).astype(np.int64)

    def evaluate(self, prices_usd: Floats) -> tuple[float, Floats]:
        """U(q) and its slope (S, B) at prices (S, B) >= 0; prices of unlimited stations are not used."""
        o, capacity = self.options, self.options.capacity
        prices = np.where(self.limited[:, None], prices_usd, 0.0)
        fill_table(prices, self._usd, self._at)
        usd, at = self._usd.ravel(), self._at.ravel()
        net_values(self.ways, usd, self._net_usd)
        total_usd = self.answers.best(self._net_usd, self._taken) + self.task_answers.best(self._net_usd, self._taken)
        work_s = np.zeros((self.stations, self.buckets + 1))
        work_done(self._taken, self.ways, usd, at, work_s.ravel())
        slope = -work_s[:, :-1]
        rented = capacity.rented_from, self.rented, capacity.rent_usd
        total_usd += sales(prices, self.sold, *rented, capacity.burst, slope)
        slope[~self.limited] = 0.0
        return o.shared_usd + total_usd, slope

    def search(self, blocks: tuple[tuple[int, int], ...] = BLOCKS, seed: int = 0) -> Dual:
        """Lowers U(q) from where it is lower: no prices, or those of the cheapest rent."""
        rng = np.random.default_rng(seed)
        scale = self._scale()
        starts = [np.zeros((self.stations, self.buckets))] + [self._rent()] * bool(len(self.rented))
        best, kept = min(((self.evaluate(prices)[0], prices) for prices in starts), key=lambda found: found[0])
        first_gap_usd = gap_usd = FIRST_GAP_SHARE * max(abs(best - self.options.shared_usd), 1e-9)
        for width, steps, moved in self._phases(blocks, scale):
            gap_usd = min(FINER_GAP * gap_usd, first_gap_usd)
            prices, direction, failures = kept.copy(), np.zeros_like(kept), 0
            for _ in range(steps):
                jittered = prices + JITTER * scale[:, None] * rng.random(prices.shape)
                bound, slope = self.evaluate(jittered)
                failures += 1
                if bound < best:
                    failures = 0 if bound < best - LEAST_PROGRESS * gap_usd else failures
                    best, kept = bound, jittered
                elif failures > PATIENCE_STEPS:
                    gap_usd, failures, prices, direction = 0.5 * gap_usd, 0, kept.copy(), np.zeros_like(kept)
                    if gap_usd < LAST_GAP_SHARE * first_gap_usd:
                        break
                    continue
                if not downhill(prices, slope, moved, width, MOMENTUM, bound - best + gap_usd, direction):
                    break
        return Dual(best, kept)

    def _phases(self, blocks: tuple[tuple[int, int], ...], scale: Floats) -> list[tuple[int, int, Floats]]:
        """(buckets that share a price, steps, scale of the stations whose prices move) of each phase."""
        phases = [(width, steps, scale) for width, steps in blocks]
        if len(self.rented):
            alone = [np.where(np.arange(self.stations) == s, scale, 0.0) for s in np.flatnonzero(self.limited)]
            phases += [(width, steps, moved) for width, steps in ALONE for moved in alone]
            phases += [(width, steps, scale) for width, steps in TOGETHER]
        return phases

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
