"""Arguments that several command lines share."""

from __future__ import annotations

import argparse

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
