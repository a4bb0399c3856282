"""How long work tells how far it is."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[int, int], None]
"""Called with (done, total); total may not change."""


def silent(done: int, total: int) -> None:
    """Reports nothing."""
