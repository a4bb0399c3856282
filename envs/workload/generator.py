"""Draws the workload of an episode: one vectorised pass, the same bytes for the same random generator.

A prompt that recurs is drawn once and copied to its recurrences, so that length, task, difficulty and outcome agree
while arrival, patience and network noise differ. Recurring prompts belong to a tenant: no two tenants share one. With
intents (`envs.workload.intents`) task, difficulty and outcome are drawn once per intent, lengths once per wording.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from envs.workload.compose import compose
from envs.workload.draws import (
    choose,
    draw_attempts,
    draw_lengths,
    draw_recurrences,
    draw_tasks,
    draw_tenants,
    given_recurrences,
)
from envs.workload.drift import Drift, ability_shift
from envs.workload.intents import draw_intents, draw_reuse
from envs.workload.quality import draw_quality
from envs.workload.requests import Workload
from envs.workload.spec import GivenRequests, WorkloadSpec

Array = np.ndarray[Any, Any]


_LINKS = (
    *("prefix_block_tokens", "prefix_count", "prefix_hash"),
    *("session_index", "parent_index", "think_s", "workflow_index", "task_calls"),
    *("tool_key", "tool_usd"),
)


def generate(
    spec: WorkloadSpec,
    rng: np.random.Generator,
    given: GivenRequests | None = None,
    drifts: Sequence[Drift] = (),
    **beside: Any,
) -> Workload:
    """One episode's workload; with `given`, arrivals and lengths are those of a trace.

    `drifts` move abilities by the time of arrival, also between recurrences of a prompt.
    `beside`: fields of `Workload` that are not about requests: variant, faults, billing.
    """
    if given is None and spec.composition is not None:
        given = compose(spec, spec.composition, rng)
    arrived_at_s = _arrivals(spec, rng) if given is None else given.arrived_at_s
    size = len(arrived_at_s)
    class_index = choose(rng, spec.class_share, size)
    if given is not None and given.class_index is not None:
        class_index = given.class_index
    tenant_index = draw_tenants(spec, rng, class_index)
    if given is not None and given.tenant_index is not None:
        tenant_index = given.tenant_index
    near: dict[str, Any] = {}
    if given is not None:
        source, prompt_key = given_recurrences(given.prompt_key, size)
        first = source
        if given.family_index is not None:
            first, _ = given_recurrences(given.family_index, size)
            near = {"family_index": given.family_index, "embedding": given.embedding}
    elif spec.intents is not None:
        asked = draw_intents(spec.intents, rng, tenant_index, arrived_at_s, spec.horizon_s)
        first, source, prompt_key = asked.first, asked.source, asked.prompt_key
        near = {"family_index": asked.family_index, "embedding": asked.embedding}
    else:
        source, prompt_key = draw_recurrences(spec, rng, tenant_index)
        first = source
    task_index = draw_tasks(spec, rng, class_index)[first]
    if given is not None and given.task_index is not None:
        task_index = given.task_index
    prompt_tokens = draw_lengths(spec.prompt_lengths, rng, task_index, source)
    output_tokens = draw_lengths(spec.output_lengths, rng, task_index, source)
    if given is not None:
        prompt_tokens, output_tokens = given.prompt_tokens[source], given.output_tokens[source]
    shift = ability_shift(drifts, arrived_at_s, task_index, len(spec.quality.slope))
    quality = draw_quality(spec.quality, rng, task_index, first, shift)
    if near:
        near["needed_similarity"], near["valid_for_s"] = draw_reuse(spec.reuse, rng.spawn(1)[0], task_index)
    judged = rng.spawn(1)[0].random(size) < spec.judged_share if spec.judged_share > 0.0 else None
    if spec.attempts:
        near["attempt_luck"] = draw_attempts(spec.attempts, rng.spawn(1)[0], size)
    return Workload(
        arrived_at_s=arrived_at_s,
        class_index=class_index,
        task_index=task_index,
        tenant_index=tenant_index,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        patience_s=_patience(spec, rng, class_index),
        deadline_s=_deadlines(spec, class_index, None if given is None else given.deadline_s),
        prompt_key=prompt_key,
        difficulty_signal=quality.signal,
        p_good_prior=quality.p_good_prior,
        p_good=quality.p_good,
        good=spec.quality.good(task_index, quality.p_good, rng.random(size)[first], quality.luck),
        provider_noise=rng.standard_normal((size, 2)),
        ability_shift=shift,
        horizon_s=spec.horizon_s if given is None else given.horizon_s,
        judged=judged,  # type: ignore[arg-type]
        **({} if given is None else {name: getattr(given, name) for name in _LINKS}),
        **near,
        **beside,
    )


def _arrivals(spec: WorkloadSpec, rng: np.random.Generator) -> Array:
    return spec.arrivals.draw(rng, spec.horizon_s, spec.requests_per_episode)


def _deadlines(spec: WorkloadSpec, class_index: Array, given_s: Array | None) -> Array:
    """(M,) seconds until an answer is due: the class's own where none is given."""
    own_s = np.array(spec.deadline_s)[class_index]
    return own_s if given_s is None else np.where(np.isnan(given_s), own_s, given_s)


def _patience(spec: WorkloadSpec, rng: np.random.Generator, class_index: Array) -> Array:
    """(M,) seconds to the first token that each user tolerates."""
    normal = rng.standard_normal(len(class_index))
    sigma = np.array(spec.patience_sigma)[class_index]
    return np.array(spec.patience_median_s)[class_index] * np.exp(sigma * normal)
