# PYTHON_ARGCOMPLETE_OK
"""`python -m agents COMMAND`: what is fitted beside the policy. The command's module is imported only when it runs."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

from marginroute.cli import Parser, main_guard


def _quality(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("table", type=Path, metavar="TABLE", help="outcomes: CSV (also .gz), JSON lines or Parquet")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.npz", help="predictor to write")
    parser.add_argument("--prompt", metavar="COLUMN", help="text of the prompt (default: prompt, question, text, ...)")
    parser.add_argument(
        "--model", metavar="COLUMN", help="long table: name of the model (default: model, if it exists)"
    )
    parser.add_argument(
        "--outcome", metavar="COLUMN", help="long table: outcome (default: correct, good, score, success)"
    )
    parser.add_argument(
        "--models", metavar="A,B", help="models to fit (wide table: columns; default: every column of outcomes)"
    )
    parser.add_argument(
        "--tier", action="append", default=[], metavar="TIER=MODEL", help="name of a model in the scenario; repeatable"
    )
    parser.add_argument(
        "--good-from", type=float, default=0.5, metavar="SCORE", help="score from which an answer is good (default 0.5)"
    )
    parser.add_argument(
        "--held-out", type=float, default=0.2, metavar="SHARE", help="share of prompts judged, not fitted (default 0.2)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the split and the folds (default 0)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="figures of the held-out rows as JSON")


QUALITY_EXAMPLES = """
python -m agents quality outcomes.csv --out quality.npz
python -m agents quality outcomes.parquet --out quality.npz --model model --outcome correct --tier small=llama-8b
python export.py runs/quickstart --out bundles/quickstart --quality quality.npz
"""
COMMANDS = {
    "quality": (
        "agents.quality_command",
        "fit P(good answer) from prompts to your own outcome table",
        _quality,
        QUALITY_EXAMPLES,
    )
}


def parser() -> Parser:
    """The command line."""
    parser = Parser(prog="python -m agents", description="What is fitted beside the policy.", examples=QUALITY_EXAMPLES)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (_, words, add_arguments, examples) in COMMANDS.items():
        command = commands.add_parser(
            name, help=words, description=words[0].upper() + words[1:] + ".", examples=examples
        )
        add_arguments(command)
        command.add_verbosity()
    return parser


@main_guard
def main(argv: list[str] | None = None) -> int:
    """Runs one command."""
    arguments = parser().parse_args(argv)
    return int(importlib.import_module(COMMANDS[arguments.command][0]).run(arguments))


if __name__ == "__main__":
    sys.exit(main())
