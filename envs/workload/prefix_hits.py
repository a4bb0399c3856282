"""How much of the prompts an LRU cache of any size would find: one pass, all sizes.

A block is found by a cache of C blocks if fewer than C other blocks were touched since its last use (Mattson et al.,
"Evaluation techniques for storage hierarchies", 1970). A request touches its blocks from the last to the first, as
engines do that free the end of a prompt before its beginning, and looks up all of them before it touches any; a block
counts only where all blocks before it are found too. Distances are counted by a Fenwick tree over last touches.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from envs.kernels import kernel

Array = np.ndarray[Any, Any]

NEVER = np.iinfo(np.int64).max


@kernel(allocates=True)  # type: ignore[untyped-decorator]
def _needed(block: Array, count: Array, blocks: int) -> Array:  # pragma: no cover - compiled
    """(sum of count,) i8: the smallest cache in which each block is found, `NEVER` on first use."""
    size = block.size
    tree = np.zeros(size + 1, np.int64)
    last = np.full(blocks, -1, np.int64)
    need = np.empty(size, np.int64)
    alive = 0
    clock = 0
    first = 0
    for request in range(count.size):
        end = first + count[request]
        worst = 0
        for at in range(first, end):
            touched = last[block[at]]
            if worst == NEVER or touched < 0:
                worst = NEVER
            else:
                older = 0
                place = touched + 1
                while place > 0:
                    older += tree[place]
                    place -= place & -place
                worst = max(worst, alive - older + 1)
            need[at] = worst
        for at in range(end - 1, first - 1, -1):
            touched = last[block[at]]
            if touched >= 0:
                place = touched + 1
                while place <= size:
                    tree[place] -= 1
                    place += place & -place
                alive -= 1
            place = clock + 1
            while place <= size:
                tree[place] += 1
                place += place & -place
            last[block[at]] = clock
            clock += 1
            alive += 1
        first = end
    return need


def needed_blocks(prefix_hash: Array, prefix_count: Array) -> Array:
    """(sum of prefix_count,) i8, the smallest LRU cache, in blocks, that finds each block; `NEVER` on first use."""
    unique, block = np.unique(prefix_hash, return_inverse=True)
    return np.asarray(_needed(block.astype(np.int64), prefix_count.astype(np.int64), len(unique)))


def hit_curve(
    prefix_hash: Array, prefix_count: Array, block_tokens: int, prompt_tokens: Array, cache_tokens: Array
) -> Array:
    """(S,) share of all prompt tokens that LRU caches of (S,) `cache_tokens` would find; inf is an unlimited one."""
    need = np.sort(needed_blocks(prefix_hash, prefix_count))
    blocks = np.minimum(np.asarray(cache_tokens, dtype=np.float64) / block_tokens, float(NEVER // 2))
    found = np.searchsorted(need, np.floor(blocks).astype(np.int64), side="right")
    return found * block_tokens / float(prompt_tokens.sum())
