"""What training brings: several seeds per scenario against the best tuned heuristic and against what gateways ship.

Every scenario is trained once per seed with train.py's defaults; runs that are finished are not repeated. The bundles,
whatever their gates exported, then play the held-out episodes of the scenario and of its held-out conditions beside all
tuned heuristics; a scenario's rows are kept beside its runs (NAME.rows.json) until one of these is another. A gain is
the mean over training seeds, paired by episode; p-values are adjusted over every row of the table (Holm). The table
goes to --out as Markdown.

Try:
  python -m benchmarks.results --seeds 0,1,2 --out docs/results.md
  python -m benchmarks.results quickstart shaky --steps 1000000
  python -m benchmarks.results day_night --episodes 16 --condition-episodes 0
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import common
from marginroute.cli import main_guard
from marginroute.errors import InputError
from marginroute.whole_file import write_whole

if TYPE_CHECKING:
    from agents.workers import Crew
    from envs.scenario import Scenario

EPISODES, DAYS = 256, 64  # of a scenario as it is; under a controller an episode is a day


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parse = common.parser(__doc__)
    parse.add_argument(
        "scenarios", nargs="*", help="names in configs/scenarios (default: all that have tuned baselines)"
    )
    parse.add_argument("--seeds", default="0,1,2", metavar="A,B,...", help="training seeds (default: 0,1,2)")
    parse.add_argument("--steps", type=int, metavar="N", help="decisions per training (default: configs/training)")
    parse.add_argument(
        "--episodes", type=int, metavar="N", help=f"held-out episodes of a scenario (default: {EPISODES}; days: {DAYS})"
    )
    parse.add_argument(
        "--condition-episodes",
        type=int,
        metavar="N",
        help="of a condition; 0: none (default: an eighth; days: a quarter)",
    )
    parse.add_argument("--workers", type=int, metavar="N", help="processes that play (default: one per core)")
    parse.add_argument("--runs", type=Path, default=Path("runs/results"), metavar="DIR", help="run folders")
    parse.add_argument("--out", type=Path, metavar="FILE.md", help="where the table goes (default: stderr)")
    return parse


@main_guard
def main(argv: Sequence[str] | None = None) -> int:
    """Trains what is missing, plays, prints the figures; --quick takes tiny trainings and few episodes."""
    args = parser().parse_args(argv)
    try:
        seeds = [int(seed) for seed in args.seeds.split(",")]
    except ValueError:
        raise InputError(f"--seeds {args.seeds!r} is not legal; legal are whole numbers separated by commas") from None
    for flag, least in (("episodes", 1), ("condition_episodes", 0), ("workers", 1)):
        if (value := getattr(args, flag)) is not None and value < least:
            raise InputError(f"--{flag.replace('_', '-')} {value} is not legal; legal is {least} or more")
    from agents.baselines import find
    from agents.cluster import crew_of
    from agents.workers import usable_cores
    from benchmarks import result_rows
    from envs.scenario import load_scenario
    from evaluation.suite import scenario_names

    found, steps = [], 1024 if args.quick else args.steps
    with crew_of(None, args.workers or usable_cores()) as workers:
        for name in args.scenarios or scenario_names():
            scenario = load_scenario(name)
            if find(scenario) is None and not args.scenarios:
                common.note(f"{name} is left out: it has no tuned baselines")
                continue
            runs = [_trained(name, seed, steps, args.runs) for seed in seeds]
            found += _rows(scenario, runs, _episodes(args, scenario.control is not None), args.runs, workers)
    result_rows.adjust(found)
    command = shlex.join(["python", "-m", "benchmarks.results", *(sys.argv[1:] if argv is None else argv)])
    text = result_rows.markdown(found, command)
    if args.out is None:
        common.note(text)
    else:
        args.out.write_text(text)
    common.emit("results", {"rows": found}, seeds=seeds, steps=steps)
    return 0


def _episodes(args: argparse.Namespace, days: bool) -> tuple[int, int]:
    """Of the scenario as it is, and of each condition."""
    if args.quick:
        return 4, 4
    whole = args.episodes or (DAYS if days else EPISODES)
    part = max(whole // (4 if days else 8), 1) if args.condition_episodes is None else args.condition_episodes
    return whole, part


def _rows(
    scenario: Scenario, runs: Sequence[Path], episodes: tuple[int, int], folder: Path, workers: Crew | int
) -> list[dict[str, Any]]:
    """A scenario's rows: those that are kept if they are of these bundles and episodes, else played and kept."""
    bundles = [hashlib.sha256((run / "bundle" / "manifest.json").read_bytes()).hexdigest() for run in runs]
    key = {"scenario_hash": scenario.hash, "bundles": bundles, "episodes": list(episodes)}
    path = folder / f"{scenario.name}.rows.json"
    kept = json.loads(path.read_text()) if path.is_file() else {}
    if kept.get("key") == key:
        return list(kept["rows"])
    from benchmarks import result_rows

    common.note(f"playing {scenario.name}")
    rows = result_rows.rows(scenario, runs, *episodes, workers)
    found = [{**row, "commit": common.commit()} for row in rows]
    write_whole(path, json.dumps({"key": key, "rows": found}, indent=1) + "\n")
    return found


def _trained(name: str, seed: int, steps: int | None, runs: Path) -> Path:
    """The folder of a finished run, trained if it is not there; an interrupted run goes on."""
    folder = runs / f"{name}-{seed}"
    if (folder / "bundle" / "manifest.json").is_file():
        return folder
    command = [sys.executable, "train.py", name, "--seed", str(seed), "--out", str(folder.resolve())]
    if (folder / "run.json").is_file():
        command = [sys.executable, "train.py", "--resume", str(folder.resolve())]
    elif steps is not None:
        command += ["-n", str(steps)]
    common.note("+ " + " ".join(command[1:]))
    done = subprocess.run(command, cwd=common.ROOT, stdout=sys.stderr)
    if done.returncode != 0:
        raise InputError(f"training {folder} ended with exit code {done.returncode}; its own message stands above")
    return folder


if __name__ == "__main__":
    sys.exit(main())
