"""Sessions fitted to recorded calls: how long chats go on, how prompts grow, what is kept of them.

Calls are linked by the recorded parents or, where a trace has only block hashes, by the longest prefix that came
before (blocks that a fifth of all prompts begin with tell nothing). A recording ends before the last chats do: a gap g
is seen only by calls that arrive more than g before the end, and counts by the inverse of their share; a call without
a follower either has none or one after the end, which is weighed by expectation-maximisation.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from envs.workload.durations import SecondsMixture
from envs.workload.fit_lengths import fit_lengths, fit_seconds
from envs.workload.lengths import LengthMixture
from envs.workload.sessions import MAX_CALLS, SessionKind, Step, SubAgents
from envs.workload.traces import Trace

Array = np.ndarray[Any, Any]

CALL_EDGES = (1, 2, 3, 5, 10, 20, 50, 100, 200)
STEP_EDGES = (1, 4, 19)  # last calls of the stretches in which prompts grow alike
_COMMON_SHARE = 0.2
_COMPACTED = 0.6  # of the prompt before: a shorter one that lost its prefix was compacted
_FULL = 0.8  # of the longest prompt: one that is compacted from there on was full
_NEARLY = 0.9  # of the prompt before: what keeps as much of its prefix is a continuation
_FEW_EDITS = 8
_FEW = 40  # rows that a part of its own needs


@dataclass(frozen=True)
class Links:
    """What each of M calls continues.

    Attributes:
        parent: (M,) row, -1: begins a session.
        kept_tokens: (M,) tokens it shares with its parent's beginning.
        gap_s: (M,) from the parent's end, or its arrival where no end is known.
        number: (M,) of the call in its thread, from 1.
        common_tokens: beginning that all prompts share.
        ends_known: whether gaps are from ends.
        complete: whether sessions are recorded to their end.
    """

    parent: Array
    kept_tokens: Array
    gap_s: Array
    number: Array
    common_tokens: int
    ends_known: bool
    complete: bool

    def session(self) -> Array:
        """(M,) number of the thread that each call belongs to, dense from 0."""
        first = np.arange(len(self.parent))
        for row in np.flatnonzero(self.parent >= 0).tolist():  # parents come before their followers
            first[row] = first[self.parent[row]]
        return np.unique(first, return_inverse=True)[1]

    def pick(self, rows: Array) -> Links:
        """Those of the calls (R,) `rows`, ascending; a parent that is not among them is dropped."""
        place = np.full(len(self.parent) + 1, -1, dtype=np.int64)
        place[rows] = np.arange(len(rows))
        columns = {name: getattr(self, name)[rows] for name in ("kept_tokens", "gap_s", "number")}
        return replace(self, parent=place[self.parent[rows]], **columns)


def link_calls(trace: Trace) -> Links | None:
    """Parents of calls, recorded or told from hashes; None where the trace has neither."""
    common = _common_blocks(trace)
    known = trace.parent_index is not None and bool((trace.parent_index >= 0).any())
    if known:
        assert trace.parent_index is not None
        parent = trace.parent_index.astype(np.int64)
        kept = _shared_blocks(trace, parent)
    elif trace.prefix_hash is not None:
        parent, kept = _parents_by_prefix(trace, common)
    else:
        return None
    rows = np.flatnonzero(parent >= 0)
    gap_s = np.full(trace.n_requests, np.nan)
    gap_s[rows] = trace.arrived_at_s[rows] - trace.arrived_at_s[parent[rows]]
    ends = known and trace.think_s is not None and bool(np.isfinite(trace.think_s[rows]).mean() > 0.9)
    if ends and trace.think_s is not None:
        gap_s = trace.think_s
    number = np.ones(trace.n_requests, dtype=np.int64)
    for row in rows.tolist():  # parents come before their followers
        number[row] = number[parent[row]] + 1
    block = max(trace.prefix_block_tokens, 1)
    return Links(parent, kept * block, gap_s, number, common * block, ends, known)


def _common_blocks(trace: Trace) -> int:
    """Blocks at the beginning that a large part of all prompts share."""
    if trace.prefix_hash is None or trace.prefix_count is None:
        return 0
    first = np.cumsum(trace.prefix_count) - trace.prefix_count
    depth = 0
    while True:
        rows = np.flatnonzero(trace.prefix_count > depth)
        if not len(rows):
            return depth
        counts = np.unique(trace.prefix_hash[first[rows] + depth], return_counts=True)[1]
        if counts.max() < _COMMON_SHARE * trace.n_requests:
            return depth
        depth += 1


def _shared_blocks(trace: Trace, parent: Array) -> Array:
    """(M,) leading blocks that each call shares with its parent."""
    shared = np.zeros(trace.n_requests, dtype=np.int64)
    if trace.prefix_hash is None or trace.prefix_count is None:
        return shared
    ends = np.cumsum(trace.prefix_count, dtype=np.int64)
    first = ends - trace.prefix_count
    for row in np.flatnonzero(parent >= 0).tolist():
        before = int(parent[row])
        both = min(int(trace.prefix_count[row]), int(trace.prefix_count[before]))
        same = (
            trace.prefix_hash[first[row] : first[row] + both] == trace.prefix_hash[first[before] : first[before] + both]
        )
        shared[row] = both if same.all() else int(np.argmin(same))
    return shared


def _parents_by_prefix(trace: Trace, common: int) -> tuple[Array, Array]:
    """(M,) latest call that had each call's longest known prefix, and the (M,) blocks of it."""
    assert trace.prefix_hash is not None and trace.prefix_count is not None
    owner: dict[int, int] = {}
    parent, kept = np.full(trace.n_requests, -1, dtype=np.int64), np.zeros(trace.n_requests, dtype=np.int64)
    ends = np.cumsum(trace.prefix_count, dtype=np.int64)
    for row in range(trace.n_requests):
        own = trace.prefix_hash[int(ends[row]) - int(trace.prefix_count[row]) : int(ends[row])].tolist()
        depth = 0
        while depth < len(own) and own[depth] in owner:
            depth += 1
        if depth > common:
            parent[row], kept[row] = owner[own[depth - 1]], depth
        for block in own:
            owner[block] = row
    return parent, kept


def fit_session(trace: Trace, links: Links, components: int, most_tokens: int = 0) -> SessionKind:
    """The kind of session whose calls are most like those of the trace.

    Args:
        trace: calls.
        links: from `link_calls`.
        components: of length mixtures.
        most_tokens: longest prompt of any kind, which bounds one whose full contexts were never compacted.
    """
    parent, prompt, output = links.parent, trace.prompt_tokens.astype(np.int64), trace.output_tokens.astype(np.int64)
    main = _main(trace, links)
    rows = np.flatnonzero(main & (parent >= 0))
    gaps, weight = links.gap_s[rows], _inverse_seen(trace, links, rows)
    known = ~np.isnan(gaps)
    pace, pace_sigma = _pace(trace, links, rows[known])
    think = fit_seconds(np.maximum(gaps[known], 0.05) / pace, weight[known], 3)
    before = parent[rows]
    block = max(trace.prefix_block_tokens, 1)
    whole = links.kept_tokens[rows] >= np.minimum(_NEARLY * prompt[before], prompt[before] // block * block)
    if trace.prefix_hash is None:
        whole[:] = True  # nothing tells what was kept
    compacted = ~whole & (prompt[rows] < _COMPACTED * prompt[before])
    full = compacted & (prompt[before] >= _FULL * prompt.max())
    edited = ~whole & ~compacted
    kept = float(links.kept_tokens[rows[edited]].sum() / max(int(prompt[before[edited]].sum()), 1))
    growth = prompt[rows] - prompt[before]
    answer_kept = 0.0 if (growth[whole] < output[before[whole]]).mean() > 0.2 else 1.0
    new = growth - answer_kept * output[before], prompt[rows] - links.kept_tokens[rows]
    steps = [
        replace(step, edit_keep=min(max(kept, 0.01), 1.0)) if step.edit_share else step
        for step in _steps(links.number[before], new, edited, whole, think, components)
    ]
    burn_in_s = 0.0 if links.complete else min(float(np.quantile(gaps[known], 0.95)), trace.span_s / 2.0)
    roots = np.flatnonzero(main & (parent < 0) & (trace.arrived_at_s >= burn_in_s))
    ttft_s, tpot_s = _service(trace) if links.ends_known else (0.0, 0.0)
    return SessionKind(
        share=1.0,
        task_index=-1,
        first_tokens=_fit(prompt[roots], components),
        output_lengths=_fit(output, components),
        follow_share=follow_shares(trace, links, main & (trace.arrived_at_s >= burn_in_s), think),
        steps=tuple(steps),
        reset_share=float((compacted & ~full).mean()),
        reset_tokens=_fit(prompt[rows[compacted]] if compacted.any() else prompt[roots], components),
        max_prompt_tokens=int(prompt.max()) if full.any() else max(int(prompt.max()), most_tokens),
        ttft_s=ttft_s,
        tpot_s=tpot_s,
        sub_agents=_sub_agents(trace, links, main, components),
        answer_kept=answer_kept,
        pace_sigma=pace_sigma,
    )


def _steps(
    number: Array, new: tuple[Array, Array], edited: Array, whole: Array, think: SecondsMixture, components: int
) -> list[Step]:
    """What comes after the first call and after later ones: the first follow-ups often bring the documents.

    `new` tokens (R,) are those after the whole conversation and those after what was kept of it. Where edits are too
    few to tell anything, they count by how much the prompt grew.
    """
    steps = []
    for low, high in _stretches(number[whole]):
        mine = (number >= low) & (number <= high)
        cut = edited & mine
        if cut.sum() < _FEW_EDITS:
            cut[:] = False
        on = (whole | edited) & mine & ~cut
        for rows, tokens, edit_share in ((on, new[0], 0.0), (cut, new[1], 1.0)):
            if rows.any():
                weight = float(rows.sum() / (on | cut).sum())
                steps.append(
                    Step(weight, think, _fit(tokens[rows], components), edit_share=edit_share, calls=(low, high))
                )
    return steps


def _stretches(number: Array) -> list[tuple[int, int]]:
    """First and last call number of `STEP_EDGES`, joined where fewer than `_FEW` of the (R,) numbers lie in one."""
    found: list[tuple[int, int]] = []
    low = 1
    for high in (*STEP_EDGES, MAX_CALLS):
        if ((number >= low) & (number <= high)).sum() >= _FEW:
            found.append((low, high))
            low = high + 1
    return [*found[:-1], (found[-1][0] if found else 1, MAX_CALLS)]


def _fit(tokens: Array, components: int) -> LengthMixture:
    components = min(components, 1 + len(tokens) // 8)
    return fit_lengths(np.maximum(tokens, 1).astype(np.int64), components, steps=200, restarts=4)


def _pace(trace: Trace, links: Links, rows: Array) -> tuple[Array, float]:
    """Factor (R,) of each follow-up's session on its waiting times, and the spread of its logarithm over sessions.

    Means of sessions are shrunk towards the mean of all by their sampling variance, as in a random-effects model.
    """
    if not links.complete or trace.session_index is None:
        return np.ones(len(rows)), 0.0
    _, session = np.unique(trace.session_index[rows], return_inverse=True)
    log = np.log(np.maximum(links.gap_s[rows], 0.05))
    count = np.bincount(session)
    mean = np.bincount(session, log) / count
    within = float(np.square(log - mean[session]).sum() / max(len(rows) - len(count), 1))
    between = max(float(np.average(np.square(mean - log.mean()) - within / count, weights=count)), 0.0)
    effect = (mean - log.mean()) * between / (between + within / count + 1e-12)
    return np.exp(effect[session]), float(np.sqrt(between))


def _main(trace: Trace, links: Links) -> Array:
    """(M,) bool, calls that are not of a sub-agent."""
    if trace.task_name is None or trace.session_index is None or not links.complete:
        return np.ones(trace.n_requests, dtype=np.bool_)
    return np.asarray(trace.task_name == "main") if (trace.task_name == "main").any() else trace.task_name != ""


def _inverse_seen(trace: Trace, links: Links, rows: Array) -> Array:
    """(R,) weights of observed gaps: the inverse of the share of calls early enough for such a gap to be seen."""
    if links.complete:
        return np.ones(len(rows))
    left_s = np.sort(trace.span_s - trace.arrived_at_s)
    seen = 1.0 - np.searchsorted(left_s, links.gap_s[rows]) / len(left_s)
    return 1.0 / np.maximum(seen, 0.02)


def follow_shares(trace: Trace, links: Links, rows: Array, think: SecondsMixture) -> tuple[tuple[int, float], ...]:
    """P(another call) from each of `CALL_EDGES` on, (call number, share)."""
    has = np.zeros(trace.n_requests, dtype=np.bool_)
    heirs = rows & (links.parent >= 0) if links.complete else links.parent >= 0
    has[links.parent[heirs]] = True
    later = np.zeros(trace.n_requests)
    if not links.complete:
        drawn_s = np.sort(think.draw(np.random.default_rng(0), 20_000))
        later = 1.0 - np.searchsorted(drawn_s, trace.span_s - trace.arrived_at_s) / len(drawn_s)
    shares: list[tuple[int, float]] = []
    for low, high in zip(CALL_EDGES, (*CALL_EDGES[1:], np.iinfo(np.int64).max), strict=True):
        mine = np.flatnonzero(rows & (links.number >= low) & (links.number < high))
        if len(mine) < _FEW and shares:
            break
        share = 0.5
        for _ in range(100):
            unseen = share * later[mine] / (1.0 - share + share * later[mine] + 1e-12)
            share = float(np.where(has[mine], 1.0, unseen).mean())
        shares.append((low, share))
    return tuple(shares)


def _service(trace: Trace) -> tuple[float, float]:
    """Nominal seconds to the first token and per token, by least squares of E2E on output tokens."""
    assert trace.e2e_s is not None
    known = np.isfinite(trace.e2e_s)
    tokens, e2e_s = trace.output_tokens[known].astype(np.float64), trace.e2e_s[known]
    tpot_s = float(np.cov(tokens, e2e_s)[0, 1] / max(tokens.var(ddof=1), 1e-12))
    return max(float(e2e_s.mean() - tpot_s * tokens.mean()), 0.0), max(tpot_s, 0.0)


def _sub_agents(trace: Trace, links: Links, main: Array, components: int) -> SubAgents | None:
    first = np.flatnonzero(~main & (links.parent >= 0) & main[links.parent])
    if len(first) < _FEW:
        return None
    callers, agents = np.unique(links.parent[first], return_counts=True)
    threads = replace(links, number=np.where(main, 0, _thread_number(links, main)))
    return SubAgents(
        share=len(callers) / int(main.sum()),
        agents=_fit(agents, 1),
        first_tokens=_fit(trace.prompt_tokens[first], min(components, 3)),
        follow_share=follow_shares(trace, threads, ~main, SecondsMixture((1.0,), (1.0,), (1.0,), 1.0)),
    )


def _thread_number(links: Links, main: Array) -> Array:
    """(M,) number of a sub-agent's call in its own thread."""
    number = np.ones(len(main), dtype=np.int64)
    for row in np.flatnonzero(~main & (links.parent >= 0)).tolist():
        if not main[links.parent[row]]:
            number[row] = number[links.parent[row]] + 1
    return number
