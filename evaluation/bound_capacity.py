"""What stations can do per second, and what replicas cost that come and go, in the operator's favour.

A replica that reserves its machine, or that nobody can scale, is paid all the time; so is what must run of a pool that
can be scaled. Any other one is *rented*: it may be there for any part of any moment, at once and without loading, and
is paid for that part. That is a relaxation: what works is paid (`envs.fleet.scaling`), but so are starts and drains,
and a replica is there as a whole or not at all. After the horizon nothing is paid any more.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from envs.plant import Plant
from envs.workload.requests import Workload

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Capacity:
    """What S stations, pools before providers, sell per second: engine seconds of a pool, calls of a provider.

    Attributes:
        paid: (S,) whatever is decided.
        burst: (S,) calls that a provider takes at once after a quiet time; 0 for pools.
        rented_from: (R,) pool of each kind of rented replica.
        rented: (R,) engine seconds per second of each kind, at most.
        rent_usd: (R,) per engine second of each kind.
        gpu_usd_per_s: what is paid in any case.
    """

    paid: Floats
    burst: Floats
    rented_from: Ints
    rented: Floats
    rent_usd: Floats
    gpu_usd_per_s: float

    @property
    def most(self) -> Floats:
        """(S,) with all that can be rented."""
        most = self.paid.copy()
        np.add.at(most, self.rented_from, self.rented)
        return most


def fails(workload: Workload) -> bool:
    """Whether anything goes down in the episode, so that requests are sent again."""
    return bool(np.isinf(workload.faults["slowdown"]).any())


def capacity_of(plant: Plant, workload: Workload) -> Capacity:
    """What the stations of an episode sell."""
    failing, controlled = fails(workload), plant.scenario.control is not None
    paid, gpu_usd_per_s, first = [], 0.0, 0
    rented: list[tuple[int, float, float]] = []
    for station, pool in enumerate(plant.spec.pools):
        usd = plant.gpu_usd_per_s[first : first + pool.rows]
        first += pool.rows
        reserved, others = usd[: pool.reserved_replicas], usd[pool.reserved_replicas :]
        if controlled and pool.max_replicas > 0:
            others = np.sort(others)
            must = 0 if failing else max(pool.min_replicas - len(reserved), 0)
        else:
            others = others[: max(pool.replicas - len(reserved), 0)]
            spot = pool.spot_replicas - (pool.rows - pool.replicas) if failing else 0  # may be taken away, unpaid then
            must = len(others) - max(spot, 0)
        paid.append(float(len(reserved) + must))
        gpu_usd_per_s += float(reserved.sum() + others[:must].sum())
        prices, counts = np.unique(others[must:], return_counts=True)
        rented += [(station, float(n), float(price)) for price, n in zip(prices, counts, strict=True)]
    rate = [provider.requests_per_minute / 60.0 for provider in plant.spec.providers]
    burst = [p.burst_requests or max(1.0, 10.0 * r) for p, r in zip(plant.spec.providers, rate, strict=True)]
    return Capacity(
        paid=np.array(paid + rate),
        burst=np.array([0.0] * len(paid) + burst),
        rented_from=np.array([station for station, _, _ in rented], dtype=np.int64),
        rented=np.array([count for _, count, _ in rented]),
        rent_usd=np.array([price for _, _, price in rented]),
        gpu_usd_per_s=gpu_usd_per_s,
    )
