"""How far a network's correction is followed: the strength whose gain on validation is surest, under stress included.

PPO learns on a signal that knows a decision's own worth; what the decision does to others it knows by a price. Where
that price is too low, in training or in a state that training never saw, corrections are right in kind and too large.
The gain grows ever more slowly with the strength, and what false alarms cost grows ever faster.
A strength that does harm under one of the stresses is not chosen for what it gains elsewhere.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from agents.objective import Objective
from envs.plant import Plant
from envs.progress import Progress, silent
from envs.scenario import Scenario
from envs.scenario_family import STRESS_SHARE, stressed
from marginroute.policy import ResidualPolicy
from marginroute.view import Array

STRENGTHS = (1.0, 0.75, 0.5, 0.35, 0.25)
NORMAL_95 = 1.96  # standard errors to the end of a 95 % interval


def scaled(policy: ResidualPolicy, strength: float) -> ResidualPolicy:
    """A policy that follows its network's correction so far."""
    trust = (strength * policy.network.trust).astype(np.float32)
    return replace(policy, network=replace(policy.network, trust=trust))


def best_strength(
    scenario: Scenario, policy: ResidualPolicy, episodes: int, progress: Progress = silent
) -> tuple[float, dict[str, list[float]]]:
    """One of `STRENGTHS`: of those that no stress speaks against, that whose gain is surest; else the weakest.

    A stress speaks against a strength if the 95 % interval of its gain there lies below zero, as it does at the gate.
    Surest is the highest lower end of that interval over all episodes played.

    Args:
        scenario: of the router.
        policy: at full strength.
        episodes: validation episodes of the scenario; a stress has `STRESS_SHARE` of them.
        progress: called with (played, in all).

    Returns:
        It, and the mean gains in USD per 1k first calls in the order of `STRENGTHS`, by the name of the world.
    """
    worlds = {"as it is": (scenario, episodes)}
    worlds |= {name: (world, max(int(STRESS_SHARE * episodes), 1)) for name, world in stressed(scenario).items()}
    found, played, total = {}, 0, sum(n for _, n in worlds.values())
    for name, (world, n) in worlds.items():
        progress(played, total)
        found[name] = _gains(world, policy, n)
        played += n
    progress(played, total)
    usd, error_usd = _mean_and_error(np.concatenate(list(found.values()), axis=1))
    surely_usd = usd - NORMAL_95 * error_usd
    for gains in found.values():
        usd, error_usd = _mean_and_error(gains)
        surely_usd[usd + NORMAL_95 * error_usd < 0.0] = -np.inf
    chosen = STRENGTHS[int(surely_usd.argmax())] if np.isfinite(surely_usd).any() else min(STRENGTHS)
    return chosen, {name: gains.mean(axis=1).tolist() for name, gains in found.items()}


def _mean_and_error(gains: Array) -> tuple[Array, Array]:
    """(len(STRENGTHS),) of gains (len(STRENGTHS), N), and their standard errors."""
    return gains.mean(axis=1), gains.std(axis=1) / math.sqrt(gains.shape[1])


def _gains(scenario: Scenario, policy: ResidualPolicy, episodes: int) -> Array:
    """(len(STRENGTHS), N) over the policy's advice."""
    objective = Objective(Plant(scenario), "validation", range(episodes))
    played = [objective.each(scaled(policy, strength)) for strength in STRENGTHS]  # type: ignore[arg-type]
    return np.stack(played) - objective.each(policy.advice)
