"""The report as one HTML file: figures by plotly, which is written into the file, tables, and the words around them.

Made for a platform engineer and a finance partner: the answer first, then where the money comes from, what it was not
bought with, when it is earned, and where it stops being true. Colours are Okabe and Ito's, told apart by the
colour-blind; every figure is as wide as the page, and prints.
"""

from __future__ import annotations

import math
from pathlib import Path

from evaluation.controls import CONTROLS, MATCHED_COST, answer_cost_usd
from evaluation.fairness import fairness_documents
from evaluation.page_data import PageData
from evaluation.page_figures import figures
from evaluation.page_parts import drawn, frame, paragraph, section, table, text
from evaluation.page_sensitivity import assumptions_section, break_even_section
from evaluation.report import PER_1K, Report, accounts_usd_per_1k, action_shares, played_words, shed_shares, warnings_of
from evaluation.results import Floats
from evaluation.router_cost import router_words
from evaluation.statistics import Estimate, paired_estimate
from marginroute.whole_file import write_whole


def write_page(path: Path, report: Report, data: PageData, shown: str, command: str) -> None:
    """Writes the page, self-contained: it needs no network.

    Args:
        path: file to write, whole or not at all.
        report: the comparison.
        data: what was simulated beside it.
        shown: the policy of the headline.
        command: that made it.
    """
    write_whole(path, page(report, data, shown, command))


def page(report: Report, data: PageData, shown: str, command: str) -> str:
    """The HTML text."""
    body = [
        f"<h1>{text(report.scenario)}: what routing by <em>{text(shown)}</em> earns</h1>",
        paragraph(headline(report, shown), "headline"),
    ]
    good = report.tuned and report.calibration is not None and report.calibration["calibrated"]
    body = [paragraph(words, "note" if good else "warning") for words in warnings_of(report)] + body
    for key, (title, words, figure) in figures(report, data, shown).items():
        body.append(section(title, paragraph(words), drawn(figure, key)))
        if key == "tornado":
            body.append(break_even_section(data.tornado))
    body += [comparison_section(report, shown), _accounts(report, list(dict.fromkeys((shown, data.reference))))]
    if data.swaps is not None:
        body.append(_swaps(data))
    if report.assumptions:
        body.append(assumptions_section(report.assumptions))
    return frame(report.scenario, "\n".join(body), command)


def headline(report: Report, shown: str) -> str:
    """The answer in a few sentences of plain text."""
    first = report.results[shown]
    margin, hourly = report.margin_usd_per_1k[shown], report.margin_usd_per_hour[shown]
    words = [
        f"{shown} earns {_usd(margin)} per 1,000 requests after all costs ({_usd(hourly)} per hour), over"
        f" {played_words(report.episodes)} with {first.first_calls.sum():,} requests."
    ]
    paired = report.paired.get(shown)
    if paired is not None:
        pct = paired.delta_pct  # NaN where the heuristic has no contribution margin to be a share of
        share = "" if math.isnan(pct) else f" ({pct:+z.1f} % of contribution margin)"
        sure = "more than chance" if paired.delta_usd_per_1k.excludes_zero else "no more than chance may explain"
        words.append(
            f"Against {paired.vs}, the best {'tuned ' * report.tuned}heuristic, on the same requests, that is"
            f" {_usd(paired.delta_usd_per_1k, '+')} per 1,000 requests{share}, {paired.net_usd_per_1k:+z.2f} net of"
            f" what deciding costs: {sure} (p = {paired.p_holm:.3f})."
        )
    control = report.results.get(MATCHED_COST)
    if control is not None and shown not in CONTROLS:
        worth = paired_estimate(first.margin_usd - control.margin_usd, first.first_calls, scale=PER_1K)
        words.append(
            f"A content-blind mix of models that spends as much on answers ({answer_cost_usd(control):.2f} against"
            f" {answer_cost_usd(first):.2f}) earns {report.margin_usd_per_1k[MATCHED_COST].mean:z.2f}: choosing by"
            f" content is worth {_usd(worth, '+')}."
        )
    bounds, reached = report.bounds_usd_per_1k, report.share_of_bound(shown)
    if bounds["clairvoyant"] is not None and bounds["same_information"] is not None:
        of_it = "" if reached is None else f"; {shown} reaches {100.0 * reached.mean:z.1f} % of the first"
        words.append(
            f"No policy can earn more than {bounds['clairvoyant']:z.2f}, and none that cannot foresee which answers are"
            f" good more than {bounds['same_information']:z.2f}{of_it}"
            f"{' (before GPU-hours that are paid in any case)' if of_it else ''}."
        )
    return " ".join(words)


def markdown(report: Report, shown: str) -> str:
    """The comparison as a Markdown card: headline, table and accounts."""
    heads = ("policy", "margin", "95 %", "delta", "p", "contribution", "IQM", "SLO %", "good %", "lost %")
    lines = [line for words in warnings_of(report) for line in (f"**{words}**", "")]
    lines += [f"# {report.scenario}: {shown}", "", headline(report, shown), "", "| " + " | ".join(heads) + " |"]
    lines.append("| --- |" + " ---: |" * (len(heads) - 1))
    lines += ["| " + " | ".join(row) + " |" for row in _rows(report)]
    lines += ["", f"Accounts of {shown}, USD per 1,000 requests:", "", "| account | USD |", "| --- | ---: |"]
    accounts = accounts_usd_per_1k(report.results[shown])
    lines += [f"| {name.replace('_', ' ')} | {usd:z,.3f} |" for name, usd in accounts.items() if usd]
    lines.append(f"| **margin** | {sum(accounts.values()):z,.3f} |")
    if report.assumptions:
        lines += ["", "Inputs:", "", "| input | kind | value |", "| --- | --- | --- |"]
        lines += [f"| {item.name} | {item.kind} | {item.value} |" for item in report.assumptions]
    return "\n".join(lines) + "\n"


def _rows(report: Report) -> list[list[str]]:
    rows = []
    for name in report.ranking:
        results, margin, paired = report.results[name], report.margin_usd_per_1k[name], report.paired.get(name)
        rows.append(
            [
                f"{name} *" if name == report.best_heuristic else name,
                f"{margin.mean:z,.2f}",
                margin.interval(),
                _usd(paired.delta_usd_per_1k, "+") if paired else "",
                f"{paired.p_holm:.3f}" if paired else "",
                f"{report.contribution_usd_per_1k[name].mean:z,.2f}",
                f"{report.iqm_usd_per_1k(name):z,.2f}",
                _by_class(results.share("slo_ok")),
                _by_class(results.share("good", "served")),
                _by_class(shed_shares(results)),
            ]
        )
    return rows


def comparison_section(report: Report, shown: str, title: str = "All policies") -> str:
    """The table of all policies."""
    heads = ("policy", "margin", "95 %", "delta [95 %]", "p", "contribution", "IQM", "SLO %", "good %", "lost %")
    first = next(iter(report.results.values()))
    note = (
        "* best heuristic, chosen on other episodes. USD per 1,000 requests; contribution is before GPU-hours; delta is"
        " paired with *, its p-value adjusted for the number of policies (Holm); IQM: interquartile mean over episodes."
        f" SLO, good and lost (shed, abandoned or failed; refused calls apart) by customer class:"
        f" {', '.join(first.class_names)}."
        f" {router_words(first)}."
    )
    return section(title, table(heads, _rows(report), {shown}), paragraph(note, "note"), *_fairness(report, shown))


def _fairness(report: Report, shown: str) -> list[str]:
    """Whether customers of a class are served alike; nothing where no class has several."""
    fair = {name: fairness_documents(report.results[name]) for name in report.ranking}
    known = [name for name in fair[shown] if all(name in of for of in fair.values())]
    if not known:
        return []
    heads = [head for name in known for head in (f"worst of {name}, SLO %", f"Jain's index of {name}")]
    rows = []
    for policy, of in fair.items():
        pairs = [(f"{100.0 * of[name]['worst_slo_attainment']:.1f}", f"{of[name]['jain']:.3f}") for name in known]
        rows.append([policy, *(cell for pair in pairs for cell in pair)])
    words = "Customers of a class: SLO attainment of the one served worst, and Jain's index (1: all alike)."
    return [paragraph(words, "note"), table(("policy", *heads), rows, {shown})]


def _accounts(report: Report, names: list[str]) -> str:
    accounts = {name: accounts_usd_per_1k(report.results[name]) for name in names}
    rows = [
        [account.replace("_", " "), *(f"{accounts[name][account]:z,.3f}" for name in names)]
        for account in accounts[names[0]]
        if any(accounts[name][account] for name in names)
    ]
    rows.append(["margin", *(f"{sum(accounts[name].values()):z,.3f}" for name in names)])
    actions = {name: action_shares(report.results[name]) for name in names}
    kinds = [[kind, *(f"{100 * actions[name][kind]:.1f} %" for name in names)] for kind in actions[names[0]]]
    return section(
        "Accounts that add up, and what was decided",
        table(("USD per 1,000 requests", *names), rows, {"margin"}),
        table(("share of decisions", *names), kinds),
    )


def _swaps(data: PageData) -> str:
    swaps = data.swaps
    assert swaps is not None
    rows = [
        [str(x.decision), x.request, x.choice, x.other, f"{x.worth_usd:+.4f}"]
        for x in sorted(swaps.top, key=lambda x: -x.worth_usd)
    ]
    words = (
        f"{swaps.policy} decides otherwise than {swaps.reference} in {100 * swaps.share:.1f} % of the decisions of one"
        f" held-out episode. {swaps.examined} of them were played both ways, everything else as it was: one was worth"
        f" {_usd(swaps.worth_usd, '+', 4)} on average. The best and the worst:"
    )
    heads = ("decision", "request", swaps.policy, swaps.reference, "worth USD")
    return section("Where they differ, and what it was worth", paragraph(words), table(heads, rows, words_columns=(1,)))


def _usd(estimate: Estimate, sign: str = "", digits: int = 2) -> str:
    return f"USD {estimate.words(digits, sign)}"


def _by_class(shares: Floats) -> str:
    return " / ".join("-" if math.isnan(share) else f"{100.0 * share:.1f}" for share in shares)
