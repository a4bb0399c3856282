"""Arrival processes fitted to recorded times: bursts by their dispersion, or a hidden Markov chain by likelihood."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from envs.workload.arrivals import MmppArrivals
from envs.workload.arrivals_bursts import BurstArrivals, fano_terms, fit_bursts, non_negative
from envs.workload.statistics import fano, on_clock

Array = np.ndarray[Any, Any]

_WINDOWS_S = np.array([0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 60.0, 90.0])
_DWELL_S = np.array([0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 60.0, 120.0, 300.0])
_FEWEST_WINDOWS = 10
_MORE_SILENT = 0.1  # of all seconds
_LONGEST_CHAIN_S = 20_000
_ALIKE = 0.03  # how firmly time scales of clients are scaled alike, in relative dispersion


def fit_arrivals(arrived_at_s: Array, span_s: float, clock_s: float = 0.0) -> BurstArrivals:
    """Bursts whose dispersion in windows of 0.25 to 90 s is that of the recorded arrivals.

    Args:
        arrived_at_s: (M,) ascending.
        span_s: seconds of the recording.
        clock_s: seconds that the recorder rounded to; windows are multiples of it then, and bursts no shorter.
    """
    rate_per_s = len(arrived_at_s) / span_s
    windows_s, measured = _dispersion(arrived_at_s, span_s, clock_s)
    if not len(windows_s) or len(arrived_at_s) < _FEWEST_WINDOWS:
        return BurstArrivals(rate_per_s, (), (), ())
    return fit_bursts(rate_per_s, windows_s, measured, _DWELL_S[clock_s <= _DWELL_S], span_s)


def _dispersion(arrived_at_s: Array, span_s: float, clock_s: float) -> tuple[Array, Array]:
    """Windows (W,) of which the recording holds enough, and the Fano factors (W,) in them."""
    windows_s = _WINDOWS_S[(clock_s <= _WINDOWS_S) & (span_s / _FEWEST_WINDOWS >= _WINDOWS_S)]
    if clock_s > 0.0:
        windows_s = np.unique(np.rint(windows_s / clock_s)) * clock_s
    ticks_s = on_clock(arrived_at_s, clock_s)
    measured = np.array([fano(ticks_s, float(window_s)) for window_s in windows_s])
    return windows_s[~np.isnan(measured)], measured[~np.isnan(measured)]


def falls_silent(arrived_at_s: Array, span_s: float, bursts: BurstArrivals) -> bool:
    """Whether many more seconds pass without a request than when independent bursts come together."""

    def silent(times_s: Array) -> float:
        return 1.0 - len(np.unique(times_s.astype(np.int64))) / span_s

    return silent(arrived_at_s) - silent(bursts.draw(np.random.default_rng(0), span_s)) > _MORE_SILENT


def as_dispersed(
    parts: list[BurstArrivals], arrived_at_s: Array, span_s: float, clock_s: float = 0.0
) -> list[BurstArrivals]:
    """Independent streams, their bursts of each length scaled so that together they are as dispersed as all requests.

    Clients that were busy at different times vary less together than independent ones would; those that were busy
    together vary more. Time scales are scaled alike as far as the dispersion allows.
    """
    windows_s, measured = _dispersion(arrived_at_s, span_s, clock_s)
    dwell_s = np.unique([dwell for part in parts for dwell in part.dwell_s])
    if not len(windows_s) or not len(dwell_s):
        return parts
    together = fit_bursts(len(arrived_at_s) / span_s, windows_s, measured, _DWELL_S[clock_s <= _DWELL_S], span_s)
    variance = np.zeros(len(dwell_s))  # of the rates of each length, summed
    for part in parts:
        place = np.searchsorted(dwell_s, part.dwell_s)
        np.add.at(variance, place, np.square(np.array(part.share) * np.array(part.cv) * part.rate_per_s))
    wanted = np.array([together.fano(float(window_s)) for window_s in windows_s])
    terms = fano_terms(windows_s, dwell_s) * variance / together.rate_per_s / wanted[:, None]
    target = (wanted - 1.0) / wanted
    alike = max(float(terms.sum(axis=1) @ target / np.square(terms.sum(axis=1)).sum()), 0.0)
    anchor = _ALIKE * np.eye(len(dwell_s))
    factor = non_negative(np.vstack([terms, anchor]), np.append(target, np.full(len(dwell_s), _ALIKE * alike)))
    scaled = []
    for part in parts:
        own = factor[np.searchsorted(dwell_s, part.dwell_s)]
        cv = tuple(float(max(x, 1e-3)) for x in np.array(part.cv) * np.sqrt(own))
        scaled.append(replace(part, cv=cv))
    return scaled


def fit_mmpp(arrived_at_s: Array, states: int = 2, steps: int = 200) -> MmppArrivals:
    """States by Baum-Welch on counts per second, at the mean rate of all arrivals; of long recordings the first hours.

    Args:
        arrived_at_s: (M,) ascending.
        states: S.
        steps: iterations.
    """
    counts = np.bincount(arrived_at_s.astype(np.int64)).astype(np.float64)
    mean_per_s = counts.mean()
    counts = counts[:_LONGEST_CHAIN_S]
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
        pairs += 1e-6 / len(counts)  # a state that is never left in the recording is left after it
        chain = pairs / pairs.sum(axis=1, keepdims=True)
        rate = np.maximum((posterior * counts[:, None]).sum(axis=0) / np.maximum(posterior.sum(axis=0), 1e-12), 1e-6)
        initial = posterior[0]
    order = np.argsort(rate)
    rate, chain = rate[order], chain[np.ix_(order, order)]
    jump = np.where(np.eye(states, dtype=bool), 0.0, chain)
    jump /= jump.sum(axis=1, keepdims=True)
    rows = tuple(tuple(float(x) for x in row) for row in jump)
    process = MmppArrivals(tuple(map(float, rate)), tuple(map(float, -1.0 / np.log(np.diag(chain)))), rows)
    return process.scaled(mean_per_s / process.mean_rate_per_s())


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
