"""Envoy: an endpoint picker behind ext_proc, as the Gateway API Inference Extension asks for.

    marginroute envoy BUNDLE --config envoy-picker.yaml --uds /run/marginroute/picker.sock

One gRPC server offers the external processor, the access log that reports how requests ended, and the health services
`liveness`, `readiness` and that of the processor. Whatever goes wrong here, a request goes on as without us; how Envoy
behaves when this process is gone is its own setting (`failure_mode_allow`). See docs/gateways.md.
"""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from marginroute.adapters import chat, envoy_access_log, envoy_config
from marginroute.adapters import envoy_messages as em
from marginroute.adapters.adapter import log
from marginroute.adapters.desk import Desk, DeskSettings
from marginroute.adapters.envoy_exchange import Exchange, Message
from marginroute.adapters.listen import STOP_S, Listen, run_loop
from marginroute.adapters.metrics_server import MetricsServer
from marginroute.decision import Decision
from marginroute.errors import InputError
from marginroute.facts import Outcome

TOKENS_PER_BYTE = 0.2  # of a JSON body, before any usage was reported
SWEEP_S = 10.0
PROCESSOR = "envoy.service.ext_proc.v3.ExternalProcessor"
CLUSTER = "cluster:"
NO_ENDPOINTS = "endpoints is empty; name the ip:port of each candidate that Envoy can reach"


@dataclass(frozen=True)
class EnvoySettings(DeskSettings):
    """What the operator sets.

    Attributes:
        class_header: request header that names the customer class; Envoy must set it or strip it, clients may lie.
        task_header: request header that names the task type.
        task_field: key of the body's `metadata` that names it where the header does not.
        tenant_header: request header that names who pays.
        session_header: request header that names the conversation or agent run.
        standing_header: request header that says how the customer stands, one of `contracts.STANDINGS`; as with the
            class, clients may lie.
        quota_left_header: request header that says which share of the customer's allowance is left, 0 to 1.
        metrics: loopback `host:port` where Prometheus finds metrics and an autoscaler its targets; empty: nowhere.
        models: name that the body's `model` becomes, by candidate or by its tier; needs a mode that shows the body.
        retry_next: name the runner-up as second endpoint, for Envoy's retry policy to fall back on.
        max_body_bytes: of a request body that are held and read; of a longer one only the length is used.
        max_hold_s: that a request is held back at most (`can: [shed, defer, hold]`); then it is refused with 429.
        assumed_answer_s: after which a request is taken as over if nothing reports its end (no body, no access log).
    """

    class_header: str = "x-customer-class"
    task_header: str = "x-task-type"
    task_field: str = "task_type"
    tenant_header: str = "x-tenant-id"
    session_header: str = "x-session-id"
    standing_header: str = "x-customer-standing"
    quota_left_header: str = "x-quota-left"
    metrics: str = ""
    models: Mapping[str, str] = field(default_factory=dict)
    retry_next: bool = False
    max_body_bytes: int = 1 << 20
    assumed_answer_s: float = 10.0
    max_hold_s: float = 600.0


class Picker:
    """What all exchanges share.

    Args:
        desk: decides; its settings are `EnvoySettings`.

    Attributes:
        live: exchanges by request id, from decision to end.
        access_logs: streams of Envoy's access log that are connected.

    Raises:
        InputError: the settings name an unknown candidate or tier, or no endpoint at all.
    """

    def __init__(self, desk: Desk) -> None:
        assert isinstance(desk.settings, EnvoySettings)
        self.desk, self.settings, self.gateway = desk, desk.settings, desk.gateway
        if not desk.endpoint:
            raise InputError(NO_ENDPOINTS)
        layout = desk.gateway.bundle.layout
        unknown = next((k for k in self.settings.models if k not in (*layout.names, *layout.tier_names)), None)
        if unknown is not None:
            raise InputError(f"models: {unknown!r} is no candidate or tier; legal: {', '.join(layout.tier_names)}")
        self.messages = em.Messages()
        self.endpoint = desk.endpoint
        self.live: dict[str, Exchange] = {}
        self.access_logs = 0
        self.per_character, self.per_byte = chat.TokenRatio(), chat.TokenRatio(TOKENS_PER_BYTE)
        self._block_bytes = round(self.settings.prefix_block_tokens / chat.TOKENS_PER_CHARACTER)
        self._number = count(1)
        self._waiting: list[tuple[float, Exchange]] = []

    @property
    def has_access_log(self) -> bool:
        """Whether an access log is connected that will report the end of requests."""
        return self.access_logs > 0

    def new_id(self, external: str) -> str:
        """The request's own id, made unique where a client repeats one."""
        if external and len(external) <= 128 and external not in self.live:
            return external
        return f"{external[:100]}#{next(self._number)}"

    def available(self, allowed: Sequence[str] | None) -> list[str]:
        """Candidates with an endpoint, of those that the data plane allows."""
        if allowed is None:
            return list(self.endpoint)
        return [name for name, address in self.endpoint.items() if address in allowed]

    def name_at(self, address: str) -> str:
        """Candidate behind an address; empty if none is."""
        return self.desk.name_at.get(address, "")

    def hashed(self, call: chat.Call | None, tokens: int) -> tuple[list[int], float]:
        """Block hashes of a prompt, where the bundle has a use for them, and tokens per block."""
        if call is None or self._block_bytes == 0 or not self.gateway.state.hashes_prompts:
            return [], 0.0
        return chat.hashed(call.data, self._block_bytes, tokens)

    def pick(self, part: str, decision: Decision, call: dict[str, Any] | None) -> Message:
        """The message that sends a request where the decision says; `call` is its body, where it was read."""
        address = self.endpoint[decision.name]
        body = None if call is None else self._renamed(decision, call)
        if address.startswith(CLUSTER):
            return self.messages.pick(part, "", address.removeprefix(CLUSTER), body)
        second = self.endpoint.get(decision.runner_up, CLUSTER) if self.settings.retry_next else CLUSTER
        endpoints = address if second.startswith(CLUSTER) else f"{address},{second}"
        return self.messages.pick(part, endpoints, body=body)

    def _renamed(self, decision: Decision, call: dict[str, Any]) -> bytes | None:
        """The body with the name by which its candidate knows the model; None if that is what it says."""
        layout = self.gateway.bundle.layout
        tier = int(layout.tier[layout.names.index(decision.name)])
        models = self.settings.models
        model = models.get(decision.name) or (models.get(layout.tier_names[tier]) if tier >= 0 else None)
        if model is None or call.get("model") == model:
            return None
        return chat.dumps({**call, "model": model})

    def finished(self, exchange: Exchange, outcome: Outcome) -> None:
        """A request has ended."""
        self.live.pop(exchange.id, None)
        if outcome.prompt_tokens:
            ratio = self.per_character if exchange.read else self.per_byte
            ratio.learn(exchange.length, outcome.prompt_tokens)
        self.gateway.finished(exchange.id, outcome)

    def end_later(self, exchange: Exchange) -> None:
        """Nothing but an access log will report the end of this request: without one, it is assumed after a while."""
        self._waiting.append((time.monotonic() + self.settings.assumed_answer_s, exchange))

    def sweep(self, now_s: float) -> None:
        """Ends what was assumed to end by now, and forgets what the gateway has written off."""
        due = [exchange for at_s, exchange in self._waiting if at_s <= now_s]
        self._waiting = [item for item in self._waiting if item[0] > now_s]
        for exchange in () if self.has_access_log else due:
            exchange.over(Outcome("completed", served_by=exchange.served))
            exchange.settle()
        for id in [id for id in self.live if self.gateway.arrived_at_s(id) is None]:
            del self.live[id]


async def process(picker: Picker, context: Any) -> None:
    """One ext_proc stream: one HTTP request."""
    import grpc

    exchange = Exchange(picker)
    try:
        while (message := await context.read()) is not grpc.aio.EOF:
            for answer in exchange.on(message):
                await context.write(answer)
            while exchange.waits:
                for answer in await exchange.turn():
                    await context.write(answer)
            exchange.settle()
    finally:
        exchange.closed()


async def follow_access_log(picker: Picker, entries: AsyncIterator[Any]) -> None:
    """One stream of Envoy's access log."""
    picker.access_logs += 1
    try:
        async for message in entries:
            try:
                envoy_access_log.take(picker, message)
            except Exception as error:
                picker.desk.failed("an access log entry", error)
    finally:
        picker.access_logs -= 1


class Server:
    """The gRPC server around a picker.

    Args:
        picker: decides.
        listen: where; TLS where that is not this machine.
    """

    def __init__(self, picker: Picker, listen: Listen) -> None:
        import grpc
        from envoy.service.accesslog.v3 import als_pb2, als_pb2_grpc
        from envoy.service.ext_proc.v3 import external_processor_pb2_grpc
        from grpc_health.v1 import health, health_pb2, health_pb2_grpc

        self.picker = picker

        class Processor(external_processor_pb2_grpc.ExternalProcessorServicer):  # type: ignore[misc]
            async def Process(self, request_iterator: Any, context: Any) -> None:  # noqa: N802
                await process(picker, context)

        class AccessLog(als_pb2_grpc.AccessLogServiceServicer):  # type: ignore[misc]
            async def StreamAccessLogs(self, request_iterator: Any, context: Any) -> Any:  # noqa: N802
                await follow_access_log(picker, request_iterator)
                return als_pb2.StreamAccessLogsResponse()

        most = picker.settings.max_body_bytes + (1 << 20)
        self._server = grpc.aio.server(options=[("grpc.max_receive_message_length", most)])
        external_processor_pb2_grpc.add_ExternalProcessorServicer_to_server(Processor(), self._server)
        als_pb2_grpc.add_AccessLogServiceServicer_to_server(AccessLog(), self._server)
        self._status = health_pb2.HealthCheckResponse
        self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        try:
            if listen.tls is None:
                self._server.add_insecure_port(listen.grpc_address)
            else:
                key, cert, ca = (None if p is None else Path(p).read_bytes() for p in listen.tls)
                credentials = grpc.ssl_server_credentials([(key, cert)], ca, require_client_auth=ca is not None)
                self._server.add_secure_port(listen.grpc_address, credentials)
        except RuntimeError:  # gRPC does not say why
            raise InputError(f"{listen.text} cannot be listened on; name another address") from None

    async def run(self, stopped: asyncio.Event) -> None:
        """Serves until told to stop; then finishes what is under way."""
        serving, not_serving = self._status.SERVING, self._status.NOT_SERVING
        await self._health.set("liveness", serving)
        await self._server.start()
        for service in ("", "readiness", PROCESSOR):
            await self._health.set(service, serving)
        sweeper = asyncio.create_task(self._sweep())
        await stopped.wait()
        for service in ("", "readiness", PROCESSOR):
            await self._health.set(service, not_serving)
        await self._server.stop(STOP_S)
        sweeper.cancel()

    async def _sweep(self) -> None:
        every_s = min(SWEEP_S, max(self.picker.settings.assumed_answer_s / 4.0, 0.05))
        while True:
            await asyncio.sleep(every_s)
            try:
                self.picker.sweep(time.monotonic())
            except Exception as error:
                self.picker.desk.failed("a sweep", error)


async def _serve(picker: Picker, listen: Listen) -> None:
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    listen.clear()
    server = Server(picker, listen)
    log.warning("marginroute: endpoint picker for Envoy on %s", listen.text)
    try:
        await server.run(stopped)
    finally:
        listen.leave()


def configuration(mode: str, settings: EnvoySettings, listen: Listen, port: int) -> str:
    """A configuration of Envoy for this picker, as YAML.

    Raises:
        InputError: there is no endpoint, or one or the port is not legal.
    """
    import yaml

    if not settings.endpoints:
        raise InputError(NO_ENDPOINTS)
    if not 0 < port < 65536:
        raise InputError(f"--envoy-port {port} is not legal; legal is 1 to 65535")
    trusted = [
        settings.class_header,
        settings.tenant_header,
        settings.standing_header,
        settings.quota_left_header,
    ]
    hold_s = settings.max_hold_s if {"defer", "hold"} & set(settings.can) else 0.0
    made = envoy_config.bootstrap(mode, settings.endpoints, listen, port, trusted, hold_s)
    return str(yaml.safe_dump(made, sort_keys=False, width=110))


def run(settings: EnvoySettings, listen: Listen) -> int:
    """Serves until SIGTERM or SIGINT.

    Raises:
        InputError: the settings, the bundle or the address are unusable, or a package is missing.
    """
    try:
        import envoy.service.ext_proc.v3  # noqa: F401
        import grpc_health.v1  # noqa: F401
    except ImportError as error:
        raise InputError(f"{error.name} is not installed; pip install 'marginroute[envoy]'") from None
    desk = Desk(settings, "envoy-buffered")
    try:
        picker = Picker(desk)
        if settings.metrics:
            desk.gateway.keep(MetricsServer(desk, settings.metrics).start())
        run_loop(_serve(picker, listen))
    finally:
        desk.close()
    return 0
