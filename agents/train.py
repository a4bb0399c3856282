"""Trains the router: tuned margin rule -> normaliser -> teaching -> PPO on the learning signal -> choice on validation.

The advice is `bid-price-fitted`. The network starts as the advice itself (zero head), is validated at intervals with
its argmax policy, and the best validated weights are kept. Whether they are exported at all is decided elsewhere, on
further validation episodes (the gate, see train.py).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from stable_baselines3.common.utils import set_random_seed

from agents.archive import algorithm_of, load_archive, save_archive
from agents.config import TrainingConfig, ppo_settings
from agents.export import residual_policy
from agents.floors import Ascent, Kept
from agents.network import ScorerPolicy, scorer_settings
from agents.objective import Exploring, Objective
from agents.ppo import MarginPPO
from agents.rollouts import SharedVecEnv, Worlds
from agents.run import Run
from agents.strength import STRENGTHS, best_strength
from agents.watch import Parity, Validation, Watch
from agents.workers import Crew
from envs.plant import Plant
from envs.progress import Progress, silent
from envs.scenario import Scenario
from envs.scenario_family import middle
from envs.vector_env import FleetVecEnv, ObservedWorlds
from marginroute.features import FeatureSpec, feature_spec
from marginroute.margin_rule import MarginRule

MIN_SIGNAL_USD = 1e-9  # unit of the learning signal where nothing is worth anything
STRETCH_S = 600.0  # of a scenario with a controller, on which its router is tuned and trained
FIRST_TRAINING_SEED = 10_000  # episodes before it belong to tuning and to the fit of P(good)


def router_scenario(scenario: Scenario) -> Scenario:
    """What a router learns in: the scenario; where it has a controller, `STRETCH_S` at any hour, with levers at rest.

    Days are for controllers. A router's decision is over in seconds, and a day of them would be one episode.
    """
    if scenario.control is None:
        return scenario
    workload = scenario.workload
    if workload.season is not None:
        workload = workload.model_copy(update={"season": workload.season.model_copy(update={"start_h": None})})
    horizon_s = min(scenario.horizon_s, STRETCH_S)
    return scenario.model_copy(update={"control": None, "horizon_s": horizon_s, "workload": workload})


def fit_normaliser(plant: Plant, advice: MarginRule, config: TrainingConfig) -> tuple[FeatureSpec, float]:
    """Feature columns normalised on episodes of a mildly exploring advice, and the mean |signal| in USD as its unit."""
    spec = feature_spec(plant.layout, config.temperature_share)
    worlds = ObservedWorlds(plant, config.normaliser_episodes, advice, spec)
    worlds.load_all(
        [plant.scenario.generate(FIRST_TRAINING_SEED + i, "train") for i in range(config.normaliser_episodes)]
    )
    policy = Exploring(advice, 0.1, seed=0)
    candidates, contexts, signals = [], [], []
    wide = plant.layout.n_candidates * spec.n_candidate
    for step in range(int(worlds.desks["n_roots"].min())):
        choices = policy.decide_batch(worlds.view())
        if step % 8 == 0:
            observation = worlds.observe()
            candidates.append(observation[:, :wide].reshape(len(choices), -1, spec.n_candidate))
            contexts.append(observation[:, wide : wide + spec.n_context])
            signals.append(np.abs(worlds.signal_usd(choices)))
        worlds.step(choices)
    spec = spec.with_normaliser(np.concatenate(candidates), np.concatenate(contexts))
    return spec, max(float(np.mean(signals)), MIN_SIGNAL_USD)


def learning_rate(start: float) -> Callable[[float], float]:
    """Falls linearly from `start` to a tenth of it."""

    def at(progress_left: float) -> float:
        return start * (0.1 + 0.9 * progress_left)

    return at


def make_model(
    env: FleetVecEnv, config: TrainingConfig, spec: FeatureSpec, seed: int, tensorboard: Path | None
) -> MarginPPO:
    """An untrained PPO model whose policy is the advice."""
    return algorithm_of(env)(
        ScorerPolicy,
        env,
        **ppo_settings(config),
        n_steps=config.rollout_steps,
        learning_rate=learning_rate(config.learning_rate),
        ent_coef=config.entropy_coefficient,
        vf_coef=config.value_coefficient,
        max_grad_norm=config.max_grad_norm,
        taught_steps=round(config.taught_share * config.steps) if config.signal == "own" else 0,
        policy_kwargs=scorer_settings(config, spec),
        seed=seed,
        tensorboard_log=str(tensorboard) if tensorboard else None,
    )


def train(
    plant: Plant,
    advice: MarginRule,
    config: TrainingConfig,
    run: Run,
    seed: int,
    *,
    resume: bool = False,
    progress: Progress = silent,
    log: Callable[[dict[str, float]], None] = lambda _: None,
    kept: Kept | None = None,
    parity: Parity | None = None,
    crew: Crew | None = None,
) -> tuple[ScorerPolicy, FeatureSpec]:
    """Trains and returns the policy that was best on validation, at full strength, with its feature spec.

    A crew plays the rollouts, with the same numbers as this process alone would.

    With floors (`kept`, whose rule the advice is) policies that keep them come before those that do not.

    An interruption leaves a checkpoint in the run folder and passes on.

    Raises:
        InputError: `resume` and there is nothing whole to resume from.
    """
    torch.set_num_threads(1)
    set_random_seed(seed)
    if config.sees == "answers" and plant.scenario.workload.feedback is None:
        config = config.model_copy(update={"sees": "all"})
    spec, scale_usd = fit_normaliser(plant, advice, config)
    first = FIRST_TRAINING_SEED * (seed + 2)
    source = plant.scenario if config.randomise else middle(plant.scenario)
    worlds = Worlds(source, config, advice, spec, scale_usd, first)
    own = plant if source is plant.scenario else Plant(source)
    env = worlds.env(own) if crew is None else SharedVecEnv(crew, worlds, own)
    if resume and run.has_checkpoint:
        model = load_archive(run.newest_checkpoint(), env)
        model.tensorboard_log = str(run.folder / "tb")  # the folder may have moved
        env.first_episode = int(model.num_timesteps // plant.scenario.generate(first, "train").n_requests)
    else:
        model = make_model(env, config, spec, seed, run.folder / "tb")
    objective = Objective(plant, "validation", range(config.validation_episodes))
    validate = Validation(objective, kept.floors if kept else ())
    watch = Watch(run, config, validate, advice, spec, progress, log, Ascent(kept) if kept else None, parity)
    steps = config.steps - model.num_timesteps
    if steps > 0:
        try:
            model.learn(steps, callback=watch, reset_num_timesteps=model.num_timesteps == 0, tb_log_name="ppo")
        finally:
            save_archive(model, run.folder / "checkpoints" / f"step_{model.num_timesteps:010d}.zip")
    best = load_archive(run.policy_path, None)
    assert isinstance(best.policy, ScorerPolicy)
    best.policy.scorer.follow(1.0)  # a run that is resumed may have chosen another already
    return best.policy, FeatureSpec.from_dict(best.policy_kwargs["spec"])


def choose_strength(
    plant: Plant,
    policy: ScorerPolicy,
    advice: MarginRule,
    spec: FeatureSpec,
    config: TrainingConfig,
    run: Run,
    progress: Progress = silent,
) -> None:
    """Has a policy at full strength follow its correction as far as validation bears out, in the archive, too."""
    full = residual_policy(policy, advice, spec)
    strength, gains = best_strength(plant.scenario, full, config.validation_episodes, progress)
    best = load_archive(run.policy_path, None)
    assert isinstance(best.policy, ScorerPolicy)
    for followed in (policy, best.policy):
        followed.scorer.follow(strength)
    save_archive(best, run.policy_path)
    run.update(strength={"chosen": strength, "of": STRENGTHS, "gain_usd_per_1k": gains})
