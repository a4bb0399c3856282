"""The fluid surrogate: control ticks per CPU-second, and its errors against the engine on the same arrivals.

Speed is that of whole ticks, money included, 256 worlds side by side: on one pool with 1 and with 64 replicas, and on
the starter fleet (3 pools, 3 classes, one provider). The error table compares throughput, utilisation, SLO attainment
and margin over 10 minutes of 4 replicas, 15 s per tick, on two profiles: see `benchmarks.fluid_cases`.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import numpy as np

from benchmarks import common
from marginroute.cli import main_guard

WORLDS = 256
TICKS_S = (5.0, 15.0, 60.0)


def ticks_per_cpu_s(plant: Any, replicas: int, tick_s: float, ticks: int) -> int:
    """Median of five runs at 80 % load."""
    from benchmarks import fluid_cases as case
    from envs.fluid_money import step

    fluid, ledger_usd, counts, levers, prices, answers = case.worlds_of(plant, WORLDS, replicas, case.CAP)
    per_s = 0.8 * replicas * plant.requests_per_s(case.CAP)
    rng = np.random.default_rng(0)
    arrivals = rng.poisson(per_s * tick_s * np.array(case.SHARE), (ticks, WORLDS, 1, 3)).astype(float)
    variants, money = np.zeros(WORLDS, np.int64), (np.zeros(WORLDS), np.zeros(WORLDS))
    arrays = (plant.terms[None], prices, answers, variants, ledger_usd, counts, *money)
    seconds = []
    for _ in range(5):
        start = time.process_time()
        for t in range(ticks):
            step(
                *fluid.arrays,
                *arrays,
                arrivals[t],
                levers,
                np.zeros((WORLDS, 3, 2)),
                tick_s,
                np.ones(WORLDS, dtype=np.bool_),
            )
        seconds.append(time.process_time() - start)
    return round(ticks * WORLDS / float(np.median(seconds[1:])))


def starter_ticks_per_cpu_s(tick_s: float, ticks: int) -> int:
    """The same on `quickstart`."""
    from envs.fluid_worlds import FluidWorlds
    from envs.scenario import load_scenario

    worlds = FluidWorlds(load_scenario("quickstart"), WORLDS)
    pool_levers, class_levers = worlds.default_levers()
    arrivals = np.random.default_rng(0).poisson(0.5 * tick_s, (ticks, WORLDS, 3, 3)).astype(float)
    worlds.step(arrivals[0], pool_levers, class_levers, tick_s)
    start = time.process_time()
    for t in range(ticks):
        worlds.step(arrivals[t], pool_levers, class_levers, tick_s)
    return round(ticks * WORLDS / (time.process_time() - start))


def error_table(plants: dict[str, Any], quick: bool) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Errors per quantity (median and worst, near the knee and away from it), and the rows behind them."""
    from benchmarks import fluid_cases as case

    rows: list[dict[str, Any]] = []
    for profile, plant in plants.items():
        for one in case.cases()[:: 4 if quick else 1]:
            engine, fluid = case.run_engine(plant, one), case.run_fluid(plant, one)
            off = {name: round(value, 2) for name, value in case.errors(engine, fluid).items()}
            rows.append({"profile": profile, "case": one.name, "near_knee": case.near_knee(one), **off})
            rows[-1] |= {"engine": engine, "fluid": fluid}
            common.note(f"{profile}, {one.name}: {off}")
    table = {}
    for name in off:
        for where, knee in (("", None), ("_away_from_knee", False), ("_near_knee", True)):
            found = [row for row in rows if knee is None or row["near_knee"] == knee]
            sizes = np.abs([row[name] for row in found])
            worst = found[int(np.argmax(sizes))]
            table[name + where] = {
                "median": round(float(np.median(sizes)), 2),
                "p90": round(float(np.quantile(sizes, 0.9)), 2),
                "worst": worst[name],
                "worst_case": f"{worst['profile']}, {worst['case']}",
            }
    return table, rows


@main_guard
def main(argv: list[str] | None = None) -> int:
    """Measures and prints."""
    quick = common.parser(__doc__).parse_args(argv).quick
    from benchmarks import fluid_cases as case

    plants = {}
    for profile in case.SLO_S:
        common.note(f"curves of {profile}")
        plants[profile] = case.plant_of(profile)
    start = time.process_time()
    first = next(iter(case.SLO_S))
    case.plant_of(first)
    calibrate_s = time.process_time() - start
    figures: dict[str, Any] = {"calibrate_cpu_s": round(calibrate_s, 2)}
    for replicas in (1, 64):
        for tick_s in TICKS_S:
            speed = ticks_per_cpu_s(plants[first], replicas, tick_s, 5 if quick else 40)
            figures[f"ticks_per_cpu_s_{replicas}_{tick_s:g}s"] = speed
    for tick_s in TICKS_S:
        figures[f"starter_ticks_per_cpu_s_{tick_s:g}s"] = starter_ticks_per_cpu_s(tick_s, 5 if quick else 40)
    figures["errors"], rows = error_table(plants, quick)
    figures["other_mixes"] = {}
    for profile, plant in plants.items():
        for one in case.other_mixes()[:: 4 if quick else 1]:
            off = case.errors(case.run_engine(plant, one), case.run_fluid(plant, one))
            figures["other_mixes"][f"{profile}, {one.name}"] = {name: round(value, 2) for name, value in off.items()}
    common.emit("fluid", figures, rows=rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
