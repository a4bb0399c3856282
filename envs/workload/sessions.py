"""Chats and agent runs: calls that follow each other, prompts that grow, sub-agents that fan out.

A session is drawn call by call, all sessions of a kind at once. After call k it goes on with a probability that depends
on k; what comes next is one of the kind's steps (a user who reads and asks, a tool that returns, retrieval, a retry
after a failed validation), with its own waiting time and its own number of new tokens:

    prompt[k + 1] = prompt[k] + answer_kept x output[k] + new tokens,   start[k + 1] = end[k] + waiting time

The end is nominal (`ttft_s` + output tokens x `tpot_s`): in a world a follow-up arrives when its parent was answered.
Contexts that would pass `max_prompt_tokens`, and a share of others, are compacted. A step may rewrite the
conversation from some point on (an edited message), which cuts what a prefix cache can find.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from envs.workload.durations import SecondsMixture
from envs.workload.lengths import LengthMixture

Array = np.ndarray[Any, Any]

MAX_CALLS = 100_000  # of one session; a guard against follow shares of 1


@dataclass(frozen=True)
class Tool:
    """A tool or a retrieval behind a step, whose results have keys.

    Attributes:
        keys: different results that are asked for.
        exponent: popularity of the i-th falls like i ** -exponent.
        usd: cost of a call.
        shared: whether all tenants ask for the same results.
    """

    keys: int
    exponent: float
    usd: float
    shared: bool


@dataclass(frozen=True)
class Step:
    """What may come after an answered call.

    Attributes:
        weight: relative frequency.
        think_s: seconds from the answer to the next call.
        new_tokens: tokens added to prompt and answer; of an edit, to what is kept.
        output_lengths: of the next call; None: the session kind's.
        edit_share: of such steps that rewrite the conversation from some point on.
        edit_keep: mean share of the conversation before that point; single ones are 0.5 to 1.5 times that.
        calls: first and last number of the answered call after which it may come.
        tool: that is called meanwhile; None: none whose results are known by key.
    """

    weight: float
    think_s: SecondsMixture
    new_tokens: LengthMixture
    output_lengths: LengthMixture | None = None
    edit_share: float = 0.0
    edit_keep: float = 0.5
    calls: tuple[int, int] = (1, MAX_CALLS)
    tool: Tool | None = None


@dataclass(frozen=True)
class SubAgents:
    """Agents with contexts of their own that an answered call may start, side by side.

    Attributes:
        share: of calls that start some.
        agents: how many.
        first_tokens: prompt of their first call.
        follow_share: as of a session kind.
    """

    share: float
    agents: LengthMixture
    first_tokens: LengthMixture
    follow_share: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class SessionKind:
    """A kind of chat or agent run.

    Attributes:
        share: of the arrivals that start one.
        task_index: kind of work; -1 draws it from the class's mix.
        first_tokens: prompt of the first call, system prompt included.
        output_lengths: of every call.
        follow_share: (call number, P(another call)) in order; a share holds from its call on, the first is 1.
        steps: what may come next.
        reset_share: of follow-ups whose context was compacted.
        reset_tokens: prompt after that.
        max_prompt_tokens: longest prompt; a longer one is compacted.
        ttft_s, tpot_s: nominal service times.
        sub_agents: None where a call starts none.
        answer_kept: share of an answer that stays in the context (reasoning may not).
        pace_sigma: standard deviation of ln of a factor on all waiting times of a session: some are fast, some slow.
        workflow: kind of task that is paid for when it succeeds; -1: none.
    """

    share: float
    task_index: int
    first_tokens: LengthMixture
    output_lengths: LengthMixture
    follow_share: tuple[tuple[int, float], ...]
    steps: tuple[Step, ...]
    reset_share: float
    reset_tokens: LengthMixture
    max_prompt_tokens: int
    ttft_s: float
    tpot_s: float
    sub_agents: SubAgents | None = None
    answer_kept: float = 1.0
    pace_sigma: float = 0.0
    workflow: int = -1


@dataclass
class Calls:
    """Calls of sessions, C rows.

    Attributes:
        root: (C,) i8, row of the arrival that began the session.
        start_s: (C,) f8, seconds after that arrival.
        prompt_tokens, output_tokens: (C,) i8.
        parent: (C,) i8, row here of the call that it waits for, -1: none.
        think_s: (C,) f8, from the parent's end.
        source: (C,) i8, row here of the call whose prompt it continues, -1: none.
        kept_tokens: (C,) i8, tokens at the beginning that it shares with its source; without one, 0.
        level: (C,) i8, a number that is larger than the source's.
        step: (C,) i8, of its kind, that it came by; -1: it is a first call.
    """

    root: Array = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    start_s: Array = field(default_factory=lambda: np.empty(0))
    prompt_tokens: Array = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    output_tokens: Array = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    parent: Array = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    think_s: Array = field(default_factory=lambda: np.empty(0))
    source: Array = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    kept_tokens: Array = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    level: Array = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    step: Array = field(default_factory=lambda: np.empty(0, dtype=np.int64))


def joined(parts: list[Calls]) -> Calls:
    """Calls one after the other, links moved along."""
    calls, offset = Calls(), 0
    columns: dict[str, list[Array]] = {name: [getattr(calls, name)] for name in vars(calls)}
    for part in parts:
        for name, values in vars(part).items():
            moved = np.where(values >= 0, values + offset, -1) if name in ("parent", "source") else values
            columns[name].append(moved)
        offset += len(part.root)
    return Calls(**{name: np.concatenate(values) for name, values in columns.items()})


def draw_sessions(kind: SessionKind, rng: np.random.Generator, root: Array) -> Calls:
    """The calls of sessions of one kind, one session per row of `root` (S,)."""
    main = _threads(kind, rng, root, kind.first_tokens, kind.follow_share)
    fan = kind.sub_agents
    if fan is None or not len(main.root):
        return main
    begins = np.flatnonzero(rng.random(len(main.root)) < fan.share)
    agents = np.repeat(begins, _tokens(fan.agents, rng, len(begins)))
    sub = _threads(kind, rng, main.root[agents], fan.first_tokens, fan.follow_share)
    owner = agents[_thread_of(sub)]
    end_s = main.start_s + _service_s(kind, main.output_tokens)
    sub.start_s += end_s[owner]
    finished_s = sub.start_s + _service_s(kind, sub.output_tokens)
    size = len(main.root)
    calls = joined([main, sub])
    first = size + np.flatnonzero(sub.parent < 0)
    calls.parent[first] = owner[first - size]
    _wait_for_agents(calls, main, owner, finished_s, end_s)
    return calls


def _wait_for_agents(calls: Calls, main: Calls, owner: Array, finished_s: Array, end_s: Array) -> None:
    """Lets the call after one that started agents wait for the agent that ends last, and moves what follows."""
    size = len(main.root)
    if not len(owner):
        return
    order = np.lexsort((finished_s, owner))
    last = order[np.append(owner[order][1:] != owner[order][:-1], True)]
    delay_s = np.zeros(size)
    delay_s[owner[last]] = finished_s[last] - end_s[owner[last]]
    slowest = np.full(size, -1)
    slowest[owner[last]] = size + last
    follow = np.flatnonzero(main.parent >= 0)
    waits = follow[slowest[main.parent[follow]] >= 0]
    calls.parent[waits] = slowest[main.parent[waits]]
    late_s = np.zeros(size)  # rows of main are ordered by level: a call's delay is known before its follower's
    for low, high in _levels(main):
        before = main.parent[low:high]
        late_s[low:high] = late_s[before] + delay_s[before]
    calls.start_s[:size] += late_s
    calls.start_s[size:] += late_s[owner]


def _thread_of(calls: Calls) -> Array:
    """(C,) number of the thread that each call belongs to, by the order of first calls."""
    thread = np.arange(len(calls.root))
    for low, high in _levels(calls):
        thread[low:high] = thread[calls.parent[low:high]]
    return thread


def _levels(calls: Calls) -> Iterator[tuple[int, int]]:
    """First and last row, plus one, of the second calls, the third, ...; rows are in order of level."""
    if len(calls.root):
        bounds = np.searchsorted(calls.level, np.arange(1, int(calls.level[-1]) + 2))
        yield from pairwise(bounds.tolist())


def _threads(
    kind: SessionKind,
    rng: np.random.Generator,
    root: Array,
    first: LengthMixture,
    follow: tuple[tuple[int, float], ...],
) -> Calls:
    """Conversations one call after the other, (S,) of them; rows are ordered by call number, the level."""
    parts: list[dict[str, Array]] = []
    size, offset, number = len(root), 0, 1
    now: dict[str, Array] = {
        "root": root,
        "start_s": np.zeros(size),
        "prompt_tokens": np.minimum(_tokens(first, rng, size), kind.max_prompt_tokens),
        "output_tokens": _tokens(kind.output_lengths, rng, size),
        "parent": np.full(size, -1),
        "think_s": np.zeros(size),
        "source": np.full(size, -1),
        "kept_tokens": np.zeros(size, dtype=np.int64),
        "step": np.full(size, -1),
        "pace": np.exp(kind.pace_sigma * rng.standard_normal(size)) if kind.pace_sigma else np.ones(size),
    }
    while size and number < MAX_CALLS:
        parts.append({**now, "level": np.full(size, number - 1)})
        share = [value for call, value in follow if call <= number][-1]
        on = np.flatnonzero(rng.random(size) < share)
        row = offset + on
        offset += size
        now = _next(kind, rng, {name: values[on] for name, values in now.items()}, row, number)
        size, number = len(on), number + 1
    names = [name for name in parts[0] if name != "pace"] if parts else []
    return Calls(**{name: np.concatenate([part[name] for part in parts]) for name in names})


def _next(
    kind: SessionKind, rng: np.random.Generator, now: dict[str, Array], row: Array, number: int
) -> dict[str, Array]:
    """The calls that follow calls `now`, the `number`-th of their threads, whose rows are `row`."""
    size = len(row)
    edges = np.cumsum([step.weight * (step.calls[0] <= number <= step.calls[1]) for step in kind.steps])
    chosen = np.minimum(np.searchsorted(edges, rng.random(size) * edges[-1], side="right"), len(edges) - 1)
    think_s, new, output = np.zeros(size), np.zeros(size, dtype=np.int64), np.zeros(size, dtype=np.int64)
    kept = now["prompt_tokens"].copy()
    for index, step in enumerate(kind.steps):
        mine = np.flatnonzero(chosen == index)
        think_s[mine] = step.think_s.draw(rng, len(mine)) * now["pace"][mine]
        new[mine] = _tokens(step.new_tokens, rng, len(mine))
        output[mine] = _tokens(step.output_lengths or kind.output_lengths, rng, len(mine))
        if step.edit_share:
            edited = mine[rng.random(len(mine)) < step.edit_share]
            part = np.minimum(step.edit_keep * (0.5 + rng.random(len(edited))), 1.0)
            kept[edited] = (kept[edited] * part).astype(np.int64)
    whole = now["prompt_tokens"] + (kind.answer_kept * now["output_tokens"]).astype(np.int64)
    prompt = np.where(kept == now["prompt_tokens"], whole, kept) + new
    reset = (prompt > kind.max_prompt_tokens) | (rng.random(size) < kind.reset_share)
    short = np.minimum(_tokens(kind.reset_tokens, rng, size), kind.max_prompt_tokens)
    prompt = np.where(reset, short, prompt)
    return {
        "root": now["root"],
        "start_s": now["start_s"] + _service_s(kind, now["output_tokens"]) + think_s,
        "prompt_tokens": prompt,
        "output_tokens": output,
        "parent": row,
        "think_s": think_s,
        "source": row,
        "kept_tokens": np.where(reset, 0, kept),
        "step": chosen,
        "pace": now["pace"],
    }


def _service_s(kind: SessionKind, output_tokens: Array) -> Array:
    return kind.ttft_s + kind.tpot_s * output_tokens


def _tokens(mixture: LengthMixture, rng: np.random.Generator, size: int) -> Array:
    return mixture.draw(rng.random(size), rng.standard_normal(size)).astype(np.int64)
