"""Requests that belong together: clients, seasons, sessions, batch jobs, shared prefixes.

What is drawn here dictates arrivals, lengths and links to `envs.workload.generator.generate`, which adds difficulty,
quality and patience, as it does for a trace.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from envs.workload.clients import draw_clients
from envs.workload.draws import choose, draw_lengths, draw_recurrences, draw_tasks, draw_tenants
from envs.workload.intents import Asked, draw_intents
from envs.workload.prefixes import hash_blocks
from envs.workload.season import Season
from envs.workload.sessions import Calls, draw_sessions, joined
from envs.workload.spec import Composition, GivenRequests, JobSpec, WorkloadSpec

Array = np.ndarray[Any, Any]


@dataclass
class _Roots:
    """Arrivals, R rows: what starts a session, a single request, or one of a job."""

    at_s: Array
    class_index: Array
    tenant_index: Array
    client: Array  # -1: nobody in particular
    deadline_s: Array  # nan: the class's own
    single: Array  # bool: never starts a session


def compose(spec: WorkloadSpec, composition: Composition, rng: np.random.Generator) -> GivenRequests:
    """One episode's arrivals, lengths and links."""
    roots = _arrivals(spec, composition, rng)
    if composition.jobs is not None:
        roots = _with_jobs(spec, composition.jobs, rng, roots)
    kind_of = _kinds(composition, rng, roots)
    calls, kind_of_call = _calls(composition, rng, kind_of)
    workflow = np.array([kind.workflow for kind in composition.sessions] + [-1], dtype=np.int32)
    task_calls = np.bincount(calls.root, minlength=len(roots.at_s)).astype(np.int32)
    at_s = roots.at_s[calls.root] + calls.start_s
    rows = np.flatnonzero((at_s >= 0.0) & (at_s < spec.horizon_s))
    rows = rows[np.argsort(at_s[rows], kind="stable")]
    calls = _kept(calls, rows)
    root, kind = calls.root, kind_of_call[rows]
    class_index, tenant_index = roots.class_index[root], roots.tenant_index[root]
    task_index = draw_tasks(spec, rng, class_index)
    for index, session in enumerate(composition.sessions):
        if session.task_index >= 0:
            task_index[kind == index] = session.task_index
    single = kind < 0
    lone, asked, near = np.flatnonzero(single), None, {}
    if spec.intents is not None:
        asked = draw_intents(spec.intents, rng, tenant_index[lone], at_s[rows][lone], spec.horizon_s)
        task_index[lone] = task_index[lone[asked.first]]
        near = _spread(asked, lone, len(rows))
    _single_lengths(spec, composition, rng, calls, single, roots.client[root], task_index)
    prompt_key = np.full(len(rows), -1, dtype=np.int32)
    if asked is not None:
        prompt_key[lone] = asked.prompt_key
        _repeat(calls, task_index, lone, lone[asked.source])
    elif spec.recurring_share > 0.0 and len(lone):
        source, prompt_key[lone] = draw_recurrences(spec, rng, tenant_index[lone])
        _repeat(calls, task_index, lone, lone[source])
    session_index = np.full(len(rows), -1, dtype=np.int32)
    talks = np.flatnonzero(~single)
    session_index[talks] = np.unique(root[talks], return_inverse=True)[1]
    hashed: dict[str, Any] = {}
    if composition.prefixes is not None:
        count, hashes = hash_blocks(
            composition.prefixes, tenant_index, calls.prompt_tokens, calls.source, calls.kept_tokens, calls.level
        )
        hashed = {"prefix_count": count, "prefix_hash": hashes}
        hashed["prefix_block_tokens"] = composition.prefixes.block_tokens
    if any(step.tool is not None for item in composition.sessions for step in item.steps):
        near["tool_key"], near["tool_usd"] = _tool_keys(composition, rng.spawn(1)[0], kind, calls.step, tenant_index)
    return GivenRequests(
        arrived_at_s=at_s[rows],
        prompt_tokens=calls.prompt_tokens.astype(np.int32),
        output_tokens=calls.output_tokens.astype(np.int32),
        class_index=class_index,
        prompt_key=prompt_key,
        horizon_s=spec.horizon_s,
        task_index=task_index,
        tenant_index=tenant_index,
        deadline_s=roots.deadline_s[root],
        session_index=session_index,
        parent_index=calls.parent.astype(np.int32),
        think_s=np.where(calls.parent >= 0, calls.think_s, 0.0),
        workflow_index=workflow[kind],
        task_calls=task_calls[root],
        **hashed,
        **near,
    )


def _tool_keys(
    composition: Composition, rng: np.random.Generator, kind: Array, step: Array, tenant_index: Array
) -> tuple[Array, Array]:
    """(M,) result that the tool before each call is asked for, dense from 0, -1: none; and what asking costs."""
    names = np.full((len(kind), 4), -1, dtype=np.int64)
    usd = np.zeros(len(kind))
    for index, item in enumerate(composition.sessions):
        for number, its in enumerate(item.steps):
            rows = np.flatnonzero((kind == index) & (step == number))
            if its.tool is None or not len(rows):
                continue
            asked = choose(rng, np.arange(1, its.tool.keys + 1) ** -its.tool.exponent, len(rows))
            tenant = np.zeros(len(rows)) if its.tool.shared else tenant_index[rows]
            names[rows] = np.stack([np.full(len(rows), index), np.full(len(rows), number), tenant, asked], axis=1)
            usd[rows] = its.tool.usd
    key = np.full(len(kind), -1, dtype=np.int32)
    rows = np.flatnonzero(names[:, 0] >= 0)
    key[rows] = np.unique(names[rows], axis=0, return_inverse=True)[1].reshape(-1)
    return key, usd


def _spread(asked: Asked, lone: Array, size: int) -> dict[str, Array]:
    """Families and embeddings of single requests `lone` among all (size,) requests."""
    family = np.full(size, -1, dtype=np.int32)
    family[lone] = asked.family_index
    embedding = np.zeros((size, asked.embedding.shape[1]), dtype=np.float32)
    embedding[lone] = asked.embedding
    return {"family_index": family, "embedding": embedding}


def _arrivals(spec: WorkloadSpec, composition: Composition, rng: np.random.Generator) -> _Roots:
    start_s = -composition.warm_up_s
    season = composition.season or Season(start_h=0.0)
    clock_s, passed = season.clock(rng, start_s, spec.horizon_s)
    if composition.clients:
        passed_s, client = draw_clients(composition.clients, spec.arrivals, rng, float(passed[-1]))
        table = [(own.class_index, own.tenant_index) for own in composition.clients]
        class_index, tenant_index = np.array(table, dtype=np.int32)[client].T.copy()
    else:
        passed_s = spec.arrivals.draw(rng, float(passed[-1]), spec.requests_per_episode)
        client = np.full(len(passed_s), -1, dtype=np.int32)
        class_index = choose(rng, spec.class_share, len(passed_s))
        tenant_index = draw_tenants(spec, rng, class_index)
    size = len(passed_s)
    at_s = np.minimum(np.interp(passed_s, passed, clock_s), np.nextafter(spec.horizon_s, 0.0))
    return _Roots(at_s, class_index, tenant_index, client, np.full(size, np.nan), np.zeros(size, dtype=np.bool_))


def arrivals_of(spec: WorkloadSpec, rng: np.random.Generator) -> tuple[Array, Array] | None:
    """Times (M,) and classes (M,) of the arrivals that an episode with this generator begins with, nothing else drawn.

    None where the arrivals alone do not tell what is asked when: sessions and jobs.
    """
    composition = spec.composition
    if composition is None:
        at_s = spec.arrivals.draw(rng, spec.horizon_s, spec.requests_per_episode)
        return at_s, choose(rng, spec.class_share, len(at_s))
    if composition.sessions or composition.jobs is not None:
        return None
    roots = _arrivals(spec, composition, rng)
    return roots.at_s, roots.class_index


def _with_jobs(spec: WorkloadSpec, jobs: JobSpec, rng: np.random.Generator, roots: _Roots) -> _Roots:
    number = rng.poisson(jobs.per_s * spec.horizon_s)
    start_s = rng.random(number) * spec.horizon_s
    size = jobs.requests.draw(rng.random(number), rng.standard_normal(number))
    class_index = np.full(number, jobs.class_index, dtype=np.int32)
    tenant = draw_tenants(spec, rng, class_index)
    due_s = np.full(number, np.nan) if jobs.deadline_s is None else jobs.deadline_s.draw(rng, number)
    after_s = rng.random(int(size.sum())) * jobs.spread_s
    total = int(size.sum())
    return _Roots(
        np.append(roots.at_s, np.repeat(start_s, size) + after_s),
        np.append(roots.class_index, np.repeat(class_index, size)),
        np.append(roots.tenant_index, np.repeat(tenant, size)),
        np.append(roots.client, np.full(total, -1, dtype=np.int32)),
        np.append(roots.deadline_s, np.maximum(np.repeat(due_s, size) - after_s, 0.0)),
        np.append(roots.single, np.ones(total, dtype=np.bool_)),
    )


def _kinds(composition: Composition, rng: np.random.Generator, roots: _Roots) -> Array:
    """(R,) kind of session that each arrival starts, -1: a single request."""
    if not composition.sessions:
        return np.full(len(roots.at_s), -1)
    edges = np.cumsum([kind.share for kind in composition.sessions])
    kind = np.searchsorted(edges, rng.random(len(roots.at_s)), side="right")
    return np.where((kind < len(edges)) & ~roots.single, kind, -1)


def _calls(composition: Composition, rng: np.random.Generator, kind_of: Array) -> tuple[Calls, Array]:
    """All calls with the kind of each; lengths of single requests are drawn later."""
    lone = np.flatnonzero(kind_of < 0)
    size = len(lone)
    none, zero = np.full(size, -1), np.zeros(size, dtype=np.int64)
    parts = [Calls(lone, np.zeros(size), zero, zero, none, np.zeros(size), none, zero, zero, none)]
    for index, kind in enumerate(composition.sessions):
        parts.append(draw_sessions(kind, rng, np.flatnonzero(kind_of == index)))
    numbers = [np.full(len(part.root), index - 1) for index, part in enumerate(parts)]
    return joined(parts), np.concatenate(numbers)


def _kept(calls: Calls, rows: Array) -> Calls:
    """The rows (R,) in their order; links to others are dropped."""
    place = np.full(len(calls.root) + 1, -1, dtype=np.int64)
    place[rows] = np.arange(len(rows))
    columns = {name: values[rows] for name, values in vars(calls).items()}
    for name in ("parent", "source"):
        columns[name] = place[columns[name]]
    return Calls(**columns)


def _single_lengths(
    spec: WorkloadSpec,
    composition: Composition,
    rng: np.random.Generator,
    calls: Calls,
    single: Array,
    client: Array,
    task_index: Array,
) -> None:
    """Fills in the lengths of single requests: by task, or by client where it has its own."""
    rows = np.flatnonzero(single)
    for column, kind in (("prompt_tokens", "prompt"), ("output_tokens", "output")):
        mixtures = getattr(spec, f"{kind}_lengths")
        own = [getattr(who, f"{kind}_lengths") for who in composition.clients]
        tokens = draw_lengths(mixtures, rng, task_index[rows], np.arange(len(rows))).astype(np.float64)
        if composition.clients:
            factor = np.array([getattr(who, f"{kind}_factor") for who in composition.clients] + [1.0])
            tokens = tokens * factor[client[rows]]
            longest = max(mixture.max_tokens for mixture in mixtures)
            tokens = np.clip(np.rint(tokens), min(mixture.min_tokens for mixture in mixtures), longest)
            for number in np.flatnonzero([mixture is not None for mixture in own]):
                mine = np.flatnonzero(client[rows] == number)
                tokens[mine] = draw_lengths(
                    (own[number],), rng, np.zeros(len(mine), dtype=np.int32), np.arange(len(mine))
                )
        getattr(calls, column)[rows] = tokens.astype(np.int64)


def _repeat(calls: Calls, task_index: Array, rows: Array, first: Array) -> None:
    """Makes single requests `rows` repeat the prompts of `first`, themselves where they are new."""
    for column in (calls.prompt_tokens, calls.output_tokens, task_index):
        column[rows] = column[first]
    again = first != rows
    calls.source[rows[again]] = first[again]
    calls.kept_tokens[rows] = calls.prompt_tokens[rows]
    calls.level[rows[again]] = 1
