"""True P(good answer) of a request on every tier, what predicts it, and whether the answers turn out good.

With factors x ~ N(0, I) of the prompt, hidden; the first is difficulty d, the others say which kind of skill it takes:

    P(good | tier, task, x) = (1 - n[task]) Phi(ability[tier, task] - slope[tier] d - loadings[tier] . x_2..)

Luck. `shared`: one uniform number per prompt decides for all tiers, so that a tier fails only where every tier with a
smaller P(good) fails too. `independent`: nobody can answer a share n of the prompts, and on the others every tier has
a number of its own; this is how outcome tables look (docs/quality.md).

What is observed. The public prior (`marginroute.quality.prior_p_good`) knows the tier and a noisy signal z of d with
correlation rho, not the task: what a task changes has to be learned from outcomes. A *predictor* (`sees_task`) knows
the task and a signal of every factor, each with correlation rho, and shows the P(good) that follows by Bayes' rule:

    P(good | z, task) = (1 - n) Phi((ability - rho (slope z_1 + loadings . z_2..)) / sqrt(1 + (1 - rho^2) r^2))

with r^2 = slope^2 + |loadings|^2. It is calibrated, and rho sets its area under the ROC curve (`with_auc`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Any

import numpy as np

from marginroute.errors import InputError
from marginroute.quality import normal_cdf, prior_p_good

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class QualityTruth:
    """How well tiers answer tasks.

    Attributes:
        ability: (T, J) probit of P(good) for an average prompt that somebody can answer, per tier and task.
        slope: (T,) fall of the probit per standard deviation of difficulty.
        prior_ability: (T,) the public prior's ability, one figure per tier.
        nobody_can_share: share of prompts that no tier answers well, over all tasks.
        signal_correlation: correlation of signals and factors, in (0, 1].
        loadings: (T, K - 1) fall of the probit per standard deviation of the other factors; empty: difficulty alone.
        task_nobody_can: (J,) that share by task; empty: the same for all.
        independent_luck: whether every tier has its own luck.
        sees_task: whether a predictor is observed in place of the public prior.
    """

    ability: tuple[tuple[float, ...], ...]
    slope: tuple[float, ...]
    prior_ability: tuple[float, ...]
    nobody_can_share: float
    signal_correlation: float
    loadings: tuple[tuple[float, ...], ...] = ()
    task_nobody_can: tuple[float, ...] = ()
    independent_luck: bool = False
    sees_task: bool = False

    @property
    def n_factors(self) -> int:
        """K, difficulty included."""
        return 1 + (len(self.loadings[0]) if self.loadings else 0)

    @property
    def unseen_variance(self) -> Array:
        """(T,) variance of the probit from the factors that the public prior has no signal of."""
        return np.square(np.array(self.loadings)).sum(axis=1) if self.loadings else np.zeros(len(self.slope))

    def nobody_can(self, task_index: Array) -> Array | float:
        """Share of prompts that nobody can answer: (M, 1) by task, or one figure."""
        return np.array(self.task_nobody_can)[task_index][:, None] if self.task_nobody_can else self.nobody_can_share

    def p_good(
        self, task_index: Array, difficulty: Array, others: Array | None = None, shift: Array | None = None
    ) -> Array:
        """(M, T) true P(good answer) from (M,) tasks, (M,) difficulties, (M, K - 1) other factors, (M, T) drift."""
        ability = np.array(self.ability).T[task_index] + (0.0 if shift is None else shift)
        probit = ability - np.array(self.slope) * difficulty[:, None]
        if others is not None:
            probit -= others @ np.array(self.loadings).T
        return (1.0 - self.nobody_can(task_index)) * normal_cdf(probit)

    def signal(self, factor: Array, normal: Array) -> Array:
        """Observable signal of a factor, any shape: factor plus noise, standardised, with the stated correlation."""
        rho = self.signal_correlation
        seen: Array = rho * factor + np.sqrt(1.0 - rho * rho) * normal
        return seen

    def observed(self, task_index: Array, signal: Array, other_signals: Array | None = None) -> Array:
        """(M, T) P(good) by the public prior, or by a predictor that sees (M, K - 1) signals of the other factors."""
        slope, rho = np.array(self.slope), self.signal_correlation
        if not self.sees_task:
            prior = np.array(self.prior_ability)
            return prior_p_good(prior, slope, signal, rho, self.nobody_can_share, self.unseen_variance)
        ability = np.array(self.ability).T[task_index]
        unseen: Array | float = 0.0
        if other_signals is not None:
            ability = ability - rho * other_signals @ np.array(self.loadings).T
            unseen = (1.0 - rho * rho) * self.unseen_variance
        return prior_p_good(ability, slope, signal, rho, self.nobody_can(task_index), unseen)

    def good(self, task_index: Array, p_good: Array, uniform: Array, luck: Array | None) -> Array:
        """(M, T) u1 outcomes from (M,) uniform numbers and, with independent luck, (M, T) further ones."""
        if luck is None:
            return (uniform[:, None] < p_good).astype(np.uint8)
        able = 1.0 - self.nobody_can(task_index)
        return ((uniform[:, None] < able) & (luck * able < p_good)).astype(np.uint8)


@dataclass(frozen=True, eq=False)
class QualityDraw:
    """Quality of M prompts, outcomes still open.

    Attributes:
        signal: (M,) observable signal of difficulty.
        p_good_prior: (M, T) observable P(good).
        p_good: (M, T) true P(good).
        luck: (M, T) uniform numbers, or None where luck is shared.
    """

    signal: Array
    p_good_prior: Array
    p_good: Array
    luck: Array | None


def draw_quality(
    truth: QualityTruth, rng: np.random.Generator, task_index: Array, source: Array, shift: Array | None = None
) -> QualityDraw:
    """Draws factors and signals; row i copies its prompt from row `source[i]`, but for what (M, T) drifts add.

    Whatever a one-factor world does not need comes from a generator of its own, so that its draws stay what they are.
    """
    size, k = len(source), truth.n_factors - 1
    normal = rng.standard_normal((2, size))[:, source]
    signal = truth.signal(normal[0], normal[1])
    others = other_signals = luck = None
    if k or truth.independent_luck:
        extra = rng.spawn(1)[0]
        if k:
            more = extra.standard_normal((2, size, k))[:, source]
            others, other_signals = more[0], truth.signal(more[0], more[1])
        if truth.independent_luck:
            luck = extra.random((size, len(truth.slope)))[source]
    return QualityDraw(
        signal,
        truth.observed(task_index, signal, other_signals),
        truth.p_good(task_index, normal[0], others, shift),
        luck,
    )


def mean_ability(ability: Array, slope: float, task_share: Array, unseen_variance: float = 0.0) -> float:
    """The one ability that, over all prompts, answers as many requests well as (J,) abilities by task do."""
    spread = np.sqrt(1.0 + slope * slope + unseen_variance)
    mean = float(np.asarray(task_share) @ normal_cdf(np.asarray(ability) / spread))
    return float(NormalDist().inv_cdf(min(max(mean, 1e-9), 1.0 - 1e-9)) * spread)


def predictor_auc(truth: QualityTruth, task_share: Array) -> Array:
    """(T,) area under the ROC curve of the observed predictor against outcomes, over the mix of tasks.

    For a calibrated P with density w: AUC = sum of w_i P_i w_j (1 - P_j) over P_j < P_i (ties count half), divided by
    the products of the shares of good and bad answers.
    """
    grid = np.linspace(-6.0, 6.0, 601)
    weight = np.exp(-0.5 * grid * grid)
    weight = np.asarray(task_share)[:, None] * (weight / weight.sum())
    rho, task = truth.signal_correlation, np.arange(len(task_share))
    able = np.broadcast_to(1.0 - truth.nobody_can(task), (len(task_share), 1))
    found = []
    for ability, slope, unseen in zip(truth.ability, truth.slope, truth.unseen_variance, strict=True):
        r = np.sqrt(slope * slope + unseen)
        spread = np.sqrt(1.0 + (1.0 - rho * rho) * r * r)
        p = able * normal_cdf((np.array(ability)[:, None] - rho * r * grid) / spread)
        order = np.argsort(p, axis=None, kind="stable")
        good, bad = (weight * p).ravel()[order], (weight * (1.0 - p)).ravel()[order]
        found.append(float(good @ (np.cumsum(bad) - 0.5 * bad) / (good.sum() * bad.sum())))
    return np.array(found)


def with_auc(truth: QualityTruth, task_share: Array, auc: float) -> QualityTruth:
    """The same truth under a predictor whose AUC, averaged over tiers, is `auc`: sets the signals' correlation.

    Raises:
        InputError: no correlation reaches that AUC: the tasks alone tell more, or the factors say less.
    """

    def at(rho: float) -> QualityTruth:
        return replace(truth, sees_task=True, signal_correlation=rho)

    def mean(rho: float) -> float:
        return float(predictor_auc(at(rho), task_share).mean())

    low, high = 1e-6, 1.0
    least, most = mean(low), mean(high)
    if not least <= auc <= most:
        raise InputError(
            f"{auc:g} cannot be reached; legal is {least:.3f} (task alone) to {most:.3f} (all factors known)"
        )
    for _ in range(50):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if mean(middle) < auc else (low, middle)
    return at(high)
