"""How long work tells how far it is."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

Progress = Callable[[int, int], None]
"""Called with (done, total); total may not change."""
Bar = Callable[[str], AbstractContextManager[Progress]]
"""Shows the progress of work with this title while it lasts."""


def silent(done: int, total: int) -> None:
    """Reports nothing."""
