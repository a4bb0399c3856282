"""Verifiers and tasks of the worlds: their arrays, sized by what is loaded, and the sessions of an episode."""

from __future__ import annotations

from typing import Any

import numpy as np

from envs.economics.ledger import ACCOUNTS
from envs.fleet.state import record_array
from envs.scenario import Scenario
from envs.workload.requests import Workload
from envs.workload.sessions import SessionKind, draw_sessions
from envs.world_hedge import HEDGE, NOWHERE, TIMER
from envs.world_tasks import TASK, TRIAL, VERIFIER, WORKFLOW, WORKFLOW_COUNTS, TaskArrays
from marginroute.pricing import PER_MTOK
from marginroute.verification import passes_from, separation
from marginroute.view import Array


def verifiers(scenario: Scenario) -> Array:
    """(K, J) `VERIFIER` of every class and task."""
    classes, tasks = scenario.class_names, scenario.task_names
    table = record_array((len(classes), len(tasks)), VERIFIER)
    for item in scenario.fleet.verifiers.values():
        distance, raw = separation(item.sensitivity, item.specificity)
        for k in [classes.index(name) for name in item.classes or classes]:
            for j in [tasks.index(name) for name in item.tasks or tasks]:
                row = table[k, j]
                row["distance"], row["passes_from"] = distance, passes_from(distance, raw)
                row["verify_usd_per_token"] = item.verify_usd_per_mtok * PER_MTOK
                for name in ("max_attempts", "verify_s", "verify_usd", "leave_share", "fresh_share"):
                    row[name] = getattr(item, name)
    return table


def workflows(scenario: Scenario) -> Array:
    """(W,) `WORKFLOW`."""
    table = record_array(len(scenario.plans.workflows), WORKFLOW)
    composition = scenario.workload_spec.composition
    for w, (row, item) in enumerate(zip(table, scenario.plans.workflows.values(), strict=True)):
        for name in ("value_usd", "good_share", "final_good"):
            row[name] = getattr(item, name)
        kinds = [kind for kind in (composition.sessions if composition else ()) if kind.workflow == w]
        row["bad_usd"] = item.value_usd * lost_by_bad_answer(item.final_good, item.good_share, _mean_calls(kinds[0]))
    return table


def lost_by_bad_answer(final_good: bool, good_share: float, mean_calls: float) -> float:
    """Share of a task's value that a bad answer of one of its calls loses, as an operator may take it.

    One call in `mean_calls` is the last. A task of that many calls bears (1 - good_share) of them bad, so that a bad
    answer uses up one part in one more than those. The two dangers are taken for independent.
    """
    last = 1.0 / mean_calls if final_good else 0.0
    spent = 1.0 / ((1.0 - good_share) * mean_calls + 1.0) if good_share > 0.0 else 0.0
    return 1.0 - (1.0 - last) * (1.0 - spent)


def _mean_calls(kind: SessionKind) -> float:
    """Calls of a session of a kind, on average: what an operator's history tells."""
    sessions = 1000
    return len(draw_sessions(kind, np.random.default_rng(0), np.arange(sessions)).root) / sessions


class TaskBooks:
    """Verifiers, tasks and second calls of N worlds.

    Args:
        table: (K, J) `VERIFIER`.
        paid: (W,) `WORKFLOW`.
        shared_luck: whether one luck decides for all models.
        lookup_s: of a tool's result that is kept; inf: none is.
        n_worlds: N.
        hedges: whether a class may hedge.

    Attributes:
        arrays: what the kernels take.
    """

    def __init__(
        self,
        table: Array,
        paid: Array,
        shared_luck: bool,
        lookup_s: float,
        n_worlds: int,
        hedges: bool,
    ) -> None:
        self.lookup_s, self.hedges = lookup_s, hedges
        self.verified, self.attempts = table["max_attempts"], int(table["max_attempts"].max(initial=0))
        self.least_verify_s = float(table["verify_s"][self.verified > 0].min(initial=np.inf))
        self.arrays = TaskArrays(
            verifiers=table,
            trials=record_array((n_worlds, 0), TRIAL),
            luck=np.zeros((n_worlds, 0, self.attempts, 3)),
            workflows=paid,
            tasks=record_array((n_worlds, 0), TASK),
            usd=np.zeros((n_worlds, len(ACCOUNTS), len(paid))),
            counts=np.zeros((n_worlds, len(WORKFLOW_COUNTS), len(paid))),
            before=np.zeros((n_worlds, len(ACCOUNTS))),
            shared_luck=np.array([float(shared_luck)]),
            hedges=record_array((n_worlds, 0), HEDGE),
            timers=record_array((n_worlds, len(table)), TIMER),
            results=np.full((n_worlds, 0), -np.inf),
        )

    def make_room(self, workload: Workload) -> bool:
        """Grows the arrays for an episode; running ones survive. True if anything changed."""
        old, n = self.arrays, len(self.arrays.before)
        has = (old.trials.shape[1], old.tasks.shape[1], old.results.shape[1], old.hedges.shape[1])
        wanted = (
            workload.n_requests if self.attempts else 0,
            int(workload.session_index.max(initial=-1)) + 1,
            int(workload.tool_key.max(initial=-1)) + 1,
            workload.n_requests if self.hedges else 0,
        )
        size = tuple(max(pair) for pair in zip(has, wanted, strict=True))
        if size == has:
            return False
        new = old._replace(
            trials=record_array((n, size[0]), TRIAL),
            luck=np.zeros((n, size[0], self.attempts, 3)),
            tasks=record_array((n, size[1]), TASK),
            results=np.full((n, size[2]), -np.inf),
            hedges=record_array((n, size[3]), HEDGE),
        )
        new.hedges[:, : has[3]] = old.hedges
        new.results[:, : has[2]] = old.results
        new.trials[:, : has[0]], new.luck[:, : has[0]], new.tasks[:, : has[1]] = old.trials, old.luck, old.tasks
        self.arrays = new
        return True

    def load(self, w: int, workload: Workload, desk: Any, load: Any) -> None:
        """Empties the books of world `w` and gives them the sessions of an episode.

        Args:
            w: world.
            workload: of the episode.
            desk: (1,) its `DESK` record.
            load: (M,) its `LOAD` records, linked by `load_sessions`.
        """
        books, m = self.arrays, workload.n_requests
        books.usd[w] = books.counts[w] = 0.0
        books.results[w] = -np.inf
        books.timers["head"][w] = books.timers["tail"][w] = -1
        if self.hedges:
            books.hedges["row"][w, :m], books.hedges["second"][w, :m] = np.arange(m), -1
            books.hedges["state"][w, :m] = NOWHERE
        load["tool_key"], load["tool_usd"] = workload.tool_key, workload.tool_usd
        if self.lookup_s < np.inf and (workload.tool_key >= 0).any():
            desk["least_think_s"] = np.minimum(desk["least_think_s"], self.lookup_s)
        load["turned_down"], load["session"], load["workflow"] = 0, workload.session_index, workload.workflow_index
        load["verified"] = self.verified[workload.class_index, workload.task_index] if self.attempts else 0
        load["leads"] = (load["first_child"] >= 0) | (load["verified"] > 0)
        desk["session_station"], desk["tried"] = -1, 1
        desk["race_head"] = desk["shown_at"] = -1
        if self.attempts:
            desk["least_think_s"] = np.minimum(desk["least_think_s"], self.least_verify_s)
            books.luck[w, :m] = attempts(workload.attempt_luck, self.attempts)
        tasks = books.tasks[w]
        tasks[...] = np.zeros((), dtype=TASK)
        tasks["station"], tasks["workflow"] = -1, -1
        rows = np.flatnonzero(workload.session_index >= 0)
        if len(rows):
            session = workload.session_index[rows]
            tasks["workflow"][session] = workload.workflow_index[rows]
            tasks["class_index"][session], tasks["all_calls"][session] = (
                workload.class_index[rows],
                workload.task_calls[rows],
            )
            tasks["last_row"][session] = rows  # the last one counts
            tasks["calls"] = np.bincount(session, minlength=len(tasks))


def attempts(luck: Array, count: int) -> Array:
    """(M, A, 3); a workload without luck of its own is looked at without noise, and nobody leaves."""
    if luck.shape[1] >= count:
        return luck[:, :count]
    return np.broadcast_to(np.array([0.0, 1.0, 1.0]), (len(luck), count, 3))
