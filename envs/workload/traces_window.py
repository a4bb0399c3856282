"""Binding of a trace to an episode: a stretch of the part of its time that the split owns."""

from __future__ import annotations

from typing import Any

import numpy as np

from envs.workload.spec import GivenRequests
from envs.workload.traces import Trace
from marginroute.errors import InputError

SPLIT_EDGES = (0.0, 0.6, 0.8, 1.0)  # of the trace's time span: train, validation, held out
LEGAL = "legal is a trace whose first 60, next 20 and last 20 % of time all have requests"
_TRIES = 64  # draws of a window before a part counts as too sparse


def window(
    trace: Trace,
    part: int,
    horizon_s: float,
    rng: np.random.Generator,
    class_names: tuple[str, ...] = (),
    speed: float = 1.0,
) -> GivenRequests:
    """A stretch of one part of the trace, starting at random; it never leaves the part.

    Args:
        trace: the trace.
        part: 0 train (first 60 % of the time span), 1 validation (next 20 %), 2 held out (last 20 %).
        horizon_s: wanted length; a part that is shorter gives all it has.
        rng: draws the start.
        class_names: the scenario's classes; used if the trace names nothing else.
        speed: seconds of the trace played in one second.
    """
    low_s, high_s = _owned(trace, part)
    length_s = min(horizon_s * speed, high_s - low_s)
    for _ in range(_TRIES):
        start_s = low_s + rng.random() * (high_s - low_s - length_s)
        first, last = np.searchsorted(trace.arrived_at_s, (start_s, start_s + length_s))
        if last > first:
            times = (start_s, length_s, speed)
            return _cut(trace.rows(int(first), int(last)), times, _class_numbers(trace, class_names))
    found = np.diff(np.searchsorted(trace.arrived_at_s, (low_s, high_s)))[0]
    what = f"no requests between {low_s:.4g} s and {high_s:.4g} s"
    if found:
        what = f"no requests in {_TRIES} stretches of {length_s:.4g} s between {low_s:.4g} s and {high_s:.4g} s"
    raise InputError(f"{trace.path}: {what}; {LEGAL}")


def block(trace: Trace, part: int, horizon_s: float, rng: np.random.Generator, speed: float = 1.0) -> int:
    """Which of the episode-long blocks of its part an episode starts in, 0 or more; arguments as `window`'s.

    Windows of different blocks overlap little, those of one block much: a part is worth as many observations as it has
    blocks, however many windows are drawn from it.
    """
    low_s, high_s = _owned(trace, part)
    length_s = min(horizon_s * speed, high_s - low_s)
    blocks = max(int((high_s - low_s) / length_s), 1)
    return min(int(rng.random() * blocks), blocks - 1)


def _owned(trace: Trace, part: int) -> tuple[float, float]:
    """Begin and end of a part of the trace's time.

    Raises:
        InputError: the trace takes no time.
    """
    if trace.span_s <= 0.0:
        many = "its one request is" if trace.n_requests == 1 else f"all its {trace.n_requests} requests are"
        raise InputError(f"{trace.path}: {many} at one moment; {LEGAL}")
    low, high = SPLIT_EDGES[part : part + 2]
    return low * trace.span_s, high * trace.span_s


def _class_numbers(trace: Trace, class_names: tuple[str, ...]) -> dict[str, int]:
    """Number of each class that the trace names; empty unless all of them are the scenario's, by name or by number."""
    if trace.class_name is None:
        return {}
    found = set(np.unique(trace.class_name).tolist())
    for names in (class_names, tuple(str(number) for number in range(len(class_names)))):
        if found <= set(names):
            return {name: number for number, name in enumerate(names)}
    return {}


def _cut(part: Trace, times: tuple[float, float, float], numbers: dict[str, int]) -> GivenRequests:
    start_s, length_s, speed = times
    class_index = None
    if part.class_name is not None and numbers:
        class_index = np.array([numbers[name] for name in part.class_name.tolist()], dtype=np.int32)
    return GivenRequests(
        arrived_at_s=(part.arrived_at_s - start_s) / speed,
        prompt_tokens=part.prompt_tokens,
        output_tokens=part.output_tokens,
        class_index=class_index,
        prompt_key=part.prompt_key,
        horizon_s=length_s / speed,
        **_links(part, speed),
        **_prefixes(part),
    )


def _links(part: Trace, speed: float) -> dict[str, Any]:
    """Sessions: a call whose parent lies in the window and whose think time is known waits for it to be answered."""
    if part.session_index is None or part.parent_index is None or part.think_s is None:
        return {}
    known = (part.parent_index >= 0) & ~np.isnan(part.think_s)
    return {
        "session_index": part.session_index,
        "parent_index": np.where(known, part.parent_index, -1).astype(np.int32),
        "think_s": np.where(known, part.think_s, 0.0) / speed,
    }


def _prefixes(part: Trace) -> dict[str, Any]:
    if part.prefix_hash is None:
        return {}
    return {
        "prefix_block_tokens": part.prefix_block_tokens,
        "prefix_count": part.prefix_count,
        "prefix_hash": part.prefix_hash,
    }
