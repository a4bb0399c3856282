"""The gate of the controller: chosen and refused on the engine, which it was not trained on.

Candidates are compared with the tuned rule that they correct on validation episodes of the engine, every request
played; the best is then played on further ones. It is exported only if the paired 95 % interval of its gain lies above
zero, and no class loses more than `evaluation.gate.MOST_LOST` of SLO attainment, of answer quality, or of answers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from envs.progress import Progress, silent
from evaluation.deciders import Deciders
from evaluation.gate import FIRST_GATE_SEED, losses, paired_by_blocks
from evaluation.protocol import evaluate_policies
from evaluation.results import EpisodeResults
from marginroute.control_policy import LearnedController
from marginroute.control_rules import RuleController
from marginroute.policy import Policy

if TYPE_CHECKING:
    from agents.config import ControllerConfig
    from envs.scenario import Scenario

FIRST_CHOICE_SEED = 30_000  # validation seeds on which candidates are compared on the engine
RULE = "rule"


def choose(
    scenario: Scenario,
    candidates: Mapping[int, LearnedController],
    rule: RuleController,
    router: Policy | None,
    episodes: int,
    progress: Progress = silent,
) -> tuple[int, dict[int, float]]:
    """The candidate that earns most on the engine, and the gain of each over the rule in USD per 1k requests."""
    results = _play(scenario, {str(steps): c for steps, c in candidates.items()}, rule, router, episodes, progress)
    gains = {steps: paired_by_blocks(scenario, results[str(steps)], results[RULE])[0].mean for steps in candidates}
    return max(gains, key=lambda steps: gains[steps]), gains


def control_gate(
    scenario: Scenario,
    learned: LearnedController,
    rule: RuleController,
    router: Policy | None,
    config: ControllerConfig,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Paired comparison of the learned controller (mean action, numpy runtime) with its rule on the engine.

    Returns:
        As `evaluation.gate.gate`, without floors.
    """
    results = _play(
        scenario, {learned.name: learned}, rule, router, config.gate_episodes, progress, first_seed=FIRST_GATE_SEED
    )
    ours, theirs = results[learned.name], results[RULE]
    estimate, observations = paired_by_blocks(scenario, ours, theirs)
    refused = [] if estimate.low > 0.0 else ["the interval of the gain does not lie above zero"]
    refused += losses(ours, theirs)
    return {
        "learned": not refused,
        "refused": refused,
        "vs": rule.name,
        "delta_usd_per_1k": estimate.mean,
        "ci95": estimate.ci95,
        "episodes": config.gate_episodes,
        "observations": observations,
        "rule_usd_per_1k": 1000.0 * float(theirs.margin_usd.sum() / theirs.first_calls.sum()),
    }


def _play(
    scenario: Scenario,
    learned: Mapping[str, LearnedController],
    rule: RuleController,
    router: Policy | None,
    episodes: int,
    progress: Progress,
    first_seed: int = FIRST_CHOICE_SEED,
) -> dict[str, EpisodeResults]:
    entrants: dict[str, Policy] = {name: Deciders(controller, router) for name, controller in learned.items()}
    entrants[RULE] = Deciders(rule, router)
    return evaluate_policies(scenario, entrants, episodes, split="validation", first_seed=first_seed, progress=progress)
