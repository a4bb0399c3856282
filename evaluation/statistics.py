"""Paired statistics over episodes: what an interval in a report means and how it was made.

Every figure "per 1k requests" is a ratio of sums over episodes e = 1..E,

    R = scale * sum_e x_e / sum_e n_e        x_e: USD of episode e,  n_e: exogenous first calls of episode e,

and a comparison of two deciders on the same workloads is the same ratio with x_e = x_e(policy) - x_e(reference).
Episodes are the independent unit, so an episode is resampled whole: numerator, denominator, both deciders together.

The interval is the *studentised* bootstrap (bootstrap-t; Efron & Tibshirani, An Introduction to the Bootstrap, 1993,
ch. 12; Davison & Hinkley, Bootstrap Methods and their Application, 1997, ch. 5). With residuals r_e = x_e - R n_e,
the linearised standard error of a ratio is

    se = sqrt( sum_e r_e^2 / (E (E - 1)) ) / mean_e n_e,

and the interval is [R - t*(97.5 %) se, R - t*(2.5 %) se], where t* = (R* - R) / se* over resamples. It was chosen
over BCa because it adds to second-order accuracy the widening that a small sample needs: for 32 episodes of skewness
1 to 2, BCa covers 92.5-94 % at nominal 95 % and this interval 94.5-95 % (`tests/statistics/test_coverage.py`). Where
one episode in seven suffers a rare large loss, 32 episodes hold too few of them for any of these intervals: BCa then
covers 90 %, this one 92 %, at 48 episodes 93 %. Resamples are multinomial counts, so that B of them for any number
of series are a few matrix products.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

RESAMPLES = 9_999
MIN_EPISODES_TO_STUDENTISE = 8
"""Below it a resample is too often constant for t* to have tails; the Student interval is used instead."""
LEAST_ERROR_SHARE = 0.1
"""A resample whose standard error is below this share of the sample's is degenerate: nearly all its episodes agree."""
MAX_DEGENERATE_SHARE = 0.01
"""With more of them t* has no usable tails (policies that differ in a few episodes only): Student interval."""
FIRST_LOOK_EPISODES = 32
"""Below it a confidence sequence of skewed differences covers 93 %, from it on 95 % or more (test_coverage.py)."""
EXACT_SIGN_FLIP_EPISODES = 16
SIGN_FLIP_DRAWS = 19_999


@dataclass(frozen=True)
class Estimate:
    """A ratio of sums with its 95 % interval; `low` and `high` are NaN where one episode allows none."""

    mean: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether the whole interval lies on one side of zero (False where there is no interval)."""
        return self.low > 0.0 or self.high < 0.0

    @property
    def ci95(self) -> list[float] | None:
        """[low, high] for a document; None where there is none."""
        return None if math.isnan(self.low) else [self.low, self.high]

    def to_dict(self) -> dict[str, Any]:
        """Mean and ci95, for a document."""
        return {"mean": self.mean, "ci95": self.ci95}

    def interval(self, digits: int = 2, sign: str = "") -> str:
        """The interval in figures, never minus zero; "-" where there is none. `sign`: "+" for signs on all."""
        if math.isnan(self.low):
            return "-"
        return f"[{self.low:{sign}z,.{digits}f}, {self.high:{sign}z,.{digits}f}]"

    def words(self, digits: int = 2, sign: str = "") -> str:
        """The mean, and the interval if there is one."""
        shown = f"{self.mean:{sign}z,.{digits}f}"
        return shown if math.isnan(self.low) else f"{shown} {self.interval(digits, sign)}"


def ratio_of_sums(numerator: ArrayLike, denominator: ArrayLike, scale: float = 1.0) -> Floats:
    """Scale * sum over episodes of the numerator / sum over episodes of the denominator.

    Args:
        numerator: (..., E).
        denominator: (..., E) or (E,), broadcast against the numerator.
        scale: 1000 for "per 1k requests".

    Returns:
        (...,); NaN where the denominator sums to zero.
    """
    top = np.asarray(numerator, dtype=np.float64).sum(axis=-1)
    bottom = np.asarray(denominator, dtype=np.float64).sum(axis=-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(bottom == 0.0, np.nan, scale * top / bottom)


def paired_interval(
    numerator: ArrayLike,
    denominator: ArrayLike | None = None,
    *,
    scale: float = 1.0,
    level: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[Floats, Floats, Floats]:
    """Studentised bootstrap interval of a ratio of sums, for any number of series at once.

    For a paired comparison pass the difference of the two deciders' numerators. All series of one call, and all
    calls with one seed and one number of episodes, share their resamples.

    Args:
        numerator: (..., E) per-episode totals.
        denominator: (E,) positive per-episode totals, the same for every series; None means 1 (a plain mean).
        scale: factor of the estimate and its interval.
        level: nominal coverage.
        resamples: number of bootstrap resamples.
        seed: of the resamples.

    Returns:
        estimate, low, high, each (...,). With one episode low and high are NaN.
    """
    x = np.asarray(numerator, dtype=np.float64)
    episodes = x.shape[-1]
    n = np.ones(episodes) if denominator is None else np.asarray(denominator, dtype=np.float64)
    if n.shape != (episodes,) or not (n > 0.0).all():
        raise ValueError(f"denominator must be {episodes} positive numbers, got {n}")
    ratio = x.sum(axis=-1) / n.sum()
    if episodes < 2:
        return scale * ratio, np.full_like(ratio, np.nan), np.full_like(ratio, np.nan)
    residual = x - ratio[..., None] * n
    error = np.sqrt((residual**2).sum(axis=-1) / (episodes * (episodes - 1))) / n.mean()
    t_low, t_high = _student_quantiles(episodes, level)
    low_t, high_t = np.full_like(ratio, t_low), np.full_like(ratio, t_high)
    if episodes >= MIN_EPISODES_TO_STUDENTISE:
        boot_low, boot_high, usable = _studentised_quantiles(residual, n, error, level, resamples, seed)
        low_t, high_t = np.where(usable, boot_low, low_t), np.where(usable, boot_high, high_t)
    return scale * ratio, scale * (ratio - high_t * error), scale * (ratio - low_t * error)


def paired_estimate(
    numerator: ArrayLike, denominator: ArrayLike | None = None, *, scale: float = 1.0, seed: int = 0
) -> Estimate:
    """`paired_interval` of one series (E,) as an `Estimate`."""
    mean, low, high = paired_interval(numerator, denominator, scale=scale, seed=seed)
    return Estimate(float(mean), float(low), float(high))


def confidence_sequence(
    numerator: ArrayLike,
    denominator: ArrayLike | None = None,
    *,
    scale: float = 1.0,
    level: float = 0.95,
    tuned_for: int = 64,
) -> Estimate:
    """Interval that may be looked at after every episode: it covers at all times together with probability `level`.

    The asymptotic confidence sequence of Waudby-Smith, Arbour, Sinha, Kennedy and Ramdas (Time-uniform central limit
    theory and asymptotic confidence sequences, Annals of Statistics 52, 2024, eq. 10): with t episodes, standard error
    s of one, and a = 1 - level, the half width is

        s sqrt( 2 (t r^2 + 1) / (t^2 r^2) log( sqrt(t r^2 + 1) / a ) ),
        r^2 = (-2 log a + log(-2 log a) + 1) / tuned_for,

    narrowest near t = tuned_for. The ratio is linearised as in `paired_interval`.

    Args:
        numerator: (E,) per-episode totals.
        denominator: (E,) positive per-episode totals; None means 1.
        scale: factor of the estimate and its interval.
        level: of coverage at all times together.
        tuned_for: number of episodes for which the sequence is made narrowest.

    Returns:
        low and high are NaN below FIRST_LOOK_EPISODES episodes.
    """
    x = np.asarray(numerator, dtype=np.float64)
    t = len(x)
    n = np.ones(t) if denominator is None else np.asarray(denominator, dtype=np.float64)
    ratio = float(x.sum() / n.sum())
    if t < FIRST_LOOK_EPISODES:
        return Estimate(scale * ratio, float("nan"), float("nan"))
    alpha = 1.0 - level
    per_episode = np.sqrt(np.square(x - ratio * n).sum() / (t - 1)) / n.mean()
    r2 = (-2.0 * np.log(alpha) + np.log(-2.0 * np.log(alpha)) + 1.0) / tuned_for
    grown = t * r2 + 1.0
    half = per_episode * float(np.sqrt(2.0 * grown / (t * t * r2) * np.log(np.sqrt(grown) / alpha)))
    return Estimate(scale * ratio, scale * (ratio - half), scale * (ratio + half))


def sign_flip_p_value(differences: ArrayLike, *, draws: int = SIGN_FLIP_DRAWS, seed: int = 0) -> float:
    """Two-sided paired permutation test: under the null a difference is as likely with either sign.

    Exact by enumeration of all 2^E sign patterns up to 16 episodes; above, Monte Carlo with the observed
    pattern counted in, (hits + 1) / (draws + 1), which keeps the test valid (Phipson & Smyth 2010).

    Args:
        differences: (E,) policy minus reference, one per episode.
        draws: sign patterns drawn when enumeration is too long.
        seed: of those draws.
    """
    x = np.asarray(differences, dtype=np.float64)
    observed = abs(x.sum())
    tolerance = 1e-12 * np.abs(x).sum()
    if len(x) <= EXACT_SIGN_FLIP_EPISODES:
        patterns = np.arange(2 ** len(x))[:, None] >> np.arange(len(x)) & 1
        sums = (2.0 * patterns - 1.0) @ x
        return float(np.mean(np.abs(sums) >= observed - tolerance))
    signs = np.random.default_rng(seed).integers(0, 2, size=(draws, len(x))) * 2.0 - 1.0
    hits = int((np.abs(signs @ x) >= observed - tolerance).sum())
    return (hits + 1) / (draws + 1)


def interquartile_mean(values: ArrayLike) -> Floats:
    """Mean of the middle half along the last axis; the two values at the quartiles count by their fraction.

    Args:
        values: (..., n) with n >= 1.

    Returns:
        (...,).
    """
    x = np.sort(np.asarray(values, dtype=np.float64), axis=-1)
    n = x.shape[-1]
    edges = np.arange(n + 1.0)
    weight = np.clip(np.minimum(edges[1:], 0.75 * n) - np.maximum(edges[:-1], 0.25 * n), 0.0, None)
    return np.asarray(x @ weight / weight.sum())


def holm(p_values: ArrayLike) -> Floats:
    """Holm's step-down adjustment: rejecting results of at most alpha keeps the family-wise error below alpha.

    Args:
        p_values: (m,).

    Returns:
        (m,) adjusted p-values in the order given (Holm 1979).
    """
    p = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p, kind="stable")
    stepped = np.maximum.accumulate((len(p) - np.arange(len(p))) * p[order])
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(stepped, 1.0)
    return adjusted


def zeros(points: Iterable[tuple[float, float]]) -> list[float]:
    """Where a curve through points (x, y) is zero, linear between neighbours; x ascending."""
    ordered = sorted(points)
    between = [a + (b - a) * y_a / (y_a - y_b) for (a, y_a), (b, y_b) in itertools.pairwise(ordered) if y_a * y_b < 0.0]
    return sorted({*between, *(x for x, y in ordered if y == 0.0)})


@functools.lru_cache(maxsize=8)
def _resample_counts(episodes: int, resamples: int, seed: int) -> Floats:
    """(B, E): how often each episode is drawn in each resample of E."""
    rng = np.random.default_rng([seed, episodes])
    counts = rng.multinomial(episodes, np.full(episodes, 1.0 / episodes), size=resamples)
    return np.asarray(counts, dtype=np.float64)


def _studentised_quantiles(
    residual: Floats, n: Floats, error_of_sample: Floats, level: float, resamples: int, seed: int
) -> tuple[Floats, Floats, NDArray[np.bool_]]:
    """Lower and upper quantile of t* per series, and whether its resamples were varied enough to be used.

    With d = R* - R a resample's residuals are r - d n, so sum w (r - d n)^2 = S_rr - 2 d S_rn + d^2 S_nn.
    """
    episodes = len(n)
    w = _resample_counts(episodes, resamples, seed)
    d = (residual @ w.T) / (w @ n)
    square = (residual**2) @ w.T - 2.0 * d * ((residual * n) @ w.T) + d**2 * (w @ n**2)
    error = np.sqrt(np.clip(square, 0.0, None) / (episodes * (episodes - 1))) / (w @ n / episodes)
    floor = np.broadcast_to(LEAST_ERROR_SHARE * error_of_sample[..., None], error.shape)
    t = np.divide(d, np.maximum(error, floor), out=np.zeros_like(d), where=floor > 0.0)
    tail = (1.0 - level) / 2.0
    low, high = np.quantile(t, [tail, 1.0 - tail], axis=-1)
    return low, high, (error < floor).mean(axis=-1) <= MAX_DEGENERATE_SHARE


def _student_quantiles(episodes: int, level: float) -> tuple[float, float]:
    from scipy.special import stdtrit

    t = float(stdtrit(episodes - 1, 0.5 + level / 2.0))
    return -t, t
