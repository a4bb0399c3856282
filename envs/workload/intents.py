"""Questions asked again in other words: which prompts mean the same, how near their embeddings are, who may share.

An *intent* is something that several people want to know. Popularity among a tenant's intents falls like
rank ** -exponent (and so among those that all tenants have in common); an intent gives way to a new one of the same
popularity after an exponential time (drift). Prompts of one intent are of one kind of work, equally hard, and answered
alike by a model, in words of their own: their lengths differ, unless a prompt repeats an earlier one word for word.

Embeddings of an intent's prompts are unit vectors around its own direction, in d dimensions of meaning:

    e = (1, spread z) / |(1, spread z)|,   z ~ N(0, I_d)

so that for small spread the distance 1 - cos of a random pair is spread ** 2 chi2_d: for d = 2, exponential with mean
2 spread ** 2. Prompts of different intents have nothing in common.

The answer to an earlier prompt is *right* for another one with a probability that rises with their similarity and falls
with the answer's age (`marginroute.response_cache.p_reuse`), by task:

    P(right | s, a) = [ L((s - half) / width) / L((1 - half) / width) ] exp(-a / valid_s),   L(x) = 1 / (1 + exp(-x))

A request carries that as two numbers, the similarity that it needs and the age that it bears, drawn so that they have
this distribution; whatever is similar enough for a request stays so, and the more similar of two answers is never the
worse one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from marginroute.response_cache import needed_similarity

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class IntentSpec:
    """How requests repeat each other in meaning.

    Attributes:
        share: of requests that have an intent; the others are asked once.
        per_tenant: intents that a tenant has at a time.
        common: intents that all tenants have in common; 0: none.
        common_share: of requests with an intent that have a common one.
        exponent: popularity of the i-th intent falls like i ** -exponent.
        turnover_per_s: rate at which an intent gives way to a new one.
        exact_share: of an intent's requests after its first that repeat the words of an earlier one.
        spread: of embeddings around the intent's direction.
        dimensions: d.
    """

    share: float
    per_tenant: int
    common: int
    common_share: float
    exponent: float
    turnover_per_s: float
    exact_share: float
    spread: float
    dimensions: int


@dataclass(frozen=True)
class Reuse:
    """When an earlier answer is right for another prompt of its intent.

    Attributes:
        half_similarity: where the logistic curve is one half.
        width: of that curve, in similarity.
        valid_s: mean time until the facts behind an answer change; inf: they stay.
    """

    half_similarity: float
    width: float
    valid_s: float


@dataclass(frozen=True, eq=False)
class Asked:
    """Who asks the same, M rows.

    Attributes:
        first: (M,) i8, first row with the same intent, itself if it has none.
        source: (M,) i8, first row with the same words.
        prompt_key: (M,) i4, the same words, dense from 0.
        family_index: (M,) i4, the same intent, dense from 0; -1: none.
        embedding: (M, d + 1) f4, unit vectors.
    """

    first: Array
    source: Array
    prompt_key: Array
    family_index: Array
    embedding: Array


def draw_intents(
    spec: IntentSpec, rng: np.random.Generator, tenant_index: Array, arrived_at_s: Array, horizon_s: float
) -> Asked:
    """What requests in order of arrival have in common.

    Args:
        spec: of the workload.
        rng: source of all draws.
        tenant_index: (M,) who asks.
        arrived_at_s: (M,) when.
        horizon_s: length of the episode.
    """
    size = len(tenant_index)
    slot = _slots(spec, rng, tenant_index)
    rows = np.flatnonzero(rng.random(size) < spec.share)
    age = _generation(spec.turnover_per_s, rng, slot[rows], arrived_at_s[rows], horizon_s)
    family = np.full(size, -1, dtype=np.int32)
    _, family[rows] = np.unique(slot[rows] * (int(age.max(initial=0)) + 1) + age, return_inverse=True)
    first, source = np.arange(size), np.arange(size)
    _, begins, members = np.unique(family[rows], return_index=True, return_inverse=True)
    first[rows] = rows[begins][members]
    repeats, earlier = _repetitions(spec.exact_share, rng, family[rows])
    source[rows[repeats]] = rows[earlier]
    while (source != source[source]).any():
        source = source[source]
    _, prompt_key = np.unique(source, return_inverse=True)
    return Asked(first, source, prompt_key.astype(np.int32), family, _embeddings(spec, rng, size)[source])


def _slots(spec: IntentSpec, rng: np.random.Generator, tenant_index: Array) -> Array:
    """(M,) i8 place of each request's intent: the common ones first, then tenant by tenant."""
    size = len(tenant_index)
    common = rng.random(size) < (spec.common_share if spec.common else 0.0)
    uniform = rng.random(size)
    slot = np.empty(size, dtype=np.int64)
    for mine, count in ((common, spec.common), (~common, spec.per_tenant)):
        edges = np.cumsum(np.arange(1, count + 1) ** -spec.exponent)
        if count:
            slot[mine] = np.searchsorted(edges, uniform[mine] * edges[-1], side="right").clip(max=count - 1)
    slot[~common] += spec.common + tenant_index[~common].astype(np.int64) * spec.per_tenant
    return slot


def _generation(rate_per_s: float, rng: np.random.Generator, slot: Array, at_s: Array, horizon_s: float) -> Array:
    """(R,) i8 how often the intents in these places have given way to new ones by `at_s`."""
    if rate_per_s == 0.0 or not len(slot):
        return np.zeros(len(slot), dtype=np.int64)
    counts = rng.poisson(rate_per_s * horizon_s, int(slot.max()) + 1)
    begins = np.cumsum(counts) - counts
    change = np.repeat(np.arange(len(counts)), counts) + np.clip(rng.random(int(counts.sum())), 0.0, 1.0 - 1e-9)
    change.sort()
    return np.searchsorted(change, slot + at_s / horizon_s, side="right") - begins[slot]


def _repetitions(share: float, rng: np.random.Generator, family: Array) -> tuple[Array, Array]:
    """Positions of requests that repeat an earlier one of their family word for word, and of that one."""
    order = np.argsort(family, kind="stable")
    rank = np.arange(len(order)) - np.searchsorted(family[order], family[order])
    chosen = np.flatnonzero((rng.random(len(order)) < share) & (rank > 0))
    back = 1 + np.floor(rng.random(len(chosen)) * rank[chosen]).astype(np.int64)
    return order[chosen], order[chosen - back]


def _embeddings(spec: IntentSpec, rng: np.random.Generator, size: int) -> Array:
    vectors = np.ones((size, spec.dimensions + 1), dtype=np.float32)
    vectors[:, 1:] = spec.spread * rng.standard_normal((size, spec.dimensions))
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def draw_reuse(reuse: tuple[Reuse, ...], rng: np.random.Generator, task_index: Array) -> tuple[Array, Array]:
    """(M,) similarity that an answer needs to be right for a request, and (M,) seconds that it may be old."""
    half, width, valid_s = np.array([(item.half_similarity, item.width, item.valid_s) for item in reuse]).T
    uniform, patience = rng.random(len(task_index)), rng.standard_exponential(len(task_index))
    return needed_similarity(uniform, half[task_index], width[task_index]), valid_s[task_index] * patience
