"""The gateway's prefix index in the simulated world: what `marginroute.prefix_index.PrefixIndex` would say, compiled.

The hashes of an episode are known before it begins, so that they are numbered from 0 (`Workload.prefix_ids`) and a
table takes the place of a hash map. Per candidate and block the table holds the *send* that used the block last, 0 for
none; sends stand in one line per candidate, oldest first. To evict, the oldest send is walked from its last block to
its first, and a block is forgotten unless a later send used it too: the order of the Python class, where a prompt's end
is older than its beginning. A send whose blocks are all walked leaves the line. An insertion costs one write per block.

Whatever evicts a block has evicted all that goes on from it before, so the blocks of a prompt that a candidate holds
are its first ones, and their number is found by bisection.

Shapes: N worlds, G gateway instances (row g N + w is instance g of world w), M requests, S replicas and providers, of
which I have a prefix cache, D different hashes, L hashes of all requests of a world, E sends.
"""

# ruff: noqa: ANN001, ANN201, ANN202 (Numba infers the types of kernels)
from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from envs.fleet.state import STARTING
from envs.kernels import kernel
from marginroute import view as v

MARK = np.dtype(
    [
        ("ttl_s", "f8"),  # inf: until it is evicted
        ("row", "i4"),  # of stamps; -1: no prefix cache
        ("capacity_blocks", "i4"),
        ("blocks", "i4"),  # held
        ("head", "i4"),  # oldest send
        ("tail", "i4"),
    ]
)

SEND = np.dtype(
    [
        ("at_s", "f8"),
        ("request", "i4"),
        ("left", "i4"),  # its first blocks that have not been walked
        ("next", "i4"),  # in the line of a candidate, or of free records
    ]
)


class PrefixArrays(NamedTuple):
    """The index of all worlds; inputs first."""

    ids: Any  # (N, L) i4 numbers of the hashes, one request after the other
    stamps: Any  # (G N, I, D) i4 send that used a block last, plus 1; 0: not held
    marks: Any  # (G N, S) MARK
    sends: Any  # (G N, E) SEND
    free: Any  # (G N,) i4 first free send


@kernel
def reset(index, g):
    """Empties the index of an instance."""
    index.stamps[g] = 0
    for c in range(index.marks.shape[1]):
        mark = index.marks[g, c]
        mark.blocks = 0
        mark.head = mark.tail = -1
    size = index.sends.shape[1]
    for e in range(size):
        index.sends[g, e].next = e + 1 if e + 1 < size else -1
    index.free[g] = 0 if size > 0 else -1


@kernel
def _forget(index, loads, w, g, c, most_blocks, now_s):
    """Forgets what has expired, and then the oldest blocks beyond `most_blocks`."""
    mark = index.marks[g, c]
    while mark.head >= 0:
        e = int(mark.head)
        send = index.sends[g, e]
        expired = send.at_s + mark.ttl_s < now_s
        at = loads[w, send.request].prefix_at
        while send.left > 0 and (expired or mark.blocks > most_blocks):
            send.left -= 1
            d = index.ids[w, at + send.left]
            if index.stamps[g, mark.row, d] == e + 1:
                index.stamps[g, mark.row, d] = 0
                mark.blocks -= 1
        if send.left > 0:
            break
        mark.head = send.next
        if mark.head < 0:
            mark.tail = -1
        send.next = index.free[g]
        index.free[g] = e


@kernel
def insert(index, loads, w, c, i, now_s):
    """Notes that request `i` was sent to candidate `c`; nothing where it has no prefix cache."""
    load = loads[w, i]
    g = load.gateway
    mark = index.marks[g, c]
    count = min(load.prefix_count, mark.capacity_blocks)
    e = int(index.free[g])
    if count <= 0 or e < 0:
        return
    index.free[g] = index.sends[g, e].next
    for j in range(count):
        d = index.ids[w, load.prefix_at + j]
        mark.blocks += index.stamps[g, mark.row, d] == 0
        index.stamps[g, mark.row, d] = e + 1
    send = index.sends[g, e]
    send.at_s, send.request, send.left, send.next = now_s, i, count, -1
    if mark.tail >= 0:
        index.sends[g, mark.tail].next = e
    else:
        mark.head = e
    mark.tail = e
    _forget(index, loads, w, g, c, mark.capacity_blocks, now_s)


@kernel
def match(index, loads, w, c, i, now_s):
    """Blocks of request `i`, from the first one on, that candidate `c` has been sent."""
    load = loads[w, i]
    g = load.gateway
    mark = index.marks[g, c]
    if mark.ttl_s < np.inf:
        _forget(index, loads, w, g, c, mark.capacity_blocks, now_s)
    low, high = 0, min(load.prefix_count, mark.capacity_blocks)
    while low < high:
        middle = (low + high + 1) >> 1
        if index.stamps[g, mark.row, index.ids[w, load.prefix_at + middle - 1]] > 0:
            low = middle
        else:
            high = middle - 1
    return low


@kernel
def forget(index, loads, w, g, c):
    """Empties the record that instance `g` has of candidate `c`, as after a restart of its engine."""
    _forget(index, loads, w, g, c, 0, -np.inf)


@kernel
def note_send(index, desks, loads, requests, signals, w, c, row):
    """The current request, `row` of `requests`, leaves for candidate `c` with what its View expected cached there."""
    desk = desks[w]
    i = desk.current
    load = loads[w, i]
    load.cached_tokens = int(signals[v.CACHED_TOKENS, w, c])
    requests[w, row].expected_cached_tokens = load.cached_tokens
    insert(index, loads, w, c, i, desk.now_s)


@kernel
def show_cached(index, replicas, desks, loads, signals, legal, w):
    """Writes what every candidate is expected to have cached of the current request; the last token is never cached.

    A replica that is down or off is forgotten: when it comes back, its cache is empty.
    """
    desk = desks[w]
    i = desk.current
    load = loads[w, i]
    for c in range(index.marks.shape[1]):
        if index.marks[load.gateway, c].capacity_blocks > 0:
            if c < replicas.shape[1] and not legal[w, c] and replicas[w, c].state >= STARTING:
                forget(index, loads, w, load.gateway, c)
            tokens = match(index, loads, w, c, i, desk.now_s) * desk.prefix_block_tokens
            signals[v.CACHED_TOKENS, w, c] = min(tokens, load.prompt_tokens - 1)
