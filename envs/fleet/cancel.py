"""Calling a call off: what a gateway does with the slower of two when the other has begun to answer.

A provider's call ends at once. At a replica nobody waits for the answer any more, as if its user had left: what is in
line, at the engine or at the gateway, is dropped when the scheduler reaches it, and what is being prefilled when its
prompt is complete. A call that has begun to decode ends at once if no iteration is under way, which is where two first
tokens come at the same instant; else it runs on to its end.
"""

# ruff: noqa: ANN001, ANN201, D417 (Numba infers the types of kernels)
from __future__ import annotations

import math

from envs.fleet.completion import drop_decode
from envs.fleet.provider import cancel_call
from envs.fleet.state import IN_FLIGHT
from envs.kernels import kernel


@kernel
def cancel(pools, tables, worlds, replicas, slots, providers, requests, w, i, now_s):
    """Calls off the call in row `i`, unless it has ended; it joins the finished list as ABANDONED when it ends.

    Args:
        pools, tables, worlds, replicas, slots, providers, requests: `Fleet.arrays`.
        w: World.
        i: Row of a call.
        now_s: Time; the world must have been advanced to it.
    """
    call = requests[w, i]
    if call.status != IN_FLIGHT:
        return
    if call.replica < 0:
        cancel_call(worlds[w], providers, requests, w, i, now_s)
        return
    call.patience_until_s = -math.inf
    rep = replicas[w, call.replica]
    if call.joined_at >= 0 and rep.planned == rep.done:
        pool = pools[rep.pool]
        if pool.extras:
            drop_decode(pool, True, worlds[w], rep, slots, requests, w, i, now_s)
        else:
            drop_decode(pool, None, worlds[w], rep, slots, requests, w, i, now_s)
