"""A mix of clients: few carry most traffic, each is active at times only and has lengths of its own.

Every client is a stream of the workload's arrival process at its share of the rate, drawn on the time in which the
client is active. Lengths correlate between clients, not within one (Xiang et al., "ServeGen", 2025): a client scales
the workload's medians by factors of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from envs.workload.arrivals import Arrivals
from envs.workload.lengths import LengthMixture

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Client:
    """One client.

    Attributes:
        share: of all requests.
        class_index, tenant_index: whose it is.
        active_share: share of time in which it asks at all.
        active_s: mean length of an active stretch.
        prompt_factor, output_factor: on the medians of the workload's lengths.
        arrivals: its own process at rate 1; None: the workload's.
        prompt_lengths, output_lengths: its own lengths; None: the workload's.
    """

    share: float
    class_index: int
    tenant_index: int
    active_share: float = 1.0
    active_s: float = 600.0
    prompt_factor: float = 1.0
    output_factor: float = 1.0
    arrivals: Arrivals | None = None
    prompt_lengths: LengthMixture | None = None
    output_lengths: LengthMixture | None = None


def draw_clients(
    clients: tuple[Client, ...], arrivals: Arrivals, rng: np.random.Generator, length_s: float
) -> tuple[Array, Array]:
    """Arrival times (M,) in [0, length_s), ascending, and the number (M,) i4 of the client of each."""
    rate_per_s = arrivals.mean_rate_per_s()
    times, owners = [], []
    for number, client in enumerate(clients):
        begins, passed = _active(client, rng, length_s)
        if passed[-1] <= 0.0:
            continue
        own = arrivals.scaled(1.0 / rate_per_s) if client.arrivals is None else client.arrivals
        own = own.scaled(rate_per_s * client.share / client.active_share)
        active_s = own.draw(rng, float(passed[-1]))
        stretch = np.minimum(np.searchsorted(passed, active_s, side="right") - 1, len(begins) - 1)
        times.append(begins[stretch] + active_s - passed[stretch])
        owners.append(np.full(len(active_s), number, dtype=np.int32))
    at_s = np.concatenate([np.empty(0), *times])
    order = np.argsort(at_s, kind="stable")
    return at_s[order], np.concatenate([np.empty(0, dtype=np.int32), *owners])[order]


def _active(client: Client, rng: np.random.Generator, length_s: float) -> tuple[Array, Array]:
    """Begins (S,) of active stretches and the active time (S + 1,) passed before each and in all."""
    if client.active_share >= 1.0:
        return np.zeros(1), np.array([0.0, length_s])
    idle_s = client.active_s * (1.0 / client.active_share - 1.0)
    size = int(length_s / (client.active_s + idle_s) * 1.5) + 20
    on_s, off_s = rng.exponential(client.active_s, size), rng.exponential(idle_s, size)
    if rng.random() < client.active_share:  # exponential stretches: what is left of one is as long as a new one
        off_s[0] = 0.0
    while on_s.sum() + off_s.sum() < length_s:
        on_s = np.append(on_s, rng.exponential(client.active_s, size))
        off_s = np.append(off_s, rng.exponential(idle_s, size))
    ends = np.cumsum(on_s + off_s)
    begins = np.minimum(ends - on_s, length_s)
    ends = np.minimum(ends, length_s)
    return begins, np.append(0.0, np.cumsum(ends - begins))
