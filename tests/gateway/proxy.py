"""A real LiteLLM proxy as a subprocess of its own Python, in front of two small upstreams."""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
START_S = 60.0

CONFIG = """
model_list:
{models}
router_settings: {{num_retries: 1, disable_cooldowns: true, routing_strategy: simple-shuffle}}
litellm_settings: {{callbacks: {callbacks}, telemetry: false{more}}}
general_settings: {{master_key: os.environ/LITELLM_MASTER_KEY, custom_auth: auth.check}}
"""
MODEL = """
- model_name: {group}
  litellm_params: {{model: openai/{name}, api_base: "{url}", api_key: none}}
  model_info: {{id: {group}-{name}, marginroute_candidate: "{candidate}"}}
"""
AUTH = '''
"""Keys `sk-CLASS` belong to that class; `sk-probe` asks for the callback's own state."""

import json
import os

from litellm.proxy._types import UserAPIKeyAuth


async def check(request, api_key):
    if api_key == "sk-probe":
        from marginroute.adapters import litellm

        observer = getattr(litellm, os.environ["MARGINROUTE_CALLBACK"]).marginroute
        state = {"in_flight": observer.gateway.state.in_flight, "pending": observer.gateway.pending}
        with open(os.environ["PROBE"], "w") as file:
            state |= {"errors": observer.errors, "calls": len(observer._calls), "awaited": len(observer._awaited)}
            json.dump(state | {"state": observer.gateway.switch.state}, file)
    return UserAPIKeyAuth(api_key=api_key, metadata={"customer_class": api_key.removeprefix("sk-")})
'''


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Proxy:
    """Started without waiting; `wait` returns when it answers.

    Args:
        python: interpreter that has litellm[proxy].
        folder: for its configuration and output.
        deployments: (model group, upstream name, upstream URL, candidate).
        environ: what marginroute's callback reads; None: no callback at all.
        callback: which of them, `shadow` or `router`.
        more: further `litellm_settings`, as YAML.
    """

    def __init__(
        self,
        python: str,
        folder: Path,
        deployments: list[tuple],
        environ: dict[str, str] | None,
        callback: str = "shadow",
        more: str = "",
    ) -> None:
        folder.mkdir()
        self.folder, self.port = folder, free_port()
        models = "".join(MODEL.format(group=g, name=n, url=u, candidate=c) for g, n, u, c in deployments)
        callbacks = "[]" if environ is None else f"[marginroute.adapters.litellm.{callback}]"
        (folder / "config.yaml").write_text(CONFIG.format(models=models, callbacks=callbacks, more=more))
        (folder / "auth.py").write_text(AUTH)
        (folder / "path").mkdir()
        (folder / "path" / "marginroute").symlink_to(REPOSITORY / "marginroute")  # and nothing else of the checkout
        self.output = open(folder / "output.txt", "wb")  # noqa: SIM115
        code = "import sys; from litellm import run_server; sys.exit(run_server())"
        options = ["--config", "config.yaml", "--host", "127.0.0.1", "--port", str(self.port)]
        self.process = subprocess.Popen(
            [python, "-c", code, *options],
            cwd=folder,
            stdout=self.output,
            stderr=subprocess.STDOUT,
            env={k: x for k, x in os.environ.items() if not k.startswith(("MARGINROUTE", "LITELLM", "PYTHON"))}
            | {
                "PYTHONPATH": str(folder / "path"),
                "LITELLM_LOCAL_MODEL_COST_MAP": "True",
                "LITELLM_MASTER_KEY": f"sk-{secrets.token_hex(16)}",
                "NO_PROXY": "127.0.0.1",
                "PROBE": str(folder / "probe.json"),
                "MARGINROUTE_CALLBACK": callback,
            }
            | (environ or {}),
        )

    def wait(self) -> None:
        until = time.monotonic() + START_S
        while time.monotonic() < until and self.process.poll() is None:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health/liveliness", timeout=2).close()
                return
            except OSError:
                time.sleep(0.1)
        raise AssertionError(f"the proxy did not start:\n{self.text()[-3000:]}")

    def text(self) -> str:
        return (self.folder / "output.txt").read_text(errors="replace")

    def ask(self, group: str, message: str, stream: bool = False, key: str = "sk-premium", **more) -> tuple[int, str]:
        """Status and the text of the answer (after an error: what Retry-After said)."""
        body = {"model": group, "messages": [{"role": "user", "content": message}], "stream": stream} | more
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/v1/chat/completions",
            json.dumps(body).encode(),
            {"Authorization": f"Bearer {key}", "Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=30) as response:
                text = response.read().decode()
        except urllib.error.HTTPError as error:
            error.read()
            return error.code, error.headers.get("retry-after", "")
        if not stream:
            return 200, json.loads(text)["choices"][0]["message"]["content"]
        events = [line[6:] for line in text.splitlines() if line.startswith("data: {")]
        chunks = [json.loads(event) for event in events]
        if any("error" in chunk for chunk in chunks):
            return 200, "error in the stream"
        return 200, "".join(x["choices"][0]["delta"].get("content") or "" for x in chunks if x["choices"])

    def hang_up(self, group: str, message: str) -> None:
        """Asks for a stream and leaves after its first line."""
        body = json.dumps({"model": group, "messages": [{"role": "user", "content": message}], "stream": True}).encode()
        headers = {"Authorization": "Bearer sk-premium", "Content-Type": "application/json"}
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}/v1/chat/completions", body, headers)
        with urllib.request.urlopen(request, timeout=30) as response:
            response.readline()

    def probe(self) -> dict:
        self.ask("only-a", "probe", key="sk-probe")
        return json.loads((self.folder / "probe.json").read_text())

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self.output.close()
