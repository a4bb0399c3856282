"""Draws the workload of an episode: one vectorised pass, the same bytes for the same random generator.

A prompt that recurs is drawn once and copied to its recurrences, so that length, task, difficulty and outcome agree
while arrival, patience and network noise differ. Recurring prompts belong to a tenant: no two tenants share one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from envs.workload.arrivals import Arrivals
from envs.workload.lengths import LengthMixture
from envs.workload.quality import QualityTruth
from envs.workload.requests import Workload
from marginroute.quality import prior_p_good

Array = np.ndarray[Any, Any]


_LINKS = ("prefix_block_tokens", "prefix_count", "prefix_hash", "session_index", "parent_index", "think_s")


@dataclass(frozen=True)
class WorkloadSpec:
    """Everything that a workload is drawn from, as plain numbers. K classes, J tasks.

    Attributes:
        arrivals: the arrival process.
        horizon_s: length of an episode.
        requests_per_episode: exact number of requests; None lets the process decide.
        class_share: (K,) shares of requests, adding up to 1.
        task_share: (K, J) shares of tasks within a class; rows add up to 1.
        tenants: (K,) customers per class.
        tenant_exponent: the share of a class's i-th tenant falls like i ** -tenant_exponent.
        prompt_lengths: (J,) distributions of prompt tokens.
        output_lengths: (J,) distributions of output tokens.
        patience_median_s: (K,) median patience before the first token; inf: nobody leaves.
        patience_sigma: (K,) standard deviation of ln patience.
        deadline_s: (K,) inf unless the class is delay-tolerant.
        recurring_share: share of requests drawn from their tenant's recurring prompts.
        recurring_prompts: recurring prompts per tenant.
        recurring_exponent: popularity of the i-th of them falls like i ** -recurring_exponent.
        quality: who answers what well.
    """

    arrivals: Arrivals
    horizon_s: float
    requests_per_episode: int | None
    class_share: tuple[float, ...]
    task_share: tuple[tuple[float, ...], ...]
    tenants: tuple[int, ...]
    tenant_exponent: float
    prompt_lengths: tuple[LengthMixture, ...]
    output_lengths: tuple[LengthMixture, ...]
    patience_median_s: tuple[float, ...]
    patience_sigma: tuple[float, ...]
    deadline_s: tuple[float, ...]
    recurring_share: float
    recurring_prompts: int
    recurring_exponent: float
    quality: QualityTruth


@dataclass(frozen=True)
class GivenRequests:
    """What a trace dictates instead of the generator; M rows.

    Attributes:
        arrived_at_s: (M,) f8 ascending, from the start of the window.
        prompt_tokens: (M,) i4.
        output_tokens: (M,) i4.
        class_index: (M,) i4, or None to draw classes.
        prompt_key: (M,) i4, or None where the trace does not tell which prompts recur.
        horizon_s: length of the window.
        prefix_block_tokens, prefix_count, prefix_hash, session_index, parent_index, think_s: as in `Workload`; None
            where the trace has neither hashes nor sessions.
    """

    arrived_at_s: Array
    prompt_tokens: Array
    output_tokens: Array
    class_index: Array | None
    prompt_key: Array | None
    horizon_s: float
    prefix_block_tokens: int = 0
    prefix_count: Array | None = None
    prefix_hash: Array | None = None
    session_index: Array | None = None
    parent_index: Array | None = None
    think_s: Array | None = None


def generate(spec: WorkloadSpec, rng: np.random.Generator, given: GivenRequests | None = None) -> Workload:
    """One episode's workload; with `given`, arrivals and lengths are those of a trace."""
    arrived_at_s = _arrivals(spec, rng) if given is None else given.arrived_at_s
    size = len(arrived_at_s)
    class_index = _choose(rng, spec.class_share, size)
    if given is not None and given.class_index is not None:
        class_index = given.class_index
    tenant_index = _tenants(spec, rng, class_index)
    if given is None:
        source, prompt_key = _recurrences(spec, rng, tenant_index)
    else:
        source, prompt_key = _given_recurrences(given.prompt_key, size)
    task_index = _tasks(spec, rng, class_index)[source]
    prompt_tokens = _lengths(spec.prompt_lengths, rng, task_index, source)
    output_tokens = _lengths(spec.output_lengths, rng, task_index, source)
    if given is not None:
        prompt_tokens, output_tokens = given.prompt_tokens[source], given.output_tokens[source]
    normal = rng.standard_normal((2, size))[:, source]
    signal = spec.quality.signal(normal[0], normal[1])
    p_good = spec.quality.p_good(task_index, normal[0])
    quality = spec.quality
    return Workload(
        arrived_at_s=arrived_at_s,
        class_index=class_index,
        task_index=task_index,
        tenant_index=tenant_index,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        patience_s=_patience(spec, rng, class_index),
        deadline_s=np.array(spec.deadline_s)[class_index],
        prompt_key=prompt_key,
        difficulty_signal=signal,
        p_good_prior=prior_p_good(
            np.array(quality.prior_ability),
            np.array(quality.slope),
            signal,
            quality.signal_correlation,
            quality.nobody_can_share,
        ),
        p_good=p_good,
        good=(rng.random(size)[source, None] < p_good).astype(np.uint8),
        provider_noise=rng.standard_normal((size, 2)),
        horizon_s=spec.horizon_s if given is None else given.horizon_s,
        **({} if given is None else {name: getattr(given, name) for name in _LINKS}),
    )


def _arrivals(spec: WorkloadSpec, rng: np.random.Generator) -> Array:
    return spec.arrivals.draw(rng, spec.horizon_s, spec.requests_per_episode)


def _choose(rng: np.random.Generator, share: tuple[float, ...] | Array, size: int) -> Array:
    """(size,) i4 indices drawn with the given shares."""
    edges = np.cumsum(share)
    index = np.searchsorted(edges, rng.random(size) * edges[-1], side="right")
    return np.minimum(index, len(edges) - 1).astype(np.int32)


def _tasks(spec: WorkloadSpec, rng: np.random.Generator, class_index: Array) -> Array:
    """(M,) i4 task of each request, by the mix of its class."""
    edges = np.cumsum(np.array(spec.task_share), axis=1)[class_index]
    index = (rng.random(len(class_index))[:, None] * edges[:, -1:] >= edges).sum(axis=1)
    return np.minimum(index, edges.shape[1] - 1).astype(np.int32)


def _tenants(spec: WorkloadSpec, rng: np.random.Generator, class_index: Array) -> Array:
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


def _recurrences(spec: WorkloadSpec, rng: np.random.Generator, tenant_index: Array) -> tuple[Array, Array]:
    """(M,) row that each request copies its prompt from (itself, if new), and (M,) i4 prompt keys."""
    size = len(tenant_index)
    popularity = np.arange(1, spec.recurring_prompts + 1) ** -spec.recurring_exponent
    rank = _choose(rng, popularity, size)
    rows = np.flatnonzero(rng.random(size) < spec.recurring_share)
    prompt_key = np.full(size, -1, dtype=np.int32)
    _, prompt_key[rows] = np.unique(
        tenant_index[rows].astype(np.int64) * spec.recurring_prompts + rank[rows], return_inverse=True
    )
    return _given_recurrences(prompt_key, size)


def _given_recurrences(prompt_key: Array | None, size: int) -> tuple[Array, Array]:
    """(M,) first row of each request's prompt, and the (M,) keys."""
    source = np.arange(size)
    if prompt_key is None:
        return source, np.full(size, -1, dtype=np.int32)
    rows = np.flatnonzero(prompt_key >= 0)
    _, first, inverse = np.unique(prompt_key[rows], return_index=True, return_inverse=True)
    source[rows] = rows[first][inverse]
    return source, prompt_key


def _lengths(mixtures: tuple[LengthMixture, ...], rng: np.random.Generator, task_index: Array, source: Array) -> Array:
    """(M,) i4 token counts, each by the mixture of its task."""
    uniform = rng.random(len(task_index))[source]
    normal = rng.standard_normal(len(task_index))[source]
    if all(mixture is mixtures[0] for mixture in mixtures):
        return mixtures[0].draw(uniform, normal)
    tokens = np.empty(len(task_index), dtype=np.int32)
    for index, mixture in enumerate(mixtures):
        mine = task_index == index
        tokens[mine] = mixture.draw(uniform[mine], normal[mine])
    return tokens


def _patience(spec: WorkloadSpec, rng: np.random.Generator, class_index: Array) -> Array:
    """(M,) seconds to the first token that each user tolerates."""
    normal = rng.standard_normal(len(class_index))
    sigma = np.array(spec.patience_sigma)[class_index]
    return np.array(spec.patience_median_s)[class_index] * np.exp(sigma * normal)
