"""The hold queue of a gateway whose controller releases batch work: earliest deadline first, at a rate.

With `desk.gated` 1 a deferred request no longer comes back every `hold_s` seconds. It comes back when the release rate
has room, 1 / `release_per_s` seconds after the one before it, and at the latest when it is due: at its deadline less
2 `hold_s`, from where on it may not be deferred. What is due does not wait for the rate, and takes none of it.

Nothing here is called in a world without a controller (`desk.gated` is 0).
"""

# ruff: noqa: ANN001, ANN201 (Numba infers the types of kernels)
from __future__ import annotations

import math

from envs.kernels import kernel


@kernel
def hold(config, desks, loads, w, i):
    """Puts request `i` behind those that are due before it; `offer_at_s` is when it is due."""
    desk, load = desks[w], loads[w, i]
    load.offer_at_s = max(load.arrived_at_s + load.deadline_s - 2.0 * config[0].hold_s, desk.now_s)
    if desk.held_head < 0 or loads[w, desk.held_head].offer_at_s > load.offer_at_s:
        load.next_held = desk.held_head
        desk.held_head = i
        if load.next_held < 0:
            desk.held_tail = i
        return
    behind = int(desk.held_tail)
    if loads[w, behind].offer_at_s > load.offer_at_s:
        behind = int(desk.held_head)
        while loads[w, loads[w, behind].next_held].offer_at_s <= load.offer_at_s:
            behind = int(loads[w, behind].next_held)
    load.next_held = loads[w, behind].next_held
    loads[w, behind].next_held = i
    if load.next_held < 0:
        desk.held_tail = i


@kernel
def offer_s(desk, loads, w):
    """When the first held request is offered to the router; inf: nothing is held."""
    if desk.held_head < 0:
        return math.inf
    due_s = loads[w, desk.held_head].offer_at_s
    if desk.release_per_s <= 0.0:
        return max(due_s, desk.now_s)
    return max(min(due_s, desk.released_at_s + 1.0 / desk.release_per_s), desk.now_s)


@kernel
def note_offer(desk, loads, w, i, now_s):
    """Request `i` has been taken from the queue at `now_s`; unless it was due, the next one waits its turn."""
    desk.offered = 1
    if now_s < loads[w, i].offer_at_s:
        desk.released_at_s = now_s


@kernel
def set_release(desks, release_per_s):
    """Sets the release rate of every world, `release_per_s` (N,), inf: at once; from now on the controller decides."""
    for w in range(release_per_s.shape[0]):
        desks[w].gated = 1
        desks[w].release_per_s = release_per_s[w]


@kernel
def held_by_age(desks, loads, w, held):
    """Adds up what is held, `held` (K, H) out: by class and by the H-th parts of the deadline that have passed."""
    held[:] = 0.0
    parts = held.shape[1]
    i = int(desks[w].held_head)
    while i >= 0:
        load = loads[w, i]
        part = int((desks[w].now_s - load.arrived_at_s) / load.deadline_s * parts)
        held[load.class_index, min(max(part, 0), parts - 1)] += 1.0
        i = int(load.next_held)
