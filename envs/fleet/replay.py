"""Open-loop runs: requests that arrive at given times are sent to the replica with the fewest in flight.

Used by `python -m envs simulate`, the benchmarks and the tests against known answers.
"""

# ruff: noqa: ANN001, ANN201 (Numba infers the types of kernels)
from __future__ import annotations

import numpy as np
import numpy.typing as npt

from envs.fleet.allocation import Fleet, allocate
from envs.fleet.engine import advance, drain, pop_finished, reset_world, submit
from envs.fleet.hashes import Ragged, load_hashes
from envs.fleet.spec import FleetSpec
from envs.fleet.state import PRIORITY_LEVELS
from envs.kernels import kernel


@kernel
def least_in_flight(replicas, w, first, last):
    """Replica in [first, last) with the fewest requests in flight, the lowest index among equals."""
    best, least = first, replicas[w, first].in_flight
    for r in range(first + 1, last):
        if replicas[w, r].in_flight < least:
            best, least = r, replicas[w, r].in_flight
    return best


@kernel
def run_least_in_flight(pools, tables, worlds, replicas, slots, providers, requests, w, arrived_at_s, first, last):
    """One episode of world w: every arrival reads all replicas in [first, last); returns how many requests ended."""
    reset_world(pools, tables, worlds, replicas, slots, providers, requests, w)
    ended = 0
    for i in range(arrived_at_s.shape[0]):
        now_s = arrived_at_s[i]
        advance(pools, tables, worlds, replicas, slots, providers, requests, w, now_s)
        while pop_finished(worlds, requests, w) >= 0:
            ended += 1
        r = least_in_flight(replicas, w, first, last)
        submit(pools, tables, worlds, replicas, slots, providers, requests, w, r, i, now_s)
    drain(pools, tables, worlds, replicas, slots, providers, requests, w)
    while pop_finished(worlds, requests, w) >= 0:
        ended += 1
    return ended


def replay(
    spec: FleetSpec,
    arrived_at_s: npt.NDArray[np.float64],
    prompt_tokens: npt.NDArray[np.int64],
    output_tokens: npt.NDArray[np.int64],
    patience_s: npt.NDArray[np.float64] | None = None,
    pool: int = 0,
    hashes: Ragged | None = None,
    priority: npt.NDArray[np.int64] | int = 0,
) -> Fleet:
    """Runs requests through one pool of a fleet, least in flight first.

    Args:
        spec: The fleet.
        arrived_at_s: (M,), ascending.
        prompt_tokens: (M,), 1 or more.
        output_tokens: (M,), 1 or more.
        patience_s: (M,) time to first token that each user tolerates; None: they never leave.
        pool: Index of the pool.
        hashes: Block hashes in the engine's blocks, see `envs.fleet.hashes`; None: no request has any.
        priority: (M,) or one for all, 0 (first) to 7, where the pool schedules by priority.

    Returns:
        The fleet with one world, whose `requests` hold the outcome.
    """
    arrived_at_s = np.ascontiguousarray(arrived_at_s, dtype=np.float64)
    fleet = allocate(spec, 1, len(arrived_at_s), 0 if hashes is None else len(hashes[1]))
    requests = fleet.requests[0, : len(arrived_at_s)]
    requests["prompt_tokens"] = prompt_tokens
    requests["output_tokens"] = output_tokens
    requests["priority"] = np.clip(priority, 0, PRIORITY_LEVELS - 1)
    requests["patience_until_s"] = np.inf if patience_s is None else arrived_at_s + patience_s
    if hashes is not None:
        load_hashes(fleet, 0, hashes)
    first = sum(other.rows for other in spec.pools[:pool])
    run_least_in_flight(*fleet.arrays, 0, arrived_at_s, first, first + spec.pools[pool].replicas)
    return fleet
