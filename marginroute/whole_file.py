"""Files that are written completely or not at all: whoever reads one sees the old content or the new one."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from marginroute.errors import InputError


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside another one to write to, which takes that one's place at the end.

        with replacing(path) as partial:
            partial.write_bytes(data)

    If the block raises, or the process is interrupted in it, what was at the path stays and nothing else is left. The
    partial file has the same suffix, since some writers go by it, and is hidden.

    Raises:
        OSError: it cannot take the place.
    """
    partial = path.parent / f".{path.stem}.{secrets.token_hex(6)}{path.suffix}"
    try:
        yield partial
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def check_target(path: Path) -> None:
    """Refuses, before the work, a file that could not be written after it.

    Raises:
        InputError: the folder is missing or not writable, or the path is a folder.
    """
    if path.is_dir():
        raise InputError(f"cannot write {path}: it is a folder; give the name of a file")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise InputError(f"cannot write {path}: {path.parent} is not a folder that can be written to")


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes a file that a user has named; text becomes UTF-8.

    A link is followed. A pipe or a device (`/dev/stdout`) is written to: nothing could take its place.

    Raises:
        InputError: it cannot be written; what was there is still there.
    """
    data = content.encode() if isinstance(content, str) else content
    try:
        if path.exists() and not path.is_file():
            path.write_bytes(data)
            return
        with replacing(Path(os.path.realpath(path))) as partial:
            partial.write_bytes(data)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); legal is a file in a folder you own") from None
