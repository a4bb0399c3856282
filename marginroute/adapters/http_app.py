"""The sidecar's calls, as a plain ASGI application; free of servers and sockets."""

from __future__ import annotations

import asyncio
import hmac
import json
import math
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping
from http import HTTPStatus
from typing import Any

from marginroute.adapters import chat, http_api, metrics, schema
from marginroute.adapters.desk import Desk
from marginroute.adapters.http_head import Head
from marginroute.adapters.turn import turn_of
from marginroute.control_loop import Report
from marginroute.errors import InputError
from marginroute.facts import Facts, Outcome, Trial, Verdict
from marginroute.view import Layout

Send = Callable[[dict[str, Any]], Awaitable[None]]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Post = Callable[[Any], dict[str, Any]]

JSON, TEXT = b"application/json", b"text/plain; version=0.0.4; charset=utf-8"
OUTCOME = ("ttft_s", "e2e_s", "attempt_ttft_s", "attempt_e2e_s", "prompt_tokens", "output_tokens", "cost_usd")
MOST_FORGOTTEN = 1000  # prompts whose request is not under way any more, before their lengths are dropped


PHRASES = {status: HTTPStatus(status).phrase.encode() for status in (200, 400, 409, 422, 500, 503)}


class TooLargeError(Exception):
    """A body beyond the limit."""


class App:
    """Answers calls.

    Args:
        desk: decides.
        max_body_bytes: of a request.
        token: that clients must show; empty: none.

    Attributes:
        stopping: says that no further request should be sent here.
    """

    def __init__(self, desk: Desk, max_body_bytes: int = 1 << 20, token: str = "") -> None:
        self.desk, self.stopping = desk, False
        self._gateway, self._max_body_bytes = desk.gateway, max_body_bytes
        self._token = token.encode()
        self._ratio = chat.TokenRatio()
        self._characters: dict[str, int] = {}  # of the prompts of requests under way whose tokens were estimated
        self._block_bytes = round(desk.settings.prefix_block_tokens / chat.TOKENS_PER_CHARACTER)
        self._api: tuple[Layout, schema.Schema, schema.Schema] | None = None
        self._posts: dict[str, Post] = {
            "/v1/decide": self.decide,
            "/v1/events": self.events,
            "/v1/hedge": self.hedge,
        }
        self._gets: dict[str, Callable[[], tuple[int, bytes, bytes]]] = {
            "/v1/scale": self._scale,
            "/v1/status": lambda: (200, JSON, json.dumps(self._gateway.status()).encode()),
            "/metrics": lambda: (200, TEXT, metrics.exposition(self.desk)),
        }
        self._open: dict[str, Callable[[], tuple[int, bytes, bytes]]] = {
            "/health": lambda: (200, JSON, b'{"status":"alive"}'),
            "/ready": lambda: (
                (503, JSON, b'{"status":"stopping"}') if self.stopping else (200, JSON, b'{"status":"ready"}')
            ),
            "/openapi.json": self._document,
        }

    async def __call__(self, scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        """One call."""
        if scope["type"] != "http":
            return
        status, kind, body = 500, JSON, b""
        more: list[tuple[bytes, bytes]] = []
        try:
            status, kind, body, more = await self._answer(scope, receive)
        except TooLargeError:
            status, body = 413, error(f"the body is larger than {self._max_body_bytes} bytes")
            more = [(b"connection", b"close")]
        except ConnectionError:
            return
        except Exception as exception:  # the caller has its own fallback
            self.desk.failed(f"call of {scope['path'][:40]}", exception)
            body = error("the decision failed; route as without us")
        headers = [(b"content-type", kind), (b"content-length", str(len(body)).encode()), *more]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else body})

    async def _answer(self, scope: Mapping[str, Any], receive: Receive) -> tuple[int, bytes, bytes, list[Any]]:
        path, method = scope["path"], scope["method"]
        if path not in self._open and not self._may_enter(_authorization(scope["headers"])):
            return 401, JSON, error("the token is missing or wrong"), [(b"www-authenticate", b"Bearer")]
        post = self._posts.get(path)
        if post is not None and method == "POST":
            return await self._posted(post, await self._body(scope["headers"], receive), receive)
        get = self._gets.get(path) or self._open.get(path)
        if get is not None and method in ("GET", "HEAD"):
            return *get(), []
        if get is None and post is None:
            return 404, JSON, error("there is no such path; /openapi.json lists them"), []
        allowed = b"POST" if post is not None else b"GET, HEAD"
        return 405, JSON, error("this path takes another method"), [(b"allow", allowed)]

    async def _posted(self, post: Post, data: bytes, receive: Receive) -> tuple[int, bytes, bytes, list[Any]]:
        status, answer, asked = self._reply(post, data)
        if answer.get("held"):
            try:
                answer = await self._turn(asked, answer, receive)
            except InputError as problem:
                status, answer = 422, {"error": str(problem)}
        return status, JSON, schema.dumps(answer), []

    def _reply(self, post: Post, data: bytes) -> tuple[int, dict[str, Any], Any]:
        """Status and body of an answer, and what was asked."""
        try:
            asked = schema.parse(data)
        except InputError as problem:
            return 400, {"error": str(problem)}, None
        try:
            return 200, post(asked), asked
        except InputError as problem:
            return 422, {"error": str(problem)}, asked

    def at_once(self, head: Head) -> bool:
        """Whether the answer to a plain request needs nobody to wait: `answer_at_once` may be called then.

        That saves a server the task and the messages of ASGI, which cost as much as a decision.
        """
        path, is_open = head.path, head.path in self._open
        if head.method == b"POST":
            fits = path in self._posts and head.length <= self._max_body_bytes and self._gateway.holding is None
        else:
            fits = is_open or path in self._gets
        return fits and (is_open or self._may_enter(head.authorization))

    def answer_at_once(self, head: Head, data: bytes) -> bytes:
        """The whole HTTP response to a request for which `at_once` is true."""
        path, kind = head.path, JSON
        try:
            if head.method == b"POST":
                status, answer, _ = self._reply(self._posts[path], data)
                body = schema.dumps(answer)
            else:
                status, kind, body = (self._gets.get(path) or self._open[path])()
        except Exception as exception:  # the caller has its own fallback
            self.desk.failed(f"call of {path}", exception)
            status, body = 500, error("the decision failed; route as without us")
        head_of_it = b"HTTP/1.1 %d %b\r\ncontent-type: %b\r\ncontent-length: %d\r\n\r\n"
        return head_of_it % (status, PHRASES[status], kind, len(body)) + body

    def _schemas(self) -> tuple[schema.Schema, schema.Schema]:
        """What the two calls take, for the bundle that decides now."""
        layout = self._gateway.bundle.layout
        if self._api is None or self._api[0] is not layout:
            self._api = layout, http_api.decide_schema(layout), http_api.events_schema(layout)
        return self._api[1:]

    def _document(self) -> tuple[int, bytes, bytes]:
        document = http_api.document(self._gateway.bundle.layout, self._token != b"")
        return 200, JSON, json.dumps(document).encode()

    def _may_enter(self, authorization: bytes) -> bool:
        """Whether the token is shown, or none is asked for; the scheme's case is free (RFC 9110, 11.1)."""
        scheme, _, token = authorization.partition(b" ")
        return not self._token or (scheme.lower() == b"bearer" and hmac.compare_digest(token.strip(), self._token))

    async def _body(self, headers: list[tuple[bytes, bytes]], receive: Receive) -> bytes:
        for name, value in headers:
            if name == b"content-length" and int(value) > self._max_body_bytes:
                raise TooLargeError
        data, more = b"", True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ConnectionError
            data += message.get("body", b"")
            more = message.get("more_body", False)
            if len(data) > self._max_body_bytes:
                raise TooLargeError
        return data

    def decide(self, asked: Any) -> dict[str, Any]:
        """`POST /v1/decide`.

        Raises:
            InputError: the request is not what the API takes.
        """
        schema.check(asked, self._schemas()[0])
        facts, streamed = self._facts(asked), asked.get("streamed", False)
        verdict = self.desk.decide(facts)
        decision, held = verdict.decision, verdict.held
        if verdict.acting and asked.get("sent", True) and decision.kind in ("replica", "provider"):
            held = self._gateway.sent(facts.id, decision.name, streamed)
        return self._said(facts.id, verdict, held, asked.get("explain", False))

    def hedge(self, asked: Any) -> dict[str, Any]:
        """`POST /v1/hedge`.

        Raises:
            InputError: the request is not what the API takes.
        """
        schema.check(asked, http_api.hedge_schema(self._gateway.bundle.layout))
        id, gateway = asked["id"], self._gateway
        verdict = gateway.hedge(id, asked.get("available", tuple(self.desk.endpoint) or None))
        waits = verdict is None or verdict.decision.name == gateway.sent_to(id)
        said: dict[str, Any] = {"id": id, "wait": waits, "candidate": "", "endpoint": "", "acting": False}
        if verdict is not None:
            found = self._said(id, verdict, False, asked.get("explain", False))
            said |= {"acting": verdict.acting} if waits else {name: found[name] for name in said if name in found}
            said |= {name: x for name, x in found.items() if name in ("reason_usd", "runner_up", "runner_up_usd")}
        return said

    async def _turn(self, asked: dict[str, Any], answer: dict[str, Any], receive: Receive) -> dict[str, Any]:
        """Keeps the caller on the line until its request may go on, for `wait_s` at most."""
        loop, id = asyncio.get_running_loop(), answer["id"]
        asked, until_s = {**asked, "id": id}, loop.time() + asked.get("wait_s", 0.0)
        gone = asyncio.ensure_future(receive())
        try:
            while answer["held"] and loop.time() < until_s:
                if (turn := turn_of(self._gateway, id)) is not None:
                    either: set[asyncio.Future[Any]] = {turn, gone}
                    await asyncio.wait(either, timeout=until_s - loop.time(), return_when=asyncio.FIRST_COMPLETED)
                    waits = self._gateway.on_line(id, None)
                    if gone.done():
                        if not waits:  # its turn has come too late
                            self._gateway.finished(id, Outcome("abandoned"))
                        raise ConnectionError
                answer = self.decide(asked)
        finally:
            gone.cancel()
        return answer

    def _scale(self) -> tuple[int, bytes, bytes]:
        """`GET /v1/scale`: replicas wanted; none while the controller must not act."""
        status, _, body = metrics.scale(self._gateway)
        return status, JSON, body

    def _said(self, id: str, verdict: Verdict, held: bool, explain: bool) -> dict[str, Any]:
        decision = verdict.decision
        said = {
            "id": id,
            "candidate": decision.name,
            "kind": decision.kind,
            "endpoint": self.desk.endpoint.get(decision.name, ""),
            "acting": verdict.acting,
            "held": held,
            "attempt": verdict.attempt,
            "retry_after_s": verdict.retry_after_s,
            "policy": decision.policy,
            "guard": decision.guard,
        }
        if explain:
            said["reason_usd"] = {part: usd for part, usd in decision.reason_usd.items() if math.isfinite(usd)}
            said |= {"runner_up": decision.runner_up, "runner_up_usd": decision.runner_up_usd}
            said["probability"] = decision.probability
        return said

    def _facts(self, asked: Mapping[str, Any]) -> Facts:
        id = asked.get("id") or uuid.uuid4().hex
        prompt = asked["messages"] if "messages" in asked else asked.get("prompt")
        texts = list(chat.texts(prompt)) if prompt is not None else []
        tokens = asked.get("prompt_tokens")
        if tokens is None:
            characters = sum(map(len, texts))
            self._remember(id, characters)
            tokens = self._ratio.tokens(characters)
        hashes, block_tokens = self._hashed(texts, tokens)
        return Facts(
            id=id,
            prompt_tokens=tokens,
            class_name=self.desk.known("class", asked.get("class")),
            task_name=self.desk.known("task", asked.get("task")),
            tenant=asked.get("tenant", ""),
            session=asked.get("session", ""),
            traceparent=asked.get("traceparent", ""),
            available=asked.get("available", tuple(self.desk.endpoint) or None),
            cached_tier=asked.get("cached_tier"),
            similarity=float(asked.get("similarity", 1.0)),
            entry_age_s=float(asked.get("entry_age_s", 0.0)),
            difficulty_signal=float(asked.get("difficulty_signal", 0.0)),
            deadline_left_s=float(asked.get("deadline_left_s", math.inf)),
            standing=asked.get("standing", "within"),
            quota_left=float(asked.get("quota_left", 1.0)),
            hashes=hashes,
            block_tokens=block_tokens,
            trial=_trial(asked.get("trial")),
            prompt=chat.question(prompt) if texts and self._gateway.bundle.predictor is not None else None,
        )

    def _hashed(self, texts: list[str], tokens: int) -> tuple[list[int], float | None]:
        if not texts or self._block_bytes == 0 or not self._gateway.state.hashes_prompts:
            return [], None
        data = b"\0".join(text.encode("utf-8", "replace") for text in texts)
        return chat.hashed(data, self._block_bytes, tokens)

    def _remember(self, id: str, characters: int) -> None:
        self._characters[id] = characters
        while len(self._characters) > self._gateway.pending + MOST_FORGOTTEN:
            self._characters.pop(next(iter(self._characters)))

    def events(self, told: Any) -> dict[str, Any]:
        """`POST /v1/events`: all of them are taken, or none if one is not legal.

        Raises:
            InputError: one is not.
        """
        schema.check(told, self._schemas()[1])
        return {"known": sum(self._take(event) for event in told["events"])}

    def _take(self, event: Mapping[str, Any]) -> bool:
        gateway, kind, id = self._gateway, event["event"], event.get("id", "")
        if kind == "replicas":
            figures = (float(event.get(name, 0.0)) for name in ("ready", "starting", "draining", "next_ready_s"))
            return gateway.reported(event["pool"], Report(*figures))
        if kind == "scraped":
            waiting, running, kv_usage = (float(event[name]) for name in ("waiting", "running", "kv_usage"))
            index = gateway.bundle.layout.names.index(event["candidate"])
            gateway.state.scraped(index, waiting, running, kv_usage, float(event.get("ago_s", 0.0)))
            return True
        if kind == "rate_limit":
            told = {key: float(x) for key, x in event.items() if key not in ("event", "candidate")}
            return gateway.rate_limit_told(event["candidate"], **told)
        if kind == "judged":
            return gateway.judged(id, event["good"])
        if gateway.arrived_at_s(id) is None:
            return False
        if kind == "sent":
            gateway.sent(id, event["candidate"], event.get("streamed", False))
        elif kind == "first_token":
            gateway.first_token(id, float(event.get("ago_s", 0.0)), event.get("candidate", ""))
        elif kind == "progress":
            gateway.progress(id, event["tokens"])
        elif kind == "attempt_failed":
            gateway.attempt_failed(id, event.get("candidate", ""), event.get("retry_after_s"))
        else:
            self._finished(id, event)
        return True

    def _finished(self, id: str, event: Mapping[str, Any]) -> None:
        characters = self._characters.pop(id, 0)
        self._ratio.learn(characters, event.get("prompt_tokens", 0))
        arrived_s = self._gateway.arrived_at_s(id)
        figures = {name: event.get(name) for name in OUTCOME}
        if figures["e2e_s"] is None and arrived_s is not None:
            figures["e2e_s"] = max(time.time() - arrived_s, 0.0)
        self._gateway.finished(id, Outcome(event["status"], event.get("served_by", ""), **figures))


def _authorization(headers: list[tuple[bytes, bytes]]) -> bytes:
    return next((value for name, value in headers if name == b"authorization"), b"")


def _trial(asked: Mapping[str, Any] | None) -> Trial | None:
    """What a verifier has turned down, if anything."""
    if asked is None or not asked["tiers"]:
        return None
    waited_s, age_s = float(asked.get("waited_s", 0.0)), float(asked.get("age_s", 0.0))
    return Trial(tuple(asked["tiers"]), float(asked["score"]), waited_s, age_s)


def error(text: str) -> bytes:
    """The body of a refusal."""
    return json.dumps({"error": text}).encode()
