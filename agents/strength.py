"""How far a network's correction is followed: the strength that earns most on validation, under stress included.

PPO learns on a signal that knows a decision's own worth; what the decision does to others it knows by a price. Where
that price is too low, in training or in a state that training never saw, corrections are right in kind and too large.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from agents.objective import Objective
from envs.scenario import Scenario
from envs.scenario_family import STRESS_SHARE, stressed
from envs.worlds import Plant
from marginroute.policy import Policy, ResidualPolicy
from marginroute.view import Array

STRENGTHS = (1.0, 0.75, 0.5, 0.35, 0.25)


def scaled(policy: ResidualPolicy, strength: float) -> ResidualPolicy:
    """A policy that follows its network's correction so far."""
    trust = (strength * policy.network.trust).astype(np.float32)
    return replace(policy, network=replace(policy.network, trust=trust))


def best_strength(scenario: Scenario, policy: ResidualPolicy, episodes: int) -> tuple[float, dict[str, list[float]]]:
    """One of `STRENGTHS`, by half of the gain in the scenario and half of the mean gain over its stresses.

    Args:
        scenario: of the router.
        policy: at full strength.
        episodes: validation episodes of the scenario; a stress has `STRESS_SHARE` of them.

    Returns:
        It, and the gains in USD per 1k first calls in the order of `STRENGTHS`, by the name of the world.
    """
    worlds = {"as it is": (scenario, episodes)}
    worlds |= {name: (world, max(int(STRESS_SHARE * episodes), 1)) for name, world in stressed(scenario).items()}
    found = {name: _gains(world, policy, n) for name, (world, n) in worlds.items()}
    as_it_is, *under_stress = found.values()
    ranked = 0.5 * as_it_is + 0.5 * np.mean(under_stress, axis=0)
    return STRENGTHS[int(ranked.argmax())], {name: gains.tolist() for name, gains in found.items()}


def _gains(scenario: Scenario, policy: ResidualPolicy, episodes: int) -> Array:
    """(len(STRENGTHS),) over the policy's advice."""
    objective = Objective(Plant(scenario), "validation", range(episodes))

    def usd(played: Policy) -> float:
        return float(objective([played])[0])  # type: ignore[list-item]

    return np.array([usd(scaled(policy, strength)) for strength in STRENGTHS]) - usd(policy.advice)
