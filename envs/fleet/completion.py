"""What the end of an iteration brings to a replica: completions, first tokens, users who have left.

With speculation a request whose last token comes in the middle of an iteration ends with it.
"""

# ruff: noqa: ANN001, ANN201, ANN202 (Numba infers the types of kernels)
from __future__ import annotations

import math

from envs.fleet.blocks import blocks_for, release_blocks
from envs.fleet.decodes import join_batch, leave_batch, resume_stalled
from envs.fleet.prefix import insert_by_admission
from envs.fleet.queues import finish, heap_pop, heap_remove, release_held, running_remove
from envs.fleet.state import ABANDONED, COMPLETED
from envs.kernels import kernel


@kernel
def has_left(request, now_s):
    """Whether the user has left before the first token."""
    return now_s > request.patience_until_s and math.isnan(request.first_token_at_s)


@kernel
def leave_replica(world, rep, requests, w, i, status, now_s):
    """Books a request out of the replica."""
    rep.in_flight -= 1
    finish(world, requests, w, i, status, now_s)


@kernel
def _complete(world, rep, requests, w, i, now_s):
    request = requests[w, i]
    running_remove(rep, requests, w, i)
    rep.decoding -= 1
    rep.decoding_tokens -= request.computed + 1
    rep.decode_tokens_done -= request.computed + 1 - request.prompt_tokens - request.output_tokens
    leave_replica(world, rep, requests, w, i, COMPLETED, now_s)


@kernel
def drop_decode(pool, extras, world, rep, slots, requests, w, i, now_s):
    """Ends a decode before its last token, between two iterations."""
    heap_remove(slots, w, rep.slot_at, rep.batch, i)
    leave_batch(pool, extras, rep, slots, requests, w, i)
    running_remove(rep, requests, w, i)
    rep.decoding -= 1
    rep.decoding_tokens -= requests[w, i].computed + 1
    leave_replica(world, rep, requests, w, i, ABANDONED, now_s)
    if rep.hold_head >= 0:
        release_held(pool, extras, rep, slots, requests, w)


@kernel
def _end_prefill(pool, extras, world, rep, slots, requests, w, i, now_s):
    """A prefill is complete and has produced a token."""
    request = requests[w, i]
    if has_left(request, now_s):
        running_remove(rep, requests, w, i)
        release_blocks(pool, extras, rep, slots, requests, w, i, blocks_for(pool, request.computed))
        rep.pending_prefill_tokens -= request.prompt_tokens - request.expected_cached_tokens
        leave_replica(world, rep, requests, w, i, ABANDONED, now_s)
        return
    if math.isnan(request.first_token_at_s):
        request.first_token_at_s = now_s
        rep.pending_prefill_tokens -= request.prompt_tokens - request.expected_cached_tokens
        rep.decoding += 1
        rep.decoding_tokens += request.target
    rep.decoding_tokens += 1
    steps = request.prompt_tokens + request.output_tokens - request.target - 1
    if steps > 0:
        join_batch(pool, rep, slots, requests, w, i, steps)
    else:
        release_blocks(pool, extras, rep, slots, requests, w, i, blocks_for(pool, request.computed))
        _complete(world, rep, requests, w, i, now_s)


@kernel
def _finish_by_admission(pool, extras, world, rep, slots, requests, w, now_s):
    """Completes the decodes that have their last token, in the order of the running list, which orders idle blocks."""
    head, size = -1, rep.batch
    while size > 0 and slots[w, rep.slot_at].finish_at <= rep.counter:
        head = insert_by_admission(slots, requests, w, head, heap_pop(slots, w, rep.slot_at, size))
        size -= 1
    while head >= 0:
        following = int(requests[w, head].next)
        leave_batch(pool, extras, rep, slots, requests, w, head)
        _complete(world, rep, requests, w, head, now_s)
        head = following


@kernel
def end_iteration(pool, extras, world, rep, slots, requests, w, now_s):
    """Everything that happens at the end of the last planned iteration: completions, first tokens, releases."""
    if extras is not None and pool.prefix_caching:
        if rep.decodes:
            _finish_by_admission(pool, extras, world, rep, slots, requests, w, now_s)
    elif rep.decodes:
        while rep.batch > 0 and slots[w, rep.slot_at].finish_at <= rep.counter:
            i = heap_pop(slots, w, rep.slot_at, rep.batch)
            leave_batch(pool, extras, rep, slots, requests, w, i)
            _complete(world, rep, requests, w, i, now_s)
    i = int(rep.prefill_head)
    if i >= 0:
        rep.partial = -1
        while i >= 0:
            following = int(requests[w, i].next)
            if requests[w, i].computed < requests[w, i].target:
                rep.partial = i
            else:
                _end_prefill(pool, extras, world, rep, slots, requests, w, i, now_s)
            i = following
    if extras is not None and rep.stalled_head >= 0:
        resume_stalled(pool, rep, slots, requests, w)
    if rep.hold_head >= 0:
        release_held(pool, extras, rep, slots, requests, w)
