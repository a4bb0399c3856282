"""Fits P(good answer) on logged outcomes: the correction of the public prior that `marginroute.quality` runs."""

from __future__ import annotations

import numpy as np
from scipy.optimize import minimize

from marginroute.quality import FittedQuality, reuse_columns
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


def fit_reuse(task: Array, prior: Array, similarity: Array, age_s: Array, good: Array, n_tasks: int) -> Array:
    """P(good) of a stored answer: ridge logistic regression by task, towards the prior.

    Args:
        task: (B,) index of the task type.
        prior: (B,) prior P(good) of the stored answer, as the View shows it.
        similarity: (B,) to the prompt that it was given to.
        age_s: (B,) since then.
        good: (B,) 0 or 1; only resolved outcomes.
        n_tasks: J.

    Returns:
        (J, 4) for `FittedQuality.reuse`.
    """
    clipped = np.clip(prior, 1e-6, 1.0 - 1e-6)
    columns = reuse_columns(np.log(clipped / (1.0 - clipped)), similarity, age_s)
    known = np.array([0.0, 1.0, 0.0, 0.0])

    def loss(x: Array) -> tuple[float, Array]:
        own = x.reshape(n_tasks, 4)
        logit = (columns * (known + own[task])).sum(axis=1)
        residual = 1.0 / (1.0 + np.exp(-logit)) - good
        gradient = np.zeros((n_tasks, 4))
        np.add.at(gradient, task, residual[:, None] * columns)
        value = np.logaddexp(0.0, logit).sum() - (good * logit).sum() + 0.5 * RIDGE * (x @ x)
        return float(value), gradient.ravel() + RIDGE * x

    found = minimize(loss, np.zeros(4 * n_tasks), jac=True, method="L-BFGS-B").x
    return known + found.reshape(n_tasks, 4)
