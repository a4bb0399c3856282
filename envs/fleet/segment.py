"""Segments: iterations of one composition, skipped over in one step.

A decode batch that does not change is a *segment*: its j-th iteration takes first_s + j growth_s (iteration.py)
until one of its requests finishes, the mean length leaves its bin, the blocks run out, or somebody arrives. The
scheduler plans as many iterations as are safe and looks again afterwards; an iteration planned for one event or for a
thousand ends at segment_start_s plus the same closed form, so results do not depend on how far is skipped. An
iteration with prefills is a segment of its own.

With speculative decoding (speculation.py) an iteration advances the decodes by several tokens, all by the same number;
`counter` counts tokens.
"""

# ruff: noqa: ANN001, ANN201, ANN202 (Numba infers the types of kernels)
from __future__ import annotations

import math

from envs.fleet.blocks import decode_blocks
from envs.fleet.iteration import (
    bin_iterations,
    decode_bin,
    decode_growth,
    decode_seconds,
    draft_seconds,
    prefill_seconds,
    token_seconds,
)
from envs.fleet.speculation import PACE_ONE, elapsed_s, iterations_within, open_segment, tokens_between
from envs.kernels import kernel


@kernel
def _safe_iterations(pool, extras, tables, rep, slots, w, bin_index):
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
def plan_decodes(pool, extras, tables, rep, slots, w, pace, preempted, now_s):
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
        iterations = _safe_iterations(pool, extras, tables, rep, slots, w, bin_index)
    rep.decodes = 1
    rep.planned = rep.done + iterations
    rep.iteration_end_s = rep.segment_start_s + elapsed_s(extras, rep, rep.done + 1)


@kernel
def plan_prefills(pool, extras, tables, rep, prefills, decodes, pace, checked, now_s):
    """A segment of one iteration, with `iteration.Prefills` and, where `decodes`, the decode batch.

    Every decode gains `pace` tokens, in units of 2^-20 (0: one, without speculation); `checked` are computed for it.
    """
    seconds = prefill_seconds(pool, tables, prefills)
    batch = rep.batch if decodes else 0
    seconds += token_seconds(pool, tables, prefills.tokens + batch * checked)
    if batch > 0:
        attention_s = decode_seconds(pool, tables, batch, rep.kv_sum, decode_bin(pool, tables, batch, rep.kv_sum))
        seconds += attention_s
        if pace > 0:
            seconds += draft_seconds(pool, tables, batch, attention_s)
    seconds *= rep.slowdown
    rep.prefill_tokens_done += prefills.tokens
    rep.decodes = 1 if batch > 0 else 0
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
def ended_by(extras, rep, until_s):
    """Iterations of the segment that have ended at `until_s`, at least the one in progress."""
    start_s = rep.segment_start_s
    if start_s + elapsed_s(extras, rep, rep.planned) <= until_s:
        return rep.planned
    n = rep.done + 1
    if start_s + elapsed_s(extras, rep, n + 1) > until_s:
        return n
    span_s = until_s - start_s
    growth_s = rep.growth_s
    if extras is not None and rep.pace > 0:
        growth_s *= rep.pace / PACE_ONE
    if growth_s > 0.0:
        half = rep.first_s - 0.5 * growth_s
        guess = (math.sqrt(half * half + 2.0 * growth_s * span_s) - half) / growth_s
    else:
        guess = span_s / rep.first_s
    n = min(max(n, int(guess)), rep.planned)
    while n > rep.done + 1 and start_s + elapsed_s(extras, rep, n) > until_s:
        n -= 1
    while start_s + elapsed_s(extras, rep, n + 1) <= until_s:
        n += 1
    return n


@kernel
def count_iterations(pool, extras, rep, slots, w, iterations):
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
        rep.kv_used_blocks += decode_blocks(pool, rep, slots, w, first, last)
    grown = tokens * rep.batch
    rep.counter += tokens
    rep.kv_sum += grown
    rep.decoding_tokens += grown
    rep.decode_tokens_done += grown


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
