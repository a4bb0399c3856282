"""What a gateway's log has earned, by customer class: the day-one figure, before anything is trained.

Every request is priced by the contract of its class, the same sum as the ledger's (`marginroute.earnings`): usage, less
service credits for the SLOs that its logged times missed, less refunds for bad answers, less what a provider charged.
Where feedback says whether an answer was good, that counts; elsewhere P(good) of the model for the task stands in.
Seats and GPU-hours go on by the hour, over the span of the log. Answers from a response cache are not in it: their
records have no outcome.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from envs.plant import Plant
from evaluation.columns import print_columns, stdout_console
from evaluation.logged_requests import Array, LoggedRequests
from evaluation.report import PER_1K, SECONDS_PER_HOUR
from marginroute import earnings
from marginroute import view as v

LEAST_SPAN_S = 1.0  # a shorter log counts as one of that span, and says nothing by the hour
OF_TERMS = {
    v.INPUT_PRICE_USD: "input_usd_per_token",
    v.OUTPUT_PRICE_USD: "output_usd_per_token",
    **{
        getattr(v, name.upper()): name
        for name in (
            *("request_value_usd", "refund_share", "bad_answer_usd", "slo_ttft_s", "slo_tpot_s", "slo_e2e_s"),
            *("ttft_credit_share", "tpot_credit_share", "e2e_credit_share"),
            *("unserved_credit_share", "unserved_credit_usd"),
        )
    },
}
"""Signals of a request that its class's contract gives."""


def request_signals(plant: Plant, logged: LoggedRequests) -> Array:
    """(Q, n) what `earnings` reads of every request."""
    request = np.zeros((len(v.REQUEST), len(logged.candidate)))
    request[v.PROMPT_TOKENS] = logged.prompt_tokens
    request[v.EXPECTED_OUTPUT_TOKENS] = logged.output_tokens
    for signal, name in OF_TERMS.items():
        request[signal] = plant.terms[name][logged.class_index]
    return request


def p_good(plant: Plant, logged: LoggedRequests) -> Array:
    """(n,) the feedback, or the public prior of the model that answered."""
    tiers = plant.layout.tier[logged.candidate]
    prior = np.array([plant.prior.p_good(0.0, task) for task in range(len(plant.layout.task_names))])  # (J, T)
    return np.where(np.isnan(logged.good), prior[logged.task_index, tiers], logged.good)


def margin_by_class(plant: Plant, logged: LoggedRequests) -> dict[str, Any]:
    """The log's margin.

    Returns:
        span_s, gpu_usd_per_hour, labelled: share of answers with feedback, classes: {name: {requests, answered: share,
        slo: share of answers that met every SLO that can be judged, and in USD per 1k requests usage, seats, credits,
        refunds, unserved, cost, margin: their sum, the contribution margin}}; a share of nothing is None.
    """
    request, done = request_signals(plant, logged), logged.completed
    span_s = max(float(np.ptp(logged.decided_at_s)), LEAST_SPAN_S)
    tokens = logged.prompt_tokens, logged.output_tokens
    at_once = np.zeros(len(done))
    usage_usd = earnings.answered_usd(request, at_once, at_once, *tokens, 1.0)
    credited_usd = earnings.answered_usd(request, logged.ttft_s, logged.e2e_s, *tokens, 1.0)
    net_usd = earnings.answered_usd(request, logged.ttft_s, logged.e2e_s, *tokens, p_good(plant, logged))
    met = _met(request, logged)
    parts = {
        "usage": np.where(done, usage_usd, 0.0),
        "credits": np.where(done, credited_usd - usage_usd, 0.0),
        "refunds": np.where(done, net_usd - credited_usd, 0.0),
        "unserved": np.where(done, 0.0, earnings.unserved_usd(request)),
        "cost": -np.nan_to_num(logged.cost_usd),
    }
    classes: dict[str, Any] = {}
    for k, name in enumerate(plant.layout.class_names):
        rows = logged.class_index == k
        n = max(int(rows.sum()), 1)
        usd = {part: float(PER_1K * x[rows].sum() / n) for part, x in parts.items()}
        usd["seats"] = float(PER_1K * plant.terms["seat_usd_per_s"][k] * span_s / n) if rows.any() else 0.0
        classes[name] = {
            "requests": int(rows.sum()),
            "answered": float(done[rows].sum() / n) if rows.any() else None,
            "slo": float(met[rows & done].mean()) if (rows & done).any() else None,
            **usd,
            "margin": sum(usd.values()),
        }
    return {
        "span_s": span_s,
        "gpu_usd_per_hour": sum(pool.paid_usd_per_hour for pool in plant.scenario.fleet.pools.values()),
        "labelled": float(np.mean(~np.isnan(logged.good[done]))) if done.any() else 0.0,
        "classes": classes,
    }


def _met(request: Array, logged: LoggedRequests) -> Array:
    """(n,) whether every SLO that could be judged was met."""
    seen_s = earnings.latencies_s(logged.ttft_s, logged.e2e_s, logged.output_tokens)
    return np.all([~(s > request[slo]) for (slo, _), s in zip(earnings.SLOS, seen_s, strict=True)], axis=0)


HEADS = ("class", "requests", "answered", "in SLO", "usage", "seats", "credits", "refunds", "unserved", "API", "margin")
PARTS = ("usage", "seats", "credits", "refunds", "unserved", "cost", "margin")


def print_margin(found: Mapping[str, Any]) -> None:
    """Prints the table, and the whole with GPU-hours."""
    console = stdout_console()
    console.print("\n[bold]What the log has earned[/bold], USD per 1,000 requests of the class\n")
    rows = []
    for name, row in found["classes"].items():
        shares = ("-" if row[key] is None else f"{100.0 * row[key]:.1f} %" for key in ("answered", "slo"))
        rows.append([name, f"{row['requests']:,}", *shares, *(f"{row[part]:z.2f}" for part in PARTS)])
    print_columns(console, HEADS, rows, (1, 1, 2, *[1] * len(PARTS)))
    console.print(f"\n{whole(found)}\n", markup=False)


def whole(found: Mapping[str, Any]) -> str:
    """Contribution margin, GPU-hours and net margin per hour, and what the refunds rest on."""
    hours = found["span_s"] / SECONDS_PER_HOUR
    usd = sum(row["requests"] * row["margin"] / PER_1K for row in found["classes"].values())
    gpu, hourly = found["gpu_usd_per_hour"], usd / hours
    money = f"Contribution margin {hourly:z,.2f} USD per hour, GPU-hours {gpu:z,.2f}, net {hourly - gpu:z,.2f}."
    if found["span_s"] <= LEAST_SPAN_S:
        money = f"Contribution margin {usd:z,.2f} USD; the log spans too little time for figures per hour."
    return (
        f"{money} Refunds rest on feedback for {100.0 * found['labelled']:.0f} % of the answers, on P(good) of model"
        " and task elsewhere."
    )
