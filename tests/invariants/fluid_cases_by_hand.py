"""Fluid fleets whose curves are made up: a replica slows down linearly with what it has."""

import math

import numpy as np

from envs.fleet.fluid_curves import KEPT, WAITS, Curves, waits
from envs.fleet.fluid_state import FluidSpec, allocate_fluid
from envs.fleet.fluid_tick import tick
from envs.fleet.spec import ProviderSpec

STAY_S, SLOWER_S, SLOTS, PATIENCE_S, SLO_S = 2.0, 0.1, 32.0, 8.0, 1.0


def curves(slots=SLOTS, slower_s=SLOWER_S, patience_s=PATIENCE_S):
    """S(level) = 2 s + 0.1 s (level - 1), the second class 1.5 times that; TTFT SLO and patience end sharply."""
    levels = np.geomspace(1.0, slots, 12)
    stay_s = (STAY_S + slower_s * (levels - 1.0))[:, None]
    table = np.zeros((12, 2, 7))
    table[..., 0], table[..., 2], table[..., 4], table[..., 6] = 0.1, stay_s / 100, stay_s * [1.0, 1.5], stay_s / 100
    kept = np.zeros((12, WAITS, 2, len(KEPT)))
    waited = waits(20.0)
    stays = (waited <= patience_s).astype(float)
    kept[..., :4] = (stays * (waited <= SLO_S))[:, None, None]
    kept[..., 4] = (stays * (waited > SLO_S) * 0.5)[:, None]
    kept[..., 5] = stays[:, None]
    half = np.full(2, 0.5)
    return Curves(slots, table, kept, half, np.ones((2, 2)), half, half, math.inf, np.array([0.0, 0.1]), 20.0)


def fleet(n_worlds=1, replicas=(2.0, 3.0), lag_s=(30.0, 0.0), caps=(1e9, 16.0), **changed):
    """Two pools, two classes of which the second may wait for 64 s, one provider of 60 requests a minute."""
    spec = FluidSpec(
        (curves(**changed),) * len(replicas),
        replicas,
        caps,
        lag_s,
        (math.inf, 64.0),
        (ProviderSpec("api", requests_per_minute=60.0, burst_requests=10.0),),
    )
    return allocate_fluid(spec, n_worlds)


def levers(fluid):
    """As the scenario has it."""
    n, pools, classes = fluid.flows.shape
    of_pools = np.empty((n, pools, 3))
    of_pools[..., 0], of_pools[..., 1], of_pools[..., 2] = fluid.spec.in_flight_caps, fluid.spec.replicas, np.inf
    return of_pools, np.zeros((n, classes, 2))


def run(fluid, arrivals, of_pools, of_classes, tick_s):
    """Ticks (T, N, P, K), and what came of them: sums over all ticks, by name, (N, P, K)."""
    names = ("arrived", "failed", "shed", "spilled", "served", "abandoned", "served_slo_ok", "admitted", "deferred")
    total = {name: np.zeros(fluid.flows.shape) for name in names}
    for amounts in arrivals:
        for w in range(len(fluid.flows)):
            tick(*fluid.arrays, w, amounts, of_pools, of_classes, tick_s)
        for name in names:
            total[name] += fluid.flows[name]
    return total


def backlog(fluid):
    """Requests still there, (N, P, K)."""
    flows = fluid.flows
    return flows["waiting"] + flows["running"] + flows["leaving"] + fluid.held.sum(axis=3)
