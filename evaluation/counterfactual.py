"""What one decision was worth: the same episode again, with another choice at one place, same requests, same luck.

Every counterfactual is a world of its own that makes all decisions of the episode as it was played but the one that is
swapped. The worth of the policy's choice is its margin less that of the swapped world, with what follows for others
in queues and caches. All other decisions stay as they were (where one is no longer legal, the policy decides again).
Would the policy decide anew after every swap, its later choices would differ here and there by chance, and their luck
(several times a request's value) would drown the worth of one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from envs.plant import Plant
from envs.workload.requests import Workload
from envs.worlds import FleetWorlds
from marginroute.policy import Policy
from marginroute.view import Array, View

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

MOST_TURNS = 256  # decisions about one request that are told apart (deferral, retries)
WORLDS_AT_ONCE = 50  # swapped ones; of a scenario with large prompt caches 200 take 4 GiB


@dataclass(frozen=True)
class Differences:
    """Decisions of an episode in which two policies differ, seen from the first one's states.

    Attributes:
        decision: (D,) index of the decision, ascending.
        choice, other: (D,) candidates that the first and the second policy take.
        view: the views, (..., D, C).
        decisions: number of decisions of the episode.
    """

    decision: Ints
    choice: Ints
    other: Ints
    view: View
    decisions: int


def differences(plant: Plant, policy: Policy, reference: Policy, workload: Workload) -> Differences:
    """Plays `policy` and asks `reference` at every decision what it would do."""
    worlds = _start(plant, policy, [workload])
    found: list[tuple[int, int, int, View]] = []
    step = 0
    while not worlds.done[0]:
        view = worlds.view()
        choice, other = int(policy.decide_batch(view)[0]), int(reference.decide_batch(view)[0])
        if choice != other:
            found.append((step, choice, other, view[0].copy()))
        worlds.step(np.array([choice]))
        step += 1
    columns = [np.array(column, dtype=np.int64) for column in zip(*((f[0], f[1], f[2]) for f in found), strict=True)]
    decision, choices, others = columns or [np.zeros(0, dtype=np.int64)] * 3
    return Differences(decision, choices, others, _stacked(plant, [f[3] for f in found]), step)


def view_of_decision(plant: Plant, policy: Policy, workload: Workload, decision: int) -> tuple[View | None, int]:
    """The view of one decision under a policy, and the number of decisions made; None if there are fewer."""
    worlds = _start(plant, policy, [workload])
    step = 0
    while not worlds.done[0]:
        view = worlds.view()
        if step == decision:
            return view[0].copy(), step
        worlds.step(policy.decide_batch(view))
        step += 1
    return None, step


def worth_usd(plant: Plant, policy: Policy, workload: Workload, decision: Ints, other: Ints) -> Floats:
    """Margin of the episode as played, less its margin with `other[k]` taken at `decision[k]`.

    Args:
        plant: the scenario's constants.
        policy: decides everything else.
        workload: the episode.
        decision: (K,) indices of decisions.
        other: (K,) candidates to take there.

    Returns:
        (K,) USD.
    """
    made, margin_usd = _played(plant, policy, workload)
    parts = [slice(start, start + WORLDS_AT_ONCE) for start in range(0, len(decision), WORLDS_AT_ONCE)]
    swapped_usd = [_swapped_usd(plant, policy, workload, decision[part], other[part], made) for part in parts]
    return margin_usd - np.concatenate([np.zeros(0), *swapped_usd])


def _played(plant: Plant, policy: Policy, workload: Workload) -> tuple[Ints, float]:
    """Choices of an episode by request and turn, (N, MOST_TURNS), -1 where there was none; and its margin."""
    worlds = _start(plant, policy, [workload])
    made = np.full((workload.n_requests, MOST_TURNS), -1, dtype=np.int64)
    turn = np.zeros(workload.n_requests, dtype=np.int64)
    while not worlds.done[0]:
        request, choice = int(worlds.desks["current"][0]), policy.decide_batch(worlds.view())
        made[request, min(turn[request], MOST_TURNS - 1)] = choice[0]
        turn[request] += 1
        worlds.step(choice)
    return made, float(worlds.ledger_usd.sum())


def _swapped_usd(plant: Plant, policy: Policy, workload: Workload, decision: Ints, other: Ints, made: Ints) -> Floats:
    """(K,) margins of the episode with one decision swapped in each world, all others as they were `made`."""
    worlds = _start(plant, policy, [workload] * len(decision))
    rows = np.arange(len(decision))
    turn = np.zeros((len(rows), workload.n_requests), dtype=np.int64)  # how often a request was decided
    step = 0
    while not worlds.done.all():
        view, request = worlds.view(), worlds.desks["current"].astype(np.int64)
        playing = ~worlds.done
        kept = made[request, np.minimum(turn[rows, request], MOST_TURNS - 1)]
        lost = playing & ((kept < 0) | ~view.legal[rows, np.maximum(kept, 0)])
        if lost.any():
            kept = np.where(lost, policy.decide_batch(view), kept)
        swapped = decision == step
        kept[swapped] = other[swapped]
        turn[rows[playing], request[playing]] += 1
        worlds.step(kept)
        step += 1
    return np.asarray(worlds.ledger_usd.sum(axis=(1, 2)))


def _start(plant: Plant, policy: Policy, workloads: list[Workload]) -> FleetWorlds:
    worlds = FleetWorlds(plant, len(workloads))
    worlds.load_all(workloads)
    worlds.follow(policy)
    return worlds


def _stacked(plant: Plant, views: list[View]) -> View:
    """Views of single decisions as one of many."""

    def stack(arrays: list[Array], axis: int, empty: tuple[int, ...], kind: Any) -> Array:
        return np.stack(arrays, axis=axis) if arrays else np.zeros(empty, dtype=kind)

    candidates = plant.layout.n_candidates
    return View(
        plant.layout,
        stack([x.signals for x in views], 1, (0, 0, candidates), np.float64),
        stack([x.request for x in views], 1, (0, 0), np.float64),
        stack([x.legal for x in views], 0, (0, candidates), np.bool_),
    )
