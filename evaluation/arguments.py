"""Arguments that several command lines share."""

from __future__ import annotations

import argparse
from collections.abc import Collection
from pathlib import Path

from marginroute.errors import InputError, nearest, suggestion


def pairs(items: list[str], flag: str) -> dict[str, str]:
    """`key=value` words as a dictionary."""
    for item in items:
        if "=" not in item or item.startswith("="):
            raise InputError(f"{flag} {item!r} is not legal; legal is KEY=VALUE")
    return {key.strip(): value for key, _, value in (item.partition("=") for item in items)}


def names_of(text: str) -> list[str]:
    """The names in the text of --baselines; none for `all` and `none`, which stand alone.

    Raises:
        InputError: `all` or `none` among others.
    """
    names = [name.strip() for name in text.split(",")]
    whole = [name for name in names if name in ("all", "none")]
    if whole and len(names) > 1:
        raise InputError(f"--baselines {text!r} names others beside {whole[0]}; legal is {whole[0]} alone, or names")
    return [] if whole else names


def check_names(flag: str, names: Collection[str], legal: Collection[str], problem: str = "is not known") -> None:
    """Refuses a name that is not legal, with the nearest that are."""
    for name in names:
        if name not in legal:
            raise InputError(f"{flag} {name!r} {problem}{suggestion(name, legal)}")


def untuned_error(error: InputError, names: Collection[str], legal: Collection[str]) -> InputError:
    """What --baselines may name where nothing was tuned, after why that is so."""
    hints = (nearest(name, legal) for name in names if name not in legal)
    return InputError(f"{error};{next(filter(None, hints), '')} untuned, --baselines may name {', '.join(legal)}")


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
