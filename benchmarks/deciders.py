"""What each decider is worth where a scenario has a controller: alone, in turn, and after a joint round.

Held-out days of the engine, the same for every row. `gain_usd_per_1k` is over both deciders tuned alone: the router
with levers at rest, the controller's rule beside a gateway that only balances. Networks count as the mean over the
runs, one per training seed, as their gates exported them. The joint round is the router's price of congestion, chosen
anew beside the tuned rule.

Try:
  python -m benchmarks.deciders runs/results/day_night-0 runs/results/day_night-1 runs/results/day_night-2
  python -m benchmarks.deciders runs/day_night --days 8
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import common
from marginroute.cli import main_guard
from marginroute.errors import InputError

ALONE = "each tuned alone"


@main_guard
def main(argv: list[str] | None = None) -> int:
    """Prints the figures."""
    parse = common.parser(__doc__)
    parse.add_argument(
        "runs",
        nargs="*",
        type=Path,
        metavar="RUN",
        help="run folders of one scenario (default: runs/results/day_night-*)",
    )
    parse.add_argument("--days", type=int, default=32, metavar="N", help="held-out days (default: 32)")
    args = parse.parse_args(argv)
    if args.days < 2:
        raise InputError(f"--days {args.days} is not legal; legal is 2 or more")
    from agents.run import Run
    from evaluation.protocol import evaluate_policies

    runs = args.runs or sorted(Path("runs/results").glob("day_night-*"))
    if not runs:
        raise InputError("runs/results holds no day_night-SEED; train them with python -m benchmarks.results day_night")
    scenario = Run(runs[0]).scenario()
    rows = entrants(scenario, runs)
    days = 2 if args.quick else args.days
    entered = {f"{name} {i}": pair for name, row in rows.items() for i, pair in enumerate(row)}
    results = evaluate_policies(scenario, entered, days)
    common.emit("deciders", gains(rows, results), scenario=scenario.name, days=days, runs=len(runs))
    return 0


def entrants(scenario: Any, runs: list[Path]) -> dict[str, list[Any]]:
    """Who plays, by the name of the row: one entrant, or one per run."""
    from agents import baselines
    from agents.run import load_bundle
    from envs.control_plant import ControlPlant
    from evaluation.deciders import Deciders

    if scenario.control is None:
        raise InputError(f"scenario {scenario.name!r} of {runs[0]} has no controller; legal are runs of one that has")
    path = baselines.file_for(scenario, runs[0])
    rules, best = baselines.load_controllers(path, ControlPlant(scenario).layout)
    bundles = [load_bundle(run, scenario) for run in runs]
    alone, beside, rule = baselines.advice_and_fallback(path)[0], baselines.router_beside(path), rules[best]
    learned = [bundle.controller for bundle in bundles]
    routers = [alone if bundle.learned == "none" else bundle.guarded() for bundle in bundles]
    return {
        "shipped controller (hpa)": [Deciders(rules["hpa"], alone)],
        ALONE: [Deciders(rule, alone)],
        "router network": [Deciders(rule, router) for router in routers],
        "controller network": [Deciders(controller, alone) for controller in learned],
        "both, in turn": [Deciders(c, router) for c, router in zip(learned, routers, strict=True)],
        "no router": [Deciders(rule)],
        "joint round, rules": [Deciders(rule, beside)],
        "joint round, both": [Deciders(controller, beside) for controller in learned],
    }


def gains(rows: Mapping[str, list[Any]], results: Mapping[str, Any]) -> dict[str, Any]:
    """Margin and gain of every row."""
    from evaluation.statistics import paired_estimate

    base = results[f"{ALONE} 0"]
    found = {}
    for name, row in rows.items():
        usd = np.mean([results[f"{name} {i}"].margin_usd for i in range(len(row))], axis=0)
        gain = paired_estimate(usd - base.margin_usd, base.first_calls, scale=1000.0)
        found[name] = {
            "usd_per_1k": round(float(1000.0 * usd.sum() / base.first_calls.sum()), 4),
            "gain_usd_per_1k": round(gain.mean, 4),
            "ci95": [round(gain.low, 4), round(gain.high, 4)],
        }
    return found


if __name__ == "__main__":
    sys.exit(main())
