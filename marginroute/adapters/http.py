"""The HTTP sidecar: for every gateway that can call HTTP.

    marginroute serve BUNDLE --log decisions.jsonl --uds /run/marginroute/sidecar.sock

On a Unix socket or loopback by default; with TLS and a token where other machines can reach it. The API describes
itself at `/openapi.json`. See docs/gateways.md.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import signal
import socket
from dataclasses import dataclass
from typing import Any

from marginroute.adapters.adapter import log
from marginroute.adapters.desk import Desk, DeskSettings
from marginroute.adapters.http_app import App
from marginroute.adapters.http_head import Head, split
from marginroute.adapters.listen import STOP_S, Listen, run_loop
from marginroute.errors import InputError

MAX_HEADER_BYTES = 16 << 10
IDLE_S = 120.0  # that a connection may wait for its next request
MOST_CONNECTIONS = 16_000
MIN_TOKEN = 16  # characters


@dataclass(frozen=True)
class HttpSettings(DeskSettings):
    """What the operator sets.

    Attributes:
        max_body_bytes: of a request; a larger one is refused.
        token_file: file with the token that callers must show; empty: none.
        request_timeout_s: that a request may take to arrive.
    """

    max_body_bytes: int = 1 << 20
    token_file: str = ""
    request_timeout_s: float = 10.0


def _protocol(app: App, request_timeout_s: float) -> type[Any]:
    """Uvicorn's parser with limits that it lacks: size of the headers, and time for a request to arrive.

    A plain request whose answer needs nobody to wait is answered without parser and ASGI, if no other is under way on
    its connection.
    """
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

    class Limited(HttpToolsProtocol):
        _timer: asyncio.TimerHandle | None = None
        _header_bytes = 0
        _parsing = False  # the parser is within a request
        _head: Head | None = None  # of a plain request whose body is not complete
        _body: bytearray

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._wait(request_timeout_s)

        def connection_lost(self, exc: Exception | None) -> None:
            self._wait(None)
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            if self._head is not None:
                self._body += data
                self._take(self._head, self._body)
                return
            plain = split(data) if self._free() else None
            if plain is None or not app.at_once(plain[0]):
                super().data_received(data)
                return
            self._unset_keepalive_if_required()
            self._take(*plain)

        def on_message_begin(self) -> None:
            self._header_bytes, self._parsing = 0, True
            self._wait(request_timeout_s)
            super().on_message_begin()

        def on_url(self, url: bytes) -> None:
            self._count(len(url))
            super().on_url(url)

        def on_header(self, name: bytes, value: bytes) -> None:
            self._count(len(name) + len(value))
            super().on_header(name, value)

        def on_message_complete(self) -> None:
            self._parsing = False
            self._wait(None)
            super().on_message_complete()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            if not self.transport.is_closing():
                self._wait(IDLE_S)

        def _free(self) -> bool:
            """Whether the next byte begins a request, and nothing is left to do before it."""
            over = self.cycle is None or self.cycle.response_complete
            room = len(self.connections) < MOST_CONNECTIONS and not self.flow.write_paused
            return over and room and not (self._parsing or self.pipeline or self.transport.is_closing())

        def _take(self, head: Head, body: bytes | bytearray) -> None:
            """Answers a plain request once its body is complete; what follows is the parser's."""
            if len(body) < head.length:
                if self._head is None:
                    self._head, self._body = head, bytearray(body)
                    self._wait(request_timeout_s)
                return
            self._head = None
            self.transport.write(app.answer_at_once(head, bytes(body[: head.length])))
            self._wait(IDLE_S)
            if len(body) > head.length:
                super().data_received(bytes(body[head.length :]))

        def _count(self, size: int) -> None:
            self._header_bytes += size
            if self._header_bytes > MAX_HEADER_BYTES:
                self.transport.close()
                raise ValueError("headers are too large")

        def _wait(self, seconds: float | None) -> None:
            if self._timer is not None:
                self._timer.cancel()
            self._timer = None if seconds is None else self.loop.call_later(seconds, self.transport.close)

    return Limited


def bound_socket(listen: Listen) -> socket.socket:
    """A listening socket; a Unix socket is only for its owner and group.

    Raises:
        InputError: the address cannot be used.
    """
    listen.clear()
    family = socket.AF_UNIX if listen.uds else socket.AF_INET6 if ":" in listen.host else socket.AF_INET
    made = socket.socket(family)
    before = os.umask(0o117)
    try:
        if not listen.uds:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(listen.uds if listen.uds else (listen.host, listen.port))
        made.listen(4096)
    except OSError as error:
        made.close()
        raise InputError(f"{listen.text} cannot be listened on ({error.strerror or error})") from None
    finally:
        os.umask(before)
    return made


def read_token(path: str) -> str:
    """The token in a file.

    Raises:
        InputError: the file is unreadable, or what it holds is too short to be one.
    """
    try:
        with open(path, encoding="ascii") as file:
            token = file.read(4096).strip()
    except (OSError, UnicodeDecodeError):
        raise InputError(f"token_file {path} is missing or unreadable") from None
    if len(token) < MIN_TOKEN or not token.isprintable() or " " in token:
        raise InputError(f"token_file {path} holds no token; legal is a word of {MIN_TOKEN} characters or more")
    return token


async def _serve(app: App, listen: Listen, request_timeout_s: float) -> None:
    import uvicorn

    with bound_socket(listen) as made:
        tls: dict[str, Any] = {}
        if listen.tls is not None:
            key, cert, ca = listen.tls
            tls = {"ssl_keyfile": key, "ssl_certfile": cert}
            if ca is not None:
                import ssl

                tls |= {"ssl_ca_certs": ca, "ssl_cert_reqs": ssl.CERT_REQUIRED}
        config = uvicorn.Config(
            app,
            http=_protocol(app, request_timeout_s),
            lifespan="off",
            access_log=False,
            log_config=None,
            server_header=False,
            date_header=False,
            proxy_headers=False,
            limit_concurrency=MOST_CONNECTIONS,
            timeout_keep_alive=int(IDLE_S),
            timeout_graceful_shutdown=int(STOP_S),
            ws="none",
            **tls,
        )
        server = uvicorn.Server(config)
        # Uvicorn's own handlers would end the process by the signal, before the records are written
        server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign, assignment]

        def stop() -> None:
            app.stopping = server.should_exit = True

        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop)
        where = listen.text if listen.uds or listen.port else f"{listen.host}:{made.getsockname()[1]}"
        log.warning("marginroute: sidecar on %s", where)
        try:
            await server.serve(sockets=[made])
        finally:
            listen.leave()


def run(settings: HttpSettings, listen: Listen) -> int:
    """Serves until SIGTERM or SIGINT.

    Raises:
        InputError: the settings, the bundle or the address are unusable, or a package is missing.
    """
    try:
        import httptools  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise InputError(f"{error.name} is not installed; pip install 'marginroute[http]'") from None
    token = read_token(settings.token_file) if settings.token_file else ""
    if not listen.local and not token:
        raise InputError(f"{listen.host} can be reached from other machines: name a token_file")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, hard), hard))
    desk = Desk(settings, "http")
    try:
        app = App(desk, settings.max_body_bytes, token)
        run_loop(_serve(app, listen, settings.request_timeout_s))
    finally:
        desk.close()
    return 0
