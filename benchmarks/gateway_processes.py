"""The processes of the gateway benchmark: LiteLLM proxies in their own Python, and the emulated fleet."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import common
from marginroute.errors import InputError

START_S = 600.0
STARTED = "Application startup complete"  # uvicorn, once per worker
UVICORN_LOG = {  # LITELLM_LOG would silence that, too
    "version": 1,
    "disable_existing_loggers": False,
    "handlers": {"out": {"class": "logging.StreamHandler"}},
    "loggers": {"uvicorn.error": {"handlers": ["out"], "level": "INFO"}, "uvicorn.access": {"level": "ERROR"}},
}
AUTH = '''
"""Keys `sk-CLASS` belong to that class."""

from litellm.proxy._types import UserAPIKeyAuth


async def check(request, api_key):
    return UserAPIKeyAuth(api_key=api_key, metadata={"customer_class": api_key.removeprefix("sk-")})
'''


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


class Process:
    """A process that answers a URL once it is ready.

    Args:
        command: what to run.
        folder: where; its output goes to `output.txt` there.
        environ: its environment.
        ready: URL.
        workers: processes of its own that must say that they have started, too.
    """

    def __init__(
        self, command: Sequence[str], folder: Path, environ: Mapping[str, str], ready: str, workers: int = 0
    ) -> None:
        self._ready, self._output, self._workers = ready, folder / "output.txt", workers
        with open(self._output, "wb") as output:
            self._process = subprocess.Popen(
                command, cwd=folder, env=dict(environ), stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )

    def wait(self) -> None:
        """Returns when it answers and all of its workers have started: one that starts late would take their CPU.

        Raises:
            InputError: it ended, or took too long.
        """
        until_s, missing = time.monotonic() + START_S, f"{self._ready} does not answer"
        while time.monotonic() < until_s and self._process.poll() is None:
            try:
                urllib.request.urlopen(self._ready, timeout=5).close()
                started = self._output.read_text(errors="replace").count(STARTED)
                if started >= self._workers:
                    return
                missing = f"{started} of {self._workers} workers of {self._ready} have started"
            except OSError:
                pass
            time.sleep(0.2)
        ended = self._process.poll()
        when = f"after {START_S:g} s" if ended is None else f"and the process has ended with {ended}"
        raise InputError(f"{missing} {when}: {self._output.read_text(errors='replace')[-2000:]}")

    def cpu_s(self) -> float:
        """CPU seconds that it has used."""
        return common.cpu_s(self._process.pid)

    def stop(self) -> None:
        """Ends it and its workers."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(10)
        with contextlib.suppress(ProcessLookupError):  # nobody of its session is left
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def emulator(folder: Path, fleet: str, speed: float, seed: int) -> tuple[Process, str]:
    """The emulated fleet, and its base URL."""
    folder.mkdir(parents=True)
    port = free_port()
    flags = ["--port", str(port), "--speed", str(speed), "--seed", str(seed)]
    command = [sys.executable, "-m", "envs", "emulate", fleet, *flags]
    url = f"http://127.0.0.1:{port}"
    return Process(command, folder, {**os.environ, "PYTHONPATH": str(common.ROOT)}, f"{url}/health"), url


def upstream(folder: Path) -> tuple[Process, str]:
    """A stand-in engine that answers at once, and its base URL."""
    folder.mkdir(parents=True)
    port = free_port()
    command = [sys.executable, str(common.ROOT / "examples" / "litellm" / "upstream.py"), str(port), "0", "0"]
    url = f"http://127.0.0.1:{port}"
    return Process(command, folder, os.environ, f"{url}/v1/models"), url


def redis(folder: Path) -> tuple[subprocess.Popen[bytes], str]:
    """A redis-server on a Unix socket, and its URL.

    Raises:
        InputError: there is none on this machine, or it does not start.
    """
    server = shutil.which("redis-server")
    if server is None:
        raise InputError("redis-server is not installed; several workers share their counters through it")
    path = folder / "redis.sock"
    words = [server, "--port", "0", "--unixsocket", str(path), "--save", "", "--appendonly", "no"]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL)
    until_s = time.monotonic() + START_S
    while not path.exists():
        if process.poll() is not None or time.monotonic() > until_s:
            raise InputError(f"redis-server does not start on {path}")
        time.sleep(0.05)
    return process, f"unix://{path}"


def proxy(
    python: str,
    folder: Path,
    deployments: Sequence[dict[str, Any]],
    strategy: str = "simple-shuffle",
    callback: str | None = None,
    settings: Mapping[str, Any] | None = None,
    environ: Mapping[str, str] | None = None,
    workers: int = 1,
) -> tuple[Process, str]:
    """A LiteLLM proxy, and its base URL.

    Args:
        python: interpreter that has litellm[proxy].
        folder: for its files.
        deployments: entries of LiteLLM's `model_list`.
        strategy: of its router.
        callback: module and object; None: none.
        settings: of marginroute.
        environ: more of its environment.
        workers: processes of it.
    """
    folder.mkdir(parents=True)
    port = free_port()
    config = {
        "model_list": list(deployments),
        "router_settings": {"routing_strategy": strategy, "num_retries": 2, "disable_cooldowns": True},
        "litellm_settings": {"callbacks": [callback] if callback else [], "telemetry": False},
        "general_settings": {"master_key": "os.environ/LITELLM_MASTER_KEY", "custom_auth": "auth.check"},
    }
    (folder / "config.yaml").write_text(json.dumps(config))  # JSON is YAML
    (folder / "auth.py").write_text(AUTH)
    (folder / "path").mkdir()
    for name in ("marginroute", "benchmarks"):
        (folder / "path" / name).symlink_to(common.ROOT / name)
    (folder / "settings.yaml").write_text(json.dumps(settings or {}))
    (folder / "log.json").write_text(json.dumps(UVICORN_LOG))
    code = "import sys; from litellm import run_server; sys.exit(run_server())"
    flags = ["--config", "config.yaml", "--log_config", "log.json", "--host", "127.0.0.1", "--port", str(port)]
    flags += ["--num_workers", str(workers)] if workers > 1 else []
    kept = {k: x for k, x in os.environ.items() if not k.startswith(("MARGINROUTE", "LITELLM", "PYTHON"))}
    more = {
        "PYTHONPATH": str(folder / "path"),
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "LITELLM_LOG": "ERROR",
        "REPEATED_STREAMING_CHUNK_LIMIT": "1000000",  # the emulator says one word again and again
        "LITELLM_MASTER_KEY": f"sk-{secrets.token_hex(16)}",
        "NO_PROXY": "127.0.0.1",
        "MARGINROUTE_CONFIG": str(folder / "settings.yaml"),
        **(environ or {}),
    }
    url = f"http://127.0.0.1:{port}"
    command = [python, "-c", code, *flags]
    return Process(command, folder, kept | more, f"{url}/health/liveliness", workers if workers > 1 else 0), url
