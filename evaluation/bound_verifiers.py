"""What a clairvoyant could make of verifiers: answers that are turned down on purpose, and others in their place.

A request that a verifier looks at has two turns. Its *first* answer pays for a look, whether it passes, is delivered
after all, or is the one that a user leaves for. *Later* answers come after one that was turned down: that one costs at
least the cheapest answer and a look, and gives time (an API may be called later) and, where models are asked anew,
other luck. In the operator's favour the earlier answer takes no capacity and no time, further ones cost nothing, and of
all that luck has in store for a model the best is taken. One in hand that is delivered was worth more at its turn.

What a verifier says depends on outcomes, so nothing short of them bounds what a gateway can make of it: requests with a
verifier, and others with the same prompt, have their outcomes known in every bound.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from envs.plant import Plant
from envs.task_books import attempts
from envs.workload.requests import Workload
from marginroute import verification

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

TOLERANCE = 1e-9


@dataclass(frozen=True)
class Turn:
    """An answer that may be the one that is delivered.

    Attributes:
        rows: (M,) requests that have this turn.
        good: (M, T) outcomes, or their probabilities.
        before_usd: (M,) what was paid until then, looks included.
        later: whether an answer was turned down before.
    """

    rows: Bools
    good: Floats
    before_usd: Floats
    later: bool


def known_outcomes(plant: Plant, workload: Workload) -> Bools:
    """(M,) requests whose outcome a verifier may give away."""
    verified = plant.verifiers["max_attempts"][workload.class_index, workload.task_index] > 0
    keys = np.unique(workload.prompt_key[verified & (workload.prompt_key >= 0)])
    return np.asarray(verified | np.isin(workload.prompt_key, keys))


def turns(plant: Plant, workload: Workload, good: Floats, cheapest_usd: Floats) -> list[Turn]:
    """The turns of all requests.

    Args:
        plant: the scenario's constants.
        workload: the episode.
        good: (M, T) outcomes, or their probabilities; outcomes where `known_outcomes`.
        cheapest_usd: (M,) least that an answer costs.
    """
    everyone = np.ones(workload.n_requests, dtype=np.bool_)
    verifier = plant.verifiers[workload.class_index, workload.task_index]
    verified = verifier["max_attempts"] > 0
    if not verified.any():
        return [Turn(everyone, good, np.zeros(len(good)), False)]
    tokens = workload.prompt_tokens + workload.output_tokens
    look_usd = np.where(verified, verifier["verify_usd"] + verifier["verify_usd_per_token"] * tokens, 0.0)
    luck = attempts(workload.attempt_luck, int(plant.verifiers["max_attempts"].max()))
    score = verification.score(good, luck[:, 0, :1], verifier["distance"][:, None])
    fails = (score < verifier["passes_from"][:, None] * (1.0 + TOLERANCE)).any(axis=1)
    stays = luck[:, 0, 2] >= verifier["leave_share"]
    turn = np.arange(luck.shape[1])
    drawn = (turn > 0) & (turn < verifier["max_attempts"][:, None])
    anew = luck[..., 1][:, None] < (verifier["fresh_share"][:, None] * workload.p_good)[..., None]
    later = np.where((anew & drawn[:, None]).any(axis=2), 1.0, good)
    return [
        Turn(everyone, good, look_usd, False),
        Turn(verified & fails & stays, later, look_usd + cheapest_usd, True),
    ]


def best_outcomes(found: list[Turn]) -> Floats:
    """(M, T) best of all turns."""
    best = found[0].good
    for turn in found[1:]:
        best = np.where(turn.rows[:, None], np.maximum(best, turn.good), best)
    return best
