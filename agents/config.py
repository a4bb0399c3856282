"""How a policy is trained: one frozen object, a sentence per field."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from envs import scenario_files
from envs.scenario_section import NonNegative, Positive, Section

Count = Annotated[int, Field(ge=1)]
PREFIX = "training."


class ControllerConfig(Section):
    """Settings of the controller's PPO, where a scenario has a controller; one step is one control tick."""

    steps: Count = Field(description="Ticks to learn from, over all worlds.")
    groups: Count = Field(description="Traces that are played side by side.")
    group_size: Count = Field(description="Worlds on one trace, beside the twin that plays the rule.")
    rollout_ticks: Count = Field(description="Ticks of each world between two updates.")
    epochs: Count = Field(description="Passes over a rollout.")
    minibatch: Count = Field(description="Ticks per gradient step.")
    learning_rate: Positive = Field(description="Adam's step size at the start; it falls linearly to a tenth.")
    gae_lambda: Annotated[float, Field(ge=0.0, le=1.0)] = Field(description="Lambda of the advantage estimate.")
    tau_s: Positive = Field(description="Time constant of the discount in seconds.")
    clip_range: Positive = Field(description="PPO's clip range.")
    target_kl: Positive | None = Field(description="KL at which an update stops early; null: never.")
    width: Count = Field(description="Hidden units of the network.")
    noise_ticks: Positive = Field(description="Mean ticks for which a world keeps its exploration noise.")
    load_spread: NonNegative = Field(description="Training loads are e^-x to e^x times the scenario's.")
    tuning_ticks: Count = Field(description="Ticks for one restart of one heuristic controller, where it is tuned.")
    validations: Count = Field(description="How often during training the policy is validated on the surrogate.")
    validation_episodes: Count = Field(description="Surrogate episodes of a validation.")
    choice_episodes: Annotated[int, Field(ge=2)] = Field(
        description="Validation episodes on the engine that choose among the validated policies."
    )
    gate_episodes: Annotated[int, Field(ge=2)] = Field(
        description="Further validation episodes on the engine that decide the export."
    )


def ppo_settings(config: TrainingConfig | ControllerConfig) -> dict[str, Any]:
    """What both deciders hand to Stable-Baselines3's PPO, as keyword arguments."""
    return {
        "tau_s": config.tau_s,
        "n_epochs": config.epochs,
        "batch_size": config.minibatch,
        "gae_lambda": config.gae_lambda,
        "clip_range": config.clip_range,
        "target_kl": config.target_kl,
        "device": "cpu",
    }


class TrainingConfig(Section):
    """Settings of PPO and of the choice of what is exported."""

    steps: Count = Field(description="Decisions to learn from, over all worlds.")
    n_envs: Count = Field(description="Worlds that play side by side.")
    rollout_steps: Count = Field(description="Decisions of each world between two updates.")
    epochs: Count = Field(description="Passes over a rollout.")
    minibatch: Count = Field(description="Decisions per gradient step.")
    learning_rate: Positive = Field(description="Adam's step size at the start; it falls linearly to a tenth.")
    gae_lambda: Annotated[float, Field(ge=0.0, le=1.0)] = Field(description="Lambda of the advantage estimate.")
    clip_range: Positive = Field(description="PPO's clip range.")
    entropy_coefficient: NonNegative = Field(description="Weight of the entropy bonus.")
    value_coefficient: NonNegative = Field(description="Weight of the critic's loss.")
    max_grad_norm: Positive = Field(description="Norm at which gradients are clipped.")
    target_kl: Positive | None = Field(description="KL at which an update stops early; null: never.")
    tau_s: NonNegative = Field(description="Time constant of the discount in seconds; 0: only a decision's own signal.")
    width: Count = Field(description="Hidden units of the scorer.")
    temperature_share: Positive = Field(description="Advice temperature as a share of a request's value.")
    normaliser_episodes: Count = Field(description="Episodes from which the feature normaliser is fitted.")
    validation_episodes: Count = Field(description="Validation episodes on which checkpoints are compared.")
    gate_episodes: Annotated[int, Field(ge=2)] = Field(
        description="Further validation episodes that decide the export."
    )
    checkpoint_every_steps: Count = Field(description="Decisions between two checkpoints.")
    tuning_requests: Count = Field(description="Simulated requests for one restart of one baseline, where it is tuned.")
    validations: Count = Field(description="How often during training the policy is validated.")
    residual: bool = Field(True, description="Correct the advice's scores; false: the network decides alone.")
    fitted: bool = Field(True, description="Advice with P(good) fitted on outcomes; false: with the public prior.")
    sees: Literal["answers", "all", "load"] = Field(
        "answers",
        description="What the network corrects the advice by: what tells of answers (all, where none are judged), all, "
        "or all but judged answers.",
    )
    signal: Literal["own", "ledger"] = Field(
        "own", description="Learn from a decision's own expected margin, or from the change of the ledger."
    )
    shadow_price: bool = Field(True, description="Charge the own margin for the capacity that a decision takes.")
    stagger: bool = Field(True, description="Start the worlds at different points of an episode.")
    deciders: Literal["both", "router", "controller"] = Field(
        "both", description="What is learned in a scenario with a controller; the other decider stays a tuned rule."
    )
    controller: ControllerConfig = Field(description="Settings of the controller's training.")
    randomise: bool = Field(True, description="Train on the scenario's ranges; false: on its middle alone.")
    taught_share: Annotated[float, Field(ge=0.0, le=1.0)] = Field(
        0.5,
        description="Share of the steps in which the network is taught what the simulator knows of every candidate, "
        "before PPO; 0: PPO alone, as with the ledger's signal.",
    )

    @model_validator(mode="after")
    def _batch_fits(self) -> TrainingConfig:
        if self.minibatch > self.n_envs * self.rollout_steps:
            raise ValueError(
                f"has minibatch {self.minibatch} above n_envs * rollout_steps = {self.n_envs * self.rollout_steps}; "
                "legal is at most that"
            )
        return self


class _Training(Section):
    """Puts `training.` before the keys, in overrides and in errors."""

    training: TrainingConfig


def load_training(path: Path | None, overrides: Mapping[str, Any]) -> TrainingConfig:
    """The training configuration from a file (default: configs/training/default.yaml) and overrides.

    Raises:
        InputError: unreadable, unknown key, or a value out of range.
    """
    path = path or scenario_files.CONFIGS / "training" / "default.yaml"
    prefixed = {PREFIX + key: value for key, value in overrides.items()}
    data = scenario_files.apply_overrides(_Training, {"training": scenario_files.read_yaml(path)}, prefixed)
    try:
        return _Training.model_validate(data).training
    except ValidationError as error:
        raise scenario_files.input_error(error, _Training, data, {"training": str(path)}, prefixed) from None


def split_overrides(overrides: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Overrides of the scenario, and those of the training configuration without their prefix `training.`."""
    training = {key.removeprefix(PREFIX): value for key, value in overrides.items() if key.startswith(PREFIX)}
    return {key: value for key, value in overrides.items() if not key.startswith(PREFIX)}, training
