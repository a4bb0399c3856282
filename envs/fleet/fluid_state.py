"""State of the fluid surrogate: amounts of requests instead of requests, in the arrays that its kernels work on.

    pools (P,)            constants of a pool
    classes (P, K)        constants of a class in a pool
    curves (P, L, K, 7)   one replica by level, see `fluid_curves`; padded with its last row
    kept (P, L, A, K, 6)  promises kept by level and wait
    stations (N, P)       replicas, levers and the last tick's figures of a pool
    orders (N, P, O)      replicas on their way
    flows (N, P, K)       amounts of a class in a pool, and what the last tick did to them
    held (N, P, K, B)     delay-tolerant work that the gateway holds, by age
    spills (N, V, K + 1)  last tick's calls of a provider by class; last column: its token bucket

N worlds, P pools, K classes, V providers, L levels, A waits.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from envs.fleet.fluid_curves import WAIT_UNIT_S, WAITS, Curves
from envs.fleet.spec import ProviderSpec
from envs.fleet.state import record_array
from marginroute.errors import InputError

Array = np.ndarray[Any, Any]

ORDERS = 8  # O, orders of replicas under way per pool; a ninth joins the last
AGES = 32  # B, buckets of age up to the deadline of a class
PROMISES = ("ttft_ok", "tpot_ok", "e2e_ok", "slo_ok", "credited")

POOL = np.dtype(
    [
        ("slots", "f8"),  # requests that a replica serves at once
        ("kv_tokens", "f8"),  # context that its running requests can have together
        ("level_scale", "f8"),  # rows of `curves` per unit of ln(level)
        ("levels", "i8"),  # rows in use
        ("wait_scale", "f8"),  # rows of `kept` per unit of ln(1 + wait / unit)
        ("lag_s", "f8"),  # from an order of replicas to the first request: provisioning and loading
        ("replicas", "f8"),  # at the start
        ("in_flight_cap", "f8"),  # at the start
    ]
)

CLASS = np.dtype(
    [
        ("share", "f8"),  # of the mix that the curves were measured with
        ("context_tokens", "f8"),  # mean of a running request
        ("unfit_share", "f8"),  # fails at once, because its context can never fit
    ]
)

STATION = np.dtype(
    [
        # Levers
        ("in_flight_cap", "f8"),  # per replica
        ("replica_target", "f8"),
        ("release_per_s", "f8"),  # held requests released per second, all classes together; inf: nothing is held
        # State
        ("ready", "f8"),  # replicas that take requests
        ("draining", "f8"),  # replicas that end what they have
        ("variance", "f8"),  # of the requests in the pool, as far as departures cause it
        ("recovery_per_s", "f8"),  # d completions / d requests in the pool
        ("served_per_s", "f8"),  # in the last step
        ("entered_share", "f8"),  # of the inflow of the last step, that will not leave
        ("ready_in_s", "f8"),  # until the next replicas under way are ready
        # Last tick
        ("paid_replicas", "f8"),  # ready, draining and on their way
        ("busy_share", "f8"),  # of the ready and draining replicas, mean over the tick
        ("level", "f8"),  # requests in service per replica, mean over the tick
        ("wait_s", "f8"),  # mean wait in front of the engines of what came in the tick
        # Scratch
        ("inflow_per_s", "f8"),
    ]
)

ORDER = np.dtype([("replicas", "f8"), ("left_s", "f8")])

FLOW = np.dtype(
    [
        # State, requests
        ("waiting", "f8"),  # in front of the engines
        ("running", "f8"),
        ("leaving", "f8"),  # in line, but their patience will end first
        *[(name, "f8") for name in PROMISES],  # of waiting + running, will have kept the promise; credit in requests
        # Last tick, requests
        ("arrived", "f8"),
        ("failed", "f8"),
        ("shed", "f8"),
        ("spilled", "f8"),
        ("deferred", "f8"),  # went into the hold queue
        ("admitted", "f8"),  # went to the pool, held before or not
        ("served", "f8"),
        ("abandoned", "f8"),
        *[(f"served_{name}", "f8") for name in PROMISES],
        # Last tick, sums over the admitted that stay: means and second moments
        ("stayed", "f8"),
        *[(f"{name}_{moment}", "f8") for name in ("ttft", "tpot", "e2e") for moment in ("sum", "square")],
        # Scratch
        ("inflow_per_s", "f8"),
        ("held_s", "f8"),  # mean age of what is released from the hold queue, weighted with its share of the inflow
        ("in_service", "f8"),  # share of the requests in service
        ("rate", "f8"),
        ("stays", "f8"),
        *[(f"new_{name}", "f8") for name in PROMISES],
        *[(f"new_{name}_{moment}", "f8") for name in ("ttft", "tpot", "e2e") for moment in ("s", "square")],
    ]
)

PROVIDER = np.dtype([("requests_per_s", "f8"), ("bucket_size", "f8")])


@dataclasses.dataclass(frozen=True, eq=False)
class FluidSpec:
    """A fleet for the surrogate.

    Attributes:
        curves: (P) one calibrated replica per pool.
        replicas: (P,) replicas at the start.
        in_flight_caps: (P,) requests per replica at the start.
        lag_s: (P,) seconds from an order of replicas to the first request: provisioning and loading.
        deadline_s: (K,) until which a class may be held; inf: not delay-tolerant.
        providers: third parties, in the order in which spilled work fills them.
    """

    curves: tuple[Curves, ...]
    replicas: Sequence[float]
    in_flight_caps: Sequence[float]
    lag_s: Sequence[float]
    deadline_s: Sequence[float]
    providers: tuple[ProviderSpec, ...] = ()

    def __post_init__(self) -> None:
        for field in ("replicas", "in_flight_caps", "lag_s"):
            values = getattr(self, field)
            if len(values) != len(self.curves) or min(values) < 0.0:
                raise InputError(f"fluid fleet: {field} = {list(values)}, legal is 0 or more for each pool")


@dataclasses.dataclass(frozen=True, eq=False)
class Fluid:
    """Arrays of N worlds; shapes in the module's docstring."""

    spec: FluidSpec
    pools: Any
    classes: Any
    curves: Array
    kept: Array
    deadline_s: Array
    providers: Any
    stations: Any
    orders: Any
    flows: Any
    held: Array
    clocks_s: Array
    spills: Array

    @property
    def arrays(self) -> tuple[Any, ...]:
        """Constants and state, in the order of the kernels' arguments."""
        return tuple(getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "spec")


def _padded(tables: Sequence[Array]) -> Array:
    """Tables (L_p, ...) of all pools in one array (P, L, ...), the last row repeated."""
    rows = max(len(table) for table in tables)
    return np.stack([np.concatenate([table, np.repeat(table[-1:], rows - len(table), axis=0)]) for table in tables])


def allocate_fluid(spec: FluidSpec, n_worlds: int) -> Fluid:
    """Arrays of `n_worlds` worlds at time 0, empty, with the replicas of the start."""
    n_pools, n_classes = len(spec.curves), len(spec.deadline_s)
    pools, classes = record_array(n_pools, POOL), record_array((n_pools, n_classes), CLASS)
    for p, curves in enumerate(spec.curves):
        levels = len(curves.curves)
        pools["slots"][p], pools["levels"][p] = curves.slots, levels
        pools["level_scale"][p] = (levels - 1) / max(math.log(curves.slots), 1e-9)
        pools["wait_scale"][p] = (WAITS - 1) / math.log1p(curves.top_wait_s / WAIT_UNIT_S)
        pools["kv_tokens"][p] = curves.kv_tokens
        classes["share"][p], classes["unfit_share"][p] = curves.class_share, curves.unfit_share
        classes["context_tokens"][p] = curves.context_tokens
    pools["lag_s"], pools["replicas"], pools["in_flight_cap"] = spec.lag_s, spec.replicas, spec.in_flight_caps
    providers = record_array(len(spec.providers), PROVIDER)
    for v, provider in enumerate(spec.providers):
        providers["requests_per_s"][v] = provider.rate_limit.requests_per_s
        providers["bucket_size"][v] = provider.rate_limit.size_requests
    fluid = Fluid(
        spec=spec,
        pools=pools,
        classes=classes,
        curves=_padded([curves.curves for curves in spec.curves]),
        kept=_padded([curves.kept for curves in spec.curves]),
        deadline_s=np.asarray(spec.deadline_s, dtype=np.float64),
        providers=providers,
        stations=record_array((n_worlds, n_pools), STATION),
        orders=record_array((n_worlds, n_pools, ORDERS), ORDER),
        flows=record_array((n_worlds, n_pools, n_classes), FLOW),
        held=np.zeros((n_worlds, n_pools, n_classes, AGES)),
        clocks_s=np.zeros(n_worlds),
        spills=np.zeros((n_worlds, len(spec.providers), n_classes + 1)),
    )
    for w in range(n_worlds):
        reset_fluid(fluid, w)
    return fluid


def reset_fluid(fluid: Fluid, w: int) -> None:
    """Empties world `w` at time 0."""
    for array in (fluid.stations, fluid.orders, fluid.flows):
        array[w] = np.zeros((), dtype=array.dtype)
    fluid.held[w], fluid.clocks_s[w], fluid.spills[w] = 0.0, 0.0, 0.0
    fluid.spills[w, :, -1] = fluid.providers["bucket_size"]
    stations = fluid.stations
    stations["ready"][w] = stations["replica_target"][w] = fluid.pools["replicas"]
    stations["in_flight_cap"][w] = fluid.pools["in_flight_cap"]
    stations["release_per_s"][w] = np.inf
