"""The best that requests can do at given prices, where some may repeat an answer of an earlier one from the cache.

Requests of one tenant with the same prompt form a group. Going through it by arrival, the state is the tier whose
answer is stored (none at first); an executed request may replace it or leave it, a repeated or unserved one leaves it.
The best sequence of each group is found forwards, request by request, and traced back.
"""

# ruff: noqa: ANN001, ANN202 (Numba infers the types of kernels)
from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from envs.kernels import kernel
from evaluation.bound_options import Options

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

NOTHING = -1  # choice of a request that is not executed


class SharedAnswers:
    """Maximises the sum over requests of an episode that are no calls of tasks (`evaluation.bound_tasks`).

    Args:
        options: ordered by request and tier.
    """

    def __init__(self, options: Options) -> None:
        self.unserved_usd, self.cached_usd = options.unserved_usd, np.ascontiguousarray(options.cached_usd)
        requests, tiers = options.cached_usd.shape
        self.tier = options.tier
        self.begins = np.searchsorted(options.request, np.arange(requests + 1))
        self.alone = np.flatnonzero((options.group < 0) & (options.tasks.task < 0))
        rows = np.flatnonzero(options.group >= 0)
        self.rows = rows[np.argsort(options.group[rows], kind="stable")]
        group = options.group[self.rows]
        self.groups = np.searchsorted(group, np.arange(int(group.max(initial=-1)) + 2))
        self._usd = np.empty((3, tiers + 1))
        self._way = np.empty((len(rows), tiers), dtype=np.int64)
        self._came, self._chose = np.empty((2, len(rows), tiers + 1), dtype=np.int64)

    def best(self, net_usd: Floats, taken: Ints) -> float:
        """The maximum in USD, given each option's value less its work at the prices.

        Writes the option that each of these requests takes, -1 for none, into `taken` (M,).
        """
        usd = _alone(self.alone, self.begins, net_usd, self.unserved_usd, taken)
        scratch = self._usd, self._way, self._came, self._chose
        values = net_usd, self.tier, self.unserved_usd, self.cached_usd
        return float(usd + _grouped(self.rows, self.groups, self.begins, *values, *scratch, taken))


@kernel
def _alone(rows, begins, net_usd, unserved_usd, taken):
    total_usd = 0.0
    for i in rows:
        best_usd, best = unserved_usd[i], NOTHING
        for k in range(begins[i], begins[i + 1]):
            if net_usd[k] > best_usd:
                best_usd, best = net_usd[k], k
        taken[i] = best
        total_usd += best_usd
    return total_usd


@kernel
def _grouped(rows, groups, begins, net_usd, tier, unserved_usd, cached_usd, usd, way, came, chose, taken):
    """Sum over groups g of `rows` groups[g] to groups[g + 1] - 1.

    Scratch: usd (3, T + 1), way (R, T) options, came and chose (R, T + 1) by the state after each row; the last state
    is: nothing stored.
    """
    tiers, total_usd = cached_usd.shape[1], 0.0
    before_usd, after_usd, best_usd = usd[0], usd[1], usd[2]
    for g in range(len(groups) - 1):
        before_usd[:] = -np.inf
        before_usd[tiers] = 0.0
        for r in range(groups[g], groups[g + 1]):
            i = rows[r]
            favourite = _best_by_tier(begins[i], begins[i + 1], net_usd, tier, best_usd, way[r])
            served = best_usd[favourite] > unserved_usd[i]
            stay_usd = best_usd[favourite] if served else unserved_usd[i]
            source = _greatest(before_usd)
            for state in range(tiers + 1):
                after_usd[state] = before_usd[state] + stay_usd
                came[r, state], chose[r, state] = state, favourite if served else NOTHING
                if state == tiers:
                    continue
                if cached_usd[i, state] > stay_usd:
                    after_usd[state] = before_usd[state] + cached_usd[i, state]
                    chose[r, state] = NOTHING
                replace_usd = before_usd[source] + best_usd[state]
                if replace_usd > after_usd[state]:
                    after_usd[state] = replace_usd
                    came[r, state], chose[r, state] = source, state
            before_usd, after_usd = after_usd, before_usd
        state = _greatest(before_usd)
        total_usd += before_usd[state]
        for r in range(groups[g + 1] - 1, groups[g] - 1, -1):
            choice = chose[r, state]
            taken[rows[r]] = way[r, choice] if choice >= 0 else NOTHING
            state = came[r, state]
    return total_usd


@kernel
def _best_by_tier(begin, end, net_usd, tier, best_usd, way):
    """Writes the best value and option of each tier, and returns the tier of the best of all."""
    tiers = len(way)
    for t in range(tiers):
        best_usd[t], way[t] = -np.inf, NOTHING
    for k in range(begin, end):
        t = tier[k]
        if net_usd[k] > best_usd[t]:
            best_usd[t], way[t] = net_usd[k], k
    return _greatest(best_usd[:tiers])


@kernel
def _greatest(usd):
    best = 0
    for state in range(1, len(usd)):
        if usd[state] > usd[best]:
            best = state
    return best
