"""Readers of recorded requests: Azure LLM inference traces, LiteLLM logs, and any CSV with named columns.

A reader returns a `Trace` of arrays or raises one sentence with file, line and what is legal. CSV files are parsed
lazily and in columns; JSON lines one at a time, so that neither keeps prompts or other columns in memory.

Sources of the layouts: AzureLLMInferenceDataset2023.md and 2024.md of github.com/Azure/AzurePublicDataset (TIMESTAMP,
ContextTokens, GeneratedTokens; from 2024 on with a UTC offset), and docs.litellm.ai/docs/proxy/logging_spec
(StandardLoggingPayload).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from envs.workload.generator import GivenRequests
from marginroute.errors import InputError

Array = np.ndarray[Any, Any]

SPLIT_EDGES = (0.0, 0.6, 0.8, 1.0)  # of the trace's time span: train, validation, held out
_TRIES = 64  # draws of a window before a part counts as too sparse


@dataclass(frozen=True, eq=False)
class Trace:
    """Recorded requests, M rows ordered by arrival; optional columns are None where the file has none.

    Attributes:
        path: the file.
        arrived_at_s: (M,) f8 ascending from 0.
        prompt_tokens: (M,) i4, at least 1.
        output_tokens: (M,) i4, at least 1.
        class_name: (M,) str, whose request it was.
        model: (M,) str, what answered.
        prompt_key: (M,) i4, equal for equal prompts, -1 where unknown.
        ttft_s: (M,) f8, nan where unknown.
        e2e_s: (M,) f8, nan where unknown.
        cost_usd: (M,) f8, nan where unknown.
        cache_hit: (M,) bool.
        skipped_rows: rows left out: failed calls, and calls that generate no text.
    """

    path: str
    arrived_at_s: Array
    prompt_tokens: Array
    output_tokens: Array
    class_name: Array | None = None
    model: Array | None = None
    prompt_key: Array | None = None
    ttft_s: Array | None = None
    e2e_s: Array | None = None
    cost_usd: Array | None = None
    cache_hit: Array | None = None
    skipped_rows: int = 0

    @property
    def n_requests(self) -> int:
        """M."""
        return len(self.arrived_at_s)

    @property
    def span_s(self) -> float:
        """Seconds from the first to the last arrival."""
        return float(self.arrived_at_s[-1])


Reader = Callable[[Path, Mapping[str, str] | None], Trace]


def _azure(path: Path, columns: Mapping[str, str] | None) -> Trace:
    from envs.workload.traces_csv import read_azure

    return read_azure(path, columns)


def _litellm(path: Path, columns: Mapping[str, str] | None) -> Trace:
    from envs.workload.traces_litellm import read_litellm

    return read_litellm(path, columns)


def _csv(path: Path, columns: Mapping[str, str] | None) -> Trace:
    from envs.workload.traces_csv import read_csv

    return read_csv(path, columns)


READERS: dict[str, Reader] = {"azure-llm": _azure, "litellm": _litellm, "csv": _csv}
"""Trace formats by name; parsers are imported when a file is read."""


def read_trace(path: str | Path, trace_format: str, columns: Mapping[str, str] | None = None) -> Trace:
    """Reads a trace.

    Args:
        path: the file; `.gz` is decompressed.
        trace_format: a name in `READERS`.
        columns: for `csv`, our column names (arrived_at, prompt_tokens, output_tokens, and optionally class, model,
            prompt_key, ttft_s, e2e_s) to the file's.

    Raises:
        InputError: one sentence with file, line and what is legal.
    """
    if trace_format not in READERS:
        raise InputError(f"trace format {trace_format!r} is not legal; legal is {', '.join(READERS)}")
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file; legal is the path of a trace")
    if path.stat().st_size == 0:
        raise InputError(f"{path}: is empty; legal is a file with at least one request")
    return READERS[trace_format](path, columns)


def parse_columns(text: str) -> dict[str, str]:
    """`arrived_at=time,prompt_tokens=in,...` as a mapping."""
    columns = {}
    for part in text.split(","):
        ours, equals, theirs = part.partition("=")
        if not equals or not ours.strip() or not theirs.strip():
            raise InputError(f"columns {text!r}: {part!r} is not legal; legal is our_name=name_in_file,...")
        columns[ours.strip()] = theirs.strip()
    return columns


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
    low_s, high_s = (edge * trace.span_s for edge in SPLIT_EDGES[part : part + 2])
    length_s = min(horizon_s * speed, high_s - low_s)
    for _ in range(_TRIES):
        start_s = low_s + rng.random() * (high_s - low_s - length_s)
        first, last = np.searchsorted(trace.arrived_at_s, (start_s, start_s + length_s))
        if last > first:
            times = (start_s, length_s, speed)
            return _cut(trace, slice(int(first), int(last)), times, class_names)
    raise InputError(
        f"{trace.path}: no requests between {low_s:.0f} s and {high_s:.0f} s; "
        "legal is a trace whose first 60, next 20 and last 20 % of time all have requests"
    )


def _cut(trace: Trace, rows: slice, times: tuple[float, float, float], class_names: tuple[str, ...]) -> GivenRequests:
    start_s, length_s, speed = times
    class_index = None
    if trace.class_name is not None and set(np.unique(trace.class_name)) <= set(class_names):
        index = {name: number for number, name in enumerate(class_names)}
        class_index = np.array([index[name] for name in trace.class_name[rows]], dtype=np.int32)
    key = None
    if trace.prompt_key is not None:
        key = trace.prompt_key[rows].copy()
        key[key >= 0] = np.unique(key[key >= 0], return_inverse=True)[1]
    return GivenRequests(
        arrived_at_s=(trace.arrived_at_s[rows] - start_s) / speed,
        prompt_tokens=trace.prompt_tokens[rows].copy(),
        output_tokens=trace.output_tokens[rows].copy(),
        class_index=class_index,
        prompt_key=key,
        horizon_s=length_s / speed,
    )
