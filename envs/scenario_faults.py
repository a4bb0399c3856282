"""From a scenario's fault sections to the faults of one episode."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from envs.workload.drift import Drift, as_faults
from envs.workload.faults import OF_PROVIDER, OF_REPLICA, OF_SPOT, FaultLaw, draw_faults, fault, in_order, no_faults

if TYPE_CHECKING:
    from envs.scenario import Scenario

Array = np.ndarray[Any, Any]


def fault_laws(scenario: Scenario) -> tuple[FaultLaw, ...]:
    """The random faults of every replica that there may be, and of every provider."""
    fleet = scenario.fleet
    rows = [pool for pool in fleet.pools.values() for _ in range(pool.rows)]
    targets = [(OF_REPLICA, r, pool.faults) for r, pool in enumerate(rows)]
    targets += [(OF_PROVIDER, v, provider.faults) for v, provider in enumerate(fleet.providers.values())]
    laws = []
    for kind, index, faults in targets:
        if faults is None:
            continue
        if faults.mean_time_between_s is not None:
            laws.append(FaultLaw(kind, index, faults.mean_time_between_s, faults.mean_repair_s))
        if faults.slow_mean_time_between_s is not None:
            slow = FaultLaw(kind, index, faults.slow_mean_time_between_s, faults.slow_mean_s, faults.slowdown)
            laws.append(slow)
    end = 0
    for pool in fleet.pools.values():
        end += pool.rows
        if pool.spot is not None and pool.spot.mean_time_between_s is not None:
            mean_s = (pool.spot.mean_time_between_s, pool.spot.mean_absence_s)
            laws += [FaultLaw(OF_SPOT, r, *mean_s) for r in range(end - pool.spot.replicas, end)]
    return tuple(laws)


def certain_faults(scenario: Scenario) -> Array:
    """(F,) `FAULT`: those that happen in every episode."""
    fleet = scenario.fleet
    first = np.cumsum([0, *(pool.rows for pool in fleet.pools.values())])
    rows = [no_faults()]
    for event in fleet.faults:
        ends_at_s = event.starts_at_s + event.duration_s
        slowdown = math.inf if event.slowdown is None else event.slowdown
        if event.provider is not None:
            kind, index = OF_PROVIDER, scenario.provider_names.index(event.provider)
        else:
            kind = OF_SPOT if event.reclaimed else OF_REPLICA
            index = int(first[scenario.pool_names.index(event.pool or "")]) + event.index
        rows.append(fault(kind, index, event.starts_at_s, ends_at_s, slowdown))
    return np.concatenate(rows)


def faults(scenario: Scenario, entropy: tuple[int, ...], drifts: Sequence[Drift] = ()) -> Array:
    """(F,) `FAULT` of one episode, ordered by start: certain ones, drawn ones, and what drifts come to."""
    drawn = draw_faults(fault_laws(scenario), scenario.horizon_s, entropy)
    return in_order(np.concatenate([certain_faults(scenario), drawn, as_faults(drifts)]))
