"""Simulated requests per CPU-second of the engine, with a router that reads every replica at every arrival.

The fleet is Llama-3.1-8B on H100 (vLLM V1 scheduler, 2,048 tokens per iteration, 256 sequences), the requests are
lognormal conversations at three utilisations of the measured capacity. Each arrival advances the whole world and
compares all replicas in one compiled rule. Rows called `base` run the engine alone; rows called `full` add what a
gateway's world has: scrapes every second, users who leave, an in-flight cap with its hold queue, and a rate-limited
provider that takes what the caps refuse. `requests_per_cpu_s_R` is the slowest of the six rows with R replicas.

Rows called `prefix` are `full` with prefix caching, at 80 % of the same capacity, whose requests have a hash for every
block: 70 % go on from one of the last 500 conversations, answer included, the rest begin with one of 8 system prompts
of 256 tokens. The router does not look at prefixes, so more replicas reuse less.
`prefix_requests_per_cpu_s_R` is theirs.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from typing import Any

import numpy as np
from numba import njit

from benchmarks import common
from envs.fleet.engine import advance, drain, pop_finished, reset_world, submit
from envs.fleet.hashes import load_hashes
from envs.fleet.profile import compact_profile
from envs.fleet.provider import provider_available, submit_provider
from envs.fleet.replay import least_in_flight
from envs.fleet.state import NO_CAP, Fleet, FleetSpec, PoolSpec, ProviderSpec, allocate
from envs.scenario_files import locate, read_yaml

PROFILE = "llama-3.1-8b-h100"
REPLICAS = (1, 16, 64)
UTILISATIONS = (0.5, 0.8, 0.95)
PROMPT = {"median_tokens": 800, "sigma": 0.8, "min_tokens": 8, "max_tokens": 8000}
OUTPUT = {"median_tokens": 150, "sigma": 0.8, "min_tokens": 2, "max_tokens": 2000}
FEATURES = {
    "base": ["continuous batching", "chunked prefill", "KV blocks and preemption", "router reads every replica"],
    "full": [
        "all of base",
        "scrapes every 1 s",
        "abandonment",
        "in-flight cap 96 and hold queue",
        "provider, 6,000 / min",
    ],
    "prefix": ["all of full", "prefix cache, every block of every request hashed"],
}
FOLLOW_UPS, RECENT, SYSTEM_PROMPTS, SYSTEM_BLOCKS = 0.7, 500, 8, 16
_COMPILE = "import benchmarks.simulator as s, time; s.warm_up(); print(time.process_time())"


def spec(replicas: int, full: bool, caching: bool = False) -> FleetSpec:
    """The benchmark's fleet."""
    data = read_yaml(locate(PROFILE, "profile"))
    pool = PoolSpec(
        "gpu",
        compact_profile(PROFILE, data),
        replicas=replicas,
        kv_blocks=data["kv_cache"]["blocks"],
        max_num_seqs=256,
        max_num_batched_tokens=2048,
        in_flight_cap=96 if full else NO_CAP,
        prefix_caching=caching,
    )
    providers = (ProviderSpec("api", ttft_s=0.5, tpot_s=0.02, requests_per_minute=6000.0),) if full else ()
    return FleetSpec((pool,), providers, scrape_interval_s=1.0 if full else 1e12)


@njit(cache=True, nogil=True)
def run_episode(pools, tables, worlds, replicas, slots, providers, requests, w, arrived_at_s, limit):  # noqa: ANN001, ANN201
    """One episode; with providers, requests beyond `limit` in flight at every replica spill to the first of them."""
    reset_world(pools, tables, worlds, replicas, slots, providers, requests, w)
    ended = 0
    for i in range(arrived_at_s.shape[0]):
        now_s = arrived_at_s[i]
        advance(pools, tables, worlds, replicas, slots, providers, requests, w, now_s)
        while pop_finished(worlds, requests, w) >= 0:
            ended += 1
        r = least_in_flight(replicas, w, 0, replicas.shape[1])
        spill = replicas[w, r].in_flight >= limit and providers.shape[1] > 0
        if spill and provider_available(providers, w, 0, now_s):
            submit_provider(pools, tables, worlds, replicas, slots, providers, requests, w, 0, i, now_s, 0.5, 0.02)
        else:
            submit(pools, tables, worlds, replicas, slots, providers, requests, w, r, i, now_s)
    drain(pools, tables, worlds, replicas, slots, providers, requests, w)
    while pop_finished(worlds, requests, w) >= 0:
        ended += 1
    return ended


def _lengths(rng: np.random.Generator, law: dict[str, float], n: int) -> Any:
    tokens = rng.lognormal(np.log(law["median_tokens"]), law["sigma"], n)
    return np.clip(tokens, law["min_tokens"], law["max_tokens"]).astype(np.int64)


def _conversations(prompts: Any, outputs: Any, block_size: int) -> tuple[Any, Any]:
    """Ragged block hashes of requests (n,), see above; of its past a request repeats what its prompt has room for."""
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


def prepare(replicas: int, full: bool, n: int, requests_per_s: float, caching: bool = False) -> tuple[Fleet, Any]:
    """A fleet with `n` requests filled in, and their arrival times (n,)."""
    rng = np.random.default_rng(20_261_123)
    fleet_spec = spec(replicas, full, caching)
    prompts, outputs = _lengths(rng, PROMPT, n), _lengths(rng, OUTPUT, n)
    hashes = _conversations(prompts, outputs, fleet_spec.pools[0].block_size_tokens) if caching else ([], [])
    fleet = allocate(fleet_spec, 1, n, len(hashes[1]))
    rows = fleet.requests[0]
    rows["prompt_tokens"], rows["output_tokens"] = prompts, outputs
    load_hashes(fleet, 0, hashes)
    arrived_at_s = np.cumsum(rng.exponential(1.0 / requests_per_s, n))
    rows["patience_until_s"] = arrived_at_s + rng.lognormal(np.log(8.0), 0.5, n) if full else np.inf
    return fleet, arrived_at_s


def warm_up() -> None:
    """Compiles, or loads from the cache, everything that is measured."""
    fleet, arrived_at_s = prepare(1, True, 8, 10.0)
    run_episode(*fleet.arrays, 0, arrived_at_s, 96)


def capacity(n: int) -> float:
    """Requests per second of one replica that never waits for work."""
    fleet, arrived_at_s = prepare(1, False, n, 1e9)
    run_episode(*fleet.arrays, 0, arrived_at_s, 96)
    return n / float(fleet.requests["completed_at_s"].max())


def measure(replicas: int, features: str, utilisation: float, n: int, rate: float, repeats: int) -> dict[str, Any]:
    """One row: the median of `repeats` runs, in requests per second of this process's CPU time."""
    full, caching = features != "base", features == "prefix"
    fleet, arrived_at_s = prepare(replicas, full, n, rate * utilisation * replicas, caching)
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        ended = run_episode(*fleet.arrays, 0, arrived_at_s, 96)
        seconds.append(time.process_time() - start)
        if ended != n:
            raise AssertionError(f"{ended} of {n} requests ended")
    rows = fleet.requests[0]
    ttft_s = rows["first_token_at_s"] - arrived_at_s
    return {
        "replicas": replicas,
        "features": features,
        "utilisation": utilisation,
        "requests": n,
        "requests_per_cpu_s": round(n / float(np.median(seconds))),
        "fastest": round(n / min(seconds)),
        "iterations_per_request": round(float(fleet.replicas["iterations"].sum()) / n, 2),
        "abandoned": int((rows["status"] == 3).sum()),
        "to_provider": int((rows["replica"] < 0).sum()),
        "cached_share": round(float(rows["cached_tokens"].sum() / rows["prompt_tokens"].sum()), 3),
        "ttft_p50_s": round(float(np.nanpercentile(ttft_s, 50)), 4),
        "ttft_p99_s": round(float(np.nanpercentile(ttft_s, 99)), 4),
    }


def starts() -> tuple[float, float]:
    """CPU seconds of a first start with an empty kernel cache, less those of a second start; and those alone."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "NUMBA_CACHE_DIR": folder}
        runs = [
            subprocess.run(
                [sys.executable, "-c", _COMPILE], env=environment, capture_output=True, text=True, check=True
            )
            for _ in range(2)
        ]
    first, second = (float(run.stdout) for run in runs)
    return first - second, second


def decisions_per_cpu_s(steps: int, n_worlds: int = 64) -> float:
    """Decisions per CPU-second of the whole environment of `quickstart` (view, settlement, ledger), legal at random."""
    from envs.scenario import load_scenario
    from envs.worlds import FleetWorlds

    scenario = load_scenario("quickstart")
    worlds = FleetWorlds(scenario, n_worlds)
    worlds.load_all([scenario.generate(seed, "train") for seed in range(n_worlds)])
    draws = np.random.default_rng(0).random((steps, *worlds.legal.shape))
    seconds = 0.0
    for step in range(steps):
        choices = np.argmax(draws[step] * worlds.legal, axis=1)
        if step == steps // 10:  # compiled and in the middle of the episode by now
            seconds = time.process_time()
        worlds.step(choices)
    return (steps - steps // 10) * n_worlds / (time.process_time() - seconds)


def world_mib(replicas: int, requests: int) -> float:
    """Memory of one world."""
    fleet = allocate(spec(replicas, True), 1, requests)
    arrays = (fleet.worlds, fleet.replicas, fleet.slots, fleet.providers, fleet.requests)
    return sum(array.nbytes for array in arrays) / 2**20


def main(argv: list[str] | None = None) -> int:
    """Measures and prints."""
    arguments = common.parser(__doc__).parse_args(argv)
    n, repeats = (4_000, 1) if arguments.quick else (60_000, 5)
    common.note("compiling")
    compile_s, second_start_s = starts()
    warm_up()
    rate = capacity(2_000 if arguments.quick else 8_000)
    rows = []
    for replicas in REPLICAS:
        cases = [(features, utilisation) for features in ("base", "full") for utilisation in UTILISATIONS]
        for features, utilisation in [*cases, ("prefix", 0.8)]:
            row = measure(replicas, features, utilisation, n, rate, repeats)
            rows.append(row)
            words = f"{features} at {utilisation:.0%}: {row['requests_per_cpu_s']:,} per CPU-second"
            common.note(f"{replicas} replicas, {words}")
    figures: dict[str, Any] = {}
    for prefix, features in (("", ("base", "full")), ("prefix_", ("prefix",))):
        for replicas in REPLICAS:
            these = [row for row in rows if row["replicas"] == replicas and row["features"] in features]
            figures[f"{prefix}requests_per_cpu_s_{replicas}"] = min(row["requests_per_cpu_s"] for row in these)
    figures |= {
        "decisions_per_cpu_s": round(decisions_per_cpu_s(60 if arguments.quick else 300)),
        "compile_s": round(compile_s, 2),
        "second_start_s": round(second_start_s, 2),
        "world_mib": round(world_mib(16, 2_000), 2),
        "world_of": {"replicas": 16, "requests": 2_000},
        "capacity_requests_per_s": round(rate, 2),
        "fleet": {"profile": PROFILE, "scheduler": "vllm-v1", "max_num_seqs": 256, "max_num_batched_tokens": 2048},
        "workload": {"prompt": PROMPT, "output": OUTPUT, "arrivals": "Poisson", "utilisations": UTILISATIONS},
        "features": FEATURES,
        "rows": rows,
    }
    common.emit("simulator", figures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
