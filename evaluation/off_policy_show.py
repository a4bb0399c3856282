"""Off-policy evaluation as a terminal table and as a page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from evaluation.calibration import verdict_words
from evaluation.columns import print_columns, stdout_console
from evaluation.page_figures import PALETTE, error_bars
from evaluation.page_parts import drawn, frame, paragraph, section, table, text
from evaluation.statistics import Estimate

ESTIMATORS = {
    "logged": "logged: what the log itself earned",
    "dr": "DR: doubly robust",
    "gain": "gain: DR less logged",
    "switch": "switch: DR without large weights",
    "snips": "SNIPS: weighted, self-normalised",
    "ips": "IPS: weighted",
    "dm": "DM: the policy's own expectation",
}
"""In the order in which they are read; the first three are the answer, the others should agree with DR."""
ESTIMAND = (
    "What is estimated is the own margin of a decision at the states of the log: what the customer pays for the request"
    " less credits, refunds and the cost of the answer. The queues that the policy itself would have built are not in"
    " the log, nor are GPU-hours."
)


def print_off_policy(log: str, found: Mapping[str, Mapping[str, Any]]) -> None:
    """Prints the estimates of every policy and how much of it the log can speak about."""
    console = stdout_console()
    for name, document in found.items():
        if words := verdict_words(document["calibration"]):
            console.print(f"[bold]{words}[/bold]\n")
        console.print(f"[bold]{name}[/bold] on {log}: {overlap_words(document)}\n")
        print_columns(console, ("USD per 1k decisions", "mean", "[95 % CI]"), _rows(document), (1, 2))
        if document["refusal"]:
            console.print(f"\nNo answer: {document['refusal']}.", markup=False)
        console.print()
    console.print(ESTIMAND, markup=False)


def overlap_words(document: Mapping[str, Any]) -> str:
    """How much of a policy the log can speak about."""
    overlap = document["overlap"]
    share = 100.0 * overlap["effective"] / overlap["decisions"]
    decisions = f"{overlap['decisions']:,} decision{'s' if overlap['decisions'] != 1 else ''}"
    return (
        f"{decisions} with an outcome ({document['skipped']:,} without, or of shadow mode,"
        " are left out), worth"
        f" {overlap['effective']:,.0f} of the policy's own ({share:.0f} %); it takes the logged candidate in"
        f" {100.0 * overlap['agreement']:.0f} %, one that the log could not have taken in"
        f" {100.0 * overlap['uncovered']:.1f} %; mean weight {overlap['mean_weight']:.2f}, largest"
        f" {overlap['largest_weight']:.1f}; {100.0 * document['labelled']:.0f} % of the answers are labelled"
    )


def off_policy_page(log: str, found: Mapping[str, Mapping[str, Any]], command: str) -> str:
    """A self-contained page: per policy the estimates as figure and table, or the refusal."""
    body = [f"<h1>{text(log)}: what other policies would have earned</h1>", paragraph(ESTIMAND)]
    for number, (name, document) in enumerate(found.items()):
        parts = [paragraph(overlap_words(document))]
        if words := verdict_words(document["calibration"]):
            parts.insert(0, paragraph(words, "note" if document["calibration"]["calibrated"] else "warning"))
        if document["refusal"]:
            parts.append(paragraph(f"No answer: {document['refusal']}.", "warning"))
        parts.append(drawn(_figure(document), f"estimates-{number}"))
        parts.append(table(("USD per 1,000 decisions", "mean", "95 %"), _rows(document), {ESTIMATORS["dr"]}))
        body.append(section(name, *parts))
    return frame(log, "".join(body), command)


def _rows(document: Mapping[str, Any]) -> list[list[str]]:
    estimates = document["usd_per_1k_decisions"]
    return [
        [words, f"{x.mean:{sign}z,.2f}", x.interval(2, sign)]
        for name, words in ESTIMATORS.items()
        if name in estimates
        for x, sign in [(_estimate(estimates[name]), "+" if name == "gain" else "")]
    ]


def _estimate(found: Mapping[str, float | None]) -> Estimate:
    """Out of the document, where null stands for what there is not."""
    return Estimate(*(math.nan if (x := found[key]) is None else x for key in ("mean", "low", "high")))


def _figure(document: Mapping[str, Any]) -> Any:
    import plotly.graph_objects as go

    estimates = document["usd_per_1k_decisions"]
    names: Sequence[str] = [name for name in ESTIMATORS if name in estimates and name != "gain"][::-1]
    figure = go.Figure(layout={"template": "plotly_white", "height": 110 + 36 * len(names), "showlegend": False})
    figure.add_scatter(
        x=[estimates[name]["mean"] for name in names],
        y=[ESTIMATORS[name] for name in names],
        mode="markers",
        marker={"size": 10, "color": [PALETTE[1] if name == "logged" else PALETTE[0] for name in names]},
        error_x=error_bars([_estimate(estimates[name]) for name in names]),
    )
    figure.update_xaxes(title="USD per 1,000 decisions", automargin=True)
    figure.update_yaxes(automargin=True)
    return figure
