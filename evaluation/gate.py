"""The gate: is the learned policy better than the heuristic that it corrects, on validation episodes not trained on?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from evaluation.progress import Progress, silent
from evaluation.protocol import evaluate_policies
from evaluation.statistics import paired_estimate

if TYPE_CHECKING:
    from agents.config import TrainingConfig
    from agents.network import ScorerPolicy
    from envs.scenario import Scenario
    from marginroute.features import FeatureSpec
    from marginroute.heuristics import MarginRule

FIRST_GATE_SEED = 10_000  # validation seeds below it chose among checkpoints


def gate(
    scenario: Scenario,
    policy: ScorerPolicy,
    advice: MarginRule,
    spec: FeatureSpec,
    config: TrainingConfig,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Paired comparison of the learned policy (argmax, numpy runtime) with its advice.

    Returns:
        learned: whether the 95 % interval of the gain lies above zero; delta_usd_per_1k, ci95, episodes.
    """
    from agents.export import residual_policy

    learned = residual_policy(policy, advice, spec)
    results = evaluate_policies(
        scenario,
        {learned.name: learned, advice.name: advice},
        config.gate_episodes,
        split="validation",
        first_seed=FIRST_GATE_SEED,
        progress=progress,
    )
    ours, theirs = results[learned.name], results[advice.name]
    estimate = paired_estimate(ours.margin_usd - theirs.margin_usd, ours.first_calls, scale=1000.0)
    return {
        "learned": bool(estimate.low > 0.0),
        "vs": advice.name,
        "delta_usd_per_1k": estimate.mean,
        "ci95": [estimate.low, estimate.high],
        "episodes": config.gate_episodes,
    }
