"""Two more arrival processes: renewal with Weibull gaps, and bursts on several time scales at once.

*Bursts.* The stream is a sum of Poisson streams with random rates (a Cox process). Stream k carries `share[k]` of the
arrivals; its rate is drawn anew from a Gamma law with mean share[k] r and coefficient of variation cv[k] at the points
of a Poisson process with mean distance dwell_s[k], so its autocovariance falls like exp(-t / dwell_s[k]). What the
streams leave over is plain Poisson. Variances of independent streams add up, hence in a window w

    Fano(w) = 1 + 2 r sum_k c_k t_k (1 - (1 - exp(-w / t_k)) / (w / t_k)),   c_k = (share_k cv_k)^2,   t_k = dwell_s[k]

which is linear in the c_k: measured dispersion at any set of windows is fitted by non-negative least squares.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from envs.workload.arrivals import inside_horizon, unit_gaps

Array = np.ndarray[Any, Any]


def weibull_shape(gap_cv: float) -> float:
    """Shape of the Weibull law with this coefficient of variation: Gamma(1 + 2/k) / Gamma(1 + 1/k)^2 = 1 + cv^2."""
    low, high = math.log(0.05), math.log(100.0)
    for _ in range(60):
        middle = 0.5 * (low + high)
        shape = math.exp(middle)
        excess = math.lgamma(1.0 + 2.0 / shape) - 2.0 * math.lgamma(1.0 + 1.0 / shape) - math.log1p(gap_cv**2)
        low, high = (middle, high) if excess > 0.0 else (low, middle)
    return math.exp(0.5 * (low + high))


@dataclass(frozen=True)
class WeibullArrivals:
    """Renewal process with Weibull gaps.

    Attributes:
        rate_per_s: mean arrivals per second.
        gap_cv: coefficient of variation of the gaps; 1 is Poisson, above 1 bursty.
    """

    rate_per_s: float
    gap_cv: float

    def mean_rate_per_s(self) -> float:
        """Long-run arrivals per second."""
        return self.rate_per_s

    def scaled(self, factor: float) -> WeibullArrivals:
        """The same process with `factor` times the rate."""
        return replace(self, rate_per_s=self.rate_per_s * factor)

    def draw(self, rng: np.random.Generator, horizon_s: float, count: int | None = None) -> Array:
        """Ascending arrival times (M,) in [0, horizon_s); exactly `count` of them if given."""
        shape = weibull_shape(self.gap_cv)
        if count is not None:
            total = np.cumsum(rng.weibull(shape, count + 1))
            return inside_horizon(total[:-1] * (horizon_s / total[-1]), horizon_s)
        passed = np.cumsum(unit_gaps(rng, "weibull", shape, self.rate_per_s * horizon_s)) / self.rate_per_s
        return passed[: np.searchsorted(passed, horizon_s)]


@dataclass(frozen=True)
class BurstArrivals:
    """Poisson arrivals whose rate varies on several time scales; see the module's derivation.

    Attributes:
        rate_per_s: mean arrivals per second.
        share: (K,) of the arrivals, adding up to at most 1.
        dwell_s: (K,) mean seconds for which a stream keeps its rate.
        cv: (K,) coefficient of variation of a stream's rate.
    """

    rate_per_s: float
    share: tuple[float, ...]
    dwell_s: tuple[float, ...]
    cv: tuple[float, ...]

    def mean_rate_per_s(self) -> float:
        """Long-run arrivals per second."""
        return self.rate_per_s

    def scaled(self, factor: float) -> BurstArrivals:
        """The same streams with `factor` times the rate."""
        return replace(self, rate_per_s=self.rate_per_s * factor)

    def fano(self, window_s: float) -> float:
        """Variance over mean of the count in a window."""
        strength = np.square(np.array(self.share) * np.array(self.cv))
        return float(1.0 + self.rate_per_s * (fano_terms(np.array([window_s]), np.array(self.dwell_s)) @ strength)[0])

    def draw(self, rng: np.random.Generator, horizon_s: float, count: int | None = None) -> Array:
        """Ascending arrival times (M,) in [0, horizon_s); exactly `count` of them if given."""
        paths = [self._path(rng, stream, horizon_s) for stream in range(len(self.share))]
        edges_s = np.unique(np.concatenate([[0.0, horizon_s], *(edges for edges, _ in paths)]))
        expected = edges_s * max(1.0 - sum(self.share), 0.0) * self.rate_per_s
        for own_s, passed in paths:
            expected = expected + np.interp(edges_s, own_s, passed)
        size = rng.poisson(expected[-1]) if count is None else count
        return inside_horizon(np.interp(np.sort(rng.random(size)) * expected[-1], expected, edges_s), horizon_s)

    def _path(self, rng: np.random.Generator, stream: int, horizon_s: float) -> tuple[Array, Array]:
        """Times at which one stream's rate changes and arrivals expected up to them."""
        changes = np.sort(rng.random(rng.poisson(horizon_s / self.dwell_s[stream]))) * horizon_s
        edges_s = np.concatenate([[0.0], changes, [horizon_s]])
        shape = max(self.cv[stream], 1e-6) ** -2
        level = rng.gamma(shape, 1.0 / shape, len(edges_s) - 1) * self.share[stream] * self.rate_per_s
        return edges_s, np.append(0.0, np.cumsum(level * np.diff(edges_s)))


def fano_terms(windows_s: Array, dwell_s: Array) -> Array:
    """(W, K) growth of the Fano factor per unit of rate and strength c_k, for windows (W,) and dwell times (K,)."""
    ratio = windows_s[:, None] / dwell_s
    return 2.0 * dwell_s * (1.0 + np.expm1(-ratio) / ratio)


def fit_bursts(
    rate_per_s: float,
    windows_s: Array,
    fano: Array,
    dwell_s: Array,
    span_s: float = math.inf,
    steps: int = 4000,
) -> BurstArrivals:
    """The process whose Fano factors come nearest to measured ones, in relative terms.

    What is measured on a recording of n = span / w windows lacks the variance between recordings. On average it is
    n / (n - 1) (F(w) - F(span) / n), which is what the process is asked to have.

    Args:
        rate_per_s: mean arrivals per second.
        windows_s: (W,) windows.
        fano: (W,) measured there; below 1 counts as 1.
        dwell_s: (K,) time scales to choose from.
        span_s: length of the recording.
        steps: of coordinate descent.
    """
    weight = 1.0 / np.maximum(fano, 1.0)
    seen = fano_terms(windows_s, dwell_s)
    if math.isfinite(span_s):
        number = np.floor(span_s / windows_s)[:, None]
        seen = number / (number - 1.0) * (seen - fano_terms(np.array([span_s]), dwell_s) / number)
    strength = non_negative(rate_per_s * seen * weight[:, None], (np.maximum(fano, 1.0) - 1.0) * weight, steps)
    used = np.flatnonzero(strength > 1e-3 * max(strength.sum(), 1e-12))
    root = np.sqrt(strength[used])
    cv = max(float(root.sum()), 0.25)  # the mildest streams that do; plain Poisson arrivals make up the rest
    share = tuple(float(x) for x in root / cv)
    return BurstArrivals(rate_per_s, share, tuple(float(x) for x in dwell_s[used]), (cv,) * len(used))


def non_negative(terms: Array, target: Array, steps: int = 4000) -> Array:
    """(K,) x >= 0 of least squares |terms x - target|, by coordinate descent; `terms` is (W, K), `target` (W,)."""
    gram, goal = terms.T @ terms, terms.T @ target
    found = np.zeros(terms.shape[1])
    for _ in range(steps):
        for k in range(len(found)):
            found[k] = max(0.0, found[k] + (goal[k] - gram[k] @ found) / gram[k, k])
    return found
