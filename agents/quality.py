"""Fits P(good answer) on logged outcomes: the correction of the public prior that `marginroute.quality` runs."""

from __future__ import annotations

import numpy as np
from scipy.optimize import minimize

from marginroute.quality import FittedQuality
from marginroute.view import Array

RIDGE = 5.0  # pull towards the prior, in outcomes: intercept 0, slope 1, no length effect


def fit_quality(
    tier: Array, task: Array, prior: Array, prompt_tokens: Array, good: Array, n_tiers: int, n_tasks: int
) -> FittedQuality:
    """Ridge logistic regression with the prior's logit as offset.

    Args:
        tier: (B,) index of the model that answered.
        task: (B,) index of the task type.
        prior: (B,) prior P(good) of that tier.
        prompt_tokens: (B,).
        good: (B,) 0 or 1; only resolved outcomes, never censored ones counted as bad.
        n_tiers: T.
        n_tasks: J.
    """
    cells = n_tiers * n_tasks
    cell = tier * n_tasks + task
    prior_logit = np.log(prior / (1.0 - prior))
    log_length = np.log(prompt_tokens * 1e-3)

    def loss(x: Array) -> tuple[float, Array]:
        intercept, slope, length = x[:cells], x[cells : 2 * cells], x[2 * cells :]
        logit = prior_logit * (1.0 + slope[cell]) + intercept[cell] + length[tier] * log_length
        p = 1.0 / (1.0 + np.exp(-logit))
        value = np.logaddexp(0.0, logit).sum() - (good * logit).sum() + 0.5 * RIDGE * (x @ x)
        residual = p - good
        gradient = np.concatenate(
            [
                np.bincount(cell, residual, cells),
                np.bincount(cell, residual * prior_logit, cells),
                np.bincount(tier, residual * log_length, n_tiers),
            ]
        )
        return float(value), gradient + RIDGE * x

    x = minimize(loss, np.zeros(2 * cells + n_tiers), jac=True, method="L-BFGS-B").x
    return FittedQuality(
        intercept=x[:cells].reshape(n_tiers, n_tasks),
        slope=1.0 + x[cells : 2 * cells].reshape(n_tiers, n_tasks),
        length=x[2 * cells :],
    )
