"""Runs the benchmarks one after the other and writes what they print as tables, with machine, commit and command.

Try:
  python -m benchmarks                               every figure, on idle cores, into docs/figures.md: hours
  python -m benchmarks --quick --out /tmp/figures.md  a smoke test: minutes, rough
  python -m benchmarks --only simulator,decision     the others stay as they are
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT
from marginroute.cli import Parser, main_guard, note
from marginroute.errors import InputError, suggestion

PARTS = ("__main__", "dynamo_worker", "gateway_envoy", "gateway_http")  # can be called, but belong to another
NAMES = tuple(
    path.stem
    for path in sorted(Path(__file__).parent.glob("*.py"))
    if path.stem not in PARTS and "\nif __name__ ==" in path.read_text()
)
HEAD = """# Figures

Written by `python -m benchmarks`; do not edit. What the names mean, and what was compared how, is in
[benchmarks](benchmarks.md). CPU-seconds are those of the process; ratios within one run are the steadier part.
"""
SECTION = re.compile(r"<!-- benchmark: (\w+) -->\n(.*?)<!-- end -->\n", re.S)


def parser() -> Parser:
    """The command line."""
    parse = Parser.from_doc("python -m benchmarks", __doc__)
    parse.add_argument("--quick", action="store_true", help="short runs, for a smoke test; figures are rough")
    parse.add_argument("--only", metavar="NAME,...", help=f"some of {', '.join(NAMES)}")
    parse.add_argument(
        "--out", type=Path, default=ROOT / "docs" / "figures.md", metavar="FILE", help="(docs/figures.md)"
    )
    parse.add_argument(
        "--set",
        nargs="+",
        default=[],
        action="extend",
        metavar="NAME:ARGUMENTS",
        help="arguments of one benchmark, such as 'vidur_parity:--truth DIR --tables DIR'",
    )
    parse.add_verbosity()
    return parse


@main_guard
def main(argv: list[str] | None = None) -> int:
    """Runs, writes after each, and says which could not be run; 1 if any of them failed."""
    args = parser().parse_args(argv)
    names = args.only.split(",") if args.only else list(NAMES)
    more = _more(args)
    for name in (*names, *more):
        if name not in NAMES:
            raise InputError(f"benchmark {name!r} is not legal{suggestion(name, NAMES)}")
    sections = dict(SECTION.findall(args.out.read_text())) if args.out.is_file() else {}
    failed = 0
    for number, name in enumerate(names, 1):
        note(f"{number} of {len(names)}: {name}")
        words = ["python", "-m", f"benchmarks.{name}", *(["--quick"] if args.quick else []), *more.get(name, [])]
        done = subprocess.run([sys.executable, *words[1:]], cwd=ROOT, stdout=subprocess.PIPE, stderr=None, text=True)
        if done.returncode == 0:
            sections[name] = section(shlex.join(words), json.loads(done.stdout), args.quick)
        else:
            sections.setdefault(name, f"## {name}\n\n`{shlex.join(words)}` has not been run here.\n\n")
            failed += done.returncode != 2  # 2: what it compares with is not installed
            note(f"{name} left out (exit code {done.returncode})")
        write(args.out, sections)
    print(f"{args.out}: {', '.join(name for name in NAMES if name in sections)}")
    return 1 if failed else 0


def _more(args: argparse.Namespace) -> dict[str, list[str]]:
    """Arguments by benchmark."""
    for item in args.set:
        if ":" not in item:
            raise InputError(f"--set {item!r} is not legal; legal is NAME:ARGUMENTS")
    return {name: shlex.split(words) for name, _, words in (item.partition(":") for item in args.set)}


def write(path: Path, sections: dict[str, str]) -> None:
    """The page, in the order of `NAMES`."""
    parts = [f"\n<!-- benchmark: {name} -->\n{sections[name]}<!-- end -->\n" for name in NAMES if name in sections]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(HEAD + "".join(parts))


def section(command: str, document: dict[str, Any], quick: bool) -> str:
    """One benchmark's figures as a table."""
    machine = document["machine"]
    where = f"{machine['cpu']}, {machine['cores']} cores, Python {machine['python']}, commit {document['commit']}"
    lines = [f"## {document['benchmark']}", "", f"`{command}`{' (a quick run: rough)' if quick else ''}; {where}.", ""]
    figures = document["figures"]
    tables = {name: rows for name, rows in figures.items() if isinstance(rows, list) and rows and _alike(rows)}
    if rest := {name: value for name, value in figures.items() if name not in tables}:
        lines += ["| figure | value |", "| --- | --- |", *(f"| {name} | {shown(x)} |" for name, x in flat(rest)), ""]
    for rows in tables.values():
        lines += [f"| {' | '.join(rows[0])} |", f"| {' | '.join('---' for _ in rows[0])} |"]
        lines += [*(f"| {' | '.join(map(shown, row.values()))} |" for row in rows), ""]
    return "\n".join([*lines, ""])


def _alike(rows: list[Any]) -> bool:
    """Whether these are the rows of one table."""
    return all(isinstance(row, dict) and list(row) == list(rows[0]) and len(flat(row)) == len(row) for row in rows)


def flat(figures: Any, name: str = "") -> list[tuple[str, Any]]:
    """Every figure with the path to it."""
    if isinstance(figures, dict):
        return [row for key, value in figures.items() for row in flat(value, f"{name} {key}".strip())]
    if isinstance(figures, list) and any(isinstance(x, dict | list) for x in figures):
        return [row for i, value in enumerate(figures) for row in flat(value, f"{name} {i}")]
    return [(name, figures)]


def shown(value: Any) -> str:
    """Four significant digits; thousands are separated."""
    if isinstance(value, list):
        return ", ".join(map(shown, value))
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value).replace("|", "\\|")
    return f"{value:,.0f}" if abs(value) >= 1e4 or isinstance(value, int) else f"{value:.4g}"


if __name__ == "__main__":
    sys.exit(main())
