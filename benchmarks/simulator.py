"""Simulated requests per CPU-second of the engine, with a router that reads every replica at every arrival.

The fleet is Llama-3.1-8B on H100 (vLLM V1 scheduler, 2,048 tokens per iteration, 256 sequences), the requests are
lognormal conversations at shares of the measured capacity. Each arrival advances the whole world and compares all
replicas in one compiled rule, which a test holds to `least-in-flight` of marginroute/rules.py. Modes:

* base: the engine alone;
* parity: the same with Vidur's Sarathi scheduler and its quirks;
* gateway: base, and what a gateway's world has: scrapes every second, users who leave, an in-flight cap of 96 with its
  hold queue, and a rate-limited provider that takes what the caps refuse;
* product-no-hash: gateway, and three priorities, and with several replicas eight failures with repair and reload;
* product: all of it, and prefix caching with a hash for every block of every request: 70 % go on from one of the last
  500 conversations, answer included, the rest begin with one of 8 system prompts of 256 tokens. The router does not
  look at prefixes, so more replicas reuse less.

`requests_per_cpu_s_R` is the slowest product row with R replicas; `MODE_requests_per_cpu_s_R` those of the others.
`decisions_per_cpu_s` steps the native FleetVecEnv (observations, masks, rewards, learning signal) of `quickstart`
with legal choices at random; `worlds_decisions_per_cpu_s` its worlds without the observations. The same worlds with
the conversations of `mooncake_conversation` (sessions, 14,000 tokens a prompt) make `sessions_decisions_per_cpu_s`, and
with prefix caching in all pools, hashes of every block in the engines and in the gateway's record,
`prefix_decisions_per_cpu_s`.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from typing import Any

from benchmarks import common
from marginroute.cli import main_guard

MODES = ("base", "parity", "gateway", "product-no-hash", "product")
REPLICAS = (1, 16, 64)
UTILISATIONS = {"base": (0.5, 0.8, 0.95), "gateway": (0.5, 0.8, 0.95), "product": (0.5, 0.8, 0.95)}
SESSIONS = {"workload": "mooncake_conversation", "requests_per_episode": None}
CACHING = {f"fleet.pools.{pool}.prefix_caching": True for pool in ("small", "medium", "large")}
_COMPILE = "import benchmarks.simulator_fleet as s, time; s.warm_up(); print(time.process_time())"


def capacity(n: int) -> float:
    """Requests per second of one replica that never waits for work."""
    from benchmarks.simulator_fleet import Episode

    episode = Episode(1, "base", n, 1e9)
    episode.run()
    return n / float(episode.fleet.requests["completed_at_s"].max())


def measure(replicas: int, mode: str, utilisation: float, n: int, rate: float, repeats: int) -> dict[str, Any]:
    """One row: the median of `repeats` runs, in requests per second of this process's CPU time."""
    import numpy as np

    from benchmarks.simulator_fleet import Episode

    episode = Episode(replicas, mode, n, rate * utilisation * replicas)
    fleet = episode.fleet
    seconds = []
    for _ in range(repeats + 1):  # the first one touches the memory
        start = time.process_time()
        ended = episode.run()
        seconds.append(time.process_time() - start)
        if ended != n:
            raise AssertionError(f"{ended} of {n} requests ended")
    rows = fleet.requests[0]
    ttft_s = rows["first_token_at_s"] - episode.arrived_at_s
    return {
        "replicas": replicas,
        "mode": mode,
        "utilisation": utilisation,
        "requests": n,
        "requests_per_cpu_s": round(n / float(np.median(seconds[1:]))),
        "fastest": round(n / min(seconds[1:])),
        "iterations_per_request": round(float(fleet.replicas["iterations"].sum()) / n, 2),
        "abandoned": int((rows["status"] == 3).sum()),
        "lost_to_failures": int(fleet.worlds["lost"][0]),
        "to_provider": int((rows["replica"] < 0).sum()),
        "cached_share": round(float(rows["cached_tokens"].sum() / rows["prompt_tokens"].sum()), 3),
        "ttft_p50_s": round(float(np.nanpercentile(ttft_s, 50)), 4),
        "ttft_p99_s": round(float(np.nanpercentile(ttft_s, 99)), 4),
        "world_mib": round(world_mib(fleet), 2),
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


def decisions_per_cpu_s(steps: int, n_worlds: int, native: bool, overrides: dict[str, Any] | None = None) -> float:
    """Decisions per CPU-second of `quickstart`, legal at random: the native VecEnv, or its worlds alone."""
    import numpy as np

    from envs.plant import Plant
    from envs.scenario import load_scenario
    from envs.vector_env import FleetVecEnv
    from envs.worlds import FleetWorlds

    plant = Plant(load_scenario("quickstart", overrides))
    if native:
        env = FleetVecEnv(plant, n_worlds, stagger=True)
        env.reset()
        legal = env.action_masks
        step = env.step
    else:
        worlds = FleetWorlds(plant, n_worlds)
        worlds.load_all([plant.scenario.generate(seed, "train") for seed in range(n_worlds)])
        step = worlds.step

        def legal() -> Any:
            return worlds.legal

    draws = np.random.default_rng(0).random((steps, *legal().shape))
    seconds = 0.0
    for i in range(steps):
        choices = np.argmax(draws[i] * legal(), axis=1)
        if i == steps // 10:  # compiled and in the middle of the episode by now
            seconds = time.process_time()
        step(choices)
    return (steps - steps // 10) * n_worlds / (time.process_time() - seconds)


def world_mib(fleet: Any) -> float:
    """Memory of one world."""
    arrays = (fleet.worlds, fleet.replicas, fleet.slots, fleet.providers, fleet.requests)
    return float(sum(array.nbytes for array in arrays) / len(fleet.worlds) / 2**20)


def figures(quick: bool) -> dict[str, Any]:
    """Everything that the benchmark prints."""
    from benchmarks import simulator_fleet as s

    n, repeats = (4_000, 1) if quick else (60_000, 5)
    common.note("compiling")
    compile_s, second_start_s = starts()
    s.warm_up()
    rate = capacity(2_000 if quick else 8_000)
    rows = []
    for replicas in REPLICAS:
        for mode in MODES:
            for utilisation in UTILISATIONS.get(mode, (0.8,)):
                rows.append(measure(replicas, mode, utilisation, n, rate, repeats))
                words = f"{mode} at {utilisation:.0%}: {rows[-1]['requests_per_cpu_s']:,} per CPU-second"
                common.note(f"{replicas} replicas, {words}")
    found: dict[str, Any] = {}
    for mode in reversed(MODES):
        for replicas in REPLICAS:
            these = [row for row in rows if row["replicas"] == replicas and row["mode"] == mode]
            name = "" if mode == "product" else f"{mode.replace('-', '_')}_"
            found[f"{name}requests_per_cpu_s_{replicas}"] = min(row["requests_per_cpu_s"] for row in these)
    steps = 60 if quick else 300
    common.note("decisions")
    return found | {
        "decisions_per_cpu_s": round(decisions_per_cpu_s(steps, 256, native=True)),
        "worlds_decisions_per_cpu_s": round(decisions_per_cpu_s(steps, 256, native=False)),
        "sessions_decisions_per_cpu_s": round(decisions_per_cpu_s(steps, 32, False, SESSIONS)),
        "prefix_decisions_per_cpu_s": round(decisions_per_cpu_s(steps, 32, False, SESSIONS | CACHING)),
        "compile_s": round(compile_s, 2),
        "second_start_s": round(second_start_s, 2),
        "world_mib": round(world_mib(s.Episode(16, "product", 2_000, 100.0).fleet), 2),
        "world_of": {"replicas": 16, "requests": 2_000, "mode": "product"},
        "capacity_requests_per_s": round(rate, 2),
        "fleet": {"profile": s.PROFILE, "scheduler": "vllm-v1", "max_num_seqs": 256, "max_num_batched_tokens": 2048},
        "workload": {"prompt": s.PROMPT, "output": s.OUTPUT, "arrivals": "Poisson"},
        "rows": rows,
    }


@main_guard
def main(argv: list[str] | None = None) -> int:
    """Measures and prints."""
    parser = common.parser(__doc__)
    arguments = parser.parse_args(argv)
    common.emit("simulator", figures(arguments.quick))
    return 0


if __name__ == "__main__":
    sys.exit(main())
