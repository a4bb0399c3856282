"""Backtest: does the simulated fleet answer a gateway's logged requests as the real one did?

The log's requests arrive in one world at the logged times, with the logged lengths, and go where the gateway sent them.
What the world predicts of them is set beside what the log says, per pool and provider: time to first token, time to the
end and cost at P50 and P95, and the share of errors. A margin simulated in a world that fails this says little; the
verdict is kept, and every later report on the scenario is headed by it.

Not in a log, and so not in the replay: prompts that share a prefix, faults of the fleet, and requests that the gateway
held back itself. Latencies of third-party APIs are drawn from the scenario's distributions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from envs import announce_compilation
from envs.fleet.state import COMPLETED
from envs.plant import Plant
from envs.progress import Progress, silent
from envs.scenario import Scenario
from envs.workload.requests import Workload
from envs.worlds import FleetWorlds
from evaluation.logged_requests import Array, LoggedRequests, read_requests
from marginroute import view as v

TOLERANCE_PCT = {"p50": 10.0, "p95": 20.0}
ERROR_TOLERANCE = 0.02  # of the share of requests without an answer
FEWEST = 20  # requests of a pool, or answers with a figure, below which it is not judged
METRICS = ("ttft_s", "e2e_s", "cost_usd")
UNKNOWN = "unknown"
TOO_FEW = f"no pool has {FEWEST} answers: the log is too short, or too little was answered, to judge latencies by"


def backtest(scenario: Scenario, log: Path) -> dict[str, Any]:
    """Replays a log, a JSONL file of DecisionRecords of shadow mode or live; as `compared`.

    Raises:
        InputError: a line that cannot be used.
    """
    plant = Plant(scenario)
    return compared(plant, log, requests_of(plant, log))


def compared(plant: Plant, log: Path, logged: LoggedRequests, progress: Progress = silent) -> dict[str, Any]:
    """What a scenario's world makes of a log's requests, beside what the log says.

    Args:
        plant: of the scenario.
        log: where they were read.
        logged: the requests.
        progress: called with requests replayed and requests in all.

    Returns:
        scenario, hash, log, requests, span_s, skipped, stations: {name: {requests, errors, ttft_s, ...}}, calibrated,
        outside: sentences about what is outside the tolerances.
    """
    scenario, layout = plant.scenario, plant.layout
    known = np.flatnonzero(logged.candidate >= 0)
    predicted = replay(plant, logged, known, progress) if len(known) else {}
    stations: dict[str, dict[str, Any]] = {}
    for index, name in enumerate(layout.station_names):
        rows = np.flatnonzero(layout.station[logged.candidate[known]] == index)
        if len(rows):
            ours = {key: values[rows] for key, values in predicted.items()}
            stations[name] = _station(logged, known[rows], ours)
    lost = np.flatnonzero(logged.candidate < 0)
    if len(lost):
        stations[UNKNOWN] = {"requests": len(lost), "errors": {"logged": 1.0}}
    outside, judged = _outside(stations)
    span_s = float(logged.decided_at_s[-1] - logged.decided_at_s[0])
    return {
        "scenario": scenario.name,
        "hash": scenario.hash,
        "log": str(log),
        "requests": len(logged.candidate),
        "span_s": span_s,
        "skipped": logged.skipped,
        "stations": stations,
        "calibrated": judged > 0 and not outside,
        "outside": outside if judged else [*outside, TOO_FEW],
    }


def requests_of(plant: Plant, log: Path, progress: Progress = silent) -> LoggedRequests:
    """The requests of a log that a scenario's replicas and providers were asked to answer."""
    layout = plant.layout
    served = tuple(name for name, kind in zip(layout.names, layout.kind, strict=True) if kind <= v.PROVIDER)
    return read_requests(log, served, layout.class_names, layout.task_names, progress)


def replay(plant: Plant, logged: LoggedRequests, rows: Array, progress: Progress = silent) -> dict[str, Array]:
    """What the world makes of some of the requests under their recorded choices; every array is (rows,).

    Returns:
        completed, ttft_s and e2e_s from arrival, and cost_usd; NaN where the world gave no answer.
    """
    workload, choice = _workload(plant, logged, rows), logged.candidate[rows]
    shed = plant.layout.names.index("shed")
    announce_compilation()
    worlds = FleetWorlds(plant, 1)
    worlds.load_all([workload])
    made, every = 0, max(len(rows) // 200, 1)
    while not worlds.done[0]:
        c = int(choice[worlds.desks["current"][0]])
        worlds.step(np.array([c if worlds.legal[0, c] else shed]))
        made += 1
        if made % every == 0:
            progress(min(made, len(rows)), len(rows))
    progress(len(rows), len(rows))
    requests = worlds.fleet.requests[0, : len(rows)]
    completed = (requests["status"] == COMPLETED) & (worlds.loads["answered_by"][0, : len(rows)] >= 0)
    before_s = logged.waited_s[rows] - workload.arrived_at_s
    static = plant.static_signals[:, choice]
    cost_usd = (
        static[v.CALL_USD]
        + static[v.INPUT_USD] * workload.prompt_tokens
        + static[v.OUTPUT_USD] * workload.output_tokens
    )
    return {
        "completed": completed,
        "ttft_s": np.where(completed, requests["first_token_at_s"] + before_s, np.nan),
        "e2e_s": np.where(completed, requests["completed_at_s"] + before_s, np.nan),
        "cost_usd": np.where(completed, cost_usd, np.nan),
    }


def _workload(plant: Plant, logged: LoggedRequests, rows: Array) -> Workload:
    """The requests as an episode; users leave when they did in the log, who answers well plays no part."""
    n, tiers = len(rows), len(plant.layout.tier_names)
    arrived_at_s = logged.decided_at_s[rows] - logged.decided_at_s[rows[0]]
    left = logged.abandoned[rows] & np.isfinite(logged.e2e_s[rows])
    ones = np.ones((n, tiers))
    return Workload(
        arrived_at_s=arrived_at_s,
        class_index=logged.class_index[rows].astype(np.int32),
        task_index=logged.task_index[rows].astype(np.int32),
        tenant_index=logged.class_index[rows].astype(np.int32),
        prompt_tokens=logged.prompt_tokens[rows].astype(np.int32),
        output_tokens=logged.output_tokens[rows].astype(np.int32),
        patience_s=np.where(left, logged.e2e_s[rows] - logged.waited_s[rows], np.inf),
        deadline_s=np.full(n, np.inf),
        prompt_key=np.full(n, -1, dtype=np.int32),
        difficulty_signal=np.zeros(n),
        p_good_prior=ones,
        p_good=ones,
        good=ones.astype(np.uint8),
        provider_noise=np.random.default_rng(0).standard_normal((n, 2)),
        horizon_s=float(arrived_at_s[-1]) + 1.0,
    )


def _station(logged: LoggedRequests, rows: Array, predicted: Mapping[str, Array]) -> dict[str, Any]:
    """Logged against predicted figures of one pool or provider."""
    found: dict[str, Any] = {
        "requests": len(rows),
        "errors": {
            "logged": float(1.0 - logged.completed[rows].mean()),
            "predicted": float(1.0 - predicted["completed"].mean()),
        },
    }
    for metric in METRICS:
        theirs = getattr(logged, metric)[rows]
        both = logged.completed[rows] & np.isfinite(theirs) & np.isfinite(predicted[metric])
        if both.any():
            found[metric] = {"answers": int(both.sum())} | {
                quantile: _compared(theirs[both], predicted[metric][both], float(quantile[1:]) / 100.0)
                for quantile in TOLERANCE_PCT
            }
    return found


def _compared(logged: Array, predicted: Array, q: float) -> dict[str, float | None]:
    theirs, ours = float(np.quantile(logged, q)), float(np.quantile(predicted, q))
    error_pct = 100.0 * (ours - theirs) / theirs if theirs > 0.0 else math.inf if ours > 0.0 else 0.0
    return {"logged": theirs, "predicted": ours, "error_pct": error_pct if math.isfinite(error_pct) else None}


def _outside(stations: Mapping[str, Mapping[str, Any]]) -> tuple[list[str], int]:
    """Sentences about what is outside the tolerances, and how many latencies were judged."""
    outside, judged = [], 0
    for name, found in stations.items():
        if name == UNKNOWN:
            continue
        for metric in METRICS:
            if found.get(metric, {}).get("answers", 0) < FEWEST:
                continue
            judged += metric != "cost_usd"
            for quantile, tolerance in TOLERANCE_PCT.items():
                error_pct = found[metric][quantile]["error_pct"]
                if error_pct is None or abs(error_pct) > tolerance:
                    size = "infinitely" if error_pct is None else f"{error_pct:+z.0f} %"
                    words = f"{name}: {quantile.upper()} of {metric} is {size} off (tolerance {tolerance:.0f} %)"
                    outside.append(words)
        difference = found["errors"]["predicted"] - found["errors"]["logged"]
        if found["requests"] >= FEWEST and abs(difference) > ERROR_TOLERANCE:
            points = f"{100.0 * difference:+z.1f} points (tolerance {100.0 * ERROR_TOLERANCE:.0f})"
            outside.append(f"{name}: share of errors is off by {points}")
    return outside, judged
