"""The gateway's response cache: answers by prompt key, least recently used first, as linked lists in arrays.

`entries` (N, keys) holds one possible answer per prompt key of an episode; `owners` (N,) are records with the fields
`lru_head`, `lru_tail` (keys, -1 for none) and `cached` (answers stored).
"""

# ruff: noqa: ANN001, ANN201 (Numba infers the types of kernels)
from __future__ import annotations

import numpy as np

from envs.kernels import kernel

ENTRY = np.dtype(
    [
        ("stored_at_s", "f8"),  # -inf: not in the cache
        ("tenant_index", "i4"),
        ("tier", "i4"),
        ("good", "i4"),
        ("output_tokens", "i4"),
        ("older", "i4"),
        ("newer", "i4"),
        ("family", "i4"),  # intent of the prompt, -1: none
        ("kin_older", "i4"),  # stored answers of one intent, see envs.world_cache
        ("kin_newer", "i4"),
    ]
)
"""The response cache by prompt key, `(N, keys)`: an LRU list through `older` and `newer`."""


@kernel
def unlink(owners, entries, w, key):
    """Takes a stored answer out of the cache."""
    owner, entry = owners[w], entries[w, key]
    if entry.older >= 0:
        entries[w, entry.older].newer = entry.newer
    else:
        owner.lru_head = entry.newer
    if entry.newer >= 0:
        entries[w, entry.newer].older = entry.older
    else:
        owner.lru_tail = entry.older
    owner.cached -= 1
    entry.stored_at_s = -np.inf


@kernel
def append(owners, entries, w, key, stored_at_s):
    """Stores an answer as the most recently used one."""
    owner, entry = owners[w], entries[w, key]
    entry.stored_at_s = stored_at_s
    entry.older, entry.newer = owner.lru_tail, -1
    if owner.lru_tail >= 0:
        entries[w, owner.lru_tail].newer = key
    else:
        owner.lru_head = key
    owner.lru_tail = key
    owner.cached += 1
