"""The comparison: every policy meets the same requests, and choices are made on other seeds than claims.

- *Common random numbers*: episode e is one workload (arrivals, lengths, outcomes, provider noise) for all policies.
- *Held out*: claims are made on split "heldout"; the best heuristic is chosen on split "validation". The split is
  part of the seed sequence of a workload, so a held-out episode cannot be reached from another split.
- *Workers change nothing*: episodes are cut into chunks of fixed size, each played by a fresh copy of its policy.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from evaluation.latency import BINS, METRICS, histogram
from evaluation.progress import Progress, silent
from evaluation.results import EpisodeResults, check_paired, concatenate
from marginroute.policy import Policy
from marginroute.view import REPLICA

if TYPE_CHECKING:
    from envs.scenario import Scenario, Split

CHUNK_EPISODES = 16
"""Worlds stepped at once: enough to spread numpy's cost per call, few enough to share out over cores."""
ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")


@dataclass(frozen=True)
class Job:
    """One policy on consecutive episodes of one split."""

    name: str
    split: Split
    seeds: tuple[int, ...]


class Examiner:
    """Plays jobs inside one process; the workloads of the last chunk are kept for the next policy."""

    def __init__(self, scenario: Scenario, policies: Mapping[str, Policy]) -> None:
        self.scenario = scenario
        self.pickled = {name: pickle.dumps(policy) for name, policy in policies.items()}
        self.chunk: tuple[str, tuple[int, ...]] | None = None
        self.workloads: list[Any] = []

    def play(self, job: Job) -> EpisodeResults:
        """Runs a job; an exception of the policy passes through."""
        if self.chunk != (job.split, job.seeds):
            self.workloads = [self.scenario.generate(seed, split=job.split) for seed in job.seeds]
            self.chunk = (job.split, job.seeds)
        return play(self.scenario, pickle.loads(self.pickled[job.name]), job.name, self.workloads, job.seeds)


def play(
    scenario: Scenario, policy: Policy, name: str, workloads: Sequence[Any], seeds: Sequence[int]
) -> EpisodeResults:
    """Plays one policy on workloads, all at once, to the last settled request."""
    from envs.vector_env import FleetWorlds

    return play_worlds(FleetWorlds(scenario, workloads), policy, name, seeds)


def evaluate_policies(
    scenario: Scenario,
    policies: Mapping[str, Policy],
    episodes: int,
    *,
    split: Split = "heldout",
    first_seed: int = 0,
    progress: Progress = silent,
    workers: int | None = None,
) -> dict[str, EpisodeResults]:
    """Runs every policy on the same episodes.

    Args:
        scenario: the world.
        policies: by the name to report; policies must be picklable.
        episodes: E, at least 1.
        split: "heldout" for claims, "validation" for choices.
        first_seed: episodes have seeds first_seed .. first_seed + episodes - 1.
        progress: called with (episodes done, episodes in all).
        workers: processes; None for as many as there are cores, 0 or 1 for none beside this one.

    Returns:
        Results by name, in the order of `policies`.

    Raises:
        InputError: an episode without requests, or no policy.
    """
    seeds = range(first_seed, first_seed + episodes)
    chunks = [tuple(seeds[i : i + CHUNK_EPISODES]) for i in range(0, episodes, CHUNK_EPISODES)]
    jobs = [Job(name, split, chunk) for chunk in chunks for name in policies]
    workers = min(usable_cores() if workers is None else workers, len(jobs))
    outcomes = _in_processes(scenario, policies, jobs, workers) if workers > 1 else _in_turn(scenario, policies, jobs)
    parts: dict[str, list[EpisodeResults]] = {name: [] for name in policies}
    done, total = 0, episodes * len(policies)
    with contextlib.closing(outcomes):
        for part in outcomes:
            parts[part.policy].append(part)
            done += len(part.seeds)
            progress(done, total)
    results = {name: concatenate(of_name) for name, of_name in parts.items()}
    check_paired(results)
    return results


def best_on_validation(
    scenario: Scenario,
    heuristics: Mapping[str, Policy],
    episodes: int,
    *,
    progress: Progress = silent,
    workers: int | None = None,
) -> str:
    """Name of the heuristic with the highest margin on validation seeds; the only one if there is one."""
    if len(heuristics) == 1:
        return next(iter(heuristics))
    results = evaluate_policies(scenario, heuristics, episodes, split="validation", progress=progress, workers=workers)
    return max(results, key=lambda name: float(results[name].margin_usd.sum()))


def play_worlds(worlds: Any, policy: Policy, name: str, seeds: Sequence[int]) -> EpisodeResults:
    """Steps the worlds (N of them, one per seed) until all are done and collects what their ledgers say."""
    layout = worlds.layout
    worlds.reset()
    n = len(seeds)
    tier_counts = np.zeros((n, len(layout.tier_names)), dtype=np.int64)
    caps = policy.in_flight_caps(layout, worlds.slots)
    while not worlds.done.all():
        active = np.flatnonzero(~worlds.done)
        action = policy.decide_batch(worlds.view())
        tier = layout.tier[action[active]]
        sent = tier >= 0
        tier_counts[active[sent], tier[sent]] += 1
        worlds.step(action, caps)
        caps = None
    scenario = worlds.scenario
    replicas_of = np.bincount(layout.station[layout.kind == REPLICA], minlength=len(scenario.pool_names))
    return EpisodeResults(
        policy=name,
        class_names=tuple(scenario.class_names),
        pool_names=tuple(scenario.pool_names),
        pool_replicas=tuple(replicas_of.tolist()),
        seeds=np.asarray(seeds, dtype=np.int64),
        ledger_usd=np.array(worlds.ledger_usd, dtype=np.float64),
        counts=np.array(worlds.counts, dtype=np.int64),
        action_counts=np.array(worlds.action_counts, dtype=np.int64),
        tier_counts=tier_counts,
        utilisation=np.array(worlds.utilisation, dtype=np.float64),
        horizon_s=np.array([workload.horizon_s for workload in worlds.workloads]),
        latency_histogram=latency_histogram(worlds),
    )


def latency_histogram(worlds: Any) -> NDArray[np.int64]:
    """(N, 3, K, BINS) answered requests of each world by TTFT, TPOT and E2E."""
    classes = len(worlds.scenario.class_names)
    counts = np.zeros((len(worlds.workloads), len(METRICS), classes, BINS), dtype=np.int64)
    for w, workload in enumerate(worlds.workloads):
        latencies_s = worlds.latencies(w)
        for m, metric in enumerate(METRICS):
            answered = np.isfinite(latencies_s[metric])
            counts[w, m] = histogram(latencies_s[metric][answered], workload.class_index[answered], classes)
    return counts


def usable_cores() -> int:
    """Cores this process may use: its affinity, cut to the quota of its control group."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError), open("/sys/fs/cgroup/cpu.max", encoding="ascii") as file:
        quota, period = file.read().split()
        cores = min(cores, max(1, round(int(quota) / int(period))))
    return cores


def _in_turn(
    scenario: Scenario, policies: Mapping[str, Policy], jobs: Sequence[Job]
) -> Generator[EpisodeResults, None, None]:
    examiner = Examiner(scenario, policies)
    for job in jobs:
        yield examiner.play(job)


_worker_examiner: Examiner | None = None


def _start_worker(scenario: Scenario, policies: Mapping[str, Policy]) -> None:
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group: the parent decides
    global _worker_examiner
    _worker_examiner = Examiner(scenario, policies)


def _work(job: Job) -> EpisodeResults:
    assert _worker_examiner is not None
    return _worker_examiner.play(job)


def _in_processes(
    scenario: Scenario, policies: Mapping[str, Policy], jobs: Sequence[Job], workers: int
) -> Generator[EpisodeResults, None, None]:
    before = set(multiprocessing.active_children())
    with _one_thread_each():
        pool = ProcessPoolExecutor(
            workers, multiprocessing.get_context("spawn"), _start_worker, (scenario, dict(policies))
        )
        finished = False
        try:
            for future in as_completed([pool.submit(_work, job) for job in jobs]):
                yield future.result()
            finished = True
        except BrokenProcessPool as error:
            raise RuntimeError("an evaluation process died (out of memory?): try fewer --workers") from error
        finally:
            pool.shutdown(wait=finished, cancel_futures=True)
            if not finished:
                for child in set(multiprocessing.active_children()) - before:
                    child.terminate()


@contextlib.contextmanager
def _one_thread_each() -> Iterator[None]:
    """Child processes started inside use one thread each: two pools of threads on two cores collapse."""
    saved = {name: os.environ.get(name) for name in ONE_THREAD}
    os.environ.update(dict.fromkeys(ONE_THREAD, "1"))
    try:
        yield
    finally:
        for name, value in saved.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
