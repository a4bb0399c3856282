"""Closed forms of the fluid surrogate: how a random number of requests fills replicas, and where to read the curves."""

# ruff: noqa: ANN001, ANN201, ANN202 (Numba infers the types of kernels)
from __future__ import annotations

import math

from envs.kernels import kernel

FEW = 8  # replicas up to which idle ones are counted exactly
NOTHING = 1e-12  # requests, or seconds of work, too few to divide by


@kernel
def _normal(z):
    return 0.5 * math.erfc(-z * math.sqrt(0.5))


@kernel
def expected_excess(mean, variance, bound):
    """E[(J - bound)+] of a lognormal J."""
    if bound <= NOTHING or mean <= NOTHING:
        return max(mean - bound, 0.0)
    s = math.sqrt(math.log1p(variance / (mean * mean)))
    if s < 1e-6:
        return max(mean - bound, 0.0)
    d = math.log(mean / bound) / s + 0.5 * s
    return mean * _normal(d) - bound * _normal(d - s)


@kernel
def expected_idle(mean, variance, replicas):
    """E[(R - J)+]: replicas without a request, J negative binomial (exact where S is linear in the level and R = 1)."""
    if mean <= NOTHING:
        return max(replicas - mean, 0.0)
    if replicas > FEW:
        sd = math.sqrt(variance)
        z = (replicas - mean) / max(sd, 1e-9)
        idle = (replicas - mean) * _normal(z) + sd * math.exp(-0.5 * z * z) / math.sqrt(2.0 * math.pi)
        return min(max(idle, 0.0), replicas)
    excess = max(variance / mean - 1.0, -0.9)  # below 0: binomial
    p = math.exp(-mean) if abs(excess) < 1e-6 else math.exp(-mean / excess * math.log1p(excess))
    idle = replicas * p
    j = 0
    while j + 1 < replicas:
        p *= max(mean + excess * j, 0.0) / ((j + 1.0) * (1.0 + excess))
        j += 1
        idle += (replicas - j) * p
    return min(idle, replicas)


@kernel
def level_of(in_service, replicas):
    """Requests at its replica that a request sees, itself included."""
    q = in_service / replicas
    if q <= 1.0:
        return 1.0
    f = q - math.floor(q)
    return q + f * (1.0 - f) / q


@kernel
def row_of(pool, level, shift):
    """Row of `curves` left of a level, and how far behind it the level is, from 0 to 1 (linear in the level)."""
    at = min(max(math.log(level) * pool.level_scale + shift, 0.0), pool.levels - 1.0)
    row = min(int(at), pool.levels - 2)
    return row, math.expm1((at - row) / pool.level_scale) / math.expm1(1.0 / pool.level_scale)


@kernel
def at_row(curves, p, k, column, row, behind):
    """A column of `curves` behind a row."""
    left = curves[p, row, k, column]
    return left + behind * (curves[p, row + 1, k, column] - left)
