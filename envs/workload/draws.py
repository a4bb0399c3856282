"""Vectorised draws of what each request is: class, task, tenant, recurring prompt, lengths."""

from __future__ import annotations

from typing import Any

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


def draw_tenants(spec: WorkloadSpec, rng: np.random.Generator, class_index: Array) -> Array:
    """(M,) i4 tenant of each request; tenants are numbered class by class."""
    uniform = rng.random(len(class_index))
    tenant_index = np.empty(len(class_index), dtype=np.int32)
    first = 0
    for index, count in enumerate(spec.tenants):
        mine = class_index == index
        edges = np.cumsum(np.arange(1, count + 1) ** -spec.tenant_exponent)
        tenant_index[mine] = first + np.searchsorted(edges, uniform[mine] * edges[-1], side="right").clip(max=count - 1)
        first += count
    return tenant_index


def draw_recurrences(spec: WorkloadSpec, rng: np.random.Generator, tenant_index: Array) -> tuple[Array, Array]:
    """(M,) row that each request copies its prompt from (itself, if new), and (M,) i4 prompt keys."""
    size = len(tenant_index)
    popularity = np.arange(1, spec.recurring_prompts + 1) ** -spec.recurring_exponent
    rank = choose(rng, popularity, size)
    rows = np.flatnonzero(rng.random(size) < spec.recurring_share)
    prompt_key = np.full(size, -1, dtype=np.int32)
    _, prompt_key[rows] = np.unique(
        tenant_index[rows].astype(np.int64) * spec.recurring_prompts + rank[rows], return_inverse=True
    )
    return given_recurrences(prompt_key, size)


def given_recurrences(prompt_key: Array | None, size: int) -> tuple[Array, Array]:
    """(M,) first row of each request's prompt, and the (M,) keys."""
    source = np.arange(size)
    if prompt_key is None:
        return source, np.full(size, -1, dtype=np.int32)
    rows = np.flatnonzero(prompt_key >= 0)
    _, first, inverse = np.unique(prompt_key[rows], return_index=True, return_inverse=True)
    source[rows] = rows[first][inverse]
    return source, prompt_key


def draw_lengths(
    mixtures: tuple[LengthMixture, ...], rng: np.random.Generator, task_index: Array, source: Array
) -> Array:
    """(M,) i4 token counts, each by the mixture of its task; a row copies that of its source."""
    uniform = rng.random(len(task_index))[source]
    normal = rng.standard_normal(len(task_index))[source]
    if all(mixture is mixtures[0] for mixture in mixtures):
        return mixtures[0].draw(uniform, normal)
    tokens = np.empty(len(task_index), dtype=np.int32)
    for index, mixture in enumerate(mixtures):
        mine = task_index == index
        tokens[mine] = mixture.draw(uniform[mine], normal[mine])
    return tokens
