"""The engine under a controller: a plain gateway between two control ticks, and what a controller sees of a fleet.

The plain gateway does with a request what the levers say, and no more. In this order: an answer from the cache if there
is one; shed and spill by their shares (evenly spread: one in so many); delay-tolerant work that has not waited yet goes
to the hold queue; everything else to the least busy replica of the pool that is furthest behind its share. Where no
replica takes requests a provider answers, or the request is shed. The fluid surrogate does the same with amounts.

Shapes: N worlds, P pools, K classes, C candidates, G parts of a deadline.
"""

# ruff: noqa: ANN001, ANN201, ANN202, D417 (Numba infers the types of kernels)
from __future__ import annotations

import math

from envs import rule_kernel, world
from envs.fleet.provider import requests_left
from envs.fleet.state import ACTIVE, DOWN, DRAINING, LEAVING, STARTING
from envs.kernels import kernel
from envs.world_hold import held_by_age
from marginroute import control
from marginroute import view as v

SHED_DEBT, SPILL_DEBT = range(2)  # columns of `debts`; the pools' follow


@kernel
def owns_defer(desk, load, legal, w, defer):
    """Whether the controller holds the current request back, whatever a router would do with it."""
    return desk.gated == 1 and desk.offered == 0 and load.attempts + load.turned_down == 0 and legal[w, defer]


@kernel
def _to_pool(replicas, stations, legal, debts, share, w, k):
    """The least busy replica of the pool furthest behind its share; -1 if none takes requests."""
    for p in range(share.shape[1]):
        debts[w, k, 2 + p] = min(debts[w, k, 2 + p] + share[w, p], 2.0)
    best, lead, fewest = -1, -math.inf, math.inf
    for c in range(replicas.shape[1]):
        if legal[w, c]:
            debt, busy = debts[w, k, 2 + stations[c]], replicas[w, c].in_flight
            if debt > lead + 1e-9 or (debt > lead - 1e-9 and busy < fewest):
                best, lead, fewest = c, max(debt, lead), busy
    if best >= 0:
        debts[w, k, 2 + stations[best]] -= 1.0
    return best


@kernel
def plain_choice(kinds, stations, replicas, desks, loads, legal, debts, share, class_levers, w):
    """The candidate that the plain gateway takes for the current request of world w."""
    desk = desks[w]
    load = loads[w, desk.current]
    k, n = load.class_index, kinds.shape[0]
    if desk.hedging == 1:
        return load.answered_by  # it hedges nothing
    if legal[w, n - 3]:
        return n - 3
    if desk.offered == 0 and load.attempts + load.turned_down == 0:
        debts[w, k, SHED_DEBT] += class_levers[w, k, 0]
        if debts[w, k, SHED_DEBT] >= 1.0:
            debts[w, k, SHED_DEBT] -= 1.0
            return n - 1
        debts[w, k, SPILL_DEBT] = min(debts[w, k, SPILL_DEBT] + class_levers[w, k, 1], 2.0)
        if debts[w, k, SPILL_DEBT] >= 1.0:
            for c in range(replicas.shape[1], n - 3):
                if legal[w, c]:
                    debts[w, k, SPILL_DEBT] -= 1.0
                    return c
    if owns_defer(desk, load, legal, w, n - 2):
        return n - 2
    best = _to_pool(replicas, stations, legal, debts, share, w, k)
    if best >= 0:
        return best
    for c in range(replicas.shape[1], n - 3):
        if legal[w, c]:
            return c
    return n - 1


@kernel
def routed_choice(kinds, n_replicas, desks, loads, legal, debts, class_levers, w, rule, signals, request_view, seen):
    """The candidate that a margin rule takes for the current request of world w, of what the levers leave it."""
    desk = desks[w]
    load = loads[w, desk.current]
    k, n = load.class_index, kinds.shape[0]
    held = False
    if desk.offered == 0 and load.attempts + load.turned_down == 0:
        debts[w, k, SHED_DEBT] += class_levers[w, k, 0]
        debts[w, k, SPILL_DEBT] += class_levers[w, k, 1]
        shed = debts[w, k, SHED_DEBT] >= 1.0
        spill = False
        for c in range(n_replicas, n - 3):
            spill = spill or (not shed and debts[w, k, SPILL_DEBT] >= 1.0 and legal[w, c])
        debts[w, k, SHED_DEBT] -= shed
        debts[w, k, SPILL_DEBT] = min(debts[w, k, SPILL_DEBT] - spill, 2.0)
        if shed:
            return n - 1
        if spill:
            for c in range(n):
                legal[w, c] = legal[w, c] and n_replicas <= c < n - 3
        held = not spill and legal[w, n - 2] and kinds[n - 2] == v.DEFER
    if held:
        return n - 2
    legal[w, n - 2] = False
    return rule_kernel.choice(rule, signals, request_view, legal, w, seen)


@kernel
def run_tick(
    config, terms, static, sigmas, kinds, tiers, pools, tables, worlds, replicas, slots, providers, requests,
    desks, loads, index, prior, truth, good, own, entries, follow, lengths, ledger_usd, counts, changes, actions,
    signals, request_view, legal, p_true, stations, debts, share, class_levers, until_s, choices, routed, rule, seen,
):  # fmt: skip
    """Lets the plain gateway, or a margin rule (`routed`), decide in every world until its next decision is at
    `until_s` (N,) or later.
    """
    choices[:] = world.WAIT
    for w in range(desks.shape[0]):
        while desks[w].done == 0 and desks[w].now_s < until_s[w]:
            if routed:
                choices[w] = routed_choice(
                    kinds,
                    replicas.shape[1],
                    desks,
                    loads,
                    legal,
                    debts,
                    class_levers,
                    w,
                    rule,
                    signals,
                    request_view,
                    seen,
                )
            else:
                choices[w] = plain_choice(kinds, stations, replicas, desks, loads, legal, debts, share, class_levers, w)
            world.step(
                config, terms, static, sigmas, kinds, tiers, pools, tables, worlds, replicas, slots, providers,
                requests, desks, loads, index, prior, truth, good, own, entries, follow, lengths, ledger_usd, counts,
                changes, actions, signals, request_view, legal, p_true, choices,
            )  # fmt: skip
            choices[w] = world.WAIT


@kernel
def read_engine(replicas, providers, desks, loads, targets, pools_out, held_out, allowance_out):
    """Writes what a controller sees of the engine: pools (N, P, 8), held (N, K, G) and allowance (N, V).

    Args:
        replicas, providers, desks, loads: of `FleetWorlds`.
        targets: (N, P) replicas wanted.
        pools_out, held_out, allowance_out: out.
    """
    for w in range(desks.shape[0]):
        now_s = desks[w].now_s
        pools_out[w] = 0.0
        for r in range(replicas.shape[1]):
            rep = replicas[w, r]
            out = pools_out[w, rep.pool]
            if rep.state == ACTIVE:
                out[control.READY] += 1.0
                out[control.CAP] = rep.in_flight_cap
            elif rep.state == STARTING or rep.state == DOWN:
                out[control.STARTING] += 1.0
                left_s = max(rep.change_s - now_s, 0.0)
                if out[control.NEXT_READY_S] == 0.0 or left_s < out[control.NEXT_READY_S]:
                    out[control.NEXT_READY_S] = left_s
            elif rep.state == DRAINING or rep.state == LEAVING:
                out[control.DRAINING] += 1.0
            out[control.IN_FLIGHT] += rep.in_flight - rep.held
            out[control.WAITING] += rep.held
        for p in range(pools_out.shape[1]):
            pools_out[w, p, control.TARGET] = targets[w, p]
        held_by_age(desks, loads, w, held_out[w])
        for i in range(allowance_out.shape[1]):
            allowance_out[w, i] = requests_left(providers[w, i], now_s)


@kernel
def read_fluid(flows, stations, orders, held, deadline_s, clocks_s, spills, pools_out, held_out, allowance_out):
    """The same of the fluid surrogate, from `Fluid`'s arrays of these names."""
    parts = held_out.shape[2]
    for w in range(flows.shape[0]):
        held_out[w] = 0.0
        pools_out[w] = 0.0
        for p in range(flows.shape[1]):
            station, out = stations[w, p], pools_out[w, p]
            total = 0.0
            for k in range(flows.shape[2]):
                flow = flows[w, p, k]
                total += flow.waiting + flow.running + flow.leaving
                if not math.isinf(deadline_s[k]):
                    buckets = held.shape[3]
                    now = int(clocks_s[w] / deadline_s[k] * buckets)
                    for age in range(buckets):
                        held_out[w, k, age * parts // buckets] += held[w, p, k, (now - age) % buckets]
            out[control.READY], out[control.DRAINING] = station.ready, station.draining
            for o in range(orders.shape[2]):
                order = orders[w, p, o]
                if order.replicas > 0.0:
                    if order.left_s <= 1e-9:
                        out[control.READY] += order.replicas
                    else:
                        out[control.STARTING] += order.replicas
                        if out[control.NEXT_READY_S] == 0.0 or order.left_s < out[control.NEXT_READY_S]:
                            out[control.NEXT_READY_S] = order.left_s
            room = (station.ready + station.draining) * station.in_flight_cap
            out[control.IN_FLIGHT], out[control.WAITING] = min(total, room), max(total - room, 0.0)
            out[control.TARGET], out[control.CAP] = station.replica_target, station.in_flight_cap
        for i in range(allowance_out.shape[1]):
            allowance_out[w, i] = spills[w, i, spills.shape[2] - 1]
