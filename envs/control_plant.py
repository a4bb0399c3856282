"""What a scenario looks like to a controller, and the traffic of its episodes as amounts per tick."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from envs.fluid_worlds import curves_of, sample_of
from envs.plant import Plant
from envs.scenario import ControlSection, Scenario, Split
from envs.workload.compose import arrivals_of
from envs.workload.requests import Workload
from marginroute.control import ControlLayout

Array = np.ndarray[Any, Any]

SAMPLE_S = 3600.0  # of each sampled episode: lengths do not depend on the hour
SAMPLE_EPISODES = 4
HISTORY_EPISODES = 16  # training episodes from which an operator knows the season
HOURS = 48
LEAST_USD = 1e-12  # what is free counts as this, since ratios are told


def sample_workloads(scenario: Scenario) -> list[Workload]:
    """Requests that stand for all others, from the beginnings of training episodes."""
    short = scenario.model_copy(update={"horizon_s": min(scenario.horizon_s, SAMPLE_S), "requests_per_episode": None})
    return [short.generate(seed, "train") for seed in range(SAMPLE_EPISODES)]


class Traffic(NamedTuple):
    """An episode of the surrogate.

    Attributes:
        arrivals: (T, K) requests per control tick and class.
        variant: the member of the scenario's family that it takes place in.
    """

    arrivals: Array
    variant: int = 0


def traffic_of(scenario: Scenario, seed: int, split: Split, tick_s: float) -> Traffic:
    """The requests of `scenario.generate`, counted, at a tenth of its cost.

    Follow-ups of sessions count at their nominal times.
    """
    drawn, (variant, rng) = None, scenario.stream(seed, split)
    if scenario.trace is None:
        drawn = arrivals_of(scenario.variants[variant].workload_spec, rng)
    if drawn is None:
        workload = scenario.generate(seed, split)
        drawn = workload.arrived_at_s, workload.class_index
    return Traffic(counts_of(*drawn, scenario.horizon_s, tick_s, len(scenario.class_names)), variant)


def counts_of(arrived_at_s: Array, class_index: Array, horizon_s: float, tick_s: float, classes: int) -> Array:
    """(T, K) arrivals per tick of requests at times (M,) with classes (M,)."""
    ticks = math.ceil(horizon_s / tick_s - 1e-9)
    inside = arrived_at_s < horizon_s
    tick = np.minimum((arrived_at_s[inside] / tick_s).astype(np.int64), ticks - 1)
    return np.bincount(tick * classes + class_index[inside], minlength=ticks * classes).reshape(ticks, classes) * 1.0


def prices_usd(plant: Plant) -> dict[str, float]:
    """Prices that a controller may know: of an hour of a replica, and of tokens and calls by their geometric mean."""
    fleet, terms = plant.scenario.fleet, plant.terms
    prices = {f"gpu:{name}": pool.gpus_per_replica * pool.gpu_usd_per_hour for name, pool in fleet.pools.items()}
    for name, provider in fleet.providers.items():
        input_usd, _, output_usd = provider.usd_per_token()
        prices[f"api:{name}"] = math.sqrt(input_usd * output_usd)
    for name, term in zip(plant.layout.class_names, terms, strict=True):
        tokens_usd = math.sqrt(term["input_usd_per_token"] * term["output_usd_per_token"])
        prices[f"call:{name}"] = tokens_usd or float(term["request_value_usd"])
    return {name: max(float(usd), LEAST_USD) for name, usd in prices.items()}


class ControlPlant:
    """A scenario as a controller's constants.

    Args:
        scenario: what is controlled, or its plant.
        tick_s: control tick; None: the scenario's.

    Attributes:
        plant: of the worlds.
        layout: what there is to control.
        ticks: T, of an episode.
        start_s: second of the week at which episodes begin.
    """

    def __init__(self, scenario: Scenario | Plant, tick_s: float | None = None) -> None:
        self.plant = scenario if isinstance(scenario, Plant) else Plant(scenario)
        scenario = self.plant.scenario
        self.tick_s = tick_s or (scenario.control or ControlSection()).tick_s  # type: ignore[call-arg]
        self.ticks = math.ceil(scenario.horizon_s / self.tick_s - 1e-9)
        season = scenario.workload.season
        self.start_s = 3600.0 * season.start_h if season is not None and season.start_h is not None else 0.0

    @cached_property
    def sample(self) -> Sequence[Workload]:
        """Requests that the surrogate is calibrated with."""
        return sample_workloads(self.plant.scenario)

    @cached_property
    def layout(self) -> ControlLayout:
        """Calibrates every pool (seconds), which is the operator's load test."""
        scenario, spec = self.plant.scenario, self.plant.spec
        sample = sample_of(self.plant.terms, self.sample)
        customers, queue = scenario.plans.classes.values(), scenario.fleet.batch_queue
        pools = scenario.fleet.pools.values()
        return ControlLayout(
            pool_names=scenario.pool_names,
            class_names=scenario.class_names,
            provider_names=scenario.provider_names,
            tick_s=self.tick_s,
            min_replicas=np.array(
                [float(pool.replicas if pool.max_replicas is None else max(pool.min_replicas, 1)) for pool in pools]
            ),
            max_replicas=np.array([float(pool.rows) for pool in pools]),
            start_replicas=np.array([float(pool.replicas) for pool in pools]),
            slots=np.array([float(pool.max_num_seqs) for pool in spec.pools]),
            lag_s=np.array([pool.provision_s + pool.load_s for pool in spec.pools]),
            requests_per_s=np.array([curves_of(pool, sample).requests_per_s for pool in spec.pools]),
            deadline_s=np.array(
                [c.delay_tolerant.deadline_s if c.delay_tolerant and queue else math.inf for c in customers]
            ),
            season_per_s=self._season(),
            allowance=np.array([p.rate_limit.size_requests for p in spec.providers], dtype=np.float64),
            refill_per_s=np.array([p.rate_limit.requests_per_s for p in spec.providers], dtype=np.float64),
            price_names=self._price_names,
            usual_usd=self.prices_usd(self.plant),
        )

    @cached_property
    def _price_names(self) -> tuple[str, ...]:
        """Prices in which the members of a family differ from each other."""
        usd = [prices_usd(member) for member in self.plant.members]
        return tuple(name for name in usd[0] if len({of[name] for of in usd}) > 1)

    def prices_usd(self, plant: Plant) -> Array:
        """(X,) prices of a member, in the order of `ControlLayout.price_names`."""
        of = prices_usd(plant)
        return np.array([of[name] for name in self._price_names])

    @cached_property
    def member_usd(self) -> Array:
        """(F, X) prices of every member of the family."""
        return np.stack([self.prices_usd(member) for member in self.plant.members])

    def _season(self) -> Array:
        """(H, K) mean arrivals per second by time of the day over training episodes; the mean where there were none."""
        scenario = self.plant.scenario
        season = scenario.workload.season
        counts = np.mean(
            [traffic_of(scenario, seed, "train", self.tick_s).arrivals for seed in range(HISTORY_EPISODES)], axis=0
        )
        rates = counts / self.tick_s
        hours = HOURS if season is not None and season.start_h is not None else 1
        at = (self.start_s + (np.arange(self.ticks) + 0.5) * self.tick_s) % 86400.0 / 86400.0 * hours
        nearest = np.rint(at).astype(np.int64) % hours
        seen = np.maximum(np.bincount(nearest, minlength=hours), 0)[:, None]
        totals = np.stack([np.bincount(nearest, weights=row, minlength=hours) for row in rates.T], axis=1)
        return np.where(seen > 0, totals / np.maximum(seen, 1), rates.mean(axis=0))
