"""Compares policies on held-out episodes of a scenario: the same requests for all, paired 95 % intervals.

python evaluate.py quickstart --policy runs/quickstart --json report.json
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from evaluation.arguments import check_trace_flags
from marginroute.cli import main_guard
from marginroute.errors import InputError

if TYPE_CHECKING:
    from envs.scenario import Scenario
    from evaluation.bounds import Bounds
    from evaluation.contest import Contest, Entrants, Play
    from evaluation.report import Report


DEFAULT_SCENARIO = "quickstart"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parse = argparse.ArgumentParser(prog="evaluate.py", description=(__doc__ or "").partition("\n")[0])
    parse.add_argument("scenario", nargs="?", help="name in configs/scenarios or path of a YAML (default: quickstart)")
    parse.add_argument("--policy", nargs="+", default=[], action="extend", metavar="RUN", help="run folders or bundles")
    parse.add_argument("--baselines", default="all", help="all, none, or names separated by commas (default: all)")
    parse.add_argument("--episodes", type=int, help="held-out episodes (default: 32; with --until-ci at most 4096)")
    parse.add_argument("--seed", type=int, default=0, help="first held-out seed (default: 0)")
    parse.add_argument("--trace", metavar="FILE", help="recorded requests in place of generated ones")
    parse.add_argument("--trace-format", metavar="NAME", help="layout of the trace (default: told from it)")
    parse.add_argument("--columns", metavar="NAME=COLUMN,...", help="for csv: our names and the file's columns")
    parse.add_argument("--set", nargs="+", default=[], action="extend", metavar="KEY=VALUE", help="scenario overrides")
    parse.add_argument("--log", type=Path, metavar="LOG", help="a gateway's decisions: backtest, or --policy on them")
    parse.add_argument("--bound", action="store_true", help="compute upper bounds of the margin, too")
    parse.add_argument("--until-ci", type=float, metavar="USD", help="play until gains are known to +- USD per 1k")
    parse.add_argument("--vary", nargs="+", default=[], action="extend", metavar="KEY=V1,V2|A..B", help="what if: plan")
    parse.add_argument("--explain", type=int, metavar="N", help="explain decision N of episode --seed")
    parse.add_argument("--workers", type=int, help="processes (default: one per core that may be used)")
    parse.add_argument("--no-cache", action="store_true", help="play again what was played before")
    parse.add_argument("--json", type=Path, metavar="FILE", help="write the figures, too")
    parse.add_argument("--report", type=Path, metavar="FILE.html", help="write a page with figures, too (.md: a card)")
    return parse


@main_guard
def main(argv: list[str] | None = None) -> int:
    """Runs the comparison and prints it; bad input exits 2."""
    args = parser().parse_args(argv)
    check_flags(args)
    from evaluation.contest import MOST_EPISODES, Play, enter, hold
    from evaluation.document import check_target

    for target in (args.json, args.report):
        if target is not None:
            check_target(target)
    episodes = args.episodes or (MOST_EPISODES if args.until_ci is not None else 32)
    play = Play(episodes, args.seed, args.workers, not args.no_cache, args.until_ci)
    settings = planned(args)
    if args.log is not None:
        from evaluation.log_command import backtest, off_policy

        if args.policy:
            off_policy(args, None if args.scenario is None else load(args, {}))
        else:
            backtest(args, load(args, {}))
        return 0
    scenario = load(args, {})
    entrants = enter(scenario, args.policy, args.baselines)
    if args.explain is not None:
        explain(scenario, entrants, play, args.explain)
    elif settings:
        plan(args, scenario, entrants, settings, play)
    else:
        compare(args, scenario, hold(scenario, entrants, play), play)
    return 0


def load(args: argparse.Namespace, more: Mapping[str, str]) -> Scenario:
    """The scenario with the overrides of the command line, and more."""
    from envs.scenario import load_scenario
    from evaluation.arguments import pairs

    return load_scenario(
        args.scenario or DEFAULT_SCENARIO,
        overrides={**pairs(args.set, "--set"), **more},
        trace=args.trace,
        trace_format=args.trace_format,
        columns=pairs(args.columns.split(","), "--columns") if args.columns else None,
    )


def planned(args: argparse.Namespace) -> list[dict[str, str]]:
    """The settings of --vary."""
    from evaluation.plan import settings

    return settings(args.vary) if args.vary else []


def compare(args: argparse.Namespace, scenario: Scenario, contest: Contest, play: Play) -> None:
    """Prints and writes the comparison."""
    from evaluation.calibration import verdict
    from evaluation.document import to_document, write_json
    from evaluation.report import build_report
    from evaluation.table import print_report

    episodes = len(contest.results[contest.shown].seeds)
    bounds = upper_bounds(scenario, range(play.seed, play.seed + episodes), play) if args.bound else None
    report = build_report(scenario.name, contest.results, contest.best, bounds, verdict(scenario.hash))
    if args.json is not None:
        write_json(args.json, to_document(report))
    if args.report is not None:
        write_report(args.report, scenario, report, contest, play)
    print_report(report)


def write_report(path: Path, scenario: Scenario, report: Report, contest: Contest, play: Play) -> None:
    """A page, or a Markdown card."""
    from evaluation.document import write_text
    from evaluation.page import markdown, write_page
    from evaluation.page_data import collect
    from evaluation.progress import progress_bar

    if path.suffix == ".md":
        write_text(path, markdown(report, contest.shown))
        return
    with progress_bar("report") as progress:
        data = collect(
            scenario,
            contest.policies,
            contest.shown,
            contest.reference,
            episodes=min(report.episodes, 32),
            seed=play.seed,
            progress=progress,
            workers=play.workers,
        )
    write_page(path, report, data, contest.shown, f"python evaluate.py {' '.join(sys.argv[1:])}")


def upper_bounds(scenario: Scenario, seeds: range, play: Play) -> Bounds:
    """Bounds of the held-out episodes."""
    from evaluation.bounds import bound_episodes
    from evaluation.progress import progress_bar

    with progress_bar("upper bounds") as progress:
        return bound_episodes(scenario, seeds, progress=progress, workers=play.workers)


def explain(scenario: Scenario, entrants: Entrants, play: Play, number: int) -> None:
    """Explains one decision of the first policy, or of the best heuristic."""
    from evaluation.contest import choose_best
    from evaluation.explain import explain_decision, print_explanation

    examined = list(entrants.examined.values())
    policy = examined[0] if examined else entrants.heuristics[str(choose_best(scenario, entrants.heuristics, play))]
    print_explanation(explain_decision(scenario, policy, number, play.seed), number, play.seed)


def plan(
    args: argparse.Namespace, scenario: Scenario, entrants: Entrants, settings: list[dict[str, str]], play: Play
) -> None:
    """Plays the settings, prints and writes the plan."""
    from evaluation.document import write_json, write_text
    from evaluation.plan import to_plan_document, vary
    from evaluation.plan_show import plan_page, print_plan

    rows = vary(lambda setting: load(args, setting), entrants, settings, play)
    if args.json is not None:
        write_json(args.json, to_plan_document(scenario.name, rows))
    if args.report is not None:
        write_text(args.report, plan_page(scenario.name, rows, f"python evaluate.py {' '.join(sys.argv[1:])}"))
    print_plan(scenario.name, rows, play.episodes)


def check_flags(args: argparse.Namespace) -> None:
    """Refuses flags that make no comparison, before anything heavy is imported."""
    for flag, value, least in (
        ("--episodes", args.episodes, 1),
        ("--seed", args.seed, 0),
        ("--explain", args.explain, 0),
        ("--workers", args.workers, 1),
    ):
        if value is not None and value < least:
            raise InputError(f"{flag} {value} is not legal; legal is {least} or more")
    if args.until_ci is not None and not args.until_ci > 0.0:
        raise InputError(f"--until-ci {args.until_ci} is not legal; legal is more than 0")
    if args.explain is not None and args.vary:
        raise InputError("--explain and --vary exclude each other; legal is one of them")
    check_trace_flags(args)


if __name__ == "__main__":
    sys.exit(main(None))
