"""Weights & Biases, where a training is asked to report there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from agents.run import Run
from envs.scenario import Scenario


def tracker(run: Run, scenario: Scenario, seed: int) -> Callable[[dict[str, Any]], None]:
    """Starts a run that follows TensorBoard, offline unless the user is logged in; what it returns takes metrics."""
    import wandb

    mode = "online" if wandb.api.api_key else "offline"
    wandb.init(
        project="marginroute",
        name=run.folder.name,
        dir=str(run.folder),
        mode=mode,
        sync_tensorboard=True,
        config={"scenario": scenario.name, "scenario_hash": scenario.hash, "seed": seed},
    )
    return wandb.log
