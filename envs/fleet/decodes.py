"""The decode batch of one replica: who joins it, who leaves it, who sits an iteration out.

A request in the batch is in the heap of finishing decodes and counts in `slots.boundaries`; its tokens follow from the
replica's `counter`, and are written to its row when it leaves.
"""

# ruff: noqa: ANN001, ANN201 (Numba infers the types of kernels)
from __future__ import annotations

from envs.fleet.blocks import blocks_for, release_blocks
from envs.fleet.queues import heap_push, heap_remove
from envs.kernels import kernel


@kernel
def join_batch(pool, rep, slots, requests, w, i, steps):
    """A request whose prefill is complete decodes `steps` tokens from the next iteration on."""
    request = requests[w, i]
    request.joined_at = rep.counter
    slots[w, rep.slot_at + (rep.counter - request.computed) % pool.block_size_tokens].boundaries += 1
    heap_push(slots, w, rep.slot_at, rep.batch, rep.counter + steps, i)
    rep.batch += 1
    rep.kv_sum += request.computed + 1


@kernel
def stop_decoding(pool, rep, slots, requests, w, i):
    """Undoes `join_batch` but for the heap, and writes `computed` up to date."""
    request = requests[w, i]
    slots[w, rep.slot_at + (request.joined_at - request.computed) % pool.block_size_tokens].boundaries -= 1
    request.computed += rep.counter - request.joined_at
    request.joined_at = -1
    rep.batch -= 1
    rep.kv_sum -= request.computed + 1
    rep.changed = 1


@kernel
def leave_batch(pool, extras, rep, slots, requests, w, i):
    """A request that is not in the heap any more stops decoding and frees its blocks."""
    stop_decoding(pool, rep, slots, requests, w, i)
    release_blocks(pool, extras, rep, slots, requests, w, i, blocks_for(pool, requests[w, i].computed))


@kernel
def stall(pool, rep, slots, requests, w, i):
    """Leaves the decodes from running request i on out of the iteration being put together; they keep their blocks."""
    while i >= 0:
        request = requests[w, i]
        if request.joined_at >= 0:
            heap_remove(slots, w, rep.slot_at, rep.batch, i)
            stop_decoding(pool, rep, slots, requests, w, i)
            request.target = request.computed + 1
            request.next = rep.stalled_head
            rep.stalled_head = i
        i = int(request.after)


@kernel
def resume_stalled(pool, rep, slots, requests, w):
    """Stalled requests decode again from the next iteration on."""
    while rep.stalled_head >= 0:
        i = int(rep.stalled_head)
        request = requests[w, i]
        rep.stalled_head = request.next
        join_batch(pool, rep, slots, requests, w, i, request.prompt_tokens + request.output_tokens - request.target)
        rep.changed = 1
