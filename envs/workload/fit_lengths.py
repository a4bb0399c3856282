"""Mixtures of lognormals fitted to token counts and durations by expectation-maximisation."""

from __future__ import annotations

from typing import Any

import numpy as np

from envs.workload.durations import SecondsMixture
from envs.workload.lengths import LengthMixture

Array = np.ndarray[Any, Any]

_MIN_SIGMA = 0.002  # keeps a component from collapsing onto one token count
_MAX_VALUES = 20_000


def fit_lengths(tokens: Array, components: int, steps: int = 400, restarts: int = 6, seed: int = 0) -> LengthMixture:
    """The lognormal mixture of highest likelihood found by expectation-maximisation.

    Args:
        tokens: (M,) token counts.
        components: B.
        steps: iterations per restart.
        restarts: starts at random quantiles; the best is kept.
        seed: of the starts.
    """
    values, counts = np.unique(tokens, return_counts=True)
    weight, median, sigma = _best(np.log(values), counts / counts.sum(), components, steps, restarts, seed)
    return LengthMixture(weight, median, sigma, int(np.min(tokens)), int(np.max(tokens)))


def fit_seconds(seconds: Array, weight: Array, components: int, steps: int = 200, seed: int = 0) -> SecondsMixture:
    """The lognormal mixture of highest likelihood of durations (M,) that count with weights (M,)."""
    rounded = np.maximum(np.round(seconds, 3), 1e-3)
    values, place = np.unique(rounded, return_inverse=True)
    share = np.bincount(place, weight) / weight.sum()
    return SecondsMixture(*_best(np.log(values), share, components, steps, 4, seed), float(rounded.max()))


def _best(
    values: Array, share: Array, components: int, steps: int, restarts: int, seed: int
) -> tuple[tuple[float, ...], tuple[float, ...], tuple[float, ...]]:
    """Weights, medians and deviations (B,) of the best of several starts, in order of the medians."""
    rng = np.random.default_rng(seed)
    if len(values) > _MAX_VALUES:  # of so many distinct values the distribution function is known well enough
        grid = (np.arange(_MAX_VALUES) + 0.5) / _MAX_VALUES
        values, share = values[np.searchsorted(np.cumsum(share), grid).clip(max=len(values) - 1)], None
        values, counts = np.unique(values, return_counts=True)
        share = counts / counts.sum()
    components = min(components, len(values))
    fits = [_expectation_maximisation(values, share, components, steps, rng) for _ in range(restarts)]
    _, weight, mu, sigma = max(fits, key=lambda fit: fit[0])
    order = np.argsort(mu)
    columns = (weight[order], np.exp(mu[order]), sigma[order])
    first, second, third = (tuple(float(x) for x in column) for column in columns)
    return first, second, third


def _expectation_maximisation(
    values: Array, share: Array, components: int, steps: int, rng: np.random.Generator
) -> tuple[float, Array, Array, Array]:
    """Log-likelihood per request, weights, means and deviations (B,) of ln tokens."""
    starts = np.sort(rng.random(components))
    mu = values[np.searchsorted(np.cumsum(share), starts).clip(max=len(values) - 1)]
    sigma = np.full(components, max((values[-1] - values[0]) / (2.0 * components), _MIN_SIGMA))
    weight = np.full(components, 1.0 / components)
    likelihood = -np.inf
    for _ in range(steps):
        density = weight / sigma * np.exp(-0.5 * np.square((values[:, None] - mu) / sigma)) / np.sqrt(2.0 * np.pi)
        total = density.sum(axis=1) + 1e-300
        likelihood = float(share @ np.log(total))
        owned = density / total[:, None] * share[:, None]
        weight = owned.sum(axis=0) + 1e-12
        mu = owned.T @ values / weight
        sigma = np.sqrt((owned * np.square(values[:, None] - mu)).sum(axis=0) / weight).clip(min=_MIN_SIGMA)
        weight = weight / weight.sum()
    return likelihood, weight, mu, sigma
