"""Every input of a report with where it comes from: measured, a public default, or assumed.

*Measured* is what a file of the operator's says: a trace, a profile or a quality table fitted to own measurements, a
backtest inside its tolerances. *Public default* is a figure with a published source. Everything else is *assumed*: the
operator should put in his own before he believes the margin.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from envs.scenario import Scenario
from evaluation.router_cost import CPU_S_PER_DECISION, USD_PER_CORE_HOUR

MEASURED, PUBLIC, ASSUMED = "measured", "public default", "assumed"
OWN = "measured"  # begins the source of a profile that `python -m envs calibrate endpoint` wrote


@dataclass(frozen=True)
class Assumption:
    """One input.

    Attributes:
        name: what it is.
        value: in words.
        kind: `measured`, `public default` or `assumed`.
        source: of the value; empty where there is none.
    """

    name: str
    value: str
    kind: str
    source: str = ""


def assumptions(scenario: Scenario, calibration: Mapping[str, Any] | None = None) -> list[Assumption]:
    """The inputs of a scenario; a calibrated backtest makes latencies measured ones."""
    return [
        *_traffic(scenario),
        *_latencies(scenario, calibration),
        *_costs(scenario),
        *_contracts(scenario),
        *_quality(scenario),
        Assumption(
            "cost of deciding",
            f"{1000.0 * CPU_S_PER_DECISION:g} ms of a core per decision, {USD_PER_CORE_HOUR:g} USD per core-hour",
            ASSUMED,
        ),
    ]


def _traffic(scenario: Scenario) -> list[Assumption]:
    if scenario.trace is not None:
        value = f"{Path(scenario.trace.path).name}, played x{scenario.load_scale:g}"
        return [Assumption("arrivals and lengths", value, MEASURED, f"trace, sha256 {scenario.trace.sha256[:12]}")]
    workload = scenario.workload
    source = workload.source
    value = f"{workload.title or 'generated'}, load x{scenario.load_scale:g}"
    return [Assumption("arrivals and lengths", value, PUBLIC if source else ASSUMED, source)]


def _latencies(scenario: Scenario, calibration: Mapping[str, Any] | None) -> list[Assumption]:
    if calibration is not None and calibration["calibrated"]:
        words = f"backtest on {calibration['log']}, {calibration['requests']:,} requests"
        return [Assumption("speed of pools and providers", "predicted within the tolerances", MEASURED, words)]
    found = []
    for name, pool in scenario.fleet.pools.items():
        source = str(scenario.fleet.profiles.get(pool.profile, {}).get("source", ""))
        kind = MEASURED if source.startswith(OWN) else PUBLIC if source else ASSUMED
        found.append(Assumption(f"speed of pool {name}", pool.profile, kind, source))
    for name, provider in scenario.fleet.providers.items():
        value = f"TTFT {provider.ttft_median_s:g} s, {provider.tpot_median_s:g} s per token (medians)"
        found.append(Assumption(f"speed of {name}", value, ASSUMED))
    return found


def _costs(scenario: Scenario) -> list[Assumption]:
    found = []
    for name, provider in scenario.fleet.providers.items():
        value = f"{provider.input_usd_per_mtok:g} / {provider.output_usd_per_mtok:g} USD per Mtok in / out"
        if provider.batch_discount is not None:
            value += f", less {100.0 * provider.batch_discount:g} % as batch"
        source = provider.price_source or ""
        found.append(Assumption(f"prices of {name}", value, PUBLIC if source else ASSUMED, source))
    for name, pool in scenario.fleet.pools.items():
        value = f"{pool.replicas} x {pool.gpus_per_replica} GPU at {pool.gpu_usd_per_hour:g} USD per GPU-hour"
        if pool.spot is not None:
            value += f", {pool.paid_replicas[2]} of them spot at {pool.spot.gpu_usd_per_hour:g}"
        found.append(Assumption(f"GPUs of {name}", value, ASSUMED))
    return found


def _contracts(scenario: Scenario) -> list[Assumption]:
    found = []
    for name, item in scenario.plans.classes.items():
        slo, remedies = item.slo, item.remedies
        promises = [
            f"{metric.upper()} {limit:g} s (credit {getattr(slo, f'{metric}_credit_share'):g})"
            for metric in ("ttft", "tpot", "e2e")
            if (limit := getattr(slo, f"{metric}_s")) is not None
        ]
        owed = f"bad answer: refund {remedies.refund_share:g} + {remedies.bad_answer_usd:g} USD"
        plan = scenario.plans.plans[item.plan]
        found.append(Assumption(f"contract of {name}", "; ".join([f"{plan.kind} plan", *promises, owed]), ASSUMED))
    for name, workflow in scenario.plans.workflows.items():
        rule = f"{workflow.good_share:.0%} of its answers good" + (", the last one too" if workflow.final_good else "")
        found.append(Assumption(f"task {name}", f"{workflow.value_usd:g} USD if it succeeds: {rule}", ASSUMED))
    return found


def _quality(scenario: Scenario) -> list[Assumption]:
    difficulty = scenario.workload.difficulty
    signal = (
        f"predictor with AUC {difficulty.signal_auc:g}"
        if difficulty.signal_auc is not None
        else f"signal of difficulty with correlation {difficulty.signal_correlation:g}"
    )
    looks = [
        Assumption(f"verifier {name}", f"sensitivity {item.sensitivity:g}, specificity {item.specificity:g}", ASSUMED)
        for name, item in scenario.fleet.verifiers.items()
    ]
    return [
        *looks,
        Assumption("who answers what well", f"abilities of {', '.join(scenario.tier_names)} by task", ASSUMED),
        Assumption("what is known of it beforehand", signal, ASSUMED),
    ]
