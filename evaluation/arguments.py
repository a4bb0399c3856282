"""Arguments that several command lines share."""

from __future__ import annotations

import argparse
from pathlib import Path

from marginroute.errors import InputError


def pairs(items: list[str], flag: str) -> dict[str, str]:
    """`key=value` words as a dictionary."""
    for item in items:
        if "=" not in item or item.startswith("="):
            raise InputError(f"{flag} {item!r} is not legal; legal is KEY=VALUE")
    return {key.strip(): value for key, _, value in (item.partition("=") for item in items)}


def check_trace_flags(args: argparse.Namespace) -> None:
    """Refuses flags about a trace where there is none."""
    for flag, value in (("--trace-format", args.trace_format), ("--columns", args.columns)):
        if value is not None and args.trace is None:
            raise InputError(f"{flag} {value!r} needs --trace FILE")


def complete_scenarios(action: argparse.Action) -> None:
    """Lets a shell complete an argument by the scenarios that ship, and by files."""
    folder = Path(__file__).resolve().parent.parent / "configs" / "scenarios"

    def complete(prefix: str, **_: object) -> list[str]:
        return [name for path in sorted(folder.glob("*.yaml")) if (name := path.stem).startswith(prefix)]

    action.completer = complete  # type: ignore[attr-defined]
