"""P(good answer) of a scenario's tiers from logged outcomes, few of them labelled.

The world answers well with probability (1 - n) Phi(ability[tier, task] - slope d), the gateway sees a signal z of the
difficulty d with correlation rho, so that of a decision with signal z it holds (`marginroute.quality`)

    P(good | z) = (1 - n) Phi((ability - slope rho z) / sqrt(1 + slope^2 (1 - rho^2)))

Each ability is the mode of its posterior, with the scenario's own figure a0 as prior, N(a0, PRIOR_SD^2): a cell that
nobody labelled stays as it was, a few labels move it a little. Labels may be any share of the answers as long as
whether one is labelled does not depend on its outcome given tier, task and signal; who chose the tier does not matter.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from envs.workload.quality import QualityTruth
from marginroute.quality import prior_p_good
from marginroute.view import Array

PRIOR_SD = 1.0  # of an ability, in probits
GRID = np.linspace(-5.0, 5.0, 1001)


@dataclass(frozen=True)
class Labels:
    """Labelled answers: (B,) tier, task, difficulty signal, and 1 for a good answer, 0 for a bad one."""

    tier: Array
    task: Array
    signal: Array
    good: Array

    def __len__(self) -> int:
        return len(self.good)


@dataclass(frozen=True)
class FittedAbilities:
    """Abilities by tier and task.

    Attributes:
        ability: (T, J) mode of the posterior.
        sd: (T, J) its standard deviation.
        labels: (T, J) labelled answers behind it.
    """

    ability: Array
    sd: Array
    labels: Array


def fit_abilities(truth: QualityTruth, labels: Labels) -> FittedAbilities:
    """The abilities that labelled answers speak for, starting from a scenario's."""
    before = np.array(truth.ability)
    ability, sd, count = before.copy(), np.full(before.shape, PRIOR_SD), np.zeros(before.shape, dtype=np.int64)
    for t, k in np.ndindex(before.shape):
        rows = (labels.tier == t) & (labels.task == k)
        count[t, k] = rows.sum()
        if not rows.any():
            continue
        unable = float(np.asarray(truth.nobody_can(np.array([k]))).ravel()[0])
        p = prior_p_good(
            GRID[None, :],
            truth.slope[t],
            labels.signal[rows],
            truth.signal_correlation,
            unable,
            truth.unseen_variance[t],
        )
        p = np.clip(p, 1e-9, 1.0 - 1e-9)  # (B, G)
        good = labels.good[rows][:, None] > 0.5
        log_posterior = np.where(good, np.log(p), np.log1p(-p)).sum(axis=0)
        log_posterior -= 0.5 * np.square((GRID - before[t, k]) / PRIOR_SD)
        weight = np.exp(log_posterior - log_posterior.max())
        weight /= weight.sum()
        mean = float(weight @ GRID)
        ability[t, k] = GRID[int(weight.argmax())]
        sd[t, k] = float(np.sqrt(weight @ np.square(GRID - mean)))
    return FittedAbilities(ability, sd, count)
