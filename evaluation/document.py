"""The `--json` document of a Report: schema 1, written whole or not at all.

Money of a class is per 1k first calls of all classes, so that the classes add up to the policy's contribution margin;
what no class causes alone (GPU-hours) is in the policy's accounts only. Figures that do not exist (no request of a
class answered, one episode and hence no interval) are null.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from envs.economics.ledger import ACCOUNTS, REVENUE_ACCOUNTS
from evaluation.fairness import fairness_documents
from evaluation.latency import METRICS
from evaluation.report import PER_1K, Report, accounts_usd_per_1k, action_shares, shed_shares
from evaluation.results import EpisodeResults, Floats
from evaluation.router_cost import CPU_S_PER_DECISION, USD_PER_CORE_HOUR, router_usd_per_1k
from evaluation.statistics import ratio_of_sums
from evaluation.workflows import workflow_documents
from marginroute.whole_file import write_whole

SCHEMA = 1
LATENCY_PERCENTILES = (50, 95, 99)


def to_document(report: Report) -> dict[str, Any]:
    """The `--json` document, schema 1; figures that do not exist are null."""
    document = {
        "schema": SCHEMA,
        "scenario": report.scenario,
        "calibration": None if report.calibration is None else dict(report.calibration),
        "assumptions": [asdict(item) for item in report.assumptions],
        "episodes": report.episodes,
        "policies": {name: _policy_document(report, name) for name in report.ranking},
        "best_heuristic": report.best_heuristic,
        "tuned": report.tuned,
        "paired": {
            name: {
                "vs": paired.vs,
                "delta_usd_per_1k_requests": paired.delta_usd_per_1k.mean,
                "delta_pct": paired.delta_pct,
                "ci95": paired.delta_usd_per_1k.ci95,
                "p_value": paired.p_value,
                "p_holm": paired.p_holm,
                "net_of_router_usd_per_1k_requests": paired.net_usd_per_1k,
            }
            for name, paired in report.paired.items()
        },
        "router": {"cpu_s_per_decision": CPU_S_PER_DECISION, "usd_per_core_hour": USD_PER_CORE_HOUR},
        "bounds": report.bounds_usd_per_1k,
        "share_of_bound": {
            name: share and share.to_dict() for name in report.ranking for share in [report.share_of_bound(name)]
        },
        "gap_closed": {name: report.gap_closed(name) for name in report.ranking},
    }
    result = _without_nan(document)
    assert isinstance(result, dict)
    return result


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Writes the document whole or not at all.

    Raises:
        InputError: the folder does not exist or cannot be written.
    """
    write_whole(path, json.dumps(document, indent=2, allow_nan=False) + "\n")


def _policy_document(report: Report, name: str) -> dict[str, Any]:
    results, margin = report.results[name], report.margin_usd_per_1k[name]
    revenue = float(ratio_of_sums(results.revenue_usd, results.first_calls, PER_1K))
    utilisation = results.utilisation.mean(axis=0)
    return {
        "margin_usd_per_1k_requests": margin.to_dict(),
        "margin_usd_per_hour": report.margin_usd_per_hour[name].to_dict(),
        "contribution_margin_usd_per_1k_requests": report.contribution_usd_per_1k[name].to_dict(),
        "cash_margin_usd_per_1k_requests": float(ratio_of_sums(results.cash_usd, results.first_calls, PER_1K)),
        "lifetime_usd_per_1k_requests": float(ratio_of_sums(results.lifetime_usd, results.first_calls, PER_1K)),
        "interquartile_mean_usd_per_1k_requests": report.iqm_usd_per_1k(name),
        "untuned_usd_per_1k_requests": report.untuned_usd_per_1k(name),
        "router_usd_per_1k_requests": router_usd_per_1k(results),
        "revenue_usd_per_1k_requests": revenue,
        "gross_margin_pct": 100.0 * margin.mean / revenue if revenue > 0.0 else None,
        "slo_attainment": _by_class(results, results.share("slo_ok")),
        "quality": _by_class(results, results.share("good", "served")),
        "shed": _by_class(results, shed_shares(results)),
        "refused": _by_class(results, results.share("refused")),
        "actions": action_shares(results),
        "utilisation": float(np.average(utilisation, weights=results.pool_replicas)),
        "utilisation_by_pool": dict(zip(results.pool_names, utilisation.tolist(), strict=True)),
        "accounts": accounts_usd_per_1k(results),
        "by_class": {class_name: _class_document(results, k) for k, class_name in enumerate(results.class_names)},
        "by_workflow": workflow_documents(results),
        "fairness": fairness_documents(results),
    }


def _class_document(results: EpisodeResults, k: int) -> dict[str, Any]:
    """Money per 1k first calls of all classes, service per request of this class, latency of answered requests."""
    usd_per_1k = ratio_of_sums(results.ledger_usd[:, :, k].T, results.first_calls, PER_1K)
    accounts = dict(zip(ACCOUNTS, usd_per_1k.tolist(), strict=True))
    contribution = results.contribution_by_class_usd[:, k]
    first_calls = results.count("first_calls").sum(axis=0)
    return {
        "requests_share": float(first_calls[k] / first_calls.sum()),
        "contribution_margin_usd_per_1k_requests": float(ratio_of_sums(contribution, results.first_calls, PER_1K)),
        "revenue_usd_per_1k_requests": sum(accounts[name] for name in REVENUE_ACCOUNTS),
        "accounts": accounts,
        "slo_attainment": float(results.share("slo_ok")[k]),
        **{f"{metric}_attainment": float(results.share(f"{metric}_ok")[k]) for metric in METRICS},
        "quality": float(results.share("good", "served")[k]),
        "shed": float(shed_shares(results)[k]),
        "shed_by_decision": float(results.share("shed")[k]),
        "abandoned": float(results.share("abandoned")[k]),
        "failed": float(results.share("failed")[k]),
        "refused": float(results.share("refused")[k]),
        "deferred": float(results.share("deferred")[k]),
        "hedged": float(results.share("hedged")[k]),
        "hedges_won": float(results.share("hedges_won")[k]),
        **{
            f"{metric}_s": {f"p{q}": float(results.latency_s(metric, q / 100.0)[k]) for q in LATENCY_PERCENTILES}
            for metric in METRICS
        },
    }


def _by_class(results: EpisodeResults, values: Floats) -> dict[str, float]:
    return dict(zip(results.class_names, values.tolist(), strict=True))


def _without_nan(value: Any) -> Any:
    """The same document with null for NaN and infinities, which JSON does not know."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
