"""What one policy did in the episodes of a comparison: plain arrays, one row per episode."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from envs.economics.ledger import ACCOUNTS, COUNTS, FIXED_COST_ACCOUNTS, REVENUE_ACCOUNTS
from envs.world_tasks import WORKFLOW_COUNTS
from evaluation.latency import METRICS, quantile
from marginroute.errors import InputError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

ARRAYS = (
    "seeds",
    "ledger_usd",
    "counts",
    "action_counts",
    "tier_counts",
    "utilisation",
    "horizon_s",
    "latency_histogram",
    "workflow_usd",
    "workflow_counts",
    "tenant_counts",
)


@dataclass(frozen=True)
class EpisodeResults:
    """E episodes of one policy; row e of every policy of a comparison is the same workload.

    Attributes:
        policy: name.
        class_names: K customer classes.
        pool_names: P self-hosted pools.
        pool_replicas: replicas of each pool.
        seeds: (E,) int64.
        ledger_usd: (E, A, K + 1) accounts x classes, costs negative; the last column is shared by all classes.
        counts: (E, len(COUNTS), K).
        action_counts: (E, 5) decisions by kind, in the order of `marginroute.view.KINDS`.
        tier_counts: (E, T) decisions that sent a request to each tier.
        utilisation: (E, P) share of the time in which a pool's replicas were busy.
        horizon_s: (E,).
        latency_histogram: (E, 3, K, BINS) requests answered by a replica or provider, by TTFT, TPOT and E2E
            (bins of `evaluation.latency`); answers from the response cache are not in it.
        workflow_usd: (E, A, W) what the calls and successes of each kind of task were posted with.
        workflow_counts: (E, 5, W), in the order of `envs.world_tasks.WORKFLOW_COUNTS`.
        tenant_counts: (E, 3, K, G) calls, answers, and answers inside every SLO, of each customer of a class.
        workflow_names: W kinds of task that pay when they succeed.
        hazard_usd: (3, K) lifetime value that a bad answer, a missed SLO and no answer cost in expectation; None: none.
    """

    policy: str
    class_names: tuple[str, ...]
    pool_names: tuple[str, ...]
    pool_replicas: tuple[int, ...]
    seeds: Ints
    ledger_usd: Floats
    counts: Ints
    action_counts: Ints
    tier_counts: Ints
    utilisation: Floats
    horizon_s: Floats
    latency_histogram: Ints
    hazard_usd: Floats | None = None
    workflow_usd: Floats = None  # type: ignore[assignment]
    workflow_counts: Floats = None  # type: ignore[assignment]
    tenant_counts: Ints = None  # type: ignore[assignment]
    workflow_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.tenant_counts is None:
            nobody = np.zeros((len(self.seeds), 3, len(self.class_names), 0), dtype=np.int64)
            object.__setattr__(self, "tenant_counts", nobody)
        for name, rows in (("workflow_usd", ACCOUNTS), ("workflow_counts", WORKFLOW_COUNTS)):
            if getattr(self, name) is None:
                object.__setattr__(self, name, np.zeros((len(self.seeds), len(rows), 0)))

    def episodes(self, rows: slice) -> EpisodeResults:
        """Some of the episodes."""
        part: dict[str, Any] = {name: getattr(self, name)[rows] for name in ARRAYS}
        return replace(self, **part)

    @property
    def first_calls(self) -> Ints:
        """(E,) exogenous requests: the denominator of every "per 1k", the same for all policies."""
        return np.asarray(self.count("first_calls").sum(axis=-1))

    @property
    def margin_usd(self) -> Floats:
        """(E,) everything in the ledger."""
        return np.asarray(self.ledger_usd.sum(axis=(1, 2)))

    @property
    def revenue_usd(self) -> Floats:
        """(E,) usage, seats, commitments and overage, before credits and refunds."""
        return np.asarray(self.accounts_usd(REVENUE_ACCOUNTS).sum(axis=-1))

    @property
    def lifetime_usd(self) -> Floats:
        """(E,) change of customer lifetime value, at most 0, whether or not the objective counts it."""
        if self.hazard_usd is None:
            return np.zeros(len(self.seeds))
        lost = self.count("shed") + self.count("abandoned") + self.count("failed")
        bad, late = self.count("served") - self.count("good"), self.count("served") - self.count("slo_ok")
        return -np.asarray(sum(n @ usd for n, usd in zip((bad, late, lost), self.hazard_usd, strict=True)))

    @property
    def cash_usd(self) -> Floats:
        """(E,) margin without lifetime value."""
        return np.asarray(self.margin_usd - self.accounts_usd(("lifetime_value",)).sum(axis=-1))

    @property
    def contribution_usd(self) -> Floats:
        """(E,) margin before fixed cost: revenue - credits - refunds - API spend - energy - cache."""
        return np.asarray(self.margin_usd - self.accounts_usd(FIXED_COST_ACCOUNTS).sum(axis=-1))

    @property
    def contribution_by_class_usd(self) -> Floats:
        """(E, K) what the class itself brought and caused, before fixed cost and anything else shared."""
        variable = [a for a, name in enumerate(ACCOUNTS) if name not in FIXED_COST_ACCOUNTS]
        return np.asarray(self.ledger_usd[:, variable, :-1].sum(axis=1))

    def accounts_usd(self, names: Sequence[str]) -> Floats:
        """(E, K + 1) sum of the named accounts."""
        return np.asarray(self.ledger_usd[:, [ACCOUNTS.index(name) for name in names]].sum(axis=1))

    def count(self, name: str) -> Ints:
        """(E, K) one of `COUNTS`."""
        return np.asarray(self.counts[:, COUNTS.index(name)])

    def share(self, numerator: str, denominator: str = "calls") -> Floats:
        """(K,) ratio of two counts over all episodes; NaN for a class without any.

        Calls that a contract refused promise nothing: only the share of these is one of all calls.
        """
        below = self.count(denominator).sum(axis=0)
        if denominator == "calls" and numerator != "refused":
            below = below - self.count("refused").sum(axis=0)
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.asarray(self.count(numerator).sum(axis=0) / below)

    def latency_s(self, metric: str, q: float) -> Floats:
        """(K,) quantile of `ttft`, `tpot` or `e2e` over the answered requests of all episodes."""
        return quantile(self.latency_histogram[:, METRICS.index(metric)].sum(axis=0), q)

    def workflow_usd_of(self, names: Sequence[str]) -> Floats:
        """(W,) sum of the named accounts over all episodes, of each kind of task."""
        return np.asarray(self.workflow_usd[:, [ACCOUNTS.index(name) for name in names]].sum(axis=(0, 1)))

    def workflow_count(self, name: str) -> Floats:
        """(W,) one of `WORKFLOW_COUNTS` over all episodes."""
        return np.asarray(self.workflow_counts[:, WORKFLOW_COUNTS.index(name)].sum(axis=0))

    @property
    def tier_shares(self) -> tuple[float, ...]:
        """(T,) share of the requests sent to each tier, for the content-blind control."""
        total = self.tier_counts.sum(axis=0)
        return tuple((total / max(int(total.sum()), 1)).tolist())


def concatenate(parts: Sequence[EpisodeResults]) -> EpisodeResults:
    """Joins the episodes of one policy, ordered by seed."""
    order = np.argsort(np.concatenate([part.seeds for part in parts]), kind="stable")
    tenants = max(part.tenant_counts.shape[3] for part in parts)
    parts = [replace(part, tenant_counts=_wider(part.tenant_counts, tenants)) for part in parts]
    joined: dict[str, Any] = {name: np.concatenate([getattr(part, name) for part in parts])[order] for name in ARRAYS}
    return replace(parts[0], **joined)


def _wider(counts: Ints, tenants: int) -> Ints:
    """The same counts with room for so many customers."""
    return np.pad(counts, ((0, 0), (0, 0), (0, 0), (0, tenants - counts.shape[3])))


def check_paired(results: Mapping[str, EpisodeResults]) -> None:
    """Refuses a comparison whose policies did not meet the same requests.

    Raises:
        InputError: no policy, an empty episode, or episodes that differ between policies.
    """
    if not results:
        raise InputError("nothing to compare: give at least one --policy or one of --baselines")
    first = next(iter(results.values()))
    for seed, n in zip(first.seeds, first.first_calls, strict=True):
        if n == 0:
            raise InputError(f"episode {seed} has no requests: lengthen the horizon or raise the arrival rate")
    for other in results.values():
        same = np.array_equal(first.seeds, other.seeds)
        if not (same and np.array_equal(first.count("first_calls"), other.count("first_calls"))):
            raise InputError(f"{other.policy} and {first.policy} were not run on the same requests: rerun both")
