"""Output tokens that an answer is expected to have, by class and task: the bundle's figures, then what comes."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from marginroute.latency import PRIOR_LENGTHS, RECENT_LENGTHS, running_mean
from marginroute.view import Array


class AnswerLengths:
    """Not thread-safe (see `telemetry.GatewayState`).

    Args:
        tokens: (K, J) by the bundle.

    Attributes:
        tokens: (K, J) expected now.
    """

    def __init__(self, tokens: Array) -> None:
        self.tokens = tokens.copy()
        self._weight = np.full_like(tokens, PRIOR_LENGTHS)

    def learn(self, cell: tuple[int, int], tokens: int) -> None:
        """An answer to a class's task had so many tokens."""
        self.tokens[cell], self._weight[cell] = running_mean(
            self.tokens[cell], self._weight[cell], tokens, RECENT_LENGTHS
        )

    def take_over(self, old: AnswerLengths, classes: Mapping[int, int], tasks: Mapping[int, int]) -> None:
        """Goes on where those of an earlier bundle end; the maps lead from its indices to these."""
        for k_old, k in classes.items():
            for j_old, j in tasks.items():
                self.tokens[k, j], self._weight[k, j] = old.tokens[k_old, j_old], old._weight[k_old, j_old]
