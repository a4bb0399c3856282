"""The figures of the report page, each with a title and a sentence that says how to read it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from envs.economics.ledger import ACCOUNTS
from evaluation.latency import GROWTH, LOWEST_S, METRICS
from evaluation.page_data import PageData
from evaluation.page_sensitivity import tornado_figure
from evaluation.report import PER_1K, Report, action_shares
from evaluation.results import EpisodeResults
from evaluation.statistics import Estimate

PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")
"""Okabe and Ito (2008)."""
DASHES = ("solid", "dash", "dot", "dashdot")
Figures = dict[str, tuple[str, str, Any]]


def figures(report: Report, data: PageData, shown: str) -> Figures:
    """All figures by the id of their place in the page."""
    reference = data.reference
    names = list(dict.fromkeys((shown, reference)))
    made: Figures = {
        "margins": (
            "Margin by policy",
            "USD per 1,000 requests with 95 % intervals over episodes. Dashed: no policy's mean on these"
            " episodes can be to the right (dotted: of those that do not see outcomes).",
            _margins(report),
        ),
        "waterfall": (
            "Where the money goes",
            f"{shown}, USD per 1,000 requests of all classes: revenue, what is paid back, what answers cost.",
            _waterfall(report.results[shown]),
        ),
        "classes": (
            "By customer class",
            "The same by class, before GPU-hours, which no class causes alone. The diamond is the contribution margin.",
            _classes(report.results[shown]),
        ),
        "slo": (
            "Promises kept",
            "Share of requests answered inside every SLO of their class. Unanswered requests count as missed.",
            _slo(report, names),
        ),
        "latency": (
            "Latency",
            "Share of answers that were faster, by class; time to first token left, whole answer right.",
            _latency(report.results[shown]),
        ),
    }
    if data.timelines:
        made["timeline"] = (
            "Over the episode",
            "Means over episodes: arrivals, margin as it is earned, requests in flight and waiting.",
            _timeline(data, names),
        )
    made["actions"] = ("What was decided", "Share of decisions by kind.", _actions(report, names))
    if data.swaps is not None:
        made["swaps"] = (
            "What deciding otherwise was worth",
            f"Decisions in which {data.swaps.policy} took another candidate than {data.swaps.reference}: mean worth of"
            " one in USD, in brackets how many were played both ways.",
            _swaps(data),
        )
    if data.robustness:
        made["robustness"] = (
            "Under other conditions",
            f"Gain of {shown} over {reference} in conditions that neither was tuned for, 95 % intervals.",
            _robustness(data),
        )
    if data.tornado:
        made["tornado"] = (
            "What the gain hangs on",
            f"Gain of {shown} over {reference} when one input is changed and everything else stays: the inputs that"
            " move it most. Policies stay as they are.",
            tornado_figure(data.tornado),
        )
    return made


def _figure(height: int, **layout: Any) -> Any:
    import plotly.graph_objects as go

    base = {
        "template": "plotly_white",
        "height": height,
        "margin": {"l": 10, "r": 10, "t": 40, "b": 10},
        "font": {"size": 12},
        "colorway": PALETTE,
        "legend": {"orientation": "h", "y": -0.18, "yanchor": "top", "x": 0},
    }
    figure = go.Figure(layout=base | layout)
    figure.update_xaxes(automargin=True)
    figure.update_yaxes(automargin=True)
    return figure


def error_bars(rows: Sequence[Estimate]) -> dict[str, Any]:
    """Intervals as plotly draws them."""
    return {
        "type": "data",
        "symmetric": False,
        "array": [np.nan_to_num(row.high - row.mean) for row in rows],
        "arrayminus": [np.nan_to_num(row.mean - row.low) for row in rows],
    }


def _margins(report: Report) -> Any:
    figure = _figure(90 + 24 * len(report.ranking), showlegend=False)
    names = report.ranking[::-1]
    rows = [report.margin_usd_per_1k[name] for name in names]
    mean = [row.mean for row in rows]
    figure.add_scatter(
        x=mean,
        y=[f"{name} *" if name == report.best_heuristic else name for name in names],
        mode="markers",
        marker={"size": 9, "color": PALETTE[0]},
        error_x=error_bars(rows),
    )
    for (name, usd), dash in zip(report.bounds_usd_per_1k.items(), ("dash", "dot"), strict=True):
        if usd is not None:
            figure.add_vline(x=usd, line_dash=dash, line_color=PALETTE[5])
            figure.add_annotation(
                x=usd,
                y=1.0,
                yref="paper",
                yshift=0 if name == "clairvoyant" else 14,
                yanchor="bottom",
                xanchor="right",
                text=name.replace("_", " "),
                showarrow=False,
                font={"color": PALETTE[5], "size": 11},
            )
    figure.update_xaxes(title="USD per 1,000 requests")
    return figure


def _per_class(results: EpisodeResults) -> NDArray[np.float64]:
    """(A, K + 1) USD per 1,000 requests by account and class."""
    totals = results.ledger_usd.sum(axis=0)
    return np.asarray(PER_1K * totals / results.first_calls.sum())


def _waterfall(results: EpisodeResults) -> Any:
    usd = _per_class(results).sum(axis=1)
    kept = [a for a in range(len(ACCOUNTS)) if abs(usd[a]) > 1e-9]
    figure = _figure(360)
    figure.add_waterfall(
        x=[*(ACCOUNTS[a].replace("_", " ") for a in kept), "margin"],
        y=[*usd[kept], usd.sum()],
        measure=["relative"] * len(kept) + ["total"],
        text=[f"{x:z,.2f}" for x in (*usd[kept], usd.sum())],
        textposition="outside",
        increasing={"marker": {"color": PALETTE[0]}},
        decreasing={"marker": {"color": PALETTE[1]}},
        totals={"marker": {"color": PALETTE[2]}},
        cliponaxis=False,
    )
    figure.update_yaxes(title="USD per 1,000 requests")
    return figure


def _classes(results: EpisodeResults) -> Any:
    usd = _per_class(results)[:, :-1]
    figure = _figure(380, barmode="relative")
    kept = [a for a in range(len(ACCOUNTS)) if np.abs(usd[a]).max() > 1e-9]
    for i, a in enumerate(kept):
        figure.add_bar(
            x=list(results.class_names),
            y=usd[a],
            name=ACCOUNTS[a].replace("_", " "),
            marker={"color": PALETTE[i % len(PALETTE)], "pattern": {"shape": "/" if usd[a].min() < 0 else ""}},
        )
    figure.add_scatter(
        x=list(results.class_names),
        y=usd.sum(axis=0),
        mode="markers",
        marker={"symbol": "diamond", "size": 11, "color": "#000000", "line": {"color": "#ffffff", "width": 1}},
        name="contribution",
    )
    for name, contribution in zip(results.class_names, usd.sum(axis=0), strict=True):
        words = {"text": f"<b>{contribution:z.2f}</b>", "bgcolor": "rgba(255, 255, 255, 0.85)", "showarrow": False}
        figure.add_annotation(x=name, y=contribution, xanchor="left", xshift=9, borderpad=1, **words)
    figure.update_yaxes(title="USD per 1,000 requests")
    return figure


def _slo(report: Report, names: list[str]) -> Any:
    figure = _figure(320, barmode="group")
    for i, name in enumerate(names):
        results = report.results[name]
        share = 100.0 * results.share("slo_ok")
        figure.add_bar(
            x=list(results.class_names),
            y=share,
            name=name,
            text=[f"{x:.1f}" for x in share],
            textposition="outside",
            marker={"color": PALETTE[i], "pattern": {"shape": ("", "/")[i]}},
        )
    figure.update_yaxes(title="% of requests", range=[0, 109])
    return figure


def _latency(results: EpisodeResults) -> Any:
    from plotly.subplots import make_subplots

    figure = make_subplots(1, 2, subplot_titles=("time to first token", "whole answer"), horizontal_spacing=0.08)
    figure.update_layout(_figure(360).layout)
    edges_s = LOWEST_S * GROWTH ** np.arange(1, results.latency_histogram.shape[-1] + 1)
    for column, metric in enumerate(("ttft", "e2e"), start=1):
        counts = results.latency_histogram[:, METRICS.index(metric)].sum(axis=0)
        for k, name in enumerate(results.class_names):
            if counts[k].sum() == 0:
                continue
            share = np.cumsum(counts[k]) / counts[k].sum()
            part = slice(max(int(np.argmax(share > 0)) - 1, 0), int(np.argmax(share >= 1.0 - 1e-9)) + 2)
            line = {"color": PALETTE[k % len(PALETTE)], "dash": DASHES[k % len(DASHES)]}
            figure.add_scatter(
                x=edges_s[part], y=100.0 * share[part], name=name, line=line, showlegend=column == 1, row=1, col=column
            )
    figure.update_xaxes(type="log", title="seconds", automargin=True)
    figure.update_yaxes(title="% faster", row=1, col=1, automargin=True)
    return figure


def _timeline(data: PageData, names: list[str]) -> Any:
    from plotly.subplots import make_subplots

    titles = ("arrivals per second", "margin, USD per hour", "requests in flight, all stations", "requests waiting")
    figure = make_subplots(4, 1, shared_xaxes=True, subplot_titles=titles, vertical_spacing=0.06)
    figure.update_layout(_figure(640).layout)
    for i, name in enumerate(names):
        if name not in data.timelines:
            continue
        line = data.timelines[name]
        rows = (line.margin_usd_per_hour, line.in_flight.sum(axis=0), line.waiting.sum(axis=0))
        style = {"color": PALETTE[i], "dash": DASHES[i]}
        if i == 0:
            figure.add_scatter(
                x=line.time_s, y=line.arrivals_per_s, line={"color": "#555"}, showlegend=False, row=1, col=1
            )
        for row, values in enumerate(rows, start=2):
            figure.add_scatter(x=line.time_s, y=values, name=name, line=style, showlegend=row == 2, row=row, col=1)
    figure.update_xaxes(title="seconds into the episode", row=4, col=1)
    figure.update_yaxes(automargin=True, rangemode="tozero")
    return figure


def _actions(report: Report, names: list[str]) -> Any:
    figure = _figure(140 + 40 * len(names), barmode="stack")
    shares = {name: action_shares(report.results[name]) for name in names}
    for i, kind in enumerate(shares[names[0]]):
        figure.add_bar(
            y=names[::-1],
            x=[100.0 * shares[name][kind] for name in names[::-1]],
            name=kind,
            orientation="h",
            marker={"color": PALETTE[i], "pattern": {"shape": ("", "/", ".", "x", "-")[i]}},
        )
    figure.update_xaxes(title="% of decisions")
    figure.update_layout(legend={"y": -0.6})
    return figure


def _swaps(data: PageData) -> Any:
    assert data.swaps is not None
    pairs = sorted(data.swaps.by_pair.items(), key=lambda item: item[1][0] * item[1][1])
    figure = _figure(110 + 26 * len(pairs), showlegend=False)
    figure.add_bar(
        y=[f"{choice} not {other} ({n})" for (choice, other), (_, n) in pairs],
        x=[usd for _, (usd, _) in pairs],
        orientation="h",
        marker={"color": [PALETTE[0] if usd >= 0 else PALETTE[5] for _, (usd, _) in pairs]},
    )
    figure.update_xaxes(title="USD per decision")
    return figure


def _robustness(data: PageData) -> Any:
    figure = _figure(110 + 40 * len(data.robustness), showlegend=False)
    rows = list(data.robustness.values())
    figure.add_scatter(
        y=list(data.robustness),
        x=[row.mean for row in rows],
        mode="markers",
        marker={"size": 10, "color": PALETTE[0]},
        error_x=error_bars(rows),
    )
    figure.add_vline(x=0.0, line_color="#555")
    figure.update_xaxes(title="gain, USD per 1,000 requests")
    figure.update_yaxes(autorange="reversed")
    return figure
