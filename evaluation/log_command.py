"""`evaluate.py --log`: with --policy what it would have earned on the log, without how well the world predicts it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evaluation.calibration import verdict
from evaluation.document import write_json
from evaluation.page_parts import command_line
from evaluation.progress import progress_bar
from marginroute.whole_file import write_whole

if TYPE_CHECKING:
    from envs.scenario import Scenario

SCHEMA = 1


def off_policy(args: argparse.Namespace, scenario: Scenario | None) -> None:
    """Evaluates every --policy on the decisions of --log.

    Args:
        args: of the command line.
        scenario: that the policies have to fit; None: their own.

    Raises:
        InputError: a policy or a line of the log that cannot be used.
    """
    from agents.run import load_bundle
    from evaluation.off_policy import evaluate_log
    from evaluation.off_policy_show import off_policy_page, print_off_policy

    bundles = {run: load_bundle(Path(run), scenario) for run in args.policy}
    names = [bundle.policy.name for bundle in bundles.values()]
    found: dict[str, dict[str, Any]] = {}
    for run, bundle in bundles.items():
        name = bundle.policy.name if names.count(bundle.policy.name) == 1 else f"{bundle.policy.name}:{run}"
        with progress_bar(f"{name} on {args.log.name} (bytes)") as progress:
            found[name] = evaluate_log(args.log, bundle, progress)
    for name, bundle in zip(found, bundles.values(), strict=True):
        found[name]["calibration"] = verdict(bundle.scenario["hash"])
    if args.json is not None:
        write_json(args.json, {"schema": SCHEMA, "log": str(args.log), "off_policy": found})
    if args.report is not None:
        write_whole(args.report, off_policy_page(args.log.name, found, command_line()))
    print_off_policy(str(args.log), found)


def backtest(args: argparse.Namespace, scenario: Scenario) -> None:
    """Prints what the world predicts of --log beside what it says, keeps the verdict; then what it has earned by class.

    Raises:
        InputError: a line of the log that cannot be used.
    """
    from envs.plant import Plant
    from evaluation import calibration
    from evaluation.backtest import compared, requests_of
    from evaluation.backtest_show import backtest_page, print_backtest
    from evaluation.log_margin import margin_by_class, print_margin

    plant = Plant(scenario)
    with progress_bar(f"reading {args.log.name} (bytes)") as progress:
        logged = requests_of(plant, args.log, progress)
    earned = margin_by_class(plant, logged)
    with progress_bar(f"replaying {args.log.name}") as progress:
        document = compared(plant, args.log, logged, progress)
    calibration.remember(document)
    if args.json is not None:
        write_json(args.json, {"schema": SCHEMA, "earned": earned, "backtest": document})
    if args.report is not None:
        write_whole(args.report, backtest_page(document, command_line()))
    print_backtest(document)
    print_margin(earned)
