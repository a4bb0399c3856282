"""Latent factors of quality, fitted to a table of outcomes: item response theory with a share that nobody can answer.

For item i of category j and model t, with factors x ~ N(0, I_K) of the item, hidden:

    P(good | x) = Phi(ability[t, j] - loading[t] . x),     outcomes of an item independent given x,

except for a share nobody[j] of a category's items, which no model answers. Marginal maximum likelihood by the EM
method of Bock and Aitkin (Psychometrika 46, 1981) on a fixed grid of x; the maximisation is one Fisher scoring step
of a probit regression per model on expected counts. Abilities are pulled towards the model's mean by `ABILITY_RIDGE`
outcomes, loadings towards 0 by `LOADING_RIDGE`. The likelihood does not change when x is rotated: the first factor is
turned into the direction of the mean loading (difficulty; positive for the average model), the others follow by size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from marginroute.quality import normal_cdf

Array = np.ndarray[Any, Any]

GRID = {1: 61, 2: 21, 3: 11}  # nodes per factor
GRID_END = 4.0
ABILITY_RIDGE = 1.0
LOADING_RIDGE = 1.0
MAX_STEPS = 400
TOLERANCE = 1e-8  # nats per outcome


@dataclass(frozen=True, eq=False)
class FactorModel:
    """T models, J categories, K factors.

    Attributes:
        ability: (T, J) probit of P(good) for an average item that somebody can answer.
        loading: (T, K) fall of that probit per standard deviation of each factor; the first is difficulty.
        nobody: (J,) share of items that nobody can answer.
    """

    ability: Array
    loading: Array
    nobody: Array

    def nodes(self) -> tuple[Array, Array, Array]:
        """Grid (Q, K) of factors, its weights (Q,), and P(good) there for items that can be answered, (J, T, Q)."""
        x, weight = grid(self.loading.shape[1])
        p = normal_cdf(self.ability.T[:, :, None] - (self.loading @ x.T)[None])
        return x, weight, np.clip(p, 1e-9, 1.0 - 1e-9)

    def accuracy(self, share: Array, shared_luck: bool = False) -> tuple[Array, Array]:
        """Accuracy (T,) of the models and distribution (T + 1,) of the number of them that are right.

        Args:
            share: (J,) shares of the categories.
            shared_luck: one random number per item decides for all models, as in scenarios with `luck: shared`.
        """
        _, weight, p = self.nodes()
        able = share * (1.0 - self.nobody)
        right = np.einsum("j,q,jtq->t", able, weight, p)
        count = np.zeros(len(right) + 1)
        for j, p_j in enumerate(p):
            count += able[j] * (_shared_counts(p_j) if shared_luck else _counts(p_j)) @ weight
        count[0] += share @ self.nobody
        return right, count


def grid(k: int) -> tuple[Array, Array]:
    """Nodes (Q, K) and weights (Q,) of a standard normal in K dimensions."""
    axis = np.linspace(-GRID_END, GRID_END, GRID[k])
    x = np.stack(np.meshgrid(*[axis] * k, indexing="ij"), axis=-1).reshape(-1, k)
    weight = np.exp(-0.5 * np.square(x).sum(axis=1))
    return x, weight / weight.sum()


def _counts(p: Array) -> Array:
    """(T + 1, Q) distribution of the sum of independent outcomes with probabilities (T, Q)."""
    found = np.zeros((len(p) + 1, p.shape[1]))
    found[0] = 1.0
    for p_t in p:
        found[1:] = found[1:] * (1.0 - p_t) + found[:-1] * p_t
        found[0] *= 1.0 - p_t
    return found


def _shared_counts(p: Array) -> Array:
    """The same where one uniform number decides for all: m are right if it falls between the m-th and (m+1)-th p."""
    falling = -np.sort(-p, axis=0)
    edges = np.concatenate([np.ones((1, p.shape[1])), falling, np.zeros((1, p.shape[1]))])
    found: Array = edges[:-1] - edges[1:]
    return found


def fit_factors(
    good: Array, category: Array, n_factors: int, seed: int = 0, note: Callable[[str], None] = lambda _: None
) -> FactorModel:
    """Maximum likelihood (with the ridges above).

    Args:
        good: (N, T) 1, 0 or NaN.
        category: (N,) index; every index from 0 to J - 1 occurs.
        n_factors: K, 1 to 3.
        seed: of the first loadings.
        note: told the progress.
    """
    t, j = good.shape[1], int(category.max()) + 1
    rng = np.random.default_rng(seed)
    mean = np.clip(np.nanmean(good, axis=0), 0.02, 0.98)
    loading = np.concatenate([np.full((t, 1), 0.8), rng.normal(0.0, 0.3, (t, n_factors - 1))], axis=1)
    model = FactorModel(np.tile(_logit(mean)[:, None], (1, j)), loading, np.full(j, 0.02))
    last = -np.inf
    for step in range(MAX_STEPS):
        model, value = _em_step(model, good, category)
        value /= max(int((~np.isnan(good)).sum()), 1)
        if step % 50 == 0:
            note(f"EM step {step}: {value:.5f} nats per outcome")
        if abs(value - last) < TOLERANCE:
            break
        last = value
    return rotated(model)


def _logit(p: Array) -> Array:
    """1.7 times the probit, near enough for a start."""
    found: Array = np.log(p / (1.0 - p)) / 1.7
    return found


def _em_step(model: FactorModel, good: Array, category: Array) -> tuple[FactorModel, float]:
    """One step, and the log-likelihood before it in nats."""
    x, weight, p = model.nodes()
    known = ~np.isnan(good)
    right = np.where(known, good, 0.0)
    n_models, n_categories = model.ability.shape
    tried, won = (np.zeros((n_models, n_categories, len(weight))) for _ in range(2))
    nobody, total = np.zeros(n_categories), 0.0
    for j in range(n_categories):
        mine = np.flatnonzero(category == j)
        log_p = right[mine] @ np.log(p[j]) + (known[mine] - right[mine]) @ np.log1p(-p[j]) + np.log(weight)
        top = log_p.max(axis=1, keepdims=True)
        joint = np.exp(log_p - top)
        able = (1.0 - model.nobody[j]) * joint.sum(axis=1) * np.exp(top[:, 0])
        none = model.nobody[j] * (right[mine].sum(axis=1) == 0.0)
        total += float(np.log(able + none).sum())
        posterior = joint / joint.sum(axis=1, keepdims=True) * (able / (able + none))[:, None]
        nobody[j] = (none / (able + none)).mean()
        tried[:, j], won[:, j] = known[mine].T.astype(np.float64) @ posterior, right[mine].T @ posterior
    ability, loading = _probit_step(model, x, p, tried, won)
    return FactorModel(ability, loading, nobody), total


def _probit_step(model: FactorModel, x: Array, p: Array, tried: Array, won: Array) -> tuple[Array, Array]:
    """One Fisher scoring step of every model's probit regression on (T, J, Q) expected counts."""
    n_models, n_categories = model.ability.shape
    k = x.shape[1]
    probit = model.ability[:, :, None] - (model.loading @ x.T)[:, None, :]
    density = np.exp(-0.5 * np.square(probit)) / np.sqrt(2.0 * np.pi)
    p = p.transpose(1, 0, 2)
    score = (won - tried * p) * density / (p * (1.0 - p))
    information = tried * np.square(density) / (p * (1.0 - p))
    centre = model.ability.mean(axis=1, keepdims=True)
    gradient = np.concatenate(
        [
            score.sum(axis=2) - ABILITY_RIDGE * (model.ability - centre),
            -score.sum(axis=1) @ x - LOADING_RIDGE * model.loading,
        ],
        axis=1,
    )
    fisher = np.zeros((n_models, n_categories + k, n_categories + k))
    diagonal = np.arange(n_categories)
    fisher[:, diagonal, diagonal] = information.sum(axis=2) + ABILITY_RIDGE
    cross = -information @ x
    fisher[:, :n_categories, n_categories:], fisher[:, n_categories:, :n_categories] = cross, cross.transpose(0, 2, 1)
    fisher[:, n_categories:, n_categories:] = np.einsum("tjq,qa,qb->tab", information, x, x) + LOADING_RIDGE * np.eye(k)
    step = np.clip(np.linalg.solve(fisher, gradient[..., None])[..., 0], -0.5, 0.5)
    ability = np.clip(model.ability + step[:, :n_categories], -5.0, 5.0)
    return ability, np.clip(model.loading + step[:, n_categories:], -4.0, 4.0)


def rotated(model: FactorModel) -> FactorModel:
    """The same model with the first factor along the mean loading and the others by falling size."""
    loading = model.loading
    mean = loading.mean(axis=0)
    if np.linalg.norm(mean) < 1e-12:
        return model
    first = mean / np.linalg.norm(mean)
    rest = loading - np.outer(loading @ first, first)
    others = np.linalg.svd(rest, full_matrices=True)[2][: loading.shape[1] - 1]
    axes = np.concatenate([first[None], others])
    turned = loading @ axes.T
    sign = np.where(turned.sum(axis=0) < 0.0, -1.0, 1.0)
    return FactorModel(model.ability, turned * sign, model.nobody)
