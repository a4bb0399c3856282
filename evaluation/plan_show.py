"""A plan as a terminal table, and as a page with its curve."""

from __future__ import annotations

from collections.abc import Sequence

from evaluation.columns import print_columns, stdout_console
from evaluation.page_figures import DASHES, PALETTE, error_bars
from evaluation.page_parts import drawn, frame, paragraph, table, text
from evaluation.plan import Row, break_even
from evaluation.report import played_words
from evaluation.statistics import Estimate

HEADS = ("policy", "USD/h", "[95 % CI]", "change", "[95 % CI]", "SLO %", "lost %", "busy %")


def print_plan(scenario: str, rows: Sequence[Row], episodes: int) -> None:
    """Prints the rows and the break-even points."""
    console = stdout_console()
    console.print(f"[bold]{scenario}[/bold]: {played_words(episodes)} per setting, the same seeds in each")
    console.print(f"{', '.join(rows[0].setting)}\n", markup=False)
    heads = [*short(list(rows[0].setting)), *HEADS]
    print_columns(console, heads, [[*row.setting.values(), *cells(row)] for row in rows], (len(heads) - 7, 2, 2, 3))
    if lines := break_even_lines(rows):
        console.print()
        for line in lines:
            console.print(line, markup=False)
    console.print(
        "\nMargin in USD per hour after all costs; change: paired with the first setting. SLO: lowest class; lost:"
        " highest class. Policies stay as tuned for the scenario itself.",
        markup=False,
    )


def short(keys: Sequence[str]) -> list[str]:
    """Each dotted key without what goes before, as far as they stay different."""
    parts = [key.split(".") for key in keys]
    for kept in range(1, max(map(len, parts))):
        found = [".".join(part[-kept:]) for part in parts]
        if len(set(found)) == len(keys):
            return found
    return list(keys)


def cells(row: Row) -> list[str]:
    """The columns of `HEADS`."""
    margin = _with_interval(row.margin_usd_per_hour, "")
    change = ["", ""] if row.change_usd_per_hour is None else _with_interval(row.change_usd_per_hour, "+")
    return [row.policy, *margin, *change, f"{row.slo_pct:.1f}", f"{row.lost_pct:.1f}", f"{row.busy_pct:.1f}"]


def break_even_lines(rows: Sequence[Row]) -> list[str]:
    """A sentence per policy: where its margin is zero along the one key that varies, if that is numeric."""
    key, *others = rows[0].setting
    values = [row.setting[key] for row in rows]
    if others or len(set(values)) == 1:
        return []
    lines = []
    for name, points in break_even(rows, key).items():
        if points:
            lines.append(f"{name} breaks even at {key} = {', '.join(f'{x:.3g}' for x in points)}.")
        else:
            first = next(row for row in rows if row.policy == name)
            does = "earns" if first.margin_usd_per_hour.mean > 0.0 else "loses"
            low, high = min(values, key=float), max(values, key=float)
            lines.append(f"{name} {does} all the way from {key} = {low} to {high}: no break-even point in between.")
    return lines


def plan_page(scenario: str, rows: Sequence[Row], command: str) -> str:
    """A self-contained page: the curve, then the table."""
    import plotly.graph_objects as go

    keys = list(rows[0].setting)
    figure = go.Figure(layout={"template": "plotly_white", "height": 460, "legend": {"orientation": "h", "y": 1.1}})
    for i, name in enumerate(dict.fromkeys(row.policy for row in rows)):
        mine = [row for row in rows if row.policy == name]
        usd = [row.margin_usd_per_hour for row in mine]
        figure.add_scatter(
            x=[", ".join(row.setting.values()) for row in mine],
            y=[x.mean for x in usd],
            name=name,
            line={"color": PALETTE[i % len(PALETTE)], "dash": DASHES[i % len(DASHES)]},
            error_y=error_bars(usd),
        )
    figure.add_hline(y=0.0, line_color="#555")
    figure.update_xaxes(title=", ".join(keys), type="category", automargin=True)
    figure.update_yaxes(title="margin, USD per hour", automargin=True)
    rows_shown = [[*row.setting.values(), *cells(row)] for row in rows]
    body = [
        f"<h1>{text(scenario)}: margin by {text(', '.join(keys))}</h1>",
        drawn(figure, "plan"),
        *(paragraph(line) for line in break_even_lines(rows)),
        table((*keys, *HEADS), rows_shown),
    ]
    return frame(scenario, "".join(body), command)


def _with_interval(estimate: Estimate, sign: str) -> list[str]:
    return [f"{estimate.mean:{sign}z,.2f}", estimate.interval(2, sign)]
