"""Where records go: one JSON object per line, appended, whole lines only.

`RecordLog` is the plain file. `AuditLog` is the gateway's: it rotates by size, says how hard it tries to reach the
disk, and never stops a request: what cannot be written is counted and left out.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from marginroute.errors import InputError
from marginroute.record import DecisionRecord

log = logging.getLogger("marginroute.log")

LOOK_S = 1.0  # how often a log looks whether someone else has moved its file
RETRY_S = 1.0  # how soon after a failed write the next one is tried


class RecordLog:
    """Appends records to a JSONL file; safe to share between threads.

    Lines are handed to the operating system at once; they reach the disk when it decides (no fsync).

    Args:
        path: the file; its folder is made.

    Raises:
        InputError: the file cannot be opened for appending.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._lock = threading.Lock()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._fd = self._opened()
        except OSError as error:
            raise InputError(f"decision log {path} cannot be opened for appending: {error.strerror}") from None

    def write(self, record: DecisionRecord | dict[str, Any]) -> bool:
        """Appends one line; True if it was written.

        Raises:
            OSError: the disk is full or fails; nothing of the line is left behind.
        """
        line = record.to_json() if isinstance(record, DecisionRecord) else json.dumps(record)
        with self._lock:
            self._append(line.encode() + b"\n")
        return True

    def close(self) -> None:
        """Closes the file; a second time does nothing."""
        with self._lock:
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1

    def _opened(self) -> int:
        return os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    def _append(self, data: bytes) -> None:
        written = 0
        try:
            while written < len(data):  # a short write is followed by an error, or by the rest
                written += os.write(self._fd, data[written:])
        except OSError:
            if written:
                self._take_back(written)
            raise

    def _take_back(self, written: int) -> None:
        """Removes the beginning of a line whose rest has no room, unless another process has written since."""
        end = os.lseek(self._fd, 0, os.SEEK_CUR)
        if os.fstat(self._fd).st_size == end:
            os.ftruncate(self._fd, end - written)


class AuditLog(RecordLog):
    """The gateway's log: rotated, and never in a request's way.

    The file is renamed to `NAME.1` when it would grow beyond `max_bytes`, older ones to `.2` and so on, and of those
    `keep` stay. Several processes may share one log: whoever is first rotates, the others follow within a second, as
    they do when logrotate or an operator moves the file.

    Args:
        path: the file; its folder is made.
        max_bytes: size at which it is rotated; 0: never.
        keep: rotated files that stay.
        fsync_s: seconds after which what was written is forced to the disk, at the next write; 0: with every record;
            None: the operating system decides.
        clock: seconds that never jump.

    Attributes:
        dropped: records that could not be written.

    Raises:
        InputError: the file cannot be opened for appending.
    """

    def __init__(
        self,
        path: str | Path,
        max_bytes: int = 256 << 20,
        keep: int = 10,
        fsync_s: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if max_bytes < 0 or keep < 1:
            raise InputError(f"log_max_bytes {max_bytes}, log_keep {keep}; legal is 0 or more, and 1 or more")
        super().__init__(path)
        self.dropped = 0
        self._max_bytes, self._keep, self._fsync_s, self._clock = max_bytes, keep, fsync_s, clock
        self._size = os.fstat(self._fd).st_size
        self._looked_s = self._synced_s = clock()
        self._retry_s = -1.0

    def write(self, record: DecisionRecord | dict[str, Any]) -> bool:
        """Appends one line; False if that was not possible."""
        line = record.to_json() if isinstance(record, DecisionRecord) else json.dumps(record)
        data = line.encode() + b"\n"
        with self._lock:
            now_s = self._clock()
            if self._fd < 0 or now_s < self._retry_s:
                self.dropped += 1
                return False
            try:
                self._turn_page(len(data), now_s)
                self._append(data)
                self._sync(now_s)
            except OSError as error:
                self._failed(error, now_s)
                return False
            if self._retry_s >= 0.0:
                log.warning("marginroute: %s is written again; %d records were dropped", self.path, self.dropped)
            self._size, self._retry_s = self._size + len(data), -1.0
            return True

    def close(self) -> None:
        """Forces what was written to the disk, if a policy was set, and closes the file."""
        if self._fsync_s is not None and self._fd >= 0:
            with contextlib.suppress(OSError):
                os.fsync(self._fd)
        super().close()

    def _failed(self, error: OSError, now_s: float) -> None:
        self.dropped += 1
        if self._retry_s < 0.0:
            log.error(
                "marginroute: %s cannot be written (%s); records are dropped until it can", self.path, error.strerror
            )
        self._retry_s = now_s + RETRY_S

    def _sync(self, now_s: float) -> None:
        if self._fsync_s is not None and now_s - self._synced_s >= self._fsync_s:
            os.fsync(self._fd)
            self._synced_s = now_s

    def _turn_page(self, new_bytes: int, now_s: float) -> None:
        """Follows a file that was moved, and moves one that is full."""
        full = 0 < self._max_bytes < self._size + new_bytes and self._size > 0
        if not full and now_s - self._looked_s < LOOK_S:
            return
        self._looked_s = now_s
        if self._is_ours():
            self._size = os.fstat(self._fd).st_size  # others write too
            if not 0 < self._max_bytes < self._size + new_bytes or self._size == 0:
                return
            self._rotate()
        new = self._opened()
        os.close(self._fd)
        self._fd, self._size = new, os.fstat(new).st_size

    def _is_ours(self) -> bool:
        """Whether the path still leads to the file that is open."""
        mine = os.fstat(self._fd)
        try:
            there = os.stat(self.path)
        except FileNotFoundError:
            return False
        return (mine.st_ino, mine.st_dev) == (there.st_ino, there.st_dev)

    def _rotate(self) -> None:
        """Moves the file away, unless another process just did."""
        fcntl.flock(self._fd, fcntl.LOCK_EX)
        try:
            if not self._is_ours():
                return
            for number in range(self._keep - 1, 0, -1):
                with contextlib.suppress(FileNotFoundError):
                    os.replace(f"{self.path}.{number}", f"{self.path}.{number + 1}")
            os.replace(self.path, f"{self.path}.1")
        finally:
            fcntl.flock(self._fd, fcntl.LOCK_UN)
