"""The tornado plot, its table of break-even values, and the list of assumptions, as parts of a page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from evaluation.assumptions import Assumption
from evaluation.page_parts import paragraph, section, table
from evaluation.sensitivity import Bar

LOW_COLOUR, HIGH_COLOUR = "#0072B2", "#E69F00"


def tornado_figure(bars: Sequence[Bar]) -> Any:
    """Horizontal bars from the gain at an input's low end to that at its high end, longest on top."""
    import plotly.graph_objects as go

    middle = bars[0].gains[1.0].mean
    layout = {"template": "plotly_white", "height": 130 + 44 * len(bars), "barmode": "overlay", "font": {"size": 12}}
    figure = go.Figure(layout=layout | {"margin": {"l": 10, "r": 10, "t": 30, "b": 10}})
    for i, (end, colour, pattern) in enumerate((("low", LOW_COLOUR, ""), ("high", HIGH_COLOUR, "/"))):
        factors = [getattr(bar, end) for bar in bars]
        figure.add_bar(
            y=[bar.name for bar in bars],
            x=[bar.gains[f].mean - middle for bar, f in zip(bars, factors, strict=True)],
            base=middle,
            text=[f"x{f:.3g}" for f in factors],
            orientation="h",
            width=(0.8, 0.45)[i],  # both are seen where they lie on one side
            name=("lower value", "higher value")[i],
            marker={"color": colour, "pattern": {"shape": pattern}},
        )
    figure.add_vline(x=middle, line_color="#555")
    figure.add_vline(x=0.0, line_color="#555", line_dash="dash")
    figure.update_xaxes(title="gain, USD per 1,000 requests (dashed: none)", automargin=True)
    figure.update_yaxes(autorange="reversed", automargin=True)
    figure.update_layout(legend={"orientation": "h", "y": -0.3, "yanchor": "top", "x": 0})
    return figure


def break_even_section(bars: Sequence[Bar]) -> str:
    """The same figures as a table, with the value at which the gain is gone."""
    rows = []
    for bar in bars:
        ends = [f"{bar.gains[f].words(2, '+')} at x{f:.3g}" for f in (bar.low, bar.high)]
        rows.append([bar.name, bar.break_even_words, *ends, bar.today])
    heads = ("input", "gain is zero at", "gain at the low end", "gain at the high end", "as it is")
    words = (
        "Factors are of the scenario's own values; the gain is in USD per 1,000 requests with 95 % intervals, and taken"
        " as linear between the values that were played."
    )
    return section("Break-even values", table(heads, rows, words_columns=(4,)), paragraph(words, "note"))


def assumptions_section(found: Sequence[Assumption]) -> str:
    """Every input and where it comes from."""
    rows = [[item.name, item.kind, item.value, item.source] for item in found]
    words = "Put in your own figures for what is assumed before you believe a margin."
    heads = ("input", "kind", "value", "source")
    return section("Inputs", paragraph(words), table(heads, rows, words_columns=(1, 2, 3)))
