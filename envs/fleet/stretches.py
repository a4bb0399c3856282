"""Stretches: the longest runs of block hashes that only ever occur together, in all requests of a world.

Two hashes belong to one stretch if, wherever one of them stands, the other stands beside it, the same one first. A
stretch ends where requests go apart or one of them ends, so whoever has one block of it has all of it, and the prefix
cache can treat it as one thing of which a beginning is cached. This holds for any lists; those of real requests, which
are paths in a tree, fall into few stretches.
"""

# ruff: noqa: ANN001, ANN201 (Numba infers the types of kernels)
from __future__ import annotations

import numpy as np
import numpy.typing as npt

from envs.kernels import kernel

IntArray = npt.NDArray[np.int64]
_NONE, _UNSEEN = -1, -2
_SPARSE = 4  # numbers per hash from which on they are numbered anew


def dense(flat: IntArray) -> tuple[IntArray, int]:
    """Hashes whose numbers can index an array, equal where the given ones are, and a number above all of them."""
    most = int(flat.max(initial=-1)) + 1
    if most <= _SPARSE * flat.size + 4096:
        return flat, most
    names, flat = np.unique(flat, return_inverse=True)
    return flat, names.size


@kernel(allocates=True)
def write_stretches(slots, hash_at, counts, flat, n_hashes):
    """Writes the stretches of all requests into their cells, numbered as they first occur.

    Args:
        slots: The cells of one world; each request's begin at its `hash_at`.
        hash_at: (M,).
        counts: (M,) hashes of every request, or of the first ones.
        flat: (sum of counts,) hashes, 0 or more.
        n_hashes: Above all hashes.
    """
    previous, following = np.full(n_hashes, _UNSEEN, np.int32), np.full(n_hashes, _UNSEEN, np.int32)
    name = np.full(n_hashes, _NONE, np.int32)  # of hashes that begin a stretch: its number, _UNSEEN before it has one
    at = 0
    for i in range(counts.size):
        behind = _NONE
        for j in range(at, at + counts[i] + 1):
            h = flat[j] if j < at + counts[i] else _NONE
            if h >= 0:
                if previous[h] == _UNSEEN:
                    previous[h] = behind
                if previous[h] != behind or behind < 0:
                    name[h] = _UNSEEN
            if behind >= 0:
                if following[behind] == _UNSEEN:
                    following[behind] = h
                elif following[behind] != h:
                    if h >= 0:
                        name[h] = _UNSEEN
                    if following[behind] >= 0:
                        name[following[behind]] = _UNSEEN
            behind = h
        at += counts[i]
    at, names = 0, 0
    for i in range(counts.size):
        cell = hash_at[i] - 1
        for j in range(counts[i]):
            h = flat[at + j]
            if name[h] == _UNSEEN:
                name[h] = names
                names += 1
            if name[h] >= 0:
                cell += 1
                slots[cell].stretch = name[h]
            slots[cell].end = j + 1
        at += counts[i]
