# PYTHON_ARGCOMPLETE_OK
"""Compares policies on held-out episodes of a scenario: the same requests for all, paired 95 % intervals.

Try:
  python evaluate.py --policy runs/quickstart                  against every tuned baseline, on quickstart
  python evaluate.py --policy runs/quickstart --baselines bid-price,round-robin --episodes 64
  python evaluate.py --policy runs/quickstart --bound --report report.html --json report.json
  python evaluate.py --policy runs/quickstart --vary load_scale=0.5..1.5 fleet.pools.small.replicas=1,2,3
  python evaluate.py shaky --policy runs/shaky --condition all conditions that nobody was trained for
  python evaluate.py --log decisions.jsonl                     does the world predict your gateway's log?
  python evaluate.py --log decisions.jsonl --policy runs/mine  off-policy: what it would have earned
  python evaluate.py --suite --out reports                     every scenario
  python evaluate.py --policy runs/quickstart --ray auto       episodes played by a Ray cluster, with the same numbers
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from evaluation.arguments import check_trace_flags, complete_scenarios
from marginroute.cli import Parser, main_guard
from marginroute.errors import InputError

if TYPE_CHECKING:
    from envs.scenario import Scenario
    from evaluation.contest import Entrants, Play
    from marginroute.policy import Policy


DEFAULT_SCENARIO = "quickstart"
UNUSED = {
    "log": ("baselines", "episodes", "seed", "bound", "until_ci", "workers", "ray", "no_cache"),
    "explain": ("bound", "until_ci", "json", "report"),
    "render": ("bound", "until_ci", "json", "report"),
    "vary": ("bound", "until_ci"),
}
"""Flags that would do nothing, by what is asked for."""


def parser() -> Parser:
    """The command line."""
    parse = Parser.from_doc("evaluate.py", __doc__)
    scenario = parse.add_argument(
        "scenario",
        nargs="?",
        help="name in configs/scenarios, or path of a YAML (default: what --policy was trained on)",
    )
    complete_scenarios(scenario)
    parse.add_argument("--policy", nargs="+", default=[], action="extend", metavar="RUN", help="run folders or bundles")
    parse.add_argument("--baselines", default="all", help="all, none, or names separated by commas (default: all)")
    parse.add_argument("--episodes", type=int, help="held-out episodes (default: 32, with a controller 8)")
    parse.add_argument("--seed", type=int, default=0, help="first held-out seed (default: 0)")
    parse.add_argument("--trace", metavar="FILE", help="recorded requests in place of generated ones")
    parse.add_argument("--trace-format", metavar="NAME", help="layout of the trace (default: told from it)")
    parse.add_argument("--columns", metavar="NAME=COLUMN,...", help="for csv: our names and the file's columns")
    parse.add_argument("--set", nargs="+", default=[], action="extend", metavar="KEY=VALUE", help="scenario overrides")
    parse.add_argument("--log", type=Path, metavar="LOG", help="a gateway's decisions: backtest, or --policy on them")
    parse.add_argument("--condition", nargs="+", default=[], action="extend", metavar="NAME", help="held out, or all")
    parse.add_argument("--suite", action="store_true", help="every scenario in configs/scenarios: table, JSON, page")
    parse.add_argument("--out", type=Path, metavar="DIR", help="of --suite: where to write (reports)")
    parse.add_argument(
        "--runs", type=Path, metavar="DIR", help="of --suite: holds run folders by scenario (default: runs)"
    )
    parse.add_argument("--bound", action="store_true", help="compute upper bounds of the margin, too")
    parse.add_argument("--until-ci", type=float, metavar="USD", help="play until gains are known to +- USD per 1k")
    parse.add_argument("--vary", nargs="+", default=[], action="extend", metavar="KEY=V1,V2|A..B", help="what if: plan")
    parse.add_argument("--explain", type=int, metavar="N", help="explain decision N of episode --seed")
    parse.add_argument("--render", type=Path, metavar="FILE.gif", help="save episode --seed as a clip")
    parse.add_argument("--track", action="store_true", help="with --render: send the clip to Weights & Biases, too")
    parse.add_argument("--workers", type=int, help="processes (default: one per core that may be used)")
    parse.add_argument("--ray", metavar="ADDRESS", help="have a Ray cluster play: auto, local or HOST:PORT")
    parse.add_argument("--no-cache", action="store_true", help="play again what was played before")
    parse.add_argument("--json", type=Path, metavar="FILE", help="write the figures, too")
    parse.add_argument("--report", type=Path, metavar="FILE.html", help="write a page with figures, too (.md: a card)")
    parse.add_verbosity()
    return parse


@main_guard
def main(argv: list[str] | None = None) -> int:
    """Runs the comparison and prints it; bad input exits 2."""
    args = parser().parse_args(argv)
    check_flags(args)
    from agents.cluster import crew_of
    from evaluation.contest import EPISODES, MOST_EPISODES, Play
    from evaluation.statistics import FIRST_LOOK_EPISODES
    from marginroute.whole_file import check_target

    for target in (args.json, args.report, args.render):
        if target is not None:
            check_target(target)
    if args.until_ci is not None and args.episodes is not None and args.episodes < FIRST_LOOK_EPISODES:
        least = f"legal is {FIRST_LOOK_EPISODES} or more, from which a gain is looked at"
        raise InputError(f"--episodes {args.episodes} is too few for --until-ci; {least}")
    episodes = args.episodes or (MOST_EPISODES if args.until_ci is not None else EPISODES)
    settings = planned(args)
    with crew_of(args.ray, args.workers) as workers:
        carry_out(args, Play(episodes, args.seed, workers, not args.no_cache, args.until_ci), settings)
    return 0


def carry_out(args: argparse.Namespace, play: Play, settings: list[dict[str, str]]) -> None:
    """What the flags ask for."""
    from evaluation.contest import enter, hold, usual_episodes

    if args.suite:
        suite(args, play)
        return
    if args.log is not None:
        from evaluation.log_command import backtest, off_policy

        if args.policy:
            off_policy(args, None if args.scenario is None else load(args, {}))
        else:
            backtest(args, load(args, {}))
        return
    scenario = load(args, {})
    if scenario.control is not None:
        check_controlled(args)
        if args.episodes is None and args.until_ci is None:
            play = replace(play, episodes=usual_episodes(scenario))
    entrants = enter(scenario, args.policy, args.baselines)
    if args.explain is not None:
        explain(scenario, entrants, play, args.explain)
    elif args.render is not None:
        render(args, scenario, entrants, play)
    elif settings:
        plan(args, scenario, entrants, settings, play)
    elif args.condition:
        from evaluation.conditions import examine

        examine(args, scenario, entrants, play)
    else:
        from evaluation.compare import compare

        compare(args, scenario, hold(scenario, entrants, play), play)


def check_controlled(args: argparse.Namespace) -> None:
    """Refuses what plays one router alone, in a scenario with a controller."""
    for mode in ("explain", "render"):
        if getattr(args, mode) is not None:
            raise InputError(f"--{mode} does not know controllers; legal in this scenario are comparisons without it")


def suite(args: argparse.Namespace, play: Play) -> None:
    """Plays every scenario of the suite."""
    from evaluation.suite import run_suite

    args.out, args.runs = args.out or Path("reports"), args.runs or Path("runs")
    run_suite(args, lambda name: load(args, {}, name), play)


def load(args: argparse.Namespace, more: Mapping[str, str], name: str | None = None) -> Scenario:
    """The scenario (or the named one) with the overrides of the command line, and more.

    Where none is given, a policy's run folder brings the scenario that it was trained on, overrides included.
    """
    from envs.scenario import load_scenario
    from evaluation.arguments import pairs

    trained_on = Path(args.policy[0], "scenario.json") if args.policy else None
    return load_scenario(
        name or args.scenario or (trained_on if trained_on and trained_on.is_file() else DEFAULT_SCENARIO),
        overrides={**pairs(args.set, "--set"), **more},
        trace=args.trace,
        trace_format=args.trace_format,
        columns=pairs(args.columns.split(","), "--columns") if args.columns else None,
    )


def planned(args: argparse.Namespace) -> list[dict[str, str]]:
    """The settings of --vary."""
    from evaluation.plan import settings

    return settings(args.vary) if args.vary else []


def first_policy(scenario: Scenario, entrants: Entrants, play: Play) -> Policy:
    """The first policy under test, or the best heuristic."""
    from evaluation.contest import choose_best

    examined = list(entrants.examined.values())
    return examined[0] if examined else entrants.heuristics[str(choose_best(scenario, entrants.heuristics, play))]


def render(args: argparse.Namespace, scenario: Scenario, entrants: Entrants, play: Play) -> None:
    """Saves an episode as a clip, and sends it to Weights & Biases if asked to."""
    from envs.live_view import save_clip
    from evaluation.clip import FRAMES_PER_S, pictures
    from evaluation.progress import progress_bar

    policy = first_policy(scenario, entrants, play)
    with progress_bar("pictures") as progress:
        frames = pictures(scenario, policy, play.seed, progress=progress)
    save_clip(args.render, frames, FRAMES_PER_S)
    print(f"{args.render}: {len(frames)} pictures of held-out episode {play.seed} under {policy.name}")
    if args.track:
        import wandb

        mode = "online" if wandb.api.api_key else "offline"
        with wandb.init(project="marginroute", name=f"{scenario.name}-{policy.name}", mode=mode) as run:
            run.log({"episode": wandb.Video(str(args.render), format="gif")})


def explain(scenario: Scenario, entrants: Entrants, play: Play, number: int) -> None:
    """Explains one decision of the first policy, or of the best heuristic."""
    from evaluation.explain import explain_decision, print_explanation

    policy = first_policy(scenario, entrants, play)
    print_explanation(explain_decision(scenario, policy, number, play.seed), number, play.seed)


def plan(
    args: argparse.Namespace, scenario: Scenario, entrants: Entrants, settings: list[dict[str, str]], play: Play
) -> None:
    """Plays the settings, prints and writes the plan."""
    from evaluation.document import write_json
    from evaluation.page_parts import command_line
    from evaluation.plan import to_plan_document, vary
    from evaluation.plan_show import plan_page, print_plan
    from marginroute.whole_file import write_whole

    rows = vary(lambda setting: load(args, setting), entrants, settings, play)
    if args.json is not None:
        write_json(args.json, to_plan_document(scenario.name, rows))
    if args.report is not None:
        write_whole(args.report, plan_page(scenario.name, rows, command_line()))
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
    modes = ("explain", "vary", "log", "condition", "suite", "render")
    asked = [mode for mode in modes if _given(args, mode)]
    if len(asked) > 1:
        raise InputError(f"{' and '.join(f'--{mode}' for mode in asked)} exclude each other; legal is one of them")
    for mode in asked:
        _check_mode(args, mode)
    for flag, value in (("--out", args.out), ("--runs", args.runs)):
        if value is not None and not args.suite:
            raise InputError(f"{flag} {value} needs --suite")
    if args.render is not None and args.render.suffix != ".gif":
        raise InputError(f"--render {args.render} is not legal; legal is a file that ends in .gif")
    if args.track and args.render is None:
        raise InputError("--track needs --render FILE.gif")
    if args.suite:
        _check_suite(args)
    check_trace_flags(args)


def _given(args: argparse.Namespace, name: str) -> bool:
    """Whether a flag says something else than its default."""
    return bool(getattr(args, name) != parser().get_default(name))


def _check_mode(args: argparse.Namespace, mode: str) -> None:
    """Refuses flags that would do nothing."""
    idle = list(UNUSED.get(mode, ()))
    if mode == "log" and args.policy:
        idle += ["set", "trace"]
    for name in idle:
        if _given(args, name):
            also = " and --policy" if name in ("set", "trace") else ""
            raise InputError(f"--{name.replace('_', '-')} does nothing with --{mode}{also}; legal is to leave it out")
    if args.report is not None and args.report.suffix == ".md":
        raise InputError(f"--report {args.report} does not go with --{mode}; legal is a page, FILE.html")


def _check_suite(args: argparse.Namespace) -> None:
    """Refuses flags that mean one scenario or one file."""
    for flag in ("scenario", "policy", "trace", "json", "report"):
        value = getattr(args, flag)
        if value:
            name = flag.upper() if flag == "scenario" else f"--{flag}"
            raise InputError(f"{name} {value} does not go with --suite; legal are --runs DIR and --out DIR")


if __name__ == "__main__":
    sys.exit(main(None))
