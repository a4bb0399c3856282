"""One row of benchmarks/ablations.py: a training with other settings, and its gain over the full recipe's heuristic."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from agents import baselines
from agents.config import load_training
from agents.export import residual_policy
from agents.run import Run
from agents.train import choose_strength, train
from benchmarks.ablations import FIRST_SEED
from envs.plant import Plant
from envs.scenario import Scenario
from evaluation.protocol import evaluate_policies
from evaluation.statistics import paired_estimate
from marginroute.errors import InputError
from marginroute.whole_file import write_whole

RESULT = "ablation.json"


def row(
    scenario: Scenario, folder: Path, changes: Mapping[str, Any], seed: int, steps: int, episodes: int
) -> dict[str, Any]:
    """The figures of one row and seed, from its folder if they are there.

    Raises:
        InputError: the scenario has no tuned baselines.
    """
    wanted = {"scenario_hash": scenario.hash, "seed": seed, "steps": steps, "episodes": episodes, "changes": changes}
    if (folder / RESULT).is_file():
        known = json.loads((folder / RESULT).read_text())
        if {key: known.get(key) for key in wanted} == wanted:
            return dict(known)
    shutil.rmtree(folder, ignore_errors=True)
    config = load_training(None, {**changes, "steps": steps})
    tuned = baselines.find(scenario)
    if tuned is None:
        raise InputError(f"scenario {scenario.name!r} has no tuned baselines; make them with train.py first")
    plant, run = Plant(scenario), Run(folder)
    run.create(scenario, config, seed, f"python -m benchmarks.ablations {scenario.name}")
    opponent = baselines.advice_and_fallback(tuned)[0]
    advice = baselines.advice_and_fallback(tuned, config.fitted)[0]
    policy, spec = train(plant, advice, config, run, seed)
    choose_strength(plant, policy, advice, spec, config, run)
    learned = residual_policy(policy, advice, spec)
    results = evaluate_policies(
        scenario, {"learned": learned, "opponent": opponent}, episodes, split="validation", first_seed=FIRST_SEED
    )
    ours, theirs = results["learned"], results["opponent"]
    estimate = paired_estimate(ours.margin_usd - theirs.margin_usd, ours.first_calls, scale=1000.0)
    found = {
        **wanted,
        "vs": opponent.name,
        "opponent_usd_per_1k": 1000.0 * float(theirs.margin_usd.sum() / theirs.first_calls.sum()),
        "delta_usd_per_1k": estimate.mean,
        "ci95": [estimate.low, estimate.high],
    }
    write_whole(folder / RESULT, json.dumps(found, indent=1) + "\n")
    return found
