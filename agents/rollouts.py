"""Rollouts that a crew plays: weights go out, buffers come back, and the numbers are those of one process.

Every member plays some of the training's worlds for a whole rollout. Three things make that exact. Worlds are shared
out in the scorer's pieces (`agents.fused`), since the last bits of a matrix product depend on its rows; every member
draws the noise of all worlds from the trainer's generator and takes its own; and which episodes a world plays depends
on its number alone. A world is brought to any step by its episode and the actions in it so far, which the trainer
knows: whoever takes over the worlds of a lost member plays them up to where they were, and then the same rollout.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from stable_baselines3.common.vec_env import VecEnv

from agents.config import TrainingConfig
from agents.fused import piece_states
from agents.network import ScorerPolicy, scorer_settings
from agents.ppo import Array, ElapsedRolloutBuffer, MarginPPO, discounts, play
from agents.workers import Crew
from envs.plant import Plant
from envs.scenario import Scenario
from envs.vector_env import FleetVecEnv
from marginroute.features import FeatureSpec
from marginroute.margin_rule import MarginRule

FIELDS = ("observations", "actions", "rewards", "episode_starts", "values", "log_probs", "discounts")


@dataclass(frozen=True)
class Worlds:
    """What the worlds of a training are made of.

    Attributes:
        scenario: what is simulated.
        config: of the training.
        advice, spec, signal_scale_usd: as `FleetVecEnv`.
        first_seed: workload of episode 0.
    """

    scenario: Scenario
    config: TrainingConfig
    advice: MarginRule
    spec: FeatureSpec
    signal_scale_usd: float
    first_seed: int

    def env(self, plant: Plant, first: int = 0, n: int | None = None) -> FleetVecEnv:
        """Worlds first .. first + n - 1, or all."""
        config = self.config
        return FleetVecEnv(
            plant,
            config.n_envs if n is None else n,
            workloads=lambda episode: self.scenario.generate(self.first_seed + episode, "train"),
            advice=self.advice,
            spec=self.spec,
            signal_scale_usd=self.signal_scale_usd,
            stagger=config.stagger,
            signal=config.signal,
            shadow_price=config.shadow_price,
            first=first,
            of=config.n_envs,
        )


@dataclass
class Whereabouts:
    """How far some worlds are.

    Attributes:
        rounds: (N,) episodes that each has ended.
        actions: (N, L) of its present episode.
        lengths: (N,) how many of them there were.
        starts: (N,) whether the next step is an episode's first one.
    """

    rounds: Array
    actions: Array
    lengths: Array
    starts: Array

    @classmethod
    def at_the_start(cls, n: int) -> Whereabouts:
        """Of n new worlds."""
        zeros = np.zeros(n, dtype=np.int64)
        return cls(zeros, np.zeros((n, 0), dtype=np.int16), zeros.copy(), np.ones(n, dtype=np.bool_))

    def of(self, rows: slice) -> Whereabouts:
        """Of some of the worlds."""
        longest = int(self.lengths[rows].max())
        return Whereabouts(self.rounds[rows], self.actions[rows, :longest], self.lengths[rows], self.starts[rows])

    def went_on(self, actions: Array, dones: Array) -> None:
        """Takes down a rollout: actions (T, N), and whether they ended an episode."""
        steps = len(actions)
        ended = dones.any(axis=0)
        begun = np.where(ended, steps - dones[::-1].argmax(axis=0), 0)  # the step that the present episode goes on from
        kept = np.where(ended, 0, self.lengths)
        lengths = kept + steps - begun
        room = max(int(lengths.max()), self.actions.shape[1])
        grown = np.zeros((len(kept), room), dtype=np.int16)
        for w, (n, at) in enumerate(zip(kept, begun, strict=True)):
            grown[w, :n] = self.actions[w, :n]
            grown[w, n : n + steps - at] = actions[at:, w]
        self.actions, self.lengths = grown, lengths
        self.rounds, self.starts = self.rounds + dones.sum(axis=0), dones[-1]


@dataclass
class Order:
    """A rollout of some of the worlds.

    Attributes:
        rows: which.
        rollout: how many there were before.
        weights: of the policy.
        random: state of torch's generator.
        floor_usd: as `ObservedWorlds`.
        teaching: as `ElapsedRolloutBuffer`.
        where: how far the worlds are.
    """

    rows: slice
    rollout: int
    weights: dict[str, Array]
    random: Array
    floor_usd: Array | None
    teaching: bool
    where: Whereabouts


@dataclass
class Played:
    """What came of an order: columns of the buffer, and what comes after them.

    Attributes:
        rows: which worlds.
        columns: (T, n, ...) by name of `FIELDS`.
        observations: (n, D) after the last step.
        dones: (n,) of the last step.
        infos: (step, world among all, info) of ended episodes.
        random: state of torch's generator after the noise of T steps.
    """

    rows: slice
    columns: dict[str, Array]
    observations: Array
    dones: Array
    infos: list[tuple[int, int, dict[str, Any]]]
    random: Array


def start_rollouts(worlds: Worlds, first_episode: int) -> Callable[[Order], Played]:
    """What a member plays its worlds with; it keeps them from one rollout to the next."""
    torch.set_num_threads(1)
    plant, config = Plant(worlds.scenario), worlds.config
    kept: dict[int, tuple[int, FleetVecEnv, Array]] = {}  # by first world: the next rollout, and what it sees
    policies: list[ScorerPolicy] = []

    def policy_for(env: FleetVecEnv) -> ScorerPolicy:
        if not policies:
            words = scorer_settings(config, worlds.spec)
            policies.append(ScorerPolicy(env.observation_space, env.action_space, lambda _: 0.0, **words))
        return policies[0]

    def do(order: Order) -> Played:
        first, n = order.rows.start, order.rows.stop - order.rows.start
        due, env, obs = kept.pop(first, (-1, None, None))
        if env is None or due != order.rollout or env.num_envs != n:
            env, where = worlds.env(plant, first, n), order.where
            env.first_episode = first_episode
            obs = env.resume(where.rounds, where.actions, where.lengths)
        env.floor_usd = order.floor_usd
        policy = policy_for(env)
        policy.load_state_dict({name: torch.from_numpy(np.array(x)) for name, x in order.weights.items()})
        policy.set_training_mode(False)
        policy.worlds = (first, config.n_envs)
        torch.set_rng_state(torch.from_numpy(np.array(order.random)))
        buffer = ElapsedRolloutBuffer(config.rollout_steps, env.observation_space, env.action_space, n_envs=n)
        buffer.teaching = order.teaching
        infos, dones = [], order.where.starts
        steps = play(policy, env, buffer, obs, order.where.starts, lambda s: discounts(s, config.tau_s))
        for t, (following, ended, news) in enumerate(steps):
            obs, dones = following, ended
            infos += [(t, first + int(w), news[w]) for w in np.flatnonzero(dones)]
        kept[first] = order.rollout + 1, env, obs
        columns = {name: getattr(buffer, name) for name in (*FIELDS, *(("taught",) if order.teaching else ()))}
        return Played(order.rows, columns, obs, dones, infos, torch.get_rng_state().numpy())

    return do


class SharedVecEnv(FleetVecEnv):
    """Worlds of a training that the members of a crew play; whole rollouts alone (`SharedPPO`).

    Args:
        crew: who plays.
        worlds: what.
        plant: of their scenario.
    """

    floor_usd: Array | None = None  # travels with the orders

    def __init__(self, crew: Crew, worlds: Worlds, plant: Plant) -> None:
        one, n = worlds.env(plant, 0, 1), worlds.config.n_envs
        self.render_mode = None
        VecEnv.__init__(self, n, one.observation_space, one.action_space)
        inputs = max(worlds.spec.n_candidate, worlds.spec.n_context)
        self.rows = shares(n, piece_states(plant.layout.n_candidates, worlds.config.width, inputs), crew.size)
        self._crew, self._worlds, self.first_episode = crew, worlds, 0

    def reset(self) -> Array:
        """Puts every world to its start; observations come with the first rollout."""
        self._job = self._crew.job(start_rollouts, (self._worlds, self.first_episode))
        self._where, self._rollouts = Whereabouts.at_the_start(self.num_envs), 0
        return np.zeros((self.num_envs, *self.observation_space.shape), dtype=np.float32)  # type: ignore[misc]

    def play(self, policy: ScorerPolicy, buffer: ElapsedRolloutBuffer) -> Iterator[tuple[Array, Array, list[Any]]]:
        """As `agents.ppo.play`; every step shows the observations (N, D) after the last."""
        weights = {name: tensor.numpy() for name, tensor in policy.state_dict().items()}
        random, n = torch.get_rng_state().numpy(), self.num_envs
        orders = [
            Order(rows, self._rollouts, weights, random, self.floor_usd, buffer.teaching, self._where.of(rows))
            for rows in self.rows
        ]
        if buffer.teaching:
            buffer.room_to_teach(int(self.action_space.n))  # type: ignore[attr-defined]
        observations = np.empty((n, *self.observation_space.shape), dtype=np.float32)  # type: ignore[misc]
        last, infos = np.zeros(n, dtype=np.bool_), [[{} for _ in range(n)] for _ in range(buffer.buffer_size)]
        for part in self._job.each(orders):
            for name, column in part.columns.items():
                getattr(buffer, name)[:, part.rows] = column
            observations[part.rows], last[part.rows] = part.observations, part.dones
            for step, w, info in part.infos:
                infos[step][w] = info
            torch.set_rng_state(torch.from_numpy(np.array(part.random)))
        dones = np.concatenate([buffer.episode_starts[1:] > 0.5, last[None]])
        self._where.went_on(buffer.actions[..., 0], dones)
        self._rollouts += 1
        buffer.pos, buffer.full = buffer.buffer_size, True
        for step_dones, step_infos in zip(dones, infos, strict=True):
            yield observations, step_dones, step_infos


class SharedPPO(MarginPPO):
    """`MarginPPO` whose rollouts a `SharedVecEnv` has played.

    Args:
        *args, **kwargs: as `MarginPPO`.
    """

    def _play(self, env: VecEnv, buffer: ElapsedRolloutBuffer) -> Iterator[tuple[Array, Array, list[Any]]]:
        assert isinstance(env, SharedVecEnv) and isinstance(self.policy, ScorerPolicy)
        return env.play(self.policy, buffer)


def shares(n_worlds: int, piece: int, members: int) -> Sequence[slice]:
    """Worlds in as many runs of whole pieces as there are members, or as there are pieces."""
    pieces = -(-n_worlds // piece)
    members = min(members, pieces)
    edges = [min(piece * (pieces * i // members), n_worlds) for i in range(members + 1)]
    return [slice(a, b) for a, b in itertools.pairwise(edges)]
