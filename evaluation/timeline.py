"""Margin, load and queues over an episode, in equal parts of its horizon, averaged over episodes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from envs.plant import Plant
from envs.workload.requests import Workload
from envs.worlds import FleetWorlds
from marginroute import view as v
from marginroute.policy import Policy

Floats = NDArray[np.float64]

PARTS = 48


@dataclass(frozen=True)
class Timeline:
    """One policy over B parts of an episode; means over episodes.

    Attributes:
        time_s: (B,) middle of each part.
        arrivals_per_s: (B,).
        margin_usd_per_hour: (B,) as the ledger grew; what is settled after the horizon is left out.
        in_flight: (P + V, B) requests in flight at each pool and provider, as met by arriving requests.
        waiting: (P, B) requests waiting at the engines or held by the gateway.
    """

    time_s: Floats
    arrivals_per_s: Floats
    margin_usd_per_hour: Floats
    in_flight: Floats
    waiting: Floats


def record_timeline(plant: Plant, policy: Policy, workloads: Sequence[Workload], parts: int = PARTS) -> Timeline:
    """Plays a policy and samples its worlds at every decision."""
    worlds = FleetWorlds(plant, len(workloads))
    worlds.load_all(workloads)
    worlds.follow(policy)
    horizon_s = np.array([workload.horizon_s for workload in workloads])
    stations, pools = len(plant.layout.station_names), len(plant.spec.pools)
    engines = plant.spec.n_replicas + len(plant.spec.providers)
    member = (plant.layout.station[:engines] == np.arange(stations)[:, None]).astype(np.float64)
    earned = np.zeros(parts)
    sums, counts = np.zeros((stations + pools, parts)), np.zeros(parts)
    while not worlds.done.all():
        playing = np.flatnonzero(~worlds.done)
        part = np.minimum(worlds.desks["now_s"] / horizon_s * parts, parts - 1).astype(np.int64)
        signals = worlds.signals[:, playing, :engines]
        waiting = (signals[v.WAITING] + signals[v.HELD]) @ member[:pools].T
        sample = np.concatenate([signals[v.IN_FLIGHT] @ member.T, waiting], axis=1)
        np.add.at(sums.T, part[playing], sample)
        np.add.at(counts, part[playing], 1.0)
        worlds.step(policy.decide_batch(worlds.view()))
        going = playing[~worlds.done[playing]]
        after = np.minimum(worlds.desks["now_s"] / horizon_s * parts, parts - 1).astype(np.int64)
        np.add.at(earned, after[going], worlds.reward_usd[going])
    arrivals = np.zeros(parts)
    for workload, end_s in zip(workloads, horizon_s, strict=True):
        arrivals += np.histogram(workload.arrived_at_s, parts, (0.0, end_s))[0]
    means = sums / np.maximum(counts, 1.0)
    spent_s = horizon_s.sum() / parts
    time_s = (np.arange(parts) + 0.5) * float(horizon_s.mean()) / parts
    return Timeline(time_s, arrivals / spent_s, earned / spent_s * 3600.0, means[:stations], means[stations:])
