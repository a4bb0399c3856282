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
    from evaluation.progress import Progress
    from evaluation.results import EpisodeResults
    from marginroute.policy import Policy

SHUFFLED_MIX = "shuffled-mix"
MAX_VALIDATION_EPISODES = 16


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parse = argparse.ArgumentParser(prog="evaluate.py", description=(__doc__ or "").partition("\n")[0])
    parse.add_argument("scenario", nargs="?", default="quickstart", help="name in configs/scenarios or path of a YAML")
    parse.add_argument("--policy", nargs="+", default=[], action="extend", metavar="RUN", help="run folders or bundles")
    parse.add_argument("--baselines", default="all", help="all, none, or names separated by commas (default: all)")
    parse.add_argument("--episodes", type=int, default=32, help="held-out episodes (default: 32)")
    parse.add_argument("--seed", type=int, default=0, help="first held-out seed (default: 0)")
    parse.add_argument("--trace", metavar="FILE", help="recorded requests in place of generated ones")
    parse.add_argument("--trace-format", metavar="NAME", help="layout of the trace (default: told from it)")
    parse.add_argument("--columns", metavar="NAME=COLUMN,...", help="for csv: our names and the file's columns")
    parse.add_argument("--set", nargs="+", default=[], action="extend", metavar="KEY=VALUE", help="scenario overrides")
    parse.add_argument("--bound", action="store_true", help="compute upper bounds of the margin, too")
    parse.add_argument("--workers", type=int, help="processes (default: one per core that may be used)")
    parse.add_argument("--json", type=Path, metavar="FILE", help="write the figures, too")
    return parse


@main_guard
def main(argv: list[str] | None = None) -> int:
    """Runs the comparison and prints it; bad input exits 2."""
    args = parser().parse_args(argv)
    check_flags(args)
    from envs.scenario import load_scenario
    from evaluation.arguments import pairs
    from evaluation.document import check_target, to_document, write_json
    from evaluation.report import build_report
    from evaluation.table import print_report

    if args.json is not None:
        check_target(args.json)
    scenario = load_scenario(
        args.scenario,
        overrides=pairs(args.set, "--set"),
        trace=args.trace,
        trace_format=args.trace_format,
        columns=pairs(args.columns.split(","), "--columns") if args.columns else None,
    )
    best, results = compare(scenario, args)
    report = build_report(scenario.name, results, best, upper_bounds(scenario, args) if args.bound else None)
    if args.json is not None:
        write_json(args.json, to_document(report))
    print_report(report)
    return 0


def compare(scenario: Scenario, args: argparse.Namespace) -> tuple[str | None, dict[str, EpisodeResults]]:
    """Chooses the best heuristic on validation seeds, then plays every policy on the held-out ones."""
    from evaluation.progress import progress_bar
    from evaluation.protocol import best_on_validation, evaluate_policies

    examined = load_policies(args.policy, scenario)
    heuristics, with_mix = select_baselines(scenario, args.baselines, args.policy)
    if not examined and not heuristics:
        raise InputError("nothing to compare: give at least one --policy or one of --baselines")
    best = None
    if heuristics:
        with progress_bar("choosing the best heuristic (validation)") as progress:
            episodes = min(args.episodes, MAX_VALIDATION_EPISODES)
            best = best_on_validation(scenario, heuristics, episodes, progress=progress, workers=args.workers)

    def play(policies: Mapping[str, Policy], progress: Progress) -> dict[str, EpisodeResults]:
        return evaluate_policies(
            scenario, policies, args.episodes, first_seed=args.seed, progress=progress, workers=args.workers
        )

    with progress_bar("held-out episodes") as progress:
        results = play({**examined, **heuristics}, progress)
    if with_mix:
        with progress_bar("content-blind control") as progress:
            results |= play(shuffled_mixes(results, list(examined) or [str(best)]), progress)
    return best, results


def upper_bounds(scenario: Scenario, args: argparse.Namespace) -> Bounds:
    """Bounds of the held-out episodes."""
    from evaluation.bounds import bound_episodes
    from evaluation.progress import progress_bar

    with progress_bar("upper bounds") as progress:
        seeds = range(args.seed, args.seed + args.episodes)
        return bound_episodes(scenario, seeds, progress=progress, workers=args.workers)


def load_policies(runs: list[str], scenario: Scenario) -> dict[str, Policy]:
    """Policies of run folders or bundles by name; runs whose policies share a name are told apart by folder."""
    if not runs:
        return {}
    from agents.run import load_policy

    policies = [(Path(run), load_policy(Path(run), scenario)) for run in runs]
    names = [policy.name for _, policy in policies]
    return {
        policy.name if names.count(policy.name) == 1 else f"{policy.name}:{run}": policy for run, policy in policies
    }


def select_baselines(scenario: Scenario, wanted: str, runs: list[str]) -> tuple[dict[str, Policy], bool]:
    """The tuned heuristics asked for, and whether the shuffled mix is among them."""
    if wanted == "none":
        return {}, False
    from agents.baselines import baselines_for

    known: dict[str, Policy] = {**baselines_for(scenario, run_dir=Path(runs[0]) if runs else None)}
    known.pop(SHUFFLED_MIX, None)
    if wanted == "all":
        return known, True
    names = [name.strip() for name in wanted.split(",")]
    for name in names:
        if name != SHUFFLED_MIX and name not in known:
            raise InputError(f"--baselines {name!r} is not known; legal are {', '.join([*known, SHUFFLED_MIX])}")
    return {name: known[name] for name in names if name != SHUFFLED_MIX}, SHUFFLED_MIX in names


def shuffled_mixes(results: Mapping[str, EpisodeResults], of: list[str]) -> dict[str, Policy]:
    """For each policy of `of`, its tier shares given out at random: what its choice of content is worth."""
    from marginroute.heuristics import ShuffledMix

    names = [SHUFFLED_MIX] if len(of) == 1 else [f"{SHUFFLED_MIX}:{name}" for name in of]
    return {
        name: ShuffledMix(name, tier_shares=results[policy].tier_shares) for name, policy in zip(names, of, strict=True)
    }


def check_flags(args: argparse.Namespace) -> None:
    """Refuses flags that make no comparison, before anything heavy is imported."""
    for flag, value, least in (("--episodes", args.episodes, 1), ("--seed", args.seed, 0)):
        if value < least:
            raise InputError(f"{flag} {value} is not legal; legal is {least} or more")
    check_trace_flags(args)
    if args.workers is not None and args.workers < 1:
        raise InputError(f"--workers {args.workers} is not legal; legal is 1 or more")


if __name__ == "__main__":
    sys.exit(main(None))
