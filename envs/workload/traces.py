"""Recorded requests: one table of columns, whatever the layout of the file they come from.

A reader returns a `Trace` of arrays or raises one sentence with file, line, value and what is legal. Files are read in
pieces, so that only the columns below are kept in memory, never prompts. `FORMATS` lists the layouts; where the
content tells which one a file has, `envs.workload.traces_detect` finds it.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from marginroute.errors import InputError

Array = np.ndarray[Any, Any]

MAX_TOKENS = 10_000_000  # beyond any context window: a larger figure is a broken row
MAX_UNIX_S = 1e11  # the year 5138; larger times are in milliseconds or finer


@dataclass(frozen=True, eq=False)
class Trace:
    """Recorded requests, M rows ordered by arrival; optional columns are None where the file has none.

    Attributes:
        path: the file.
        arrived_at_s: (M,) f8 ascending from 0.
        prompt_tokens: (M,) i4, at least 1.
        output_tokens: (M,) i4, at least 1.
        class_name: (M,) str, customer class.
        tenant_name: (M,) str, whose request it was.
        task_name: (M,) str, kind of work.
        model: (M,) str, what answered.
        prompt_key: (M,) i4, equal for equal prompts, -1 where unknown.
        session_index: (M,) i4, equal for calls of one chat or agent run, dense from 0, -1: none.
        parent_index: (M,) i4, row of the call whose answer this one waited for, -1: none.
        think_s: (M,) f8, seconds from the parent's end to this arrival, nan where unknown.
        prefix_block_tokens: tokens that one prefix hash stands for; 0 without hashes.
        prefix_count: (M,) i4, hashes of each request.
        prefix_hash: (sum of prefix_count,) i8, one per full block of the prompt, each standing for the block and all
            before it.
        ttft_s: (M,) f8, nan where unknown.
        e2e_s: (M,) f8, nan where unknown.
        cost_usd: (M,) f8, nan where unknown.
        cache_hit: (M,) bool.
        skipped_rows: rows left out: failed calls, and calls that generate no text.
        note: what a reader had to assume; empty if nothing.
    """

    path: str
    arrived_at_s: Array
    prompt_tokens: Array
    output_tokens: Array
    class_name: Array | None = None
    tenant_name: Array | None = None
    task_name: Array | None = None
    model: Array | None = None
    prompt_key: Array | None = None
    session_index: Array | None = None
    parent_index: Array | None = None
    think_s: Array | None = None
    prefix_block_tokens: int = 0
    prefix_count: Array | None = None
    prefix_hash: Array | None = None
    ttft_s: Array | None = None
    e2e_s: Array | None = None
    cost_usd: Array | None = None
    cache_hit: Array | None = None
    skipped_rows: int = 0
    note: str = ""

    @property
    def n_requests(self) -> int:
        """M."""
        return len(self.arrived_at_s)

    @property
    def span_s(self) -> float:
        """Seconds from the first to the last arrival."""
        return float(self.arrived_at_s[-1])

    def turn(self) -> Array:
        """(M,) i4, calls of the same session that arrived before; 0 without sessions."""
        turn = np.zeros(self.n_requests, dtype=np.int32)
        if self.session_index is not None:
            rows = np.flatnonzero(self.session_index >= 0)
            order = rows[np.argsort(self.session_index[rows], kind="stable")]
            own = self.session_index[order]
            first = np.r_[True, own[1:] != own[:-1]] if len(own) else np.zeros(0, dtype=bool)
            place = np.arange(len(order))
            turn[order] = place - np.maximum.accumulate(np.where(first, place, 0))
        return turn

    def rows(self, first: int, last: int) -> Trace:
        """The requests `first` to `last` - 1, with times as they are; links out of the cut are dropped."""
        return self.pick(np.arange(first, last))

    def pick(self, rows: Array) -> Trace:
        """The requests (R,) `rows`, ascending, with times as they are; links to others are dropped."""
        changes: dict[str, Any] = {}
        for name in _PER_ROW:
            column = getattr(self, name)
            changes[name] = None if column is None else column[rows]
        if self.parent_index is not None:
            place = np.full(self.n_requests + 1, -1, dtype=np.int32)
            place[rows] = np.arange(len(rows), dtype=np.int32)
            changes["parent_index"] = place[changes["parent_index"]]
        for name in ("prompt_key", "session_index"):
            if changes[name] is not None:
                known = changes[name] >= 0
                changes[name][known] = np.unique(changes[name][known], return_inverse=True)[1]
        if self.prefix_hash is not None and self.prefix_count is not None:
            ends = np.cumsum(self.prefix_count, dtype=np.int64)
            count = self.prefix_count[rows].astype(np.int64)
            within = np.arange(int(count.sum())) - np.repeat(np.cumsum(count) - count, count)
            changes["prefix_hash"] = self.prefix_hash[np.repeat(ends[rows] - count, count) + within]
        return replace(self, **changes)

    def between(self, start_s: float, end_s: float) -> Trace:
        """The requests that arrive in [start_s, end_s), times counted from `start_s`.

        Raises:
            InputError: no request arrives then.
        """
        first, last = np.searchsorted(self.arrived_at_s, (start_s, end_s))
        if last <= first:
            legal = f"legal is a stretch between 0 and {self.span_s:.0f} s"
            raise InputError(f"{self.path}: no requests from {start_s:g} s to {end_s:g} s; {legal}")
        part = self.rows(int(first), int(last))
        return replace(part, arrived_at_s=part.arrived_at_s - start_s)


_PER_ROW = (
    "arrived_at_s",
    "prompt_tokens",
    "output_tokens",
    "class_name",
    "tenant_name",
    "task_name",
    "model",
    "prompt_key",
    "session_index",
    "parent_index",
    "think_s",
    "prefix_count",
    "ttft_s",
    "e2e_s",
    "cost_usd",
    "cache_hit",
)


@dataclass(frozen=True)
class ReadOptions:
    """What a reader needs to be told.

    Attributes:
        columns: csv: our column names to the file's.
        block_tokens: csv: prompt tokens per number in `hash_ids`.
        start_s, end_s: servegen: the stretch of the description that is sampled, in its own seconds; one hour by
            default.
        seed: servegen: of the sample.
        session_gap_s: agent-sessions: seconds between the starts of two sessions, which the data does not tell.
    """

    columns: Mapping[str, str] = field(default_factory=dict)
    block_tokens: int = 512
    start_s: float = 0.0
    end_s: float | None = None
    seed: int = 0
    session_gap_s: float = 60.0


@dataclass(frozen=True)
class Format:
    """A layout of recorded requests.

    Attributes:
        title: what it is, in words.
        reader: `module:function` of (Path, ReadOptions) -> Trace, imported when a file is read.
        options: fields of `ReadOptions` that it takes.
    """

    title: str
    reader: str
    options: tuple[str, ...] = ()


_HERE = "envs.workload.traces_"
FORMATS: dict[str, Format] = {
    "azure-llm": Format("Azure LLM inference traces 2023 and 2024, CSV", _HERE + "csv:read_azure"),
    "litellm": Format("LiteLLM's standard logging payload, JSON lines", _HERE + "litellm:read_litellm"),
    "csv": Format("any CSV with named columns", _HERE + "csv:read_csv", ("columns", "block_tokens")),
    "burstgpt": Format("BurstGPT, CSV", _HERE + "csv:read_burstgpt"),
    "mooncake": Format("Mooncake, JSON lines with a hash per 512 prompt tokens", _HERE + "jsonl:read_mooncake"),
    "servegen": Format(
        "ServeGen's client archives, a description that is sampled",
        _HERE + "servegen:read_servegen",
        ("start_s", "end_s", "seed"),
    ),
    "agent-sessions": Format(
        "agent sessions with block hashes, JSON lines or Parquet", _HERE + "agents:read_agents", ("session_gap_s",)
    ),
    "otel-genai": Format("OpenTelemetry GenAI spans, OTLP JSON", _HERE + "otel:read_otel"),
    "decisions": Format("marginroute's own decision records, JSON lines", _HERE + "jsonl:read_decisions"),
}
"""Trace formats by name; their parsers are imported when a file is read."""

READERS = tuple(FORMATS)
"""Names of the formats."""


def read_trace(
    path: str | Path, trace_format: str = "", columns: Mapping[str, str] | None = None, **options: Any
) -> Trace:
    """Reads a trace.

    Args:
        path: the file; what packs it (gzip, xz, bzip2) is seen from its content.
        trace_format: a name in `FORMATS`; empty: told from the content.
        columns: for `csv`, our column names (arrived_at, prompt_tokens, output_tokens, and optionally class, tenant,
            task, model, prompt_key, session, hash_ids, ttft_s, e2e_s) to the file's.
        options: further fields of `ReadOptions`.

    Raises:
        InputError: one sentence with file, line and what is legal.
    """
    if trace_format and trace_format not in FORMATS:
        raise InputError(f"trace format {trace_format!r} is not legal; legal is {', '.join(FORMATS)}")
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path}: no such file; legal is the path of a trace")
    if path.is_file() and path.stat().st_size == 0:
        raise InputError(f"{path}: is empty; legal is a file with at least one request")
    if not trace_format:
        from envs.workload.traces_detect import detect

        trace_format = "csv" if columns else detect(path)
    layout = FORMATS[trace_format]
    if columns:
        options["columns"] = dict(columns)
        if "columns" not in layout.options:
            text = f"{path}: {trace_format} has fixed columns; legal is --columns with the csv format only"
            raise InputError(text)
    if path.is_dir() and trace_format != "servegen":
        raise InputError(f"{path}: is a folder; legal is the path of a trace")
    module, name = layout.reader.split(":")
    trace: Trace = getattr(importlib.import_module(module), name)(path, ReadOptions(**options))
    return trace


def parse_columns(text: str) -> dict[str, str]:
    """`arrived_at=time,prompt_tokens=in,...` as a mapping."""
    columns = {}
    for part in text.split(","):
        ours, equals, theirs = part.partition("=")
        if not equals or not ours.strip() or not theirs.strip():
            raise InputError(f"columns {text!r}: {part!r} is not legal; legal is our_name=name_in_file,...")
        columns[ours.strip()] = theirs.strip()
    return columns
