"""Fairness between the customers of a class: whether some of them get worse service than others.

Jain's index of the x_t of n customers (Jain, Chiu and Hawe, A quantitative measure of fairness and discrimination,
DEC-TR-301, 1984),

    J = (sum x_t)^2 / (n sum x_t^2),    from 1 / n (one gets everything) to 1 (all alike),

with x_t the share of a customer's calls that were answered inside every SLO, and beside it the worst and the best of
them. Customers with few calls have had luck, good or bad, and are left out: with k calls each and the same chance p for
everybody, J is about 1 / (1 + (1 - p) / (p k)) by luck alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from evaluation.results import EpisodeResults, Floats, Ints

if TYPE_CHECKING:
    from envs.workload.requests import Workload
    from envs.worlds import FleetWorlds

LEAST_CALLS = 30
CALLS, ANSWERED, MET = range(3)


def tenant_counts(worlds: FleetWorlds, workloads: Sequence[Workload]) -> Ints:
    """(N, 3, K, G) calls, answers, and answers inside every SLO, by class and customer; refused calls are in none."""
    from envs import world_state as state

    classes = len(worlds.plant.layout.class_names)
    tenants = max((int(workload.tenant_index.max(initial=0)) for workload in workloads), default=0) + 1
    counts = np.zeros((len(workloads), 3, classes, tenants), dtype=np.int64)
    for w, workload in enumerate(workloads):
        outcome = worlds.loads["outcome"][w, : workload.n_requests]
        customer = workload.class_index * tenants + workload.tenant_index
        ends = (outcome != state.OPEN, (outcome == state.MET) | (outcome == state.MISSED), outcome == state.MET)
        for row, chosen in enumerate(ends):
            counts[w, row] = np.bincount(customer[chosen], minlength=classes * tenants).reshape(classes, tenants)
    return counts


def jain(shares: Floats) -> float:
    """Jain's index of (n,) shares; 1 where nobody gets anything, since all are alike then."""
    total, squares = float(shares.sum()), float((shares**2).sum())
    return total**2 / (len(shares) * squares) if squares > 0.0 else 1.0


def fairness_documents(results: EpisodeResults) -> dict[str, dict[str, Any]]:
    """For each class with two customers or more that have calls enough: index, worst and best."""
    found = {}
    by_class = results.tenant_counts.sum(axis=0).swapaxes(0, 1)
    for name, (calls, answered, met) in zip(results.class_names, by_class, strict=True):
        known = calls >= LEAST_CALLS
        if known.sum() < 2:
            continue
        kept, served = met[known] / calls[known], answered[known] / calls[known]
        found[name] = {
            "customers": int(known.sum()),
            "jain": jain(kept),
            "worst_slo_attainment": float(kept.min()),
            "best_slo_attainment": float(kept.max()),
            "worst_served": float(served.min()),
        }
    return found
