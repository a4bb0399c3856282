"""Plans and classes of a scenario as numbers: one record of `TERMS` per class."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from envs.economics.plans import TERMS
from envs.scenario_plans import MONTH_S, CommitPlan, CustomerClass, Limits, PrepaidPlan, Retention, SeatPlan, SloWindow
from marginroute.contracts import BEYOND
from marginroute.pricing import PER_MTOK
from marginroute.rate_limits import RateLimit

if TYPE_CHECKING:
    from envs.scenario import Scenario

Array = np.ndarray[Any, Any]

_LIFETIME = ("bad_lifetime_usd", "missed_lifetime_usd", "unserved_lifetime_usd")
_NO_LIMIT = {
    "period_s": math.inf,
    "quota_requests": math.inf,
    "prepaid_usd": math.inf,
    "rate_per_s": math.inf,
    "rate_burst": math.inf,
    "context_tokens": math.inf,
    "window_s": math.inf,
    "beyond_factor": 1.0,
}


def terms(scenario: Scenario) -> Array:
    """(K,) `TERMS` of the classes."""
    table = np.zeros(len(scenario.class_names), dtype=TERMS)
    for record, customer in zip(table, scenario.plans.classes.values(), strict=True):
        for name, value in _NO_LIMIT.items():
            record[name] = value
        _fill_price(record, scenario, customer)
        _fill_limits(record, customer.limits)
        slo, remedies = customer.slo, customer.remedies
        for name in ("ttft", "tpot", "e2e"):
            promised = getattr(slo, f"{name}_s")
            record[f"slo_{name}_s"] = math.inf if promised is None else promised
            record[f"{name}_credit_share"] = getattr(slo, f"{name}_credit_share")
        if slo.window is not None:
            _fill_window(record, slo.window)
        for name in ("refund_share", "bad_answer_usd", "unserved_credit_share", "unserved_credit_usd"):
            record[name] = getattr(remedies, name)
        if customer.retention is not None and scenario.objective == "margin_and_lifetime":
            for name, usd in zip(_LIFETIME, lifetime_usd(customer.retention), strict=True):
                record[name] = usd
        record["patience_s"] = math.inf if customer.patience is None else customer.patience.median_s
        record["delay_tolerant"] = float(customer.delay_tolerant is not None)
    return table


def billing(scenario: Scenario, entropy: tuple[int, ...]) -> Array:
    """(G, 2) where each customer's billing period stands at the start of an episode, and what it has used (shares)."""
    customers = scenario.plans.classes.values()
    rng = np.random.default_rng(entropy)
    low, high = np.repeat([c.used_at_start for c in customers], [c.tenants for c in customers], axis=0).T
    shares = rng.random((len(low), 2))
    shares[:, 1] = low + (high - low) * shares[:, 1]
    return shares


def lifetime_usd(retention: Retention | None) -> tuple[float, float, float]:
    """USD of lifetime value that a bad answer, a missed SLO and no answer cost in expectation."""
    if retention is None:
        return 0.0, 0.0, 0.0
    usd = retention.lifetime_value_usd
    return usd * retention.hazard_bad_answer, usd * retention.hazard_missed_slo, usd * retention.hazard_unserved


def hazard_usd(scenario: Scenario) -> Array:
    """(3, K) of `lifetime_usd`, whatever the objective."""
    return np.array([lifetime_usd(customer.retention) for customer in scenario.plans.classes.values()]).T


def _fill_price(record: Any, scenario: Scenario, customer: CustomerClass) -> None:
    plan = scenario.plans.plans[customer.plan]
    if isinstance(plan, SeatPlan):
        record["request_value_usd"] = plan.seat_usd_per_month / plan.included_requests_per_month
        usd_per_s = plan.seats * plan.seat_usd_per_month / MONTH_S
        record["seat_usd_per_s"] = usd_per_s * _share_of_plan(scenario, customer)
        if plan.fair_use is not None:
            record["period_s"] = plan.fair_use.period_s
            record["quota_requests"] = plan.fair_use.requests_per_tenant
            record["beyond"] = BEYOND.index(plan.fair_use.beyond)
            record["overage_usd"] = plan.fair_use.overage_usd
        return
    cached = plan.input_usd_per_mtok if plan.cached_input_usd_per_mtok is None else plan.cached_input_usd_per_mtok
    record["input_usd_per_token"] = plan.input_usd_per_mtok * PER_MTOK
    record["cached_input_usd_per_token"] = cached * PER_MTOK
    record["output_usd_per_token"] = plan.output_usd_per_mtok * PER_MTOK
    record["request_usd"] = plan.request_usd
    if isinstance(plan, PrepaidPlan):
        record["period_s"], record["prepaid_usd"] = plan.period_s, plan.credits_usd_per_tenant
    elif isinstance(plan, CommitPlan):
        record["period_s"], record["committed_usd"] = plan.period_s, plan.committed_usd_per_tenant
        record["beyond_factor"] = plan.beyond_factor
        record["commitment_usd_per_s"] = customer.tenants * plan.committed_usd_per_tenant / plan.period_s


def _share_of_plan(scenario: Scenario, customer: CustomerClass) -> float:
    """A plan's seats belong to its classes in proportion to their requests."""
    classes, share = scenario.plans.classes, scenario.workload.class_share
    same = {name: share[name] for name, other in classes.items() if other.plan == customer.plan}
    return next(share[name] for name, other in classes.items() if other is customer) / sum(same.values())


def _fill_limits(record: Any, limits: Limits) -> None:
    if limits.requests_per_minute is not None:
        limit = RateLimit(limits.requests_per_minute, limits.burst_requests or 0.0)
        record["rate_per_s"], record["rate_burst"] = limit.requests_per_s, limit.size_requests
    if limits.prompt_tokens is not None:
        record["context_tokens"] = limits.prompt_tokens


def _fill_window(record: Any, window: SloWindow) -> None:
    first, last = window.credits[0], window.credits[-1]
    record["window_s"], record["window_target"], record["window_share"] = window.length_s, first.below, first.share
    if last is not first:
        record["window_low_target"], record["window_low_share"] = last.below, last.share
