"""Trains the router: tuned margin rule -> normaliser -> PPO on the learning signal -> choice on validation.

The advice is `bid-price-fitted`. The network starts as the advice itself (zero head), is validated at intervals with
its argmax policy, and the best validated weights are kept. Whether they are exported at all is decided elsewhere, on
further validation episodes (the gate, see train.py).
"""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.utils import set_random_seed
from stable_baselines3.common.vec_env import VecEnv

from agents.config import TrainingConfig, ppo_settings
from agents.export import residual_policy
from agents.floors import Ascent, Floor, Kept, worst_miss
from agents.network import ScorerPolicy, scorer_settings
from agents.objective import Exploring, Objective, Rule
from agents.ppo import MarginPPO
from agents.rollouts import SharedPPO, SharedVecEnv, Worlds
from agents.run import Run, check_archive
from agents.strength import STRENGTHS, best_strength
from agents.workers import Crew
from envs.plant import Plant
from envs.progress import Progress, silent
from envs.scenario import Scenario
from envs.scenario_family import middle
from envs.vector_env import FleetVecEnv, ObservedWorlds
from marginroute.errors import InputError
from marginroute.features import FeatureSpec, feature_spec
from marginroute.heuristics import MarginRule
from marginroute.policy import Policy
from marginroute.whole_file import replacing

Algorithm = TypeVar("Algorithm", bound=MarginPPO)
PARITY = 0.005  # share of a rule's margin within which the policy is taken to have reached it
MIN_SIGNAL_USD = 1e-9  # unit of the learning signal where nothing is worth anything
EPISODES_PER_ASCENT = 8  # that end between two steps of the floors' multipliers, at least
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


@dataclass
class Validation:
    """Mean margin of policies on fixed validation episodes, and by how much they miss the worst floor."""

    objective: Objective
    floors: tuple[Floor, ...] = ()

    def __call__(self, policy: Policy) -> tuple[float, float]:
        """USD per 1k first calls; share by which the worst floor is missed, 0 where all hold."""
        usd = float(self.objective([policy])[0])  # type: ignore[list-item]
        return usd, worst_miss(self.floors, self.objective.counts)


@dataclass
class Parity:
    """When the policy's validation margin came within `PARITY` of a tuned rule's, and when it passed it.

    Attributes:
        rule: the rule.
        started_s: `time.monotonic()` when the command started: seconds count tuning and compilation.
    """

    rule: Rule
    started_s: float

    def note(self, run: Run, validation: Validation, steps: int, usd: float) -> None:
        """Takes a validation down in run.json."""
        noted = run.info().get("parity")
        if noted is None:
            if steps > 0:
                return
            noted = {"bid_price_usd_per_1k": validation(self.rule)[0]}
        rule_usd, moment = noted["bid_price_usd_per_1k"], {"s": time.monotonic() - self.started_s, "steps": steps}
        if "reached" not in noted and usd >= rule_usd - PARITY * abs(rule_usd):
            noted["reached"] = moment
        if "passed" not in noted and usd > rule_usd:
            noted["passed"] = moment
        run.update(parity=noted)


class Watch(BaseCallback):
    """Progress, fleet metrics, validation, and checkpoints during training.

    Args:
        run: where checkpoints and the best policy go.
        config: intervals.
        validate: margin of a policy on validation episodes, and by how much it misses a floor.
        advice, spec: of the policy that is validated.
        progress: called with (steps done, steps in all).
        log: called with a mapping of metrics after each validation.
        ascent: multipliers of floors, which follow the training's episodes.
        parity: takes down when a tuned rule is reached.
    """

    def __init__(
        self,
        run: Run,
        config: TrainingConfig,
        validate: Validation,
        advice: MarginRule,
        spec: FeatureSpec,
        progress: Progress,
        log: Callable[[dict[str, float]], None],
        ascent: Ascent | None = None,
        parity: Parity | None = None,
    ) -> None:
        super().__init__()
        self._parity = parity
        self._ascent, self._counts, self._counted = ascent, np.zeros(0), 0
        self._run, self._config, self._validate = run, config, validate
        self._advice, self._spec, self._progress, self._log = advice, spec, progress, log
        self._next_checkpoint = config.checkpoint_every_steps
        self._episodes: list[dict[str, float]] = []
        info = run.info()
        self.history: list[dict[str, float]] = info["history"]
        ranks = [(-row.get("floor_missed_by", 0.0), row["margin_usd_per_1k"]) for row in self.history]
        self.best = max(ranks, default=(-np.inf, -np.inf))
        self._every = max(config.steps // config.validations, 1)

    def _on_training_start(self) -> None:
        done = self.model.num_timesteps
        self._next_checkpoint = done + self._config.checkpoint_every_steps
        self._next_validation = done + self._every
        if self._ascent is not None:
            if done and (usd := self._run.info().get("multipliers_usd")):
                self._ascent.integral_usd[...] = self._ascent.usd[...] = usd
            self._signal_floors()
        if not self.history:
            self._validated(0)

    def _on_step(self) -> bool:
        for info in self.locals["infos"]:
            if info:
                self._episodes.append(info["fleet"])
                self._counts = info["counts"] + (self._counts if self._counted else 0)
                self._counted += 1
        return True

    def _on_rollout_end(self) -> None:
        for key in self._episodes[0] if self._episodes else ():
            self.logger.record(f"fleet/{key}", float(np.mean([episode[key] for episode in self._episodes])))
        self._episodes = []
        if self._ascent is not None and self._counted >= EPISODES_PER_ASCENT:
            self._ascent.update(self._counts)
            self._counted = 0
            self._signal_floors()
            for key, usd in self._ascent.metrics().items():
                self.logger.record(f"fleet/{key}", usd)

    def _signal_floors(self) -> None:
        """Gives the learning signal the multipliers of now."""
        assert self._ascent is not None
        self.training_env.set_attr("floor_usd", self._ascent.usd)

    def _on_rollout_start(self) -> None:
        done = self.model.num_timesteps
        self._progress(min(done, self._config.steps), self._config.steps)
        if done >= self._next_validation:
            self._validated(done)
            self._next_validation += self._every
        if done >= self._next_checkpoint:
            path = self._run.folder / "checkpoints" / f"step_{done:010d}.zip"
            save_archive(self.model, path)  # type: ignore[arg-type]
            if self._ascent is not None:
                self._run.update(multipliers_usd=self._ascent.integral_usd.tolist())
            self._next_checkpoint += self._config.checkpoint_every_steps

    def _on_training_end(self) -> None:
        self._validated(self.model.num_timesteps)
        self._progress(self._config.steps, self._config.steps)

    def _validated(self, steps: int) -> None:
        assert isinstance(self.model.policy, ScorerPolicy)
        usd, missed = self._validate(residual_policy(self.model.policy, self._advice, self._spec))
        self.logger.record("fleet/validation_margin_usd_per_1k", usd)
        if (-missed, usd) > self.best:  # before it enters the history: an interruption must not leave none of the best
            self.best = (-missed, usd)
            save_archive(self.model, self._run.policy_path)  # type: ignore[arg-type]
        more = {} if self._ascent is None else {"floor_missed_by": missed, **self._ascent.metrics()}
        self.history.append({"steps": steps, "margin_usd_per_1k": usd, **more})
        self._run.update(history=self.history)
        if self._parity is not None:
            self._parity.note(self._run, self._validate, steps, usd)
        self._log({"steps": steps, "validation_margin_usd_per_1k": usd, **more})


def save_archive(model: MarginPPO, path: Path) -> None:
    """Saves Stable-Baselines3's archive completely or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        model.save(partial)


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
        policy_kwargs=scorer_settings(config, spec),
        seed=seed,
        tensorboard_log=str(tensorboard) if tensorboard else None,
    )


def algorithm_of(env: VecEnv | None) -> type[MarginPPO]:
    """What plays an environment's rollouts."""
    return SharedPPO if isinstance(env, SharedVecEnv) else MarginPPO


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


def load_archive(path: Path, env: FleetVecEnv | None) -> MarginPPO:
    """Loads the router's archive; raises InputError as `load_with`."""
    return load_with(algorithm_of(env), path, env)


def load_with(algorithm: type[Algorithm], path: Path, env: VecEnv | None) -> Algorithm:
    """Loads Stable-Baselines3's archive.

    Raises:
        InputError: missing, corrupt, or made for another observation or action space.
    """
    check_archive(path)
    try:
        return algorithm.load(path, env=env, device="cpu")
    except (ValueError, RuntimeError, KeyError, AttributeError, TypeError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0][:120]
        raise InputError(f"{path} cannot be loaded for this scenario ({reason}); train again") from None
