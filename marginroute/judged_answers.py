"""What answers that were judged lately say of each model: how many more were good than the P(good) expected."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from marginroute import view as v
from marginroute.latency import RECENT_JUDGED, running_mean, told
from marginroute.view import Array


class JudgedAnswers:
    """Running surprise of each tier and task, as the View shows it.

    Args:
        tiers: how many.
        tasks: how many.
    """

    def __init__(self, tiers: int, tasks: int) -> None:
        self._any = False
        self._surprise = np.zeros((2, tiers, tasks))  # mean, answers
        self._told = np.zeros((tasks, 4, tiers))  # the View's `surprise` to `tier_confidence`

    def note(self, tier: int, task: int, surprise: float) -> None:
        """An answer turned out good (1) or bad (0), which is `surprise` more than was expected."""
        mean, answers = self._surprise[:, tier, task]
        self._surprise[:, tier, task] = running_mean(mean, answers, surprise, RECENT_JUDGED)
        self._any = True
        self._tell(tier)

    def _tell(self, tier: int) -> None:
        mean, answers = self._surprise[:, tier]
        self._told[:, 0, tier], self._told[:, 1, tier] = told(mean * answers, answers)
        self._told[:, 2, tier], self._told[:, 3, tier] = told((mean * answers).sum(), answers.sum())

    def show(self, signals: Array, task: int, tier: Array) -> None:
        """Writes `surprise` to `tier_confidence` into signals (S, C); `tier`: of each candidate that has one."""
        if self._any:
            self._told[task].take(tier, 1, signals[v.SURPRISE : v.TIER_CONFIDENCE + 1, : len(tier)])

    def take_over(self, old: JudgedAnswers, tiers: Mapping[int, int], tasks: Mapping[int, int]) -> None:
        """Goes on where an earlier one ends; its indices and ours of what both know."""
        for theirs, tier in tiers.items():
            for their_task, task in tasks.items():
                self._surprise[:, tier, task] = old._surprise[:, theirs, their_task]
            self._tell(tier)
        self._any = old._any
