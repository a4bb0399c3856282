"""Request files of `python -m envs simulate`: CSV with named columns, or JSON lines in the layout of Mooncake's traces.

CSV: arrived_at (s), prompt_tokens, output_tokens and optionally hash_ids, whole numbers between spaces. JSON lines
(name ending in .jsonl or .jsonl.gz; FAST25-release of github.com/kvcache-ai/Mooncake): timestamp (ms), input_length,
output_length and optionally hash_ids, a list. A hash id stands for a block of the prompt and all before it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from envs.tables import opened, read_columns, read_text_column
from marginroute.errors import InputError

Array = np.ndarray[Any, Any]

COLUMNS = ("arrived_at", "prompt_tokens", "output_tokens")
MOST_TOKENS = 10_000_000
_JSON_KEYS = ("timestamp", "input_length", "output_length")
_IDS = "legal is whole numbers from 0 to 2**63 - 1"


@dataclass(frozen=True, eq=False)
class Requests:
    """M requests in order of arrival.

    Attributes:
        arrived_at_s: (M,) f8.
        prompt_tokens: (M,) i8, 1 or more.
        output_tokens: (M,) i8, 1 or more.
        hash_counts: (M,) i8, hash ids of each request; None where the file has none.
        hash_ids: (sum of hash_counts,) i8.
    """

    arrived_at_s: Array
    prompt_tokens: Array
    output_tokens: Array
    hash_counts: Array | None = None
    hash_ids: Array | None = None


def read_requests(path: Path) -> Requests:
    """Reads and checks a request file.

    Raises:
        InputError: A value is no number, time goes backwards, or a count is not a whole number of 1 or more.
    """
    lines = path.name.removesuffix(".gz").endswith(".jsonl")
    columns, ids = _read_json_lines(path) if lines else _read_csv(path)
    _check(path, columns)
    arrived_at_s, prompt_tokens, output_tokens = (columns[name] for name in COLUMNS)
    tokens = prompt_tokens.astype(np.int64), output_tokens.astype(np.int64)
    if ids is None:
        return Requests(arrived_at_s, *tokens)
    counts = np.array([len(own) for own in ids], dtype=np.int64)
    return Requests(arrived_at_s, *tokens, counts, np.array([i for own in ids for i in own], dtype=np.int64))


def _check(path: Path, columns: dict[str, Array]) -> None:
    arrived_at = columns["arrived_at"]
    if arrived_at[0] < 0.0:
        raise InputError(f"{path}, request 1: arrived_at = {arrived_at[0]:g}; legal is 0 or later")
    back = np.flatnonzero(np.diff(arrived_at) < 0.0)
    if back.size:
        row = int(back[0]) + 1
        before, value = arrived_at[row - 1], arrived_at[row]
        raise InputError(
            f"{path}, request {row + 1}: arrived_at = {value:g} after {before:g}; legal is ascending order"
        )
    for name in COLUMNS[1:]:
        values = columns[name]
        bad = np.flatnonzero((values < 1) | (values > MOST_TOKENS) | (values != np.floor(values)))
        if bad.size:
            row, value = int(bad[0]), values[bad[0]]
            legal = f"legal is a whole number from 1 to {MOST_TOKENS}"
            raise InputError(f"{path}, request {row + 1}: {name} = {value:g}; {legal}")


def _ids(path: Path, row: int, values: Iterable[Any], parse: Callable[[Any], int]) -> list[int]:
    own = []
    for value in values:
        try:
            number = parse(value)
        except ValueError:
            number = -1
        if not 0 <= number < 2**63:
            raise InputError(f"{path}, request {row + 1}: hash_ids has {value!r}; {_IDS}")
        own.append(number)
    return own


def _read_csv(path: Path) -> tuple[dict[str, Array], list[list[int]] | None]:
    columns = read_columns(path, COLUMNS)
    cells = read_text_column(path, "hash_ids")
    if cells is None:
        return columns, None
    return columns, [_ids(path, row, cell.split(), int) for row, cell in enumerate(cells)]


def _whole(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError
    return value


def _read_json_lines(path: Path) -> tuple[dict[str, Array], list[list[int]] | None]:
    rows: list[list[float]] = []
    ids: list[list[int]] = []
    missing = 0
    with opened(path, "JSON lines") as file:
        for line, text in enumerate(file, start=1):
            if not text.strip():
                continue
            try:
                record = json.loads(text)
                rows.append([float(record[key]) for key in _JSON_KEYS])
                values = record.get("hash_ids")
                if not isinstance(values, list | None) or not np.isfinite(rows[-1]).all():
                    raise ValueError
            except (KeyError, TypeError, ValueError, AttributeError):
                legal = f"legal is an object with numbers {', '.join(_JSON_KEYS)} and optionally a list hash_ids"
                raise InputError(f"{path}, line {line}: {text.strip()[:60]!r}; {legal}") from None
            missing += values is None
            ids.append(_ids(path, len(ids), values or [], _whole))
    if not rows:
        raise InputError(f"{path}: no rows; legal is one or more")
    table = np.array(rows).T
    return dict(zip(COLUMNS, (table[0] / 1e3, table[1], table[2]), strict=True)), ids if missing < len(rows) else None
