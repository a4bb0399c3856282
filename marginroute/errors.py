"""The errors that a user of the command lines is meant to read, and the hint for a word that is nearly legal."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Bad input: one sentence that names the value, its place and what is legal (exit code 2)."""


class WorkError(RuntimeError):
    """Good input, but the machine does not carry the work: one sentence, what failed and what to try (exit code 1)."""


def suggestion(word: str, names: Iterable[str]) -> str:
    """'; did you mean ...? legal is a, b' for an unknown word."""
    names = list(names)
    return f";{nearest(word, names)} legal is {', '.join(names) if names else 'none'}"


def nearest(word: str, names: Iterable[str]) -> str:
    """' did you mean a or b?', or nothing."""
    near = difflib.get_close_matches(word, list(names), n=2, cutoff=0.6)
    return f" did you mean {' or '.join(near)}?" if near else ""
