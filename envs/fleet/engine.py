"""The event loop of the served fleet: submit, advance, pop what has ended.

Time moves only through `advance`. Replicas do not touch each other, so each one moves on its own from the end of one
iteration to the next, as far as `until_s`; an iteration that spans `until_s` stays in progress, and what can be read is
as of the last one that ended. A replica without an event before `until_s` costs one comparison (`wake_s`).

The next iteration starts when the one before ends, but is put together only once time moves on: what is sent at the
instant of a start takes part in it, in whatever order the calls at that instant come. Until then planned == done.

A scrape is a snapshot of waiting, running and KV use at phase + j * interval, whatever the times at which `advance` was
called; only the last one at or before now can be read.

A replica that is off, starting or failed makes no iterations and answers no scrape (scaling.py, faults.py); what is
sent to it is lost at once, or hangs there until the gateway takes the replica for down.

Order of calls for one request: `advance(.., w, now)`, read, `submit(.., w, r, i, now)`; ends are read by
`pop_finished` after any call. Compiled code and the interpreter (NUMBA_DISABLE_JIT=1) give the same numbers.
"""

# ruff: noqa: ANN001, ANN201, ANN202, D417 (Numba infers the types of kernels)
from __future__ import annotations

import math

from envs.fleet.batching import start_iteration
from envs.fleet.blocks import blocks_for
from envs.fleet.completion import end_iteration
from envs.fleet.prefix import empty_prefix_cache
from envs.fleet.provider import end_provider_calls
from envs.fleet.queues import empty_hold, empty_wait, finish, hold_append, release_held, wait_append
from envs.fleet.segment import count_iterations, ended_by
from envs.fleet.speculation import elapsed_s
from envs.fleet.state import ACTIVE, DOWN, FAILED, IN_FLIGHT, LOST, NOT_SUBMITTED, OFF
from envs.kernels import kernel

LAST_INSTANT_S = 1e300  # later than everything, earlier than never (inf)


@kernel
def _next_scrape_s(pool, rep):
    return rep.scrape_phase_s + rep.scrape_index * pool.scrape_interval_s


@kernel
def set_wake(pool, rep):
    """The next end of an iteration or scrape, whichever comes first."""
    rep.wake_s = min(rep.iteration_end_s, _next_scrape_s(pool, rep))


@kernel
def empty_engine(pool, rep, slots, w):
    """The engine as after its start; what the gateway holds, and totals, stay."""
    empty_wait(pool, rep, slots, w)
    rep.running = rep.kv_used_blocks = 0
    rep.decoding = rep.decoding_tokens = rep.batch = rep.kv_sum = 0
    rep.prefill_head = rep.prefill_tail = -1
    rep.partial = rep.stalled_head = rep.running_head = rep.running_tail = -1
    rep.changed = 1
    for p in range(pool.block_size_tokens):
        slots[w, rep.slot_at + p].boundaries = 0
    empty_prefix_cache(pool, rep, slots, w)


@kernel
def _reset_replica(pool, rep, slots, w, r, phase):
    empty_engine(pool, rep, slots, w)
    empty_hold(pool, rep, slots, w)
    rep.in_flight = rep.pending_prefill_tokens = 0
    rep.in_flight_cap = pool.in_flight_cap
    rep.scraped_waiting = rep.scraped_running = 0
    rep.scraped_kv_usage = 0.0
    rep.busy_s = 0.0
    rep.busy_from_s = rep.iteration_end_s = math.inf
    rep.prefill_tokens_done = rep.decode_tokens_done = rep.iterations = rep.restarts = 0
    rep.reused_tokens = rep.evicted_blocks = rep.admissions = 0
    rep.segment_start_s = rep.first_s = rep.growth_s = 0.0
    rep.planned = rep.done = rep.decodes = rep.counter = 0
    rep.pace = rep.phase = 0
    rep.segment_bin = -1
    rep.scrape_index = 0
    rep.scrape_phase_s = phase * pool.scrape_interval_s
    rep.scraped_at_s = rep.scrape_phase_s - pool.scrape_interval_s
    rep.slowdown = 1.0
    rep.idle_from_s = rep.paid_s = 0.0
    rep.change_s = rep.repaired_s = math.inf
    rep.absent_until_s = 0.0
    rep.detected = 0
    if r - pool.first_replica < pool.replicas:
        rep.state = ACTIVE
        rep.paid_from_s = 0.0
        set_wake(pool, rep)
    else:
        rep.state = OFF
        rep.paid_from_s = rep.wake_s = math.inf


@kernel
def reset_request(requests, w, i):
    """Row i as if it had never been submitted; its inputs stay as they are."""
    request = requests[w, i]
    request.status = NOT_SUBMITTED
    request.replica = request.restarts = request.computed = request.cached_tokens = request.hashed_blocks = 0
    request.next = request.before = request.after = request.joined_at = -1
    request.dispatched_at_s = request.first_token_at_s = request.completed_at_s = math.nan


@kernel
def reset_world(pools, tables, worlds, replicas, slots, providers, requests, w):
    """Empties world w at time 0: idle replicas with their pool's cap, full rate limits, no request submitted, no fault.

    Inputs of `requests` stay as they are. Scrapes of the replicas are spread evenly over the interval.
    """
    world = worlds[w]
    world.clock_s = 0.0
    world.first_finished = world.last_finished = -1
    world.provider_calls = 0
    world.next_call_s = math.inf
    world.submitted = world.completed = world.abandoned = world.failed = world.lost = 0
    world.next_change_s = math.inf
    world.draining = world.doomed_calls = 0
    n_replicas = replicas.shape[1]
    for r in range(n_replicas):
        _reset_replica(pools[replicas[w, r].pool], replicas[w, r], slots, w, r, (r + 1.0) / n_replicas)
    for v in range(providers.shape[1]):
        provider = providers[w, v]
        provider.in_flight = provider.calls = 0
        provider.bucket = provider.bucket_size
        provider.token_bucket = provider.token_bucket_size
        provider.token_bucket_at_s = 0.0
        provider.down = 0
        provider.slowdown = 1.0
        provider.bucket_at_s = 0.0
    for i in range(requests.shape[1]):
        reset_request(requests, w, i)


@kernel
def _notice_arrival(pool, rep, now_s):
    """The line at the engine is not empty any more: start now if idle, else look after the iteration in progress."""
    if math.isinf(rep.iteration_end_s):
        rep.iteration_end_s = now_s
        set_wake(pool, rep)
    elif rep.planned > rep.done:
        rep.planned = rep.done + 1


@kernel
def submit(pools, tables, worlds, replicas, slots, providers, requests, w, r, i, now_s):
    """Sends request i of world w to replica r now.

    Beyond in_flight_cap it waits in the gateway's hold queue. A request whose context can never fit into the KV cache
    fails at once, as a length check at the engine's front door would have it. What a replica that does not run refuses
    is LOST at once.

    Args:
        pools, tables, worlds, replicas, slots, providers, requests: `Fleet.arrays`.
        w: World.
        r: Replica.
        i: Request with prompt_tokens and output_tokens of 1 or more and patience_until_s filled in.
        now_s: Time; the world must have been advanced to it.
    """
    world, rep, request = worlds[w], replicas[w, r], requests[w, i]
    pool = pools[rep.pool]
    world.submitted += 1
    request.replica = r
    request.dispatched_at_s = now_s
    request.target = request.prompt_tokens
    largest = blocks_for(pool, request.prompt_tokens + request.output_tokens - 1 + pool.draft_tokens)
    if largest + pool.watermark_blocks + pool.vidur_quirks > pool.kv_blocks:
        finish(world, requests, w, i, FAILED, now_s)
        return
    if rep.state != ACTIVE and (rep.state != DOWN or rep.detected == 1 or pool.connection_errors == 1):
        finish(world, requests, w, i, LOST, now_s)
        return
    request.status = IN_FLIGHT
    rep.pending_prefill_tokens += request.prompt_tokens - request.expected_cached_tokens
    rep.in_flight += 1
    if rep.in_flight - rep.held > rep.in_flight_cap:
        hold_append(pool, True, rep, slots, requests, w, i)
        return
    # With another one first in line, that one is blocked until the batch changes, and so is this one
    wait_append(pool, True, rep, slots, requests, w, i)
    if rep.wait_head == i:
        _notice_arrival(pool, rep, now_s)


@kernel
def set_in_flight_cap(pools, tables, worlds, replicas, slots, providers, requests, w, r, cap, now_s):
    """Changes the cap of a replica now and lets held requests through if it rose. `cap` is 1 or more."""
    rep = replicas[w, r]
    pool = pools[rep.pool]
    rep.in_flight_cap = cap
    first_in_line = rep.wait_head
    release_held(pool, True, rep, slots, requests, w)
    if rep.wait_head != first_in_line:
        _notice_arrival(pool, rep, now_s)


@kernel
def last_scrape(pool, rep, until_s):
    """Index of the last scrape at or before `until_s`."""
    index = int((until_s - rep.scrape_phase_s) / pool.scrape_interval_s)
    while rep.scrape_phase_s + index * pool.scrape_interval_s > until_s:
        index -= 1
    while rep.scrape_phase_s + (index + 1) * pool.scrape_interval_s <= until_s:
        index += 1
    return index


@kernel
def _advance_replica(pool, extras, tables, world, rep, slots, requests, w, until_s):
    """Runs one replica from iteration to iteration up to `until_s`, taking the last scrape on the way."""
    scrape_s = math.inf
    if _next_scrape_s(pool, rep) <= until_s and until_s < LAST_INSTANT_S:
        rep.scrape_index = last_scrape(pool, rep, until_s)
        scrape_s = _next_scrape_s(pool, rep)
    while True:
        stop_s = min(scrape_s, until_s)
        if rep.planned > rep.done and rep.iteration_end_s <= stop_s:
            count_iterations(pool, extras, rep, slots, w, ended_by(extras, rep, stop_s) - rep.done)
            if rep.done < rep.planned:
                rep.iteration_end_s = rep.segment_start_s + elapsed_s(extras, rep, rep.done + 1)
            else:
                rep.iteration_end_s = rep.segment_start_s + elapsed_s(extras, rep, rep.done)
                end_iteration(pool, extras, world, rep, slots, requests, w, rep.iteration_end_s)
        elif rep.planned == rep.done and rep.iteration_end_s < stop_s:
            start_iteration(pool, extras, tables, world, rep, slots, requests, w, rep.iteration_end_s)
        elif scrape_s <= until_s:
            rep.scraped_at_s = scrape_s
            rep.scraped_waiting = rep.waiting
            rep.scraped_running = rep.running
            rep.scraped_kv_usage = rep.kv_used_blocks / pool.kv_blocks
            rep.scrape_index += 1
            scrape_s = math.inf
        else:
            break
    set_wake(pool, rep)


@kernel
def advance(pools, tables, worlds, replicas, slots, providers, requests, w, until_s):
    """Runs world w up to `until_s`; whatever ends on the way joins the finished list.

    The list is in order of time within a replica, and replica by replica within one call.
    """
    world = worlds[w]
    for r in range(replicas.shape[1]):
        if replicas[w, r].wake_s <= until_s:
            rep = replicas[w, r]
            if pools[rep.pool].extras:
                _advance_replica(pools[rep.pool], True, tables, world, rep, slots, requests, w, until_s)
            else:
                _advance_replica(pools[rep.pool], None, tables, world, rep, slots, requests, w, until_s)
    if world.next_call_s <= until_s:
        end_provider_calls(world, providers, requests, w, until_s)
    world.clock_s = until_s


@kernel
def drain(pools, tables, worlds, replicas, slots, providers, requests, w):
    """Runs world w until nothing is in flight; takes no scrapes and leaves its clock at the last `advance`."""
    clock_s = worlds[w].clock_s
    advance(pools, tables, worlds, replicas, slots, providers, requests, w, LAST_INSTANT_S)
    worlds[w].clock_s = clock_s


@kernel
def pop_finished(worlds, requests, w):
    """Next request of world w that has ended (whatever its status), or -1."""
    world = worlds[w]
    i = int(world.first_finished)
    if i >= 0:
        world.first_finished = requests[w, i].next
        if world.first_finished < 0:
            world.last_finished = -1
    return i


@kernel
def busy_seconds(rep, now_s):
    """Seconds during which a replica has had something to do, up to now."""
    return rep.busy_s + max(now_s - rep.busy_from_s, 0.0)
