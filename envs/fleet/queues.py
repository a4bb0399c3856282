"""Linked lists through `requests` and the heap of finishing decodes: constant or logarithmic time, no allocation.

A request waits in one list at a time (hold, waiting, prefill, stalled or finished), so one field `next` serves them
all. The running list, in order of admission, is doubly linked because a request leaves it from anywhere.

Priority scheduling keeps the two lines, at the engine and in the gateway's hold queue, in the order of vLLM's
PriorityRequestQueue (vllm/v1/core/sched/request_queue.py): lower `priority` first, then first come, first served. There
are `PRIORITY_LEVELS` levels, and the last request of every level is noted in the replica's slots, so that a request
finds its place in constant time. One that was preempted came before all of its level that wait: within a level
requests are admitted in order of arrival and preempted in the reverse order. It goes first of its level.
"""

# ruff: noqa: ANN001, ANN201, ANN202 (Numba infers the types of kernels)
from __future__ import annotations

from envs.fleet.state import ABANDONED, COMPLETED, FAILED, PRIORITY_LEVELS
from envs.kernels import kernel


@kernel
def empty_wait(pool, rep, slots, w):
    """Empties the line at the engine."""
    rep.waiting = 0
    rep.wait_head = rep.wait_tail = -1
    if pool.priorities:
        for p in range(PRIORITY_LEVELS):
            slots[w, rep.slot_at + pool.levels_at + p].level_tail = -1


@kernel
def empty_hold(pool, rep, slots, w):
    """Empties the gateway's hold queue."""
    rep.held = 0
    rep.hold_head = rep.hold_tail = -1
    if pool.priorities:
        for p in range(PRIORITY_LEVELS, 2 * PRIORITY_LEVELS):
            slots[w, rep.slot_at + pool.levels_at + p].level_tail = -1


@kernel
def _enter_level(slots, requests, w, at, head, i, first):
    """Puts a request into a line by its priority, behind its equals or, where `first`, ahead of them.

    Cell `at` + p holds the last request of level p, or -1.

    Returns:
        The head of the line.
    """
    level = requests[w, i].priority
    above = level - 1 if first else level
    while above >= 0 and slots[w, at + above].level_tail < 0:
        above -= 1
    behind = int(slots[w, at + above].level_tail) if above >= 0 else -1
    if not first or slots[w, at + level].level_tail < 0:
        slots[w, at + level].level_tail = i
    if behind < 0:
        requests[w, i].next = head
        return i
    requests[w, i].next = requests[w, behind].next
    requests[w, behind].next = i
    return head


@kernel
def _leave_level(slots, requests, w, at, i):
    """The first in line leaves it."""
    tail = slots[w, at + requests[w, i].priority]
    if tail.level_tail == i:
        tail.level_tail = -1


@kernel
def wait_append(pool, extras, rep, slots, requests, w, i):
    """Last in line at the engine, or last of its level."""
    rep.waiting += 1
    if extras is not None and pool.priorities:
        rep.wait_head = _enter_level(slots, requests, w, rep.slot_at + pool.levels_at, rep.wait_head, i, False)
        if requests[w, i].next < 0:
            rep.wait_tail = i
        return
    requests[w, i].next = -1
    if rep.wait_tail >= 0:
        requests[w, rep.wait_tail].next = i
    else:
        rep.wait_head = i
    rep.wait_tail = i


@kernel
def wait_prepend(pool, extras, rep, slots, requests, w, i):
    """First in line, or first of its level: a preempted request."""
    rep.waiting += 1
    if extras is not None and pool.priorities:
        rep.wait_head = _enter_level(slots, requests, w, rep.slot_at + pool.levels_at, rep.wait_head, i, True)
        if requests[w, i].next < 0:
            rep.wait_tail = i
        return
    requests[w, i].next = rep.wait_head
    if rep.wait_head < 0:
        rep.wait_tail = i
    rep.wait_head = i


@kernel
def wait_pop(pool, extras, rep, slots, requests, w):
    """Takes the first in line, which must exist."""
    if extras is not None and pool.priorities:
        _leave_level(slots, requests, w, rep.slot_at + pool.levels_at, rep.wait_head)
    rep.wait_head = requests[w, rep.wait_head].next
    if rep.wait_head < 0:
        rep.wait_tail = -1
    rep.waiting -= 1


@kernel
def hold_append(pool, extras, rep, slots, requests, w, i):
    """Last in the gateway's hold queue, or last of its level there."""
    rep.held += 1
    if extras is not None and pool.priorities:
        at = rep.slot_at + pool.levels_at + PRIORITY_LEVELS
        rep.hold_head = _enter_level(slots, requests, w, at, rep.hold_head, i, False)
        if requests[w, i].next < 0:
            rep.hold_tail = i
        return
    requests[w, i].next = -1
    if rep.hold_tail >= 0:
        requests[w, rep.hold_tail].next = i
    else:
        rep.hold_head = i
    rep.hold_tail = i


@kernel
def release_held(pool, extras, rep, slots, requests, w):
    """Lets held requests through to the engine while it has fewer than the cap."""
    while rep.hold_head >= 0 and rep.in_flight - rep.held < rep.in_flight_cap:
        i = int(rep.hold_head)
        if extras is not None and pool.priorities:
            _leave_level(slots, requests, w, rep.slot_at + pool.levels_at + PRIORITY_LEVELS, i)
        rep.hold_head = requests[w, i].next
        if rep.hold_head < 0:
            rep.hold_tail = -1
        rep.held -= 1
        wait_append(pool, extras, rep, slots, requests, w, i)


@kernel
def prefill_append(rep, requests, w, i):
    """Adds a request to those that prefill in the iteration being put together."""
    requests[w, i].next = -1
    if rep.prefill_tail >= 0:
        requests[w, rep.prefill_tail].next = i
    else:
        rep.prefill_head = i
    rep.prefill_tail = i


@kernel
def running_append(rep, requests, w, i, sorted_by_row):
    """Last of the running list; where `sorted_by_row`, behind the last request with a lower row."""
    behind = int(rep.running_tail)
    if sorted_by_row:
        while behind >= 0 and behind > i:
            behind = int(requests[w, behind].before)
    ahead = requests[w, behind].after if behind >= 0 else rep.running_head
    requests[w, i].before = behind
    requests[w, i].after = ahead
    if behind >= 0:
        requests[w, behind].after = i
    else:
        rep.running_head = i
    if ahead >= 0:
        requests[w, ahead].before = i
    else:
        rep.running_tail = i
    rep.running += 1


@kernel
def running_remove(rep, requests, w, i):
    """Takes a request out of the running list."""
    before, after = requests[w, i].before, requests[w, i].after
    if before >= 0:
        requests[w, before].after = after
    else:
        rep.running_head = after
    if after >= 0:
        requests[w, after].before = before
    else:
        rep.running_tail = before
    rep.running -= 1


@kernel
def worst_running(rep, requests, w, i):
    """Whom priority scheduling preempts for running request i: the last of the worst level.

    Within a level the running list is in order of arrival, so that this is the largest (priority, arrival), as in
    vllm/v1/core/sched/scheduler.py.

    Returns:
        The victim, and 1 if it comes before request i in the running list, hence already has what this iteration
        needs.
    """
    victim, j = i, int(rep.running_tail)
    worst, passed, before = -1, 0, 0
    while j >= 0:
        if requests[w, j].priority > worst:
            victim, worst, before = j, int(requests[w, j].priority), passed
        if j == i:
            passed = 1
        j = int(requests[w, j].before)
    return victim, before


@kernel
def finish(world, requests, w, i, status, now_s):
    """Ends a request, counts it, and puts it last in the world's list of those that have ended and were not popped."""
    requests[w, i].status = status
    requests[w, i].completed_at_s = now_s
    if status == COMPLETED:
        world.completed += 1
    elif status == ABANDONED:
        world.abandoned += 1
    elif status == FAILED:
        world.failed += 1
    else:
        world.lost += 1
    requests[w, i].next = -1
    if world.last_finished >= 0:
        requests[w, world.last_finished].next = i
    else:
        world.first_finished = i
    world.last_finished = i


@kernel
def _sift_up(slots, w, at, p, finish_at, i):
    while p > 0:
        parent = (p - 1) >> 1
        if slots[w, at + parent].finish_at <= finish_at:
            break
        slots[w, at + p].finish_at = slots[w, at + parent].finish_at
        slots[w, at + p].request = slots[w, at + parent].request
        p = parent
    slots[w, at + p].finish_at = finish_at
    slots[w, at + p].request = i


@kernel
def _sift_down(slots, w, at, p, size, finish_at, i):
    while True:
        child = 2 * p + 1
        if child >= size:
            break
        if child + 1 < size and slots[w, at + child + 1].finish_at < slots[w, at + child].finish_at:
            child += 1
        if slots[w, at + child].finish_at >= finish_at:
            break
        slots[w, at + p].finish_at = slots[w, at + child].finish_at
        slots[w, at + p].request = slots[w, at + child].request
        p = child
    slots[w, at + p].finish_at = finish_at
    slots[w, at + p].request = i


@kernel
def heap_push(slots, w, at, size, finish_at, i):
    """Adds a decode to a heap of `size` entries."""
    _sift_up(slots, w, at, size, finish_at, i)


@kernel
def heap_pop(slots, w, at, size):
    """Removes the decode that finishes first from a heap of `size` entries and returns its request."""
    i = int(slots[w, at].request)
    if size > 1:
        _sift_down(slots, w, at, 0, size - 1, slots[w, at + size - 1].finish_at, int(slots[w, at + size - 1].request))
    return i


@kernel
def heap_remove(slots, w, at, size, i):
    """Removes a preempted decode, found by a scan (preemption is rare)."""
    p = 0
    while slots[w, at + p].request != i:
        p += 1
    last = size - 1
    if p == last:
        return
    finish_at, request = slots[w, at + last].finish_at, int(slots[w, at + last].request)
    if p > 0 and finish_at < slots[w, at + ((p - 1) >> 1)].finish_at:
        _sift_up(slots, w, at, p, finish_at, request)
    else:
        _sift_down(slots, w, at, p, last, finish_at, request)
