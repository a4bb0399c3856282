"""The fitted generator beside rows that it was not fitted to."""

from __future__ import annotations

from typing import Any

import numpy as np

from envs.workload.fit_model import Model
from envs.workload.statistics import CACHE_TOKENS, FANO_WINDOWS_S, clock_of, fano, ks_two_samples, on_clock, prefix_hits
from envs.workload.traces import Trace

Array = np.ndarray[Any, Any]

_HIT_SHARES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)  # cache sizes, of all prompt tokens


def compare(model: Model, fitted: Trace, later: Trace, draws: int) -> list[str]:
    """Lines that say how near streams of the generator come to the later rows, and how near the fitted rows do.

    The distance of the fitted rows themselves says how much the traffic changed: a stationary generator that is
    fitted to them cannot be expected to come nearer.
    """
    clock_s = max(clock_of(fitted), clock_of(later))
    span_s = _span(model, later)
    later = later.between(0.0, span_s)
    if model.sessions:  # chats under way and prefixes known become more and more: parts as long are alike
        fitted = fitted.between(0.0, span_s)
    streams = [model.draw(span_s, seed) for seed in range(draws)]
    lines = [f"tried on {later.n_requests:,} later requests ({span_s:,.0f} s) against {draws} drawn streams as long:"]
    for name in ("prompt_tokens", "output_tokens"):
        pooled = np.concatenate([getattr(stream, name) for stream in streams])
        mine = ks_two_samples(getattr(later, name), pooled)
        rows = ks_two_samples(getattr(later, name), getattr(fitted, name))
        lines.append(f"  KS of {name.replace('_', ' ')}: {mine:.3f} (the fitted rows themselves: {rows:.3f})")
    for window_s in FANO_WINDOWS_S:
        lines.append(_fano_line(window_s, streams, fitted, later, clock_s))
    if model.prefixes is not None:
        lines += _hit_lines(streams, fitted, later)
    rates = [stream.n_requests / span_s for stream in streams]
    lines.append(f"  requests/s: drawn {np.mean(rates):.3g}, later {later.n_requests / span_s:.3g}")
    return lines


def _span(model: Model, later: Trace) -> float:
    """Seconds that are compared: all, or as long as sessions begin where they were recorded whole."""
    if not model.complete or later.session_index is None:
        return float(np.nextafter(later.span_s, np.inf))
    return (int(later.session_index.max()) + 1) / model.arrivals.mean_rate_per_s()


def _fano_line(window_s: float, streams: list[Trace], fitted: Trace, later: Trace, clock_s: float) -> str:
    drawn = [fano(on_clock(stream.arrived_at_s, clock_s), window_s) for stream in streams]
    wanted, before = (fano(on_clock(part.arrived_at_s, clock_s), window_s) for part in (later, fitted))
    mean = float(np.nanmean(drawn))
    off, own = (f" ({value / wanted - 1.0:+.0%})" if wanted > 0.0 else "" for value in (mean, before))
    return (
        f"  Fano factor in {window_s:g} s: drawn {mean:.2f}{off}, single ones {np.nanmin(drawn):.2f} to "
        f"{np.nanmax(drawn):.2f}, later {wanted:.2f}, fitted rows {before:.2f}{own}"
    )


def _hit_lines(streams: list[Trace], fitted: Trace, later: Trace) -> list[str]:
    total = float(later.prompt_tokens.sum())
    sizes = (*(share * total for share in _HIT_SHARES), *CACHE_TOKENS)
    wanted = np.array(prefix_hits(later, sizes))
    drawn = np.mean([prefix_hits(stream, sizes) for stream in streams[:4]], axis=0)
    own = float(np.abs(np.array(prefix_hits(fitted, sizes)) - wanted).max())
    worst = int(np.argmax(np.abs(drawn - wanted)))
    size = "any size" if np.isinf(sizes[worst]) else f"{sizes[worst] / 1e6:.3g}M tokens"
    return [
        f"  prefix hits at any size: drawn {drawn[-1]:.1%}, later {wanted[-1]:.1%}; largest difference over cache "
        f"sizes {100 * abs(drawn[worst] - wanted[worst]):.1f} points, at {size} (the fitted rows: {100 * own:.1f})"
    ]
