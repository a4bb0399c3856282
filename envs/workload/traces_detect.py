"""Which layout a file has, told from its first line; only where it cannot be another."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from pathlib import Path
from typing import Any

from envs.workload.traces import FORMATS
from envs.workload.traces_files import head_of
from marginroute.errors import InputError

_CSV = {
    "azure-llm": {"TIMESTAMP", "ContextTokens", "GeneratedTokens"},
    "burstgpt": {"Timestamp", "Request tokens", "Response tokens", "Log Type"},
    "csv": {"arrived_at", "prompt_tokens", "output_tokens"},
}
_JSON = {
    "mooncake": {"timestamp", "input_length", "output_length"},
    "agent-sessions": {"block_size", "requests"},
    "otel-genai": {"resourceSpans"},
    "decisions": {"decided_at_s", "choice", "probability"},
    "litellm": {"startTime", "prompt_tokens", "completion_tokens"},
}


def detect(path: Path) -> str:
    """Name of the format.

    Raises:
        InputError: no format fits, or several do.
    """
    if path.is_dir():
        return "servegen"
    head = head_of(path)
    if head.startswith(b"PAR1"):
        return "agent-sessions"
    if not head:
        raise InputError(f"{path}: is empty; legal is a file with at least one request")
    if tarfile.is_tarfile(path):
        return "servegen"
    keys = _json_keys(head)
    known = _JSON if keys is not None else _CSV
    found = [name for name, needed in known.items() if needed <= (_csv_header(head) if keys is None else keys)]
    if len(found) == 1:
        return found[0]
    text = f"{path}: its first line tells no known format"
    raise InputError(f"{text}; legal is --trace-format with one of {', '.join(FORMATS)}")


def _csv_header(head: bytes) -> set[str]:
    line = head.split(b"\n", 1)[0].decode("utf-8", "replace")
    return {name.strip() for name in next(csv.reader(io.StringIO(line)), [])}


def _json_keys(head: bytes) -> set[str] | None:
    """Keys of the first object; None where the file does not begin with one."""
    text = head.decode("utf-8", "replace").lstrip()
    if not text.startswith("{"):
        return None
    record = _first_object(text)
    inner = record.get("standard_logging_object")
    return set(inner if isinstance(inner, dict) else record)


def _first_object(text: str) -> dict[str, Any]:
    """The first JSON object; of one that is longer than the head, the keys before its first long value."""
    try:
        record, _ = json.JSONDecoder().raw_decode(text)
    except ValueError:
        record = {key: None for needed in _JSON.values() for key in needed if f'"{key}"' in text}
    return record if isinstance(record, dict) else {}
