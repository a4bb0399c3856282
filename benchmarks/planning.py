"""What planning is worth to a controller: model-predictive control against the tuned rule that it plans around.

Both play the same validation days of the fluid surrogate. `gain_usd_per_1k` is paired by day, with its 95 % interval;
`accounts_usd_per_day` says where it comes from, `plans` how often each kind of plan was begun. `--levers` leaves plans
that move other levers out, which says where there is room for a learner.

Try:
  python -m benchmarks.planning
  python -m benchmarks.planning day_night --days 8 --levers replicas
"""

from __future__ import annotations

import sys
import time
from typing import Any

import numpy as np

from benchmarks import common
from marginroute.cli import main_guard


@main_guard
def main(argv: list[str] | None = None) -> int:
    """Prints the figures."""
    parse = common.parser(__doc__)
    parse.add_argument("scenario", nargs="?", default="day_night", help="with tuned controllers (default: day_night)")
    parse.add_argument("--days", type=int, default=8, metavar="N", help="validation days (default: 8)")
    parse.add_argument("--levers", default="cap,replicas,release,spill", help="what plans move (default: all)")
    args = parse.parse_args(argv)
    from agents import baselines
    from envs.control_mpc import MpcSettings
    from envs.control_plant import ControlPlant
    from envs.scenario import load_scenario

    scenario = load_scenario(args.scenario)
    plant = ControlPlant(scenario)
    rules, best = baselines.load_controllers(baselines.file_for(scenario), plant.layout)
    settings = MpcSettings(levers=tuple(args.levers.split(",")))
    common.emit(
        "planning",
        figures(plant, rules[best], settings, 2 if args.quick else args.days),
        scenario=args.scenario,
        rule=best,
        levers=args.levers,
    )
    return 0


def figures(plant: Any, rule: Any, settings: Any, days: int) -> dict[str, Any]:
    """Of a rule and the controller that plans around it, on the first validation days after those of the router."""
    from agents.control_tuning import FIRST_VALIDATION_SEED, play
    from envs.control_mpc import MpcController
    from envs.control_plant import traffic_of
    from envs.control_worlds import FluidControl
    from envs.economics.ledger import ACCOUNTS
    from evaluation.statistics import paired_estimate

    seeds = range(FIRST_VALIDATION_SEED, FIRST_VALIDATION_SEED + days)
    episodes = [traffic_of(plant.plant.scenario, seed, "validation", plant.layout.tick_s) for seed in seeds]
    calls = np.array([traffic.arrivals.sum() for traffic in episodes])
    worlds, twins = FluidControl(plant, days), FluidControl(plant, days)
    rule_usd = play(twins, rule, episodes) * calls / 1000.0
    controller = MpcController(plant.plant.scenario, rule.anew(), settings)
    for w, traffic in enumerate(episodes):
        worlds.load(w, traffic)
    controller.prepare(plant)
    begun_s = time.process_time()
    while not worlds.done.all():
        worlds.step(controller.act(worlds.view()))
    spent_s = time.process_time() - begun_s
    usd = worlds.ledger_usd.sum(axis=(1, 2))
    gain = paired_estimate(usd - rule_usd, calls, scale=1000.0)
    moved = (worlds.ledger_usd - twins.ledger_usd).sum(axis=2).mean(axis=0)
    return {
        "days": days,
        "rule_usd_per_1k": round(float(1000.0 * rule_usd.sum() / calls.sum()), 4),
        "gain_usd_per_1k": round(gain.mean, 4),
        "ci95": [round(gain.low, 4), round(gain.high, 4)],
        "gain_pct": round(100.0 * float((usd - rule_usd).sum() / rule_usd.sum()), 2),
        "accounts_usd_per_day": {name: round(float(x), 2) for name, x in zip(ACCOUNTS, moved, strict=True) if x},
        "ms_per_decision": round(1e3 * spent_s / max(sum(controller.taken.values()), 1), 1),
        "plans": dict(sorted(controller.taken.items(), key=lambda row: -row[1])),
    }


if __name__ == "__main__":
    sys.exit(main())
