"""Reads logs of DecisionRecords for off-policy evaluation: views as arrays, and what every decision earned.

Only decisions that were carried out, with their probability and an outcome, count: what the gateway chose itself, in
shadow mode or in the control group of a canary, has no probability that anybody knows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from envs.progress import Progress, silent
from evaluation.log_lines import OUTCOME_NUMBERS, LineLog
from marginroute import earnings
from marginroute import view as v
from marginroute.bundle import Bundle
from marginroute.errors import InputError
from marginroute.features import FEATURE_VERSION
from marginroute.record import unpacked
from marginroute.view import REQUEST_NAMES, Array, View

SETTLED = ("completed", "abandoned", "failed", "shed")
_COLUMNS: dict[str, Any] = {
    "id": pl.String,
    "schema": pl.Int64,
    "feature_version": pl.Int64,
    "decided_at_s": pl.Float64,
    "mode": pl.String,
    "status": pl.String,
    "choice": pl.String,
    "probability": pl.Float64,
    "legal": pl.List(pl.String),
    "support": pl.List(pl.String),
    "signals": pl.String,
    "request": pl.Struct({name: pl.Float64 for name in REQUEST_NAMES}),
    "good": pl.Boolean,
    **dict.fromkeys(OUTCOME_NUMBERS, pl.Float64),
}
_NEEDED = ("id", "schema", "mode", "choice", "probability", "request", "legal", "signals", "status")


class ShadowError(InputError):
    """Nothing in a log was decided by us."""


@dataclass(frozen=True, eq=False)
class Decisions:
    """Settled decisions of a log, n of them.

    Attributes:
        view: what was known.
        choice: (n,) candidate that was chosen.
        probability: (n,) with which it was.
        support: (n, C) bool, candidates that might have been chosen.
        completed: (n,) bool, whether there was an answer.
        numbers: (5, n) ttft_s, e2e_s, prompt_tokens, output_tokens, cost_usd; NaN where unknown.
        good: (n,) 1 good, 0 bad, NaN unknown.
        skipped: lines without an outcome or of shadow mode before these.
    """

    view: View
    choice: Array
    probability: Array
    support: Array
    completed: Array
    numbers: Array
    good: Array
    skipped: int

    def reward_usd(self, p_good: Array) -> Array:
        """(n,) own margin of each decision by its contract; P(good) (n,) stands in where nobody said if it was good."""
        request = self.view.request
        ttft_s, e2e_s, prompt_tokens, output_tokens, cost_usd = self.numbers
        p_good = np.where(np.isnan(self.good), p_good, self.good)
        answered_usd = earnings.answered_usd(request, ttft_s, e2e_s, prompt_tokens, output_tokens, p_good)
        unserved_usd = earnings.unserved_usd(request)
        earned_usd: Array = np.where(self.completed, answered_usd, unserved_usd) - np.nan_to_num(cost_usd)
        return earned_usd


def read_decisions(path: Path, bundle: Bundle, progress: Progress = silent) -> Iterator[Decisions]:
    """The settled decisions of a log, in pieces.

    Args:
        path: JSONL file of DecisionRecords.
        bundle: whose layout and constants the records go by.
        progress: called with bytes read and bytes in all.

    Raises:
        InputError: a line that cannot be used: its number, what it holds, what is legal.
        ShadowError: every line is of shadow mode.
    """
    reader = _Reader(path, bundle)
    for decisions in reader.log.pieces(reader.arrays, reader.explain, progress):
        if len(decisions.choice):
            yield decisions
    if reader.log.lines and reader.shadow == reader.log.lines:
        raise ShadowError(
            f"{path}: all was decided in shadow mode, where the gateway's own choice has no probability; legal is a "
            "log of decisions that were carried out (mode canary or live, explore_share above 0)"
        )


class _Reader:
    """Turns pieces of a log into arrays."""

    def __init__(self, path: Path, bundle: Bundle) -> None:
        self.log = LineLog(path, _COLUMNS, _NEEDED)
        self.bundle, self.layout = bundle, bundle.layout
        self.names = pl.DataFrame({"name": self.layout.names}).with_row_index("candidate")
        self.skipped = self.shadow = 0

    def arrays(self, table: pl.DataFrame) -> Decisions:
        """Settled rows of a table as arrays; raises ValueError if anything is not as it should be."""
        shadow = pl.col("mode") == "shadow"
        settled = table.filter(pl.col("status").is_in(SETTLED) & ~shadow)
        self.shadow += table.filter(shadow).height
        self.skipped += table.height - settled.height
        n, width = settled.height, self.layout.n_candidates
        probability = settled["probability"].to_numpy()
        usable = (table["feature_version"] == FEATURE_VERSION).all()
        if not usable or not ((probability > 0.0) & (probability <= 1.0)).all():
            raise ValueError
        numbers = np.stack([settled[name].to_numpy().astype(np.float64) for name in OUTCOME_NUMBERS])
        completed = (settled["status"] == "completed").to_numpy()
        if np.isnan(numbers[:4, completed]).any():
            raise ValueError
        flat = b"".join(settled["signals"].str.decode("base64").to_list())
        changing = np.frombuffer(flat, dtype="<f4").reshape(n, len(v.SIGNALS) - v.N_STATIC_SIGNALS, width)
        if not np.isfinite(changing).all():
            raise ValueError
        signals = np.empty((len(v.SIGNALS), n, width))
        signals[: v.N_STATIC_SIGNALS] = self.bundle.static_signals[:, None, :]
        signals[v.N_STATIC_SIGNALS :] = changing.transpose(1, 0, 2)
        request = settled["request"].struct.unnest().select(REQUEST_NAMES).to_numpy().T
        for row, names in ((v.CLASS_INDEX, self.layout.class_names), (v.TASK_INDEX, self.layout.task_names)):
            if not np.isin(request[row], np.arange(len(names))).all():
                raise ValueError
        support = settled.select(
            pl.when(pl.col("support").list.len().fill_null(0) > 0).then("support").otherwise(pl.concat_list("choice"))
        ).to_series()
        return Decisions(
            view=View(
                self.layout, signals, np.nan_to_num(request, nan=np.inf, posinf=np.inf), self._members(settled["legal"])
            ),
            choice=self._members(settled.select(pl.concat_list("choice")).to_series()).argmax(axis=1),
            probability=probability,
            support=self._members(support),
            completed=completed,
            numbers=numbers,
            good=settled["good"].cast(pl.Float64).to_numpy().astype(np.float64),
            skipped=self.skipped,
        )

    def _members(self, names: pl.Series) -> Array:
        """Lists of candidate names (n,) as (n, C) bool."""
        table = (
            pl.DataFrame({"name": names}).with_row_index("row").explode("name").join(self.names, on="name", how="left")
        )
        if table["candidate"].null_count():
            raise ValueError
        members = np.zeros((len(names), self.layout.n_candidates), dtype=np.bool_)
        members[table["row"].to_numpy(), table["candidate"].to_numpy()] = True
        return members

    def explain(self, number: int, record: dict[str, Any]) -> None:
        """Raises InputError if this record is what is wrong."""
        refuse = self.log.refusal
        version = record.get("feature_version")
        if version != FEATURE_VERSION:
            raise refuse(number, f"has feature_version {version!r}; legal is {FEATURE_VERSION}, that of this version")
        if record["mode"] == "shadow":
            return
        known = ", ".join(self.layout.names)
        for name in (record["choice"], *record["legal"], *(record.get("support") or ())):
            if name not in self.layout.names:
                raise refuse(number, f"names candidate {name!r}, which the policy does not know; legal is {known}")
        probability = record["probability"]
        if not 0.0 < probability <= 1.0:
            raise refuse(number, f"has probability {probability!r}; legal is above 0, at most 1")
        for name in OUTCOME_NUMBERS[:4] if record["status"] == "completed" else ():
            if record.get(name) is None:
                raise refuse(number, f"has {name} = None; legal is a number of 0 or more")
        self._explain_view(number, record)

    def _explain_view(self, number: int, record: dict[str, Any]) -> None:
        for name, names in (("class_index", self.layout.class_names), ("task_index", self.layout.task_names)):
            if record["request"].get(name) not in range(len(names)):
                found = record["request"].get(name)
                words = f"has request.{name} = {found!r}; legal is 0 to {len(names) - 1} ({', '.join(names)})"
                raise self.log.refusal(number, words)
        width = self.layout.n_candidates
        try:
            finite = bool(np.isfinite(unpacked(record["signals"], width)).all())
        except (ValueError, TypeError):
            finite = False
        if not finite:
            words = f"has no signals of {width} candidates; legal are those of the policy's fleet, all numbers"
            raise self.log.refusal(number, words)
