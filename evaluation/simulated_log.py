"""Logs of decisions from simulated episodes, in the gateway's own format."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from envs.fleet.state import ABANDONED, COMPLETED, FAILED
from envs.plant import Plant
from envs.worlds import FleetWorlds
from marginroute import view as v
from marginroute.errors import InputError
from marginroute.exploration import ExploringPolicy
from marginroute.record import DecisionRecord, record_of
from marginroute.record_log import RecordLog

STATUS = {COMPLETED: "completed", ABANDONED: "abandoned", FAILED: "failed"}


def write_log(
    path: Path, plant: Plant, policy: ExploringPolicy, seeds: Sequence[int], split: str = "train", labels: float = 1.0
) -> int:
    """Plays episodes and appends a DecisionRecord per decision.

    Args:
        path: the log.
        plant: the scenario.
        policy: who decides, and explores.
        seeds: of the episodes.
        split: of the scenario that they come from.
        labels: share of the answers of which the log says whether they were good.

    Returns:
        Number of records.

    Raises:
        InputError: a class sends calls twice; a record says of one call who answered.
    """
    if (plant.hedge_after_s < np.inf).any():
        raise InputError(
            f"scenario {plant.scenario.name!r} hedges (hedge_after_s); a simulated log has no record of that"
        )
    log, written = RecordLog(path), 0
    rng = np.random.default_rng([len(seeds), 1])
    for seed in seeds:
        for record in _episode(plant, policy, seed, split, rng, labels):
            log.write(record)
            written += 1
    log.close()
    return written


def _episode(
    plant: Plant, policy: ExploringPolicy, seed: int, split: str, rng: np.random.Generator, labels: float
) -> Iterator[DecisionRecord]:
    worlds = FleetWorlds(plant, 1)
    worlds.load_all([plant.scenario.generate(seed, split)])  # type: ignore[arg-type]
    worlds.follow(policy)
    records: list[tuple[int, int, DecisionRecord]] = []
    while not worlds.done.all():
        view, i, now_s = worlds.view()[0], int(worlds.desks["current"][0]), float(worlds.desks["now_s"][0])
        decision = policy.decide(view)
        name = f"{plant.scenario.name}-{split}-{seed}-{i}"
        record = record_of(decision, view, id=name, decided_at_s=now_s, mode="simulated", bundle="")
        records.append((i, decision.candidate, record))
        worlds.step(np.array([decision.candidate]))
    last = {i: n for n, (i, _, _) in enumerate(records)}
    known = rng.random(len(records)) < labels
    for n, (i, c, record) in enumerate(records):
        if last[i] == n:
            _settle(worlds, record, i, c, bool(known[n]))
        yield record


def _settle(worlds: FleetWorlds, record: DecisionRecord, i: int, c: int, known: bool) -> None:
    """Writes what became of a request whose last decision was candidate `c`."""
    layout, static = worlds.plant.layout, worlds.plant.static_signals
    load, request = worlds.loads[0, i], worlds.fleet.requests[0, i]
    kind = layout.kind[c]
    if kind == v.SHED:
        record.status = "shed"
        return
    if kind > v.PROVIDER:
        return  # deferred for good and settled at the horizon, or a stored answer: nothing of an engine to learn
    record.status, record.served_by = STATUS[int(request["status"])], layout.names[c]
    record.prompt_tokens, record.output_tokens = int(load["prompt_tokens"]), int(load["output_tokens"])
    record.cost_usd = 0.0
    if record.status == "abandoned":
        record.e2e_s = float(request["patience_until_s"] - load["arrived_at_s"])
    if record.status == "completed":
        record.ttft_s = float(request["first_token_at_s"] - load["arrived_at_s"])
        record.e2e_s = float(request["completed_at_s"] - load["arrived_at_s"])
        tokens = record.prompt_tokens, record.output_tokens
        record.cost_usd = float(
            static[v.CALL_USD, c] + static[v.INPUT_USD, c] * tokens[0] + static[v.OUTPUT_USD, c] * tokens[1]
        )
        if known:
            record.good = bool(worlds.good[0, i, layout.tier[c]])
