"""What a controller learns in: groups of fluid worlds on one trace, each beside a twin that plays the tuned rule.

    action = clip(rule's action + step * correction, -1, 1)        correction (A,): what the learner chooses, in steps
    signal = (change of the world's ledger - change of its twin's - multiplier . (SLOs missed - twin's)) / scale

No class may pay for a gain: its multiplier, USD per call, rises while more calls than `MOST_LOST` miss their SLOs, or
get no answer, beyond those of the twin, and falls again after (`agents.floors`).

A group of worlds meets the same arrivals, so that a world can be compared with its companions (`agents.controller`),
and its twin is one more world on them. A correction of zero has the twin's ledger, and a signal of exactly zero.

Observations are `marginroute.control_policy.network_inputs`, then what only training knows (the critic's share): the
twin's observation, arrivals to come within each of `AHEAD_S` relative to what the season lets expect, and the part of
the episode that is left. Groups start at different times of the day.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.vec_env import VecEnv

from agents.floors import pursued
from envs.control_plant import Traffic
from envs.control_worlds import FluidControl
from marginroute.control import AHEAD_S, ARRIVED, SLO_OK, Array, ControlLayout, observation_names
from marginroute.control_policy import network_inputs
from marginroute.control_rules import RuleController

STEPS = {"cap": 0.05, "replicas": 0.03, "release": 0.04, "spill": 0.0, "shed": 0.0}
"""Exploration by lever in lever units, whose range is 2; customers are shed by no learner."""

MOST_LOST = 0.005  # share of a class's calls; the gate, on other days and on the engine, allows 0.01
EVERY_TICKS = 60  # that multipliers follow
WIDEST = 10.0  # steps: what a correction and its noise stay within


def lever_steps(layout: ControlLayout) -> Array:
    """(A,) float32 step of each lever; 0 where the scenario has none or the rule keeps it."""
    steps = [STEPS[name.partition(":")[0]] for name in layout.lever_names]
    return np.where(layout.mask, steps, 0.0).astype(np.float32)


class ControlVecEnv(VecEnv):
    """Groups of fluid worlds as Stable-Baselines3 takes them.

    Args:
        worlds: groups * (size + 1) worlds, for learners in the order of their groups and then for the twins.
        rule: what is corrected.
        size: learners of a group.
        traffic: draws episode e.
        scale_usd: unit of the signal.
        unit_usd: unit of the multipliers, a call's usual margin; 0: none.
        stagger: whether groups start at different times.

    Attributes:
        learning_signal: (N,) of the last tick.
        elapsed_s: (N,) seconds of the last tick.
        integral_usd, multipliers_usd: (K,) of the classes, per call.
        episodes: drawn so far.
    """

    render_mode = None

    def __init__(
        self,
        worlds: FluidControl,
        rule: RuleController,
        size: int,
        traffic: Callable[[int], Traffic],
        scale_usd: float = 1.0,
        unit_usd: float = 0.0,
        stagger: bool = True,
    ) -> None:
        self.worlds, self.rule, self.size, self.scale_usd = worlds, rule.anew(), size, scale_usd
        self.groups = worlds.n_worlds // (size + 1)
        self.layout, self.step_size, self.episodes = worlds.layout, lever_steps(worlds.layout), 0
        self._draw, self._stagger = traffic, stagger
        n, a, d = self.groups * size, len(self.layout.lever_names), len(observation_names(self.layout))
        self._group = np.concatenate([np.repeat(np.arange(self.groups), size), np.arange(self.groups)])
        k = len(self.layout.class_names)
        self._ahead = np.maximum(np.rint(np.array(AHEAD_S) / self.layout.tick_s).astype(np.int64), 1)
        self._totals = np.zeros((self.groups, worlds.ticks + 1, k))
        self._usual = np.ones((self.groups, worlds.ticks + 1, k))
        self.n_public, n_private = d + a, d + k * len(AHEAD_S) + 1
        self._advice, self._actions = np.zeros((len(self._group), a)), np.zeros((n, a), dtype=np.float32)
        self._unit_usd = np.full(k, unit_usd)
        self.integral_usd, self.multipliers_usd = np.zeros(k), np.zeros(k)
        self._missed, self._calls, self._counted = np.zeros(k), np.zeros(k), 0
        self.learning_signal, self.elapsed_s = np.zeros(n), np.full(n, self.layout.tick_s)
        observation = spaces.Box(-np.inf, np.inf, (self.n_public + n_private,), np.float32)
        super().__init__(n, observation, spaces.Box(-WIDEST, WIDEST, (a,), np.float32))

    def _load(self, g: int) -> None:
        """Starts the next episode in all worlds of a group."""
        traffic = self._draw(self.episodes)
        counts = traffic.arrivals
        self.episodes += 1
        for w in np.flatnonzero(self._group == g):
            self.worlds.load(int(w), traffic)
        begin_s = self.worlds.time_s[self.num_envs + g]
        times_s = begin_s + (np.arange(len(counts)) + 0.5) * self.layout.tick_s
        usual = self.layout.season(times_s) * self.layout.tick_s
        self._totals[g, 1:], self._usual[g, 1:] = np.cumsum(counts, axis=0), np.cumsum(usual, axis=0)

    def _private(self, public: Array) -> Array:
        """What only the critic sees, (N, Q)."""
        ticks, g = self.worlds.ticks, np.arange(self.groups)[:, None]
        now = self.worlds.tick[self.num_envs :]
        then = np.minimum(now[:, None] + self._ahead, ticks)
        coming = self._totals[g, then] - self._totals[g, now[:, None]]
        usual = self._usual[g, then] - self._usual[g, now[:, None]]
        excess = (coming - usual) / np.maximum(usual, 1.0)
        left = 1.0 - now[:, None] / ticks
        own = np.concatenate([public[self.num_envs :], excess.reshape(self.groups, -1), left], axis=1)
        return np.repeat(own, self.size, axis=0)

    def _observe(self) -> Array:
        view = self.worlds.view()
        self._advice = self.rule.act(view)
        inputs = network_inputs(view, self._advice)
        d = inputs.shape[1] - self._advice.shape[1]
        return np.concatenate([inputs[: self.num_envs], self._private(inputs[:, :d])], axis=1).astype(np.float32)

    def reset(self) -> Array:
        """Starts all groups, each at another time of its episode that the rule has brought it to."""
        self.worlds.tick[:] = self.worlds.ticks
        ages = np.arange(self.groups) * self.worlds.ticks // self.groups if self._stagger else np.zeros(self.groups)
        for age in range(int(ages.max()), -1, -1):
            for g in np.flatnonzero(ages == age):
                self._load(int(g))
            if age > 0:
                self.worlds.step(self.rule.act(self.worlds.view()))
        return self._observe()

    def step_async(self, actions: Array) -> None:
        """Takes corrections (N, A) in steps."""
        self._actions = actions

    def step_wait(self) -> tuple[Array, Array, Array, list[dict[str, Any]]]:
        """One tick; groups at their end begin their next episode."""
        moved = self._advice.copy()
        moved[: self.num_envs] += self.step_size * self._actions
        self.worlds.step(np.clip(moved, -1.0, 1.0))
        rewards = self.worlds.rewards_usd
        gain_usd = rewards[: self.num_envs] - np.repeat(rewards[self.num_envs :], self.size)
        met = self.worlds.last_tick[..., SLO_OK]
        missed = np.repeat(met[self.num_envs :], self.size, axis=0) - met[: self.num_envs]
        self.learning_signal = (gain_usd - missed @ self.multipliers_usd) / self.scale_usd
        self._follow(missed.sum(axis=0), self.worlds.last_tick[: self.num_envs, :, ARRIVED].sum(axis=0))
        dones = self.worlds.done[: self.num_envs].copy()
        for g in np.flatnonzero(self.worlds.done[self.num_envs :]):
            self._load(int(g))
        return self._observe(), gain_usd.astype(np.float32), dones, [{} for _ in range(self.num_envs)]

    def _follow(self, missed: Array, calls: Array) -> None:
        """Takes down calls (K,) of a tick and those that missed their SLOs beyond the twin's; moves the multipliers."""
        self._missed, self._calls, self._counted = self._missed + missed, self._calls + calls, self._counted + 1
        if self._counted == EVERY_TICKS:
            short = self._missed / np.maximum(self._calls, 1.0) - MOST_LOST
            self.integral_usd, self.multipliers_usd = pursued(self.integral_usd, short, self._unit_usd)
            self._missed, self._calls, self._counted = np.zeros_like(missed), np.zeros_like(calls), 0

    def close(self) -> None:
        """Nothing to close."""

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        """The same of every world."""
        return [getattr(self, attr_name)] * self.num_envs

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        """Not offered."""
        raise AttributeError(attr_name)

    def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> list[Any]:
        """Not offered."""
        raise AttributeError(method_name)

    def env_is_wrapped(self, wrapper_class: Any, indices: Any = None) -> list[bool]:
        """Never."""
        return [False] * self.num_envs


def probe(env: ControlVecEnv, ticks: int, seed: int) -> tuple[Array, Array, float]:
    """Mean and spread of the observation's columns over ticks of exploration, and the mean |gain| of one in USD."""
    rng, seen, gains = np.random.default_rng(seed), [env.reset()], []
    for _ in range(ticks):
        env.step_async(rng.normal(size=env._actions.shape))
        observation, gain_usd, _, _ = env.step_wait()
        seen.append(observation[:: env.size])
        gains.append(np.abs(gain_usd))
    rows = np.concatenate(seen)
    std = rows.std(axis=0)
    return rows.mean(axis=0), np.where(std > 1e-4, std, 1.0), max(float(np.mean(gains)), 1e-9)
