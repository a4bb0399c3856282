"""A backtest as a terminal table and as a page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from evaluation.backtest import FEWEST, METRICS, TOLERANCE_PCT, UNKNOWN
from evaluation.calibration import verdict_words
from evaluation.columns import print_columns, stdout_console
from evaluation.page_figures import PALETTE
from evaluation.page_parts import drawn, frame, paragraph, section, table, text

HEADS = ("pool", "figure", "answers", "P50 log", "P50 world", "off %", "P95 log", "P95 world", "off %")
NOTE = (
    f"Tolerances: {TOLERANCE_PCT['p50']:.0f} % at P50, {TOLERANCE_PCT['p95']:.0f} % at P95, 2 points of errors; pools"
    f" with fewer than {FEWEST} answers are not judged. Latencies in seconds from the request's arrival, cost in USD"
    " per 1,000 answers. Prefixes that prompts share, faults and the gateway's own queue are not in a log and not"
    " replayed."
)


def print_backtest(document: Mapping[str, Any]) -> None:
    """Prints predicted against logged figures, headed by the verdict."""
    console = stdout_console()
    console.print(f"[bold]{verdict_words(document)}[/bold]\n")
    console.print(facts(document) + "\n", markup=False)
    print_columns(console, HEADS, list(rows(document)), (2, 1, 3, 3))
    for words in document["outside"]:
        console.print(f"outside: {words}", markup=False)
    console.print(f"\n{NOTE}", markup=False)


def facts(document: Mapping[str, Any]) -> str:
    """What was replayed."""
    return (
        f"{document['log']}: {document['requests']:,} request{'s' if document['requests'] != 1 else ''} in"
        f" {document['span_s']:,.0f} s under their recorded"
        f" choices in the world of {document['scenario']}"
        f" ({document['skipped']:,} lines left out: shed, a stored answer, or no outcome)"
    )


def rows(document: Mapping[str, Any]) -> Iterator[list[str]]:
    """The cells of `HEADS`."""
    for name, found in document["stations"].items():
        first = name
        for metric in METRICS:
            if metric in found:
                scale = 1000.0 if metric == "cost_usd" else 1.0
                cells = [x for quantile in TOLERANCE_PCT for x in _cells(found[metric][quantile], scale)]
                yield [first, metric.removesuffix("_s").removesuffix("_usd"), str(found[metric]["answers"]), *cells]
                first = ""
        errors = found["errors"]
        predicted = "-" if name == UNKNOWN else f"{100.0 * errors['predicted']:.1f} %"
        shares = [f"{100.0 * errors['logged']:.1f} %", predicted]
        yield [first, "errors", str(found["requests"]), *shares, "", "", "", ""]


def backtest_page(document: Mapping[str, Any], command: str) -> str:
    """A self-contained page."""
    outside = [paragraph(words, "warning") for words in document["outside"]]
    body = [
        f"<h1>{text(document['scenario'])}: does the world predict the log?</h1>",
        paragraph(verdict_words(document), "headline" if document["calibrated"] else "warning"),
        paragraph(facts(document)),
        section("Predicted against logged", drawn(_figure(document), "backtest"), table(HEADS, list(rows(document)))),
        *([section("Outside the tolerances", *outside)] if outside else []),
        paragraph(NOTE, "note"),
    ]
    return frame(f"{document['scenario']}: backtest", "".join(body), command)


def _cells(compared: Mapping[str, Any], scale: float) -> list[str]:
    off = compared["error_pct"]
    figures = [f"{scale * compared[key]:.4g}" for key in ("logged", "predicted")]
    return [*figures, "-" if off is None else f"{off:+z.1f}"]


def _figure(document: Mapping[str, Any]) -> Any:
    import plotly.graph_objects as go

    figure = go.Figure(layout={"template": "plotly_white", "height": 380, "barmode": "group"})
    names = [
        (name, metric)
        for name, found in document["stations"].items()
        for metric in ("ttft_s", "e2e_s")
        if metric in found
    ]
    for i, (quantile, tolerance) in enumerate(TOLERANCE_PCT.items()):
        errors = [document["stations"][name][metric][quantile]["error_pct"] for name, metric in names]
        figure.add_bar(
            x=[f"{name} {metric.removesuffix('_s')}" for name, metric in names],
            y=errors,
            name=f"{quantile.upper()} (tolerance {tolerance:.0f} %)",
            marker={"color": PALETTE[i], "pattern": {"shape": ("", "/")[i]}},
        )
        for sign in (-1.0, 1.0):
            figure.add_hline(y=sign * tolerance, line_color=PALETTE[i], line_dash=("dash", "dot")[i])
    figure.update_yaxes(title="% that the world is off", automargin=True)
    return figure
