"""JSON lines of one flat record per request: Mooncake's traces and our own decision records.

Mooncake (FAST25-release/README.md of github.com/kvcache-ai/Mooncake): timestamp (ms), input_length, output_length,
hash_ids, one per block of 512 prompt tokens, equal for equal blocks behind equal prefixes.
"""

from __future__ import annotations

import math
from array import array
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from envs.workload.traces import MAX_TOKENS, ReadOptions, Trace
from envs.workload.traces_files import json_lines, json_objects, line_chunks
from envs.workload.traces_links import full_blocks, names
from envs.workload.traces_values import hash_ids, instant, number, optional, seconds, tokens
from marginroute.errors import InputError

Array = np.ndarray[Any, Any]

MOONCAKE_BLOCK_TOKENS = 512
_MOONCAKE = {
    "timestamp": pl.Float64,
    "input_length": pl.Float64,
    "output_length": pl.Float64,
    "hash_ids": pl.List(pl.Int64),
}


def read_mooncake(path: Path, options: ReadOptions) -> Trace:
    """Mooncake's traces; rows are in order of time."""
    parts = []
    last_ms = -math.inf
    for first, chunk in line_chunks(path):
        table = _fast(chunk, last_ms)
        if table is None:
            table = _slow(path, first, chunk, last_ms)
        if len(table[0]):
            parts.append(table)
            last_ms = table[0][-1]
    if not parts:
        raise InputError(f"{path}: has no rows; legal is at least one request")
    times_ms, prompt, output, count, ids = (np.concatenate(column) for column in zip(*parts, strict=True))
    count, ids = full_blocks(prompt, MOONCAKE_BLOCK_TOKENS, count, ids)
    return Trace(
        path=str(path),
        arrived_at_s=(times_ms - times_ms[0]) / 1e3,
        prompt_tokens=prompt.astype(np.int32),
        output_tokens=output.astype(np.int32),
        prefix_block_tokens=MOONCAKE_BLOCK_TOKENS if len(ids) else 0,
        prefix_count=count if len(ids) else None,
        prefix_hash=ids if len(ids) else None,
    )


def _fast(chunk: bytes, last_ms: float) -> tuple[Array, ...] | None:
    """Times, prompt, output, hash counts and hashes of lines that are as they should be; None where one is not."""
    try:
        table = pl.read_ndjson(chunk, schema=_MOONCAKE)
    except pl.exceptions.PolarsError:
        return None
    times_ms, prompt, output = (table[name].to_numpy() for name in ("timestamp", "input_length", "output_length"))
    hashes = table["hash_ids"]
    ids = hashes.explode().drop_nulls().to_numpy()
    lengths = np.concatenate([prompt, output])
    fine = (
        not any(table[name].null_count() for name in _MOONCAKE)
        and np.isfinite(times_ms).all()
        and (np.diff(times_ms, prepend=last_ms) >= 0.0).all()
        and ((lengths >= 1) & (lengths <= MAX_TOKENS) & (lengths == np.rint(lengths))).all()
        and (ids >= 0).all()
    )
    count = hashes.list.len().to_numpy().astype(np.int64) if fine else ids
    if not fine or count.sum() != len(ids):
        return None
    return times_ms, prompt.astype(np.int64), output.astype(np.int64), count, ids.astype(np.int64)


def _slow(path: Path, first: int, chunk: bytes, last_ms: float) -> tuple[Array, ...]:
    """The same line by line; raises at the first one that cannot be read."""
    times, prompt, output, count, ids = array("d"), array("q"), array("q"), array("q"), array("q")
    for line, record in json_objects(path, first, chunk.splitlines()):
        place = (path, line)
        now_ms = number(place, record, "timestamp", "milliseconds")
        if now_ms < last_ms:
            text = f"{path}, line {line}: timestamp {now_ms:g} lies before the line above"
            raise InputError(f"{text}; legal is a file ordered by it")
        last_ms = now_ms
        own = hash_ids(place, record) if "hash_ids" in record else []
        times.append(now_ms)
        prompt.append(tokens(place, record, "input_length"))
        output.append(tokens(place, record, "output_length"))
        count.append(len(own))
        ids.extend(own)
    counts = (np.array(column, dtype=np.int64) for column in (prompt, output, count, ids))
    return np.array(times), *counts


def read_decisions(path: Path, options: ReadOptions) -> Trace:
    """Our own decision records; calls that were not completed are left out, rows are put in order of time.

    Class and task are the numbers that the gateway knew them by.
    """
    rows = []
    skipped = 0
    for line, record in json_lines(path):
        place = (path, line)
        if record.get("status") != "completed" or record.get("output_tokens") is None:
            skipped += 1
            continue
        signals = record.get("request")
        signals = signals if isinstance(signals, dict) else {}
        known = record if record.get("prompt_tokens") is not None else signals
        waited_s = seconds(place, signals, "waited_s")
        rows.append(
            (
                instant(place, record, "decided_at_s") - (0.0 if math.isnan(waited_s) else waited_s),
                tokens(place, known, "prompt_tokens"),
                tokens(place, record, "output_tokens"),
                _index(signals.get("class_index")),
                _index(signals.get("task_index")),
                str(record.get("served_by") or record.get("choice") or ""),
                seconds(place, record, "ttft_s"),
                seconds(place, record, "e2e_s"),
                optional(record.get("cost_usd")),
            )
        )
    if not rows:
        raise InputError(f"{path}: has no completed call ({skipped} skipped); legal is at least one")
    rows.sort(key=lambda row: row[0])
    start, prompt, output, classes, tasks, served, ttft, e2e, cost = zip(*rows, strict=True)
    return Trace(
        path=str(path),
        arrived_at_s=np.array(start) - start[0],
        prompt_tokens=np.array(prompt, dtype=np.int32),
        output_tokens=np.array(output, dtype=np.int32),
        class_name=names(classes),
        task_name=names(tasks),
        model=np.array(served),
        ttft_s=np.array(ttft),
        e2e_s=np.array(e2e),
        cost_usd=np.array(cost),
        skipped_rows=skipped,
    )


def _index(value: Any) -> str:
    figure = optional(value)
    return "" if math.isnan(figure) else str(int(figure))
