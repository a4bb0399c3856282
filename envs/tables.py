"""CSV files: numeric columns, with errors that name file, line and column."""

from __future__ import annotations

import contextlib
import csv
import gzip
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt

from marginroute.errors import InputError

FloatArray = npt.NDArray[np.float64]


@contextlib.contextmanager
def opened(path: Path, kind: str = "a CSV file") -> Iterator[IO[str]]:
    """A text file to read, gzipped where the name ends in .gz; what goes wrong becomes one sentence.

    Raises:
        InputError: The file cannot be read or is no text.
    """
    try:
        open_text = gzip.open if path.suffix == ".gz" else open
        with open_text(path, "rt", encoding="utf-8-sig", newline="") as file:
            yield file
    except (OSError, EOFError) as error:
        reason = getattr(error, "strerror", None) or "not a gzip file"
        raise InputError(f"{path}: cannot be read ({reason}); legal is {kind}") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: is not UTF-8 text; legal is {kind}") from None
    except csv.Error as error:
        raise InputError(f"{path}: {error}; legal is {kind}") from None


def _number(text: str, path: Path, line: int, column: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise InputError(f"{path}, line {line}: {column} = {text!r}; legal is a finite number")
    return value


def read_columns(path: Path, columns: Sequence[str] | None = None, text: Sequence[str] = ()) -> dict[str, FloatArray]:
    """Numeric columns of a CSV file with a header, gzipped where the name ends in .gz.

    Args:
        path: The file.
        columns: Columns to read, all required; None: all but `text`.
        text: Columns to leave out.

    Returns:
        Name to values, (rows,).

    Raises:
        InputError: The file cannot be read, a column is missing, or a cell is no finite number.
    """
    with opened(path) as file:
        reader = csv.reader(file)
        header = [name.strip() for name in next(reader, [])]
        wanted = [name for name in header if name not in text] if columns is None else list(columns)
        missing = [name for name in wanted if name not in header]
        if missing or not wanted:
            raise InputError(
                f"{path}: columns are {', '.join(header) or 'none'}; legal is {', '.join(wanted) or 'some'}"
            )
        at = [header.index(name) for name in wanted]
        rows = []
        for cells in reader:
            if not cells:
                continue
            if len(cells) != len(header):
                legal = f"legal is {len(header)}, as in the header"
                raise InputError(f"{path}, line {reader.line_num}: {len(cells)} cells; {legal}")
            pairs = zip(at, wanted, strict=True)
            rows.append([_number(cells[index], path, reader.line_num, name) for index, name in pairs])
    if not rows:
        raise InputError(f"{path}: no rows; legal is one or more")
    return dict(zip(wanted, np.array(rows).T.copy(), strict=True))


def read_text_column(path: Path, column: str) -> list[str] | None:
    """Cells of one column of a CSV file that `read_columns` has read, or None where the file does not have it."""
    with opened(path) as file:
        reader = csv.reader(file)
        header = [name.strip() for name in next(reader, [])]
        if column not in header:
            return None
        at = header.index(column)
        return [cells[at] for cells in reader if cells]
