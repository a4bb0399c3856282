"""One control tick of the fluid surrogate: levers, hold queue, spill to providers, then every pool on its own.

Arrivals of a class at a pool go, in this order: what can never fit fails, a share is shed, a share is spilled to the
providers as far as their rate limits allow (the rest stays), delay-tolerant work goes to the hold queue if anything is
held at all, and what is left enters the pool. Held work leaves first in, first out at the pool's release rate, and at
the latest before its deadline: its age is known to a 32nd of the deadline. Calls of providers count as served in the
tick in which they are sent.

Replicas that are ordered arrive after the pool's lag, on a tick's boundary. Fewer replicas than now: first those under
way are cancelled, then ready ones drain, and are paid until they are empty.
"""

# ruff: noqa: ANN001, ANN201, ANN202, D417 (Numba infers the types of kernels)
from __future__ import annotations

import math

from envs.fleet.fluid import advance_pool
from envs.fleet.fluid_state import AGES
from envs.kernels import kernel

NEVER_S = 1e9  # until a replica is ready, where none is under way
LAST_AGES = AGES - 2  # buckets after which held work must go


@kernel
def _scale(pool, station, orders, w, p, tick_s):
    """Brings replicas whose time has come, orders or cancels for the target, and counts what is paid."""
    under_way = 0.0
    for o in range(orders.shape[2]):
        order = orders[w, p, o]
        if order.replicas > 0.0 and order.left_s <= 1e-9:
            station.ready += order.replicas
            order.replicas = 0.0
        under_way += order.replicas
    wanted = station.replica_target - station.ready - under_way
    if wanted > 1e-9:
        free = orders.shape[2] - 1
        for o in range(orders.shape[2]):
            if orders[w, p, o].replicas <= 0.0:
                free = o
                break
        orders[w, p, free].replicas += wanted
        orders[w, p, free].left_s = pool.lag_s
        if pool.lag_s <= 0.0:
            station.ready += orders[w, p, free].replicas
            orders[w, p, free].replicas = 0.0
    while wanted < -1e-9 and under_way > 1e-9:
        newest = -1
        for o in range(orders.shape[2]):
            if orders[w, p, o].replicas > 0.0 and (newest < 0 or orders[w, p, o].left_s > orders[w, p, newest].left_s):
                newest = o
        cancelled = min(orders[w, p, newest].replicas, -wanted)
        orders[w, p, newest].replicas -= cancelled
        under_way -= cancelled
        wanted += cancelled
    if wanted < -1e-9:
        fewer = min(-wanted, station.ready)
        station.ready -= fewer
        station.draining += fewer
    paid = station.ready + station.draining
    station.ready_in_s = NEVER_S
    for o in range(orders.shape[2]):
        if orders[w, p, o].replicas > 0.0:
            station.ready_in_s = min(station.ready_in_s, orders[w, p, o].left_s)
        orders[w, p, o].left_s -= tick_s
        paid += orders[w, p, o].replicas
    station.paid_replicas = paid


@kernel
def _enter(classes, providers, flows, spills, arrivals, class_levers, w, tick_s):
    """Splits arrivals into failed, shed, spilled and the rest, which stands in `admitted`."""
    wanted = 0.0
    for p in range(flows.shape[1]):
        for k in range(flows.shape[2]):
            flow = flows[w, p, k]
            flow.arrived = arrivals[w, p, k]
            flow.failed = flow.arrived * classes[p, k].unfit_share
            flow.shed = (flow.arrived - flow.failed) * class_levers[w, k, 0]
            flow.admitted = flow.arrived - flow.failed - flow.shed
            flow.spilled = flow.admitted * class_levers[w, k, 1]
            wanted += flow.spilled
    left = wanted
    for v in range(spills.shape[1]):
        bucket = spills.shape[2] - 1
        allowed = min(left, spills[w, v, bucket] + providers[v].requests_per_s * tick_s)
        share = allowed / wanted if wanted > 0.0 else 0.0
        for k in range(flows.shape[2]):
            spills[w, v, k] = 0.0
            for p in range(flows.shape[1]):
                spills[w, v, k] += flows[w, p, k].spilled * share
        if not math.isinf(providers[v].requests_per_s):
            refilled = spills[w, v, bucket] + providers[v].requests_per_s * tick_s - allowed
            spills[w, v, bucket] = min(refilled, providers[v].bucket_size)
        left -= allowed
    taken = 1.0 - left / wanted if wanted > 0.0 else 0.0
    for p in range(flows.shape[1]):
        for k in range(flows.shape[2]):
            flow = flows[w, p, k]
            flow.spilled *= taken
            flow.admitted -= flow.spilled


@kernel
def _bucket(now_s, deadline_s):
    return int(now_s / deadline_s * AGES)


@kernel
def _hold(station, flows, held, deadline_s, clocks_s, w, p, tick_s):
    """Defers delay-tolerant work and releases what is due, and as much as the lever allows; sets `held_s`."""
    allowed = station.release_per_s * tick_s
    for k in range(flows.shape[2]):
        flow = flows[w, p, k]
        flow.held_s = flow.deferred = 0.0
        if math.isinf(deadline_s[k]):
            continue
        width_s = deadline_s[k] / AGES
        now = _bucket(clocks_s[w], deadline_s[k])
        flow.deferred = flow.admitted
        held[w, p, k, now % AGES] += flow.admitted
        flow.admitted = 0.0
        last = _bucket(clocks_s[w] + tick_s, deadline_s[k])
        age_sum_s = 0.0
        for age in range(AGES - 1, -1, -1):
            cell = (now - age) % AGES
            due = last - now + age >= LAST_AGES
            amount = held[w, p, k, cell] if due else min(held[w, p, k, cell], max(allowed, 0.0))
            held[w, p, k, cell] -= amount
            allowed -= amount
            flow.admitted += amount
            if age > 0:
                age_sum_s += amount * age * width_s
        flow.held_s = age_sum_s / flow.admitted if flow.admitted > 0.0 else 0.0
        if math.isinf(station.release_per_s):
            flow.deferred = 0.0


@kernel
def tick(
    pools, classes, curves, kept, deadline_s, providers, stations, orders, flows, held, clocks_s, spills,
    w, arrivals, pool_levers, class_levers, tick_s,
):  # fmt: skip
    """Advances world w by one control tick.

    Args:
        pools, classes, curves, kept, deadline_s, providers, stations, orders, flows, held, clocks_s, spills:
            `Fluid.arrays`.
        w: World.
        arrivals: (N, P, K) requests of the tick.
        pool_levers: (N, P, 3) in-flight cap per replica, replica target, held requests released per second.
        class_levers: (N, K, 2) share shed, and share of the rest that goes to providers.
        tick_s: Length of the tick.
    """
    _enter(classes, providers, flows, spills, arrivals, class_levers, w, tick_s)
    for p in range(flows.shape[1]):
        station = stations[w, p]
        station.in_flight_cap = max(pool_levers[w, p, 0], 1.0)
        station.replica_target = max(pool_levers[w, p, 1], 0.0)
        station.release_per_s = max(pool_levers[w, p, 2], 0.0)
        _scale(pools[p], station, orders, w, p, tick_s)
        _hold(station, flows, held, deadline_s, clocks_s, w, p, tick_s)
        advance_pool(pools, classes, curves, kept, stations, flows, w, p, tick_s)
    clocks_s[w] += tick_s
