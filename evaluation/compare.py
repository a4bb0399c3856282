"""A contest as a report: judged, written as JSON and page, printed."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from evaluation.assumptions import assumptions
from evaluation.bounds import Bounds, bound_episodes
from evaluation.calibration import verdict
from evaluation.document import to_document, write_json
from evaluation.page_parts import command_line
from evaluation.progress import progress_bar
from evaluation.report import Report, build_report
from evaluation.table import print_report
from marginroute.cli import note
from marginroute.errors import InputError
from marginroute.whole_file import write_whole

if TYPE_CHECKING:
    from envs.scenario import Scenario
    from evaluation.contest import Contest, Play


def judged(scenario: Scenario, contest: Contest, play: Play, bound: bool, forgiving: bool = False) -> Report:
    """The report of a contest, with upper bounds if asked for.

    Args:
        scenario: the world.
        contest: that was played in it.
        play: how.
        bound: whether to compute bounds.
        forgiving: go on without bounds, and say so, where the scenario has something that they do not model.

    Raises:
        InputError: no bounds of such a scenario, unless forgiven.
    """
    episodes = len(contest.results[contest.shown].seeds)
    bounds = None
    if bound:
        try:
            bounds = upper_bounds(scenario, range(play.seed, play.seed + episodes), play)
        except InputError as error:
            if not forgiving:
                raise
            note(f"no bounds: {error}")
    calibration = verdict(scenario.hash)
    found = assumptions(scenario, calibration)
    return build_report(scenario.name, contest.results, contest.best, bounds, calibration, found, contest.tuned)


def compare(args: argparse.Namespace, scenario: Scenario, contest: Contest, play: Play) -> None:
    """Prints and writes the comparison."""
    report = judged(scenario, contest, play, args.bound)
    if args.json is not None:
        write_json(args.json, to_document(report))
    if args.report is not None:
        write_report(args.report, scenario, report, contest, play)
    print_report(report)


def write_report(path: Path, scenario: Scenario, report: Report, contest: Contest, play: Play) -> None:
    """A page, or a Markdown card."""
    from evaluation.page import markdown, write_page
    from evaluation.page_data import collect

    if path.suffix == ".md":
        write_whole(path, markdown(report, contest.shown))
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
            use_cache=play.use_cache,
        )
    write_page(path, report, data, contest.shown, command_line())


def upper_bounds(scenario: Scenario, seeds: range, play: Play) -> Bounds:
    """Bounds of the held-out episodes."""
    with progress_bar("upper bounds") as progress:
        return bound_episodes(scenario, seeds, progress=progress, workers=play.workers)
