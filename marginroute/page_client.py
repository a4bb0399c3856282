"""One kept-open HTTP connection that fetches the same page again and again, for little CPU time.

Only what a metrics page needs: GET over HTTP/1.1, plain or TLS, with a length or in chunks, no redirects, no
compression.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import urlsplit

from marginroute.errors import InputError

MOST_HEADER_BYTES = 1 << 16
FIRST_BYTES = 1 << 16  # room for an answer, doubled whenever it is full


@dataclass(frozen=True)
class Address:
    """Where a page is.

    Attributes:
        host, port, tls: of the server.
        request: bytes that ask for the page.
    """

    host: str
    port: int
    tls: bool
    request: bytes


def address_of(url: str, place: str) -> Address:
    """Reads a URL.

    Args:
        url: `http://HOST:PORT/metrics` or https.
        place: of the setting, for the error.

    Raises:
        InputError: no such URL.
    """
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        parts, port = urlsplit(""), None
    plain = parts.username is None and not any(c.isspace() or ord(c) < 33 for c in url)
    if parts.scheme not in ("http", "https") or not parts.hostname or not plain:
        raise InputError(f"{place} = {url!r}; legal is a URL such as http://10.0.0.7:8000/metrics")
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    head = f"GET {path} HTTP/1.1\r\nHost: {parts.netloc}\r\nAccept: text/plain\r\nUser-Agent: marginroute\r\n\r\n"
    try:
        request = head.encode("ascii")
    except UnicodeEncodeError:
        raise InputError(f"{place} = {url!r}; legal is a URL in ASCII") from None
    tls = parts.scheme == "https"
    return Address(parts.hostname, port or (443 if tls else 80), tls, request)


class PageConnection(asyncio.BufferedProtocol):
    """A connection, opened when it is first needed and again after it broke; answers are received in one place.

    Args:
        address: of the page.
        most_bytes: longest page.
        done: called with the page, or with what went wrong, once per `fetch`.
    """

    def __init__(self, address: Address, most_bytes: int, done: Callable[[bytes | None, str], None]) -> None:
        self._address, self._most_bytes, self._done = address, most_bytes, done
        self._transport: asyncio.Transport | None = None
        self._room, self._filled = bytearray(FIRST_BYTES), 0
        self._view = memoryview(self._room)
        self._waiting, self._body_at, self._length = False, 0, -1
        self._fields: dict[bytes, bytes] = {}

    async def fetch(self) -> None:
        """Asks for the page; `done` hears of it."""
        self._waiting, self._filled, self._body_at = True, 0, 0
        try:
            if self._transport is None or self._transport.is_closing():
                context = ssl.create_default_context() if self._address.tls else None
                loop, where = asyncio.get_running_loop(), (self._address.host, self._address.port)
                await loop.create_connection(lambda: self, *where, ssl=context)
        except OSError as error:
            self._end(None, error.strerror or str(error))
            return
        if self._transport is not None and self._waiting:
            self._transport.write(self._address.request)

    def ask(self) -> bool:
        """As `fetch` on a connection that is open; False if there is none."""
        if self._transport is None or self._transport.is_closing():
            return False
        self._waiting, self._filled, self._body_at = True, 0, 0
        self._transport.write(self._address.request)
        return True

    def give_up(self, reason: str) -> None:
        """Ends a fetch that takes too long; the connection cannot be used again."""
        if self._waiting:
            self.close()
            self._end(None, reason)

    def close(self) -> None:
        """Closes the connection."""
        if self._transport is not None:
            self._transport.abort()
            self._transport = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """asyncio: the connection is open."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        """asyncio: the connection is closed."""
        self._transport = None
        if self._waiting:
            self._end(None, "the connection was closed")

    def get_buffer(self, sizehint: int) -> memoryview:
        """asyncio: where the next part of an answer goes."""
        if self._filled == len(self._room):
            self._room = self._room + bytes(len(self._room))
            self._view = memoryview(self._room)
        return self._view[self._filled :]

    def buffer_updated(self, nbytes: int) -> None:
        """asyncio: a part of an answer has come."""
        if not self._waiting:
            self.close()  # nobody asked
            return
        self._filled += nbytes
        if not self._body_at and not self._read_head():
            return
        if self._filled - self._body_at > 2 * self._most_bytes:
            self._refuse("the page is too long")
            return
        chunked = b"chunked" in self._fields.get(b"transfer-encoding", b"")
        page = self._unchunked() if chunked else self._whole()
        if page is not None:
            if b"close" in self._fields.get(b"connection", b""):
                self.close()
            self._end(page, "")

    def _read_head(self) -> bool:
        """Reads the header, once all of it is there; False if there is nothing more to look at."""
        end = self._room.find(b"\r\n\r\n", 0, self._filled)
        if end < 0:
            if self._filled > MOST_HEADER_BYTES:
                self._refuse("its header is too long")
            return False
        lines = bytes(self._view[:end]).lower().split(b"\r\n")
        self._body_at = end + 4
        status = lines[0].split(b" ", 2)[1:2]
        if status != [b"200"]:
            self._refuse(f"status {(status or [b'none'])[0][:20].decode('ascii', 'replace')}")
            return False
        self._fields = dict(line.split(b":", 1) for line in lines[1:] if b":" in line)
        length = self._fields.get(b"content-length", b"").strip()
        self._length = int(length) if length.isdigit() else -1
        return True

    def _whole(self) -> bytes | None:
        """The body, once all of it is there."""
        end = self._body_at + self._length
        return bytes(self._view[self._body_at : end]) if self._length >= 0 and end <= self._filled else None

    def _unchunked(self) -> bytes | None:
        """The body put together from its chunks, once the last one is there."""
        parts: list[memoryview] = []
        at = self._body_at
        while (end := self._room.find(b"\r\n", at, self._filled)) >= 0:
            try:
                size = int(self._room[at:end].split(b";")[0], 16)
            except ValueError:
                return None
            if size == 0:
                return b"".join(parts)
            at = end + 2 + size + 2
            parts.append(self._view[end + 2 : at - 2])
        return None

    def _refuse(self, reason: str) -> None:
        self.close()
        self._end(None, reason)

    def _end(self, page: bytes | None, reason: str) -> None:
        if self._waiting:
            self._waiting = False
            self._done(page, reason)
