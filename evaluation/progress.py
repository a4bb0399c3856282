"""Progress of long work on stderr: a bar with the time left on a terminal, a line now and then elsewhere.

-q shows nothing; -v ends every stage with the time, the CPU time and the memory that it took.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from envs.progress import Progress, silent
from marginroute.cli import QUIET, timed, verbosity

SPARSE_LINE_EVERY_S = 10.0
_forced: list[bool] = []


def force_bars() -> None:
    """Shows bars even where stderr is no terminal (train.py -P)."""
    _forced.append(True)


@contextmanager
def progress_bar(title: str) -> Iterator[Progress]:
    """Yields a callback that shows how far the work titled `title` is."""
    with timed(title):
        yield from _shown(title)


def _shown(title: str) -> Iterator[Progress]:
    if verbosity() == QUIET:
        yield silent
    elif _forced or sys.stderr.isatty():
        with _rich_bar(title) as report:
            yield report
    else:
        yield _SparseLines(title)


class _SparseLines:
    """One line at most every ten seconds, and one at the end."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.started_s = self.last_line_s = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        now_s = time.monotonic()
        if done < total and now_s - self.last_line_s < SPARSE_LINE_EVERY_S:
            return
        self.last_line_s = now_s
        elapsed_s = now_s - self.started_s
        left = f", about {elapsed_s * (total - done) / done:.0f} s left" if 0 < done < total else ""
        print(f"{self.title}: {done}/{total} in {elapsed_s:.0f} s{left}", file=sys.stderr, flush=True)


@contextmanager
def _rich_bar(title: str) -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with RichProgress(*columns, console=Console(stderr=True, force_terminal=bool(_forced) or None)) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
