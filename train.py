# PYTHON_ARGCOMPLETE_OK
"""Trains a routing policy for a scenario, checks it on validation, and exports the better of policy and heuristic.

Try:
  python train.py                                     train on quickstart into runs/quickstart
  python train.py azure_conversation --trace FILE --trace-format azure-llm
  python train.py my_scenario.yaml -n 2000000 --seed 1 --out runs/mine --set training.learning_rate=5e-4
  python train.py --floor slo.enterprise=0.99 quality.team=0.85 shed.batch=0.01
  python train.py --optimize 40 -n 300000 --out runs/search   search the training's settings, then print the command
  python train.py --log decisions.jsonl --out runs/mine   learn who answers what well from a gateway's own log
  python train.py --resume runs/mine                  go on after an interruption
  python train.py day_night                           a scenario with a controller: both deciders in turn
  python train.py --ray auto                          tuning, rollouts and trials shared out over a Ray cluster
  python train.py --list                              scenarios that ship
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evaluation.arguments import check_trace_flags, complete_scenarios
from marginroute.cli import Parser, main_guard, note
from marginroute.errors import InputError, WorkError

STARTED_S = time.monotonic()
MAX_SEED = 400_000  # training seeds take 10,000 episodes each, out of the 2**32 that a split has
OF_THE_START = ("-n", "--steps", "--n-envs", "--set", "--seed", "--trace", "--floor", "--log", "--opt")

if TYPE_CHECKING:
    from agents.run import Run, Training
    from agents.workers import Crew


def parser() -> Parser:
    """The command line."""
    parse = Parser.from_doc("train.py", __doc__)
    scenario = parse.add_argument(
        "scenario", nargs="?", default="quickstart", help="name in configs/scenarios or path of a YAML"
    )
    complete_scenarios(scenario)
    parse.add_argument(
        "-n", "--steps", type=int, metavar="N", help="decisions to learn from (default: configs/training)"
    )
    parse.add_argument("--seed", type=int, default=0, help="training seed (default: 0)")
    parse.add_argument("--n-envs", type=int, metavar="N", help="worlds side by side (default: configs/training)")
    parse.add_argument("--out", type=Path, metavar="RUN", help="run folder (default: runs/SCENARIO)")
    parse.add_argument(
        "--set", nargs="+", default=[], action="extend", metavar="KEY=VALUE", help="overrides, dotted keys"
    )
    parse.add_argument(
        "--floor",
        nargs="+",
        default=[],
        action="extend",
        metavar="KEY=SHARE",
        help="what a class must reach: slo.CLASS, quality.CLASS (least), shed.CLASS (most)",
    )
    parse.add_argument("--resume", type=Path, metavar="RUN", help="go on from the newest checkpoint of a run folder")
    parse.add_argument("--retune", action="store_true", help="tune the baselines even if tuned values exist")
    parse.add_argument(
        "--optimize", type=int, metavar="TRIALS", help="search the training's settings by so many trainings"
    )
    parse.add_argument(
        "--workers", type=int, metavar="N", help="processes that share the work (default: 1; --optimize: one per core)"
    )
    parse.add_argument("--ray", metavar="ADDRESS", help="have a Ray cluster share the work: auto, local or HOST:PORT")
    parse.add_argument("--track", action="store_true", help="log to Weights & Biases (offline unless logged in)")
    parse.add_argument("-P", "--progress", action="store_true", help="progress as a bar even if stderr is no terminal")
    parse.add_argument("--trace", metavar="FILE", help="recorded requests in place of generated ones")
    parse.add_argument("--trace-format", metavar="NAME", help="layout of the trace (default: told from it)")
    parse.add_argument("--columns", metavar="NAME=COLUMN,...", help="for csv: our names and the file's columns")
    parse.add_argument("--log", type=Path, metavar="LOG", help="a gateway's decisions: refit P(good) on their outcomes")
    parse.add_argument("--list", action="store_true", help="list the scenarios that ship, and stop")
    parse.add_verbosity()
    return parse


@main_guard
def main(argv: list[str] | None = None) -> int:
    """Trains; bad input exits 2, an interruption leaves a checkpoint and exits 130."""
    arguments = sys.argv[1:] if argv is None else argv
    args = parser().parse_args(arguments)
    if args.list:
        return list_scenarios()
    check_flags(args)
    from agents.cluster import crew_of
    from evaluation.progress import force_bars

    if args.progress:
        force_bars()
    with crew_of(args.ray, args.workers) as workers:
        training = begun(args, arguments) if args.resume is None else resumed(args.resume, arguments)
        return carry_out(training, args.track, workers)


def check_flags(args: argparse.Namespace) -> None:
    """Refuses what can be refused before anything is read."""
    for flag, value, least in (
        ("-n", args.steps, 1),
        ("--seed", args.seed, 0),
        ("--n-envs", args.n_envs, 1),
        ("--optimize", args.optimize, 1),
        ("--workers", args.workers, 1),
    ):
        if value is not None and value < least:
            raise InputError(f"{flag} {value} is not legal; legal is {least} or more")
    if args.seed > MAX_SEED:
        raise InputError(f"--seed {args.seed} is not legal; legal is 0 to {MAX_SEED}")
    check_trace_flags(args)
    if args.optimize and args.floor:
        raise InputError("--optimize does not know floors; legal is one of --optimize and --floor")


def list_scenarios() -> int:
    """Prints name and description of every shipped scenario."""
    from envs import scenario_files

    for path in sorted((scenario_files.CONFIGS / "scenarios").glob("*.yaml")):
        print(f"{path.stem:<24}{scenario_files.read_yaml(path).get('description', '')}")
    return 0


def begun(args: argparse.Namespace, arguments: list[str]) -> Training:
    """A new training, from the command line."""
    from agents.config import load_training, split_overrides
    from agents.floors import parse as parse_floors
    from agents.run import Run, Training
    from envs.scenario import load_scenario
    from evaluation.arguments import pairs

    overrides, settings = split_overrides(pairs(args.set, "--set"))
    settings |= {key: x for key, x in (("steps", args.steps), ("n_envs", args.n_envs)) if x is not None}
    columns = pairs(args.columns.split(","), "--columns") if args.columns else None
    scenario = load_scenario(args.scenario, overrides, args.trace, args.trace_format, columns)
    refitted: dict[str, Any] = {}
    if args.log is not None:
        from evaluation.training import refit_on

        refitted = refit_on(args.log, scenario)
        scenario = load_scenario(args.scenario, overrides | refitted, args.trace, args.trace_format, columns)
    config = load_training(None, settings)
    parse_floors(args.floor, scenario.class_names)
    run = Run(args.out or Path("runs") / scenario.name)
    run.create(scenario, config, args.seed, shlex.join(["python", "train.py", *arguments]))
    run.update(retune=args.retune, floors=args.floor, optimize=args.optimize)
    if args.log is not None:
        run.update(log=str(args.log.resolve()), log_overrides=refitted)
    return Training(run, scenario, config, args.seed, STARTED_S)


def resumed(folder: Path, arguments: list[str]) -> Training:
    """The training of a run folder."""
    from agents.run import Run, Training

    given = [word for word in arguments if word.startswith(OF_THE_START)]
    if given:
        raise InputError(f"--resume goes on as the run was started; {given[0]} is not legal beside it")
    run = Run(folder)
    info = run.info()
    return Training(run, run.scenario(), run.config(), int(info["seed"]), STARTED_S, resumed=True)


def carry_out(training: Training, track: bool, workers: Crew | int | None) -> int:
    """All that a run was started for; its folder tells if it was interrupted."""
    run = training.run
    try:
        if trials := run.info().get("optimize"):
            return search(training, int(trials), workers)
        return finish(training, track, None if isinstance(workers, int) else workers)
    except (KeyboardInterrupt, WorkError):
        run.update(status="interrupted")
        note(f"go on with: python train.py --resume {run.folder}")
        raise
    except Exception as error:
        if not isinstance(error, InputError):
            run.update(status="failed")
        raise


def finish(training: Training, track: bool, crew: Crew | None) -> int:
    """The stages of a training: baselines, floors, router, controller, export, and what the log says of the policy."""
    from agents import baselines, run_lines
    from agents.export import export
    from agents.floors import parse as parse_floors
    from agents.run_baselines import hold_floors, tuned_baselines
    from agents.tracking import tracker
    from agents.train import router_scenario
    from envs import announce_compilation
    from envs.plant import Plant
    from evaluation.progress import progress_bar
    from evaluation.training import NOT_TRAINED, Router, controller_stage, judge_on, router_stage

    run, scenario, config = training.run, training.scenario, training.config
    announce_compilation()
    plant = Plant(router_scenario(scenario))
    floors = parse_floors(run.info().get("floors", ()), scenario.class_names)
    first = bool(floors)  # they change what is tuned, so that all of it is tuned before
    rules = tuned_baselines(run, plant, first, progress_bar, crew)
    held = hold_floors(run, plant, rules, floors)
    advice, fallback = baselines.advice_and_fallback(rules, config.fitted)
    log = tracker(run, scenario, training.seed) if track else lambda _: None

    router = Router(None, None, dict(NOT_TRAINED))
    if scenario.control is None or config.deciders != "controller":
        router = router_stage(training, plant, advice, fallback, held.get(advice.name), floors, log, crew)
    run.update(gate=router.verdict)
    if not router.verdict["learned"] and router.verdict.get("heuristic_breaks"):
        run.update(status="floor out of reach")
        raise InputError(run_lines.out_of_reach(router.verdict))
    levers = None if scenario.control is None else controller_stage(training, log)

    judged_by = {"gate": router.verdict}
    if levers is not None:
        judged_by["controller_gate"] = run.info()["controller"]["gate"]
    provenance = {key: run.info()[key] for key in ("command", "seed", "versions")}
    chosen = router.policy if router.verdict["learned"] else None
    if chosen is None:
        advice = baselines.router_beside(rules, config.fitted)
    export(plant, chosen, advice, router.spec, fallback, run.bundle_path, judged_by, provenance, levers=levers)
    tuned_baselines(run, plant, scenario.control is None, progress_bar, crew)
    if log_file := run.info().get("log"):
        judge_on(Path(log_file), run)
    run.update(status="finished")
    if router.policy is not None:
        print(run_lines.parity_line(run.info()))
        print(run_lines.verdict_line(router.verdict, advice.name))
    if levers is not None:
        print(run_lines.controller_line(run.info()["controller"]))
    command = shlex.join(["python", "evaluate.py", "--policy", str(run.folder)])  # plays what the run was trained on
    print(f"run folder {run.folder}; compare it: {command}")
    return 0


def search(training: Training, trials: int, workers: Crew | int | None) -> int:
    """Searches the training's settings, new or resumed, and says how to train with what was found."""
    from agents import baselines
    from agents.cluster import crew_of
    from agents.optimize import optimize
    from agents.run_baselines import tuned_baselines
    from agents.run_lines import search_line
    from agents.train import router_scenario
    from agents.workers import usable_cores
    from envs import announce_compilation
    from envs.plant import Plant
    from evaluation.progress import progress_bar

    if workers is None:
        with crew_of(None, min(usable_cores(), trials)) as own:
            return search(training, trials, own or 1)
    run, config = training.run, training.config
    announce_compilation()
    plant = Plant(router_scenario(training.scenario))
    crew = None if isinstance(workers, int) else workers
    rules = tuned_baselines(run, plant, False, progress_bar, crew)
    advice = baselines.advice_and_fallback(rules, config.fitted)[0]
    with progress_bar("searching (trainings)") as progress:
        found = optimize(plant, advice, config, run, training.seed, trials, progress, workers)
    run.update(status="searched", found=found)
    print(search_line(found, advice.name))
    print(again(run, found["settings"]))
    return 0


def again(run: Run, settings: Mapping[str, Any]) -> str:
    """The command that trains with other settings on the scenario, trace and overrides that a run was started with."""
    info = run.info()
    given = parser().parse_args(shlex.split(info["command"])[2:])
    words = ["python", "train.py", given.scenario]
    for flag, value in (("--trace", given.trace), ("--trace-format", given.trace_format), ("--columns", given.columns)):
        words += [flag, value] if value else []
    words += ["--set", *(word for word in given.set if not word.startswith("training."))]
    words += [f"{key}={value}" for key, value in info.get("log_overrides", {}).items()]
    return shlex.join([*words, *(f"training.{key}={value}" for key, value in settings.items())])


if __name__ == "__main__":
    sys.exit(main())
