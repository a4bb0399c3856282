"""Many worlds as one environment: the natively batched faces for Stable-Baselines3 and Gymnasium.

Both step all worlds in one kernel call. Observations are flat (see `marginroute.features`), actions index candidates,
rewards are the change of the ledger in USD. `FleetVecEnv` also offers what only a learner reads: `learning_signal` and
`elapsed_s` of the last step.

The learning signal of a decision is its advice score with the true P(good) in place of the predicted one:

    own margin at expected service credits - shadow price of the capacity taken

in units of `signal_scale_usd`. Evaluation never sees it; see docs/learning.md for why it is not the ledger's change.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from stable_baselines3.common.vec_env import VecEnv

from envs import observe_kernel as kernel
from envs.economics import ledger as books
from envs.observe_kernel import buffers, rule_of
from envs.plant import Plant
from envs.rule_kernel import default_advice
from envs.scenario import Scenario, load_scenario
from envs.workload.requests import Workload
from envs.world import WAIT
from envs.worlds import FleetWorlds
from marginroute import features, hedging, latency
from marginroute import view as v
from marginroute.features import CLIP, MIN_LOGIT, FeatureSpec
from marginroute.margin_rule import MarginRule
from marginroute.view import Array

Workloads = Callable[[int], Workload]


class ObservedWorlds(FleetWorlds):
    """Worlds seen through an advice: observations, and the learning signal of the choices.

    Args:
        scenario: what is simulated, or its plant.
        n_worlds: N.
        advice: margin rule behind the observation's estimates; None: the untuned expected margin.
        spec: feature columns; None: the default ones.

    Attributes:
        floor_usd: (3, K) multipliers of floors in the learning signal, None: those of the advice, if it has any.
        shadow_price: whether the learning signal is charged for the capacity that a choice takes.
    """

    def __init__(
        self, scenario: Scenario | Plant, n_worlds: int, advice: MarginRule | None, spec: FeatureSpec | None
    ) -> None:
        super().__init__(scenario, n_worlds)
        self.advice = advice or default_advice(self.plant)
        self.spec = spec or features.feature_spec(self.plant.layout)
        c = self.plant.layout.n_candidates
        self._rule = rule_of(self.advice, self.plant.layout, self.spec)
        self._seen = buffers(n_worlds, c, np.empty((0, 0), dtype=np.float32))
        self.expect(self.advice.quality)
        self._pair: hedging.Pair | None = None
        self.floor_usd: Array | None = None
        self.shadow_price = True

    @cached_property
    def observation_space(self) -> spaces.Box:
        """The flat observation of one world."""
        size = self.spec.size(self.plant.layout.n_candidates)
        return spaces.Box(low=min(MIN_LOGIT, -CLIP), high=CLIP, shape=(size,), dtype=np.float32)

    @property
    def action_space(self) -> spaces.Discrete:
        """One index per candidate; an illegal one sheds the request."""
        return spaces.Discrete(self.plant.layout.n_candidates)

    def observe(self) -> Array:
        """(N, D) float32, a fresh array."""
        self._pair = None
        if self.hedges and self.signals[v.UNDER_WAY_S].any():
            return self._observe_hedging()
        seen = self._seen._replace(observation=np.empty((self.n_worlds, *self.observation_space.shape), np.float32))
        kernel.observe(
            self._rule, self.signals, self.request, self.legal, self.spec.n_candidate, self.spec.n_context, seen
        )
        return seen.observation

    def _observe_hedging(self) -> Array:
        """The same where some world stands at a hedge timer, by the formulas that the kernel repeats without those."""
        view = self.view()
        found, seen = self.advice.assess(view), self._seen
        seen.p_good[:], seen.bad_usd[:], seen.score_usd[:] = found.p_good, found.bad_usd, found.score_usd
        seen.stay[:], seen.congestion_usd[:] = found.stay, found.parts_usd[3]
        seen.value_usd[:] = found.value_usd[:, 0]
        if found.kept is not None:
            seen.kept[:] = found.kept
        self._pair = hedging.pair_of(view, latency.estimate(view)[0][0], self.advice.parameters.sharpness)
        return features.observe(view, found, self.spec)

    def signal_usd(self, choices: Array) -> Array:
        """(N,) learning signal of choices made on the last observation, before they are carried out."""
        legal = self.legal[np.arange(self.n_worlds), choices]
        choices = np.where(legal, choices, self.plant.layout.n_candidates - 1)
        return self._signals_usd(choices[:, None])[:, 0]

    def signal_logits(self) -> Array:
        """(N, C) float32: the advice logits of the last observation if the learning signal were the advice's score."""
        usd = self._signals_usd(np.arange(self.plant.layout.n_candidates)[None])
        usd -= np.where(self.legal, usd, -np.inf).max(axis=1, keepdims=True)
        temperature_usd = np.maximum(self.spec.temperature_share * self._seen.value_usd, 1e-9)
        return np.clip(usd / temperature_usd[:, None], MIN_LOGIT, 0.0).astype(np.float32)

    def _signals_usd(self, candidates: Array) -> Array:
        """(N, X) learning signal of candidates (N, X) or (1, X) of the last observation."""
        a, rows = self._seen, np.arange(self.n_worlds)[:, None]
        choices = np.broadcast_to(candidates, (self.n_worlds, candidates.shape[1]))
        p_true = self.p_true if self._pair is None else self._pair.of_winner(self.p_true)
        known = p_true[rows, choices] - a.p_good[rows, choices]
        signal_usd = a.score_usd[rows, choices] + known * a.bad_usd[rows, choices]
        if not self.shadow_price:
            signal_usd += a.congestion_usd[rows, choices]
        if self.floor_usd is not None:
            assert self.advice.parameters.multipliers is not None
            more_usd = self.floor_usd - self.advice.parameters.multipliers  # (3, K) beyond what the score holds
            kept = a.kept[:, rows, choices]
            kept[1] += known * a.stay[rows, choices]
            signal_usd += (more_usd[:, self.request[v.CLASS_INDEX].astype(np.int64)][..., None] * kept).sum(axis=0)
        return signal_usd

    def summary(self, w: int) -> dict[str, float]:
        """What an episode of world `w` came to, for logs."""
        counts, layout = self.counts[w], self.plant.layout
        first_calls, calls = counts[books.FIRST_CALLS], np.maximum(counts[books.CALLS] - counts[books.REFUSED], 1)
        actions = self.action_counts[w] / max(self.action_counts[w].sum(), 1)
        result = {"margin_usd_per_1k": float(self.ledger_usd[w].sum() / max(first_calls.sum(), 1) * 1000.0)}
        for k, name in enumerate(layout.class_names):
            result[f"slo_{name}"] = float(counts[books.SLO_OK, k] / calls[k])
            result[f"quality_{name}"] = float(counts[books.GOOD, k] / max(counts[books.SERVED, k], 1))
        for kind, share in zip(("replica", "provider", "cache", "defer", "shed"), actions, strict=True):
            result[f"action_{kind}"] = float(share)
        return result


class FleetVecEnv(VecEnv):
    """N worlds behind Stable-Baselines3's VecEnv, one kernel call per step.

    World w plays episodes w, w + N, w + 2 N and so on: which ones does not depend on how the other worlds fare, so that
    worlds first .. first + n - 1 of N can be played elsewhere, and be brought back to any step by their actions.

    Args:
        scenario: what is simulated, or its plant.
        num_envs: N.
        workloads: workload of the n-th episode; None: the scenario's training split from seed 0 on.
        advice, spec: as `ObservedWorlds`.
        signal_scale_usd: unit of the learning signal.
        stagger: start the worlds at different points of an episode, so that resets are spread out.
        signal: what `learning_signal` is: "own", see above, or "ledger", the reward itself in the same unit.
        shadow_price: as `ObservedWorlds`.
        first, of: these are worlds first .. first + num_envs - 1 of so many; None: all.

    Attributes:
        first_episode: of world 0.
        rounds: (N,) episodes that each world has ended.
    """

    def __init__(
        self,
        scenario: Scenario | Plant,
        num_envs: int,
        workloads: Workloads | None = None,
        advice: MarginRule | None = None,
        spec: FeatureSpec | None = None,
        signal_scale_usd: float = 1.0,
        stagger: bool = False,
        signal: str = "own",
        shadow_price: bool = True,
        first: int = 0,
        of: int | None = None,
    ) -> None:
        self.worlds = ObservedWorlds(scenario, num_envs, advice, spec)
        self.worlds.shadow_price, self._own_signal = shadow_price, signal == "own"
        generate = self.worlds.plant.scenario.generate
        self._workloads = workloads or (lambda episode: generate(episode, "train"))
        self.signal_scale_usd, self._stagger = signal_scale_usd, stagger
        self.first_episode, self._first, self._of = 0, first, of or num_envs
        self.rounds, self._begun = np.zeros(num_envs, dtype=np.int64), False
        self.learning_signal = np.zeros(num_envs)
        self.elapsed_s = np.zeros(num_envs)
        self._choices = np.zeros(num_envs, dtype=np.int64)
        self._lengths = np.zeros(num_envs, dtype=np.int64)
        self._no_info: list[dict[str, Any]] = [{} for _ in range(num_envs)]
        self.render_mode = None
        super().__init__(num_envs, self.worlds.observation_space, self.worlds.action_space)

    def _workload(self, w: int) -> Workload:
        """Of the episode that world `w` plays now."""
        return self._workloads(self.first_episode + int(self.rounds[w]) * self._of + self._first + w)

    def reset(self) -> Array:
        """Starts the next episode in every world; returns observations (N, D)."""
        self.rounds += 1 if self._begun else 0
        self._begun, self._lengths[:] = True, 0
        self._begin(np.ones(self.num_envs, dtype=np.bool_))
        return self.worlds.observe()

    def resume(self, rounds: Array, actions: Array, lengths: Array) -> Array:
        """Brings every world to where it was after one reset; returns observations (N, D).

        Args:
            rounds: (N,) episodes that it had ended.
            actions: (N, L) of its present episode, in their order.
            lengths: (N,) how many of them there were.
        """
        self._begun, self.rounds[:], self._lengths[:] = True, rounds, lengths
        self._begin(self.rounds == 0)
        actions = actions.astype(np.int64)
        for step in range(int(lengths.max())):
            self.worlds.step(np.where(step < lengths, actions[:, step], WAIT))
        return self.worlds.observe()

    def _begin(self, staggered: Array) -> None:
        """Loads the episodes of now; some are begun staggered."""
        worlds = self.worlds
        worlds.load_all([self._workload(w) for w in range(self.num_envs)])
        worlds.follow(worlds.advice)
        for w in np.flatnonzero(~staggered):
            worlds.load(int(w), self._workload(int(w)))  # once more: later episodes meet the caps from the start
        if self._stagger:
            self._spread(staggered)

    def _spread(self, staggered: Array) -> None:
        """Plays each such world, number w of N, by its advice for w / N of an episode."""
        worlds, number = self.worlds, self._first + np.arange(self.num_envs)
        lengths = np.where(staggered, worlds.desks["n_roots"] * number // self._of, 0)
        for step in range(int(lengths.max())):
            worlds.step(np.where(step < lengths, worlds.advice.decide_batch(worlds.view()), WAIT))

    def step_async(self, actions: Array) -> None:
        """Keeps the actions (N,) for `step_wait`."""
        self._choices = np.asarray(actions, dtype=np.int64)

    def step_wait(self) -> tuple[Array, Array, Array, list[dict[str, Any]]]:
        """Observations (N, D), rewards (N,) in USD, dones (N,), infos; ended worlds start again at once."""
        worlds = self.worlds
        if self._own_signal:
            self.learning_signal = worlds.signal_usd(self._choices) / self.signal_scale_usd
        worlds.step(self._choices)
        if not self._own_signal:
            self.learning_signal = worlds.reward_usd / self.signal_scale_usd
        self._lengths += 1
        rewards, self.elapsed_s = worlds.reward_usd.astype(np.float32), worlds.elapsed_s.copy()
        dones, infos = worlds.done, self._no_info
        if dones.any():
            infos = list(infos)
            for w in np.flatnonzero(dones):
                margin_usd = float(worlds.desks["margin_usd"][w])
                infos[w] = {
                    "TimeLimit.truncated": True,
                    "episode": {"r": margin_usd, "l": int(self._lengths[w]), "t": 0.0},
                    "fleet": worlds.summary(w),
                    "counts": worlds.counts[w].copy(),
                }
                self.rounds[w] += 1
                worlds.load(int(w), self._workload(int(w)))
                self._lengths[w] = 0
            observations = worlds.observe()
            for w in np.flatnonzero(dones):
                infos[w]["terminal_observation"] = observations[w]  # truncation: nothing bootstraps from it
            return observations, rewards, dones, infos
        return worlds.observe(), rewards, dones, infos

    def signal_logits(self) -> Array:
        """As `ObservedWorlds`."""
        return self.worlds.signal_logits()

    @property
    def floor_usd(self) -> Array | None:
        """As `ObservedWorlds`."""
        return self.worlds.floor_usd

    @floor_usd.setter
    def floor_usd(self, usd: Array | None) -> None:
        self.worlds.floor_usd = usd

    def action_masks(self) -> Array:
        """(N, C) legal candidates."""
        return self.worlds.legal.copy()

    def close(self) -> None:
        """Nothing to release."""

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        """The same attribute for every world."""
        return [getattr(self, attr_name) for _ in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        """Sets an attribute of the whole environment."""
        setattr(self, attr_name, value)

    def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> list[Any]:
        """Calls a method once per index."""
        return [getattr(self, method_name)(*args, **kwargs) for _ in self._get_indices(indices)]

    def env_is_wrapped(self, wrapper_class: type[Any], indices: Any = None) -> list[bool]:
        """Worlds are never wrapped one by one."""
        return [False for _ in self._get_indices(indices)]


class FleetVectorEnv(VectorEnv):
    """N worlds behind Gymnasium's VectorEnv: `gymnasium.make_vec("marginroute/Fleet-v0", num_envs=N)`.

    An ended world starts again in the same step; the last observation and info are in `final_obs` and `final_info`.

    Args:
        num_envs: N.
        scenario: a name, a path or a Scenario.
        split: which seeds it draws from.
        advice: as `ObservedWorlds`.
        render_mode: not offered for many worlds.
        **kwargs: ignored options of Gymnasium's registry (max_episode_steps).
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": [], "autoreset_mode": AutoresetMode.SAME_STEP}

    def __init__(
        self,
        num_envs: int = 1,
        scenario: str | Scenario = "quickstart",
        split: str = "train",
        advice: MarginRule | None = None,
        render_mode: str | None = None,
        **kwargs: Any,
    ) -> None:
        resolved = load_scenario(scenario) if isinstance(scenario, str) else scenario
        self.num_envs, self._split, self.render_mode = num_envs, split, render_mode
        self.worlds = ObservedWorlds(resolved, num_envs, advice, None)
        self.single_observation_space, self.single_action_space = (
            self.worlds.observation_space,
            self.worlds.action_space,
        )
        box, n = self.single_observation_space, num_envs
        self.observation_space = spaces.Box(box.low.min(), box.high.max(), (n, *box.shape), np.float32)
        self.action_space = spaces.MultiDiscrete([int(self.single_action_space.n)] * n)

    def _workload(self) -> Workload:
        return self.worlds.plant.scenario.generate(int(self.np_random.integers(2**31)), self._split)  # type: ignore[arg-type]

    def _info(self) -> dict[str, Any]:
        return {"action_mask": self.worlds.legal.copy(), "elapsed_s": self.worlds.elapsed_s.copy()}

    def reset(
        self, *, seed: int | Sequence[int] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Array, dict[str, Any]]:
        """Starts an episode in every world."""
        super().reset(seed=seed if seed is None or isinstance(seed, int) else int(seed[0]))
        self.worlds.load_all([self._workload() for _ in range(self.num_envs)])
        self.worlds.set_in_flight_caps((options or {}).get("in_flight_caps"))
        return self.worlds.observe(), self._info()

    def step(self, actions: Array) -> tuple[Array, Array, Array, Array, dict[str, Any]]:
        """One decision in every world."""
        self.worlds.step(np.asarray(actions))
        rewards, dones = self.worlds.reward_usd.copy(), self.worlds.done
        final: dict[str, Any] = {}
        if dones.any():
            last, last_info = self.worlds.observe(), self._info()
            final_obs = np.full(self.num_envs, None, dtype=object)
            for w in np.flatnonzero(dones):
                final_obs[w] = last[w]
                self.worlds.load(int(w), self._workload())
            final = {"final_obs": final_obs, "_final_obs": dones, "final_info": last_info, "_final_info": dones}
        return self.worlds.observe(), rewards, np.zeros(self.num_envs, dtype=np.bool_), dones, {**self._info(), **final}
