"""When KV blocks run out: who is preempted so that the others go on (see batching.py for what each scheduler does)."""

# ruff: noqa: ANN001, ANN201, ANN202 (Numba infers the types of kernels)
from __future__ import annotations

import math

from envs.fleet.blocks import blocks_for, decode_blocks, release_blocks
from envs.fleet.decodes import leave_batch, stall
from envs.fleet.queues import heap_remove, running_remove, wait_prepend, worst_running
from envs.fleet.state import VLLM_V1
from envs.kernels import kernel


@kernel
def _preempt(pool, extras, rep, slots, requests, w, i):
    """Frees a running request's blocks and sends it to the front of the line, to recompute."""
    request = requests[w, i]
    target = request.target
    if request.joined_at >= 0:
        heap_remove(slots, w, rep.slot_at, rep.batch, i)
        leave_batch(pool, extras, rep, slots, requests, w, i)
        request.target = request.computed + 1
    else:
        held = request.computed if pool.scheduler == VLLM_V1 else target
        release_blocks(pool, extras, rep, slots, requests, w, i, blocks_for(pool, held))
        rep.partial = -1
        if pool.vidur_quirks:
            request.target = request.computed
            if not math.isnan(request.first_token_at_s):
                rep.decoding_tokens += request.target - target
    request.computed = 0
    request.restarts += 1
    rep.restarts += 1
    running_remove(rep, requests, w, i)
    wait_prepend(pool, extras, rep, slots, requests, w, i)


@kernel
def _decode_need(pool, rep, request, tokens):
    """KV blocks that a decode needs for its next tokens."""
    cached = request.computed + rep.counter - request.joined_at
    return blocks_for(pool, cached + tokens) - blocks_for(pool, cached)


@kernel
def make_room(pool, extras, rep, slots, requests, w, i, demand, tokens):
    """Preempts until `demand` blocks are free for running request i; a decode gets `tokens` tokens in this iteration.

    Returns:
        0 where they were, 1 if others had to go, 2 if request i itself had to.
    """
    preempted = 0
    while preempted < 2 and pool.kv_blocks - rep.kv_used_blocks < demand:
        victim, granted = int(rep.running_tail), 0
        if extras is not None and pool.priorities:
            victim, before = worst_running(rep, requests, w, i)
            if before:
                granted = _decode_need(pool, rep, requests[w, victim], tokens)
        _preempt(pool, extras, rep, slots, requests, w, victim)
        rep.kv_used_blocks -= granted
        preempted = 2 if victim == i else 1
    return preempted


@kernel
def _squeeze(pool, extras, rep, slots, requests, w, tokens):
    """Gives every decode, in order, the blocks it needs, preempting the last in the running list or of the worst level.

    Returns:
        0 if nothing was preempted, 2 if a request had to preempt itself, which ends the iteration's decodes, else 1.
    """
    preempted = 0
    i = int(rep.running_head)
    while i >= 0:
        request = requests[w, i]
        if request.joined_at >= 0:
            need = _decode_need(pool, rep, request, tokens)
            demand = 1 if pool.vidur_quirks else need
            made = make_room(pool, extras, rep, slots, requests, w, i, demand, tokens)
            preempted = max(preempted, made)
            if made == 2:
                stall(pool, rep, slots, requests, w, int(request.after))
                break
            rep.kv_used_blocks += need
        i = int(request.after)
    return preempted


@kernel
def grant_decode_blocks(pool, extras, rep, slots, requests, w, tokens):
    """Takes the blocks that the decode batch needs for an iteration of `tokens` each; returns what `_squeeze` does."""
    need = slots[w, rep.slot_at + rep.counter % pool.block_size_tokens].boundaries
    if extras is not None:
        need += decode_blocks(pool, rep, slots, w, 1, tokens)
    if rep.kv_used_blocks + need + pool.vidur_quirks <= pool.kv_blocks:
        rep.kv_used_blocks += need
        return 0
    return _squeeze(pool, extras, rep, slots, requests, w, tokens)
