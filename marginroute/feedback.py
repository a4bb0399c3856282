"""P(good answer) corrected by what users and validators show, without labels: a Bayesian update on a grid.

The gateway predicts p for a tier and task (public prior or predictor). The truth is taken to be off by a shift b of
its log-odds, one per tier and task, b ~ N(0, PRIOR_SD^2):

    P(good) = 1 / (1 + exp(-(logit p + b)))

An answer shows signals s (thumb, regeneration, ...), independent given whether it was good. Their weights, P(s |
good) and P(s | bad), are stated in `CHANNELS` and can be replaced. One answer multiplies the posterior of its cell by

    P(s | b) = P(good) prod P(s | good) + (1 - P(good)) prod P(s | bad)

Each answer is judged against its own p, so it does not matter that hard prompts go to the large model, or that only
the chosen one is ever seen, as long as p holds what the choice was made on. A channel that is not connected is left
out of an answer's signals and moves nothing; one that is connected and silent (`none`) is evidence as stated.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from marginroute.errors import InputError
from marginroute.view import Array

Channels = Mapping[str, Mapping[str, tuple[float, float]]]

FORMAT = 1
PRIOR_SD = 1.0  # of the shift in log-odds
GRID = np.linspace(-5.0, 5.0, 201)

# channel -> signal -> (P(signal | good), P(signal | bad)). Assumptions, to be replaced by what a labelled sample shows:
# most users give no thumb; a bad answer is asked again six times as often and fails its validator 16 times as often.
CHANNELS: dict[str, dict[str, tuple[float, float]]] = {
    "label": {"good": (0.98, 0.02), "bad": (0.02, 0.98)},
    "thumb": {"up": (0.05, 0.01), "down": (0.01, 0.08), "none": (0.94, 0.91)},
    "regenerated": {"yes": (0.05, 0.30), "no": (0.95, 0.70)},
    "validation": {"failed": (0.05, 0.80), "passed": (0.95, 0.20)},
    "escalated": {"yes": (0.04, 0.40), "no": (0.96, 0.60)},
}


def weights_of(signals: Mapping[str, str], channels: Channels) -> tuple[float, float]:
    """P(signals | good) and P(signals | bad) of one answer.

    Raises:
        InputError: an unknown channel or signal.
    """
    good = bad = 1.0
    for channel, signal in signals.items():
        known = channels.get(channel)
        if known is None:
            raise InputError(f"feedback channel {channel!r} is unknown; legal: {', '.join(channels)}")
        if signal not in known:
            raise InputError(f"feedback {channel} = {signal!r}; legal: {', '.join(known)}")
        good, bad = good * known[signal][0], bad * known[signal][1]
    return good, bad


def check_channels(channels: Channels) -> None:
    """Refuses weights that are no probabilities.

    Raises:
        InputError: a weight outside (0, 1), or a channel whose weights do not add up to 1.
    """
    for channel, known in channels.items():
        for side in (0, 1):
            weights = [pair[side] for pair in known.values()]
            if not all(0.0 < w < 1.0 for w in weights) or abs(sum(weights) - 1.0) > 1e-6:
                raise InputError(f"feedback channel {channel!r}: weights {weights}; legal is above 0, adding up to 1")


@dataclass(eq=False)
class QualityPosterior:
    """What feedback says of T tiers and J tasks.

    Attributes:
        tiers, tasks: names.
        channels: weights of the signals.
        half_life: answers of a cell after which evidence counts half; inf: for ever.
        log_likelihood: (T, J, G) of the shifts in `GRID`, up to a constant.
        answers: (T, J) answers with at least one signal, not discounted.
    """

    tiers: tuple[str, ...]
    tasks: tuple[str, ...]
    channels: Channels = field(default_factory=lambda: CHANNELS)
    half_life: float = np.inf
    log_likelihood: Array = field(init=False)
    answers: Array = field(init=False)

    def __post_init__(self) -> None:
        check_channels(self.channels)
        if not self.half_life > 0.0:
            raise InputError(f"half life {self.half_life} answers; legal is above 0")
        shape = len(self.tiers), len(self.tasks)
        self.log_likelihood, self.answers = np.zeros((*shape, len(GRID))), np.zeros(shape, dtype=np.int64)

    def update(self, tier: int, task: int, p_good: float, signals: Mapping[str, str]) -> None:
        """One answer: predicted `p_good` before any shift, and the signals that it got; none moves nothing.

        Raises:
            InputError: an unknown channel or signal.
        """
        if not signals:
            return
        good, bad = weights_of(signals, self.channels)
        p = np.minimum(np.maximum(p_good, 1e-6), 1.0 - 1e-6)
        shifted = 1.0 / (1.0 + np.exp(-(np.log(p / (1.0 - p)) + GRID)))
        cell = self.log_likelihood[tier, task]
        cell *= 0.5 ** (1.0 / self.half_life)
        cell += np.log(shifted * good + (1.0 - shifted) * bad)
        cell -= cell.max()
        self.answers[tier, task] += 1

    def shift(self) -> tuple[Array, Array]:
        """Mean and standard deviation (T, J) of the shift in log-odds; exactly 0 and about `PRIOR_SD` without data."""
        log_p = self.log_likelihood - 0.5 * np.square(GRID / PRIOR_SD)
        weight = np.exp(log_p - log_p.max(axis=2, keepdims=True))
        weight /= weight.sum(axis=2, keepdims=True)
        mean = np.where(self.answers > 0, weight @ GRID, 0.0)
        return mean, np.sqrt(np.maximum(weight @ np.square(GRID) - np.square(weight @ GRID), 0.0))

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        mean, deviation = self.shift()
        return {
            "format": FORMAT,
            "tiers": list(self.tiers),
            "tasks": list(self.tasks),
            "channels": {name: {s: list(pair) for s, pair in known.items()} for name, known in self.channels.items()},
            "half_life": self.half_life if np.isfinite(self.half_life) else None,
            "answers": self.answers.tolist(),
            "shift": np.round(mean, 6).tolist(),
            "shift_sd": np.round(deviation, 6).tolist(),
            "log_likelihood": np.round(self.log_likelihood, 4).tolist(),
        }

    @staticmethod
    def from_dict(data: dict[str, Any], name: str) -> QualityPosterior:
        """The inverse of `to_dict`, to 4 digits of the log-likelihood.

        Raises:
            InputError: not such data; `name` says which file.
        """
        try:
            if data["format"] != FORMAT:
                raise InputError(f"{name} has feedback format {data['format']}; legal is {FORMAT}")
            half_life = np.inf if data["half_life"] is None else float(data["half_life"])
            channels = {c: {s: (float(g), float(b)) for s, (g, b) in k.items()} for c, k in data["channels"].items()}
            posterior = QualityPosterior(tuple(data["tiers"]), tuple(data["tasks"]), channels, half_life)
            values, answers = np.array(data["log_likelihood"], dtype=np.float64), np.array(data["answers"])
            if values.shape != posterior.log_likelihood.shape or answers.shape != posterior.answers.shape:
                raise ValueError("shape")
            if not np.isfinite(values).all():
                raise ValueError("not finite")
            posterior.log_likelihood, posterior.answers = values, answers.astype(np.int64)
        except (KeyError, TypeError, ValueError, AttributeError):
            raise InputError(f"{name} is not a feedback file; legal is one that marginroute feedback wrote") from None
        return posterior


def load_posterior(path: str) -> QualityPosterior:
    """Reads a file of `marginroute feedback`.

    Raises:
        InputError: unreadable or something else.
    """
    try:
        with open(path, encoding="utf-8") as file:
            data = json.load(file)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); legal is a file of marginroute feedback") from None
    except ValueError:
        data = {}
    return QualityPosterior.from_dict(data, path)


def shifted(p_good: Array, shift: Array) -> Array:
    """Probabilities with a shift added to their log-odds; a shift of 0 gives back what was put in, to the last bit."""
    p = np.minimum(np.maximum(p_good, 1e-9), 1.0 - 1e-9)
    moved: Array = np.where(shift == 0.0, p_good, 1.0 / (1.0 + np.exp(-shift) * (1.0 - p) / p))
    return moved
