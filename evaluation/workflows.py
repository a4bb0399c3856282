"""What tasks that pay when they succeed (workflows) earn and cost, for the JSON document and the table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from envs.economics.ledger import ACCOUNTS, FIXED_COST_ACCOUNTS, REVENUE_ACCOUNTS
from envs.world_tasks import WORKFLOW_COUNTS
from evaluation.results import EpisodeResults

REMEDY_ACCOUNTS = ("slo_credits", "unserved_credits", "refunds")
VARIABLE_COST_ACCOUNTS = tuple(
    name for name in ACCOUNTS if name not in (*REVENUE_ACCOUNTS, *REMEDY_ACCOUNTS, *FIXED_COST_ACCOUNTS)
)


def workflow_documents(results: EpisodeResults) -> dict[str, dict[str, Any]]:
    """By kind of task; what is per finished task is null where none was finished."""
    return {name: _workflow_document(results, i) for i, name in enumerate(results.workflow_names)}


def _workflow_document(results: EpisodeResults, i: int) -> dict[str, Any]:
    """What a kind of task earns and costs: variable cost, since nobody knows whose the GPU-hours are."""

    def per_task(names: Sequence[str]) -> float | None:
        finished = float(results.workflow_count("finished")[i])
        return float(results.workflow_usd_of(names)[i]) / finished if finished > 0.0 else None

    counts = {name: float(results.workflow_count(name)[i]) for name in WORKFLOW_COUNTS}
    begun = max(counts["begun"], 1e-9)
    cost = per_task(VARIABLE_COST_ACCOUNTS)
    return {
        "tasks": counts["begun"],
        "finished_share": counts["finished"] / begun,
        "failed_share": counts["failed"] / begun,
        "calls": counts["calls"],
        "answered_calls": counts["answered"],
        "revenue_per_finished_task_usd": per_task(REVENUE_ACCOUNTS),
        "cost_per_finished_task_usd": None if cost is None else -cost + 0.0,
        "remedies_per_finished_task_usd": None if (given := per_task(REMEDY_ACCOUNTS)) is None else -given + 0.0,
    }
