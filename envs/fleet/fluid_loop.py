"""Closed loops: one replica at a constant number of requests, the experiment behind `fluid_curves`.

The flow-equivalent server of Chandy, Herzog and Woo (IBM J. Res. Dev. 19(1), 1975): every request that ends is
followed by another one after an exponential gap of about one completion, so that arrivals fall anywhere in an
iteration. The level of a run is the number of requests in flight as a request sees it, itself included: E[k^2] / E[k].

Shapes: K classes, M sample requests.
"""

# ruff: noqa: ANN001, ANN202, D417 (Numba infers the types of kernels)
from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from envs.fleet.allocation import allocate
from envs.fleet.engine import advance, pop_finished, reset_world, submit
from envs.fleet.spec import FleetSpec, PoolSpec
from envs.fleet.state import COMPLETED
from envs.kernels import kernel

Array = np.ndarray[Any, Any]

PER_OCTAVE = 4.0  # levels per doubling, at least
STRATA = 64
TURNS = 16  # requests of a closed loop, per request of its population
WARM_UP = 5  # those that are not measured: long answers take many stays of the mean one to be as many as they will be
BLOCKED_SHARE = 0.05  # of the requests in flight that wait in the engine: above, its slots or KV blocks are full


@dataclasses.dataclass(frozen=True, eq=False)
class Sample:
    """Requests that a pool serves, in the mix it usually gets.

    Attributes:
        class_index: (M,) customer class.
        prompt_tokens: (M,).
        output_tokens: (M,).
        patience_s: (M,) time to first token that the user tolerates; inf: never leaves.
        slo_s: (K, 3) promised TTFT, TPOT and E2E; inf: not promised.
        credit_share: (K, 3) shares of the value credited when they are missed.
        value_usd: (M,) value of the answered request, the base of credits.
    """

    class_index: Array
    prompt_tokens: Array
    output_tokens: Array
    patience_s: Array
    slo_s: Array
    credit_share: Array
    value_usd: Array


@kernel(allocates=True)
def _run_closed(pools, tables, worlds, replicas, slots, providers, requests, population, gaps, measured):
    """Keeps `population` requests going on replica 0 of world 0 until all rows of `requests` have been sent.

    Args:
        pools, tables, worlds, replicas, slots, providers, requests: `Fleet.arrays`.
        population: Requests in flight or in a gap.
        gaps: (M,) standard exponentials.
        measured: (3,) out: integrals over time of requests in flight, its square, and the requests waiting.
    """
    reset_world(pools, tables, worlds, replicas, slots, providers, requests, 0)
    rep = replicas[0, 0]
    size = requests.shape[1]
    thinking = np.empty(population)
    for j in range(population):
        thinking[j] = 1e-3 * j
    n_thinking, sent, ended, now_s, mean_gap_s = population, 0, 0, 0.0, 0.0
    last_end_s = 0.0
    while sent < size:
        first_s = math.inf
        for j in range(n_thinking):
            first_s = min(first_s, thinking[j])
        until_s = min(first_s, rep.iteration_end_s)
        if until_s <= now_s:
            until_s = now_s + 1e-9 * max(now_s, 1.0)
        if sent >= WARM_UP * population:
            busy = float(rep.in_flight)
            measured[0] += busy * (until_s - now_s)
            measured[1] += busy * busy * (until_s - now_s)
            measured[2] += rep.waiting * (until_s - now_s)
        now_s = until_s
        advance(pools, tables, worlds, replicas, slots, providers, requests, 0, now_s)
        while pop_finished(worlds, requests, 0) >= 0:
            ended += 1
            weight = max(1.0 / ended, 0.02)
            mean_gap_s += weight * (now_s - last_end_s - mean_gap_s)
            last_end_s = now_s
            thinking[n_thinking] = now_s + mean_gap_s * gaps[ended - 1]
            n_thinking += 1
        j = 0
        while j < n_thinking and sent < size:
            if thinking[j] <= now_s:
                n_thinking -= 1
                thinking[j] = thinking[n_thinking]
                submit(pools, tables, worlds, replicas, slots, providers, requests, 0, 0, sent, now_s)
                sent += 1
            else:
                j += 1


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """What one closed loop has measured: the level, the share waiting, and latencies (M', 3) of rows (M',)."""

    level: float
    blocked_share: float
    rows: Array
    latency_s: Array


def _representative(sample: Sample, n: int) -> Array:
    """(n,) rows, n a multiple of `STRATA`: one of every stratum in each block of that many, in random order.

    Strata are of equal size along class, prompt length and output length, so that any stretch of the run has the mix
    and nearly the work of the whole sample: it takes a hundredth of the requests that independent draws would take.
    """
    rng = np.random.default_rng(0)
    ranks = np.argsort(np.argsort(sample.prompt_tokens, kind="stable"), kind="stable")
    order = np.lexsort((sample.output_tokens, ranks * 20 // len(ranks), sample.class_index))
    rows = order[((np.arange(n) + 0.5) / n * len(order)).astype(np.int64)].reshape(STRATA, -1)
    return rng.permuted(rng.permuted(rows, axis=1).T, axis=1).ravel()


def _closed_loop(pool: PoolSpec, sample: Sample, population: int, n: int) -> Run:
    n = math.ceil(n / STRATA) * STRATA
    rows = _representative(sample, n)
    fleet = allocate(FleetSpec((dataclasses.replace(pool, replicas=1),), scrape_interval_s=1e12), 1, n)
    requests = fleet.requests[0]
    requests["prompt_tokens"], requests["output_tokens"] = sample.prompt_tokens[rows], sample.output_tokens[rows]
    requests["patience_until_s"] = np.inf
    measured = np.zeros(3)
    _run_closed(*fleet.arrays, population, np.random.default_rng(1).exponential(size=n), measured)
    # Requests sent early meet a fleet in step, those at the end may be unfinished
    kept = np.flatnonzero(requests["status"] == COMPLETED)
    last = n if population == 1 else n - np.count_nonzero(requests["status"] != COMPLETED) - population
    kept = kept[(kept >= WARM_UP * population) & (kept < last)]
    done = requests[kept]
    ttft_s = done["first_token_at_s"] - done["dispatched_at_s"]
    tail_s = done["completed_at_s"] - done["first_token_at_s"]
    latency_s = np.stack([ttft_s, tail_s / np.maximum(done["output_tokens"] - 1, 1), ttft_s + tail_s], axis=1)
    busy, square, waiting = measured
    return Run(square / busy, waiting / busy, rows[kept], latency_s)


def sweep(pool: PoolSpec, sample: Sample, requests_per_level: int) -> list[Run]:
    """Closed loops of growing population, until slots or KV blocks are full; the last one is of a full replica."""
    steps = range(int(PER_OCTAVE * math.log2(max(pool.max_num_seqs, 2))) + 2)
    grown = {min(round(2.0 ** (j / PER_OCTAVE)) + 1, pool.max_num_seqs) for j in steps}
    runs: list[Run] = []
    for population in sorted({1, *grown}):
        run = _closed_loop(pool, sample, population, max(requests_per_level, TURNS * population))
        full = run.blocked_share > BLOCKED_SHARE
        if full and population < pool.max_num_seqs:
            run = _closed_loop(pool, sample, pool.max_num_seqs, max(requests_per_level, TURNS * pool.max_num_seqs))
        if full:
            run = _without_wait(run)
        runs.append(dataclasses.replace(run, level=max(run.level, 1.001 * runs[-1].level if runs else 1.0)))
        if full:
            break
    return runs


def _without_wait(run: Run) -> Run:
    """The run of a full replica as its running requests see it: the wait in the engine's line is taken off TTFT."""
    e2e_s = run.latency_s[:, 2].mean()
    share = min(run.blocked_share * e2e_s / run.latency_s[:, 0].mean(), 0.95)
    wait_s = share * run.latency_s[:, 0]
    return dataclasses.replace(
        run, level=run.level * (1.0 - run.blocked_share), latency_s=run.latency_s - wait_s[:, None] * [1.0, 0.0, 1.0]
    )
