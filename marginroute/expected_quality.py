"""P(good answer) of a bundle's candidates, as a View shows it: prior or prediction, feedback, and answers at hand."""

from __future__ import annotations

import math

import numpy as np

from marginroute import verification
from marginroute import view as v
from marginroute.bundle import Bundle
from marginroute.errors import InputError
from marginroute.facts import Trial
from marginroute.feedback import QualityPosterior, shifted
from marginroute.names import index_of
from marginroute.response_cache import Hit, p_reuse
from marginroute.view import Array, Layout


class ExpectedQuality:
    """What one bundle expects of its tiers.

    Args:
        bundle: with its prior, and its predictor if it has one.
        posterior: what feedback says of P(good), if anything.

    Raises:
        InputError: the feedback is of other tiers or tasks.
    """

    def __init__(self, bundle: Bundle, posterior: QualityPosterior | None) -> None:
        self._prior, self._predictor, self._names = bundle.prior, bundle.predictor, bundle.layout.tier_names
        models = () if bundle.predictor is None else bundle.predictor.models
        self._predicted = [t for t, name in enumerate(self._names) if name in models]  # tiers by index
        self._model = [models.index(self._names[t]) for t in self._predicted]
        self._serving = int((bundle.layout.kind <= v.PROVIDER).sum())
        self._tier = bundle.layout.tier[: self._serving]
        self._shift = _shift(bundle.layout, posterior)
        self._shifts = bool(self._shift.any())
        self._latest = [(math.nan, np.zeros(0))] * len(bundle.layout.task_names)  # signal and what it gave, by task

    def of_tiers(self, prompt: str | None, difficulty_signal: float, task: int) -> tuple[Array, float]:
        """(T,) P(good) of the tiers, to read, and the difficulty signal; tiers without predictor keep their prior."""
        if self._predictor is None or prompt is None:
            signal, p_good = self._latest[task]  # gateways without a signal of difficulty always ask the same
            if signal != difficulty_signal:
                p_good = self._shifted(np.array(self._prior.p_good_of_one(difficulty_signal, task)), task)
                self._latest[task] = difficulty_signal, p_good
        else:
            predicted, difficulty_signal = self._predictor.predict(prompt)
            p_good = np.array(self._prior.p_good_of_one(difficulty_signal, task))
            p_good[self._predicted] = predicted[self._model]
            p_good = self._shifted(p_good, task)
        return p_good, difficulty_signal

    def _shifted(self, p_good: Array, task: int) -> Array:
        return shifted(p_good, self._shift[:, task]) if self._shifts else p_good

    def show(self, signals: Array, p_good: Array, cached: Hit | None, trial: Trial | None) -> None:
        """Writes P(good) of every candidate into a View's signals, (S, C), from that of the tiers, (T,).

        Raises:
            InputError: a tier that the bundle does not know.
        """
        c = self._serving
        signals[v.P_GOOD_PRIOR, :c] = p_good.take(self._tier)
        if cached is not None:
            signals[v.P_GOOD_PRIOR, c] = p_good[cached.tier] * p_reuse(cached.similarity)
            signals[v.SIMILARITY, c], signals[v.ENTRY_AGE_S, c] = cached.similarity, cached.age_s
        if trial is not None:
            self._show_trial(trial, p_good, signals)

    def _show_trial(self, trial: Trial, p_good: Array, signals: Array) -> None:
        """What a verifier's score says of every candidate, and the answer in hand in the place of a stored one."""
        tried = [index_of(name, self._names, "tier") for name in trial.tiers]
        c, prior = self._serving, p_good[tried[-1]]
        in_hand = verification.p_in_hand(prior, trial.score)
        known = verification.p_of_other(p_good, prior, in_hand, float(self._prior.shared_luck))
        known[tried[-1]] = verification.p_again(prior, in_hand, trial.fresh_share)
        signals[v.P_GOOD_PRIOR, :c], signals[v.P_GOOD_PRIOR, c] = known.take(self._tier), in_hand
        signals[v.TRIED, :c] = np.isin(self._tier, tried)
        signals[v.SIMILARITY, c], signals[v.ENTRY_AGE_S, c] = 1.0, trial.age_s


def _shift(layout: Layout, posterior: QualityPosterior | None) -> Array:
    """(T, J) shifts of the log-odds of P(good) that feedback calls for; 0 without."""
    if posterior is None:
        return np.zeros((len(layout.tier_names), len(layout.task_names)))
    if (posterior.tiers, posterior.tasks) != (layout.tier_names, layout.task_names):
        raise InputError(
            "the feedback is of other tiers or tasks than the bundle; run marginroute feedback with this one"
        )
    return posterior.shift()[0]
