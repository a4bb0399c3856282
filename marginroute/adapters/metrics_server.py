"""Metrics of a gateway that has no HTTP server of its own for them: `/metrics`, `/v1/scale` and `/v1/status`.

Loopback only. Several workers of one gateway take one port after the other, from the one that the settings name.
"""

from __future__ import annotations

import json
import logging
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from marginroute.adapters import metrics
from marginroute.adapters.listen import is_loopback
from marginroute.errors import InputError

log = logging.getLogger("marginroute.gateway")

MOST_WORKERS = 64


class MetricsServer:
    """Serves in a thread until it is stopped.

    Args:
        source: what is counted.
        address: `host:port`.

    Raises:
        InputError: the address is not legal, can be reached from other machines, or is taken.
    """

    def __init__(self, source: metrics.Source, address: str) -> None:
        try:
            import prometheus_client  # noqa: F401
        except ImportError:
            raise InputError("prometheus_client is not installed; pip install prometheus-client") from None
        host, _, port = address.rpartition(":")
        if not host or not port.isdigit() or not 0 <= int(port) < 65536:
            raise InputError(f"metrics {address!r} is not legal; legal is host:port, such as 127.0.0.1:9464")
        if not is_loopback(host.strip("[]")):
            raise InputError(f"metrics {address}: {host} can be reached from other machines; legal is loopback")
        self._server = _bound(host.strip("[]"), int(port), _handler(source))
        self._server.daemon_threads = True
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.1}, name="marginroute-metrics", daemon=True
        )

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self._server.server_address[1])

    def start(self) -> MetricsServer:
        """Starts to serve."""
        self._thread.start()
        log.warning("marginroute: metrics on http://%s:%d/metrics", self._server.server_address[0], self.port)
        return self

    def stop(self) -> None:
        """Ends."""
        self._server.shutdown()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    allow_reuse_address = False  # a port that another worker has is not ours


def _bound(host: str, port: int, handler: type[BaseHTTPRequestHandler]) -> ThreadingHTTPServer:
    for offset in range(MOST_WORKERS if port else 1):
        try:
            return _Server((host, port + offset), handler)
        except OverflowError:
            break
        except OSError as error:
            reason = error.strerror
    raise InputError(f"metrics {host}:{port} cannot be listened on ({reason}); name another port")


def _handler(source: metrics.Source) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        timeout = 10.0

        def log_message(self, *_: Any) -> None:
            pass

        def do_GET(self) -> None:
            answer = _answer(source, self.path.partition("?")[0])
            status, kind, body = answer if answer else (404, "application/json", b'{"error":"there is no such path"}')
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    return Handler


def _answer(source: metrics.Source, path: str) -> tuple[int, str, bytes] | None:
    if path == "/metrics":
        return 200, "text/plain; version=0.0.4; charset=utf-8", metrics.exposition(source)
    if path == "/v1/status":
        return 200, "application/json", json.dumps(source.gateway.status()).encode()
    return metrics.scale(source.gateway) if path == "/v1/scale" else None
