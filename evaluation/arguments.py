"""Arguments that several command lines share."""

from __future__ import annotations

from marginroute.errors import InputError


def pairs(items: list[str], flag: str) -> dict[str, str]:
    """`key=value` words as a dictionary."""
    for item in items:
        if "=" not in item or item.startswith("="):
            raise InputError(f"{flag} {item!r} is not legal; legal is KEY=VALUE")
    return {key.strip(): value for key, _, value in (item.partition("=") for item in items)}
