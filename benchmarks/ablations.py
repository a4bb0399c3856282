"""What each ingredient of the training recipe is worth: one row per ingredient switched off.

Every row trains with one switch of configs/training changed and plays the same validation episodes (seeds that neither
chose a checkpoint nor passed a gate) as the heuristic that the full recipe starts from, argmax and paired. A row and a
seed is a folder of its own under --out; what is finished there is not repeated, so an interrupted table goes on.

Try:
  python -m benchmarks.ablations --steps 300000 --seeds 0,1,2 --out runs/ablations
  python -m benchmarks.ablations --only no_feedback,no_shadow_price
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import common
from marginroute.cli import Parser, main_guard
from marginroute.errors import InputError

ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "full": ("the recipe of configs/training/default.yaml", {}),
    "no_residual": ("the network decides alone", {"residual": False}),
    "no_fitted": ("advice with the public prior of P(good)", {"fitted": False}),
    "no_shadow_price": ("no charge for the capacity taken", {"shadow_price": False}),
    "ledger_signal": ("reward: the ledger's change, discounted over 5 s", {"signal": "ledger", "tau_s": 5.0}),
    "no_stagger": ("all worlds start together", {"stagger": False}),
    "no_teaching": ("PPO from the first step", {"taught_share": 0.0}),
    "teaching_alone": ("no PPO after it", {"taught_share": 1.0}),
    "no_randomise": ("the middle of the scenario's ranges alone", {"randomise": False}),
    "no_feedback": ("the network does not hear of judged answers", {"sees": "load"}),
    "sees_all": ("the network looks at load, latency and prices too", {"sees": "all"}),
    "tau_5": ("later decisions' signals count, discounted over 5 s", {"tau_s": 5.0}),
    "tau_30": ("the same over 30 s", {"tau_s": 30.0}),
}
"""Row: what is changed, in words and as overrides of the training configuration."""
FIRST_SEED = 30_000  # of the validation episodes that rows are compared on


def parser() -> Parser:
    """The command line."""
    parse = common.parser(__doc__)
    parse.add_argument("scenario", nargs="?", default="quickstart", help="name in configs/scenarios or path of a YAML")
    parse.add_argument("--set", nargs="+", default=[], action="extend", metavar="KEY=VALUE", help="for all rows")
    parse.add_argument("--steps", type=int, default=300_000, metavar="N", help="decisions per row (default: 300000)")
    parse.add_argument("--seeds", default="0", metavar="A,B,...", help="training seeds (default: 0)")
    parse.add_argument("--episodes", type=int, default=64, metavar="N", help="validation episodes (default: 64)")
    parse.add_argument("--only", default="", metavar="ROW,...", help=f"some of {', '.join(ROWS)} (default: all)")
    parse.add_argument("--out", type=Path, default=Path("runs/ablations"), metavar="DIR", help="folder of the rows")
    return parse


@main_guard
def main(argv: list[str] | None = None) -> int:
    """Trains what is missing, and prints the figures; --quick trains every row for one update."""
    args = parser().parse_args(argv)
    rows = args.only.split(",") if args.only else list(ROWS)
    for name in rows:
        if name not in ROWS:
            raise InputError(f"--only {name!r} is not legal; legal: {', '.join(ROWS)}")
    try:
        seeds = [int(seed) for seed in args.seeds.split(",")]
    except ValueError:
        raise InputError(f"--seeds {args.seeds!r} is not legal; legal are whole numbers separated by commas") from None
    from benchmarks import ablation_runs
    from envs.scenario import load_scenario
    from evaluation.arguments import pairs

    scenario = load_scenario(args.scenario, pairs(args.set, "--set"))
    if not scenario.ranges and not args.only:
        rows.remove("no_randomise")  # nothing to switch off
    settings = {"steps": 1 if args.quick else args.steps, "episodes": 4 if args.quick else args.episodes}
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in rows}
    for name in rows:
        for seed in seeds:
            common.note(f"{name}, seed {seed}")
            folder = args.out / scenario.name / f"{name}_{seed}"
            found[name].append(ablation_runs.row(scenario, folder, ROWS[name][1], seed, **settings))
    print(table(found), file=sys.stderr)
    common.emit("ablations", {"rows": found}, scenario=scenario.name, scenario_hash=scenario.hash, **settings)
    return 0


def table(found: Mapping[str, list[Mapping[str, Any]]]) -> str:
    """The rows as a Markdown table: one column per training seed."""
    seeds = max(len(results) for results in found.values())
    head = ["ingredient", "what changes", *(f"gain, seed {result['seed']}" for result in next(iter(found.values())))]
    lines = [head, ["---"] * (2 + seeds)]
    for name, results in found.items():
        gains = ["{delta_usd_per_1k:+z.3f} [{ci95[0]:+z.3f}, {ci95[1]:+z.3f}]".format(**result) for result in results]
        lines.append([name, ROWS[name][0], *gains])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    sys.exit(main())
