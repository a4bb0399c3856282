"""CSV traces: any file with named columns, Azure's and BurstGPT's. Parsed in pieces, in columns, by polars.

Sources of the layouts: AzureLLMInferenceDataset2023.md and 2024.md of github.com/Azure/AzurePublicDataset (TIMESTAMP,
ContextTokens, GeneratedTokens; from 2024 on with a UTC offset), and README.md of github.com/HPMLL/BurstGPT (Timestamp
in seconds, Model, Request tokens, Response tokens, Total tokens, Log Type; later releases add Session ID and Elapsed
time).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from envs.workload.traces import MAX_TOKENS, MAX_UNIX_S, ReadOptions, Trace
from envs.workload.traces_files import line_chunks
from envs.workload.traces_links import dense, full_blocks, link
from marginroute.errors import InputError

Array = np.ndarray[Any, Any]

_AZURE = {"arrived_at": "TIMESTAMP", "prompt_tokens": "ContextTokens", "output_tokens": "GeneratedTokens"}
_BURSTGPT = {"arrived_at": "Timestamp", "prompt_tokens": "Request tokens", "output_tokens": "Response tokens"}
_BURSTGPT_MORE = {
    "model": ("Model",),
    "task": ("Log Type",),
    "session": ("Session ID", "SessionID"),
    "e2e_s": ("Elapsed time",),
}
_REQUIRED = ("arrived_at", "prompt_tokens", "output_tokens")
_TEXT = ("class", "tenant", "task", "model", "prompt_key", "session", "hash_ids")
_SECONDS = ("ttft_s", "e2e_s")
_OFFSET = r"(Z|[+-]\d\d:?\d\d)$"
_LEGAL = {
    "arrived_at": "seconds or YYYY-MM-DD HH:MM:SS.fff",
    "ttft_s": "0 or more seconds, or nothing",
    "e2e_s": "0 or more seconds, or nothing",
}


def read_azure(path: Path, options: ReadOptions) -> Trace:
    """Azure LLM inference traces of 2023 and 2024."""
    return _trace(path, _read(path, _Layout(_AZURE)), options)


def read_burstgpt(path: Path, options: ReadOptions) -> Trace:
    """BurstGPT; failed calls (no response tokens) are left out, rows are put in order of time."""
    header = _header(path)
    more = {ours: name for ours, known in _BURSTGPT_MORE.items() for name in known if name in header}
    layout = _Layout({**_BURSTGPT, **more}, skip_empty=True, sort=True)
    return _trace(path, _read(path, layout), options)


def read_csv(path: Path, options: ReadOptions) -> Trace:
    """Any CSV with a header; arrival times are seconds or ISO timestamps."""
    known = (*_REQUIRED, *_TEXT, *_SECONDS)
    columns = dict(options.columns or {name: name for name in known if name in _REQUIRED or name in _header(path)})
    unknown = [name for name in columns if name not in known]
    missing = [name for name in _REQUIRED if name not in columns]
    if unknown or missing:
        problem = f"unknown column {unknown[0]!r}" if unknown else f"{missing[0]} is not mapped"
        required, optional = ", ".join(_REQUIRED), ", ".join(known[3:])
        raise InputError(f"{path}: {problem}; legal is a mapping of {required} and any of {optional}")
    return _trace(path, _read(path, _Layout(columns)), options)


@dataclass(frozen=True)
class _Layout:
    """Our columns by the file's names, and what a row may lack.

    Attributes:
        columns: our name to the file's.
        skip_empty: rows without prompt or output tokens are failed calls, left out and counted.
        sort: rows may come in any order.
    """

    columns: Mapping[str, str]
    skip_empty: bool = False
    sort: bool = False


def _trace(path: Path, table: dict[str, Any], options: ReadOptions) -> Trace:
    arrived_at_s, e2e_s = table["arrived_at"], table.get("e2e_s")
    session = dense(table["session"]) if "session" in table else None
    parent, think_s = link(session, arrived_at_s, e2e_s) if session is not None else (None, None)
    count, ids = None, None
    if "hash_ids" in table:
        count, ids = full_blocks(table["prompt_tokens"], options.block_tokens, *_hashes(path, table["hash_ids"]))
    return Trace(
        path=str(path),
        arrived_at_s=arrived_at_s,
        prompt_tokens=table["prompt_tokens"].astype(np.int32),
        output_tokens=table["output_tokens"].astype(np.int32),
        class_name=table.get("class"),
        tenant_name=table.get("tenant"),
        task_name=table.get("task"),
        model=table.get("model"),
        prompt_key=dense(table["prompt_key"]) if "prompt_key" in table else None,
        session_index=session,
        parent_index=parent,
        think_s=think_s,
        prefix_block_tokens=0 if ids is None else options.block_tokens,
        prefix_count=count,
        prefix_hash=ids,
        ttft_s=table.get("ttft_s"),
        e2e_s=e2e_s,
        skipped_rows=int(table["skipped"]),
    )


def _header(path: Path) -> list[str]:
    """Names of the columns, from the first line."""
    for _, chunk in line_chunks(path, quoted=True):
        return _parsed(path, 1, chunk.split(b"\n", 1)[0] + b"\n").columns
    return []


def _read(path: Path, layout: _Layout) -> dict[str, Any]:
    """Columns of the whole file by our names, and how many rows were left out."""
    parts: list[dict[str, Any]] = []
    head = b""
    state = _State(path, layout)
    for first, chunk in line_chunks(path, quoted=True):
        if not head:
            head, _, chunk = chunk.partition(b"\n")
            head += b"\n"
            state.check_header(_parsed(path, 1, head).columns)
            first += 1
        if chunk.strip():
            parts.append(state.columns(_parsed(path, first, head + chunk, shift=1), first))
    joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]} if parts else {}
    if not parts or not len(joined["arrived_at"]):
        left = f" ({state.skipped} skipped)" if state.skipped else ""
        raise InputError(f"{path}: has a header but no rows{left}; legal is at least one request")
    if layout.sort:
        order = np.argsort(joined["arrived_at"], kind="stable")
        joined = {name: values[order] for name, values in joined.items()}
    joined["arrived_at"] = joined["arrived_at"] - joined["arrived_at"][0]
    if state.text_times:
        joined["arrived_at"] = joined["arrived_at"] / 1e9
    return {**joined, "skipped": state.skipped}


def _parsed(path: Path, first: int, text: bytes, shift: int = 0) -> pl.DataFrame:
    """A piece of CSV as text columns; `shift` lines of it are a header put before the lines from `first` on."""
    try:
        return pl.read_csv(text, infer_schema=False, truncate_ragged_lines=False)
    except pl.exceptions.NoDataError:
        raise InputError(f"{path}: is empty; legal is a header and at least one request") from None
    except (pl.exceptions.PolarsError, UnicodeDecodeError) as error:
        lines = text.split(b"\n")
        width = lines[0].count(b",") + 1
        for number, line in enumerate(lines[shift:], start=first):
            fields = line.count(b",") + 1
            if shift and fields > width and b'"' not in line:
                legal = f"legal is {width}, as in the header"
                raise InputError(f"{path}, line {number}: has {fields} fields; {legal}") from None
        problem = str(error).splitlines()[0]
        raise InputError(f"{path}: is not CSV ({problem}); legal is comma-separated text") from None


class _State:
    """What is carried from piece to piece of one file."""

    def __init__(self, path: Path, layout: _Layout) -> None:
        self.path, self.layout = path, layout
        self.skipped = 0
        self.text_times: bool | None = None
        self._last = -np.inf
        self._last_line = 0
        self._blank_line = 0

    def check_header(self, header: list[str]) -> None:
        """Raises if a wanted column is missing."""
        columns = self.layout.columns
        missing = [name for name in columns.values() if name not in header]
        if missing:
            legal = ", ".join(columns.values())
            raise InputError(f"{self.path}, line 1: no column {missing[0]!r}; legal is a header with {legal}")

    def columns(self, raw: pl.DataFrame, first: int) -> dict[str, Any]:
        """The piece's columns as arrays, checked."""
        names = self.layout.columns
        if not set(names.values()) <= set(raw.columns):
            legal = "legal is comma-separated text"
            raise InputError(f"{self.path}, line 1: has a double quote that is not closed; {legal}")
        if self.text_times is None:
            stamp = raw[names["arrived_at"]][0] if raw.height else None
            self.text_times = isinstance(stamp, str) and ":" in stamp
        frame = raw.select(self._wanted()).with_row_index("line", offset=first)
        frame = self._without_blank(frame)
        frame = self._without_failed(frame)
        self._check_values(raw, frame, first)
        if frame.height:
            self._check_times(raw, frame, first)
        table: dict[str, Any] = {name: frame[name].to_numpy() for name in frame.columns if name != "line"}
        for name in _TEXT:
            if name in table:
                table[name] = frame[name].fill_null("").to_numpy().astype(str)
        return table

    def _wanted(self) -> list[pl.Expr]:
        names = self.layout.columns
        wanted = [_time(names["arrived_at"]) if self.text_times else _number(names["arrived_at"], "arrived_at")]
        least = 0 if self.layout.skip_empty else 1
        wanted += [_tokens(names[name], name, least) for name in _REQUIRED[1:]]
        wanted += [pl.col(names[name]).alias(name) for name in _TEXT if name in names]
        wanted += [_seconds(names[name], name) for name in _SECONDS if name in names]
        wanted.append(pl.all_horizontal(pl.col([names[name] for name in _REQUIRED]).is_null()).alias("blank"))
        return wanted

    def _without_blank(self, frame: pl.DataFrame) -> pl.DataFrame:
        """Drops empty lines at the end; one before a request is an error."""
        kept = frame.height
        while kept and frame["blank"][kept - 1]:
            kept -= 1
        if self._blank_line and kept:
            raise self._error(self._blank_line, "arrived_at", None)
        if kept < frame.height:
            self._blank_line = self._blank_line or int(frame["line"][kept])
        return frame.head(kept).drop("blank")

    def _without_failed(self, frame: pl.DataFrame) -> pl.DataFrame:
        if not self.layout.skip_empty:
            return frame
        failed = (pl.col("prompt_tokens") == 0) | (pl.col("output_tokens") == 0)
        kept = frame.filter(~failed.fill_null(False))
        self.skipped += frame.height - kept.height
        return kept

    def _check_values(self, raw: pl.DataFrame, frame: pl.DataFrame, first: int) -> None:
        """Raises for the first row with a value that could not be read."""
        bad: dict[str, int] = {}
        for name in (*_REQUIRED, *_SECONDS):
            if name not in frame.columns:
                continue
            series = frame[name]
            if name == "arrived_at" and not self.text_times:
                series = series.set(~series.is_finite(), None)
            if series.null_count():
                bad[name] = int(frame["line"][int(series.is_null().arg_max() or 0)])
        if bad:
            name = min(bad, key=lambda key: bad[key])
            raise self._error(bad[name], name, raw[self.layout.columns[name]][bad[name] - first])

    def _error(self, line: int, name: str, value: str | None) -> InputError:
        shown = "nothing" if value is None else repr(value)
        legal = _LEGAL.get(name, f"an integer from 1 to {MAX_TOKENS}")
        return InputError(f"{self.path}, line {line}: {self.layout.columns[name]} is {shown}; legal is {legal}")

    def _check_times(self, raw: pl.DataFrame, frame: pl.DataFrame, first: int) -> None:
        column, times = self.layout.columns["arrived_at"], frame["arrived_at"].to_numpy()
        if not self.text_times and np.abs(times).max() > MAX_UNIX_S:
            text = f"{column} {times[0]:.0f} looks like milliseconds"
            raise InputError(f"{self.path}: {text}; legal is seconds")
        if not self.layout.sort:
            behind = np.flatnonzero(np.diff(times, prepend=max(self._last, -1e300)) < 0)
            if len(behind):
                row = int(behind[0])
                line = int(frame["line"][row])
                before = int(frame["line"][row - 1]) if row else self._last_line
                place = f"{self.path}, line {line}"
                value = raw[column][line - first]
                raise InputError(f"{place}: {column} {value} lies before line {before}; legal is a file ordered by it")
        self._last, self._last_line = times[-1], int(frame["line"][-1])


def _time(column: str) -> pl.Expr:
    """Nanoseconds since 1970 of an ISO timestamp, its UTC offset applied."""
    text = pl.col(column).str.strip_chars()
    naive = text.str.replace(_OFFSET, "").str.replace("T", " ", literal=True).str.strip_chars()
    offset = text.str.extract(_OFFSET).str.replace("Z", "+0000", literal=True).str.replace(":", "", literal=True)
    number = offset.cast(pl.Int64, strict=False).fill_null(0)
    minutes = (number.abs() // 100 * 60 + number.abs() % 100) * number.sign()
    stamp = naive.str.to_datetime("%Y-%m-%d %H:%M:%S%.f", time_unit="ns", strict=False).cast(pl.Int64)
    return (stamp - minutes * 60_000_000_000).alias("arrived_at")


def _number(column: str, name: str) -> pl.Expr:
    return pl.col(column).str.strip_chars().cast(pl.Float64, strict=False).alias(name)


def _seconds(column: str, name: str) -> pl.Expr:
    """Seconds, 0 or more; nan where the cell is empty or says so, null where it holds anything else."""
    text = pl.col(column).str.strip_chars()
    number = text.cast(pl.Float64, strict=False)
    unknown = text.is_null() | (text == "") | number.is_nan()
    legal = number.is_finite() & (number >= 0.0)
    return pl.when(unknown).then(np.nan).when(legal).then(number).otherwise(None).alias(name)


def _tokens(column: str, name: str, least: int) -> pl.Expr:
    """Token counts; integers written as 12 or 12.0, anything else becomes null."""
    number = pl.col(column).str.strip_chars().cast(pl.Float64, strict=False)
    legal = (number >= least) & (number <= MAX_TOKENS) & (number == number.round(0))
    return pl.when(legal).then(number).otherwise(None).cast(pl.Int64).alias(name)


def _hashes(path: Path, cells: Array) -> tuple[Array, Array]:
    """Counts (M,) i4 and numbers (sum,) i8 of `hash_ids` cells, whole numbers between spaces."""
    rows = [cell.split() for cell in cells.tolist()]
    count = np.array([len(row) for row in rows], dtype=np.int32)
    try:
        ids = np.array([int(number) for row in rows for number in row], dtype=np.int64)
    except (ValueError, OverflowError):
        ids = np.array([-1])
    if (ids < 0).any():
        raise InputError(f"{path}: hash_ids; legal is whole numbers from 0 to 2**63 - 1 between spaces")
    return count, ids
