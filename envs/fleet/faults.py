"""What a fault does to an engine or a provider; when it happens is decided by whoever moves the world.

* An engine that fails loses everything that it had: `lose_requests` ends the attempts as LOST, empties the KV and
  prefix cache, and leaves the sequence counters as they are. What those requests had computed (`request.computed`
  tokens) is lost work. Sending them again is up to the gateway.
* A replica that is slow (thermal throttling, a noisy neighbour) takes `slowdown` times as long for every iteration that
  starts from now on; the iteration in progress ends when it would have.
* Providers: see envs/fleet/provider.py.
"""

# ruff: noqa: ANN001, ANN201, ANN202 (Numba infers the types of kernels)
from __future__ import annotations

from envs.fleet.engine import empty_engine
from envs.fleet.queues import empty_hold, finish
from envs.fleet.state import LOST
from envs.kernels import kernel


@kernel
def _lose(world, requests, w, i, now_s):
    request = requests[w, i]
    request.hashed_blocks = 0
    request.joined_at = -1
    finish(world, requests, w, i, LOST, now_s)


@kernel
def lose_requests(pool, world, rep, slots, requests, w, held_too, now_s):
    """Ends everything in an engine, and in its hold queue if `held_too`, as LOST, in order of admission and arrival."""
    i = int(rep.running_head)
    while i >= 0:
        following = int(requests[w, i].after)
        if requests[w, i].joined_at >= 0:
            requests[w, i].computed += rep.counter - requests[w, i].joined_at
        _lose(world, requests, w, i, now_s)
        i = following
    i = int(rep.wait_head)
    while i >= 0:
        following = int(requests[w, i].next)
        _lose(world, requests, w, i, now_s)
        i = following
    empty_engine(pool, rep, slots, w)
    rep.pending_prefill_tokens = 0
    i = int(rep.hold_head)
    while i >= 0:
        following = int(requests[w, i].next)
        if held_too:
            _lose(world, requests, w, i, now_s)
        else:
            rep.pending_prefill_tokens += requests[w, i].prompt_tokens - requests[w, i].expected_cached_tokens
        i = following
    if held_too:
        empty_hold(pool, rep, slots, w)
    rep.in_flight = rep.held


@kernel
def slow_replica(pools, tables, worlds, replicas, slots, providers, requests, w, r, factor, now_s):
    """Iterations of replica r take `factor` times as long from the next one on; 1 ends a slowdown."""
    rep = replicas[w, r]
    if factor != rep.slowdown:
        rep.slowdown = factor
        rep.changed = 1
        if rep.planned > rep.done:
            rep.planned = rep.done + 1
