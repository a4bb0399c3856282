"""The comparison: every policy meets the same requests, and choices are made on other seeds than claims.

- *Common random numbers*: episode e is one workload (arrivals, lengths, outcomes, provider noise) for all policies.
- *Held out*: claims are made on split "heldout"; the best heuristic is chosen on split "validation". The split is
  part of the seed sequence of a workload, so a held-out episode cannot be reached from another split.
- *Workers change nothing*: episodes are cut into chunks of fixed size, each played by a fresh copy of its policy.
"""

from __future__ import annotations

import contextlib
import pickle
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from agents.workers import Crew, shared_out, usable_cores
from envs import announce_compilation
from envs.progress import Progress, silent
from evaluation.deciders import Deciders
from evaluation.fairness import tenant_counts
from evaluation.latency import BINS, METRICS, histogram
from evaluation.results import EpisodeResults, check_paired, concatenate
from marginroute.policy import Policy

if TYPE_CHECKING:
    from envs.plant import Plant
    from envs.scenario import Scenario, Split
    from envs.workload.requests import Workload
    from envs.worlds import FleetWorlds

CHUNK_EPISODES = 16
"""Worlds stepped at once: enough to spread numpy's cost per call, few enough to share out over cores."""
PROCESSES_PAY_S = 8.0
"""Seconds of work from which on starting processes (imports, compiled kernels) saves more than it costs."""


@dataclass(frozen=True)
class Job:
    """One policy on consecutive episodes of one split."""

    name: str
    split: Split
    seeds: tuple[int, ...]


class Examiner:
    """Plays jobs inside one process; the workloads of the last chunk are kept for the next policy."""

    def __init__(self, scenario: Scenario, policies: Mapping[str, Policy]) -> None:
        from envs.plant import Plant

        self.plant = Plant(scenario)
        self.pickled = {name: pickle.dumps(policy) for name, policy in policies.items()}
        self.chunk: tuple[Split, tuple[int, ...]] | None = None
        self.workloads: list[Workload] = []

    def play(self, job: Job, max_steps: int | None = None) -> EpisodeResults:
        """Runs a job (or the first decisions of it); an exception of the policy passes through."""
        if self.chunk != (job.split, job.seeds):
            self.workloads = [self.plant.scenario.generate(seed, split=job.split) for seed in job.seeds]
            self.chunk = (job.split, job.seeds)
        policy = pickle.loads(self.pickled[job.name])
        return play(self.plant, policy, job.name, self.workloads, job.seeds, max_steps)


def evaluate_policies(
    scenario: Scenario,
    policies: Mapping[str, Policy],
    episodes: int,
    *,
    split: Split = "heldout",
    first_seed: int = 0,
    progress: Progress = silent,
    workers: int | Crew | None = None,
) -> dict[str, EpisodeResults]:
    """Runs every policy on the same episodes.

    Args:
        scenario: the world.
        policies: by the name to report; policies must be picklable.
        episodes: E, at least 1.
        split: "heldout" for claims, "validation" for choices.
        first_seed: episodes have seeds first_seed .. first_seed + episodes - 1.
        progress: called with (episodes done, episodes in all).
        workers: a crew, or processes; 1 for none beside this one, None for as many as there are cores where that pays.

    Returns:
        Results by name, in the order of `policies`.

    Raises:
        InputError: an episode without requests, or no policy.
    """
    announce_compilation()
    seeds = range(first_seed, first_seed + episodes)
    chunks = [tuple(seeds[i : i + CHUNK_EPISODES]) for i in range(0, episodes, CHUNK_EPISODES)]
    jobs = [Job(name, split, chunk) for chunk in chunks for name in policies]
    if workers is None:
        outcomes = _in_processes_if_it_pays(scenario, policies, jobs, min(usable_cores(), len(jobs)))
    else:
        outcomes = shared_out(start_examiner, (scenario, dict(policies)), jobs, workers)
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


def play(
    plant: Plant,
    policy: Policy,
    name: str,
    workloads: Sequence[Workload],
    seeds: Sequence[int],
    max_steps: int | None = None,
) -> EpisodeResults:
    """Plays one policy on one world per workload until all are settled, and collects what their ledgers say."""
    from envs.worlds import FleetWorlds

    worlds = FleetWorlds(plant, len(workloads))
    worlds.load_all(workloads)
    if isinstance(policy, Deciders):
        policy.run(worlds, max_steps)
    else:
        worlds.run(policy, max_steps)
    replicas_of = np.bincount(plant.spec.pool_of_replica, minlength=len(plant.spec.pools))
    return EpisodeResults(
        policy=name,
        class_names=plant.layout.class_names,
        pool_names=plant.scenario.pool_names,
        pool_replicas=tuple(replicas_of.tolist()),
        seeds=np.asarray(seeds, dtype=np.int64),
        ledger_usd=worlds.ledger_usd,
        counts=worlds.counts,
        action_counts=worlds.action_counts,
        tier_counts=tier_counts(worlds, workloads),
        utilisation=np.asarray(worlds.utilisation),
        horizon_s=np.array([workload.horizon_s for workload in workloads]),
        latency_histogram=latency_histogram(worlds, workloads),
        workflow_usd=worlds.books.arrays.usd,
        workflow_counts=worlds.books.arrays.counts,
        tenant_counts=tenant_counts(worlds, workloads),
        workflow_names=tuple(plant.scenario.plans.workflows),
        hazard_usd=plant.hazard_usd,
    )


def tier_counts(worlds: FleetWorlds, workloads: Sequence[Workload]) -> NDArray[np.int64]:
    """(N, T) requests sent to each tier; those answered from the cache or shed went to none."""
    layout = worlds.plant.layout
    counts = np.zeros((len(workloads), len(layout.tier_names)), dtype=np.int64)
    for w, workload in enumerate(workloads):
        answered_by = worlds.loads["answered_by"][w, : workload.n_requests]
        counts[w] = np.bincount(layout.tier[answered_by[answered_by >= 0]], minlength=counts.shape[1])
    return counts


def latency_histogram(worlds: FleetWorlds, workloads: Sequence[Workload]) -> NDArray[np.int64]:
    """(N, 3, K, BINS) requests answered by a replica or provider, by TTFT, TPOT and E2E from arrival."""
    from envs.fleet.state import COMPLETED

    classes = len(worlds.plant.layout.class_names)
    counts = np.zeros((len(workloads), len(METRICS), classes, BINS), dtype=np.int64)
    for w, workload in enumerate(workloads):
        request = worlds.fleet.requests[w, : workload.n_requests]
        answered = request["status"] == COMPLETED
        first_s, last_s = request["first_token_at_s"][answered], request["completed_at_s"][answered]
        arrived_s = worlds.loads["arrived_at_s"][w, : workload.n_requests][answered]
        gaps = np.maximum(workload.output_tokens[answered] - 1, 1)
        latencies_s = (first_s - arrived_s, (last_s - first_s) / gaps, last_s - arrived_s)
        for m, latency_s in enumerate(latencies_s):
            counts[w, m] = histogram(latency_s, workload.class_index[answered], classes)
    return counts


def start_examiner(scenario: Scenario, policies: Mapping[str, Policy]) -> Callable[[Job], EpisodeResults]:
    """What a process plays its jobs with."""
    return Examiner(scenario, policies).play


def _in_processes_if_it_pays(
    scenario: Scenario, policies: Mapping[str, Policy], jobs: Sequence[Job], workers: int
) -> Generator[EpisodeResults, None, None]:
    """Works in this process until the work left, judged by the last job, is worth starting others."""
    examiner = Examiner(scenario, policies)
    if workers > 1:
        examiner.play(Job(jobs[0].name, jobs[0].split, jobs[0].seeds[:1]), max_steps=1)  # compiles, or loads kernels
    for done, job in enumerate(jobs, start=1):
        started_s = time.monotonic()
        yield examiner.play(job)
        left_s = (time.monotonic() - started_s) * (len(jobs) - done)
        if workers > 1 and left_s > PROCESSES_PAY_S:
            yield from shared_out(start_examiner, (scenario, dict(policies)), jobs[done:], workers)
            return
