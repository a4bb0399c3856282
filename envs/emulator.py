"""`python -m envs emulate FLEET`: the simulated fleet as streaming OpenAI-compatible endpoints with vLLM's metrics.

Every replica and provider has a path: /NAME/v1/models, /NAME/v1/chat/completions, /NAME/v1/completions, /NAME/health,
and for replicas /NAME/metrics; replicas are called POOL-0, POOL-1, ... The paths are listed at /.

True lengths, which a simulated model cannot know, come with the request: `"emulate": {"prompt_tokens": P,
"output_tokens": N}` in the body or headers `x-emulate-prompt-tokens`, `x-emulate-output-tokens`; or, as with vLLM,
`ignore_eos` (as long as max_tokens allows) and `min_tokens`. Otherwise the output length is drawn from a lognormal.

POST /emulate/faults and /emulate/replicas let replicas and providers fail and pools scale (emulator_faults.py).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import socket
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import numpy as np

from envs.emulator_faults import cause_fault, scale
from envs.emulator_metrics import ReplicaMetrics, metrics_page
from envs.emulator_requests import Asked, RequestError, Writer, parse
from envs.emulator_world import Answer, LiveFleet, Station, fine_loop
from envs.simulate import compiled, fleet_section
from marginroute.errors import InputError

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

MOST_BODY_BYTES = 64_000_000
PROVIDER_CONTEXT_TOKENS = 1_000_000
BACKLOG = 2048
SHUTDOWN_S = 1  # streams that are still open get this long
JSON, TEXT, EVENTS = b"application/json", b"text/plain; version=0.0.4; charset=utf-8", b"text/event-stream"


def stations_of(section: Any, spec: Any) -> list[Station]:
    """Addresses of a fleet's replicas and providers, in the order of candidates."""
    stations: list[Station] = []
    for name, pool in section.pools.items():
        tokens = pool.kv_blocks * pool.block_size_tokens
        for number in range(pool.rows):
            stations.append(Station(f"{name}-{number}", pool.tier, len(stations), None, tokens))
    for index, provider in enumerate(spec.providers):
        tier = section.providers[provider.name].tier
        stations.append(Station(provider.name, tier, None, index, PROVIDER_CONTEXT_TOKENS))
    names = [station.name for station in stations]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"fleet: two paths are called {name!r}; legal is a provider with another name")
    return stations


class Emulator:
    """The ASGI application.

    Args:
        fleet: Name in configs/fleets, or a YAML file.
        speed: The fleet's seconds per second.
        output_median_tokens: Of the lognormal from which output lengths are drawn.
        output_sigma: Standard deviation of their logarithm.
        seed: Of output lengths and of the providers' latencies.
    """

    def __init__(
        self,
        fleet: str,
        speed: float = 1.0,
        output_median_tokens: float = 200.0,
        output_sigma: float = 0.8,
        seed: int = 0,
    ) -> None:
        section = fleet_section(fleet)
        spec = compiled(section)
        self.stations = {station.name: station for station in stations_of(section, spec)}
        self.metrics = {name: ReplicaMetrics() for name in self.stations}
        self.live = LiveFleet(spec, speed, seed, self._saw)
        self._output, self._rng = (math.log(output_median_tokens), output_sigma), np.random.default_rng([seed, 1])
        self._count = 0

    def _saw(self, answer: Answer, new_tokens: int, at_s: float) -> None:
        if answer.station.name:
            self.metrics[answer.station.name].saw(answer, new_tokens, at_s, self.live.speed)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One connection's request, or the server's start and end."""
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
        elif scope["type"] == "http":
            try:
                await self._route(scope, receive, send)
            except RequestError as error:
                await _refuse(send, error)

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        while True:
            message = await receive()
            if message["type"] == "lifespan.shutdown":
                self.live.stop()
            await send({"type": f"{message['type']}.complete"})
            if message["type"] == "lifespan.shutdown":
                return

    async def _route(self, scope: Scope, receive: Receive, send: Send) -> None:
        method, path = scope["method"], scope["path"]
        name, _, rest = path.strip("/").partition("/")
        station = self.stations.get(name)
        if method == "GET" and path in ("/", "/health"):
            return await _reply(send, 200, json.dumps({"paths": [f"/{name}/v1" for name in self.stations]}).encode())
        if method == "POST" and path == "/emulate/faults":
            cause_fault(self.live, self.stations, await _body(receive))
            return await _reply(send, 200, b"{}")
        if method == "POST" and path == "/emulate/replicas":
            scale(self.live, await _body(receive))
            return await _reply(send, 200, b"{}")
        if station is None:
            raise RequestError(404, f"{path} does not exist; legal is /NAME/v1/..., NAMEs are listed at /", "not_found")
        if station.replica is not None and not self.live.serves(station):
            raise RequestError(503, f"replica {name} does not run", "unavailable")
        if method == "GET" and rest == "health":
            return await _reply(send, 200, b"")
        if method == "GET" and rest == "v1/models":
            return await _reply(send, 200, _models(station))
        if method == "GET" and rest == "metrics" and station.replica is not None:
            self.live.refresh()
            return await _reply(send, 200, metrics_page(self.live, station, self.metrics[name]).encode(), TEXT)
        if rest in ("v1/chat/completions", "v1/completions"):
            if method != "POST":
                raise RequestError(405, f"{method} {path}; legal is POST", "method_not_allowed")
            return await self._complete(station, scope, receive, send, rest == "v1/chat/completions")
        raise RequestError(404, f"{path} does not exist", "not_found")

    async def _complete(self, station: Station, scope: Scope, receive: Receive, send: Send, chat: bool) -> None:
        headers = {key.decode("latin-1").lower(): value.decode("latin-1") for key, value in scope["headers"]}
        asked = parse(await _body(receive), headers, chat, station.model)
        answer, reason = self._submit(station, asked)
        self._count += 1
        writer = Writer(asked, f"{self._count:08x}", station.model, int(time.time()), reason)
        gone = asyncio.create_task(self._watch(receive, answer))
        try:
            await (_stream if asked.stream else _whole_answer)(send, answer, writer)
        finally:
            gone.cancel()
            self.live.leave(answer)

    async def _watch(self, receive: Receive, answer: Answer) -> None:
        """Ends the handler when its user hangs up."""
        while (await receive())["type"] != "http.disconnect":
            pass
        self.live.leave(answer)
        answer.gone = True
        answer.wake()

    def _submit(self, station: Station, asked: Asked) -> tuple[Answer, str]:
        length = asked.output_tokens
        if length is None:
            mean, sigma = self._output
            length = max(round(math.exp(mean + sigma * self._rng.standard_normal())), asked.min_tokens, 1)
            length = min(length, max(station.max_model_len - asked.prompt_tokens, 1))
        most = math.inf if asked.max_tokens is None else asked.max_tokens
        answer = self.live.submit(station, asked.prompt_tokens, int(min(length, most)))
        if answer is None:
            raise RequestError(503, "too many requests are in flight", "overloaded")
        if answer.lost:
            raise RequestError(503, f"{station.name} does not answer", "unavailable")
        if answer.refused and station.provider is not None:
            retry_s = self.live.retry_after_s(station, asked.prompt_tokens)
            raise RequestError(429, f"rate limit of provider {station.name}", "rate_limit_exceeded", retry_s)
        if answer.refused:
            words = f"{asked.prompt_tokens} prompt and {answer.output_tokens} output tokens"
            legal = f"This model's maximum context length is {station.max_model_len} tokens"
            raise RequestError(400, f"{legal}, {words} were asked for", "context_length_exceeded")
        return answer, "length" if length >= most else "stop"


def _models(station: Station) -> bytes:
    model = {"id": station.model, "object": "model", "created": 0, "owned_by": "marginroute"}
    return json.dumps({"object": "list", "data": [{**model, "max_model_len": station.max_model_len}]}).encode()


async def _body(receive: Receive) -> bytes:
    parts, size, more = [], 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise RequestError(499, "the client has hung up", "disconnected")
        parts.append(message.get("body", b""))
        size, more = size + len(parts[-1]), message.get("more_body", False)
        if size > MOST_BODY_BYTES:
            raise RequestError(413, f"the body is longer than {MOST_BODY_BYTES} bytes", "too_large")
    return b"".join(parts)


async def _start(send: Send, status: int, kind: bytes, *more: tuple[bytes, bytes]) -> None:
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", kind), *more]})


async def _reply(send: Send, status: int, body: bytes, kind: bytes = JSON, *more: tuple[bytes, bytes]) -> None:
    await _start(send, status, kind, (b"content-length", str(len(body)).encode()), *more)
    await send({"type": "http.response.body", "body": body})


async def _refuse(send: Send, error: RequestError) -> None:
    body = {"error": {"message": str(error), "type": error.code, "code": error.code, "param": None}}
    more = () if error.retry_after_s is None else ((b"retry-after", str(math.ceil(error.retry_after_s)).encode()),)
    await _reply(send, error.status, json.dumps(body).encode(), JSON, *more)


async def _stream(send: Send, answer: Answer, writer: Writer) -> None:
    await _start(send, 200, EVENTS, (b"cache-control", b"no-cache"))
    sent = 0
    while not (answer.ended and answer.tokens == sent):
        await answer.more_than(sent)
        if answer.gone:
            return
        if answer.tokens > sent:
            events, sent = writer.tokens(answer.tokens - sent, sent == 0), answer.tokens
            await send({"type": "http.response.body", "body": events, "more_body": True})
    whole = sent == answer.output_tokens  # not where the server is stopping or the engine has failed
    await send({"type": "http.response.body", "body": writer.end(sent) if whole else b""})


async def _whole_answer(send: Send, answer: Answer, writer: Writer) -> None:
    while not (answer.ended or answer.gone):
        await answer.more_than(answer.tokens)
    if answer.ended and answer.tokens < answer.output_tokens:
        reason = "the engine has failed" if answer.lost else "the server is stopping"
        raise RequestError(503, reason, "unavailable" if answer.lost else "stopping")
    if not answer.gone:
        await _reply(send, 200, writer.whole(answer.tokens))


def _bound(host: str, port: int) -> socket.socket:
    """A listening socket, so that port 0 is known before the server starts."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
        sock.listen(BACKLOG)  # whoever reads the address can connect
    except (OSError, OverflowError) as error:
        sock.close()
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"--host {host} --port {port}: {reason}; legal is a free port of this machine") from None
    return sock


def run(arguments: argparse.Namespace) -> int:
    """Serves until it is interrupted."""
    for flag in ("speed", "output_median"):
        value = getattr(arguments, flag)
        if not (math.isfinite(value) and value > 0.0):
            raise InputError(f"--{flag.replace('_', '-')} {value:g}; legal is a number above 0")
    if not (math.isfinite(arguments.output_sigma) and arguments.output_sigma >= 0.0):
        raise InputError(f"--output-sigma {arguments.output_sigma:g}; legal is 0 or more")
    if arguments.seed < 0:
        raise InputError(f"--seed {arguments.seed}; legal is 0 or more")
    try:
        import uvicorn  # noqa: F401
    except ImportError:
        raise InputError(
            'the emulator needs uvicorn; legal is an installation with pip install -e ".[train]"'
        ) from None
    sock = _bound(arguments.host, arguments.port)
    with contextlib.closing(sock):
        _serve(sock, arguments)
    return 0


def _serve(sock: socket.socket, arguments: argparse.Namespace) -> None:
    import uvicorn

    app = Emulator(arguments.fleet, arguments.speed, arguments.output_median, arguments.output_sigma, arguments.seed)
    host, port = sock.getsockname()[:2]
    for name, station in app.stations.items():
        host_words = f"[{host}]" if ":" in host else host
        print(f"http://{host_words}:{port}/{name}/v1  model {station.model}", flush=True)
    config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=SHUTDOWN_S)

    class Server(uvicorn.Server):
        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            app.live.stop()  # streams that are open end now
            await super().shutdown(sockets)

    with asyncio.Runner(loop_factory=fine_loop) as runner:
        runner.run(Server(config).serve(sockets=[sock]))
