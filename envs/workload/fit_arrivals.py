"""Arrival processes fitted to recorded times: bursts by their dispersion, or a hidden Markov chain by likelihood."""

from __future__ import annotations

from typing import Any

import numpy as np

from envs.workload.arrivals_bursts import BurstArrivals, fit_bursts
from envs.workload.statistics import fano

Array = np.ndarray[Any, Any]

_WINDOWS_S = np.array([0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 60.0, 90.0])
_DWELL_S = np.array([0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 60.0, 120.0, 300.0])
_FEWEST_WINDOWS = 10


def fit_arrivals(arrived_at_s: Array, span_s: float, clock_s: float = 0.0) -> BurstArrivals:
    """Bursts whose dispersion in windows of 0.25 to 90 s is that of the recorded arrivals.

    Args:
        arrived_at_s: (M,) ascending.
        span_s: seconds of the recording.
        clock_s: seconds that the recorder rounded to; nothing shorter than ten of them is looked at.
    """
    windows_s = _WINDOWS_S[(10.0 * clock_s <= _WINDOWS_S) & (span_s / _FEWEST_WINDOWS >= _WINDOWS_S)]
    rate_per_s = len(arrived_at_s) / span_s
    if not len(windows_s) or len(arrived_at_s) < _FEWEST_WINDOWS:
        return BurstArrivals(rate_per_s, (), (), ())
    measured = np.array([fano(arrived_at_s, float(window_s)) for window_s in windows_s])
    known = ~np.isnan(measured)
    return fit_bursts(rate_per_s, windows_s[known], measured[known], _DWELL_S, span_s)


def fit_mmpp(arrived_at_s: Array, states: int = 2, steps: int = 200) -> tuple[Array, Array, Array]:
    """Rates per second (S,), mean dwell times in seconds (S,) and jump probabilities (S, S), from counts per second."""
    counts = np.bincount(arrived_at_s.astype(np.int64)).astype(np.float64)
    rate = np.quantile(counts, (np.arange(states) + 0.5) / states) + 0.1
    chain = np.full((states, states), 0.02 / max(states - 1, 1))
    np.fill_diagonal(chain, 0.98)
    initial = np.full(states, 1.0 / states)
    for _ in range(steps):
        emission = np.exp(counts[:, None] * np.log(rate) - rate)
        emission /= emission.max(axis=1, keepdims=True)
        forward, backward = _forward_backward(emission, chain, initial)
        posterior = forward * backward
        posterior /= posterior.sum(axis=1, keepdims=True)
        pairs = chain * (forward[:-1].T @ (_scaled(emission[1:] * backward[1:], forward[:-1] @ chain)))
        chain = pairs / pairs.sum(axis=1, keepdims=True)
        rate = np.maximum((posterior * counts[:, None]).sum(axis=0) / posterior.sum(axis=0), 1e-6)
        initial = posterior[0]
    order = np.argsort(rate)
    rate, chain = rate[order], chain[np.ix_(order, order)]
    leave = 1.0 - np.diag(chain)
    jump = np.where(np.eye(states, dtype=bool), 0.0, chain) / leave[:, None]
    return rate, -1.0 / np.log(np.diag(chain)), jump


def _forward_backward(emission: Array, chain: Array, initial: Array) -> tuple[Array, Array]:
    """(D, S) filtered probabilities and (D, S) backward factors, scaled so that their product is the posterior."""
    forward, backward = np.empty_like(emission), np.ones_like(emission)
    state = initial
    for index, likelihood in enumerate(emission):
        state = (state @ chain if index else state) * likelihood
        state = state / state.sum()
        forward[index] = state
    for index in range(len(emission) - 2, -1, -1):
        factor = chain @ (emission[index + 1] * backward[index + 1])
        backward[index] = factor / (forward[index] @ factor)
    return forward, backward


def _scaled(weighted: Array, predicted: Array) -> Array:
    """Divides each step's factors by the step's total probability."""
    return weighted / (predicted * weighted).sum(axis=1, keepdims=True)
