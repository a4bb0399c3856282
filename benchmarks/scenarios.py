"""The suite in figures: what the best tuned heuristic of every scenario earns, of how much, and docs/scenarios.md.

`python -m benchmarks.scenarios --out docs/scenarios.md` plays the tuned baselines of all shipped scenarios on held-out
episodes, bounds them, adds up the ledger's accounts and writes the page; scenarios without tuned baselines are
described and named as such, as all are with `--describe`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import common
from benchmarks.scenario_pages import Measured, Seat, write_pages
from marginroute.errors import InputError

if TYPE_CHECKING:
    from envs.scenario import Scenario
    from evaluation.contest import Play

SEATS = {
    "agent_ramp": (
        *("fixed-hosted", "least-in-flight", "difficulty-threshold", "shipped"),
        *("expected-margin", "bid-price", "bid-price-fitted"),
    )
}
"""Scenarios whose margin per seat is told under each of their `agents-` conditions, and for which policies."""


def main(argv: list[str] | None = None) -> int:
    """Plays, prints one JSON object, writes the page."""
    parse = common.parser(__doc__)
    parse.add_argument("names", nargs="*", help="scenarios to play (default: all); the page has them all")
    parse.add_argument("--episodes", type=int, default=16, help="held-out episodes (default: 16)")
    parse.add_argument("--bounded", type=int, default=8, help="of those that are bounded (default: 8)")
    parse.add_argument("--describe", action="store_true", help="play nothing, only describe")
    parse.add_argument("--out", type=Path, help="Markdown page to write")
    args = parse.parse_args(argv)
    from envs.scenario import load_scenario
    from evaluation.contest import Play
    from evaluation.suite import scenario_names

    if args.quick:
        args.episodes = args.bounded = 2
    play = Play(args.episodes)
    found: dict[str, tuple[Scenario, Measured | None]] = {}
    for name in dict.fromkeys((*scenario_names(), *args.names)):
        scenario = load_scenario(name)
        if args.describe or (args.names and name not in args.names):
            found[name] = scenario, None
            continue
        common.note(name)
        try:
            found[name] = scenario, measure(scenario, play, args.bounded)
        except InputError as error:
            common.note(f"{name}: {error}")
            found[name] = scenario, None
    if args.out is not None:
        args.out.write_text(write_pages(found, args.episodes, args.bounded))
    common.emit("scenarios", {name: figures(m) for name, (_, m) in found.items()})
    return 0


def measure(scenario: Scenario, play: Play, bounded: int) -> Measured:
    """Plays the tuned baselines and bounds the first episodes.

    Raises:
        InputError: no baselines were tuned for the scenario.
    """
    from envs.economics.ledger import ACCOUNTS
    from evaluation.bounds import bound_episodes
    from evaluation.contest import enter, hold

    contest = hold(scenario, enter(scenario, [], "all"), play)
    assert contest.best is not None
    best = contest.results[contest.best]
    accounts = {name: float(best.accounts_usd([name]).sum()) for name in ACCOUNTS}
    shares: dict[str, float] = {}
    no_bound = ""
    try:
        bounds = bound_episodes(scenario, range(play.seed, play.seed + bounded), workers=play.workers)
        reached = float((best.margin_usd[:bounded] - bounds.gpu_usd).sum())
        for kind in ("clairvoyant", "same_information"):
            shares[kind] = reached / float((getattr(bounds, f"{kind}_usd") - bounds.gpu_usd).sum())
    except InputError as error:
        no_bound = str(error)
    per_1k = 1000.0 / float(best.first_calls.sum())
    usd = {name: float(result.margin_usd.sum()) * per_1k for name, result in contest.results.items()}
    return Measured(
        best=contest.best,
        usd_per_1k=usd,
        accounts_usd_per_1k={name: usd * per_1k for name, usd in accounts.items()},
        shares=shares,
        no_bound=no_bound,
        seats=seats(scenario, contest.policies, play) if scenario.name in SEATS else [],
    )


def seats(scenario: Scenario, policies: Any, play: Play) -> list[Seat]:
    """Margin per seat and month of the chosen policies, under the scenario and each `agents-` condition."""
    from envs.scenario_plans import MONTH_S, SeatPlan
    from evaluation.cache import cached_play

    sold = sum(plan.seats for plan in scenario.plans.plans.values() if isinstance(plan, SeatPlan))
    chosen = {name: policies[name] for name in SEATS[scenario.name] if name in policies}
    rows = []
    for condition in (name for name in scenario.conditions if name.startswith("agents-")):
        world = scenario.under(condition)
        results = cached_play(world, chosen, play.episodes, play.seed, None, play.workers, play.use_cache)
        month = MONTH_S / world.horizon_s / sold
        usd = {name: float(result.margin_usd.mean()) * month for name, result in results.items()}
        rows.append(Seat(condition, usd))
    return rows


def figures(measured: Measured | None) -> dict[str, Any]:
    """What the JSON object says of a scenario."""
    if measured is None:
        return {"measured": False}
    best = measured.best
    return {
        "measured": True,
        "best_heuristic": best,
        "margin_usd_per_1k": measured.usd_per_1k[best],
        "accounts_sum_usd_per_1k": sum(measured.accounts_usd_per_1k.values()),
        **{f"of_{kind}": share for kind, share in measured.shares.items()},
        **({"no_bound": measured.no_bound} if measured.no_bound else {}),
    }


if __name__ == "__main__":
    sys.exit(main())
