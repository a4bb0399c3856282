"""What matters about a stream of requests, as numbers: rates, dispersion, lengths, clients, sessions, prefix hits."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np

from envs.workload.prefix_hits import hit_curve
from envs.workload.traces import Trace

Array = np.ndarray[Any, Any]

FANO_WINDOWS_S = (1.0, 10.0, 60.0)
QUANTILES = (0.1, 0.5, 0.9, 0.99)
CACHE_TOKENS = (2.5e5, 1e6, 4e6, 1.6e7, 6.4e7, np.inf)
ACTIVITY_WINDOW_S = 600.0
_COARSE_CLOCK_S = 0.5  # a recording whose times are at least this far apart was rounded


@dataclass(frozen=True)
class Summary:
    """Figures of one stream; nan or empty where it does not tell.

    Attributes:
        requests: M.
        span_s: seconds from the first to the last arrival.
        rate_per_s: mean arrivals per second; nan where all arrive at once.
        peak_per_s: most arrivals of a whole minute, per second; nan below two minutes.
        gap_cv: coefficient of variation of gaps.
        fano: variance over mean of the counts in 1, 10 and 60 s.
        prompt, output: quantiles 10, 50, 90 and 99 %, mean and largest token count.
        length_correlation: rank correlation of prompt and output lengths over requests.
        client_correlation: correlation of clients' mean log lengths, clients weighted by their requests.
        clients: how many tenants; 0 if unknown.
        top_client_share: of requests, from the largest client.
        top_tenth_share: of requests, from the largest tenth of clients.
        active_share: of 10-minute windows in which a client asks at all, clients weighted by their requests.
        sessions: how many; 0 if unknown.
        session_requests: quantiles 10, 50, 90 and 99 % and mean of requests per session.
        follow_share: of requests that wait for an earlier one.
        think: quantiles of think times in s.
        repeat_share: of requests whose prompt came before.
        hits: share of prompt tokens found by LRU caches of `CACHE_TOKENS`.
    """

    requests: int
    span_s: float
    rate_per_s: float
    peak_per_s: float
    gap_cv: float
    fano: tuple[float, ...]
    prompt: tuple[float, ...]
    output: tuple[float, ...]
    length_correlation: float
    client_correlation: float
    clients: int
    top_client_share: float
    top_tenth_share: float
    active_share: float
    sessions: int
    session_requests: tuple[float, ...]
    follow_share: float
    think: tuple[float, ...]
    repeat_share: float
    hits: tuple[float, ...]


def summary(trace: Trace, clock_s: float = 0.0) -> Summary:
    """Figures of a stream.

    Args:
        trace: the requests.
        clock_s: arrivals are rounded to multiples of it first, so that a stream can be compared with one that was
            recorded on a coarse clock.
    """
    arrived_s = on_clock(trace.arrived_at_s, clock_s)
    gaps = np.diff(arrived_s)
    minutes = _counts(arrived_s, 60.0)
    return Summary(
        requests=trace.n_requests,
        span_s=trace.span_s,
        rate_per_s=trace.n_requests / trace.span_s if trace.span_s > 0.0 else np.nan,
        peak_per_s=float(minutes.max()) / 60.0 if len(minutes) > 1 else np.nan,
        gap_cv=float(gaps.std() / gaps.mean()) if len(gaps) and gaps.mean() > 0.0 else np.nan,
        fano=tuple(fano(arrived_s, window_s) for window_s in FANO_WINDOWS_S),
        prompt=_spread(trace.prompt_tokens),
        output=_spread(trace.output_tokens),
        length_correlation=_rank_correlation(trace.prompt_tokens, trace.output_tokens),
        **_clients(trace),
        **_sessions(trace),
        repeat_share=_repeats(trace),
        hits=prefix_hits(trace, CACHE_TOKENS),
    )


def mean_of(figures: list[Summary]) -> Summary:
    """Means over streams of one generator; a figure that one of them lacks is left out of its mean."""
    means: dict[str, Any] = {}
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of figures that none of them has
        for name, first in vars(figures[0]).items():
            columns = np.array([getattr(figure, name) for figure in figures], dtype=np.float64)
            mean = np.nanmean(columns, axis=0)
            means[name] = tuple(mean.tolist()) if isinstance(first, tuple) else type(first)(mean)
    return Summary(**means)


def clock_of(trace: Trace) -> float:
    """Seconds to which the arrivals were rounded by the recorder; 0 for a fine clock."""
    gaps = np.diff(np.unique(trace.arrived_at_s))
    return float(np.median(gaps)) if len(gaps) > 10 and np.quantile(gaps, 0.01) >= _COARSE_CLOCK_S else 0.0


def on_clock(arrived_s: Array, clock_s: float) -> Array:
    """(M,) times rounded to the ticks of a recorder, each put into the middle of its tick; as they are where it is 0.

    The phase of the ticks is told from the times, so that ticks that are some milliseconds off stay apart.
    """
    if clock_s <= 0.0:
        return arrived_s
    phase = np.angle(np.exp(2j * np.pi / clock_s * arrived_s).mean()) / (2.0 * np.pi)
    return (np.rint(arrived_s / clock_s - phase) + 0.5) * clock_s


def fano(arrived_s: Array, window_s: float) -> float:
    """Variance over mean of the counts in whole windows; nan with less than two."""
    counts = _counts(arrived_s, window_s)
    return float(counts.var(ddof=1) / counts.mean()) if len(counts) > 1 and counts.any() else np.nan


def _counts(arrived_s: Array, window_s: float) -> Array:
    whole = int(arrived_s[-1] / window_s)
    return np.bincount((arrived_s / window_s).astype(np.int64), minlength=whole)[:whole]


def ks_two_samples(one: Array, other: Array) -> float:
    """Largest distance of the two empirical distribution functions."""
    values = np.union1d(one, other)
    return float(
        np.abs(
            np.searchsorted(np.sort(one), values, side="right") / len(one)
            - np.searchsorted(np.sort(other), values, side="right") / len(other)
        ).max()
    )


def prefix_hits(trace: Trace, cache_tokens: tuple[float, ...]) -> tuple[float, ...]:
    """Share of prompt tokens that LRU caches of these sizes would find; empty without hashes."""
    if trace.prefix_hash is None or trace.prefix_count is None:
        return ()
    sizes = np.array(cache_tokens)
    curve = hit_curve(trace.prefix_hash, trace.prefix_count, trace.prefix_block_tokens, trace.prompt_tokens, sizes)
    return tuple(float(share) for share in curve)


def _spread(tokens: Array) -> tuple[float, ...]:
    return (*(float(x) for x in np.quantile(tokens, QUANTILES)), float(tokens.mean()), float(tokens.max()))


def _ranks(values: Array) -> Array:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - 0.5 * counts)[inverse]


def _rank_correlation(one: Array, other: Array) -> float:
    return _correlation(_ranks(one), _ranks(other), np.ones(len(one)))


def _correlation(one: Array, other: Array, weight: Array) -> float:
    share = weight / weight.sum()
    one, other = one - share @ one, other - share @ other
    scale = np.sqrt((share @ np.square(one)) * (share @ np.square(other)))
    return float(share @ (one * other) / scale) if scale > 0.0 else np.nan


def _clients(trace: Trace) -> dict[str, Any]:
    names = ("clients", "client_correlation", "top_client_share", "top_tenth_share", "active_share")
    if trace.tenant_name is None:
        return dict(zip(names, (0, np.nan, np.nan, np.nan, np.nan), strict=True))
    unique, client = np.unique(trace.tenant_name, return_inverse=True)
    counts = np.bincount(client)
    means = [np.bincount(client, np.log(tokens)) / counts for tokens in (trace.prompt_tokens, trace.output_tokens)]
    largest = np.sort(counts)[::-1] / len(client)
    windows = int(trace.span_s / ACTIVITY_WINDOW_S) + 1
    seen = np.unique(client * windows + (trace.arrived_at_s / ACTIVITY_WINDOW_S).astype(np.int64)) // windows
    active = np.bincount(seen, minlength=len(unique)) / windows
    figures = (
        len(unique),
        _correlation(means[0], means[1], counts.astype(np.float64)) if len(unique) > 2 else np.nan,
        float(largest[0]),
        float(largest[: max(1, round(len(unique) / 10))].sum()),
        float(counts @ active / counts.sum()),
    )
    return dict(zip(names, figures, strict=True))


def _sessions(trace: Trace) -> dict[str, Any]:
    if trace.session_index is None or not (trace.session_index >= 0).any():
        return {"sessions": 0, "session_requests": (), "follow_share": np.nan, "think": ()}
    sizes = np.bincount(trace.session_index[trace.session_index >= 0])
    sizes = sizes[sizes > 0]
    think_s = trace.think_s[~np.isnan(trace.think_s)] if trace.think_s is not None else np.empty(0)
    return {
        "sessions": len(sizes),
        "session_requests": _spread(sizes)[:5],
        "follow_share": float((trace.parent_index >= 0).mean()) if trace.parent_index is not None else np.nan,
        "think": _spread(think_s)[:5] if len(think_s) else (),
    }


def _repeats(trace: Trace) -> float:
    if trace.prompt_key is None:
        return np.nan
    known = trace.prompt_key[trace.prompt_key >= 0]
    return float((len(known) - len(np.unique(known))) / trace.n_requests)
