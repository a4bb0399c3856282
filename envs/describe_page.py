"""The plots of `python -m envs describe`, as one HTML page that needs nothing else."""

from __future__ import annotations

import html
from typing import Any

import numpy as np

from envs.workload.statistics import fano, on_clock, prefix_hits
from envs.workload.traces import Trace

Array = np.ndarray[Any, Any]
Line = tuple[str, Array, Array]

_FANO_S = np.geomspace(0.1, 600.0, 25)
_CACHE_TOKENS = tuple(float(size) for size in np.geomspace(1e5, 1e9, 25))
_POINTS = 400  # of a distribution function


def page(titles: list[str], streams: list[Trace], rows: list[tuple[str, ...]], clock_s: float) -> str:
    """The table and the plots of one or two streams.

    Args:
        titles: (N,) names of the streams.
        streams: (N,) requests.
        rows: of the table: label and one text per stream.
        clock_s: coarse clock that dispersion was measured on; 0: none.
    """
    named = list(zip(titles, streams, strict=True))
    spread = [_dispersion(title, stream, clock_s) for title, stream in named]
    figures = [
        _figure("Arrivals", "s", "requests/s", [_arrivals(*pair) for pair in named]),
        _figure("Dispersion", "window, s", "variance / mean of counts", spread, "log", "log"),
    ]
    for label, name in (("Prompt", "prompt_tokens"), ("Output", "output_tokens")):
        lines = [_distribution(title, getattr(stream, name)) for title, stream in named]
        figures.append(_figure(f"{label} lengths", "tokens", "share at most as long", lines, "log"))
    for column, plot, words, scale in (
        ("tenant_name", _clients, ("Clients", "clients, largest first", "share of requests"), "linear"),
        ("session_index", _sizes, ("Sessions", "requests of a session", "share with at least as many"), "log"),
        ("prefix_hash", _hits, ("Prefix hits within reach", "LRU cache, tokens", "share of prompt tokens"), "linear"),
    ):
        lines = [plot(*pair) for pair in named if getattr(pair[1], column) is not None]
        if lines:
            figures.append(_figure(*words, lines, "log", scale))
    plots = "\n".join(
        figure.to_html(full_html=False, include_plotlyjs=number == 0) for number, figure in enumerate(figures)
    )
    heads = "".join(f"<th>{html.escape(title)}</th>" for title in ("", *titles))
    body = "\n".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return _PAGE.format(title=html.escape(" and ".join(titles)), heads=heads, body=body, plots=plots)


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 15px system-ui, sans-serif; max-width: 1000px; margin: 2em auto; padding: 0 1em; }}
td, th {{ padding: 0.1em 1em 0.1em 0; text-align: right; }} td:first-child {{ text-align: left; }}
</style></head><body><h1>{title}</h1>
<table><tr>{heads}</tr>
{body}
</table>
{plots}
</body></html>
"""


def _figure(title: str, x: str, y: str, lines: list[Line], x_scale: str = "linear", y_scale: str = "linear") -> Any:
    import plotly.graph_objects

    figure = plotly.graph_objects.Figure()
    for name, across, up in lines:
        figure.add_trace(plotly.graph_objects.Scatter(x=across.tolist(), y=up.tolist(), name=name, mode="lines"))
    figure.update_layout(title=title, height=380, template="simple_white", legend={"orientation": "h", "y": 1.12})
    figure.update_xaxes(title=x, type=x_scale)
    figure.update_yaxes(title=y, type=y_scale, rangemode="tozero" if y_scale == "linear" else "normal")
    return figure


def _arrivals(title: str, stream: Trace) -> Line:
    width_s = max(60.0, stream.span_s / 1000.0)
    counts = np.bincount((stream.arrived_at_s / width_s).astype(np.int64))
    return title, np.arange(len(counts)) * width_s, counts / width_s


def _dispersion(title: str, stream: Trace, clock_s: float) -> Line:
    arrived_s = on_clock(stream.arrived_at_s, clock_s)
    windows_s = _FANO_S[stream.span_s / 10.0 >= _FANO_S]
    return title, windows_s, np.array([fano(arrived_s, float(window_s)) for window_s in windows_s])


def _distribution(title: str, tokens: Array) -> Line:
    share = np.linspace(0.0, 1.0, _POINTS)
    return title, np.quantile(tokens, share), share


def _clients(title: str, stream: Trace) -> Line:
    counts = np.sort(np.unique(stream.tenant_name, return_counts=True)[1])[::-1]  # type: ignore[arg-type]
    return title, np.arange(1, len(counts) + 1), np.cumsum(counts) / counts.sum()


def _sizes(title: str, stream: Trace) -> Line:
    assert stream.session_index is not None
    sizes = np.bincount(stream.session_index[stream.session_index >= 0])
    values, counts = np.unique(sizes[sizes > 0], return_counts=True)
    return title, values, 1.0 - (np.cumsum(counts) - counts) / counts.sum()


def _hits(title: str, stream: Trace) -> Line:
    return title, np.array(_CACHE_TOKENS), np.array(prefix_hits(stream, _CACHE_TOKENS))
