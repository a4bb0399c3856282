"""The gate: is the learned policy better than the heuristic that it corrects, on validation episodes not trained on?

It is exported only if all of this holds: the paired 95 % interval of its gain lies above zero; no class loses more than
`MOST_LOST` of SLO attainment or answer quality, or gets no answer that much more often, than under the heuristic; every
floor is kept; and under no stress (`scenario_family.stressed`: other load, several gateways, an outage, a dear and slow
provider) does the interval lie below zero.

On a trace the episodes are windows of one stretch of time, and many more of them are played than fit it side by side.
Those whose starts fall into the same episode-long block count as one observation: a stretch that holds fewer than two
blocks allows no interval, so nothing learned is exported from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from envs.progress import Progress, silent
from envs.scenario_family import STRESS_SHARE, stressed
from evaluation.protocol import evaluate_policies
from evaluation.report import shed_shares
from evaluation.results import EpisodeResults
from evaluation.statistics import Estimate, paired_estimate

if TYPE_CHECKING:
    from agents.config import TrainingConfig
    from agents.floors import Floor
    from agents.network import ScorerPolicy
    from envs.scenario import Scenario
    from marginroute.features import FeatureSpec
    from marginroute.margin_rule import MarginRule

FIRST_GATE_SEED = 10_000  # validation seeds below it chose among checkpoints
MOST_LOST = 0.01  # share of a class's requests


def paired_by_blocks(scenario: Scenario, ours: EpisodeResults, theirs: EpisodeResults) -> tuple[Estimate, int]:
    """Gain in USD per 1k first calls with its interval, and the number of observations behind it."""
    gain_usd, calls = ours.margin_usd - theirs.margin_usd, ours.first_calls
    if scenario.trace is not None:
        block = np.unique([scenario.block(int(seed), "validation") for seed in ours.seeds], return_inverse=True)[1]
        gain_usd = np.bincount(block, gain_usd).astype(np.float64)
        calls = np.bincount(block, calls).astype(np.int64)
    return paired_estimate(gain_usd, calls, scale=1000.0), len(calls)


def losses(ours: EpisodeResults, theirs: EpisodeResults) -> list[str]:
    """What classes lose by the learned policy, as sentences; empty where none loses more than `MOST_LOST`."""
    found = []
    for what, numerator, denominator in (("SLO attainment", "slo_ok", "calls"), ("quality", "good", "served")):
        lost = theirs.share(numerator, denominator) - ours.share(numerator, denominator)
        found += [
            (name, f"loses {100.0 * x:.1f} points of {what}", x) for name, x in zip(ours.class_names, lost, strict=True)
        ]
    more = shed_shares(ours) - shed_shares(theirs)
    found += [
        (name, f"gets no answer {100.0 * x:.1f} points more often", x)
        for name, x in zip(ours.class_names, more, strict=True)
    ]
    return [f"{name} {words}" for name, words, x in found if x > MOST_LOST]


def broken(floors: Sequence[Floor], results: EpisodeResults) -> list[str]:
    """Floors that a policy does not keep, as sentences."""
    counts = results.counts.sum(axis=0)
    return [f"{f.key} is {f.share(counts):.4f} (floor {f.limit:g})" for f in floors if f.missing(counts) > 0.0]


def gate(
    scenario: Scenario,
    policy: ScorerPolicy,
    advice: MarginRule,
    spec: FeatureSpec,
    config: TrainingConfig,
    progress: Progress = silent,
    floors: Sequence[Floor] = (),
) -> dict[str, Any]:
    """Paired comparison of the learned policy (argmax, numpy runtime) with its advice.

    Returns:
        learned: whether it may be exported; refused: why not, in sentences; delta_usd_per_1k, ci95 (None where there
        is none), episodes, observations; stress: delta_usd_per_1k and ci95 of each, where the rest does not refuse;
        with floors also floors: limit and shares by key, and heuristic_breaks.
    """
    from agents.export import residual_policy

    learned = residual_policy(policy, advice, spec)
    stresses, each = stressed(scenario), max(int(STRESS_SHARE * config.gate_episodes), 2)
    whole = config.gate_episodes + each * len(stresses)

    def play(world: Scenario, episodes: int, before: int) -> tuple[EpisodeResults, EpisodeResults]:
        results = evaluate_policies(
            world,
            {learned.name: learned, advice.name: advice},
            episodes,
            split="validation",
            first_seed=FIRST_GATE_SEED,
            progress=lambda done, of: progress(before + done * episodes // of, whole),
        )
        return results[learned.name], results[advice.name]

    ours, theirs = play(scenario, config.gate_episodes, 0)
    estimate, observations = paired_by_blocks(scenario, ours, theirs)
    refused = [] if estimate.low > 0.0 else ["the interval of the gain does not lie above zero"]
    refused += [*losses(ours, theirs), *broken(floors, ours)]
    stress: dict[str, Any] = {}
    for name, world in () if refused else stresses.items():
        found = paired_by_blocks(world, *play(world, each, config.gate_episodes + each * len(stress)))[0]
        stress[name] = {"delta_usd_per_1k": found.mean, "ci95": found.ci95}
        if found.high < 0.0:
            refused.append(f"it loses {-found.mean:.4f} USD per 1k under stress: {name}")
    progress(whole, whole)
    verdict: dict[str, Any] = {
        "learned": not refused,
        "refused": refused,
        "vs": advice.name,
        "delta_usd_per_1k": estimate.mean,
        "ci95": estimate.ci95,
        "episodes": config.gate_episodes,
        "observations": observations,
        "stress": stress,
    }
    if floors:
        learned_counts, heuristic_counts = ours.counts.sum(axis=0), theirs.counts.sum(axis=0)
        verdict["floors"] = {
            f.key: {"limit": f.limit, "learned": f.share(learned_counts), "heuristic": f.share(heuristic_counts)}
            for f in floors
        }
        verdict["heuristic_breaks"] = broken(floors, theirs)
    return verdict
