"""The measurements of benchmarks/cluster.py."""

from __future__ import annotations

import os
import pickle
import socket
import time
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from typing import Any

import numpy as np
import torch
from stable_baselines3.common.callbacks import BaseCallback

from agents.cluster import Cluster, connected
from agents.config import TrainingConfig, load_training
from agents.fused import piece_states
from agents.rollouts import Order, SharedVecEnv, Whereabouts, Worlds, shares, start_rollouts
from agents.train import FIRST_TRAINING_SEED, make_model
from agents.workers import Crew, Job
from benchmarks import common
from envs.plant import Plant
from envs.scenario import load_scenario
from envs.vector_env import default_advice
from evaluation.protocol import evaluate_policies
from marginroute import features
from marginroute.errors import InputError
from marginroute.gateway_rules import SHIPPED_RULES

LINK_BYTES_PER_S = 10e9 / 8.0
MEMBERS = (1, 2, 4, 8, 16, 32, 64)
MEASURED = ("round_cpu_s", "round_wall_s", "evaluation_cpu_s", "evaluation_wall_s")
RULES = ("least-request", "power-of-two", "prefix-aware", "litellm-shuffle")


def start_timed(start: Callable[..., Callable[[Any], Any]], arguments: tuple[Any, ...]) -> Callable[[Any], Any]:
    """A job that says of every result which process it comes from, and its CPU seconds."""
    do = start(*arguments)

    def timed(item: Any) -> tuple[tuple[str, int], float, Any]:
        started_s = time.process_time()
        result = do(item)
        return (socket.gethostname(), os.getpid()), time.process_time() - started_s, result

    return timed


class TimedJob:
    """A job that takes down the CPU seconds of the busiest member in each call."""

    def __init__(self, job: Job[Any, Any], busiest_s: list[float]) -> None:
        self._job, self._busiest_s = job, busiest_s

    def each(self, items: Sequence[Any]) -> Generator[Any, None, None]:
        """As `Job.each`."""
        spent: Counter[tuple[str, int]] = Counter()
        for member, cpu_s, result in self._job.each(items):
            spent[member] += cpu_s  # type: ignore[assignment]
            yield result
        self._busiest_s.append(max(spent.values()))


class TimedCrew(Crew):
    """A crew with the CPU seconds of its busiest member in each call of a job."""

    def __init__(self, members: int) -> None:
        super().__init__(Cluster(members))
        self.busiest_s: list[float] = []

    def job(self, start: Callable[..., Callable[[Any], Any]], arguments: tuple[Any, ...]) -> Any:
        """As `Crew.job`."""
        return TimedJob(super().job(start_timed, (start, arguments)), self.busiest_s)


class Clock(BaseCallback):
    """(wall, CPU) seconds of this process in rollouts and in updates, one row per round; the first round compiles."""

    def __init__(self) -> None:
        super().__init__()
        self.marks: list[tuple[float, float]] = []

    def _on_step(self) -> bool:
        return True

    def _mark(self) -> None:
        self.marks.append((time.perf_counter(), time.process_time()))

    _on_rollout_start = _on_rollout_end = _on_training_end = _mark

    def rounds(self) -> np.ndarray[Any, Any]:
        """(rounds, 2, 2): rollout and update, each wall and CPU."""
        return np.diff(np.array(self.marks), axis=0)[2:].reshape(-1, 2, 2)


def made_of(config: TrainingConfig) -> tuple[Worlds, Plant]:
    """The worlds of an untuned training on quickstart."""
    plant = Plant(load_scenario("quickstart"))
    spec = features.feature_spec(plant.layout)
    return Worlds(plant.scenario, config, default_advice(plant), spec, 1.0, FIRST_TRAINING_SEED), plant


def timed_rounds(crew: TimedCrew, config: TrainingConfig, rounds: int) -> np.ndarray[Any, Any]:
    """As `Clock.rounds`, of a training by a crew."""
    worlds, plant = made_of(config)
    model, clock = make_model(SharedVecEnv(crew, worlds, plant), config, worlds.spec, 0, None), Clock()
    model.learn(config.n_envs * config.rollout_steps * (rounds + 1), callback=clock)
    return clock.rounds()


def member_part(config: TrainingConfig, rounds: int) -> tuple[float, int]:
    """CPU seconds that all worlds of a rollout cost a member, and bytes of the order and of what comes back."""
    worlds, plant = made_of(config)
    env = worlds.env(plant)
    policy = make_model(env, config, worlds.spec, 0, None).policy
    weights = {name: tensor.numpy() for name, tensor in policy.state_dict().items()}
    do, where = start_rollouts(worlds, 0), Whereabouts.at_the_start(config.n_envs)
    spent, size = [], 0
    for rollout in range(rounds + 1):
        order = Order(slice(0, config.n_envs), rollout, weights, torch.get_rng_state().numpy(), None, where)
        started_s = time.process_time()
        played = do(order)
        spent.append(time.process_time() - started_s)
        size = len(pickle.dumps(order)) + len(pickle.dumps(played))
        starts = played.columns["episode_starts"][1:] > 0.5
        where.went_on(played.columns["actions"][..., 0], np.concatenate([starts, played.dones[None]]))
    return float(np.median(spent[1:])), size


def projected(config: TrainingConfig, times: int, play_s: float, other_s: float) -> dict[str, float]:
    """By members, the model's speed-up of a training with so many times the worlds."""
    worlds, plant = made_of(config)
    inputs = max(worlds.spec.n_candidate, worlds.spec.n_context)
    piece, n_worlds = piece_states(plant.layout.n_candidates, config.width, inputs), times * config.n_envs

    def seconds(members: int) -> float:
        largest = max(x.stop - x.start for x in shares(n_worlds, piece, members))
        return other_s + play_s * largest / n_worlds

    return {f"{n}": round(seconds(1) / seconds(n), 2) for n in MEMBERS}


def evaluation_s(crew: TimedCrew, episodes: int) -> tuple[float, float]:
    """Wall seconds of an evaluation, and the busiest member's CPU seconds: the best of three, after one to warm up."""
    scenario, rules = load_scenario("quickstart"), {name: SHIPPED_RULES[name](name) for name in RULES}
    evaluate_policies(scenario, rules, 16 * crew.size, workers=crew)
    taken = []
    for _ in range(3):
        started_s = time.perf_counter()
        evaluate_policies(scenario, rules, episodes, workers=crew)
        taken.append((time.perf_counter() - started_s, crew.busiest_s[-1]))
    return min(taken)


def measured(address: str, quick: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """The figures, and how they were taken."""
    torch.set_num_threads(1)
    config = load_training(None, {"n_envs": 32, "minibatch": 512} if quick else {})
    rounds, episodes = (1, 16) if quick else (8, 64)
    common.note("a member's part, in this process")
    play_s, size = member_part(config, rounds)
    found: dict[str, dict[int, float]] = {name: {} for name in MEASURED}
    with connected(address):
        for members in (1, 2):
            common.note(f"{members} of the cluster")
            with TimedCrew(members) as crew:
                if crew.size < members:
                    raise InputError(f"--ray {address} has {crew.size} CPU; legal is a cluster of two or more")
                parts = timed_rounds(crew, config, rounds)
                wall_s, cpu_s = np.median(parts.sum(axis=1), axis=0)
                cpu_s += np.median(crew.busiest_s[1:])
                for name, x in zip(MEASURED, (cpu_s, wall_s, *evaluation_s(crew, episodes)[::-1]), strict=True):
                    found[name][members] = float(x)
    (_, handling_s), (_, update_s) = np.median(parts, axis=0)
    figures: dict[str, Any] = {
        "update_s": round(float(update_s), 4),
        "handling_s": round(float(handling_s), 4),
        "play_s": round(play_s, 4),
        "mbytes_per_round": round(size / 1e6, 2),
        **{name: {f"{n}": round(x, 4) for n, x in by_members.items()} for name, by_members in found.items()},
        "speedup_2": {name.removesuffix("_s"): round(x[1] / x[2], 2) for name, x in found.items()},
    }
    other_s = float(update_s + handling_s) + size / LINK_BYTES_PER_S
    for name, times in (("projected_speedup", 1), ("projected_speedup_1024_worlds", 1024 // config.n_envs)):
        figures[name] = projected(config, times, play_s, other_s)
    model = "update_s + handling_s + play_s * share(n) + bytes / 10 Gbit/s"
    return figures, {"model": model, "n_envs": config.n_envs, "rollout_steps": config.rollout_steps}
