"""A new bundle without a restart: the folder is watched, and a bundle that is whole takes over between two decisions.

A look costs one or two `stat` calls. Files that have changed are loaded once they look the same twice in a row, so that
a bundle is not read while it is being written. One that is refused changes nothing: the old one goes on, and the log
says why in one sentence.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from marginroute.bundle import Bundle
from marginroute.errors import InputError
from marginroute.feedback import QualityPosterior
from marginroute.gateway import Gateway

log = logging.getLogger("marginroute.gateway")

Signature = tuple[tuple[int, int, int] | None, ...]


class BundleWatch:
    """Looks at files in a thread of its own and swaps the bundle of a gateway.

    Args:
        gateway: whose bundle it is.
        load: reads bundle and feedback; raises InputError where they are unusable.
        paths: files whose change means a new bundle.
        every_s: seconds between two looks.
        on_event: told of refusals, as plain data.
    """

    def __init__(
        self,
        gateway: Gateway,
        load: Callable[[], tuple[Bundle, QualityPosterior | None]],
        paths: Sequence[Path],
        every_s: float,
        on_event: Callable[[dict[str, Any]], object] = lambda event: None,
    ) -> None:
        if not every_s > 0.0:
            raise InputError(f"reload_s {every_s}; legal is a number above 0, or null for no reload")
        self._gateway, self._load, self._paths, self._every_s = gateway, load, tuple(paths), every_s
        self._on_event = on_event
        self._loaded = self._seen = self._signature()
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="marginroute-reload", daemon=True)

    def start(self) -> BundleWatch:
        """Starts to look."""
        self._thread.start()
        return self

    def stop(self) -> None:
        """Ends the thread."""
        self._stop.set()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(self._every_s + 1.0)

    def look(self) -> bool:
        """Loads what has changed and looks the same twice; True if a bundle was swapped."""
        with self._lock:
            signature = self._signature()
            steady, self._seen = signature == self._seen, signature
            if signature == self._loaded or not steady:
                return False
            self._loaded = signature
            try:
                bundle, posterior = self._load()
                self._gateway.swap(bundle, posterior)
            except InputError as error:
                self._refuse(str(error))
                return False
            except Exception as error:  # a bundle must never take the gateway down
                self._refuse(repr(error))
                return False
            return True

    def _refuse(self, reason: str) -> None:
        kept = self._gateway.bundle.digest[:12]
        log.error("marginroute: the new bundle is refused, %s goes on: %s", kept, reason)
        self._on_event({"event": "refused", "at_s": time.time(), "reason": reason, "bundle": kept})

    def _signature(self) -> Signature:
        return tuple(_stat(path) for path in self._paths)

    def _run(self) -> None:
        while not self._stop.wait(self._every_s):
            self.look()


def _stat(path: Path) -> tuple[int, int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino
