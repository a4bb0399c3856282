"""LiteLLM's standard logging payload, one JSON object per line.

LiteLLM writes a line when a call ends, so lines are put in order of `startTime` here. Failed calls and calls that
generate no text (embeddings, images, ...) are left out and counted.
"""

from __future__ import annotations

import gzip
import json
import math
import zlib
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from envs.workload.traces import Trace
from envs.workload.traces_csv import MAX_TOKENS, MAX_UNIX_S
from marginroute.errors import InputError

Array = np.ndarray[Any, Any]
Row = tuple[float, int, int, str, str, str, float, float, float, bool]

_NO_TEXT = ("embedding", "image", "speech", "transcription", "moderation", "rerank")


def read_litellm(path: Path, columns: Mapping[str, str] | None = None) -> Trace:
    """A file of standard logging payloads (`.jsonl`, `.jsonl.gz`).

    The class is the team alias of the virtual key, or the key's own alias where there is no team.
    """
    if columns:
        raise InputError(f"{path}: litellm has fixed columns; legal is --columns with the csv format only")
    rows: list[Row] = []
    skipped = 0
    for number, payload in _payloads(path):
        empty = payload.get("completion_tokens") == 0  # such as an answer from LiteLLM's own cache
        no_text = any(word in str(payload.get("call_type")) for word in _NO_TEXT)
        if payload.get("status") == "failure" or empty or no_text:
            skipped += 1
        else:
            rows.append(_row(path, number, payload))
    if not rows:
        raise InputError(f"{path}: has no answered call ({skipped} skipped); legal is at least one")
    rows.sort(key=lambda row: row[0])
    start, prompt, output, names, models, keys, ttft, e2e, cost, hit = zip(*rows, strict=True)
    return Trace(
        path=str(path),
        arrived_at_s=np.array(start) - start[0],
        prompt_tokens=np.array(prompt, dtype=np.int32),
        output_tokens=np.array(output, dtype=np.int32),
        class_name=np.array(names) if any(names) else None,
        model=np.array(models),
        prompt_key=_dense(keys),
        ttft_s=np.array(ttft),
        e2e_s=np.array(e2e),
        cost_usd=np.array(cost),
        cache_hit=np.array(hit),
        skipped_rows=skipped,
    )


def _payloads(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line numbers and payloads; blank lines are passed over."""
    with path.open("rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    try:
        with gzip.open(path) if packed else path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield number, _payload(path, number, line)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{path}: is a damaged gzip file ({error}); legal is a complete one") from None


def _payload(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        payload = json.loads(line)
    except ValueError as error:
        raise InputError(f"{path}, line {number}: is not JSON ({error}); legal is one object per line") from None
    if isinstance(payload, dict) and isinstance(payload.get("standard_logging_object"), dict):
        payload = payload["standard_logging_object"]
    if not isinstance(payload, dict):
        raise InputError(f"{path}, line {number}: is {type(payload).__name__}; legal is one JSON object per line")
    return payload


def _row(path: Path, number: int, payload: dict[str, Any]) -> Row:
    start_s = _instant(path, number, payload, "startTime")
    metadata = payload.get("metadata")
    metadata = metadata if isinstance(metadata, dict) else {}
    alias = metadata.get("user_api_key_team_alias") or metadata.get("user_api_key_alias") or ""
    return (
        start_s,
        _tokens(path, number, payload, "prompt_tokens"),
        _tokens(path, number, payload, "completion_tokens"),
        str(alias),
        str(payload.get("model_group") or payload.get("model") or ""),
        str(payload.get("cache_key") or ""),
        _since(path, number, payload, "completionStartTime", start_s),
        _since(path, number, payload, "endTime", start_s),
        float(cost) if isinstance(cost := payload.get("response_cost"), (int, float)) else math.nan,
        payload.get("cache_hit") in (True, "True", "true"),
    )


def _tokens(path: Path, number: int, payload: dict[str, Any], key: str) -> int:
    value = payload.get(key)
    legal = isinstance(value, (int, float)) and not isinstance(value, bool) and 1 <= value <= MAX_TOKENS
    if not legal or value != int(value):
        shown = "missing" if value is None else repr(value)
        raise InputError(f"{path}, line {number}: {key} is {shown}; legal is an integer from 1 to {MAX_TOKENS}")
    return int(value)


def _instant(path: Path, number: int, payload: dict[str, Any], key: str) -> float:
    """Seconds since 1970 of a Unix time or an ISO timestamp (UTC where it names no zone)."""
    value = payload.get(key)
    if isinstance(value, str):
        try:
            moment = datetime.fromisoformat(value)
            return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
        except ValueError:
            pass
    elif isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        if abs(value) > MAX_UNIX_S:
            raise InputError(f"{path}, line {number}: {key} {value!r} looks like milliseconds; legal is seconds")
        return float(value)
    shown = "missing" if value is None else repr(value)
    raise InputError(f"{path}, line {number}: {key} is {shown}; legal is a Unix time in seconds or an ISO timestamp")


def _since(path: Path, number: int, payload: dict[str, Any], key: str, start_s: float) -> float:
    return math.nan if not payload.get(key) else _instant(path, number, payload, key) - start_s


def _dense(keys: tuple[str, ...]) -> Array | None:
    """(M,) i4 number of each cache key, -1 where there is none."""
    if not any(keys):
        return None
    number: dict[str, int] = {}
    return np.array([number.setdefault(key, len(number)) if key else -1 for key in keys], dtype=np.int32)
