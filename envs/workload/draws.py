"""Vectorised draws of what each request is: class, task, tenant, recurring prompt, lengths."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from envs.workload.lengths import LengthMixture
from envs.workload.spec import WorkloadSpec

Array = np.ndarray[Any, Any]


def choose(rng: np.random.Generator, share: tuple[float, ...] | Array, size: int) -> Array:
    """(size,) i4 indices drawn with the given shares."""
    edges = np.cumsum(share)
    index = np.searchsorted(edges, rng.random(size) * edges[-1], side="right")
    return np.minimum(index, len(edges) - 1).astype(np.int32)


def draw_tasks(spec: WorkloadSpec, rng: np.random.Generator, class_index: Array) -> Array:
    """(M,) i4 task of each request, by the mix of its class."""
    edges = np.cumsum(np.array(spec.task_share), axis=1)[class_index]
    index = (rng.random(len(class_index))[:, None] * edges[:, -1:] >= edges).sum(axis=1)
    return np.minimum(index, edges.shape[1] - 1).astype(np.int32)


@lru_cache(maxsize=64)
def _popularity_edges(count: int, exponent: float) -> Array:
    """(count,) running sums of the popularities i ** -exponent."""
    return np.cumsum(np.arange(1, count + 1) ** -exponent)


def draw_tenants(spec: WorkloadSpec, rng: np.random.Generator, class_index: Array) -> Array:
    """(M,) i4 tenant of each request; tenants are numbered class by class."""
    uniform = rng.random(len(class_index))
    tenant_index = np.empty(len(class_index), dtype=np.int32)
    first = 0
    for index, count in enumerate(spec.tenants):
        mine = np.flatnonzero(class_index == index)
        edges = _popularity_edges(count, spec.tenant_exponent)
        rank = np.searchsorted(edges, uniform[mine] * edges[-1], side="right")
        tenant_index[mine] = first + np.minimum(rank, count - 1)
        first += count
    return tenant_index


def draw_recurrences(spec: WorkloadSpec, rng: np.random.Generator, tenant_index: Array) -> tuple[Array, Array]:
    """(M,) row that each request copies its prompt from (itself, if new), and (M,) i4 prompt keys."""
    size = len(tenant_index)
    edges = _popularity_edges(spec.recurring_prompts, spec.recurring_exponent)
    rank = np.minimum(np.searchsorted(edges, rng.random(size) * edges[-1], side="right"), len(edges) - 1)
    rows = np.flatnonzero(rng.random(size) < spec.recurring_share)
    prompt_key = np.full(size, -1, dtype=np.int32)
    prompt = tenant_index[rows].astype(np.int64) * spec.recurring_prompts + rank[rows]
    _, first, prompt_key[rows] = np.unique(prompt, return_index=True, return_inverse=True)
    source = np.arange(size)
    source[rows] = rows[first][prompt_key[rows]]
    return source, prompt_key


def given_recurrences(prompt_key: Array | None, size: int) -> tuple[Array, Array]:
    """(M,) first row of each request's prompt, and the (M,) keys."""
    source = np.arange(size)
    if prompt_key is None:
        return source, np.full(size, -1, dtype=np.int32)
    rows = np.flatnonzero(prompt_key >= 0)
    _, first, inverse = np.unique(prompt_key[rows], return_index=True, return_inverse=True)
    source[rows] = rows[first][inverse]
    return source, prompt_key


class _Table(NamedTuple):
    """Mixtures of J tasks side by side, with up to B components."""

    total: Array  # (J,) sum of the weights
    inner_edges: Array  # (B - 1, J) running sums of the weights but the last; inf where a mixture has fewer components
    median_log: Array  # (J, B)
    sigma: Array  # (J, B)
    min_tokens: Array  # (J,)
    max_tokens: Array  # (J,)


@lru_cache(maxsize=64)
def _table(mixtures: tuple[LengthMixture, ...]) -> _Table:
    j, b = len(mixtures), max(len(mixture.weight) for mixture in mixtures)
    total, inner = np.empty(j), np.full((b - 1, j), np.inf)
    median_log, sigma = np.zeros((j, b)), np.zeros((j, b))
    for index, mixture in enumerate(mixtures):
        edges, n = np.cumsum(mixture.weight), len(mixture.weight)
        total[index], inner[: n - 1, index] = edges[-1], edges[:-1]
        median_log[index, :n], sigma[index, :n] = np.log(mixture.median_tokens), mixture.sigma
    bounds = np.array([(mixture.min_tokens, mixture.max_tokens) for mixture in mixtures], dtype=np.float64)
    return _Table(total, inner, median_log, sigma, *bounds.T.copy())


def draw_lengths(
    mixtures: tuple[LengthMixture, ...], rng: np.random.Generator, task_index: Array, source: Array
) -> Array:
    """(M,) i4 token counts, each by the mixture of its task; a row copies that of its source."""
    uniform = rng.random(len(task_index))[source]
    normal = rng.standard_normal(len(task_index))[source]
    if all(mixture is mixtures[0] for mixture in mixtures):
        return mixtures[0].draw(uniform, normal)
    table = _table(mixtures)
    mine = uniform * table.total[task_index]
    at = task_index * table.median_log.shape[1]
    for edges in table.inner_edges:
        at = at + (mine >= edges[task_index])
    tokens = np.exp(table.median_log.take(at) + table.sigma.take(at) * normal)
    np.maximum(np.rint(tokens, out=tokens), table.min_tokens[task_index], out=tokens)
    return np.minimum(tokens, table.max_tokens[task_index], out=tokens).astype(np.int32)


def draw_attempts(attempts: int, rng: np.random.Generator, size: int) -> Array:
    """(M, A, 3) f8 luck of verifiers, of answers drawn anew, and of users who leave."""
    luck = rng.random((size, attempts, 3))
    luck[:, :, 0] = rng.standard_normal((size, attempts))
    return luck
