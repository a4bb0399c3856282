"""N fluid worlds of a scenario: the controller's clock, one control tick per step.

`FluidWorlds` is to control ticks what `envs.worlds.FleetWorlds` is to requests: same scenario, contracts and ledger
accounts, but arrivals come as amounts per class and pool, and levers take the place of choices. Building one measures
the curves of every pool (`envs.fleet.fluid_curves`, about a second each), once per pool and sample in a process.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from envs import fluid_money
from envs.economics.ledger import ACCOUNTS, COUNTS
from envs.fleet.fluid_curves import CREDITED, SLO_OK, Curves, calibrate, promises_kept
from envs.fleet.fluid_loop import Run, Sample
from envs.fleet.fluid_state import PROMISES, FluidSpec, allocate_fluid, reset_fluid
from envs.fleet.spec import PoolSpec
from envs.fleet.state import record_array
from envs.plant import Plant
from envs.scenario import Scenario
from envs.workload.requests import Workload
from marginroute import pricing
from marginroute.errors import InputError
from marginroute.view import PROVIDER

Array = np.ndarray[Any, Any]

IN_FLIGHT_CAP, REPLICA_TARGET, RELEASE_PER_S = range(3)  # columns of the levers of a pool
SHED_SHARE, SPILL_SHARE = range(2)  # columns of the levers of a class
_EPISODES = 8  # training episodes whose requests are the sample
_UNKNOWN_TERMS = {
    "request_usd": 0.0,
    "quota_requests": math.inf,
    "prepaid_usd": math.inf,
    "committed_usd": 0.0,
    "rate_per_s": math.inf,
    "context_tokens": math.inf,
    "window_s": math.inf,
    "bad_lifetime_usd": 0.0,
    "missed_lifetime_usd": 0.0,
    "unserved_lifetime_usd": 0.0,
}
_MEMBERS_OWN = re.compile(
    r"load_scale$|workload\.(arrivals|season)|fleet\.pools\.[^.]+\.(gpu|reserved_gpu|energy_|spot\.gpu)|"
    r"fleet\.providers\.[^.]+\.(price_of|.*_usd)|plans\.plans\."
)
_CURVES: dict[tuple[Any, ...], Curves] = {}


def sample_of(terms: Array, workloads: Sequence[Workload]) -> Sample:
    """The requests of some episodes, with what they are promised by their contracts."""

    def column(name: str) -> Array:
        return np.concatenate([getattr(workload, name) for workload in workloads])

    k, prompts, outputs = column("class_index"), column("prompt_tokens"), column("output_tokens")
    prices = (terms["input_usd_per_token"][k], terms["output_usd_per_token"][k])
    return Sample(
        class_index=k,
        prompt_tokens=prompts,
        output_tokens=outputs,
        patience_s=column("patience_s"),
        slo_s=np.stack([terms[f"slo_{name}_s"] for name in ("ttft", "tpot", "e2e")], axis=1),
        credit_share=np.stack([terms[f"{name}_credit_share"] for name in ("ttft", "tpot", "e2e")], axis=1),
        value_usd=pricing.tokens_usd(prompts, outputs, *prices) + terms["request_value_usd"][k],
    )


def curves_of(pool: PoolSpec, sample: Sample) -> Curves:
    """`calibrate`, remembered for pools and samples that are equal in all that it depends on."""
    profile = pool.profile
    same = dataclasses.replace(pool, name="", tier=0, replicas=1, max_replicas=0, reserved_replicas=0, spot_replicas=0)
    tables = (profile.token_s, profile.decode_base_s, profile.decode_slope_s, profile.prefill_s)
    arrays = [*tables, *(getattr(sample, field.name) for field in dataclasses.fields(sample))]
    numbers = (
        profile.prefill_square_s,
        profile.prefill_product_s,
        profile.prefill_prefix_s,
        profile.multi_prefill_share,
    )
    fields = tuple((f.name, getattr(same, f.name)) for f in dataclasses.fields(same) if f.name != "profile")
    key = (fields, numbers, tuple(hashlib.sha256(np.ascontiguousarray(array)).digest() for array in arrays))
    if key not in _CURVES:
        _CURVES[key] = calibrate(pool, sample)
    return _CURVES[key]


def check_modelled(plant: Plant) -> None:
    """Refuses what amounts of requests per class cannot tell.

    Raises:
        InputError: a class is entitled to some stations only, or its contract has terms about single customers,
            requests or windows.
    """
    serving = plant.agreed.allowed[:, plant.layout.kind <= PROVIDER]
    for name, may, term in zip(plant.layout.class_names, serving, plant.terms, strict=True):
        found = [key for key, off in _UNKNOWN_TERMS.items() if term[key] != off]
        if term["cached_input_usd_per_token"] != term["input_usd_per_token"]:
            found.append("cached_input_usd_per_token")
        found += [] if may.all() else ["entitlements"]
        found += ["hedge_after_s"] if plant.scenario.plans.classes[name].hedge_after_s is not None else []
        if found:
            raise InputError(
                f"scenario {plant.scenario.name!r}: class {name} has {found[0]}, which the fluid surrogate of the "
                "controller does not know; legal there is a class without"
            )


def check_members(scenario: Scenario) -> None:
    """Refuses a family whose members differ in more than money and traffic: curves are measured once for all.

    Raises:
        InputError: a range of something else.
    """
    for key in scenario.ranges:
        if not _MEMBERS_OWN.match(key):
            raise InputError(
                f"scenario {scenario.name!r}, ranges: {key} would change what the fluid surrogate measures once; legal "
                "with a controller are load_scale, arrivals, and prices of GPUs, providers and plans"
            )


def _stacked(rows: Sequence[Any]) -> Any:
    """Record arrays of all members in one."""
    stacked = record_array((len(rows), *rows[0].shape), rows[0].dtype)
    for i, row in enumerate(rows):
        stacked[i] = row
    return stacked


class FluidWorlds:
    """N independent fluid worlds of a scenario.

    Args:
        scenario: what is simulated (or its `Plant`).
        n_worlds: N.
        workloads: episodes whose requests stand for all others; None: training episodes of the scenario.

    Raises:
        InputError: the scenario uses something that the surrogate does not model.

    Attributes:
        fluid: state and figures of the last tick, `envs.fleet.fluid_state`.
        variant: (N,) the member of the family whose money counts in a world.
        terms, prices, answers, last_provider: of the F members: (F, K), (F, P), (F, P + V, K), (F, K).
        ledger_usd: (N, A, K + 1), as `FleetWorlds.ledger_usd`.
        counts: (N, len(COUNTS), K) f8.
        rewards_usd: (N,) change of the ledger by the last tick.
    """

    def __init__(self, scenario: Scenario | Plant, n_worlds: int, workloads: Sequence[Workload] | None = None) -> None:
        self.plant = scenario if isinstance(scenario, Plant) else Plant(scenario)
        self.n_worlds = n_worlds
        plant = self.plant
        check_members(plant.scenario)
        for member in plant.members:
            check_modelled(member)
        if workloads is None:
            workloads = [plant.scenario.generate(seed, "train") for seed in range(_EPISODES)]
        self.sample = sample_of(plant.terms, workloads)
        pools, customers = plant.spec.pools, plant.scenario.plans.classes.values()
        self.fluid = allocate_fluid(
            FluidSpec(
                curves=tuple(curves_of(pool, self.sample) for pool in pools),
                replicas=[float(pool.replicas) for pool in pools],
                in_flight_caps=[float(pool.in_flight_cap) for pool in pools],
                lag_s=[pool.provision_s + pool.load_s for pool in pools],
                deadline_s=[c.delay_tolerant.deadline_s if c.delay_tolerant else math.inf for c in customers],
                providers=plant.spec.providers,
            ),
            n_worlds,
        )
        self.terms = _stacked([member.terms for member in plant.members])
        self.prices = _stacked([self._prices(member) for member in plant.members])
        self.answers = _stacked([self._answers(member, workloads) for member in plant.members])
        self.last_provider = np.stack([member.agreed.last_provider for member in plant.members])
        self.variant = np.zeros(n_worlds, dtype=np.int64)
        self.ledger_usd = np.zeros((n_worlds, len(ACCOUNTS), len(plant.terms) + 1))
        self.counts = np.zeros((n_worlds, len(COUNTS), len(plant.terms)))
        self.margins_usd, self.rewards_usd = np.zeros(n_worlds), np.zeros(n_worlds)

    def _prices(self, plant: Plant) -> Any:
        prices = record_array(len(plant.spec.pools), fluid_money.PRICE)
        for p, pool in enumerate(plant.scenario.fleet.pools.values()):
            prices["energy_input_usd"][p] = pool.energy_input_usd_per_mtok * 1e-6
            prices["energy_output_usd"][p] = pool.energy_output_usd_per_mtok * 1e-6
            prices["replica_usd_per_s"][p] = pool.gpus_per_replica * pool.gpu_usd_per_hour / 3600.0
            prices["reserved_usd_per_s"][p] = pool.gpus_per_replica * pool.reserved_usd_per_hour / 3600.0
            prices["reserved_replicas"][p] = pool.reserved_replicas
            prices["on_demand_replicas"][p] = pool.first_spot - pool.reserved_replicas
            if pool.spot is not None:
                prices["spot_usd_per_s"][p] = pool.gpus_per_replica * pool.spot.gpu_usd_per_hour / 3600.0
        return prices

    def _answers(self, plant: Plant, workloads: Sequence[Workload]) -> Any:
        spec, sample, fleet = plant.spec, self.sample, plant.scenario.fleet
        stations = [*spec.pools, *spec.providers]
        answers = record_array((len(stations), len(plant.terms)), fluid_money.ANSWER)
        counts = np.maximum(np.bincount(sample.class_index, minlength=answers.shape[1]), 1)

        def mean(of: Array) -> Array:
            return np.bincount(sample.class_index, weights=of, minlength=answers.shape[1]) / counts

        answers["prompt_tokens"], answers["output_tokens"] = mean(sample.prompt_tokens), mean(sample.output_tokens)
        p_good = np.concatenate([workload.p_good for workload in workloads])
        noise = np.concatenate([workload.provider_noise for workload in workloads])
        for s, station in enumerate(stations):
            answers["p_good"][s] = mean(p_good[:, station.tier])
        for v, (station, prices) in enumerate(
            zip(spec.providers, fleet.providers.values(), strict=True), len(spec.pools)
        ):
            ttft_s = station.ttft_s * np.exp(station.ttft_sigma * noise[:, 0])
            tpot_s = station.tpot_s * np.exp(station.tpot_sigma * noise[:, 1])
            latency_s = np.stack([ttft_s, tpot_s, ttft_s + tpot_s * (sample.output_tokens - 1)], axis=1)
            patient = dataclasses.replace(sample, patience_s=np.full(len(noise), np.inf))
            kept = promises_kept(Run(1.0, 0.0, np.arange(len(noise)), latency_s), patient, np.zeros(1))[0]
            for column, name in zip((*range(SLO_OK + 1), CREDITED), PROMISES, strict=True):
                answers[name][v] = kept[:, column]
            usd = prices.usd_per_token()[::2]
            answers["cost_usd"][v] = pricing.tokens_usd(answers["prompt_tokens"][v], answers["output_tokens"][v], *usd)
        return answers

    def reset(self, w: int, variant: int = 0) -> None:
        """Empties world `w` at time 0, with the money of a member of the scenario's family."""
        self.variant[w] = variant
        reset_fluid(self.fluid, w)
        for array in (self.ledger_usd, self.counts, self.margins_usd, self.rewards_usd):
            array[w] = 0.0

    def default_levers(self) -> tuple[Array, Array]:
        """(N, P, 3) and (N, K, 2) levers that leave everything as the scenario has it, and hold nothing."""
        n, spec = self.n_worlds, self.fluid.spec
        pool_levers = np.empty((n, len(spec.replicas), 3))
        pool_levers[..., IN_FLIGHT_CAP] = spec.in_flight_caps
        pool_levers[..., REPLICA_TARGET] = spec.replicas
        pool_levers[..., RELEASE_PER_S] = np.inf
        return pool_levers, np.zeros((n, len(spec.deadline_s), 2))

    def step(
        self, arrivals: Array, pool_levers: Array, class_levers: Array, tick_s: float, running: Array | None = None
    ) -> None:
        """Carries out one control tick in every world.

        Args:
            arrivals: (N, P, K) requests.
            pool_levers: (N, P, 3) in-flight cap per replica, replicas wanted, held requests released per second.
            class_levers: (N, K, 2) share shed, and share of the rest that spills to the providers.
            tick_s: Length of the tick.
            running: (N,) bool, worlds that move on; None: all.

        Raises:
            InputError: `tick_s` is not positive, or an array has the wrong shape.
        """
        shapes = {
            "arrivals": (arrivals, self.fluid.flows.shape),
            "pool_levers": (pool_levers, (*self.fluid.stations.shape, 3)),
            "class_levers": (class_levers, (self.n_worlds, len(self.plant.terms), 2)),
        }
        for name, (array, shape) in shapes.items():
            if np.shape(array) != shape:
                raise InputError(f"fluid step: {name} has shape {np.shape(array)}, legal is {shape}")
        if not 0.0 < tick_s < math.inf:
            raise InputError(f"fluid step: tick_s = {tick_s!r}, legal is a number above 0")
        floats = [np.ascontiguousarray(array, dtype=np.float64) for array, _ in shapes.values()]
        running = np.ones(self.n_worlds, np.bool_) if running is None else running
        fluid_money.step(*self._arguments, *floats, float(tick_s), running)

    def settle(self, w: int) -> None:
        """Ends world `w` as the engine does: the fleet runs dry, held work is bought; posted as one more reward."""
        fluid_money.settle(*self._arguments, self.last_provider, w)

    @property
    def _arguments(self) -> tuple[Any, ...]:
        return (
            *self.fluid.arrays,
            self.terms,
            self.prices,
            self.answers,
            self.variant,
            self.ledger_usd,
            self.counts,
            self.margins_usd,
            self.rewards_usd,
        )
