"""True P(good answer) of a request on every tier, and what predicts it.

P(good | tier, task, d) = (1 - n) Phi(ability[tier, task] - slope[tier] d) with difficulty d ~ N(0, 1). The public
prior (`marginroute.quality.prior_p_good`) knows the tier and a noisy signal of d, not the task: what a task changes
has to be learned from outcomes.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

from marginroute.quality import normal_cdf

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class QualityTruth:
    """How well tiers answer tasks.

    Attributes:
        ability: (T, J) probit of P(good) at zero difficulty, per tier and task.
        slope: (T,) fall of the probit per standard deviation of difficulty.
        prior_ability: (T,) the public prior's ability, one figure per tier.
        nobody_can_share: share of prompts that no tier answers well.
        signal_correlation: correlation of signal and difficulty, in (0, 1].
    """

    ability: tuple[tuple[float, ...], ...]
    slope: tuple[float, ...]
    prior_ability: tuple[float, ...]
    nobody_can_share: float
    signal_correlation: float

    def p_good(self, task_index: Array, difficulty: Array) -> Array:
        """(M, T) true P(good answer) from (M,) tasks and (M,) difficulties."""
        ability = np.array(self.ability).T[task_index]
        probit = ability - np.array(self.slope) * difficulty[:, None]
        return (1.0 - self.nobody_can_share) * normal_cdf(probit)

    def signal(self, difficulty: Array, normal: Array) -> Array:
        """(M,) observable signal: difficulty plus noise, standardised, with the stated correlation."""
        rho = self.signal_correlation
        return rho * difficulty + np.sqrt(1.0 - rho * rho) * normal


def mean_ability(ability: Array, slope: float, task_share: Array) -> float:
    """The one ability that, over all difficulties, answers as many requests well as (J,) abilities by task do."""
    spread = np.sqrt(1.0 + slope * slope)
    mean = float(np.asarray(task_share) @ normal_cdf(np.asarray(ability) / spread))
    return float(NormalDist().inv_cdf(min(max(mean, 1e-9), 1.0 - 1e-9)) * spread)
