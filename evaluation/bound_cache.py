"""The best that requests can do at given prices, where some may repeat an answer of an earlier one from the cache.

Requests of one tenant with the same prompt form a group. Going through it by arrival, the state is the tier whose
answer is stored (none at first); an executed request may replace it or leave it, a repeated or unserved one leaves it.
The best sequence is found forwards for all groups at once, request by request, and traced back.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

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
        self.unserved_usd, self.cached_usd = options.unserved_usd, options.cached_usd
        requests, tiers = options.cached_usd.shape
        self.tiers = tiers
        cell = options.request * tiers + options.tier
        self.cell, self.starts = np.unique(cell, return_index=True)
        self.shape = (requests, tiers)
        self.elsewhere = options.tasks.task >= 0
        self.alone = np.flatnonzero((options.group < 0) & ~self.elsewhere)
        rows = np.flatnonzero(options.group >= 0)
        rows = rows[np.argsort(options.group[rows], kind="stable")]
        group = options.group[rows]
        rank = np.arange(len(rows)) - np.searchsorted(group, group)
        self.groups = int(group.max(initial=-1)) + 1
        self.turns = [(group[rank == r], rows[rank == r]) for r in range(int(rank.max(initial=-1)) + 1)]

    def best(self, net_usd: Floats) -> tuple[float, Ints]:
        """The maximum in USD, and the options taken, given each option's value less its work at the prices."""
        best_usd = np.full(self.shape, -np.inf)
        if len(self.starts):
            best_usd.ravel()[self.cell] = np.maximum.reduceat(net_usd, self.starts)
        tier = best_usd.argmax(axis=1)
        served_usd = best_usd[np.arange(len(tier)), tier]
        executed = np.where((served_usd > self.unserved_usd) & ~self.elsewhere, tier, NOTHING)
        alone_usd = np.maximum(served_usd, self.unserved_usd)[self.alone].sum()
        grouped_usd = self._grouped(best_usd, served_usd, tier, executed) if self.turns else 0.0
        return float(alone_usd + grouped_usd), self._options(net_usd, best_usd, executed)

    def _grouped(self, best_usd: Floats, served_usd: Floats, tier: Ints, executed: Ints) -> float:
        """Sum over groups; writes the choices of their requests into `executed`."""
        states = self.tiers + 1  # the last one: nothing stored
        total = np.full((self.groups, states), -np.inf)
        total[:, -1] = 0.0
        came_from, chose = [], []
        for group, rows in self.turns:
            now = total[group]
            stay_usd = np.maximum(self.unserved_usd[rows], served_usd[rows])[:, None] + np.zeros((1, states))
            choice = np.where(served_usd[rows] > self.unserved_usd[rows], tier[rows], NOTHING)[:, None]
            choice = np.repeat(choice, states, axis=1)
            repeat = self.cached_usd[rows] > stay_usd[:, :-1]
            stay_usd[:, :-1] = np.where(repeat, self.cached_usd[rows], stay_usd[:, :-1])
            choice[:, :-1][repeat] = NOTHING
            stay = now + stay_usd
            source = now.argmax(axis=1)
            replace = now.max(axis=1)[:, None] + best_usd[rows]
            came = np.tile(np.arange(states), (len(rows), 1))
            replaced = replace > stay[:, :-1]
            came[:, :-1] = np.where(replaced, source[:, None], came[:, :-1])
            choice[:, :-1] = np.where(replaced, np.arange(self.tiers), choice[:, :-1])
            after = stay
            after[:, :-1] = np.maximum(replace, stay[:, :-1])
            total[group] = after
            came_from.append(came)
            chose.append(choice)
        state = total.argmax(axis=1)
        grouped_usd = float(total.max(axis=1).sum())
        for (group, rows), came, choice in zip(reversed(self.turns), reversed(came_from), reversed(chose), strict=True):
            at = np.arange(len(rows))
            executed[rows] = choice[at, state[group]]
            state[group] = came[at, state[group]]
        return grouped_usd

    def _options(self, net_usd: Floats, best_usd: Floats, executed: Ints) -> Ints:
        """Of every executed request the best option of the tier that executes it."""
        rows = np.flatnonzero(executed >= 0)
        cell = rows * self.tiers + executed[rows]
        position = np.searchsorted(self.cell, cell)
        first = self.starts[position]
        ends = np.append(self.starts[1:], len(net_usd))[position]
        taken = first.copy()
        wanted = best_usd.ravel()[cell]
        for offset in range(1, int((ends - first).max(initial=1))):
            better = (first + offset < ends) & (net_usd[np.minimum(first + offset, len(net_usd) - 1)] == wanted)
            taken = np.where(better & (net_usd[taken] != wanted), first + offset, taken)
        return np.asarray(taken)
