"""The fluid surrogate: a whole fleet, one control tick at a time, whatever its number of replicas.

A pool holds J requests, an amount with mean and variance. R replicas serve min(J, C) of them, C = R min(cap, slots);
the rest waits, first come first served. One replica with `level` requests serves class k in S_k(level) seconds,
measured on the engine (`fluid_curves`). With least-in-flight routing q = J / R requests per replica are spread as
evenly as they can be, so that a request sees, itself included, level = q + f (1 - f) / q with f the fraction of q, and
1 if q < 1.

    completions    D(J) = sum_k n_k / S_k(level),  n = min(J, C) in service
    mean           dJ/dt = a - E[D],      a: arrivals that will not leave, a function of J too
    variance       dv/dt = E[D] - 2 s v,  s = Cov(D - a, J) / Var(J)

which is the closure of Rothkopf and Oren (Management Science 25(6), 1979) with the linearisation done statistically.
Expectations are over a lognormal J with Var(J) = v + lambda / (6 / tick + 2 s): arrivals are known per tick, and what
they do inside one is a bridge. Per class k, running requests decay with E[n_k / S_k] exactly over a step.

A request that arrives when J are there waits W = (J + 1 - C)+ / D(C); its chances to keep TTFT, TPOT and E2E and to
stay are read from `kept` at W and the level half a stay later, and travel with the amounts until they are served.

Classes in other shares than those of the calibration change S by psi, the ratio of the model's TPOT of both mixes
(`fluid_curves._model_tpot_s`), and latencies are read at the level where TPOT is psi times as long.
"""

# ruff: noqa: ANN001, ANN201, ANN202 (Numba infers the types of kernels)
from __future__ import annotations

import math

from envs.fleet.fluid_closure import expected_excess, expected_idle, level_of, row_of
from envs.fleet.fluid_expect import expect, take_shares
from envs.kernels import kernel

STEP_S = 2.5  # longest step inside a tick, up to MOST_STEPS
MOST_STEPS = 8


@kernel
def _move(flows, w, p, step_s, waiting_after, arriving):
    """Admits until `waiting_after` wait, serves, and books what happened; returns how many were served."""
    total = arriving
    for k in range(flows.shape[2]):
        total += flows[w, p, k].waiting
    admitted_share = min(max(1.0 - waiting_after / total, 0.0), 1.0) if total > 0.0 else 0.0
    served_total = 0.0
    for k in range(flows.shape[2]):
        flow = flows[w, p, k]
        came = flow.inflow_per_s * step_s
        stayed = came * flow.stays
        line = flow.waiting + stayed
        admitted = line * admitted_share
        gone = -math.expm1(-flow.rate * step_s)
        late = 1.0 - gone / (flow.rate * step_s) if flow.rate * step_s > 1e-9 else 0.0
        before = flow.running + line
        served = min(flow.running * gone + admitted * late, before)
        flow.running += admitted - served
        flow.waiting = line - admitted
        flow.served += served
        served_total += served
        share = served / before if before > 0.0 else 0.0
        ttft_ok, tpot_ok = flow.ttft_ok + came * flow.new_ttft_ok, flow.tpot_ok + came * flow.new_tpot_ok
        e2e_ok, slo_ok = flow.e2e_ok + came * flow.new_e2e_ok, flow.slo_ok + came * flow.new_slo_ok
        credited = flow.credited + came * flow.new_credited
        flow.served_ttft_ok += share * ttft_ok
        flow.served_tpot_ok += share * tpot_ok
        flow.served_e2e_ok += share * e2e_ok
        flow.served_slo_ok += share * slo_ok
        flow.served_credited += share * credited
        flow.ttft_ok, flow.tpot_ok = ttft_ok * (1.0 - share), tpot_ok * (1.0 - share)
        flow.e2e_ok, flow.slo_ok = e2e_ok * (1.0 - share), slo_ok * (1.0 - share)
        flow.credited = credited * (1.0 - share)
        flow.stayed += stayed
        flow.ttft_sum += stayed * flow.new_ttft_s
        flow.ttft_square += stayed * flow.new_ttft_square
        flow.tpot_sum += stayed * flow.new_tpot_s
        flow.tpot_square += stayed * flow.new_tpot_square
        flow.e2e_sum += stayed * flow.new_e2e_s
        flow.e2e_square += stayed * flow.new_e2e_square
    return served_total


@kernel
def _leave(flows, w, p, step_s, wait_s):
    """Those whose patience ends go when they reach the head of the line."""
    stays = math.exp(-step_s / (wait_s + step_s))
    for k in range(flows.shape[2]):
        flow = flows[w, p, k]
        line = flow.leaving + flow.inflow_per_s * step_s * (1.0 - flow.stays)
        flow.leaving = line * stays
        flow.abandoned += line - flow.leaving


@kernel
def _ahead(station, mean):
    """By how much J will have changed half a stay from now, if arrivals go on: TPOT is a mean over the stay."""
    if mean <= 0.0 or station.served_per_s <= 0.0:
        return 0.0
    half_stay_s = 0.5 * mean / station.served_per_s
    drift_per_s = station.inflow_per_s * station.entered_share - station.served_per_s
    slope = station.recovery_per_s
    if slope * half_stay_s > 1e-6:
        return -drift_per_s * math.expm1(-slope * half_stay_s) / slope
    return drift_per_s * half_stay_s


@kernel
def _step(pool, classes, curves, kept, station, flows, w, p, step_s, tick_s):
    """One pool, `step_s` seconds on, with the inflow of its flows."""
    mean, arriving = 0.0, 0.0
    for k in range(flows.shape[2]):
        mean += flows[w, p, k].waiting + flows[w, p, k].running
    replicas = station.ready + station.draining
    busy_room = 0.0
    for k in range(flows.shape[2]):
        busy_room += flows[w, p, k].running
    room = station.ready * min(station.in_flight_cap, pool.slots)
    if station.draining > 0.0:
        room += busy_room * station.draining / replicas
    bridge = station.inflow_per_s / (6.0 / tick_s + 2.0 * max(station.recovery_per_s, 0.0))
    variance = station.variance + bridge
    here = level_of(min(mean, room), replicas) if replicas > 0.0 else 1.0
    row, behind = row_of(pool, here, 0.0)
    psi, shift, context_tokens = take_shares(classes, curves, flows, w, p, row, behind)
    room *= min(pool.kv_tokens / context_tokens / min(station.in_flight_cap, pool.slots), 1.0)
    ahead = _ahead(station, mean)
    done_per_s, slope, level, wait_s = expect(
        pool, curves, kept, station, flows, w, p, mean, variance, replicas, room, psi, shift, ahead
    )
    for k in range(flows.shape[2]):
        arriving += flows[w, p, k].inflow_per_s * flows[w, p, k].stays * step_s
    after = max(mean + arriving - done_per_s * step_s, 0.0)
    _move(flows, w, p, step_s, expected_excess(after, variance, room), arriving)
    _leave(flows, w, p, step_s, wait_s)
    slope = max(slope, 0.0)
    station.recovery_per_s, station.served_per_s, station.entered_share = slope, done_per_s, 1.0
    if station.inflow_per_s > 0.0:
        station.entered_share = arriving / (station.inflow_per_s * step_s)
    if slope * step_s > 1e-6:
        decay = math.exp(-2.0 * slope * step_s)
        station.variance = station.variance * decay + done_per_s * (1.0 - decay) / (2.0 * slope)
    else:
        station.variance += done_per_s * step_s
    share = step_s / tick_s
    if replicas > 0.0:
        station.busy_share += share * (1.0 - expected_idle(0.5 * (mean + after), variance, replicas) / replicas)
        station.level += share * level
    station.wait_s += share * wait_s
    if station.draining > 0.0:
        station.draining *= math.exp(-step_s * done_per_s / max(min(mean, room), 1e-9)) if mean > 1e-9 else 0.0


@kernel
def advance_pool(pools, classes, curves, kept, stations, flows, w, p, tick_s):
    """Pool p of world w over one tick, into which `admitted` of its flows come evenly."""
    station = stations[w, p]
    steps = int(min(max(math.ceil(tick_s / STEP_S), 1.0), MOST_STEPS))
    station.busy_share = station.level = station.wait_s = station.inflow_per_s = 0.0
    for k in range(flows.shape[2]):
        flow = flows[w, p, k]
        flow.inflow_per_s = flow.admitted / tick_s
        station.inflow_per_s += flow.inflow_per_s
        flow.served = flow.abandoned = flow.stayed = 0.0
        flow.served_ttft_ok = flow.served_tpot_ok = flow.served_e2e_ok = 0.0
        flow.served_slo_ok = flow.served_credited = 0.0
        flow.ttft_sum = flow.ttft_square = flow.tpot_sum = flow.tpot_square = 0.0
        flow.e2e_sum = flow.e2e_square = 0.0
    for _ in range(steps):
        _step(pools[p], classes, curves, kept, station, flows, w, p, tick_s / steps, tick_s)
