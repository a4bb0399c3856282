"""Tables for a terminal: groups of columns, as many side by side as the width allows; no cell is ever cut."""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from rich.console import Console

PIPE_COLUMNS = 100
GAP = 2  # between groups
WIDE_GAP = 3  # between groups that have titles, or parts of their own


@dataclass(frozen=True)
class Group:
    """Columns that stay together: `lines[0]` heads them, then one line per row, all equally wide."""

    title: str
    lines: tuple[str, ...]

    @property
    def width(self) -> int:
        """Characters of the widest line."""
        return max(len(self.title), len(self.lines[0]))


def make_group(title: str, heads: Sequence[str], rows: Iterable[Sequence[str]]) -> Group:
    """Aligns cells to the right in columns two spaces apart; an interval follows its estimate after one.

    Args:
        title: heading above the columns; empty for none.
        heads: one per column.
        rows: a cell per column each.
    """
    columns = list(zip(heads, *rows, strict=True))
    widths = [max(map(len, column)) + (1 if column[0].startswith("[") else 2) for column in columns]
    widths[0] -= 2
    lines = zip(*columns, strict=True)
    return Group(title, tuple("".join(map(str.rjust, line, widths)) for line in lines))


def stdout_console() -> Console:
    """A console on stdout: the terminal's width, or COLUMNS, or 100 columns in a pipe."""
    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else PIPE_COLUMNS
    return Console(width=width, highlight=False)


def pack(groups: Sequence[Group], name_width: int, width: int, gap: int = WIDE_GAP) -> list[list[Group]]:
    """Splits the groups, in order, into tables that fit the width beside a column of names."""
    tables: list[list[Group]] = []
    room = 0
    for group in groups:
        needed = group.width + gap
        if not tables or needed > room:
            tables.append([])
            room = width - name_width
        tables[-1].append(group)
        room -= needed
    return tables


def print_groups(
    console: Console, names: Sequence[str], groups: Sequence[Group], gap: int = WIDE_GAP, bold: Collection[str] = ()
) -> None:
    """Prints groups beside the names of their rows, in one table or several, an empty line between.

    Args:
        console: where.
        names: names[0] heads them; then one per row, as in `Group.lines`.
        groups: at least one.
        gap: blanks between groups.
        bold: names of rows that stand out.
    """
    name_width = max(map(len, names))
    for number, of_table in enumerate(pack(groups, name_width, console.width, gap)):
        widths = [group.width for group in of_table]
        rows = [[group.lines[i] for group in of_table] for i in range(len(names))]
        lines = [
            (" " * gap).join([name.ljust(name_width), *map(str.rjust, row, widths)]).rstrip()
            for name, row in zip(names, rows, strict=True)
        ]
        titles = (" " * gap).join(["".ljust(name_width), *(group.title.rjust(group.width) for group in of_table)])
        if number:
            console.print()
        if titles.strip():
            _print_line(console, titles.rstrip(), "bold")
        _print_line(console, lines[0], "bold")
        _print_line(console, "─" * (name_width + sum(widths) + gap * len(widths)))
        for name, line in zip(names[1:], lines[1:], strict=True):
            _print_line(console, line, "bold" if name in bold else None)


def print_columns(
    console: Console, heads: Sequence[str], rows: Sequence[Sequence[str]], together: Sequence[int]
) -> None:
    """Prints rows of cells.

    Args:
        console: where.
        heads: one per column.
        rows: a cell per column each.
        together: how many columns name the rows, and stand at the left of every table; then the sizes of the groups.
    """
    columns = list(zip(heads, *rows, strict=True))
    ends = list(itertools.accumulate(together))
    widths = [max(map(len, column)) for column in columns[: ends[0]]]
    names = [(" " * GAP).join(map(str.ljust, line, widths)) for line in zip(*columns[: ends[0]], strict=True)]
    groups = [
        make_group("", heads[first:end], [row[first:end] for row in rows]) for first, end in itertools.pairwise(ends)
    ]
    print_groups(console, names, groups, GAP)


def _print_line(console: Console, line: str, style: str | None = None) -> None:
    console.print(line, style=style, markup=False, soft_wrap=True)
