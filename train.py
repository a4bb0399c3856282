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
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evaluation.arguments import check_trace_flags, complete_scenarios
from marginroute.cli import Parser, main_guard, note
from marginroute.errors import InputError

ADVICE, FALLBACK = "bid-price-fitted", "bid-price"  # what the network corrects, and what the guard hands over to
NOT_TRAINED = {"learned": False, "refused": ["not trained (training.deciders)"]}
STARTED_S = time.monotonic()
MAX_SEED = 400_000  # training seeds take 10,000 episodes each, out of the 2**32 that a split has

if TYPE_CHECKING:
    from agents.config import TrainingConfig
    from agents.run import Run
    from agents.workers import Crew
    from envs.scenario import Scenario


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
    from agents.cluster import crew_of
    from evaluation.progress import force_bars

    if args.progress:
        force_bars()
    with crew_of(args.ray, args.workers) as workers:
        return begin(args, arguments, workers)


def begin(args: argparse.Namespace, arguments: list[str], workers: Crew | int | None) -> int:
    """Makes the run folder, or finds it, and carries the run out."""
    from agents.config import load_training, split_overrides
    from agents.floors import parse as parse_floors
    from agents.run import Run

    if args.resume is not None:
        given = [
            word
            for word in arguments
            if word.startswith(("-n", "--steps", "--n-envs", "--set", "--seed", "--trace", "--floor", "--log", "--opt"))
        ]
        if given:
            raise InputError(f"--resume goes on as the run was started; {given[0]} is not legal beside it")
        run = Run(args.resume)
        info = run.info()
        return carry_out(run, run.scenario(), run.config(), int(info["seed"]), args, True, workers)
    from envs.scenario import load_scenario
    from evaluation.arguments import pairs

    overrides, training = split_overrides(pairs(args.set, "--set"))
    training |= {key: x for key, x in (("steps", args.steps), ("n_envs", args.n_envs)) if x is not None}
    columns = pairs(args.columns.split(","), "--columns") if args.columns else None
    scenario = load_scenario(args.scenario, overrides, args.trace, args.trace_format, columns)
    refitted: dict[str, Any] = {}
    if args.log is not None:
        refitted = refit_on(args.log, scenario)
        scenario = load_scenario(args.scenario, overrides | refitted, args.trace, args.trace_format, columns)
    config = load_training(None, training)
    parse_floors(args.floor, scenario.class_names)
    run = Run(args.out or Path("runs") / scenario.name)
    run.create(scenario, config, args.seed, shlex.join(["python", "train.py", *arguments]))
    run.update(retune=args.retune, floors=args.floor, optimize=args.optimize)
    if args.log is not None:
        run.update(log=str(args.log.resolve()), log_overrides=refitted)
    return carry_out(run, scenario, config, args.seed, args, False, workers)


def refit_on(log: Path, scenario: Scenario) -> dict[str, Any]:
    """What the outcomes of a log change in the scenario, by dotted key; prints how much."""
    import numpy as np

    from evaluation.log_training import refit
    from evaluation.progress import progress_bar

    with progress_bar(f"reading {log.name} (bytes)") as progress:
        overrides, fit = refit(scenario, log, progress)
    moved = np.abs(fit.ability - np.array(scenario.workload_spec.quality.ability))
    print(
        f"{log.name}: {fit.labels.sum():,} labelled answers move the tiers' abilities by {moved.mean():.2f} probits on "
        f"average, {moved.max():.2f} at most; their standard errors are {fit.sd.min():.2f} to {fit.sd.max():.2f}"
    )
    return overrides


def list_scenarios() -> int:
    """Prints name and description of every shipped scenario."""
    from envs import scenario_files

    for path in sorted((scenario_files.CONFIGS / "scenarios").glob("*.yaml")):
        print(f"{path.stem:<24}{scenario_files.read_yaml(path).get('description', '')}")
    return 0


def carry_out(
    run: Run,
    scenario: Scenario,
    config: TrainingConfig,
    seed: int,
    args: argparse.Namespace,
    resume: bool,
    workers: Crew | int | None,
) -> int:
    """All steps of a run, new or resumed; the run folder tells if they were interrupted."""
    try:
        if trials := run.info().get("optimize"):
            return search(run, scenario, config, seed, int(trials), workers)
        return finish(run, scenario, config, seed, args, resume, None if isinstance(workers, int) else workers)
    except KeyboardInterrupt:
        run.update(status="interrupted")
        note(f"go on with: python train.py --resume {run.folder}")
        raise
    except Exception as error:
        if not isinstance(error, InputError):
            run.update(status="failed")
        raise


def search(
    run: Run, scenario: Scenario, config: TrainingConfig, seed: int, trials: int, workers: Crew | int | None
) -> int:
    """Searches the training's settings, new or resumed, and says how to train with what was found."""
    from agents import baselines
    from agents.cluster import crew_of
    from agents.optimize import optimize
    from agents.train import router_scenario
    from agents.workers import usable_cores
    from envs import announce_compilation
    from envs.plant import Plant
    from evaluation.progress import progress_bar

    if workers is None:
        with crew_of(None, min(usable_cores(), trials)) as own:
            return search(run, scenario, config, seed, trials, own or 1)
    announce_compilation()
    plant = Plant(router_scenario(scenario))
    crew = None if isinstance(workers, int) else workers
    advice = baselines.advice_and_fallback(tuned_baselines(run, plant, False, crew), config.fitted)[0]
    with progress_bar("searching (trainings)") as progress:
        found = optimize(plant, advice, config, run, seed, trials, progress, workers)
    run.update(status="searched", found=found)
    print(
        f"best of {trials} trainings: {found['gain_usd_per_1k']:+z.4f} USD per 1k over {advice.name} on validation, "
        f"settings as they are {found['as_it_is_usd_per_1k']:+z.4f}; train with it on other seeds:"
    )
    words = [f"training.{key}={value}" for key, value in found["settings"].items()]
    print(shlex.join(["python", "train.py", *scenario_words(run), "--set", *overrides(run), *words]))
    return 0


def scenario_words(run: Run) -> list[str]:
    """The arguments of a run's training that name its scenario and trace."""
    words = parser().parse_args(shlex.split(run.info()["command"])[2:])
    found = [words.scenario]
    for flag, value in (("--trace", words.trace), ("--trace-format", words.trace_format), ("--columns", words.columns)):
        found += [flag, value] if value else []
    return found


def overrides(run: Run) -> list[str]:
    """What a run's training changes in the scenario, by `--set` or from a log."""
    words = parser().parse_args(shlex.split(run.info()["command"])[2:])
    own = [word for word in words.set if not word.startswith("training.")]
    return own + [f"{key}={value}" for key, value in run.info().get("log_overrides", {}).items()]


def finish(
    run: Run,
    scenario: Scenario,
    config: TrainingConfig,
    seed: int,
    args: argparse.Namespace,
    resume: bool,
    crew: Crew | None,
) -> int:
    """Baselines, training, gate and export; the steps that a new run and a resumed one share."""
    from agents import baselines, run_lines
    from agents.export import export
    from agents.floors import keep_floors
    from agents.floors import parse as parse_floors
    from agents.train import router_scenario
    from envs import announce_compilation
    from envs.plant import Plant
    from evaluation.log_training import judge, judged_line
    from evaluation.progress import progress_bar

    announce_compilation()
    plant = Plant(router_scenario(scenario))
    floors = parse_floors(run.info().get("floors", ()), scenario.class_names)
    rules = tuned_baselines(run, plant, bool(floors), crew)  # floors change what is tuned: all of it comes before
    kept = None
    if floors:
        held = {name: keep_floors(plant, rule, floors) for name, rule in baselines.margin_rules(rules).items()}
        baselines.replace_rules(rules, {name: x.rule for name, x in held.items()})
        run.update(
            heuristic_floors={name: {"kept": x.found.kept, "reached": x.found.shares} for name, x in held.items()}
        )
        kept = held[ADVICE if config.fitted else FALLBACK]
    advice, fallback = baselines.advice_and_fallback(rules, config.fitted)
    log = tracker(run, scenario, seed) if args.track else lambda _: None
    if scenario.control is not None and config.deciders == "controller":
        policy, spec, verdict = None, None, dict(NOT_TRAINED)
    else:
        policy, spec, verdict = router_stage(
            run, plant, (advice, fallback, kept), config, seed, resume, log, floors, crew
        )
    run.update(gate=verdict)
    if not verdict["learned"] and verdict.get("heuristic_breaks"):
        run.update(status="floor out of reach")
        raise InputError(
            "no policy keeps the floors on validation episodes: of the heuristic "
            f"{'; '.join(verdict['heuristic_breaks'])}; the learned policy was refused since "
            f"{'; '.join(verdict['refused'])}; nothing is exported, legal are "
            "floors within reach"
        )
    provenance = {key: run.info()[key] for key in ("command", "seed", "versions")}
    chosen = policy if verdict["learned"] else None
    judged_by, levers = {"gate": verdict}, None
    if scenario.control is not None:
        levers = controller_stage(run, scenario, config, seed, resume, log)
        judged_by["controller_gate"] = run.info()["controller"]["gate"]
    exported = export(plant, chosen, advice, spec, fallback, run.bundle_path, judged_by, provenance, levers=levers)
    tuned_baselines(run, plant, scenario.control is None, crew)
    if log_file := run.info().get("log"):
        with progress_bar("off-policy (bytes)") as progress:
            judged = judge(Path(log_file), exported, progress)
        run.update(off_policy=judged)
        print(judged_line(judged))
    run.update(status="finished")
    if policy is not None:
        print(run_lines.parity_line(run.info()))
        print(run_lines.verdict_line(verdict, advice.name))
    if levers is not None:
        print(run_lines.controller_line(run.info()["controller"]))
    command = shlex.join(["python", "evaluate.py", "--policy", str(run.folder)])  # plays what the run was trained on
    print(f"run folder {run.folder}; compare it: {command}")
    return 0


def router_stage(
    run: Run,
    plant: Any,
    rules: tuple[Any, Any, Any],
    config: TrainingConfig,
    seed: int,
    resume: bool,
    log: Any,
    floors: Any,
    crew: Crew | None,
) -> tuple[Any, Any, dict[str, Any]]:
    """Trains the router: the policy that was best on validation, its feature spec, and the gate's verdict."""
    from agents.train import Parity, choose_strength, train
    from evaluation.gate import gate
    from evaluation.progress import progress_bar

    advice, fallback, kept = rules
    with progress_bar("training (decisions)") as progress:
        parity = Parity(fallback, STARTED_S)
        policy, spec = train(
            plant,
            advice,
            config,
            run,
            seed,
            resume=resume,
            progress=progress,
            log=log,
            kept=kept,
            parity=parity,
            crew=crew,
        )
    with progress_bar("strength of the correction (validation episodes)") as progress:
        choose_strength(plant, policy, advice, spec, config, run, progress)
    with progress_bar("gate (validation episodes)") as progress:
        return policy, spec, gate(plant.scenario, policy, advice, spec, config, progress, floors)


def controller_stage(run: Run, scenario: Scenario, config: TrainingConfig, seed: int, resume: bool, log: Any) -> Any:
    """Tunes the heuristic controllers, trains one, and asks the engine: what the bundle holds beside its router."""
    from agents import control_run
    from agents.control_train import train_controller
    from envs.control_plant import ControlPlant
    from evaluation.control_gate import choose, control_gate
    from evaluation.progress import progress_bar

    plant, settings = ControlPlant(scenario), config.controller
    with progress_bar(f"tuning the controllers ({settings.tuning_ticks:,} ticks per restart)") as progress:
        rules, best = control_run.tuned_rules(run, plant, progress)
    rule = rules[best]
    if config.deciders == "router":
        control_run.keep(run, best, None, {"gate": dict(NOT_TRAINED)})
        return control_run.exported_levers(run, plant)
    with progress_bar("training the controller (ticks)") as progress:
        candidates = train_controller(plant, rule, settings, run, seed, resume=resume, progress=progress, log=log)
    with progress_bar("choosing on the engine (validation days)") as progress:
        chosen, gains = choose(scenario, candidates, rule, None, settings.choice_episodes, progress)
    with progress_bar("gate on the engine (validation days)") as progress:
        verdict = control_gate(scenario, candidates[chosen], rule, None, settings, progress)
    control_run.keep(run, best, chosen, {"gains_usd_per_1k": {str(k): x for k, x in gains.items()}, "gate": verdict})
    return control_run.exported_levers(run, plant)


def tuned_baselines(run: Run, plant: Any, whole: bool, crew: Crew | None) -> Path:
    """The run's file of tuned baselines, found or tuned now: the margin rules at least, all of them if `whole`."""
    import shutil

    from agents import baselines
    from agents.tuning import Budget, tune_margin_rules, tune_others
    from evaluation.progress import progress_bar

    scenario, target = run.scenario(), run.folder / baselines.FILE
    budget, command = Budget.of(run.config().tuning_requests, plant.scenario), run.info()["command"]
    if not target.is_file():
        found = None if run.info().get("retune") else baselines.find(scenario)
        if found is not None:
            shutil.copyfile(found, target)
            baselines.tell_loose(baselines.load(target)[0])
            return target
        with progress_bar(f"tuning the bid price ({budget.requests:,} requests per restart)") as progress:
            baselines.save(target, scenario, tune_margin_rules(plant, budget, progress, crew), budget, command)
        baselines.tell_loose(baselines.load(target)[0])
    if whole and not baselines.is_whole(target):
        with progress_bar(f"tuning the other baselines ({budget.requests:,} requests per restart)") as progress:
            baselines.save(target, scenario, tune_others(plant, budget, progress, crew), budget, command)
        baselines.remember(scenario, target)
    return target


def tracker(run: Run, scenario: Scenario, seed: int) -> Any:
    """Starts a Weights & Biases run that follows TensorBoard; offline unless the user is logged in."""
    import wandb

    mode = "online" if wandb.api.api_key else "offline"
    wandb.init(
        project="marginroute",
        name=run.folder.name,
        dir=str(run.folder),
        mode=mode,
        sync_tensorboard=True,
        config={"scenario": scenario.name, "scenario_hash": scenario.hash, "seed": seed},
    )
    return wandb.log


if __name__ == "__main__":
    sys.exit(main())
