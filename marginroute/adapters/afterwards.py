"""Work of an event loop that can wait until answers are on their way.

It is done in batches: where a process does much else, the first piece of a kind takes several times as long as those
that follow at once, whose code and data are still in the processor's caches.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

LATER_S = 0.1


class Afterwards:
    """Does pieces of work together, in their order, `LATER_S` after the first; without an event loop at once.

    Args:
        failed: told what a piece has raised.
    """

    def __init__(self, failed: Callable[[Exception], object]) -> None:
        self._failed = failed
        self._left: deque[Callable[[], object]] = deque()
        self._loop: asyncio.AbstractEventLoop | None = None  # that will do what is left

    def add(self, work: Callable[[], object]) -> None:
        """One piece."""
        self._left.append(work)
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            self.stop()
            return
        if loop is not self._loop:
            self._loop = loop
            loop.call_later(LATER_S, self.stop)

    def stop(self) -> None:
        """Does what is left."""
        self._loop = None
        while self._left:
            try:
                self._left.popleft()()
            except Exception as error:
                self._failed(error)
