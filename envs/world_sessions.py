"""Sessions of a world: requests that follow others, and how far the fleet may run before one of them arrives.

A follow-up arrives `think_s` after its parent was answered. Those whose parent was answered wait in a heap, earliest
first (its p-th entry is `loads[w, p].ready_heap`; ties go by row). If the parent was shed, left or failed, the session
ends there: the calls that would have followed never arrive and are counted as `lost_calls`.

An answer that comes between two decisions may bring an arrival before the next one. The fleet therefore runs no further
than `safe_until_s`: the next instant at which anything can end where a request with follow-ups, or with a verifier, is
in flight, plus the least think time of the episode (or time of a look, if that is less). Nothing that ends by then can
bring an arrival before it. Think times are at least `LEAST_THINK_S`, a client's round trip, so that time always moves
on.

Without follow-ups all this costs a comparison per decision.
"""

# ruff: noqa: ANN001, ANN201, ANN202 (Numba infers the types of kernels)
from __future__ import annotations

from typing import Any

import numpy as np

from envs.economics import ledger as books
from envs.kernels import kernel
from envs.workload.requests import Workload

LEAST_THINK_S = 0.001

# LOAD.arrival
EXPECTED, ARRIVED, NEVER = range(3)


def load_sessions(workload: Workload, desk: Any, load: Any) -> None:
    """Links every request to those that follow it.

    Args:
        workload: of the episode.
        desk: (1,) its `DESK` record.
        load: (M,) its `LOAD` records.
    """
    parent = workload.parent_index
    rows = np.flatnonzero(parent >= 0)
    load["arrival"], load["first_child"], load["next_sibling"] = EXPECTED, -1, -1
    load["follows"] = parent >= 0
    load["think_s"] = np.maximum(workload.think_s, LEAST_THINK_S)
    desk["n_roots"] = workload.n_requests - len(rows)
    desk["least_think_s"] = load["think_s"][rows].min() if len(rows) else np.inf
    if len(rows) == 0:
        return
    rows = rows[np.argsort(parent[rows], kind="stable")]
    first = np.concatenate([[True], parent[rows[1:]] != parent[rows[:-1]]])
    load["first_child"][parent[rows[first]]] = rows[first]
    load["next_sibling"][rows[:-1]] = np.where(first[1:], -1, rows[1:])


@kernel
def _before(loads, w, i, j):
    """Whether follow-up i arrives before j."""
    at_s, other_s = loads[w, i].arrived_at_s, loads[w, j].arrived_at_s
    return at_s < other_s or (at_s == other_s and i < j)


@kernel
def _push_ready(desk, loads, w, i):
    p = int(desk.ready)
    desk.ready += 1
    while p > 0:
        above = (p - 1) >> 1
        if not _before(loads, w, i, loads[w, above].ready_heap):
            break
        loads[w, p].ready_heap = loads[w, above].ready_heap
        p = above
    loads[w, p].ready_heap = i


@kernel
def ready_s(desk, loads, w):
    """When the next follow-up arrives, as far as answers have come; inf: nobody is on the way."""
    return loads[w, loads[w, 0].ready_heap].arrived_at_s if desk.ready > 0 else np.inf


@kernel
def pop_ready(desk, loads, w):
    """Takes the follow-up that arrives first, which must exist."""
    first = int(loads[w, 0].ready_heap)
    desk.ready -= 1
    size = int(desk.ready)
    i = int(loads[w, size].ready_heap)
    p = 0
    while True:
        below = 2 * p + 1
        if below >= size:
            break
        if below + 1 < size and _before(loads, w, loads[w, below + 1].ready_heap, loads[w, below].ready_heap):
            below += 1
        if not _before(loads, w, loads[w, below].ready_heap, i):
            break
        loads[w, p].ready_heap = loads[w, below].ready_heap
        p = below
    loads[w, p].ready_heap = i
    return first


@kernel
def _use_tool(config, results, load, ledger_usd, counts, w, at_s):
    """A follow-up's tool is asked for a result at `at_s`: a fresh one is at hand, or the tool is called."""
    kept_at_s = results[w, load.tool_key]
    if kept_at_s <= at_s and at_s - kept_at_s <= config[0].result_ttl_s:
        load.arrived_at_s = at_s + config[0].result_lookup_s
        counts[w, books.TOOL_HITS, load.class_index] += 1
        return
    counts[w, books.TOOL_CALLS, load.class_index] += 1
    books.post(ledger_usd, w, books.TOOLS, load.class_index, -load.tool_usd)
    if not kept_at_s > at_s:  # else another call will be back with it first
        results[w, load.tool_key] = load.arrived_at_s


@kernel
def answered(config, results, desk, loads, ledger_usd, counts, w, i, at_s):
    """Request `i` was answered completely at `at_s`: those that follow it get ready."""
    child = int(loads[w, i].first_child)
    while child >= 0:
        loads[w, child].arrived_at_s = at_s + loads[w, child].think_s
        if loads[w, child].tool_key >= 0:
            _use_tool(config, results, loads[w, child], ledger_usd, counts, w, at_s)
        _push_ready(desk, loads, w, child)
        child = int(loads[w, child].next_sibling)


@kernel
def not_answered(loads, counts, w, i):
    """Request `i` gets no answer: whatever would have followed it never arrives. The stack is in `next_held`."""
    top = -1
    child = int(loads[w, i].first_child)
    while True:
        while child >= 0:
            load = loads[w, child]
            load.arrival = NEVER
            counts[w, books.LOST_CALLS, load.class_index] += 1
            load.next_held = top
            top = child
            child = int(load.next_sibling)
        if top < 0:
            break
        child = int(loads[w, top].first_child)
        top = int(loads[w, top].next_held)


@kernel
def safe_until_s(worlds, replicas, desk, own, w):
    """How far the fleet may run: no follow-up whose parent is in flight now arrives earlier."""
    if desk.leading == 0:
        return np.inf
    end_s = worlds[w].next_call_s
    for r in range(replicas.shape[1]):
        if own[w, r].leading > 0:
            end_s = min(end_s, replicas[w, r].wake_s)
    return end_s + desk.least_think_s


@kernel
def sent(desk, load, mine):
    """A request leaves for a candidate, `mine` of `own`; those whose end may bring a decision are counted."""
    if load.leads == 1:
        desk.leading += 1
        mine.leading += 1


@kernel
def ended(desk, load, mine):
    """A request has left the fleet, answered or not."""
    if load.leads == 1:
        desk.leading -= 1
        mine.leading -= 1
