"""Block hashes of generated prompts: numbers that stand for a block and all before it.

Every prompt begins with tokens that everybody shares, then the tenant's system prompt, then text of its own; a prompt
that continues another begins with that one's blocks. Only full blocks are hashed. A number that is not inherited is
new, so equal numbers have equal ones before them by construction.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

_TENANT_BITS = 24  # system prompts of up to 2 ** 24 blocks
_FRESH = 1 << 52  # numbers from here on belong to single prompts


@dataclass(frozen=True)
class PrefixSpec:
    """How prompts begin.

    Attributes:
        block_tokens: tokens per block.
        common_tokens: shared by all prompts.
        system_tokens: (N,) system prompt of each tenant, after the common ones.
    """

    block_tokens: int
    common_tokens: int
    system_tokens: tuple[int, ...]


def hash_blocks(
    spec: PrefixSpec, tenant_index: Array, prompt_tokens: Array, source: Array, kept_tokens: Array, level: Array
) -> tuple[Array, Array]:
    """Hashes of R prompts.

    Args:
        spec: sizes.
        tenant_index: (R,) whose system prompt it begins with.
        prompt_tokens: (R,).
        source: (R,) row whose prompt it continues, -1: none.
        kept_tokens: (R,) tokens it shares with its source.
        level: (R,) larger than the source's.

    Returns:
        Counts (R,) i4 and numbers (sum,) i8.
    """
    count = prompt_tokens // spec.block_tokens
    first = np.cumsum(count) - count
    hashes = np.arange(int(count.sum()), dtype=np.int64) + _FRESH
    system = np.array(spec.system_tokens, dtype=np.int64)[tenant_index]
    common = np.minimum(spec.common_tokens // spec.block_tokens, count)
    own = np.minimum((spec.common_tokens + system) // spec.block_tokens, count)
    _fill(hashes, first, own, (tenant_index.astype(np.int64) + 1) << _TENANT_BITS)
    _fill(hashes, first, common, np.zeros(len(count), dtype=np.int64))
    order = np.argsort(level, kind="stable")
    order = order[source[order] >= 0]
    bounds = np.flatnonzero(np.diff(level[order], prepend=-1, append=np.iinfo(np.int64).max))
    for low, high in pairwise(bounds.tolist()):
        rows = order[low:high]
        from_rows = source[rows]
        shared = np.minimum(np.minimum(kept_tokens[rows] // spec.block_tokens, count[rows]), count[from_rows])
        place = _ragged(shared)
        hashes[np.repeat(first[rows], shared) + place] = hashes[np.repeat(first[from_rows], shared) + place]
    return count.astype(np.int32), hashes


def _fill(hashes: Array, first: Array, count: Array, base: Array) -> None:
    """Gives the first `count` blocks of each prompt the numbers from its `base` on."""
    place = _ragged(count)
    hashes[np.repeat(first, count) + place] = np.repeat(base, count) + place


def _ragged(count: Array) -> Array:
    """0, 1, ... count - 1 for each row, one after the other."""
    return np.arange(int(count.sum())) - np.repeat(np.cumsum(count) - count, count)
