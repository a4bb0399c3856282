"""docs/scenarios.md: what every shipped scenario holds, read from its file, beside what was measured."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from envs import scenario_files

if TYPE_CHECKING:
    from envs.scenario import Scenario
    from envs.scenario_plans import CustomerClass, Slo
    from envs.scenario_pools import Pool
    from envs.scenario_providers import Provider

COMMAND = "python -m benchmarks.scenarios{} --out docs/scenarios.md"
RICH_PCT = 97.0  # share of the clairvoyant bound above which a scenario teaches little


@dataclass(frozen=True)
class Seat:
    """Margin per seat and month in USD under one condition, by policy."""

    condition: str
    usd: Mapping[str, float]


@dataclass(frozen=True)
class Measured:
    """What the tuned baselines of a scenario did on held-out episodes.

    Attributes:
        best: heuristic, chosen on validation episodes.
        usd_per_1k: margin per 1k first calls by policy.
        accounts_usd_per_1k: of the best heuristic, by account; they add up to its margin.
        shares: its contribution margin over that of the clairvoyant and the same-information bound.
        no_bound: why there is none.
        seats: margin per seat where that is asked.
    """

    best: str
    usd_per_1k: Mapping[str, float]
    accounts_usd_per_1k: Mapping[str, float]
    shares: Mapping[str, float]
    no_bound: str = ""
    seats: Sequence[Seat] = field(default_factory=list)


def write_pages(found: Mapping[str, tuple[Scenario, Measured | None]], episodes: int, bounded: int) -> str:
    """The page as Markdown."""
    played = [name for name, (_, measured) in found.items() if measured is not None]
    options = f" --episodes {episodes} --bounded {bounded}" if played else " --describe"
    names = "" if len(played) in (0, len(found)) else "".join(f" {name}" for name in played)
    parts = [
        "# Scenarios",
        "Generated from `configs/scenarios` and from held-out episodes; do not edit. Margins, shares of the bounds and "
        "ledgers stand here once they are measured; `--describe` leaves them out.",
        "    " + COMMAND.format(names + options),
        "Each is a story with figures that have a source or are named as assumptions (in its file), a *training range* "
        "in whose worlds policies are trained and tuned, and *conditions* that nobody is trained for "
        "(`python evaluate.py NAME --condition all`). *Of the bound* is the contribution margin (before GPU-hours) of "
        "the best tuned heuristic over that of a clairvoyant who knows arrivals, lengths and outcomes of the first "
        f"{bounded} held-out episodes; *of same information* the same without knowledge of outcomes "
        "([evaluation](evaluation.md)). "
        f"A scenario above {RICH_PCT:g} % of the first would teach little.",
        _overview(found),
    ]
    for name, (scenario, measured) in found.items():
        parts += [f"## {name}", *_described(scenario), *_measured(name, measured, episodes)]
    return "\n\n".join(parts) + "\n"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _overview(found: Mapping[str, tuple[Scenario, Measured | None]]) -> str:
    rows = []
    if not any(measured for _, measured in found.values()):
        for name, (scenario, _) in found.items():
            counts = [str(len(scenario.ranges)), str(len(scenario.conditions))]
            rows.append([f"[{name}](#{name})", scenario.description, *counts])
        return table(["scenario", "story", "keys with a training range", "conditions"], rows)
    for name, (scenario, measured) in found.items():
        margin = best = of = same = "not measured"
        if measured is not None:
            best, margin = measured.best, f"{measured.usd_per_1k[measured.best]:.2f}"
            of, same = (_pct(measured.shares.get(kind)) for kind in ("clairvoyant", "same_information"))
        rows.append([f"[{name}](#{name.replace('.', '')})", scenario.description, best, margin, of, same])
    heads = ["scenario", "story", "best heuristic", "USD per 1k", "of the bound", "of same information"]
    return table(heads, rows)


def _pct(share: float | None) -> str:
    return "no bound" if share is None else f"{100.0 * share:.1f} %"


def story(scenario: Scenario) -> str:
    """The comment at the top of a scenario's file."""
    lines = scenario_files.locate(scenario.name, "scenario").read_text().splitlines()
    head = [line.removeprefix("#").strip() for line in lines[: _first(lines)]]
    return " ".join(line for line in head if "yaml-language-server" not in line)


def _first(lines: Sequence[str]) -> int:
    """Lines of comment at the top."""
    return next((i for i, line in enumerate(lines) if not line.startswith("#")), len(lines))


def _described(scenario: Scenario) -> list[str]:
    text = story(scenario) or f"{scenario.description}."
    parts = [text, _traffic(scenario), _fleet(scenario), _classes(scenario)]
    if scenario.drift:
        parts.append("Drifts inside an episode: " + "; ".join(f"*{name}*" for name in scenario.drift) + ".")
    if scenario.ranges:
        rows = [[f"`{key}`", _range(item)] for key, item in scenario.ranges.items()]
        parts.append(table(["training range", "values"], rows))
    if scenario.conditions:
        rows = [[name, _changes(changes)] for name, changes in scenario.conditions.items()]
        parts.append(table(["condition", "what changes"], rows))
    return parts


def _range(item: Any) -> str:
    if item.choices is not None:
        return ", ".join(map(str, item.choices))
    return f"{item.low:g} to {item.high:g}{' (logarithms evenly)' if item.log else ''}"


def _changes(changes: Mapping[str, Any]) -> str:
    return "; ".join(f"`{key}`: {_short(value)}" for key, value in changes.items())


def _short(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_short(inner)}" for key, inner in value.items())
    if isinstance(value, list):
        return "[" + ", ".join(_short(item) for item in value) + "]"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _traffic(scenario: Scenario) -> str:
    """Requests and lengths of the first training episode."""
    workload = scenario.generate(0, "train")
    calls, first = workload.n_requests, int((workload.parent_index < 0).sum())
    follow = f", of which {calls - first:,} follow another" if calls > first else ""
    return (
        f"An episode lasts {scenario.horizon_s:g} s; that of training seed 0 holds {calls:,} calls{follow}, with "
        f"{workload.prompt_tokens.mean():,.0f} prompt and {workload.output_tokens.mean():,.0f} output tokens on "
        "average."
    )


def _fleet(scenario: Scenario) -> str:
    fleet = scenario.fleet
    rows = [[name, fleet.tiers[pool.tier].title, *_pool(pool)] for name, pool in fleet.pools.items()]
    rows += [[name, fleet.tiers[item.tier].title, *_provider(item)] for name, item in fleet.providers.items()]
    return table(["station", "model", "what", "price"], rows)


def _pool(pool: Pool) -> list[str]:
    count = str(pool.replicas) if pool.rows == pool.replicas else f"{pool.replicas} (up to {pool.rows})"
    extras = [word for word, on in (("prefix cache", pool.prefix_caching), ("drafts", pool.speculation)) if on]
    what = f"{count} x {pool.gpus_per_replica} GPU, `{pool.profile}`{''.join(f', {word}' for word in extras)}"
    return [what, f"{pool.gpu_usd_per_hour:g} USD per GPU-hour"]


def _provider(item: Provider) -> list[str]:
    what = f"API, {item.requests_per_minute:g} requests per minute, median TTFT {item.ttft_median_s:g} s"
    return [what, f"{item.input_usd_per_mtok:g} / {item.output_usd_per_mtok:g} USD per million tokens"]


def _classes(scenario: Scenario) -> str:
    rows = []
    for name, customer in scenario.plans.classes.items():
        share = scenario.workload.class_share[name] / math.fsum(scenario.workload.class_share.values())
        plan = scenario.plans.plans[customer.plan]
        rows.append([name, f"{100.0 * share:.0f} %", plan.kind, _promises(customer.slo), _terms(customer)])
    return table(["class", "share", "plan", "promised", "besides"], rows)


def _promises(slo: Slo) -> str:
    kept = [(word, getattr(slo, f"{word}_s"), getattr(slo, f"{word}_credit_share")) for word in ("ttft", "tpot", "e2e")]
    words = [f"{word.upper()} {limit:g} s ({100.0 * credit:.0f} % credit)" for word, limit, credit in kept if limit]
    if slo.window is not None:
        words.append(f"by windows of {slo.window.length_s:g} s")
    return ", ".join(words) or "nothing"


def _terms(customer: CustomerClass) -> str:
    words = []
    if customer.delay_tolerant is not None:
        words.append(f"may wait {customer.delay_tolerant.deadline_s:g} s")
    if customer.patience is not None:
        words.append(f"patience {customer.patience.median_s:g} s")
    if customer.priority:
        words.append(f"priority {customer.priority}")
    return ", ".join(words) or "-"


def _measured(name: str, measured: Measured | None, episodes: int) -> list[str]:
    if measured is None:
        return [f"Not measured yet; `python train.py {name}` tunes its baselines first, where none are."]
    ranked = sorted(measured.usd_per_1k.items(), key=lambda pair: -pair[1])
    parts = [
        f"`python evaluate.py {name} --episodes {episodes}`, margin in USD per 1k first calls: "
        + ", ".join(f"{policy} {usd:.2f}" for policy, usd in ranked)
        + ".",
        f"Ledger of *{measured.best}* in USD per 1k first calls:",
        _accounts(measured.accounts_usd_per_1k),
    ]
    if measured.no_bound:
        parts.append(f"No bound: {measured.no_bound}.")
    if measured.seats:
        parts += _seats(measured.seats)
    return parts


def _accounts(usd: Mapping[str, float]) -> str:
    """The accounts that hold anything, and their sum."""
    held = {name: value for name, value in usd.items() if value != 0.0}
    return table([*held, "sum"], [[*(f"{value:.3f}" for value in held.values()), f"{math.fsum(usd.values()):.3f}"]])


def _seats(seats: Sequence[Seat]) -> list[str]:
    """Margin per seat by how often agents call, and where it turns negative."""
    policies = list(seats[0].usd)
    rows = [[seat.condition.removeprefix("agents-"), *(f"{seat.usd[name]:.2f}" for name in policies)] for seat in seats]
    rows.append(["turns negative", *(_turning_point(seats, name) for name in policies)])
    return [
        "Margin per seat and month in USD, GPU-hours included, as agents call more often and seats bring the same:",
        table(["agent calls", *policies], rows),
    ]


def _turning_point(seats: Sequence[Seat], policy: str) -> str:
    """Multiple of agent calls at which the margin crosses zero, on straight lines between the conditions."""
    points = [(float(seat.condition.rpartition("x")[2]), seat.usd[policy]) for seat in seats]
    if points[0][1] < 0.0:
        return f"before x{points[0][0]:g}"
    for (x, usd), (next_x, next_usd) in pairwise(points):
        if next_usd < 0.0 <= usd:
            return f"x{x + (next_x - x) * usd / (usd - next_usd):.1f}"
    return f"not up to x{points[-1][0]:g}"
