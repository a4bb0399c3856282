"""Files of traces: opened by their content, read in pieces of whole lines, with errors that name the file.

What a file is packed with is told by its first bytes, not by its name: plain, gzip, xz or bzip2. Memory stays bounded
by `CHUNK_BYTES` however long the file is.
"""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import zlib
from codecs import BOM_UTF8
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from marginroute.errors import InputError

CHUNK_BYTES = 8 << 20
_PACKED = {b"\x1f\x8b": ("gzip", gzip.open), b"\xfd7zXZ\x00": ("xz", lzma.open), b"BZh": ("bzip2", bz2.open)}
DAMAGE = (EOFError, zlib.error, gzip.BadGzipFile, lzma.LZMAError)


@contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """The unpacked bytes of a file behind its byte order mark; a damaged or unreadable one becomes one sentence.

    Raises:
        InputError: the file cannot be read, or what packs it is damaged.
    """
    kind = "file"
    try:
        with path.open("rb") as raw:
            head = raw.read(6)
        unpack: Any = open
        for magic, (name, opener) in _PACKED.items():
            if head.startswith(magic):
                kind, unpack = name, opener
        with unpack(path, "rb") as file:
            if file.read(len(BOM_UTF8)) != BOM_UTF8:
                file.seek(0)
            yield file
    except DAMAGE as error:
        raise InputError(f"{path}: is a damaged {kind} file ({error}); legal is a complete one") from None
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(f"{path}: cannot be read ({reason}); legal is the path of a trace") from None


def head_of(path: Path, size: int = 1 << 16) -> bytes:
    """The first bytes of a file, unpacked."""
    with opened(path) as file:
        return bytes(file.read(size))


def line_chunks(path: Path, quoted: bool = False) -> Iterator[tuple[int, bytes]]:
    """Pieces of whole lines with the number of their first line, counted from 1.

    Args:
        path: the file.
        quoted: a line break between double quotes does not end a line, as in CSV; only the first line of such a record
            is counted right.
    """
    first, rest = 1, b""
    with opened(path) as file:
        while piece := file.read(CHUNK_BYTES):
            rest += piece
            end = rest.rfind(b"\n") + 1
            if quoted and rest.count(b'"', 0, end) % 2:
                end = rest.rfind(b"\n", 0, rest.rfind(b'"', 0, end)) + 1
            if end:
                yield first, rest[:end]
                first += rest.count(b"\n", 0, end)
                rest = rest[end:]
    if rest:
        yield first, rest


def json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line numbers and objects of a file of JSON lines; blank lines are passed over.

    Raises:
        InputError: a line is not one JSON object.
    """
    with opened(path) as file:
        yield from json_objects(path, 1, file)


def json_objects(path: Path, first: int, lines: Iterable[bytes]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line numbers and objects of given lines, the first of which has number `first`; see `json_lines`."""
    decode = json.JSONDecoder().decode
    for number, line in enumerate(lines, start=first):
        if not line or line.isspace():
            continue
        try:
            record = decode(line.decode())
        except ValueError as error:
            raise InputError(f"{path}, line {number}: is not JSON ({error}); legal is one object per line") from None
        if not isinstance(record, dict):
            kind = type(record).__name__
            raise InputError(f"{path}, line {number}: is {kind}; legal is one JSON object per line")
        yield number, record
