"""The fleet, the workload and the compiled episode of benchmarks/simulator.py."""

# ruff: noqa: ANN001, ANN201 (Numba infers the types of kernels)
from __future__ import annotations

from typing import Any

import numpy as np

from envs.fleet import scaling
from envs.fleet.allocation import Fleet, allocate
from envs.fleet.engine import drain, pop_finished, reset_world, submit
from envs.fleet.hashes import load_hashes
from envs.fleet.profile import compact_profile
from envs.fleet.provider import provider_available, submit_provider
from envs.fleet.replay import least_in_flight, run_least_in_flight
from envs.fleet.spec import FleetSpec, PoolSpec, ProviderSpec
from envs.fleet.state import NO_CAP
from envs.kernels import kernel
from envs.scenario_files import locate, read_yaml

PROFILE = "llama-3.1-8b-h100"
PROMPT = {"median_tokens": 800, "sigma": 0.8, "min_tokens": 8, "max_tokens": 8000}
OUTPUT = {"median_tokens": 150, "sigma": 0.8, "min_tokens": 2, "max_tokens": 2000}
FOLLOW_UPS, RECENT, SYSTEM_PROMPTS, SYSTEM_BLOCKS = 0.7, 500, 8, 16
CAP, TTFT_S, TPOT_S = 96, 0.5, 0.02
FAILURES, REPAIR_S, LOAD_S, DETECT_S = 8, 5.0, 10.0, 0.5
GATEWAY, PRODUCT = ("gateway", "product-no-hash", "product"), ("product-no-hash", "product")


def spec(replicas: int, mode: str) -> FleetSpec:
    """The benchmark's fleet in one of the modes of benchmarks/simulator.py."""
    data = read_yaml(locate(PROFILE, "profile"))
    gateway, product = mode in GATEWAY, mode in PRODUCT
    pool = PoolSpec(
        "gpu",
        compact_profile(PROFILE, data),
        replicas=replicas,
        kv_blocks=data["kv_cache"]["blocks"],
        max_num_seqs=256,
        max_num_batched_tokens=2048,
        scheduler="sarathi" if mode == "parity" else "vllm-v1",
        vidur_quirks=mode == "parity",
        in_flight_cap=CAP if gateway else NO_CAP,
        prefix_caching=mode == "product",
        scheduling_policy="priority" if product else "fcfs",
        load_s=LOAD_S,
        detect_s=DETECT_S,
    )
    providers = (ProviderSpec("api", ttft_s=TTFT_S, tpot_s=TPOT_S, requests_per_minute=6000.0),) if gateway else ()
    return FleetSpec((pool,), providers, scrape_interval_s=1.0 if gateway else 1e12)


@kernel
def least_in_flight_up(replicas, w):
    """Replica with the fewest in flight among those that the gateway takes for up, the lowest index among equals.

    Returns:
        Its index, or -1 if none is up.
    """
    best = -1
    for r in range(replicas.shape[1]):
        less = best < 0 or replicas[w, r].in_flight < replicas[w, best].in_flight
        if less and scaling.takes_requests(replicas[w, r]):
            best = r
    return best


@kernel
def run_product(pools, tables, worlds, replicas, slots, providers, requests, w, arrived_at_s, fails_at_s, fails, limit):
    """One episode with failures; what is beyond `limit` in flight at every replica spills to the first provider.

    A request that a failure ends is not sent again here.
    """
    reset_world(pools, tables, worlds, replicas, slots, providers, requests, w)
    ended, failure = 0, 0
    for i in range(arrived_at_s.shape[0]):
        now_s = arrived_at_s[i]
        while failure < fails.shape[0] and fails_at_s[failure] <= now_s:
            at_s = fails_at_s[failure]
            scaling.advance(pools, tables, worlds, replicas, slots, providers, requests, w, at_s)
            scaling.fail_replica(
                pools, tables, worlds, replicas, slots, providers, requests, w, fails[failure], at_s + REPAIR_S, at_s
            )
            failure += 1
        scaling.advance(pools, tables, worlds, replicas, slots, providers, requests, w, now_s)
        while pop_finished(worlds, requests, w) >= 0:
            ended += 1
        r = least_in_flight_up(replicas, w)
        spill = r < 0 or replicas[w, r].in_flight >= limit
        if spill and provider_available(providers, w, 0, now_s):
            submit_provider(pools, tables, worlds, replicas, slots, providers, requests, w, 0, i, now_s, TTFT_S, TPOT_S)
        else:
            submit(pools, tables, worlds, replicas, slots, providers, requests, w, max(r, 0), i, now_s)
    scaling.advance(pools, tables, worlds, replicas, slots, providers, requests, w, arrived_at_s[-1] + 1e6)
    drain(pools, tables, worlds, replicas, slots, providers, requests, w)
    while pop_finished(worlds, requests, w) >= 0:
        ended += 1
    return ended


def lengths(rng: np.random.Generator, law: dict[str, float], n: int) -> Any:
    """Lognormal token counts (n,), cut off at both ends."""
    tokens = rng.lognormal(np.log(law["median_tokens"]), law["sigma"], n)
    return np.clip(tokens, law["min_tokens"], law["max_tokens"]).astype(np.int64)


def _conversations(prompts: Any, outputs: Any, block_size: int) -> tuple[Any, Any]:
    """Ragged block hashes of requests (n,): see benchmarks/simulator.py; of its past a request repeats what fits."""
    rng = np.random.default_rng(7)
    fresh = 1 << 20
    recent = [np.arange(SYSTEM_BLOCKS) + i * SYSTEM_BLOCKS for i in range(SYSTEM_PROMPTS)]
    lists: list[Any] = []
    for prompt, blocks in zip(prompts // block_size, (prompts + outputs - 1) // block_size, strict=True):
        past = lists[-min(len(lists), RECENT) :] if lists and rng.random() < FOLLOW_UPS else recent
        shared = past[rng.integers(0, len(past))][:prompt]
        lists.append(np.concatenate([shared, np.arange(fresh, fresh + blocks - len(shared))]))
        fresh += blocks
    return np.array([len(own) for own in lists]), np.concatenate(lists)


class Episode:
    """A fleet with requests filled in, ready to run again and again.

    Args:
        replicas: Engines.
        mode: A mode of benchmarks/simulator.py.
        n: Requests.
        requests_per_s: Rate of Poisson arrivals.
    """

    def __init__(self, replicas: int, mode: str, n: int, requests_per_s: float) -> None:
        rng = np.random.default_rng(20_261_123)
        fleet_spec = spec(replicas, mode)
        prompts, outputs = lengths(rng, PROMPT, n), lengths(rng, OUTPUT, n)
        caching = mode == "product"
        hashes = _conversations(prompts, outputs, fleet_spec.pools[0].block_size_tokens) if caching else ([], [])
        self.fleet: Fleet = allocate(fleet_spec, 1, n, len(hashes[1]))
        self.mode = mode
        rows = self.fleet.requests[0]
        rows["prompt_tokens"], rows["output_tokens"] = prompts, outputs
        load_hashes(self.fleet, 0, hashes)
        self.arrived_at_s = np.cumsum(rng.exponential(1.0 / requests_per_s, n))
        gateway = mode in GATEWAY
        rows["patience_until_s"] = self.arrived_at_s + rng.lognormal(np.log(8.0), 0.5, n) if gateway else np.inf
        rows["priority"] = rng.integers(0, 3, n) if mode in PRODUCT else 0
        failures = FAILURES if mode in PRODUCT and replicas > 1 else 0
        self.fails_at_s = self.arrived_at_s[-1] * (np.arange(failures) + 0.5) / max(failures, 1)
        self.fails = rng.integers(0, replicas, failures)

    def run(self) -> int:
        """Plays the episode and returns how many requests ended."""
        if self.mode not in GATEWAY:
            replicas = self.fleet.replicas.shape[1]
            return int(run_least_in_flight(*self.fleet.arrays, 0, self.arrived_at_s, 0, replicas))
        return int(run_product(*self.fleet.arrays, 0, self.arrived_at_s, self.fails_at_s, self.fails, CAP))


def warm_up() -> None:
    """Compiles, or loads from the cache, everything that is measured."""
    for mode in ("base", "product"):
        Episode(2, mode, 8, 10.0).run()
    least_in_flight(Episode(2, "base", 1, 1.0).fleet.replicas, 0, 0, 2)
