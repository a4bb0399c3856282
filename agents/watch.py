"""What watches a training of the router: validation at intervals, checkpoints, the floors' multipliers, metrics."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from stable_baselines3.common.callbacks import BaseCallback

from agents.archive import save_archive
from agents.config import TrainingConfig
from agents.export import residual_policy
from agents.floors import Ascent, Floor, worst_miss
from agents.network import ScorerPolicy
from agents.objective import Objective, Rule
from agents.run import Run
from envs.progress import Progress
from marginroute.features import FeatureSpec
from marginroute.margin_rule import MarginRule
from marginroute.policy import Policy

PARITY = 0.005  # share of a rule's margin within which the policy is taken to have reached it
EPISODES_PER_ASCENT = 8  # that end between two steps of the floors' multipliers, at least


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
