"""Continuous batching on one replica: what runs in the next iteration, and what an iteration leaves behind.

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

At most one running request is ever in the middle of its prefill: nothing is admitted behind a chunk that did not fit.

With speculative decoding (speculation.py) an iteration advances the decodes by several tokens, all by the same number;
`counter` counts tokens, and a request whose last token comes in the middle ends with the iteration.

A decode batch that does not change is a *segment*: its j-th iteration takes first_s + j growth_s (iteration.py)
until one of its requests finishes, the mean length leaves its bin, the blocks run out, or somebody arrives. The
scheduler plans as many iterations as are safe and looks again afterwards; an iteration planned for one event or for a
thousand ends at segment_start_s plus the same closed form, so results do not depend on how far is skipped.

Blocks over a segment: a decode with c tokens cached needs a new block when c is a multiple of the block size, hence
once in every `block size` iterations, at a fixed value of `counter` modulo the block size. `slots.boundaries` counts
the decodes per such value; k iterations need a sum over it, whatever the size of the batch.

Vidur's quirks (`vidur_quirks`), reproduced to compare with it and wrong otherwise: a decode demands a free block even
where it needs none; preemption in the middle of a prefill truncates the prompt to what was computed; the padded
batch (requests times longest prompt) counts against the budget of prefill-first; its victim is the latest arrival.
"""

# ruff: noqa: ANN001, ANN201, ANN202 (Numba infers the types of kernels)
from __future__ import annotations

import math

from envs.fleet.iteration import (
    bin_iterations,
    decode_bin,
    decode_growth,
    decode_seconds,
    draft_seconds,
    prefill_seconds,
    token_seconds,
)
from envs.fleet.prefix import find_prefix, index_blocks, insert_by_admission, let_go, take_prefix
from envs.fleet.queues import (
    finished_append,
    heap_pop,
    heap_push,
    heap_remove,
    prefill_append,
    release_held,
    running_append,
    running_remove,
    wait_pop,
    wait_prepend,
    worst_running,
)
from envs.fleet.speculation import elapsed_s, iterations_within, next_tokens, open_segment, tokens_between
from envs.fleet.state import ABANDONED, COMPLETED, PREFILL_FIRST, VLLM_V1
from envs.kernels import kernel


@kernel
def blocks_for(pool, tokens):
    """KV blocks that hold `tokens` tokens."""
    return (tokens + pool.block_size_tokens - 1) // pool.block_size_tokens


@kernel
def _end_request(world, rep, requests, w, i, status, now_s):
    """Books a request out of the replica."""
    request = requests[w, i]
    request.status = status
    request.completed_at_s = now_s
    rep.in_flight -= 1
    if status == COMPLETED:
        world.completed += 1
    else:
        world.abandoned += 1
    finished_append(world, requests, w, i)


@kernel
def release_blocks(pool, extras, rep, slots, requests, w, i, held_blocks):
    """Frees what a request holds, `held_blocks` blocks."""
    if extras is not None and pool.prefix_caching:
        let_go(pool, rep, slots, requests, w, i, held_blocks)
    else:
        rep.kv_used_blocks -= held_blocks


@kernel
def _join_batch(pool, rep, slots, requests, w, r, i, steps):
    """A request whose prefill is complete decodes `steps` tokens from the next iteration on."""
    request = requests[w, i]
    request.joined_at = rep.counter
    slots[w, rep.slot_at + (rep.counter - request.computed) % pool.block_size_tokens].boundaries += 1
    heap_push(slots, w, rep.slot_at, rep.batch, rep.counter + steps, i)
    rep.batch += 1
    rep.kv_sum += request.computed + 1


@kernel
def _stop_decoding(pool, rep, slots, requests, w, i):
    """Undoes `_join_batch` but for the heap, and writes `computed` up to date."""
    request = requests[w, i]
    slots[w, rep.slot_at + (request.joined_at - request.computed) % pool.block_size_tokens].boundaries -= 1
    request.computed += rep.counter - request.joined_at
    request.joined_at = -1
    rep.batch -= 1
    rep.kv_sum -= request.computed + 1
    rep.changed = 1


@kernel
def _leave_batch(pool, extras, rep, slots, requests, w, r, i):
    """A request that is not in the heap any more stops decoding and frees its blocks."""
    _stop_decoding(pool, rep, slots, requests, w, i)
    release_blocks(pool, extras, rep, slots, requests, w, i, blocks_for(pool, requests[w, i].computed))


@kernel
def _stall(pool, rep, slots, requests, w, i):
    """Leaves the decodes from running request i on out of the iteration being put together; they keep their blocks."""
    while i >= 0:
        request = requests[w, i]
        if request.joined_at >= 0:
            heap_remove(slots, w, rep.slot_at, rep.batch, i)
            _stop_decoding(pool, rep, slots, requests, w, i)
            request.target = request.computed + 1
            request.next = rep.stalled_head
            rep.stalled_head = i
        i = int(request.after)


@kernel
def _resume_stalled(pool, rep, slots, requests, w, r):
    """Stalled requests decode again from the next iteration on."""
    while rep.stalled_head >= 0:
        i = int(rep.stalled_head)
        request = requests[w, i]
        rep.stalled_head = request.next
        _join_batch(pool, rep, slots, requests, w, r, i, request.prompt_tokens + request.output_tokens - request.target)
        rep.changed = 1


@kernel
def _preempt(pool, extras, rep, slots, requests, w, r, i):
    """Frees a running request's blocks and sends it to the front of the line, to recompute."""
    request = requests[w, i]
    target = request.target
    if request.joined_at >= 0:
        heap_remove(slots, w, rep.slot_at, rep.batch, i)
        _leave_batch(pool, extras, rep, slots, requests, w, r, i)
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
def _make_room(pool, extras, rep, slots, requests, w, r, i, demand, tokens):
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
        _preempt(pool, extras, rep, slots, requests, w, r, victim)
        rep.kv_used_blocks -= granted
        preempted = 2 if victim == i else 1
    return preempted


@kernel
def _squeeze(pool, extras, rep, slots, requests, w, r, tokens):
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
            made = _make_room(pool, extras, rep, slots, requests, w, r, i, demand, tokens)
            preempted = max(preempted, made)
            if made == 2:
                _stall(pool, rep, slots, requests, w, int(request.after))
                break
            rep.kv_used_blocks += need
        i = int(request.after)
    return preempted


@kernel
def _blocks_over(pool, rep, slots, w, first, last):
    """KV blocks that the decode batch takes for its next tokens, from `first` up to, but not, `last`."""
    size = pool.block_size_tokens
    cycles = max(last - first, 0) // size
    blocks = cycles * rep.batch
    for j in range(first + cycles * size, last):
        blocks += slots[w, rep.slot_at + (rep.counter + j) % size].boundaries
    return blocks


@kernel
def _grant_decode_blocks(pool, extras, rep, slots, requests, w, r, tokens):
    """Takes the blocks that the decode batch needs for an iteration of `tokens` each; returns what `_squeeze` does."""
    need = slots[w, rep.slot_at + rep.counter % pool.block_size_tokens].boundaries
    if extras is not None:
        need += _blocks_over(pool, rep, slots, w, 1, tokens)
    if rep.kv_used_blocks + need + pool.vidur_quirks <= pool.kv_blocks:
        rep.kv_used_blocks += need
        return 0
    return _squeeze(pool, extras, rep, slots, requests, w, r, tokens)


@kernel
def _gone(request, now_s):
    """Whether the user has left before the first token."""
    return now_s > request.patience_until_s and math.isnan(request.first_token_at_s)


@kernel
def _drop_head(pool, extras, world, rep, slots, requests, w, now_s):
    """The first in line has left."""
    i = int(rep.wait_head)
    wait_pop(pool, extras, rep, slots, requests, w)
    rep.pending_prefill_tokens -= requests[w, i].prompt_tokens - requests[w, i].expected_cached_tokens
    _end_request(world, rep, requests, w, i, ABANDONED, now_s)
    release_held(pool, extras, rep, slots, requests, w)


@kernel
def _admit_chunked(pool, extras, world, rep, slots, requests, w, budget, now_s):
    """Admits waiting requests within the token budget.

    Returns:
        Requests admitted and tokens to compute for them; sums over them of chunk squared, chunk times cached prefix,
        prefix, and prefix rounded up to 64 tokens.
    """
    admitted, tokens, squares = 0, 0, 0.0
    products, prefixes, rounded = 0.0, 0, 0
    while rep.wait_head >= 0 and rep.running < pool.max_num_seqs and tokens < budget:
        i = int(rep.wait_head)
        request = requests[w, i]
        cached, idle, prefix = 0, 0, 0
        if extras is not None and pool.prefix_caching:
            cached, idle = find_prefix(pool, rep, slots, requests, w, i)
            prefix = cached * pool.block_size_tokens
        chunk = min(request.target - prefix, budget - tokens)
        blocks = blocks_for(pool, prefix + chunk if pool.scheduler == VLLM_V1 else request.target) - cached
        if rep.kv_used_blocks + idle + blocks + pool.watermark_blocks > pool.kv_blocks:
            break
        if _gone(request, now_s):
            _drop_head(pool, extras, world, rep, slots, requests, w, now_s)
            continue
        request.computed = prefix + chunk
        wait_pop(pool, extras, rep, slots, requests, w)
        rep.kv_used_blocks += blocks
        if extras is not None and pool.prefix_caching:
            take_prefix(pool, rep, slots, requests, w, i, cached)
        running_append(rep, requests, w, i, False)
        prefill_append(rep, requests, w, i)
        admitted += 1
        tokens += chunk
        squares += float(chunk) * chunk
        if prefix > 0:
            products += float(chunk) * prefix
            prefixes += prefix
            rounded += (prefix + 63) // 64 * 64
    return admitted, tokens, squares, products, prefixes, rounded


@kernel
def _admit_whole(pool, extras, world, rep, slots, requests, w, now_s):
    """Admits whole prompts for an iteration of their own; returns the same as `_admit_chunked`.

    A prompt longer than the budget runs alone.
    """
    admitted, tokens, squares, longest = 0, 0, 0.0, 0
    products, prefixes, rounded = 0.0, 0, 0
    while rep.wait_head >= 0 and rep.running < pool.max_num_seqs:
        i = int(rep.wait_head)
        request = requests[w, i]
        cached, idle, prefix = 0, 0, 0
        if extras is not None and pool.prefix_caching:
            cached, idle = find_prefix(pool, rep, slots, requests, w, i)
            prefix = cached * pool.block_size_tokens
        chunk = request.target - prefix
        blocks = blocks_for(pool, request.target) - cached
        if rep.kv_used_blocks + idle + blocks + pool.watermark_blocks > pool.kv_blocks:
            break
        longest = max(longest, request.target)
        size = (admitted + 1) * longest if pool.vidur_quirks else tokens + chunk
        if size > pool.max_num_batched_tokens and admitted > 0:
            break
        if _gone(request, now_s):
            _drop_head(pool, extras, world, rep, slots, requests, w, now_s)
            continue
        request.computed = request.target
        wait_pop(pool, extras, rep, slots, requests, w)
        rep.kv_used_blocks += blocks
        if extras is not None and pool.prefix_caching:
            take_prefix(pool, rep, slots, requests, w, i, cached)
        running_append(rep, requests, w, i, pool.vidur_quirks != 0)
        prefill_append(rep, requests, w, i)
        admitted += 1
        tokens += chunk
        squares += float(chunk) * chunk
        if prefix > 0:
            products += float(chunk) * prefix
            prefixes += prefix
            rounded += (prefix + 63) // 64 * 64
    return admitted, tokens, squares, products, prefixes, rounded


@kernel
def _safe_iterations(pool, extras, tables, rep, slots, w, r, bin_index):
    """Decode iterations that need no scheduler in between; the first already has its blocks."""
    in_bin = bin_iterations(pool, tables, rep.batch, rep.kv_sum, bin_index)
    until_finish = slots[w, rep.slot_at].finish_at - rep.counter
    bound = min(in_bin, until_finish)
    first, last = 1, bound
    if extras is not None and rep.pace > 0:
        bound = min(iterations_within(rep, in_bin - 1), iterations_within(rep, until_finish - 1)) + 1
        first = tokens_between(rep, rep.done, rep.done + 1)
        last = tokens_between(rep, rep.done, rep.done + bound)
    free = pool.kv_blocks - rep.kv_used_blocks - pool.vidur_quirks
    size = pool.block_size_tokens
    if bound <= 1 or free >= rep.batch * ((last - first) // size + 1):
        return bound
    if free < 0:
        return 1
    further = free // rep.batch * size
    free -= free // rep.batch * rep.batch
    while further < last - first:
        need = slots[w, rep.slot_at + (rep.counter + first + further) % size].boundaries
        if need > free:
            break
        free -= need
        further += 1
    if extras is not None and rep.pace > 0:
        return min(bound, iterations_within(rep, first + further))
    return min(bound, 1 + further)


@kernel
def _plan_decodes(pool, extras, tables, rep, slots, w, r, pace, preempted, now_s):
    """Continues the segment of an unchanged batch, or opens a new one, and says how far it may run."""
    bin_index = decode_bin(pool, tables, rep.batch, rep.kv_sum)
    if rep.changed or bin_index != rep.segment_bin or (extras is not None and pace != rep.pace):
        rep.changed = 0
        rep.segment_bin = bin_index
        rep.segment_start_s = now_s
        attention_s = decode_seconds(pool, tables, rep.batch, rep.kv_sum, bin_index)
        rep.growth_s = decode_growth(pool, tables, rep.batch, bin_index)
        if extras is not None and pace > 0:
            rep.first_s = token_seconds(pool, tables, rep.batch * (1 + pool.draft_tokens)) + attention_s
            rep.first_s += draft_seconds(pool, tables, rep.batch, attention_s)
            rep.growth_s *= 1.0 + pool.draft_tokens * pool.draft_cost
        else:
            rep.first_s = token_seconds(pool, tables, rep.batch) + attention_s
        if rep.slowdown != 1.0:
            rep.first_s *= rep.slowdown
            rep.growth_s *= rep.slowdown
        if extras is not None:
            open_segment(rep, pace)
        rep.done = 0
    iterations = 1
    if pool.skip_iterations and not preempted:
        iterations = _safe_iterations(pool, extras, tables, rep, slots, w, r, bin_index)
    rep.decodes = 1
    rep.planned = rep.done + iterations
    rep.iteration_end_s = rep.segment_start_s + elapsed_s(extras, rep, rep.done + 1)


@kernel
def go_idle(rep, now_s):
    """Closes the busy period."""
    if rep.busy_from_s <= now_s:
        rep.busy_s += now_s - rep.busy_from_s
    rep.busy_from_s = math.inf
    rep.iteration_end_s = math.inf
    rep.idle_from_s = now_s
    rep.planned = 0
    open_segment(rep, 0)


@kernel
def _speculate(pool, extras, rep):
    """Pace of the next iteration, tokens that it yields to every decode, and tokens that it checks of each."""
    if extras is not None and pool.pace > 0 and rep.batch <= pool.speculation_max_batch:
        return int(pool.pace), int(next_tokens(rep, pool.pace)), int(1 + pool.draft_tokens)
    return 0, 1, 1


@kernel
def start_iteration(pool, extras, tables, world, rep, slots, requests, w, r, now_s):
    """Puts the next iteration together and starts it, or leaves the replica idle."""
    rep.prefill_head = rep.prefill_tail = -1
    prefills, tokens, squares = 0, 0, 0.0
    products, prefixes, rounded = 0.0, 0, 0
    chunk, prefix, preempted = 0, 0, 0
    decodes = 1
    pace, tokens_each, checked = _speculate(pool, extras, rep)
    if pool.scheduler == PREFILL_FIRST:
        prefills, tokens, squares, products, prefixes, rounded = _admit_whole(
            pool, extras, world, rep, slots, requests, w, now_s
        )
        if prefills > 0:
            decodes = 0
        elif rep.batch > 0:
            preempted = _grant_decode_blocks(pool, extras, rep, slots, requests, w, r, tokens_each)
    else:
        if rep.batch > 0:
            preempted = _grant_decode_blocks(pool, extras, rep, slots, requests, w, r, tokens_each)
        if extras is not None:
            while (
                preempted == 2 and rep.batch == 0
            ):  # nobody can run: a step of no time, then the scheduler looks again
                _resume_stalled(pool, rep, slots, requests, w, r)
                pace, tokens_each, checked = _speculate(pool, extras, rep)
                preempted = 0
                if rep.batch > 0:
                    preempted = _grant_decode_blocks(pool, extras, rep, slots, requests, w, r, tokens_each)
        budget = pool.max_num_batched_tokens - rep.batch * checked
        i = int(rep.partial)
        if i >= 0 and budget > 0 and preempted < 2:
            request = requests[w, i]
            prefix = request.computed
            chunk = min(request.target - prefix, budget)
            blocks = 0
            if pool.scheduler == VLLM_V1:
                blocks = blocks_for(pool, prefix + chunk) - blocks_for(pool, prefix)
            made = _make_room(pool, extras, rep, slots, requests, w, r, i, blocks, tokens_each)
            preempted = max(preempted, made)
            if made == 2:
                chunk = 0
            else:
                rep.kv_used_blocks += blocks
                request.computed = prefix + chunk
                if extras is not None and pool.prefix_caching:
                    index_blocks(pool, rep, slots, requests, w, i)
                prefill_append(rep, requests, w, i)
                budget -= chunk
        if not preempted or pool.scheduler != VLLM_V1:
            prefills, tokens, squares, products, prefixes, rounded = _admit_chunked(
                pool, extras, world, rep, slots, requests, w, budget, now_s
            )
        if chunk > 0:
            prefills += 1
            tokens += chunk
            squares += float(chunk) * chunk
            products += float(chunk) * prefix
            prefixes += prefix
            rounded += (prefix + 63) // 64 * 64
    if rep.batch == 0 and prefills == 0:
        go_idle(rep, now_s)
        return
    if rep.busy_from_s > now_s:
        rep.busy_from_s = now_s
    if prefills == 0:
        _plan_decodes(pool, extras, tables, rep, slots, w, r, pace, preempted, now_s)
        return
    seconds = prefill_seconds(pool, tables, prefills, squares, products, float(prefixes), rounded)
    batch = rep.batch if decodes else 0
    seconds += token_seconds(pool, tables, tokens + batch * checked)
    if batch > 0:
        bin_index = decode_bin(pool, tables, batch, rep.kv_sum)
        attention_s = decode_seconds(pool, tables, batch, rep.kv_sum, bin_index)
        seconds += attention_s
        if pace > 0:
            seconds += draft_seconds(pool, tables, batch, attention_s)
    seconds *= rep.slowdown
    rep.prefill_tokens_done += tokens
    rep.decodes = decodes if batch > 0 else 0
    rep.changed = 1
    rep.segment_start_s = now_s
    rep.first_s = seconds
    rep.growth_s = 0.0
    if extras is not None:
        open_segment(rep, pace if batch > 0 else 0)
    rep.done = 0
    rep.planned = 1
    rep.iteration_end_s = now_s + seconds


@kernel
def count_iterations(pool, extras, rep, slots, w, r, iterations):
    """Books `iterations` ended iterations of the segment, and the blocks of those that thereby started."""
    done = rep.done
    rep.iterations += iterations
    rep.done += iterations
    if rep.decodes == 0:
        return
    started = iterations if rep.done < rep.planned else iterations - 1
    first, last, tokens = 1, 1 + started, iterations
    if extras is not None and rep.pace > 0:
        first = tokens_between(rep, done, done + 1)
        last = tokens_between(rep, done, done + 1 + started)
        tokens = tokens_between(rep, done, done + iterations)
    if started > 0:
        rep.kv_used_blocks += _blocks_over(pool, rep, slots, w, first, last)
    grown = tokens * rep.batch
    rep.counter += tokens
    rep.kv_sum += grown
    rep.decoding_tokens += grown
    rep.decode_tokens_done += grown


@kernel
def _complete(world, rep, requests, w, i, now_s):
    request = requests[w, i]
    running_remove(rep, requests, w, i)
    rep.decoding -= 1
    rep.decoding_tokens -= request.computed + 1
    rep.decode_tokens_done -= request.computed + 1 - request.prompt_tokens - request.output_tokens
    _end_request(world, rep, requests, w, i, COMPLETED, now_s)


@kernel
def drop_decode(pool, extras, world, rep, slots, requests, w, r, i, now_s):
    """Ends a decode before its last token, between two iterations."""
    heap_remove(slots, w, rep.slot_at, rep.batch, i)
    _leave_batch(pool, extras, rep, slots, requests, w, r, i)
    running_remove(rep, requests, w, i)
    rep.decoding -= 1
    rep.decoding_tokens -= requests[w, i].computed + 1
    _end_request(world, rep, requests, w, i, ABANDONED, now_s)
    if rep.hold_head >= 0:
        release_held(pool, extras, rep, slots, requests, w)


@kernel
def _end_prefill(pool, extras, world, rep, slots, requests, w, r, i, now_s):
    """A prefill is complete and has produced a token."""
    request = requests[w, i]
    if _gone(request, now_s):
        running_remove(rep, requests, w, i)
        release_blocks(pool, extras, rep, slots, requests, w, i, blocks_for(pool, request.computed))
        rep.pending_prefill_tokens -= request.prompt_tokens - request.expected_cached_tokens
        _end_request(world, rep, requests, w, i, ABANDONED, now_s)
        return
    if math.isnan(request.first_token_at_s):
        request.first_token_at_s = now_s
        rep.pending_prefill_tokens -= request.prompt_tokens - request.expected_cached_tokens
        rep.decoding += 1
        rep.decoding_tokens += request.target
    rep.decoding_tokens += 1
    steps = request.prompt_tokens + request.output_tokens - request.target - 1
    if steps > 0:
        _join_batch(pool, rep, slots, requests, w, r, i, steps)
    else:
        release_blocks(pool, extras, rep, slots, requests, w, i, blocks_for(pool, request.computed))
        _complete(world, rep, requests, w, i, now_s)


@kernel
def _finish_by_admission(pool, extras, world, rep, slots, requests, w, r, now_s):
    """Completes the decodes that have their last token, in the order of the running list, which orders idle blocks."""
    head, size = -1, rep.batch
    while size > 0 and slots[w, rep.slot_at].finish_at <= rep.counter:
        head = insert_by_admission(slots, requests, w, head, heap_pop(slots, w, rep.slot_at, size))
        size -= 1
    while head >= 0:
        following = int(requests[w, head].next)
        _leave_batch(pool, extras, rep, slots, requests, w, r, head)
        _complete(world, rep, requests, w, head, now_s)
        head = following


@kernel
def end_iteration(pool, extras, world, rep, slots, requests, w, r, now_s):
    """Everything that happens at the end of the last planned iteration: completions, first tokens, releases."""
    if extras is not None and pool.prefix_caching:
        if rep.decodes:
            _finish_by_admission(pool, extras, world, rep, slots, requests, w, r, now_s)
    elif rep.decodes:
        while rep.batch > 0 and slots[w, rep.slot_at].finish_at <= rep.counter:
            i = heap_pop(slots, w, rep.slot_at, rep.batch)
            _leave_batch(pool, extras, rep, slots, requests, w, r, i)
            _complete(world, rep, requests, w, i, now_s)
    i = int(rep.prefill_head)
    if i >= 0:
        rep.partial = -1
        while i >= 0:
            following = int(requests[w, i].next)
            if requests[w, i].computed < requests[w, i].target:
                rep.partial = i
            else:
                _end_prefill(pool, extras, world, rep, slots, requests, w, r, i, now_s)
            i = following
    if extras is not None and rep.stalled_head >= 0:
        _resume_stalled(pool, rep, slots, requests, w, r)
    if rep.hold_head >= 0:
        release_held(pool, extras, rep, slots, requests, w)
