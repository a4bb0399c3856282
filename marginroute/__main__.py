"""The gateway's command line: `marginroute inspect BUNDLE`, also as `python -m marginroute`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

from marginroute import __version__
from marginroute.cli import main_guard


def _inspect(arguments: argparse.Namespace) -> int:
    from marginroute.card import model_card

    sys.stdout.write(model_card(arguments.bundle))
    return 0


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
    return parser


@main_guard
def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns its exit code."""
    arguments = _parser().parse_args(argv)
    return int(arguments.run(arguments))


if __name__ == "__main__":
    raise SystemExit(main(None))
