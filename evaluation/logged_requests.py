"""What a gateway's log says about requests, whoever decided: when they came, where they went, what came of it.

Unlike `decision_log`, this needs no probabilities and no signals, so logs of shadow mode serve. Times to the first
token and to the end count from the request's arrival, which is `waited_s` before the decision.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from envs.progress import Progress, silent
from evaluation.log_lines import OUTCOME_NUMBERS, LineLog
from marginroute.errors import InputError

Array = np.ndarray[Any, Any]

_REQUEST = ("prompt_tokens", "expected_output_tokens", "class_index", "task_index", "waited_s")
_NAMED = ("asked_tokens", "expected_tokens", *_REQUEST[2:], "difficulty_signal")  # the request's own, renamed
_COLUMNS: dict[str, Any] = {
    "id": pl.String,
    "schema": pl.Int64,
    "decided_at_s": pl.Float64,
    "mode": pl.String,
    "choice": pl.String,
    "served_by": pl.String,
    "status": pl.String,
    "request": pl.Struct(dict.fromkeys((*_REQUEST, "difficulty_signal"), pl.Float64)),
    "good": pl.Boolean,
    **dict.fromkeys(OUTCOME_NUMBERS, pl.Float64),
}
_NEEDED = ("id", "schema", "decided_at_s", "mode", "choice", "request", "status")
ENDED = ("completed", "failed", "abandoned")


@dataclass(frozen=True, eq=False)
class LoggedRequests:
    """Requests that a candidate was asked to answer, n of them, in order of the decision.

    Attributes:
        decided_at_s: (n,) Unix time.
        waited_s: (n,) from arrival to the decision.
        candidate: (n,) index into the names of the scenario's candidates; -1: the log does not say.
        class_index, task_index: (n,).
        prompt_tokens, output_tokens: (n,) as counted; what was expected where there was no answer.
        completed, abandoned: (n,) bool; neither: it failed.
        ttft_s, e2e_s, cost_usd: (n,) NaN where unknown.
        good: (n,) 1 or 0 by the feedback, NaN where there is none.
        difficulty_signal: (n,) NaN where there is none.
        skipped: lines about requests that no candidate was asked for (shed, stored answers, no outcome).
    """

    decided_at_s: Array
    waited_s: Array
    candidate: Array
    class_index: Array
    task_index: Array
    prompt_tokens: Array
    output_tokens: Array
    completed: Array
    abandoned: Array
    ttft_s: Array
    e2e_s: Array
    cost_usd: Array
    good: Array
    difficulty_signal: Array
    skipped: int


def read_requests(
    path: Path,
    candidates: Sequence[str],
    class_names: Sequence[str],
    task_names: Sequence[str],
    progress: Progress = silent,
) -> LoggedRequests:
    """The requests of a log.

    Args:
        path: JSONL file of DecisionRecords.
        candidates: names of the replicas and providers of the scenario that the log is held against.
        class_names: of the scenario.
        task_names: of the scenario.
        progress: called with bytes read and bytes in all.

    Raises:
        InputError: a line that cannot be used, or no request at all.
    """
    reader = _Reader(LineLog(path, _COLUMNS, _NEEDED), tuple(candidates), tuple(class_names), tuple(task_names))
    tables = list(reader.log.pieces(reader.use, reader.explain, progress))
    table = pl.concat(tables).sort("decided_at_s", maintain_order=True) if tables else pl.DataFrame()
    if table.height == 0:
        raise InputError(f"{path}: has no request that was sent to a candidate; legal is at least one")

    def column(name: str, kind: Any = np.float64) -> Array:
        return table[name].to_numpy().astype(kind)

    prompt, output = column("prompt_tokens"), column("output_tokens")
    asked, expected = column("asked_tokens"), column("expected_tokens")
    return LoggedRequests(
        decided_at_s=column("decided_at_s"),
        waited_s=column("waited_s"),
        candidate=column("candidate", np.int64),
        class_index=column("class_index", np.int64),
        task_index=column("task_index", np.int64),
        prompt_tokens=np.maximum(np.where(np.isnan(prompt), asked, prompt), 1.0).astype(np.int64),
        output_tokens=np.maximum(np.where(np.isnan(output), np.rint(expected), output), 1.0).astype(np.int64),
        completed=column("completed", np.bool_),
        abandoned=column("abandoned", np.bool_),
        ttft_s=column("ttft_s"),
        e2e_s=column("e2e_s"),
        cost_usd=column("cost_usd"),
        good=column("good"),
        difficulty_signal=column("difficulty_signal"),
        skipped=reader.log.lines - table.height,
    )


@dataclass
class _Reader:
    """Checks pieces and cuts them down to the requests."""

    log: LineLog
    candidates: tuple[str, ...]
    class_names: tuple[str, ...]
    task_names: tuple[str, ...]

    def use(self, table: pl.DataFrame) -> pl.DataFrame:
        """The rows of a piece about requests; raises ValueError if anything is not as it should be."""
        served = pl.when(pl.col("served_by").fill_null("") != "").then("served_by")
        sent = served.when(pl.col("mode") != "shadow").then("choice").otherwise(pl.lit(""))
        rows = (
            table.filter(pl.col("status").is_in(ENDED))
            .with_columns(pl.col("request").struct.rename_fields(list(_NAMED)))
            .unnest("request")
            .with_columns(sent.alias("sent"), *((pl.col("status") == ended).alias(ended) for ended in ENDED))
            .filter(~pl.col("sent").is_in(["cache", "defer", "shed"]))
        )
        known = pl.DataFrame({"sent": self.candidates, "candidate": np.arange(len(self.candidates))})
        rows = rows.join(known, on="sent", how="left", maintain_order="left")
        strange = rows.filter(pl.col("candidate").is_null() & ((pl.col("sent") != "") | pl.col("completed")))
        whole = rows.select("asked_tokens", "expected_tokens", *_REQUEST[2:]).to_numpy()
        answered = rows.filter("completed").select("e2e_s", "prompt_tokens", "output_tokens").to_numpy()
        in_range = (
            np.isin(rows["class_index"].to_numpy(), np.arange(len(self.class_names))).all()
            and np.isin(rows["task_index"].to_numpy(), np.arange(len(self.task_names))).all()
        )
        finite = np.isfinite(whole.astype(np.float64)).all() and np.isfinite(answered.astype(np.float64)).all()
        if strange.height or not in_range or not finite:
            raise ValueError
        wanted = (
            *("decided_at_s", "waited_s", "candidate", "class_index", "task_index", "completed", "abandoned"),
            *("asked_tokens", "expected_tokens", "difficulty_signal", *OUTCOME_NUMBERS),
            pl.col("good").cast(pl.Float64),
        )
        return rows.with_columns(pl.col("candidate").fill_null(-1)).select(wanted)

    def explain(self, number: int, record: dict[str, Any]) -> None:
        """Raises InputError if this record is what is wrong."""
        refuse = self.log.refusal
        if record["status"] not in ENDED:
            return
        completed = record["status"] == "completed"
        sent = record.get("served_by") or ("" if record["mode"] == "shadow" else record["choice"])
        if sent in ("cache", "defer", "shed"):
            return
        if sent not in self.candidates and (sent or completed):
            legal = ", ".join(self.candidates)
            raise refuse(number, f"was served by {sent!r}, which the scenario does not have; legal is {legal}")
        for name in _REQUEST:
            if record["request"].get(name) is None:
                raise refuse(number, f"has request.{name} = None; legal is a number")
        for name, names in (("class_index", self.class_names), ("task_index", self.task_names)):
            if record["request"][name] not in range(len(names)):
                words = f"has request.{name} = {record['request'][name]!r}; legal is 0 to {len(names) - 1}"
                raise refuse(number, f"{words}, the scenario's {', '.join(names)}")
        for name in ("e2e_s", "prompt_tokens", "output_tokens") if completed else ():
            if record.get(name) is None:
                raise refuse(number, f"has {name} = None; legal is a number of 0 or more")
