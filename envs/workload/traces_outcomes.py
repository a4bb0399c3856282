"""Outcome tables: which model answered which prompt well. CSV (also gzipped), JSON lines or Parquet; wide or long.

Wide: one row per prompt and one column of outcomes per model. Long: one row per prompt and model, with a column that
names the model. An outcome is true or false, or a score from 0 to 1; a missing one says nothing.
"""

from __future__ import annotations

import reprlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from marginroute.cli import note
from marginroute.errors import InputError

Array = np.ndarray[Any, Any]

PROMPT_NAMES = ("prompt", "question", "text", "input", "instruction")
OUTCOME_NAMES = ("correct", "good", "score", "success")
RENAMED = "_duplicated_"  # what polars puts behind the name of a column that another one has, too
READERS = {".csv": pl.read_csv, ".jsonl": pl.read_ndjson, ".ndjson": pl.read_ndjson, ".parquet": pl.read_parquet}


@dataclass(frozen=True)
class Columns:
    """Which columns hold what; None: look for a usual name.

    Attributes:
        prompt: text of the prompt, or whatever identifies an item.
        category: kind of task, if the table tells.
        model: in a long table, the model's name.
        outcome: in a long table, the outcome.
        models: models to keep: names of columns in a wide table; None: every one with outcomes.
    """

    prompt: str | None = None
    category: str | None = None
    model: str | None = None
    outcome: str | None = None
    models: tuple[str, ...] | None = None


@dataclass(frozen=True, eq=False)
class OutcomeTable:
    """N prompts and T models.

    Attributes:
        prompts: (N,) texts or ids, no two alike.
        category: (N,) names; all empty where the table has none.
        models: (T,) names.
        score: (N, T) f8 in [0, 1], mean over repetitions; NaN: not tried.
    """

    prompts: list[str]
    category: list[str]
    models: tuple[str, ...]
    score: Array

    def good(self, good_from: float) -> Array:
        """(N, T) f8: 1 where the score is at least `good_from`, 0 below, NaN where not tried."""
        return np.where(np.isnan(self.score), np.nan, self.score >= good_from)


def read_outcomes(path: Path, columns: Columns | None = None) -> OutcomeTable:
    """Reads a table.

    Raises:
        InputError: unreadable, a column is missing or ambiguous, or an outcome is none.
    """
    columns = columns or Columns()
    frame = _frame(path)
    prompt = _find(path, frame, columns.prompt, PROMPT_NAMES, "prompt")
    if frame[prompt].dtype.is_nested():
        raise InputError(f"{path}: column {prompt!r} holds lists or objects; legal is text")
    category = [] if columns.category is None else [_find(path, frame, columns.category, (), "category")]
    model = _find(path, frame, columns.model, (), "model") if columns.model else "model"
    if model in frame.columns:
        outcome = _find(path, frame, columns.outcome, OUTCOME_NAMES, "outcome")
        long = frame.select(pl.col(prompt).alias("_prompt"), *category, model, outcome)
        long = long.with_columns(_numeric(path, frame, outcome).alias("_score")).drop_nulls(["_prompt", model])
        named = long.select("_prompt", *category, pl.col(model).cast(pl.String).alias("_model"), "_score")
    else:
        wanted = _wide(path, frame, columns.models, {prompt, *category})
        scores = [_numeric(path, frame, name).alias(name) for name in wanted]
        wide = frame.select(pl.col(prompt).alias("_prompt"), *category, *scores).drop_nulls("_prompt")
        named = wide.unpivot(wanted, index=["_prompt", *category], variable_name="_model", value_name="_score")
    return _table(path, named, category, columns.models)


def _frame(path: Path) -> pl.DataFrame:
    suffix = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    if suffix.lower() not in READERS:
        raise InputError(f"{path}: unknown kind of table; legal is .csv, .csv.gz, .jsonl or .parquet")
    if path.is_dir():
        raise InputError(f"{path}: is a folder; legal is a table")
    try:
        reader: Any = READERS[suffix.lower()]
        options = {"infer_schema_length": None} if reader is not pl.read_parquet else {}
        frame: pl.DataFrame = reader(path, **options)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error}); legal is a table") from None
    except pl.exceptions.PolarsError as error:
        first = str(error).strip().partition("\n")[0]
        legal = "legal is CSV with commas and a header, one JSON object per line, or Parquet"
        raise InputError(f"{path}: is no table that can be read ({first[:100]}); {legal}") from None
    for name in frame.columns:
        first, renamed, _ = name.partition(RENAMED)
        if renamed and first in frame.columns:
            raise InputError(f"{path}: two columns are called {first!r}; legal is a name for each")
    if frame.height == 0:
        raise InputError(f"{path}: has no rows; legal is one or more")
    return frame


def _find(path: Path, frame: pl.DataFrame, name: str | None, usual: tuple[str, ...], what: str) -> str:
    found = [name] if name is not None else [column for column in usual if column in frame.columns]
    if not found or found[0] not in frame.columns:
        asked = f"column {name!r} is missing" if name is not None else f"no {what} column ({', '.join(usual)})"
        raise InputError(f"{path}: {asked}; legal is one of {', '.join(frame.columns)}")
    return found[0]


def _numeric(path: Path, frame: pl.DataFrame, name: str) -> pl.Series:
    """(rows,) f8 outcomes of a column, null where missing."""
    values, lost = _outcomes(frame[name])
    if lost.any():
        row = int(lost.arg_true()[0])
        raise InputError(
            f"{path}, row {row + 1}: {name} = {frame[name][row]!r}; legal is true, false, 0 to 1, or nothing"
        )
    return values


def _outcomes(column: pl.Series) -> tuple[pl.Series, pl.Series]:
    """(rows,) f8 outcomes, null where missing, and whether a value is none."""
    if column.dtype.is_nested():
        return pl.Series([None] * len(column), dtype=pl.Float64), column.is_not_null()
    if column.dtype == pl.String:
        words = {"true": "1", "false": "0", "": None}
        column = column.str.strip_chars().str.to_lowercase().replace(words)
    values = column.cast(pl.Float64, strict=False).fill_nan(None)
    missing = column.is_null() | (column.is_nan() if column.dtype.is_float() else False)
    return values, (values.is_null() & ~missing) | ~values.fill_null(0.0).is_between(0.0, 1.0)


def _wide(path: Path, frame: pl.DataFrame, models: tuple[str, ...] | None, taken: set[str]) -> list[str]:
    """Names of the outcome columns of a wide table; says which columns hold none, and why."""
    if models is not None:
        return [_find(path, frame, name, (), "model") for name in models]
    found, left_out = [], []
    for name in frame.columns:
        if name in taken:
            continue
        values, lost = _outcomes(frame[name])
        if not lost.any() and values.is_not_null().any():
            found.append(name)
        elif lost.any():
            row = int(lost.arg_true()[0])
            left_out.append(f"{name} (row {row + 1}: {reprlib.repr(frame[name][row])})")
    words = "true/false or 0 to 1 per model, or a column that names the model (model, or --model COLUMN)"
    why = f"; no outcomes are in {', '.join(left_out)}" if left_out else ""
    if not found:
        raise InputError(f"{path}: no column of outcomes; legal is {words}{why}")
    if left_out:
        note(f"note: {path} is read as a table of the models {', '.join(found)}{why}; legal is {words}")
    return found


def _table(path: Path, named: pl.DataFrame, category: list[str], models: tuple[str, ...] | None) -> OutcomeTable:
    """One row per prompt from (_prompt, category, _model, _score) rows, in the order of first appearance."""
    named = named.with_columns(pl.col("_prompt").cast(pl.String), *[pl.col(c).cast(pl.String) for c in category])
    known = named["_model"].unique(maintain_order=True).to_list()
    missing = [name for name in models or () if name not in known]
    if missing:
        raise InputError(f"{path}: no outcomes of model {missing[0]!r}; legal is one of {', '.join(known)}")
    names = tuple(models) if models else tuple(known)
    grouped = named.group_by("_prompt", "_model", maintain_order=True).agg(pl.col("_score").mean())
    prompts = named["_prompt"].unique(maintain_order=True)
    row = {text: i for i, text in enumerate(prompts)}
    column = {name: t for t, name in enumerate(names)}
    score = np.full((len(prompts), len(names)), np.nan)
    for text, model, value in grouped.iter_rows():
        if value is not None and model in column:
            score[row[text], column[model]] = value
    for name, share in zip(names, np.isnan(score).all(axis=0), strict=True):
        if share:
            raise InputError(f"{path}: model {name!r} has no outcomes; legal is one or more")
    first = named.unique("_prompt", keep="first", maintain_order=True)
    kinds = [str(kind) for kind in first[category[0]]] if category else [""] * len(prompts)
    tried = ~np.isnan(score).all(axis=1)
    kept = np.flatnonzero(tried)
    return OutcomeTable([prompts[int(i)] for i in kept], [kinds[i] for i in kept], names, score[kept])
