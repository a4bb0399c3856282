"""Several comparisons in one table: a scenario under its conditions, or all scenarios of the suite.

A gain is the paired difference of the policy shown and its reference. p-values are adjusted over the rows (Holm), and
gains are pooled by the interquartile mean over all episodes of all rows, each in per cent of its row's contribution
margin (Agarwal et al., Deep reinforcement learning at the edge of the statistical precipice, NeurIPS 2021), with a
bootstrap that resamples the episodes of every row.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from evaluation.columns import print_columns, stdout_console
from evaluation.page_figures import PALETTE, error_bars
from evaluation.page_parts import drawn, paragraph, section, table
from evaluation.report import PER_1K, Report, shed_shares
from evaluation.results import Floats
from evaluation.statistics import Estimate, holm, interquartile_mean, paired_estimate, sign_flip_p_value

if TYPE_CHECKING:
    from evaluation.contest import Contest

RESAMPLES = 4_999
HEADS = ("policy", "against", "margin", "gain", "[95 % CI]", "%", "p Holm", "gap closed", "SLO %", "good %", "lost %")
NOTE = (
    "Gain: paired with the policy beside it, USD per 1k requests; %: of contribution margin; p: sign-flip test,"
    " adjusted over the rows (Holm); gap closed: of the way from the best heuristic to the same-information bound"
    " (--bound). SLO, good: lowest class; lost: highest class."
)


@dataclass(frozen=True)
class Row:
    """One comparison.

    Attributes:
        name: of the condition or the scenario.
        policy, reference: names.
        margin: of the policy, USD per 1k requests.
        gain: paired with the reference; pct: in per cent of its contribution margin.
        p_value: sign-flip test; p_holm: adjusted over the rows.
        gap_closed: None where there is no bound or no room.
        slo_pct, good_pct: lowest class; lost_pct: highest class.
        gains_pct: (E,) gain of each episode in per cent of the reference's mean contribution; empty without any.
        calibrated: verdict of the scenario's last backtest; None without one.
    """

    name: str
    policy: str
    reference: str
    margin: Estimate
    gain: Estimate
    pct: float
    p_value: float
    p_holm: float
    gap_closed: float | None
    slo_pct: float
    good_pct: float
    lost_pct: float
    gains_pct: Floats
    calibrated: bool | None


def summarise(judged: Mapping[str, tuple[Report, Contest]]) -> list[Row]:
    """A row per comparison, p-values adjusted."""
    rows = [_row(name, report, contest) for name, (report, contest) in judged.items()]
    adjusted = holm([row.p_value for row in rows])
    return [replace(row, p_holm=float(p)) for row, p in zip(rows, adjusted, strict=True)]


def pooled_pct(rows: Sequence[Row], seed: int = 0) -> Estimate | None:
    """Interquartile mean of the gains of all episodes of all rows, in per cent; no interval where a row has but one."""
    gains = [row.gains_pct for row in rows if len(row.gains_pct)]
    if not gains:
        return None
    mean = float(interquartile_mean(np.concatenate(gains)))
    if min(map(len, gains)) < 2:
        return Estimate(mean, math.nan, math.nan)
    rng = np.random.default_rng(seed)
    drawn_again = [x[rng.integers(len(x), size=(RESAMPLES, len(x)))] for x in gains]
    low, high = np.quantile(interquartile_mean(np.concatenate(drawn_again, axis=1)), [0.025, 0.975])
    return Estimate(mean, float(low), float(high))


def _row(name: str, report: Report, contest: Contest) -> Row:
    policy, reference = contest.shown, contest.reference
    ours, theirs = report.results[policy], report.results[reference]
    gain_usd = ours.margin_usd - theirs.margin_usd
    base_usd = float(theirs.contribution_usd.mean())
    gain = paired_estimate(gain_usd, ours.first_calls, scale=PER_1K)
    return Row(
        name=name,
        policy=policy,
        reference=reference,
        margin=report.margin_usd_per_1k[policy],
        gain=gain,
        pct=100.0 * float(gain_usd.mean()) / base_usd if base_usd > 0.0 else math.nan,
        p_value=sign_flip_p_value(gain_usd),
        p_holm=math.nan,
        gap_closed=report.gap_closed(policy),
        slo_pct=100.0 * float(np.nanmin(ours.share("slo_ok"))),
        good_pct=100.0 * float(np.nanmin(ours.share("good", "served"))),
        lost_pct=100.0 * float(np.nanmax(shed_shares(ours))),
        gains_pct=100.0 * gain_usd / base_usd if base_usd > 0.0 else np.zeros(0),
        calibrated=None if report.calibration is None else bool(report.calibration["calibrated"]),
    )


def summary_document(rows: Sequence[Row]) -> dict[str, Any]:
    """The rows as plain data; figures that do not exist are null."""
    pooled = pooled_pct(rows)
    return {
        "rows": {
            row.name: {
                "policy": row.policy,
                "vs": row.reference,
                "margin_usd_per_1k_requests": row.margin.to_dict(),
                "gain_usd_per_1k_requests": row.gain.to_dict(),
                "gain_pct": _finite(row.pct),
                "p_value": row.p_value,
                "p_holm": row.p_holm,
                "gap_closed": row.gap_closed,
                "slo_attainment_min": _finite(row.slo_pct / 100.0),
                "quality_min": _finite(row.good_pct / 100.0),
                "lost_max": _finite(row.lost_pct / 100.0),
                "calibrated": row.calibrated,
            }
            for row in rows
        },
        "pooled_gain_pct": None if pooled is None else {"iqm": pooled.mean, "ci95": pooled.ci95},
    }


def print_summary(title: str, what: str, rows: Sequence[Row]) -> None:
    """Prints the rows and the pooled gain."""
    console = stdout_console()
    pairs = {f"{row.policy} against {row.reference}" for row in rows}
    console.print(f"[bold]{title}[/bold]" + (f": {pairs.pop()}\n" if len(pairs) == 1 else "\n"))
    if pairs:
        for row in rows:
            console.print(f"{row.name}: {row.policy} against {row.reference}", markup=False)
        console.print()
    shown = [[_named(row), *_cells(row)[2:]] for row in rows]
    print_columns(console, (what, *HEADS[2:]), shown, (1, 1, 4, 1, 3))
    console.print(f"\n{pooled_words(rows)} {NOTE}", markup=False)


def pooled_words(rows: Sequence[Row]) -> str:
    """The pooled gain in a sentence."""
    pooled = pooled_pct(rows)
    if pooled is None:
        return "No contribution margin to pool gains by."
    return (
        f"Pooled gain (interquartile mean over the episodes of all rows), % of contribution margin:"
        f" {pooled.words(2, '+')}."
    )


def summary_section(title: str, what: str, rows: Sequence[Row]) -> str:
    """The rows as a figure and a table of a page."""
    import plotly.graph_objects as go

    figure = go.Figure(layout={"template": "plotly_white", "height": 120 + 34 * len(rows), "showlegend": False})
    figure.add_scatter(
        y=[row.name for row in rows],
        x=[row.gain.mean for row in rows],
        mode="markers",
        marker={"size": 10, "color": PALETTE[0]},
        error_x=error_bars([row.gain for row in rows]),
    )
    figure.add_vline(x=0.0, line_color="#555")
    figure.update_xaxes(title="gain, USD per 1,000 requests", automargin=True)
    figure.update_yaxes(automargin=True, autorange="reversed")
    shown = table((what, *HEADS), [[_named(row), *_cells(row)] for row in rows])
    return section(title, paragraph(pooled_words(rows)), drawn(figure, "summary"), shown, paragraph(NOTE, "note"))


def _named(row: Row) -> str:
    return f"{row.name} (not calibrated)" if row.calibrated is False else row.name


def _cells(row: Row) -> list[str]:
    p = "<.001" if row.p_holm < 0.001 else f"{row.p_holm:.3f}"
    closed = "-" if row.gap_closed is None else f"{100.0 * row.gap_closed:.0f} %"
    figures = [f"{row.margin.mean:z,.2f}", f"{row.gain.mean:+z,.2f}", row.gain.interval(2, "+")]
    shares = [f"{x:.1f}" for x in (row.slo_pct, row.good_pct, row.lost_pct)]
    return [row.policy, row.reference, *figures, "-" if math.isnan(row.pct) else f"{row.pct:+z.1f}", p, closed, *shares]


def _finite(x: float) -> float | None:
    return x if math.isfinite(x) else None
