"""Agent sessions with block hashes, as JSON lines of whole sessions or as a flat Parquet table.

JSON lines (traces/ of github.com/callanjfox/kv-cache-tester): id, block_size, requests[t (s from the session's start),
model, in, out, hash_ids, api_time, think_time], and entries of type `subagent` with requests of their own, whose t
counts from the subagent's start. Block numbers stand for a block and all before it and are local to a session.
Parquet: one row per request with n_blocks and prev_prefix_blocks (blocks shared with the agent's previous request)
in place of hashes; hashes are rebuilt from those.

The data does not tell when one session starts relative to another: starts are laid `session_gap_s` apart. Blocks of 64
tokens are coarsened to 512 (every eighth number, since numbers are of whole prefixes): a hit loses 256 tokens on
average, and memory an eighth.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from envs.workload.traces import ReadOptions, Trace
from envs.workload.traces_files import json_lines
from envs.workload.traces_values import Place, bad, hash_ids, number, objects, seconds, tokens
from marginroute.errors import InputError

Array = np.ndarray[Any, Any]

COARSE_TOKENS = 512
_PARQUET_COLUMNS = ("id", "agent", "t", "model", "in", "out", "n_blocks", "prev_prefix_blocks", "api_time")
_PARQUET_BLOCK_TOKENS = 64


@dataclass
class _Rows:
    """Requests in file order, to be sorted by arrival."""

    start: array[float] = field(default_factory=lambda: array("d"))
    prompt: array[int] = field(default_factory=lambda: array("i"))
    output: array[int] = field(default_factory=lambda: array("i"))
    session: array[int] = field(default_factory=lambda: array("i"))
    parent: array[int] = field(default_factory=lambda: array("i"))
    think: array[float] = field(default_factory=lambda: array("d"))
    e2e: array[float] = field(default_factory=lambda: array("d"))
    count: array[int] = field(default_factory=lambda: array("i"))
    hashes: array[int] = field(default_factory=lambda: array("q"))
    model: list[str] = field(default_factory=list)
    task: list[str] = field(default_factory=list)
    skipped: int = 0


def read_agents(path: Path, options: ReadOptions) -> Trace:
    """Agent sessions; parents and think times as recorded, sessions `session_gap_s` apart."""
    with path.open("rb") as file:
        parquet = file.read(4) == b"PAR1"
    rows = _from_parquet(path, options.session_gap_s) if parquet else _from_json(path, options.session_gap_s)
    if not rows.start:
        raise InputError(f"{path}: has no requests; legal is at least one session with a request")
    return _sorted(path, rows, options.session_gap_s)


def _sorted(path: Path, rows: _Rows, gap_s: float) -> Trace:
    start_s = np.array(rows.start)
    order = np.argsort(start_s, kind="stable")
    place = np.empty(len(order), dtype=np.int32)
    place[order] = np.arange(len(order), dtype=np.int32)
    parent = np.array(rows.parent, dtype=np.int32)[order]
    count = np.array(rows.count, dtype=np.int64)
    first = np.cumsum(count) - count
    within = np.arange(int(count.sum())) - np.repeat(np.cumsum(count[order]) - count[order], count[order])
    hashes = np.array(rows.hashes, dtype=np.int64)[np.repeat(first[order], count[order]) + within]
    return Trace(
        path=str(path),
        arrived_at_s=start_s[order] - start_s[order[0]],
        prompt_tokens=np.array(rows.prompt, dtype=np.int32)[order],
        output_tokens=np.array(rows.output, dtype=np.int32)[order],
        task_name=np.array(rows.task)[order],
        model=np.array(rows.model)[order],
        session_index=np.array(rows.session, dtype=np.int32)[order],
        parent_index=np.where(parent >= 0, place[parent], -1).astype(np.int32),
        think_s=np.array(rows.think)[order],
        prefix_block_tokens=COARSE_TOKENS,
        prefix_count=count[order].astype(np.int32),
        prefix_hash=hashes,
        e2e_s=np.array(rows.e2e)[order],
        skipped_rows=rows.skipped,
        note=f"starts of sessions are not recorded and were laid {gap_s:g} s apart",
    )


def _from_json(path: Path, gap_s: float) -> _Rows:
    rows = _Rows()
    for session, (line, record) in enumerate(json_lines(path)):
        place = (path, line)
        block_tokens = record.get("block_size")
        if not isinstance(block_tokens, int) or block_tokens < 1 or COARSE_TOKENS % block_tokens:
            raise bad(place, "block_size", block_tokens, f"a whole number that divides {COARSE_TOKENS}")
        requests = objects(place, record, "requests")
        _Session(place, rows, session, COARSE_TOKENS // block_tokens).add(requests, session * gap_s, -1)
    return rows


@dataclass
class _Session:
    """One session's requests on their way into the table."""

    place: tuple[Path, int]
    rows: _Rows
    index: int
    step: int  # blocks of the file per block of ours

    def add(self, requests: list[dict[str, Any]], start_s: float, parent: int, task: str = "main") -> None:
        """Appends an agent's requests, sub-agents where they start."""
        rows = self.rows
        for request in requests:
            at_s = start_s + number(self.place, request, "t", "seconds from the start")
            if parent >= 0 and at_s < rows.start[parent]:
                raise bad(self.place, "t", request["t"], "requests of an agent in order of time")
            if request.get("type") == "subagent":
                inner = objects(self.place, request, "requests")
                self.add(inner, at_s, parent, str(request.get("subagent_type") or "subagent"))
                continue
            if not request.get("in") or not request.get("out"):
                rows.skipped += 1
                continue
            ids = hash_ids(self.place, request) if "hash_ids" in request else []
            coarse = ids[self.step - 1 :: self.step]
            rows.start.append(at_s)
            rows.prompt.append(tokens(self.place, request, "in"))
            rows.output.append(tokens(self.place, request, "out"))
            rows.session.append(self.index)
            rows.parent.append(parent)
            rows.think.append(self._think_s(request, at_s, parent))
            rows.e2e.append(seconds(self.place, request, "api_time"))
            rows.count.append(len(coarse))
            rows.hashes.extend([self.index << 40 | block for block in coarse])
            rows.model.append(str(request.get("model") or ""))
            rows.task.append(task)
            parent = len(rows.start) - 1

    def _think_s(self, request: dict[str, Any], at_s: float, parent: int) -> float:
        """Seconds since the parent's end, as the times say; the file's own figure where they do not."""
        if parent < 0:
            return math.nan
        since_s = at_s - self.rows.start[parent] - self.rows.e2e[parent]
        return max(since_s, 0.0) if not math.isnan(since_s) else seconds(self.place, request, "think_time")


def _from_parquet(path: Path, gap_s: float) -> _Rows:
    rows = _Rows()
    sessions: dict[str, int] = {}
    last: dict[tuple[str, str], int] = {}
    chains: dict[tuple[str, str], list[int]] = {}
    step = COARSE_TOKENS // _PARQUET_BLOCK_TOKENS
    fresh = 0
    for row, record in enumerate(_parquet_records(path), start=1):
        place = (path, row)
        name, agent, model = record["id"], record["agent"], record["model"]
        session = sessions.setdefault(name, len(sessions))
        if not record["in"] or not record["out"]:
            rows.skipped += 1
            continue
        at_s = number(place, record, "t", "seconds from the start")
        prompt, output, api_s = (
            tokens(place, record, "in"),
            tokens(place, record, "out"),
            seconds(place, record, "api_time"),
        )
        blocks = _blocks(place, record, "n_blocks", prompt)
        shared = _blocks(place, record, "prev_prefix_blocks", prompt)
        key = (name, agent)
        chain = chains.get(key, [])[: shared // step]
        new = blocks // step - len(chain)
        chain = chain + list(range(fresh, fresh + new))
        fresh += max(new, 0)
        chains[key] = chain
        parent = last.get(key, last.get((name, "main"), -1))
        if parent >= 0 and session * gap_s + at_s < rows.start[parent]:
            raise bad(place, "t", at_s, "requests of an agent in order of time")
        rows.start.append(session * gap_s + at_s)
        rows.prompt.append(prompt)
        rows.output.append(output)
        rows.session.append(session)
        rows.parent.append(parent)
        rows.e2e.append(api_s)
        since_s = math.nan if parent < 0 else rows.start[-1] - rows.start[parent] - rows.e2e[parent]
        rows.think.append(max(since_s, 0.0) if not math.isnan(since_s) else since_s)
        rows.count.append(len(chain))
        rows.hashes.extend(chain)
        rows.model.append(model or "")
        rows.task.append(agent or "main")
        last[key] = len(rows.start) - 1
    return rows


def _blocks(place: Place, record: Mapping[str, Any], key: str, prompt_tokens: int) -> int:
    """A number of blocks of the prompt; null is none."""
    value = record[key]
    most = -(-prompt_tokens // _PARQUET_BLOCK_TOKENS)
    if value is None:
        return 0
    if type(value) is not int or not 0 <= value <= most:
        raise bad(place, key, value, f"0 to the {most} blocks of its prompt")
    return value


def _parquet_records(path: Path) -> Iterator[dict[str, Any]]:
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        missing = [name for name in _PARQUET_COLUMNS if name not in file.schema_arrow.names]
        if missing:
            legal = ", ".join(_PARQUET_COLUMNS)
            raise InputError(f"{path}: no column {missing[0]!r}; legal is a table with {legal}")
        for batch in file.iter_batches(columns=list(_PARQUET_COLUMNS)):
            yield from batch.to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        text = str(error).splitlines()[0]
        raise InputError(f"{path}: is a damaged Parquet file ({text}); legal is a complete one") from None
