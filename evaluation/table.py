"""The terminal table of a Report."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from rich.console import Console

from envs.economics.ledger import ACCOUNTS
from evaluation.columns import GAP, WIDE_GAP, Group, make_group, print_groups, stdout_console
from evaluation.controls import CONTROLS, MATCHED_COST, SHUFFLED_MIX
from evaluation.fairness import fairness_documents
from evaluation.report import (
    PER_1K,
    SECONDS_PER_HOUR,
    SHORT_S,
    Paired,
    Report,
    accounts_usd_per_1k,
    action_shares,
    played_words,
    shed_shares,
    warnings_of,
)
from evaluation.results import EpisodeResults, Floats
from evaluation.router_cost import router_words
from evaluation.statistics import Estimate, ratio_of_sums
from evaluation.workflows import workflow_documents

ACTION_TITLES = {"replica": "own", "provider": "api", "cache": "cache", "defer": "defer", "shed": "shed"}


def print_report(report: Report, console: Console | None = None, title: str | None = None) -> None:
    """Prints the comparison: policies by margin, then their accounts."""
    console = console or stdout_console()
    first = next(iter(report.results.values()))
    for words in warnings_of(report):
        console.print(f"{words}\n", style="bold", markup=False)
    span_s = float(first.horizon_s.sum())
    span = f"{span_s:.0f} s" if span_s < SHORT_S else f"{span_s / SECONDS_PER_HOUR:,.1f} h"
    console.print(
        f"[bold]{title or report.scenario}[/bold]: {played_words(report.episodes)}, {first.first_calls.sum():,}"
        f" requests, {span}; the same for every policy\n"
    )
    _print_groups(report, [*_money_groups(report), *_service_groups(report)], console)
    console.print("[bold]Accounts[/bold], USD per 1k requests; costs are negative, the sum is the margin\n")
    _print_groups(report, _account_groups(report), console, GAP)
    if first.workflow_names:
        console.print("[bold]Tasks[/bold], USD per finished task; variable cost only, GPU-hours are nobody's\n")
        _print_groups(report, _workflow_groups(report), console)
    console.print(_note(report, first), markup=False)


def _note(report: Report, first: EpisodeResults) -> str:
    """What the columns mean, and what was assumed."""
    note = "Margin, delta and contribution margin (before GPU-hours): USD per 1k requests; [ ]: 95 % over episodes"
    if report.best_heuristic is not None:
        note = (
            "* best heuristic, chosen on validation seeds; delta and % (of contribution margin) against it on the same"
            " requests, p by sign-flip test, adjusted for the number of policies (Holm)."
            f" {note} (studentised bootstrap, paired for delta)"
        )
    if report.bounds is not None:
        clairvoyant, same = report.bounds_usd_per_1k.values()
        note = (
            f"{note}. Upper bounds of the margin: {clairvoyant:z.2f} with all knowledge, {same:z.2f} on average without"
            " that of the outcomes; of bound: of the first, both before GPU-hours that are paid in any case; gap"
            " closed: of the way from * to the second"
        )
    if any(report.untuned_usd_per_1k(name) is not None for name in report.results):
        note = f"{note}. untuned: margin of the same composite with its parameters as they come"
    if any(name.startswith(CONTROLS) for name in report.results):
        note = f"{note}. {SHUFFLED_MIX}, {MATCHED_COST}: content-blind, same tier shares, same cost of answers"
    if report.assumptions:
        kinds = [item.kind for item in report.assumptions]
        counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
        note = f"{note}. Inputs: {counts} (--json and --report list them)"
    note = f"{note}. IQM: interquartile mean over episodes. {router_words(first)}"
    if any(results.lifetime_usd.any() for results in report.results.values()):
        counted = any((r.cash_usd != r.margin_usd).any() for r in report.results.values())
        note = f"{note}. lifetime: customer lifetime value lost, {'part of' if counted else 'beside'} the margin"
    if any(results.count("refused").any() for results in report.results.values()):
        note = f"{note}. refused: turned away by contract (429), of all calls; the other shares are of the rest"
    if any(results.count("hedged").any() for results in report.results.values()):
        twice = {n: r.count("hedged").sum() / r.count("calls").sum() for n, r in report.results.items()}
        note = f"{note}. Sent twice, of all calls: {', '.join(f'{n} {x:.1%}' for n, x in twice.items())}"
    if fairness_documents(first):
        note = f"{note}. Jain's index: of the SLO attainment of a class's customers; 1: all alike"
    return f"{note}. SLO: answered inside every SLO of the class; lost: shed, abandoned or failed."


def _print_groups(report: Report, groups: Sequence[Group], console: Console, gap: int = WIDE_GAP) -> None:
    names = [f"{name} *" if name == report.best_heuristic else name for name in report.ranking]
    print_groups(console, ["policy", *names], groups, gap, [name for name in names if name.endswith(" *")])
    console.print()


def _money_groups(report: Report) -> list[Group]:
    names = report.ranking
    margin, contribution = report.margin_usd_per_1k, report.contribution_usd_per_1k
    digits = _digits(estimate.mean for estimate in (*margin.values(), *contribution.values()))
    groups = [make_group("", ["margin", "[95 % CI]"], [_with_interval(margin[n], digits, "") for n in names])]
    if report.paired:
        rows = [_paired_cells(report.paired.get(name), digits + 1) for name in names]
        groups.append(make_group("", ["delta", "[95 % CI]", "%", "p"], rows))
    if any(report.results[n].lifetime_usd.any() for n in names):
        parts = [
            (report.results[n].cash_usd, report.results[n].lifetime_usd, report.results[n].first_calls) for n in names
        ]
        cells = [[_usd(float(ratio_of_sums(usd, r[2], PER_1K)), digits) for usd in r[:2]] for r in parts]
        groups.append(make_group("", ["cash", "lifetime"], cells))
    groups.append(make_group("", ["contrib."], [[_usd(contribution[n].mean, digits)] for n in names]))
    groups.append(make_group("", ["IQM"], [[_usd(report.iqm_usd_per_1k(n), digits)] for n in names]))
    if any(report.untuned_usd_per_1k(name) is not None for name in names):
        groups.append(make_group("", ["untuned"], [[_optional(report.untuned_usd_per_1k(n), digits)] for n in names]))
    if report.bounds is not None:
        groups.append(make_group("", ["of bound", "gap closed"], [_bound_cells(report, name) for name in names]))
    return groups


def _bound_cells(report: Report, name: str) -> list[str]:
    """Share of the clairvoyant bound, and of the room above the best heuristic up to the same-information one."""
    share, closed = report.share_of_bound(name), report.gap_closed(name)
    return [
        "-" if share is None else f"{100.0 * share.mean:.1f} %",
        "-" if closed is None else f"{100.0 * closed:z.0f} %",
    ]


def _paired_cells(paired: Paired | None, digits: int) -> list[str]:
    """Delta, interval, per cent of contribution margin and adjusted p-value; blanks for the reference itself."""
    if paired is None:
        return [""] * 4
    pct = "-" if math.isnan(paired.delta_pct) else f"{paired.delta_pct:+z.1f}"
    p = "<.001" if paired.p_holm < 0.001 else f"{paired.p_holm:.3f}"
    return [*_with_interval(paired.delta_usd_per_1k, digits, "+"), pct, p]


def _optional(usd: float | None, digits: int) -> str:
    return "" if usd is None else _usd(usd, digits)


def _service_groups(report: Report) -> list[Group]:
    results = [report.results[name] for name in report.ranking]
    heads = results[0].class_names
    refused = []
    if any(r.count("refused").any() for r in results):
        refused = [make_group("refused %", heads, [_percents(r.share("refused")) for r in results])]
    fair = [fairness_documents(r) for r in results]
    worst = []
    if known := [name for name in heads if all(name in of for of in fair)]:
        cells = [_percents([of[name]["worst_slo_attainment"] for name in known]) for of in fair]
        index = [[f"{of[name]['jain']:.3f}" for name in known] for of in fair]
        worst = [make_group("worst customer SLO %", known, cells), make_group("Jain's index", known, index)]
    return [
        make_group("SLO %", heads, [_percents(r.share("slo_ok")) for r in results]),
        *worst,
        make_group("quality %", heads, [_percents(r.share("good", "served")) for r in results]),
        make_group("lost %", heads, [_percents(shed_shares(r)) for r in results]),
        *refused,
        make_group("actions %", list(ACTION_TITLES.values()), [_percents(action_shares(r).values()) for r in results]),
        make_group("busy %", results[0].pool_names, [_percents(r.utilisation.mean(axis=0)) for r in results]),
    ]


def _account_groups(report: Report) -> list[Group]:
    """Accounts that show at the figures' precision, then the margin."""
    by_policy = [accounts_usd_per_1k(report.results[name]) for name in report.ranking]
    digits = _digits(report.margin_usd_per_1k[name].mean for name in report.ranking)
    groups = []
    for account in ACCOUNTS:
        cells = [_usd(accounts[account], digits) for accounts in by_policy]
        if any(cell != _usd(0.0, digits) for cell in cells):
            first, _, second = account.partition("_")
            groups.append(make_group(first if second else "", [second or first], [[cell] for cell in cells]))
    return [*groups, make_group("", ["margin"], [[_usd(sum(accounts.values()), digits)] for accounts in by_policy])]


def _workflow_groups(report: Report) -> list[Group]:
    """For each kind of task: finished and failed shares, what a finished one brings and costs."""
    documents = [workflow_documents(report.results[name]) for name in report.ranking]
    heads = ["finished %", "failed %", "revenue", "cost", "remedies"]
    groups = []
    for kind in documents[0]:
        rows = []
        for of_policy in documents:
            row = of_policy[kind]
            money = [row[f"{name}_per_finished_task_usd"] for name in heads[2:]]
            cells = _percents([row["finished_share"], row["failed_share"]])
            rows.append([*cells, *("-" if usd is None else _usd(usd, 4) for usd in money)])
        groups.append(make_group(kind, heads, rows))
    return groups


def _usd(usd: float, digits: int, sign: str = "") -> str:
    """Thousands separated, never minus zero."""
    return f"{usd:{sign}z,.{digits}f}"


def _with_interval(estimate: Estimate, digits: int, sign: str) -> list[str]:
    """Cells of an estimate and its interval."""
    return [_usd(estimate.mean, digits, sign), estimate.interval(digits, sign)]


def _percents(shares: Iterable[float] | Floats) -> list[str]:
    return ["-" if math.isnan(share) else f"{100.0 * share:.1f}" for share in shares]


def _digits(values: Iterable[float]) -> int:
    """Decimals that show about four figures of the largest value; cents at least below 1,000."""
    largest = max((abs(value) for value in values), default=0.0)
    return int(min(max(3 - math.floor(math.log10(largest)), 0), 4)) if largest > 0.0 else 2
