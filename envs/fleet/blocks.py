"""KV blocks of one replica: what tokens need, what a decode batch takes as it grows, what a request gives back.

A decode with c tokens cached needs a new block when c is a multiple of the block size, hence once in every `block size`
iterations, at a fixed value of `counter` modulo the block size. `slots.boundaries` counts the decodes per such value;
k iterations need a sum over it, whatever the size of the batch.
"""

# ruff: noqa: ANN001, ANN201 (Numba infers the types of kernels)
from __future__ import annotations

from envs.fleet.prefix import let_go
from envs.kernels import kernel


@kernel
def blocks_for(pool, tokens):
    """KV blocks that hold `tokens` tokens."""
    return (tokens + pool.block_size_tokens - 1) // pool.block_size_tokens


@kernel
def release_blocks(pool, extras, rep, slots, requests, w, i, held_blocks):
    """Frees what a request holds, `held_blocks` blocks."""
    if extras is not None and pool.prefix_caching:
        let_go(pool, rep, slots, requests, w, i, held_blocks)
    else:
        rep.kv_used_blocks -= held_blocks


@kernel
def decode_blocks(pool, rep, slots, w, first, last):
    """KV blocks that the decode batch takes for its next tokens, from `first` up to, but not, `last`."""
    size = pool.block_size_tokens
    cycles = max(last - first, 0) // size
    blocks = cycles * rep.batch
    for j in range(first + cycles * size, last):
        blocks += slots[w, rep.slot_at + (rep.counter + j) % size].boundaries
    return blocks
