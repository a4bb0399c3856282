"""One HTTP request on its way through Envoy: ext_proc messages in, answers out, and what the gateway is told of it.

Which messages come is up to Envoy's configuration, and the exchange follows it:

    headers only           decided on headers: the length of the body is known, its text is not
    buffered body          decided on the body, which Envoy holds back until then
    full duplex            decided on the body, which is held here until then and passed on piece by piece
    streamed body          decided on headers; the pieces of the body are let through
    observability          decided on the body, a copy of which is sent here; Envoy waits for nothing (shadow mode)

Responses tell as much as they are shown: headers say who answered and whether it failed, the body says when the first
token came, and the usage. Where the end of a response is not shown, Envoy's access log reports it
(`envoy_access_log`).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from marginroute.adapters import chat
from marginroute.adapters import envoy_messages as em
from marginroute.adapters.account import account_of
from marginroute.adapters.answer import Answer
from marginroute.adapters.rate_headers import told_by
from marginroute.adapters.turn import turn_of
from marginroute.facts import Facts, Outcome, Verdict

if TYPE_CHECKING:
    from marginroute.adapters.envoy import Picker

Message = Any

TELL_EVERY = 16  # tokens of a stream between two reports


def status_of(code: int) -> str:
    """What a response code says of the candidate: a client's own mistake (400, 404, ...) says nothing."""
    if 200 <= code < 400:
        return "completed"
    return "failed" if code in (0, 408, 429) or code >= 500 else "abandoned"


class Exchange:
    """Follows one request.

    Args:
        picker: what all exchanges share.

    Attributes:
        id: of the request; empty until it is decided.
        verdict: the decision; None for calls that ask no model for text.
        length: of the prompt, in characters if its text was read, else in bytes.
        read: whether its text was read.
    """

    def __init__(self, picker: Picker) -> None:
        self.id = ""
        self.verdict: Verdict | None = None
        self.length, self.read = 0, False
        self._picker, self._messages = picker, picker.messages
        self._arrived_s, self._over = time.monotonic(), False
        self._headers: dict[str, str] = {}
        self._allowed: list[str] | None = None
        self._request_mode = self._response_mode = em.NONE
        self._body, self._passing, self._observed = bytearray(), False, False
        self._served, self._code, self._told = "", 0, 0
        self._answer = Answer()
        self._due: Outcome | None = None
        self._asked: Facts | None = None
        self._later: Callable[[], list[Message]] | None = None

    def on(self, message: Message) -> list[Message]:
        """The answers to one message, in order."""
        part = message.WhichOneof("request")
        if part == "request_headers":
            answers = self._on_request_headers(message)
        elif part == "request_body":
            answers = self._on_request_body(message.request_body)
        elif part == "response_headers":
            answers = self._on_response_headers(message)
        elif part == "response_body":
            answers = self._on_response_body(message.response_body)
        elif part == "request_trailers":
            held = not self._passing and (self._full_duplex or self._observed)
            answers = [*(self._release(end=False) if held else []), self._messages.go_on[part]]
        else:
            self._end(status_of(self._code))
            answers = [self._messages.go_on[part]]
        return [] if message.observability_mode else answers

    @property
    def waits(self) -> bool:
        """Whether the request is held back: nothing is answered until its turn has come."""
        return self._later is not None

    async def turn(self) -> list[Message]:
        """Waits until the request may go on, for `max_hold_s` at most; the answers that were due then."""
        later = self._later
        assert later is not None
        if (turn := turn_of(self._picker.gateway, self.id)) is not None:
            left_s = self._arrived_s + self._picker.settings.max_hold_s - time.monotonic()
            done, _ = await asyncio.wait({turn}, timeout=max(left_s, 0.0))
            if not done and self._picker.gateway.on_line(self.id, None):
                self._later = None
                self.over(Outcome("shed", e2e_s=time.monotonic() - self._arrived_s))
                return [self._messages.refuse(429, "over capacity; try again later", 1.0)]
        self._later = None
        return later()

    def closed(self) -> None:
        """Envoy has no more messages: all are seen, or the client or the engine is gone."""
        self._body.clear()
        if self._later is not None:
            self._later = None
            self.over(Outcome("abandoned", e2e_s=time.monotonic() - self._arrived_s))
        self.settle()
        if self._over or self.verdict is None:
            return
        if self._response_mode == em.NONE:
            self._picker.end_later(self)  # unless the access log tells before
        elif not self._picker.has_access_log:
            self._end("abandoned")
            self.settle()

    def settle(self) -> None:
        """What can wait until the answers of `on` are on their way: the record of a request that has ended."""
        if self._due is not None:
            due, self._due = self._due, None
            self._picker.finished(self, due)

    def over(self, outcome: Outcome) -> None:
        """The request has ended; only the first report counts. `settle` passes it on."""
        if not self._over:
            self._over, self._due = True, outcome

    @property
    def served(self) -> str:
        """Candidate that answers, as far as is known."""
        return self._served

    @property
    def _full_duplex(self) -> bool:
        return self._request_mode == em.FULL_DUPLEX

    def _on_request_headers(self, message: Message) -> list[Message]:
        config = message.protocol_config
        self._request_mode, self._response_mode = config.request_body_mode, config.response_body_mode
        self._headers = em.headers(message.request_headers)
        self._allowed = em.subset(message)
        self._observed = message.observability_mode  # Envoy does not say then which bodies it will send
        waits = self._observed or self._request_mode not in (em.NONE, em.STREAMED)
        if waits and not message.request_headers.end_of_stream:
            return [] if self._full_duplex else [self._messages.go_on["request_headers"]]
        self._passing = True
        return self._answers("request_headers", b"")

    def _on_request_body(self, part: Message) -> list[Message]:
        if self._request_mode in (em.BUFFERED, em.BUFFERED_PARTIAL):
            return self._answers("request_body", part.body)
        if self._passing:
            if self._full_duplex:
                return list(self._messages.stream("request_body", part.body, part.end_of_stream))
            return [self._messages.go_on["request_body"]]
        self._body += part.body
        if part.end_of_stream or len(self._body) > self._picker.settings.max_body_bytes:
            return self._release(part.end_of_stream)
        return []

    def _answers(self, part: str, body: bytes) -> list[Message]:
        """The answer to `part`; while the request is held back, a plea for time."""
        answer = self._decide(part, body)
        if answer is not None:
            return [answer]
        self._later = lambda: self._answers(part, body)
        return [self._messages.patience(self._picker.settings.max_hold_s)]

    def _release(self, end: bool) -> list[Message]:
        """Decides on what is held of the body, and passes it on; what comes later of a longer one follows unread."""
        body, self._passing = bytes(self._body), True
        self._body = bytearray()
        return self._pass_on(body, end)

    def _pass_on(self, body: bytes, end: bool) -> list[Message]:
        first = self._decide("request_headers", body)
        if first is None:
            self._later = lambda: self._pass_on(body, end)
            return []  # Envoy keeps no time in full duplex
        if first.WhichOneof("response") == "immediate_response":
            return [first]
        if first.request_headers.response.HasField("body_mutation"):
            body = first.request_headers.response.body_mutation.body
            first.request_headers.response.ClearField("body_mutation")
        return [first, *self._messages.stream("request_body", body, end)]

    def _decide(self, part: str, body: bytes) -> Message | None:
        """The pick, or a refusal, or a nod if it needs none or the bundle does not act on it; None: it has to wait."""
        if not chat.is_generation(self._headers.get(":path", "")):
            return self._messages.go_on[part]
        try:
            return self._decided(part, body)
        except Exception as error:  # the request goes on as without us
            self._picker.desk.failed("a decision", error)
            return self._messages.go_on[part]

    def _decided(self, part: str, body: bytes) -> Message | None:
        picker = self._picker
        if self._observed and picker.settings.mode != "shadow":
            picker.desk.warn_once("Envoy only lets us observe, so nothing is decided; run in shadow mode")
            return self._messages.go_on[part]
        read = chat.read_call(body) if body else None
        call = None if read is None else read[0]
        self.read = call is not None
        self.length = call.characters if call else len(body) or _number(self._headers.get("content-length"))
        facts = self._facts(call) if self._asked is None else self._asked
        self.id = facts.id
        picker.live[self.id] = self
        self.verdict = picker.desk.decide(facts)
        decision = self.verdict.decision
        if not self.verdict.acting:
            return self._messages.go_on[part]
        waits = self.verdict.held
        if not waits and decision.name not in picker.endpoint:
            return self._refuse(facts)
        if not waits:
            self._served = decision.name
            shows_tokens = self._response_mode != em.NONE and (call is None or call.streamed)
            waits = picker.gateway.sent(self.id, decision.name, streamed=shows_tokens)
        if waits:
            self._asked = facts
            return None
        return picker.pick(part, decision, None if read is None else read[1])

    def _refuse(self, facts: Facts) -> Message:
        """429 if the bundle sheds the request, 503 if there was nothing to choose from."""
        assert self.verdict is not None
        self.over(Outcome("shed", e2e_s=time.monotonic() - self._arrived_s))
        if facts.available is not None and not facts.available:
            return self._messages.refuse(503, "no endpoint is ready for this request")
        return self._messages.refuse(429, "over capacity; try again later", self.verdict.retry_after_s)

    def _facts(self, call: chat.Call | None) -> Facts:
        picker, told = self._picker, self._headers
        names = picker.settings
        ratio = picker.per_character if call is not None else picker.per_byte
        tokens = ratio.tokens(self.length)
        hashes, block_tokens = picker.hashed(call, tokens)
        task = told.get(names.task_header) or (call.metadata.get(names.task_field) if call else None)
        standing, quota_left, complaint = account_of(told.get(names.standing_header), told.get(names.quota_left_header))
        if complaint:
            picker.desk.warn_once(complaint)
        return Facts(
            id=picker.new_id(told.get("x-request-id", "")),
            prompt_tokens=tokens,
            class_name=picker.desk.known("class", told.get(names.class_header)),
            task_name=picker.desk.known("task", task),
            tenant=told.get(names.tenant_header, ""),
            session=told.get(names.session_header, ""),
            traceparent=told.get("traceparent", "")[:100],
            available=picker.available(self._allowed),
            standing=standing,
            quota_left=quota_left,
            hashes=hashes,
            block_tokens=block_tokens,
            prompt=call.question if call and picker.gateway.bundle.predictor is not None else None,
        )

    def _on_response_headers(self, message: Message) -> list[Message]:
        if not self._passing and self._observed:
            self._release(end=True)  # of a body that is not shown
        told = em.headers(message.response_headers)
        self._code = _number(told.get(":status"))
        self._answer.streamed = told.get("content-type", "").startswith("text/event-stream")
        if self.verdict is not None and not self._over:
            served = self._picker.name_at(em.served_by(message))
            if served and served != self._served:  # its own choice in shadow mode, or a retry elsewhere
                self._served = served
                streamed = self._answer.streamed and self._response_mode != em.NONE
                self._picker.gateway.sent(self.id, served, streamed)
            if self._served and (limits := told_by(self._code, told)):
                self._picker.gateway.rate_limit_told(self._served, **limits)
            if message.response_headers.end_of_stream:
                self._end(status_of(self._code))
        return [self._messages.go_on["response_headers"]]

    def _on_response_body(self, part: Message) -> list[Message]:
        self._response_mode = self._response_mode or em.STREAMED
        if self.verdict is not None and not self._over:
            answer, gateway = self._answer, self._picker.gateway
            if answer.saw(part.body, time.monotonic()) and answer.streamed:
                gateway.first_token(self.id)
            if answer.events >= self._told + TELL_EVERY:
                self._told = answer.events
                gateway.progress(self.id, answer.events)
            if part.end_of_stream:
                self._end(status_of(self._code))
        if self._response_mode == em.FULL_DUPLEX:
            return list(self._messages.stream("response_body", part.body, part.end_of_stream))
        return [self._messages.go_on["response_body"]]

    def _end(self, status: str) -> None:
        if self.verdict is None or self._over:
            return
        now_s, first_s = time.monotonic(), self._answer.first_s
        prompt_tokens, output_tokens = self._answer.usage() if status == "completed" else (None, None)
        ttft_s = first_s - self._arrived_s if first_s is not None and self._answer.streamed else None
        e2e_s = now_s - self._arrived_s
        self.over(
            Outcome(
                status,
                served_by=self._served if status == "completed" else "",
                ttft_s=ttft_s,
                e2e_s=e2e_s,
                attempt_ttft_s=ttft_s,
                attempt_e2e_s=e2e_s,
                prompt_tokens=prompt_tokens,
                output_tokens=output_tokens,
            )
        )


def _number(text: str | None) -> int:
    """A count that a header states; 0 if it states none."""
    return int(text) if text is not None and text.isascii() and text.isdigit() and len(text) < 13 else 0
