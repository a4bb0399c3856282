"""CSV traces, parsed in columns by polars; a bad value is looked up again to name its line."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from envs.workload.traces import Trace
from marginroute.errors import InputError

Array = np.ndarray[Any, Any]

_AZURE = {"arrived_at": "TIMESTAMP", "prompt_tokens": "ContextTokens", "output_tokens": "GeneratedTokens"}
MAX_UNIX_S = 1e11  # the year 5138; larger times are in milliseconds or finer
_REQUIRED = ("arrived_at", "prompt_tokens", "output_tokens")
_TEXT = ("class", "model", "prompt_key")
_SECONDS = ("ttft_s", "e2e_s")
_OFFSET = r"(Z|[+-]\d\d:?\d\d)$"
MAX_TOKENS = 10_000_000  # beyond any context window: a larger figure is a broken row


def read_azure(path: Path, columns: Mapping[str, str] | None = None) -> Trace:
    """Azure LLM inference traces of 2023 and 2024 (`.csv`, `.csv.gz`)."""
    if columns:
        raise InputError(f"{path}: azure-llm has fixed columns; legal is --columns with the csv format only")
    return _read(path, _AZURE)


def read_csv(path: Path, columns: Mapping[str, str] | None) -> Trace:
    """Any CSV with a header; arrival times are seconds or ISO timestamps."""
    known = (*_REQUIRED, *_TEXT, *_SECONDS)
    columns = dict(columns or {name: name for name in _REQUIRED})
    unknown = [name for name in columns if name not in known]
    missing = [name for name in _REQUIRED if name not in columns]
    if unknown or missing:
        problem = f"unknown column {unknown[0]!r}" if unknown else f"{missing[0]} is not mapped"
        required, optional = ", ".join(_REQUIRED), ", ".join(known[3:])
        raise InputError(f"{path}: {problem}; legal is a mapping of {required} and any of {optional}")
    return _read(path, columns)


def _read(path: Path, columns: Mapping[str, str]) -> Trace:
    source = _decompressed(path)
    table = _scan(path, source)
    header = table.collect_schema().names()
    missing = [name for name in columns.values() if name not in header]
    if missing:
        legal = ", ".join(columns.values())
        raise InputError(f"{path}, line 1: no column {missing[0]!r}; legal is a header with {legal}")
    text_times = _has_text_times(table, columns["arrived_at"])
    wanted = [_time(columns["arrived_at"]) if text_times else _number(columns["arrived_at"], "arrived_at")]
    wanted += [_tokens(columns[name], name) for name in _REQUIRED[1:]]
    wanted += [pl.col(columns[name]).alias(name) for name in _TEXT if name in columns]
    wanted += [_number(columns[name], name) for name in _SECONDS if name in columns]
    wanted.append(pl.all_horizontal(pl.col([columns[name] for name in _REQUIRED]).is_null()).alias("blank"))
    try:
        frame = table.select(wanted).collect(engine="streaming")
    except pl.exceptions.PolarsError as error:
        raise _ragged(path, source, len(header), error) from None
    frame = _without_blank_end(frame)
    if frame.height == 0:
        raise InputError(f"{path}: has a header but no rows; legal is at least one request")
    _check_values(path, table, columns, frame)
    raw = frame["arrived_at"].to_numpy()
    if not text_times and np.abs(raw).max() > MAX_UNIX_S:
        raise InputError(f"{path}: {columns['arrived_at']} {raw[0]:.0f} looks like milliseconds; legal is seconds")
    arrived_at_s = _seconds(raw, text_times)
    _check_order(path, table, columns["arrived_at"], arrived_at_s)
    return Trace(
        path=str(path),
        arrived_at_s=arrived_at_s,
        prompt_tokens=frame["prompt_tokens"].to_numpy().astype(np.int32),
        output_tokens=frame["output_tokens"].to_numpy().astype(np.int32),
        class_name=_text(frame, "class"),
        model=_text(frame, "model"),
        prompt_key=_keys(frame),
        ttft_s=frame["ttft_s"].to_numpy() if "ttft_s" in columns else None,
        e2e_s=frame["e2e_s"].to_numpy() if "e2e_s" in columns else None,
    )


def _decompressed(path: Path) -> Path | bytes:
    with path.open("rb") as file:
        if file.read(2) != b"\x1f\x8b":
            return path
    try:
        with gzip.open(path) as file:
            return file.read()
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{path}: is a damaged gzip file ({error}); legal is a complete one") from None


def _scan(path: Path, source: Path | bytes) -> pl.LazyFrame:
    try:
        given = io.BytesIO(source) if isinstance(source, bytes) else source
        table = pl.scan_csv(given, infer_schema=False, truncate_ragged_lines=False)
        table.collect_schema()
    except pl.exceptions.NoDataError:
        raise InputError(f"{path}: is empty; legal is a header and at least one request") from None
    except (pl.exceptions.PolarsError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: is not CSV ({str(error).splitlines()[0]}); legal is comma-separated text") from None
    return table


def _has_text_times(table: pl.LazyFrame, column: str) -> bool:
    """Whether the first arrival is a timestamp rather than seconds."""
    head = table.select(column).head(1).collect()
    return head.height > 0 and isinstance(head[0, 0], str) and ":" in head[0, 0]


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


def _tokens(column: str, name: str) -> pl.Expr:
    """Token counts; integers written as 12 or 12.0, anything else becomes null."""
    number = pl.col(column).str.strip_chars().cast(pl.Float64, strict=False)
    legal = (number >= 1) & (number <= MAX_TOKENS) & (number == number.round(0))
    return pl.when(legal).then(number).otherwise(None).cast(pl.Int64).alias(name)


def _without_blank_end(frame: pl.DataFrame) -> pl.DataFrame:
    """Drops empty lines at the end of the file."""
    kept = frame.height
    while kept and frame["blank"][kept - 1]:
        kept -= 1
    return frame.head(kept).drop("blank")


def _check_values(path: Path, table: pl.LazyFrame, columns: Mapping[str, str], frame: pl.DataFrame) -> None:
    """Raises for the first row with a value that could not be read."""
    legal = {"arrived_at": "seconds or YYYY-MM-DD HH:MM:SS.fff", "ttft_s": "seconds", "e2e_s": "seconds"}
    bad = {}
    for name in frame.columns:
        series = frame[name]
        if series.dtype == pl.Float64:
            series = series.set(~series.is_finite(), None)
        if name in (*_REQUIRED, *_SECONDS) and series.null_count():
            bad[name] = int(series.is_null().arg_max() or 0)
    if bad:
        name = min(bad, key=lambda key: bad[key])
        value = table.select(columns[name]).slice(bad[name], 1).collect()[0, 0]
        shown = "nothing" if value is None else repr(value)
        wanted = legal.get(name, f"an integer from 1 to {MAX_TOKENS}")
        raise InputError(f"{path}, line {bad[name] + 2}: {columns[name]} is {shown}; legal is {wanted}")


def _check_order(path: Path, table: pl.LazyFrame, column: str, arrived_at_s: Array) -> None:
    behind = np.flatnonzero(np.diff(arrived_at_s) < 0.0)
    if len(behind):
        row = int(behind[0]) + 1
        value = table.select(column).slice(row, 1).collect()[0, 0]
        place = f"{path}, line {row + 2}"
        raise InputError(f"{place}: {column} {value} lies before line {row + 1}; legal is a file ordered by it")


def _seconds(raw: Array, nanoseconds: bool) -> Array:
    """Seconds since the first arrival."""
    since = raw - raw[0]
    return since / 1e9 if nanoseconds else since.astype(np.float64)


def _text(frame: pl.DataFrame, name: str) -> Array | None:
    return frame[name].fill_null("").to_numpy().astype(str) if name in frame.columns else None


def _keys(frame: pl.DataFrame) -> Array | None:
    if "prompt_key" not in frame.columns:
        return None
    codes = frame["prompt_key"].cast(pl.Categorical).to_physical().cast(pl.Int32).fill_null(-1)
    return codes.to_numpy().astype(np.int32)


def _ragged(path: Path, source: Path | bytes, width: int, error: Exception) -> InputError:
    """Names the first line with too many fields."""
    lines = io.BytesIO(source) if isinstance(source, bytes) else source.open("rb")
    with lines:
        for number, line in enumerate(lines, start=1):
            fields = line.count(b",") + 1
            if fields > width:
                return InputError(f"{path}, line {number}: has {fields} fields; legal is {width}, as in the header")
    return InputError(f"{path}: is not CSV ({str(error).splitlines()[0]}); legal is comma-separated text")
