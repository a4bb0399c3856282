"""Pieces of a log of DecisionRecords as tables; the first line that cannot be used is named.

A log is read in pieces of whole lines, each parsed as one table, which is fast. Where a piece holds anything that is
not legal it is gone through line by line, and the error says which one and why.
"""

from __future__ import annotations

import io
import json
import math
import reprlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import polars as pl

from envs.progress import Progress
from envs.workload.traces import MAX_TOKENS
from marginroute.errors import InputError
from marginroute.record import SCHEMA

Part = TypeVar("Part")

PIECE_LINES = 20_000
OUTCOME_NUMBERS = ("ttft_s", "e2e_s", "prompt_tokens", "output_tokens", "cost_usd")  # of a DecisionRecord
STATUSES = ("completed", "abandoned", "failed", "shed", "")
MOST = {
    **dict.fromkeys(("prompt_tokens", "output_tokens", "expected_output_tokens"), float(MAX_TOKENS)),
    **dict.fromkeys(("ttft_s", "e2e_s", "cost_usd", "waited_s"), math.inf),
}
"""Numbers of a record, or of its request, that are 0 or more, with the most that is legal."""
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
GZIP = b"\x1f\x8b"


@dataclass
class LineLog:
    """A log in the course of being read.

    Attributes:
        path: JSONL file of DecisionRecords.
        columns: polars type by name of what is read; `id`, `schema`, `decided_at_s`, `status` and `request` among them.
        needed: columns that every line must have.
        lines: read so far.
        seen: line by hash of id and time of the decision.
    """

    path: Path
    columns: Mapping[str, Any]
    needed: tuple[str, ...]
    lines: int = 0
    seen: dict[int, int] = field(default_factory=dict, repr=False)

    def pieces(
        self,
        use: Callable[[pl.DataFrame], Part],
        explain: Callable[[int, dict[str, Any]], None],
        progress: Progress,
    ) -> Iterator[Part]:
        """What `use` makes of each piece.

        Args:
            use: takes a table in; raises ValueError if anything in it is not as it should be.
            explain: raises InputError if the record of a line is what is wrong.
            progress: called with bytes read and bytes in all.

        Raises:
            InputError: the file cannot be read, or a line: its number, what it holds, what is legal.
        """
        try:
            total = self.path.stat().st_size
            file = open(self.path, "rb")  # noqa: SIM115
        except OSError as error:
            raise InputError(f"{self.path}: cannot be read ({error.strerror}); legal is a log of decisions") from None
        done = 0
        with file:
            while lines := [line for _, line in zip(range(PIECE_LINES), file, strict=False)]:
                if not self.lines:
                    if lines[0].startswith(GZIP):
                        raise InputError(f"{self.path}: is compressed; legal is plain lines, as gunzip -c writes them")
                    lines[0] = lines[0].removeprefix(BYTE_ORDER_MARK)
                part = self._read(lines, use, explain)
                done += sum(map(len, lines))
                progress(done, total)
                yield part

    def _read(
        self, lines: list[bytes], use: Callable[[pl.DataFrame], Part], explain: Callable[[int, dict[str, Any]], None]
    ) -> Part:
        try:
            table = pl.read_ndjson(io.BytesIO(b"".join(lines)), schema=dict(self.columns))
            if table.height != len(lines) or not lines[-1].endswith(b"\n"):
                raise ValueError
            if any(table.select(pl.col(*self.needed).null_count()).row(0)) or not (table["schema"] == SCHEMA).all():
                raise ValueError
            if not table["status"].is_in(STATUSES).all() or self._out_of_range(table):
                raise ValueError
            part = use(table)
        except (pl.exceptions.PolarsError, ValueError):
            for i, line in enumerate(lines):
                explain(self.lines + i + 1, self._record(self.lines + i + 1, line))
            raise InputError(f"{self.path}: lines {self.lines + 1} to {self.lines + len(lines)} are no log") from None
        self._remember(table)
        self.lines += len(lines)
        return part

    def _out_of_range(self, table: pl.DataFrame) -> bool:
        """Whether any number of `MOST` is not legal."""
        fields = {name: pl.col(name) for name in self.columns}
        fields |= {f"request.{item.name}": pl.col("request").struct.field(item.name) for item in self._request()}
        checks = [
            (~column.is_between(0.0, MOST[leaf])).any().alias(name)
            for name, column in fields.items()
            if (leaf := name.removeprefix("request.")) in MOST
        ]
        return any(table.select(checks).row(0))

    def _request(self) -> list[pl.Field]:
        return list(self.columns["request"].fields)

    def _remember(self, table: pl.DataFrame) -> None:
        """Refuses a request decided twice at the same time."""
        keys = table.select("id", "decided_at_s").hash_rows(seed=0).to_list()
        for i, key in enumerate(keys):
            line = self.lines + i + 1
            if self.seen.setdefault(key, line) != line:
                words = f"repeats request {table['id'][i]!r} of line {self.seen[key]}; legal is each once"
                raise self.refusal(line, words)

    def refusal(self, number: int, what: str) -> InputError:
        """The error of a line."""
        return InputError(f"{self.path}, line {number}: {what}")

    def _record(self, number: int, line: bytes) -> dict[str, Any]:
        """The line's record, if it is a whole one of this schema."""
        try:
            record = json.loads(line, parse_constant=lambda text: text)
            if not isinstance(record, dict):
                raise ValueError
        except (ValueError, RecursionError):
            end = "" if line.endswith(b"\n") else ", the file ends within it"
            raise self.refusal(number, f"is not a JSON object{end}; legal is one whole record per line") from None
        if not line.endswith(b"\n"):
            raise self.refusal(number, "has no end of line; legal is one whole record per line")
        for name in self.needed:
            if record.get(name) is None:
                raise self.refusal(number, f"has no {name}; legal is a DecisionRecord of schema {SCHEMA}")
        if record["schema"] != SCHEMA:
            raise self.refusal(number, f"has schema {record['schema']!r}; legal is {SCHEMA}, that of this version")
        for name, kind in self.columns.items():
            if name != "request":
                self._check(number, name, record.get(name), kind)
        if not isinstance(record["request"], dict):
            raise self.refusal(number, f"has request = {reprlib.repr(record['request'])}; legal is an object")
        for item in self._request():
            self._check(number, f"request.{item.name}", record["request"].get(item.name), item.dtype)
        if record["status"] not in STATUSES:
            raise self.refusal(number, f"has status {record['status']!r}; legal is {', '.join(STATUSES[:-1])} or none")
        return record

    def _check(self, number: int, name: str, value: Any, kind: Any) -> None:
        """Refuses a value that is not of its column's type, or out of its range; null is left to the reader."""
        fits, legal = JSON_KINDS.get(kind, (lambda _: True, ""))
        most = MOST.get(name.removeprefix("request."))
        if most is not None:
            legal = "a number of 0 or more" if math.isinf(most) else f"a number from 0 to {most:.0f}"
        if value is not None and not (fits(value) and (most is None or 0.0 <= value <= most)):
            raise self.refusal(number, f"has {name} = {reprlib.repr(value)}; legal is {legal}")


def is_number(value: Any) -> bool:
    """Whether a JSON value is a finite number."""
    return type(value) is int or (type(value) is float and math.isfinite(value))


JSON_KINDS: dict[Any, tuple[Callable[[Any], bool], str]] = {
    pl.Float64: (is_number, "a number"),
    pl.Int64: (lambda value: type(value) is int, "a whole number"),
    pl.Boolean: (lambda value: isinstance(value, bool), "true or false"),
    pl.List(pl.String): (lambda value: isinstance(value, list), "a list of names"),
}
"""By type of a column: what fits, and the words for it; a string is anything."""
