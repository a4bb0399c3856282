"""The gateway's command line, also as `python -m marginroute`: inspect a bundle, learn from feedback."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from marginroute import __version__
from marginroute.cli import main_guard


def _inspect(arguments: argparse.Namespace) -> int:
    from marginroute.card import model_card

    sys.stdout.write(model_card(arguments.bundle))
    return 0


def _feedback(arguments: argparse.Namespace) -> int:
    from marginroute import feedback_log

    return feedback_log.run(arguments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="marginroute", description="Run exported routing policies beside a gateway.")
    parser.add_argument("--version", action="version", version=f"marginroute {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], int], summary: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=summary, description=summary)
        sub.set_defaults(run=run)
        return sub

    inspect = command("inspect", _inspect, "Verify a bundle and print its model card.")
    inspect.add_argument("bundle", metavar="BUNDLE", help="folder written by export.py")
    learn = command("feedback", _feedback, "Correct P(good answer) by the feedback in a decision log.")
    learn.add_argument("log", type=Path, metavar="LOG", help="decision records, JSON lines")
    learn.add_argument("bundle", metavar="BUNDLE", help="folder that the log was written with")
    learn.add_argument("--feedback", type=Path, metavar="FILE", help='JSON lines: {"id": ..., "thumb": "down", ...}')
    learn.add_argument("--start", metavar="FILE", help="--out of an earlier run that the gateway ran with")
    learn.add_argument("--half-life", type=float, default=float("inf"), metavar="N", help="answers (default: no decay)")
    learn.add_argument("--out", type=Path, metavar="FILE", help="what the gateway loads (setting `feedback`)")
    return parser


@main_guard
def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns its exit code."""
    arguments = _parser().parse_args(argv)
    return int(arguments.run(arguments))


if __name__ == "__main__":
    raise SystemExit(main(None))
