"""A client of OpenAI-compatible endpoints that is good at one thing: when did every token arrive?

What comes is stored with its time and looked at once the answer is complete, so a client with a hundred streams does
almost nothing between two packets. HTTP/1.1 by the standard library's event loop; one connection per request.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import json
import ssl
import time
import urllib.parse
from typing import Any

import numpy as np
import numpy.typing as npt

from marginroute.errors import InputError

FloatArray = npt.NDArray[np.float64]

MOST_WORDS_OF_ERROR = 200


class _Recorder(asyncio.Protocol):
    """Keeps what arrives, with its time, until the server closes the connection."""

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.reads: list[tuple[float, bytes]] = []
        self.first_event: asyncio.Future[None] = loop.create_future()
        self.closed: asyncio.Future[None] = loop.create_future()

    def data_received(self, data: bytes) -> None:
        self.reads.append((time.perf_counter(), data))
        if not self.first_event.done() and b"data:" in data:
            self.first_event.set_result(None)

    def connection_lost(self, error: Exception | None) -> None:
        for future in (self.first_event, self.closed):
            if not future.done():
                future.set_result(None)


@dataclasses.dataclass(frozen=True)
class Answer:
    """A streamed answer.

    Attributes:
        sent_s: When the request left.
        token_s: When its tokens arrived, (output tokens,).
        prompt_tokens: As the endpoint counted them.
    """

    sent_s: float
    token_s: FloatArray
    prompt_tokens: int

    @property
    def ttft_s(self) -> float:
        """Seconds to the first token."""
        return float(self.token_s[0]) - self.sent_s


class Client:
    """One endpoint.

    Args:
        url: Base URL, with or without /v1.
        key: API key, or None.
        timeout_s: Longest wait for one answer.
    """

    def __init__(self, url: str, key: str | None, timeout_s: float) -> None:
        parts = urllib.parse.urlsplit(url)
        try:
            port = parts.port
        except ValueError:
            port = -1
        if parts.scheme not in ("http", "https") or not parts.hostname or port == -1 or parts.query or parts.fragment:
            raise InputError(f"URL {url!r}; legal is http://HOST:PORT/PATH or https")
        self.url, self._host, self._tls = url, parts.hostname, parts.scheme == "https"
        self._port = port or (443 if self._tls else 80)
        self._netloc = parts.netloc.rpartition("@")[2]
        path = parts.path.rstrip("/")
        self._root = path.removesuffix("/v1")
        self._key, self._timeout_s = key, timeout_s
        self.requests = 0

    async def get(self, path: str) -> bytes:
        """The body of a page, path relative to what stands before /v1.

        Raises:
            InputError: The endpoint cannot be reached or has another answer than 200.
        """
        recorder, _ = await self._send("GET", path, b"")
        await self._until(recorder.closed)
        status, _, body = _split(recorder.reads)
        self._check(status, body, path)
        return body

    async def start(self, body: dict[str, Any]) -> Running:
        """Sends a streaming chat completion."""
        self.requests += 1
        recorder, sent_s = await self._send("POST", "/v1/chat/completions", json.dumps(body).encode())
        return Running(self, recorder, sent_s)

    async def _send(self, method: str, path: str, body: bytes) -> tuple[_Recorder, float]:
        context = ssl.create_default_context() if self._tls else None
        loop = asyncio.get_running_loop()
        opened = loop.create_connection(_Recorder, self._host, self._port, ssl=context)
        try:
            transport, recorder = await asyncio.wait_for(opened, self._timeout_s)
        except (OSError, TimeoutError) as error:
            reason = getattr(error, "strerror", None) or str(error) or "no answer"
            raise InputError(f"{self.url}: cannot be reached ({reason}); legal is a running endpoint") from None
        lines = [f"{method} {self._root}{path} HTTP/1.1", f"Host: {self._netloc}", "Connection: close"]
        lines += ["Accept-Encoding: identity", "User-Agent: marginroute"]
        if self._key:
            lines.append(f"Authorization: Bearer {self._key}")
        if body:
            lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
        sent_s = time.perf_counter()
        transport.write("\r\n".join([*lines, "", ""]).encode() + body)
        return recorder, sent_s

    async def _until(self, future: asyncio.Future[None]) -> None:
        try:
            await asyncio.wait_for(asyncio.shield(future), self._timeout_s)
        except TimeoutError:
            raise InputError(f"{self.url}: no answer within {self._timeout_s:g} s; legal is a shorter one") from None

    def _check(self, status: int, body: bytes, path: str) -> None:
        if status != 200:
            words = " ".join(body.decode("utf-8", "replace").split())[:MOST_WORDS_OF_ERROR]
            raise HttpError(f"{self.url}: {path} has HTTP status {status} ({words}); legal is 200", status)


class HttpError(InputError):
    """An answer whose status is not 200."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class Running:
    """An answer that is being streamed."""

    def __init__(self, client: Client, recorder: _Recorder, sent_s: float) -> None:
        self._client, self._recorder, self._sent_s = client, recorder, sent_s

    async def first_token(self) -> None:
        """Returns at the first event, or at the end if there is none."""
        await self._client._until(self._recorder.first_event)

    async def whole(self) -> Answer:
        """The answer, once it is complete.

        Raises:
            InputError: It is an error, is not streamed, or does not say how many tokens it has.
        """
        await self._client._until(self._recorder.closed)
        reads = self._recorder.reads
        status, headers, body = _split(reads)
        self._client._check(status, body, "/v1/chat/completions")
        if "text/event-stream" not in headers.get("content-type", ""):
            raise InputError(f"{self._client.url}: the answer is not streamed; legal is server-sent events")
        token_s, usage = [], None
        for at_s, data in _events(reads, headers):
            is_token, counted = _meaning(data)
            usage = counted or usage
            if is_token:
                token_s.append(at_s)
        if not token_s or usage is None:
            raise InputError(
                f"{self._client.url}: a stream without tokens or usage; legal is stream_options.include_usage"
            )
        return Answer(self._sent_s, _per_token(np.array(token_s), usage[1]), usage[0])


def _per_token(event_s: FloatArray, tokens: int) -> FloatArray:
    """A time per token where events hold several tokens, or some hold none."""
    if len(event_s) == tokens:
        return event_s
    return np.interp(np.linspace(0.0, len(event_s) - 1.0, tokens), np.arange(len(event_s)), event_s)


def _head(reads: list[tuple[float, bytes]]) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and what follows them."""
    raw = b"".join(data for _, data in reads)
    head, _, rest = raw.partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    words = first.split(" ")
    status = int(words[1]) if len(words) > 1 and words[1].isdecimal() else 0
    pairs = (line.partition(":") for line in lines)
    return status, {name.strip().lower(): value.strip().lower() for name, _, value in pairs}, rest


def _split(reads: list[tuple[float, bytes]]) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body."""
    status, headers, rest = _head(reads)
    if headers.get("transfer-encoding") == "chunked":
        rest = b"".join(piece for _, piece in _chunks(rest))
    return status, headers, rest


def _chunks(raw: bytes) -> list[tuple[int, bytes]]:
    """(position behind it, content) of every chunk that is complete."""
    pieces, at = [], 0
    while (end := raw.find(b"\r\n", at)) >= 0:
        try:
            size = int(raw[at:end].split(b";")[0], 16)
        except ValueError:
            break
        if size == 0 or end + 2 + size > len(raw):
            break
        pieces.append((end + 2 + size, raw[end + 2 : end + 2 + size]))
        at = end + 4 + size
    return pieces


def _events(reads: list[tuple[float, bytes]], headers: dict[str, str]) -> list[tuple[float, bytes]]:
    """(time at which its last byte arrived, data) of every server-sent event."""
    _, _, rest = _head(reads)
    total = sum(len(data) for _, data in reads)
    ends = np.cumsum([len(data) for _, data in reads]) - (total - len(rest))
    times = np.array([at_s for at_s, _ in reads])
    chunked = headers.get("transfer-encoding") == "chunked"
    pieces = _chunks(rest) if chunked else [(len(rest), rest)]
    body = b"".join(piece for _, piece in pieces)
    piece_ends = np.cumsum([len(piece) for _, piece in pieces])
    found, at = [], 0
    while (end := body.find(b"\n\n", at)) >= 0:
        event = body[at:end].strip()
        if event.startswith(b"data:"):
            position = end + 2
            if chunked:
                position = pieces[int(np.searchsorted(piece_ends, position))][0]
            found.append((float(times[min(np.searchsorted(ends, position), len(times) - 1)]), event[5:].strip()))
        at = end + 2
    return found


@functools.lru_cache(maxsize=4096)
def _meaning(data: bytes) -> tuple[bool, tuple[int, int] | None]:
    """(whether the event brings a token, usage as (prompt, completion) tokens if it has it)."""
    try:
        event = json.loads(data)
    except ValueError:
        return False, None
    usage = event.get("usage") or {}
    counted = (int(usage["prompt_tokens"]), int(usage["completion_tokens"])) if "completion_tokens" in usage else None
    for choice in event.get("choices") or []:
        delta = choice.get("delta") or {}
        if any(delta.get(name) for name in ("content", "reasoning_content", "reasoning")):
            return True, counted
    return False, counted
