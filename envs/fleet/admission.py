"""Admission to a running batch: first come, first served, as far as KV blocks, sequences and the token budget go."""

# ruff: noqa: ANN001, ANN201, ANN202 (Numba infers the types of kernels)
from __future__ import annotations

from envs.fleet.blocks import blocks_for
from envs.fleet.completion import has_left, leave_replica
from envs.fleet.iteration import NO_PREFILLS, with_prefill
from envs.fleet.prefix import find_prefix, take_prefix
from envs.fleet.queues import prefill_append, release_held, running_append, wait_pop
from envs.fleet.state import ABANDONED, VLLM_V1
from envs.kernels import kernel


@kernel
def _drop_head(pool, extras, world, rep, slots, requests, w, now_s):
    """The first in line has left."""
    i = int(rep.wait_head)
    wait_pop(pool, extras, rep, slots, requests, w)
    rep.pending_prefill_tokens -= requests[w, i].prompt_tokens - requests[w, i].expected_cached_tokens
    leave_replica(world, rep, requests, w, i, ABANDONED, now_s)
    release_held(pool, extras, rep, slots, requests, w)


@kernel
def _cached_blocks(pool, extras, rep, slots, requests, w, i):
    """Blocks of request i that the prefix cache has, and how many of them nobody holds."""
    if extras is not None and pool.prefix_caching:
        return find_prefix(pool, rep, slots, requests, w, i)
    return 0, 0


@kernel
def _fits(pool, rep, blocks):
    """Whether admission may take `blocks` more blocks."""
    return rep.kv_used_blocks + blocks + pool.watermark_blocks <= pool.kv_blocks


@kernel
def _admit(pool, extras, rep, slots, requests, w, i, computed, cached, blocks, sorted_by_row):
    """The first in line, request i, runs from this iteration on.

    It takes `cached` blocks from the prefix cache and `blocks` others; the iteration brings it to `computed` tokens.
    """
    requests[w, i].computed = computed
    wait_pop(pool, extras, rep, slots, requests, w)
    rep.kv_used_blocks += blocks
    if extras is not None and pool.prefix_caching:
        take_prefix(pool, rep, slots, requests, w, i, cached)
    running_append(rep, requests, w, i, sorted_by_row)
    prefill_append(rep, requests, w, i)


@kernel
def admit_chunks(pool, extras, world, rep, slots, requests, w, budget, now_s):
    """Admits waiting requests within the token budget; returns their `iteration.Prefills`."""
    prefills = NO_PREFILLS
    while rep.wait_head >= 0 and rep.running < pool.max_num_seqs and prefills.tokens < budget:
        i = int(rep.wait_head)
        request = requests[w, i]
        cached, idle = _cached_blocks(pool, extras, rep, slots, requests, w, i)
        prefix = cached * pool.block_size_tokens
        chunk = min(request.target - prefix, budget - prefills.tokens)
        blocks = blocks_for(pool, prefix + chunk if pool.scheduler == VLLM_V1 else request.target) - cached
        if not _fits(pool, rep, idle + blocks):
            break
        if has_left(request, now_s):
            _drop_head(pool, extras, world, rep, slots, requests, w, now_s)
            continue
        _admit(pool, extras, rep, slots, requests, w, i, prefix + chunk, cached, blocks, False)
        prefills = with_prefill(prefills, chunk, prefix)
    return prefills


@kernel
def admit_whole(pool, extras, world, rep, slots, requests, w, now_s):
    """Admits whole prompts for an iteration of their own; returns their `iteration.Prefills`.

    A prompt longer than the budget runs alone.
    """
    prefills, longest = NO_PREFILLS, 0
    while rep.wait_head >= 0 and rep.running < pool.max_num_seqs:
        i = int(rep.wait_head)
        request = requests[w, i]
        cached, idle = _cached_blocks(pool, extras, rep, slots, requests, w, i)
        prefix = cached * pool.block_size_tokens
        chunk = request.target - prefix
        blocks = blocks_for(pool, request.target) - cached
        if not _fits(pool, rep, idle + blocks):
            break
        longest = max(longest, request.target)
        size = (prefills.count + 1) * longest if pool.vidur_quirks else prefills.tokens + chunk
        if size > pool.max_num_batched_tokens and prefills.count > 0:
            break
        if has_left(request, now_s):
            _drop_head(pool, extras, world, rep, slots, requests, w, now_s)
            continue
        _admit(pool, extras, rep, slots, requests, w, i, request.target, cached, blocks, pool.vidur_quirks != 0)
        prefills = with_prefill(prefills, chunk, prefix)
    return prefills
