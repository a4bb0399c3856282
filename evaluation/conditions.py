"""`evaluate.py --condition`: the policies under named conditions of a scenario that nobody was trained or tuned for."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from evaluation.arguments import check_names
from evaluation.compare import judged
from evaluation.contest import Contest, Entrants, Play, choose_best, hold
from evaluation.document import to_document, write_json
from evaluation.page import comparison_section
from evaluation.page_parts import command_line, frame, text
from evaluation.summary import print_summary, summarise, summary_document, summary_section
from evaluation.table import print_report
from marginroute.cli import note
from marginroute.errors import InputError
from marginroute.whole_file import write_whole

if TYPE_CHECKING:
    from envs.scenario import Scenario
    from evaluation.report import Report

SCHEMA = 1
ITSELF = "as it is"


def chosen(scenario: Scenario, words: list[str]) -> list[str]:
    """The conditions that are meant.

    Raises:
        InputError: there is none, or one is unknown.
    """
    if not scenario.conditions:
        raise InputError(f"scenario {scenario.name!r} has no conditions; legal is one that names some in `conditions`")
    names = [name.strip() for word in words for name in word.split(",")]
    check_names("--condition", names, ["all", *scenario.conditions], f"is not in scenario {scenario.name!r}")
    return list(scenario.conditions) if "all" in names else names


def examine(args: argparse.Namespace, scenario: Scenario, entrants: Entrants, play: Play) -> None:
    """Plays everybody under the scenario itself and under the conditions, prints and writes what came out.

    Everybody is as tuned or trained for the scenario itself, and the best heuristic is chosen there.
    """
    names = chosen(scenario, args.condition)
    best = entrants.best or choose_best(scenario, entrants.heuristics, play)
    found: dict[str, tuple[Report, Contest]] = {}
    for number, name in enumerate([ITSELF, *names]):
        note(f"condition {number} of {len(names)}: {name}")
        world = scenario if name == ITSELF else scenario.under(name)
        contest = hold(world, entrants, play, best)
        found[name] = (judged(world, contest, play, args.bound, forgiving=True), contest)
    rows = summarise(found)
    if args.json is not None:
        documents = {name: to_document(report) for name, (report, _) in found.items()}
        document = {"schema": SCHEMA, "scenario": scenario.name, "conditions": documents}
        write_json(args.json, document | {"summary": summary_document(rows)})
    title = f"{scenario.name} under held-out conditions"
    if args.report is not None:
        body = [f"<h1>{text(title)}</h1>", summary_section("Gains", "condition", rows)]
        for name, (report, contest) in found.items():
            body.append(comparison_section(report, contest.shown, f"{name}: all policies"))
        write_whole(args.report, frame(title, "".join(body), command_line()))
    for name, (report, _) in found.items():
        print_report(report, title=f"{scenario.name}, {name}")
        print()
    print_summary(title, "condition", rows)
