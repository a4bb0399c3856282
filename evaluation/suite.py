"""`evaluate.py --suite`: table, JSON and page of every scenario in configs/scenarios, and one summary of all."""

from __future__ import annotations

import argparse
import contextlib
import html
import io
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from evaluation.columns import PIPE_COLUMNS
from evaluation.compare import judged, write_report
from evaluation.contest import Contest, Play, enter, hold, usual_episodes
from evaluation.document import to_document, write_json
from evaluation.page_parts import command_line, frame, paragraph, text
from evaluation.summary import print_summary, summarise, summary_document, summary_section
from evaluation.table import print_report
from marginroute.cli import note
from marginroute.errors import InputError
from marginroute.whole_file import write_whole

if TYPE_CHECKING:
    from envs.scenario import Scenario
    from evaluation.report import Report

SCHEMA = 1
SCENARIOS = Path(__file__).parents[1] / "configs" / "scenarios"


def scenario_names() -> list[str]:
    """The scenarios of the suite."""
    return sorted(path.stem for path in SCENARIOS.glob("*.yaml"))


def run_suite(args: argparse.Namespace, load: Callable[[str], Scenario], play: Play) -> None:
    """Plays all scenarios, each with its run folder if there is one; writes OUT/NAME.txt, .json, .html and a summary.

    Args:
        args: of the command line: out, runs, baselines, bound.
        load: makes a scenario from its name.
        play: how.

    Raises:
        InputError: no scenario could be played.
    """
    out: Path = args.out
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make {out}: {error.strerror}; give a folder that can be written to") from None
    names, began_s = scenario_names(), time.monotonic()
    found: dict[str, tuple[Report, Contest]] = {}
    left_out: dict[str, str] = {}
    for number, name in enumerate(names):
        spent_s = time.monotonic() - began_s
        left = f", about {spent_s / number * (len(names) - number):.0f} s left" if number else ""
        note(f"scenario {number + 1} of {len(names)}: {name}{left}")
        try:
            found[name] = _one(args, load(name), out, play)
        except InputError as error:
            left_out[name] = str(error)
            note(f"{name} is left out: {error}")
    if not found:
        raise InputError(f"no scenario of the suite could be played: {next(iter(left_out.values()))}")
    rows = summarise(found)
    document = {"schema": SCHEMA, "scenarios": sorted(found), "left_out": left_out, "summary": summary_document(rows)}
    write_json(out / "suite.json", document)
    links = " ".join(f'<a href="{html.escape(name)}.html">{text(name)}</a>' for name in found)
    missing = [paragraph(f"{name} is left out: {why}", "warning") for name, why in left_out.items()]
    body = ["<h1>The suite of scenarios</h1>", *missing, summary_section("Gains", "scenario", rows), f"<p>{links}</p>"]
    write_whole(out / "suite.html", frame("suite", "".join(body), command_line()))
    print_summary("The suite of scenarios", "scenario", rows)
    for name, why in left_out.items():
        print(f"{name} is left out: {why}")
    print(f"Tables, JSON and pages: {out}/")


def _one(args: argparse.Namespace, scenario: Scenario, out: Path, play: Play) -> tuple[Report, Contest]:
    """Plays one scenario and writes its three files."""
    run = args.runs / scenario.name
    entrants = enter(scenario, [str(run)] if run.is_dir() else [], args.baselines)
    if args.episodes is None:
        play = replace(play, episodes=min(play.episodes, usual_episodes(scenario)))
    contest = hold(scenario, entrants, play)
    report = judged(scenario, contest, play, args.bound, forgiving=True)
    write_report(out / f"{scenario.name}.html", scenario, report, contest, play)  # first: an interruption leaves none
    write_json(out / f"{scenario.name}.json", to_document(report))
    with contextlib.closing(io.StringIO()) as shown:
        print_report(report, Console(file=shown, width=PIPE_COLUMNS, highlight=False))
        write_whole(out / f"{scenario.name}.txt", shown.getvalue())
    return report, contest
