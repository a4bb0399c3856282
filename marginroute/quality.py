"""Predicted P(good answer) per model, from what a gateway sees of a prompt.

Notation. Difficulty d ~ N(0, 1) is hidden; the gateway sees a signal z ~ N(0, 1) with corr(z, d) = rho, hence
d | z ~ N(rho z, 1 - rho^2). A tier answers well with probability (1 - n) Phi(a - s d), where a is its ability, s the
slope in difficulty and n the share of prompts that nobody can answer. Averaging over d | z gives the prior:

    P(good | z) = (1 - n) Phi((a - s rho z) / sqrt(1 + s^2 (1 - rho^2)))
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from marginroute import view as v
from marginroute.latency import HALF_CONFIDENT
from marginroute.view import Array, Layout, View

_CACHE_COLUMN = -3  # candidates end with cache, defer, shed

# Hart (1968), algorithm 5666, as given by G. West, "Better approximations to cumulative normal functions" (2005).
_NUMERATOR = (
    3.52624965998911e-02,
    0.700383064443688,
    6.37396220353165,
    33.912866078383,
    112.079291497871,
    221.213596169931,
    220.206867912376,
)
_DENOMINATOR = (
    8.83883476483184e-02,
    1.75566716318264,
    16.064177579207,
    86.7807322029461,
    296.564248779674,
    637.333633378831,
    793.826512519948,
    440.413735824752,
)


def _polynomial(coefficients: tuple[float, ...], x: Array) -> Array:
    """Horner's rule, in one array."""
    total = np.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        total *= x
        total += coefficient
    return total


def normal_cdf(x: Array | float) -> Array:
    """Phi(x), the standard normal distribution function; absolute error below 1e-15, any shape."""
    x = np.asarray(x, dtype=np.float64)
    size = np.asarray(np.minimum(np.abs(x), 37.0))
    below = np.exp(-0.5 * size * size)
    below *= _polynomial(_NUMERATOR, size)
    below /= _polynomial(_DENOMINATOR, size)
    cdf: Array = np.where(x > 0.0, 1.0 - below, below)
    return cdf


def prior_p_good(
    ability: Array,
    slope: Array | float,
    difficulty_signal: Array,
    signal_correlation: float,
    nobody_can_share: Array | float,
    unseen_variance: Array | float = 0.0,
) -> Array:
    """P(good answer) of every tier by its public prior: tier and difficulty signal, not the task.

    Args:
        ability: (T,) probit of P(good) at zero difficulty, averaged over tasks; (..., T) where the task is known.
        slope: (T,) or scalar, fall of that probit per standard deviation of difficulty.
        difficulty_signal: (...,) the signal z.
        signal_correlation: rho in (0, 1].
        nobody_can_share: share of prompts that no tier answers well, a scalar or (..., 1).
        unseen_variance: (T,) or scalar, variance of the probit from what no signal tells of.

    Returns:
        (..., T) probabilities.
    """
    spread = np.sqrt(1.0 + np.square(slope) * (1.0 - signal_correlation * signal_correlation) + unseen_variance)
    probit = (ability - slope * signal_correlation * np.asarray(difficulty_signal)[..., None]) / spread
    return (1.0 - nobody_can_share) * normal_cdf(probit)


@dataclass(frozen=True, eq=False)
class QualityPrior:
    """The public prior with its figures: what a gateway needs to show P(good) of every tier.

    Attributes:
        ability: (T,) probit of P(good) at zero difficulty, averaged over tasks; (J, T) if it knows tasks.
        slope: (T,) fall of that probit per standard deviation of difficulty.
        signal_correlation: of difficulty signal and difficulty, in (0, 1].
        nobody_can_share: share of prompts that no tier answers well; (J,) if it knows tasks.
        unseen_variance: (T,) variance of the probit from what the signal does not tell of; None: 0.
        shared_luck: whether a model is taken to fail only where all of lower P(good) fail too.
    """

    ability: Array
    slope: Array
    signal_correlation: float
    nobody_can_share: float | Array
    unseen_variance: Array | None = None
    shared_luck: bool = True

    def p_good(self, difficulty_signal: Array | float, task: int = 0) -> Array:
        """(..., T) probabilities for (...,) signals of prompts of one task."""
        knows_tasks = self.ability.ndim == 2
        return prior_p_good(
            self.ability[task] if knows_tasks else self.ability,
            self.slope,
            np.asarray(difficulty_signal),
            self.signal_correlation,
            float(np.asarray(self.nobody_can_share)[task]) if knows_tasks else self.nobody_can_share,
            0.0 if self.unseen_variance is None else self.unseen_variance,
        )

    def p_good_of_one(self, difficulty_signal: float, task: int = 0) -> list[float]:
        """`p_good` of one signal, T numbers, to within a rounding error: a gateway asks for every request."""
        keep, rows = self._probits[task if self.ability.ndim == 2 else 0]
        return [keep * math.erfc(slope * difficulty_signal - ability) for ability, slope in rows]

    @cached_property
    def _probits(self) -> list[tuple[float, list[tuple[float, float]]]]:
        """By task: (1 - n) / 2, and by tier the parts of the probit over sqrt(2): Phi(x) = erfc(-x / sqrt(2)) / 2."""
        rho, unseen = self.signal_correlation, 0.0 if self.unseen_variance is None else self.unseen_variance
        spread = np.sqrt(2.0 * (1.0 + np.square(self.slope) * (1.0 - rho * rho) + unseen))
        abilities = np.atleast_2d(self.ability / spread)
        slopes = np.broadcast_to(self.slope * rho / spread, abilities.shape).tolist()
        keep = np.broadcast_to(0.5 * (1.0 - np.asarray(self.nobody_can_share)), len(abilities)).tolist()
        return [(k, list(zip(a, s, strict=True))) for k, a, s in zip(keep, abilities.tolist(), slopes, strict=True)]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for a bundle's manifest."""
        return {
            "ability": self.ability.tolist(),
            "slope": self.slope.tolist(),
            "signal_correlation": self.signal_correlation,
            "nobody_can_share": np.asarray(self.nobody_can_share).tolist(),
            "unseen_variance": None if self.unseen_variance is None else self.unseen_variance.tolist(),
            "shared_luck": self.shared_luck,
        }

    @staticmethod
    def from_dict(data: dict[str, Any]) -> QualityPrior:
        """The inverse of `to_dict`."""
        share, unseen = data["nobody_can_share"], data.get("unseen_variance")
        return QualityPrior(
            ability=np.array(data["ability"], dtype=np.float64),
            slope=np.array(data["slope"], dtype=np.float64),
            signal_correlation=float(data["signal_correlation"]),
            nobody_can_share=np.array(share, dtype=np.float64) if isinstance(share, list) else float(share),
            unseen_variance=None if unseen is None else np.array(unseen, dtype=np.float64),
            shared_luck=bool(data.get("shared_luck", True)),
        )


def expected_good(prior: float, intercept: float, slope: float, length: float, prompt_tokens: float) -> float:
    """P(good) of one answer by `FittedQuality`'s formula; intercept 0, slope 1 and length 0 give the prior."""
    prior = min(max(prior, 1e-6), 1.0 - 1e-6)
    logit = intercept + slope * math.log(prior / (1.0 - prior)) + length * math.log(max(prompt_tokens, 1.0) * 1e-3)
    return 1.0 / (1.0 + math.exp(-logit))


def told_change(surprise: Any, confidence: Any, fit_worth: float) -> Any:
    """Change of P(good) by judged answers, from the View's signals: s / (n + fit_worth)."""
    judged = HALF_CONFIDENT * confidence / (1.0 - confidence)
    return surprise * judged**0.5 / (judged + fit_worth)


def reuse_columns(prior_logit: Array, similarity: Array, age_s: Array) -> Array:
    """(..., 4) what `FittedQuality.reuse` weighs of a stored answer."""
    columns = (np.ones_like(prior_logit), prior_logit, 10.0 * (1.0 - similarity), np.log1p(age_s / 60.0))
    return np.stack(columns, axis=-1)


@dataclass(frozen=True, eq=False)
class FittedQuality:
    """P(good answer) fitted on logged outcomes: a logistic correction of the prior, per tier and task type.

        logit P = intercept[tier, task] + slope[tier, task] * logit(prior) + length[tier] * ln(prompt_tokens / 1000)

    A candidate whose tier is unknown keeps its prior; so does a cached answer, unless its own outcomes were fitted:

        logit P = reuse[task] . (1, logit(prior), 10 (1 - similarity), ln(1 + age / 60 s))

    An adaptive one moves with what it is told of a model: where n answers to the task were judged lately, and s more of
    them were good than it expected, P moves by s / (n + fit_worth).

    Attributes:
        intercept, slope: (T, J).
        length: (T,).
        reuse: (J, 4), or None.
        fit_worth: judged answers that the fit is worth; inf: it stays as it is.
    """

    intercept: Array
    slope: Array
    length: Array
    reuse: Array | None = None
    fit_worth: float = math.inf
    _bound: tuple[Layout, tuple[Array, Array, Array]] | None = field(default=None, init=False, repr=False)

    def of_one(self, prior: float, tier: int, task: int, prompt_tokens: float) -> float:
        """The probability for one answer."""
        intercept, slope = self.intercept[tier, task], self.slope[tier, task]
        return expected_good(prior, float(intercept), float(slope), float(self.length[tier]), prompt_tokens)

    def p_good(self, view: View) -> Array:
        """(..., C) probabilities for the candidates of a view."""
        task = view.request[v.TASK_INDEX].astype(np.int64)
        intercept, slope, length = self.by_candidate(view.layout)
        prior = np.minimum(np.maximum(view.signals[v.P_GOOD_PRIOR], 1e-6), 1.0 - 1e-6)
        log_length = np.log(view.request[v.PROMPT_TOKENS] * 1e-3)[..., None]
        prior_logit = np.log(prior / (1.0 - prior))
        logit = intercept[task] + slope[task] * prior_logit + length * log_length
        if self.reuse is not None:
            nearness = view.signals[v.SIMILARITY : v.ENTRY_AGE_S + 1, ..., _CACHE_COLUMN]
            columns = reuse_columns(prior_logit[..., _CACHE_COLUMN], *nearness)
            logit[..., _CACHE_COLUMN] = (self.reuse[task] * columns).sum(axis=-1)
        fitted: Array = 1.0 / (1.0 + np.exp(-logit))
        if self.fit_worth != math.inf:
            told = view.signals[v.SURPRISE : v.CONFIDENCE + 1]
            fitted = np.clip(fitted + told_change(told[0], told[1], self.fit_worth), 0.0, 1.0)
        return fitted

    def by_candidate(self, layout: Layout) -> tuple[Array, Array, Array]:
        """Intercept (J, C), slope (J, C) and length (C,) of a layout's candidates; kept for the next view."""
        if self._bound is None or self._bound[0] is not layout:
            known = layout.tier >= 0  # a candidate without a tier keeps its prior: 0 + 1 * logit + 0
            intercept = np.where(known, self.intercept[layout.tier].T, 0.0)
            slope = np.where(known, self.slope[layout.tier].T, 1.0)
            bound = (layout, (intercept, slope, np.where(known, self.length[layout.tier], 0.0)))
            object.__setattr__(self, "_bound", bound)
            return bound[1]
        return self._bound[1]

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, for YAML and bundles."""
        plain = {name: getattr(self, name).tolist() for name in ("intercept", "slope", "length")}
        plain |= {} if self.reuse is None else {"reuse": self.reuse.tolist()}
        return plain if self.fit_worth == math.inf else plain | {"fit_worth": self.fit_worth}

    @staticmethod
    def from_dict(data: dict[str, Any]) -> FittedQuality:
        """The inverse of `to_dict`."""
        arrays = {name: np.array(data[name], dtype=np.float64) for name in ("intercept", "slope", "length")}
        reuse = data.get("reuse")
        return FittedQuality(
            **arrays,
            reuse=None if reuse is None else np.array(reuse, dtype=np.float64),
            fit_worth=float(data.get("fit_worth", math.inf)),
        )
