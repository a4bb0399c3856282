"""What a verifier's score says of an answer, and of the answers that other models would give.

A verifier (unit tests, a schema check, a judge model) looks at a finished answer. Its raw score is a standard normal
number, shifted up by d / 2 for a good answer and down by d / 2 for a bad one (the binormal model of signal detection;
Green and Swets, Signal Detection Theory and Psychophysics, 1966). Two figures that operators measure fix d and the raw
score t from which an answer passes:

    sensitivity = P(passes | good) = Phi(d/2 - t)        d = Phi^-1(sensitivity) + Phi^-1(specificity)
    specificity = P(fails | bad)   = Phi(d/2 + t)        t = (Phi^-1(specificity) - Phi^-1(sensitivity)) / 2

The *score* that is shown is s = 1 / (1 + exp(-d x raw)): P(good) by Bayes' rule if both were equally likely before.
With a prior p of the model that answered, the answer in hand is good with probability

    q = p s / (p s + (1 - p) (1 - s))

A failure also says something of the prompt. Where one luck decides for all models (a model fails only where all of
lower P(good) fail too), another model with prior p' has

    P(good | score) = q min(p, p') / p + (1 - q) max(p' - p, 0) / (1 - p)

Where every model has a luck of its own, it keeps p'. The model that answered, asked again, gives the same answer unless
it is one of the `fresh_share` that are drawn anew.

Everything here takes plain numbers or arrays, and is compiled by the world as it stands.
"""

from __future__ import annotations

from statistics import NormalDist
from typing import Any

import numpy as np

Number = Any


def separation(sensitivity: float, specificity: float) -> tuple[float, float]:
    """Distance d of the raw scores of good and bad answers, and the raw score t from which an answer passes."""
    of_good, of_bad = NormalDist().inv_cdf(sensitivity), NormalDist().inv_cdf(specificity)
    return of_good + of_bad, 0.5 * (of_bad - of_good)


def score(good: Number, normal: Number, distance: Number) -> Number:
    """The score of an answer that is good (1) or bad (0), from a standard normal number."""
    return 1.0 / (1.0 + np.exp(-distance * (normal + (good - 0.5) * distance)))


def passes_from(distance: float, raw: float) -> float:
    """The score from which an answer passes."""
    return float(1.0 / (1.0 + np.exp(-distance * raw)))


def p_in_hand(prior: Number, seen: Number) -> Number:
    """P(the answer in hand is good), given the prior of who gave it and its score."""
    good, bad = prior * seen, (1.0 - prior) * (1.0 - seen)
    return good / np.maximum(good + bad, 1e-300)


def p_again(prior: Number, in_hand: Number, fresh_share: Number) -> Number:
    """P(good) of the model that gave the answer in hand, asked again."""
    return (1.0 - fresh_share) * in_hand + fresh_share * prior


def p_of_other(other: Number, prior: Number, in_hand: Number, shared_luck: Number) -> Number:
    """P(good) of another model with prior `other`, given that the answer in hand, of prior `prior`, is good with
    probability `in_hand`; with luck of its own it keeps its prior.
    """
    both = in_hand * np.minimum(prior, other) / np.maximum(prior, 1e-300)
    instead = (1.0 - in_hand) * np.maximum(other - prior, 0.0) / np.maximum(1.0 - prior, 1e-300)
    return shared_luck * (both + instead) + (1.0 - shared_luck) * other
