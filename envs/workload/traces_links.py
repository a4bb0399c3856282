"""Keys to dense numbers, and calls of a session linked to the call whose answer they waited for."""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


def dense(keys: Iterable[str]) -> Array | None:
    """(M,) i4 number of each key in order of appearance, -1 for empty ones; None if all are empty."""
    number: dict[str, int] = {}
    index = np.array([number.setdefault(key, len(number)) if key else -1 for key in keys], dtype=np.int32)
    return index if number else None


def link(session_index: Array, arrived_at_s: Array, e2e_s: Array | None) -> tuple[Array, Array]:
    """Parents (M,) i4 and think times (M,) f8 of calls of sessions.

    The parent is the call of the same session that ended last before this one arrived: calls side by side share one
    parent. Where no end is known it is the call that arrived last before, and the think time is unknown.

    Args:
        session_index: (M,) session of each call, -1: none.
        arrived_at_s: (M,) ascending.
        e2e_s: (M,) seconds from arrival to end, nan where unknown.
    """
    size = len(arrived_at_s)
    end_s = arrived_at_s if e2e_s is None else arrived_at_s + np.nan_to_num(e2e_s, nan=0.0)
    parent = np.full(size, -1, dtype=np.int32)
    ended: dict[int, list[tuple[float, int]]] = {}
    for row, (session, now_s) in enumerate(zip(session_index.tolist(), arrived_at_s.tolist(), strict=True)):
        if session < 0:
            continue
        calls = ended.setdefault(session, [])
        place = bisect_right(calls, (now_s, size))
        if place:
            parent[row] = calls[place - 1][1]
        insort(calls, (float(end_s[row]), row))
    think_s = np.full(size, np.nan)
    rows = np.flatnonzero(parent >= 0)
    if e2e_s is not None:
        known = rows[~np.isnan(e2e_s[parent[rows]])]
        think_s[known] = arrived_at_s[known] - end_s[parent[known]]
    return parent, think_s


def full_blocks(prompt_tokens: Array, block_tokens: int, count: Array, hashes: Array) -> tuple[Array, Array]:
    """Counts (M,) and hashes of the full blocks alone: a last block that is not full cannot be shared.

    Args:
        prompt_tokens: (M,).
        block_tokens: of one hash.
        count: (M,) hashes of each request.
        hashes: (sum of count,).
    """
    full = prompt_tokens // block_tokens
    within = np.arange(len(hashes)) - np.repeat(np.cumsum(count) - count, count)
    return np.minimum(count, full).astype(np.int32), hashes[within < np.repeat(full, count)]


def shared(keys: Sequence[str]) -> list[str]:
    """The keys that several calls have; those of a single call become empty."""
    found: dict[str, int] = {}
    for key in keys:
        found[key] = found.get(key, 0) + 1
    return [key if found[key] > 1 else "" for key in keys]


def names(values: Sequence[str]) -> Array | None:
    """(M,) str, or None if all are empty."""
    return np.array(values) if any(values) else None
