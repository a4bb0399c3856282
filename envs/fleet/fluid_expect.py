"""Expectations of one pool over the random number of requests in it; derivation in `envs.fleet.fluid`."""

# ruff: noqa: ANN001, ANN201 (Numba infers the types of kernels)
from __future__ import annotations

import math

import numpy as np

from envs.fleet.fluid_closure import NOTHING, at_row, level_of, row_of
from envs.fleet.fluid_curves import (
    E2E_S,
    E2E_VAR,
    MODEL_TPOT_S,
    TPOT_S,
    TPOT_VAR,
    TTFT_S,
    TTFT_VAR,
    WAIT_UNIT_S,
    WAITS,
)
from envs.kernels import kernel

_AT, _WEIGHT = np.polynomial.hermite_e.hermegauss(5)
_WEIGHT = _WEIGHT / _WEIGHT.sum()
_SHIFT_ROWS = 8.0  # psi moves latencies by at most this many rows of `curves`
LONGEST_WAIT_S = 1e9


@kernel
def take_shares(classes, curves, flows, w, p, row, behind):
    """Writes the classes' shares of the requests in service.

    Returns:
        psi, by how many rows of `curves` it moves latencies, and the mean context in tokens.
    """
    n_classes = flows.shape[2]
    total, usual = 0.0, 0.0
    for k in range(n_classes):
        flow = flows[w, p, k]
        flow.in_service = flow.running
        total += flow.running
    if total <= 1e-9:
        total = 0.0
        for k in range(n_classes):
            flow = flows[w, p, k]
            flow.in_service = (flow.waiting + flow.inflow_per_s) * at_row(curves, p, k, E2E_S, row, behind)
            total += flow.in_service
        total = total if total > NOTHING else 0.0
    mixed, reference, left_s, right_s = 0.0, 0.0, 0.0, 0.0
    for k in range(n_classes):
        flow = flows[w, p, k]
        share = classes[p, k].share * at_row(curves, p, k, E2E_S, row, behind)
        usual += share
        if total <= 0.0:
            flow.in_service = share
        model_s = at_row(curves, p, k, MODEL_TPOT_S, row, behind)
        mixed += flow.in_service * model_s
        reference += share * model_s
        left_s += share * curves[p, row, k, TPOT_S]
        right_s += share * curves[p, row + 1, k, TPOT_S]
    psi = mixed / (total if total > 0.0 else usual) * usual / reference
    context_tokens = 0.0
    for k in range(n_classes):
        flow = flows[w, p, k]
        flow.in_service /= total if total > 0.0 else usual
        context_tokens += flow.in_service * classes[p, k].context_tokens
    slope = math.log(right_s / left_s)
    shift = math.log(psi) / max(slope, 0.02)
    return psi, min(max(shift, -_SHIFT_ROWS), _SHIFT_ROWS), context_tokens


@kernel
def expect(pool, curves, kept, station, flows, w, p, mean, variance, replicas, room, psi, shift, ahead):
    """Expectations over J: completions per second and their slope; per class rate, chances and latencies of arrivals.

    What arrives meets, over its stay, `ahead` requests more in the pool than there are now.

    Returns:
        E[D], D', the mean level, and the mean wait of what arrives.
    """
    n_classes = flows.shape[2]
    for k in range(n_classes):
        flow = flows[w, p, k]
        flow.rate = flow.stays = 0.0
        flow.new_ttft_ok = flow.new_tpot_ok = flow.new_e2e_ok = flow.new_slo_ok = flow.new_credited = 0.0
        flow.new_ttft_s = flow.new_ttft_square = flow.new_tpot_s = flow.new_tpot_square = 0.0
        flow.new_e2e_s = flow.new_e2e_square = 0.0
    s = math.sqrt(math.log1p(variance / (mean * mean))) if mean > 1e-9 else 0.0
    full_per_s = 0.0
    if room > NOTHING:
        row, behind = row_of(pool, level_of(room, replicas), 0.0)
        for k in range(n_classes):
            full_per_s += flows[w, p, k].in_service * room / (psi * at_row(curves, p, k, E2E_S, row, behind))
    completions, covariance, spread, in_service, level, wait = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
    for i in range(_AT.shape[0]):
        weight, entering = _WEIGHT[i], 0.0
        jobs = mean * math.exp(s * _AT[i] - 0.5 * s * s)
        serving = min(jobs, room)
        done_per_s = 0.0
        if serving > 0.0:
            here = level_of(serving, replicas)
            row, behind = row_of(pool, here, 0.0)
            for k in range(n_classes):
                flow = flows[w, p, k]
                per_s = serving / (psi * at_row(curves, p, k, E2E_S, row, behind))
                flow.rate += weight * per_s
                done_per_s += flow.in_service * per_s
            level += weight * here
        in_service += weight * serving
        completions += weight * done_per_s
        spread += weight * (jobs - mean) * (jobs - mean)
        wait_s = station.ready_in_s
        seen = 1.0
        if full_per_s > 0.0:
            wait_s = min(max(jobs + 1.0 - room, 0.0) / full_per_s, LONGEST_WAIT_S)
            seen = level_of(min(max(jobs + 1.0 + ahead, 1.0), max(room, 1e-9)), replicas)
        wait += weight * wait_s
        row, behind = row_of(pool, seen, shift)
        for k in range(n_classes):
            flow = flows[w, p, k]
            held_s = wait_s + flow.held_s
            at = min(math.log1p(held_s / WAIT_UNIT_S) * pool.wait_scale, WAITS - 1.0)
            column = min(int(at), WAITS - 2)
            right = at - column
            a = weight * (1.0 - behind) * (1.0 - right)
            b = weight * (1.0 - behind) * right
            c = weight * behind * (1.0 - right)
            d = weight * behind * right
            near, far = kept[p, row, column, k], kept[p, row, column + 1, k]
            near_up, far_up = kept[p, row + 1, column, k], kept[p, row + 1, column + 1, k]
            flow.new_ttft_ok += a * near[0] + b * far[0] + c * near_up[0] + d * far_up[0]
            flow.new_tpot_ok += a * near[1] + b * far[1] + c * near_up[1] + d * far_up[1]
            flow.new_e2e_ok += a * near[2] + b * far[2] + c * near_up[2] + d * far_up[2]
            flow.new_slo_ok += a * near[3] + b * far[3] + c * near_up[3] + d * far_up[3]
            flow.new_credited += a * near[4] + b * far[4] + c * near_up[4] + d * far_up[4]
            stays = a * near[5] + b * far[5] + c * near_up[5] + d * far_up[5]
            flow.stays += stays
            entering += flow.inflow_per_s * stays
            ttft_s = held_s + at_row(curves, p, k, TTFT_S, row, behind)
            flow.new_ttft_s += weight * ttft_s
            flow.new_ttft_square += weight * (ttft_s * ttft_s + at_row(curves, p, k, TTFT_VAR, row, behind))
            tpot_s = at_row(curves, p, k, TPOT_S, row, behind)
            flow.new_tpot_s += weight * tpot_s
            flow.new_tpot_square += weight * (tpot_s * tpot_s + at_row(curves, p, k, TPOT_VAR, row, behind))
            e2e_s = held_s + at_row(curves, p, k, E2E_S, row, behind)
            flow.new_e2e_s += weight * e2e_s
            flow.new_e2e_square += weight * (e2e_s * e2e_s + at_row(curves, p, k, E2E_VAR, row, behind))
        covariance += (weight * done_per_s - entering) * (jobs - mean)
    for k in range(n_classes):
        flows[w, p, k].rate /= max(in_service, 1e-12)
    return completions, covariance / spread if spread > 0.0 else completions / max(mean, 1e-12), level, wait
