"""Trains the controller: tuned rule -> normaliser -> PPO on the gain over the rule's twin -> candidates.

Validated with its mean action on fixed surrogate episodes, at intervals; the policies that earned most there, of those
by which no class misses many more SLOs, are kept as candidates. Which of them is best on the engine, and whether it is
exported at all, is decided on the engine (`evaluation.control_gate`).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.utils import set_random_seed

from agents.archive import load_with, save_archive
from agents.config import ControllerConfig
from agents.control_tuning import FIRST_VALIDATION_SEED, play
from agents.control_worlds import ControlVecEnv, probe
from agents.controller import ControllerPolicy, ControllerPPO, learned_controller, make_controller_model
from agents.floors import MIN_UNIT_USD
from agents.run import Run, check_archive
from agents.train import FIRST_TRAINING_SEED, learning_rate
from envs.control_plant import ControlPlant, Traffic, traffic_of
from envs.control_worlds import FluidControl
from envs.economics import ledger as books
from envs.progress import Progress, silent
from marginroute.control import Array
from marginroute.control_policy import LearnedController
from marginroute.control_rules import Controller, RuleController

CANDIDATES = 3  # validated policies that are tried on the engine
TOLERATED = 0.006  # share of a class's calls that miss their SLOs by a policy: with less the candidates are alike
FIRM = 5.0  # unit of the multipliers in mean margins of a call
PROBE_TICKS = 60


class GainOnSurrogate:
    """Gain over a rule on fixed validation episodes of the surrogate.

    Args:
        plant: the scenario.
        rule: the rule.
        episodes: how many.
    """

    def __init__(self, plant: ControlPlant, rule: RuleController, episodes: int) -> None:
        seeds = range(FIRST_VALIDATION_SEED, FIRST_VALIDATION_SEED + episodes)
        scenario, tick_s = plant.plant.scenario, plant.layout.tick_s
        self._traffic = [traffic_of(scenario, seed, "validation", tick_s) for seed in seeds]
        self._worlds = FluidControl(plant, episodes)
        self.rule_usd_per_1k, self._rule_met = self._played(rule)

    def _played(self, controller: Controller) -> tuple[Array, Array]:
        """(E,) margins in USD per 1k requests, and (K,) shares of calls inside their SLOs."""
        usd = play(self._worlds, controller, self._traffic)
        counts = self._worlds.counts.sum(axis=0)
        return usd, counts[books.SLO_OK] / np.maximum(counts[books.CALLS], 1.0)

    def __call__(self, controller: LearnedController) -> tuple[Array, float]:
        """(E,) gains in USD per 1k requests, and the largest share of a class's calls that misses its SLOs by it."""
        usd, met = self._played(controller)
        return usd - self.rule_usd_per_1k, float((self._rule_met - met).max())


class ControlWatch(BaseCallback):
    """Progress, validation, candidates and checkpoints during training.

    Args:
        run: where they go.
        config: intervals.
        gain: of a controller on validation.
        rule: what is corrected.
        progress: called with (ticks done, ticks in all).
        log: called with a mapping of metrics after each validation.
    """

    def __init__(
        self,
        run: Run,
        config: ControllerConfig,
        gain: GainOnSurrogate,
        rule: RuleController,
        progress: Progress,
        log: Callable[[dict[str, float]], None],
    ) -> None:
        super().__init__()
        self._run, self._config, self._gain, self._rule = run, config, gain, rule
        self._progress, self._log = progress, log
        self.history: list[dict[str, Any]] = run.info().get("controller_history", [])
        self._every = max(config.steps // config.validations, 1)

    def _on_training_start(self) -> None:
        self._next = self.model.num_timesteps + self._every

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        done = self.model.num_timesteps
        self._progress(min(done, self._config.steps), self._config.steps)
        if done >= self._next:
            self._validated(done)
            self._next += self._every

    def _on_training_end(self) -> None:
        if not self.history or self.history[-1]["steps"] < self.model.num_timesteps:
            self._validated(self.model.num_timesteps)
        self._progress(self._config.steps, self._config.steps)

    def _validated(self, steps: int) -> None:
        assert isinstance(self.model.policy, ControllerPolicy)
        gains, missed = self._gain(learned_controller(self.model.policy, self._rule))
        row = {
            "steps": steps,
            "gain_usd_per_1k": float(gains.mean()),
            "se_usd_per_1k": float(gains.std(ddof=1) / np.sqrt(len(gains))) if len(gains) > 1 else 0.0,
            "slo_lost": missed,
            "integral_usd": self.training_env.get_attr("integral_usd")[0].tolist(),
        }
        save_archive(self.model, self._run.controller_checkpoint(steps))  # type: ignore[arg-type]
        self.history.append(row)
        self._run.update(controller_history=self.history)
        self.logger.record("controller/validation_gain_usd_per_1k", row["gain_usd_per_1k"])
        self.logger.record("controller/validation_slo_lost", missed)
        self._log({f"controller_{key}": x for key, x in row.items() if isinstance(x, (int, float))})


def train_controller(
    plant: ControlPlant,
    rule: RuleController,
    config: ControllerConfig,
    run: Run,
    seed: int,
    *,
    resume: bool = False,
    progress: Progress = silent,
    log: Callable[[dict[str, float]], None] = lambda _: None,
) -> dict[int, LearnedController]:
    """Trains, and returns the candidates by the ticks that they had learned from, best on the surrogate first.

    An interruption leaves a checkpoint in the run folder and passes on.

    Raises:
        InputError: `resume`, and the newest checkpoint is not whole.
    """
    torch.set_num_threads(1)
    set_random_seed(seed)
    scenario, first = plant.plant.scenario, FIRST_TRAINING_SEED * (seed + 2)

    def traffic(episode: int) -> Traffic:
        rng = np.random.default_rng([seed, episode])
        scale = np.exp(rng.uniform(-config.load_spread, config.load_spread))
        arrivals, variant = traffic_of(scenario, first + episode, "train", plant.layout.tick_s)
        return Traffic(scale * arrivals, variant)

    worlds = FluidControl(plant, config.groups * (config.group_size + 1))
    gain = GainOnSurrogate(plant, rule, config.validation_episodes)
    unit_usd = max(FIRM * abs(float(gain.rule_usd_per_1k.mean())) / 1000.0, MIN_UNIT_USD)
    env = ControlVecEnv(worlds, rule, config.group_size, traffic, unit_usd=unit_usd)
    mean, std, env.scale_usd = probe(env, PROBE_TICKS, seed)
    env.episodes = 0
    env.integral_usd[:] = 0.0
    checkpoint = run.newest_controller() if resume else None
    if checkpoint is not None:
        model = load_with(ControllerPPO, check_archive(checkpoint), env)
        model.tensorboard_log = str(run.folder / "tb")  # the folder may have moved
        if history := run.info().get("controller_history"):
            env.integral_usd[:] = history[-1]["integral_usd"]
        env.episodes = model.num_timesteps // (config.group_size * plant.ticks) + config.groups
    else:
        rate = learning_rate(config.learning_rate)
        model = make_controller_model(env, config, rate, mean, std, seed, str(run.folder / "tb"))
    env.multipliers_usd = env.integral_usd.copy()
    watch = ControlWatch(run, config, gain, rule, progress, log)
    left = config.steps - model.num_timesteps
    if left > 0:
        try:
            model.learn(left, callback=watch, reset_num_timesteps=model.num_timesteps == 0, tb_log_name="controller")
        finally:
            save_archive(model, run.controller_checkpoint(model.num_timesteps))
    best = sorted(watch.history, key=lambda row: (max(row["slo_lost"], TOLERATED), -row["gain_usd_per_1k"]))
    return {
        int(row["steps"]): load_controller(run.controller_checkpoint(int(row["steps"])), rule)[0]
        for row in best[:CANDIDATES]
    }


def load_controller(path: Path, rule: RuleController) -> tuple[LearnedController, ControllerPolicy]:
    """A trained controller as the runtime runs it, and its torch policy.

    Raises:
        InputError: missing, corrupt or incomplete.
    """
    policy = load_with(ControllerPPO, check_archive(path), None).policy
    assert isinstance(policy, ControllerPolicy)
    return learned_controller(policy, rule), policy


def control_parity(plant: ControlPlant, rule: RuleController, policy: ControllerPolicy, samples: int) -> dict[str, Any]:
    """Inputs of a training day under the rule, and torch's corrections on them."""
    from marginroute.control_policy import network_inputs

    worlds = FluidControl(plant, 4)
    for w in range(worlds.n_worlds):
        worlds.load_seed(w, w, "train")
    rule, rows, every = rule.anew(), [], max(plant.ticks * worlds.n_worlds // samples, 1)
    while not worlds.done.all():
        view = worlds.view()
        action = rule.act(view)
        if int(worlds.tick[0]) % every == 0:
            rows.append(network_inputs(view, action))
        worlds.step(action)
    inputs = np.concatenate(rows)[:samples]
    with torch.no_grad():
        return {"inputs": inputs, "correction": policy.correction(torch.as_tensor(inputs)).numpy()}
