"""Continuous batching on one replica: what runs in the next iteration.

Order of an iteration (`start_iteration`), by scheduler:

* vllm-v1: every running request gets its token; then the one request whose prefill is under way gets a chunk of what is
  left of the token budget; then waiting requests are admitted, first come first served, the last one with a chunk.
  KV blocks are taken as the context grows. When they run out the request admitted last is preempted: its blocks are
  freed, it goes to the front of the line and will recompute its prompt and all it has generated; what was streamed
  stays streamed. In an iteration that preempted, nothing is admitted. With priority scheduling (queues.py) lines are in
  order of priority, and the request with the worst (priority, arrival) is preempted, whether it already has its token
  in this iteration or not. Where that is the very request that needs a block, those behind it in the running list are
  left out of this iteration, as vLLM's scheduler leaves them out: they are *stalled*.
* sarathi: the same chunked batches, but admission takes the blocks of the whole prompt at once, leaves a watermark
  free, and goes on after a preemption.
* prefill-first (vLLM before V1): whole prompts, whenever any can be admitted, in iterations of their own; the decodes
  wait meanwhile.

With prefix caching (prefix.py) a request is admitted with the blocks that are cached for it, and prefills the rest.

`extras` is True or None, a constant of compilation: each kernel is compiled for both. With None everything that a pool
may have beyond plain batching (prefix caching, priorities, speculation) is left out, and costs nothing.

What is put together here is made of who is admitted (admission.py), which blocks that takes (blocks.py) and who has to
go for it (preemption.py), and who decodes (decodes.py). How long it runs is in segment.py, what its end brings in
completion.py.

At most one running request is ever in the middle of its prefill: nothing is admitted behind a chunk that did not fit.

Vidur's quirks (`vidur_quirks`), reproduced to compare with it and wrong otherwise: a decode demands a free block even
where it needs none; preemption in the middle of a prefill truncates the prompt to what was computed; the padded
batch (requests times longest prompt) counts against the budget of prefill-first; its victim is the latest arrival.
"""

# ruff: noqa: ANN001, ANN201, ANN202 (Numba infers the types of kernels)
from __future__ import annotations

from envs.fleet.admission import admit_chunks, admit_whole
from envs.fleet.blocks import blocks_for
from envs.fleet.decodes import resume_stalled
from envs.fleet.iteration import NO_PREFILLS, with_prefill
from envs.fleet.preemption import grant_decode_blocks, make_room
from envs.fleet.prefix import index_blocks
from envs.fleet.queues import prefill_append
from envs.fleet.segment import go_idle, plan_decodes, plan_prefills
from envs.fleet.speculation import next_tokens
from envs.fleet.state import PREFILL_FIRST, VLLM_V1
from envs.kernels import kernel


@kernel
def _speculate(pool, extras, rep):
    """Pace of the next iteration, tokens that it yields to every decode, and tokens that it checks of each."""
    if extras is not None and pool.pace > 0 and rep.batch <= pool.speculation_max_batch:
        return int(pool.pace), int(next_tokens(rep, pool.pace)), int(1 + pool.draft_tokens)
    return 0, 1, 1


@kernel
def _continue_prefill(pool, extras, rep, slots, requests, w, budget, tokens_each):
    """The request whose prefill is under way gets a chunk of the token budget.

    Returns:
        Tokens of the chunk, tokens computed before it, and what `make_room` returned.
    """
    i = int(rep.partial)
    if i < 0 or budget <= 0:
        return 0, 0, 0
    request = requests[w, i]
    prefix = int(request.computed)
    chunk = min(request.target - prefix, budget)
    blocks = 0
    if pool.scheduler == VLLM_V1:
        blocks = blocks_for(pool, prefix + chunk) - blocks_for(pool, prefix)
    preempted = make_room(pool, extras, rep, slots, requests, w, i, blocks, tokens_each)
    if preempted == 2:
        return 0, 0, 2
    rep.kv_used_blocks += blocks
    request.computed = prefix + chunk
    if extras is not None and pool.prefix_caching:
        index_blocks(pool, rep, slots, requests, w, i)
    prefill_append(rep, requests, w, i)
    return chunk, prefix, preempted


@kernel
def start_iteration(pool, extras, tables, world, rep, slots, requests, w, now_s):
    """Puts the next iteration together and starts it, or leaves the replica idle."""
    rep.prefill_head = rep.prefill_tail = -1
    prefills, preempted = NO_PREFILLS, 0
    pace, tokens_each, checked = _speculate(pool, extras, rep)
    whole = pool.scheduler == PREFILL_FIRST
    if whole:
        prefills = admit_whole(pool, extras, world, rep, slots, requests, w, now_s)
    if rep.batch > 0 and prefills.count == 0:
        preempted = grant_decode_blocks(pool, extras, rep, slots, requests, w, tokens_each)
    if not whole:
        if extras is not None:
            # Where nobody can run: a step of no time, then the scheduler looks again
            while preempted == 2 and rep.batch == 0:
                resume_stalled(pool, rep, slots, requests, w)
                pace, tokens_each, checked = _speculate(pool, extras, rep)
                preempted = 0
                if rep.batch > 0:
                    preempted = grant_decode_blocks(pool, extras, rep, slots, requests, w, tokens_each)
        budget = pool.max_num_batched_tokens - rep.batch * checked
        chunk, prefix = 0, 0
        if preempted < 2:
            chunk, prefix, made = _continue_prefill(pool, extras, rep, slots, requests, w, budget, tokens_each)
            preempted = max(preempted, made)
        if not preempted or pool.scheduler != VLLM_V1:
            prefills = admit_chunks(pool, extras, world, rep, slots, requests, w, budget - chunk, now_s)
        if chunk > 0:
            prefills = with_prefill(prefills, chunk, prefix)
    if rep.batch == 0 and prefills.count == 0:
        go_idle(rep, now_s)
        return
    if rep.busy_from_s > now_s:
        rep.busy_from_s = now_s
    if prefills.count > 0:
        plan_prefills(pool, extras, tables, rep, prefills, not whole, pace, checked, now_s)
    else:
        plan_decodes(pool, extras, tables, rep, slots, w, pace, preempted, now_s)
