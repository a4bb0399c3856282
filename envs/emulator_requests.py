"""What a request body asks for, and the bytes of its answer, in OpenAI's formats."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

CHARACTERS_PER_TOKEN = 4
TOKENS_PER_MESSAGE = 4  # role and separators of a chat template
MOST_TOKENS = 10_000_000
WORD = " lorem"  # every token of every answer
FIELD = "emulate"
HEADER = "x-emulate-{}-tokens"  # prompt, output


class RequestError(Exception):
    """A request that gets an error status instead of an answer."""

    def __init__(self, status: int, message: str, code: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.retry_after_s = status, code, retry_after_s


@dataclasses.dataclass(frozen=True)
class Asked:
    """A request to write.

    Attributes:
        chat: /v1/chat/completions rather than /v1/completions.
        stream: Server-sent events.
        include_usage: One last event with the usage.
        prompt_tokens: Given or estimated.
        output_tokens: True length where it was given, else None.
        min_tokens: Shortest answer.
        max_tokens: Longest answer, or None.
    """

    chat: bool
    stream: bool
    include_usage: bool
    prompt_tokens: int
    output_tokens: int | None
    min_tokens: int
    max_tokens: int | None


def _whole(value: Any, place: str, least: int = 1) -> int | None:
    """A count, or None where there is none."""
    if value is None:
        return None
    if isinstance(value, str) and value.isdecimal():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= MOST_TOKENS:
        legal = f"a whole number from {least} to {MOST_TOKENS}"
        raise RequestError(400, f"{place} = {value!r}; legal is {legal}", "invalid_value")
    return value


def _characters(content: Any) -> int:
    """Characters of a message's content: text, or parts of which some are text."""
    if isinstance(content, str):
        return len(content)
    if isinstance(content, list):
        texts = [part.get("text") for part in content if isinstance(part, dict)]
        return sum(len(text) for text in texts if isinstance(text, str))
    return 0


def estimated_tokens(body: dict[str, Any], chat: bool) -> int:
    """Prompt tokens: a quarter of the characters, rounded up, and 4 per message; token ids are counted."""
    if chat:
        messages = body.get("messages")
        if not isinstance(messages, list) or not messages or not all(isinstance(item, dict) for item in messages):
            raise RequestError(400, "messages: legal is a list of one or more messages", "invalid_value")
        characters = sum(_characters(item.get("content")) for item in messages)
        return math.ceil(characters / CHARACTERS_PER_TOKEN) + TOKENS_PER_MESSAGE * len(messages)
    prompt = body.get("prompt")
    if isinstance(prompt, list) and prompt and all(type(token) is int for token in prompt):
        return len(prompt)
    if isinstance(prompt, list) and len(prompt) == 1:
        prompt = prompt[0]
    if not isinstance(prompt, str) or not prompt:
        raise RequestError(400, "prompt: legal is one text, or one list of token ids", "invalid_value")
    return math.ceil(len(prompt) / CHARACTERS_PER_TOKEN)


def parse(raw: bytes, headers: dict[str, str], chat: bool, model: str) -> Asked:
    """Reads a body.

    Raises:
        RequestError: It is no JSON object, names another model, or holds a value that is not legal.
    """
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError):
        body = None
    if not isinstance(body, dict):
        raise RequestError(400, "the body is no JSON object", "invalid_json")
    if body.get("model", model) != model:
        raise RequestError(404, f"The model `{body['model']}` does not exist; legal is {model}", "model_not_found")
    if body.get("n", 1) != 1:
        raise RequestError(400, f"n = {body['n']!r}; legal is 1", "invalid_value")
    given, options = body.get(FIELD) or {}, body.get("stream_options") or {}
    if not isinstance(given, dict) or not isinstance(options, dict):
        raise RequestError(400, f"{FIELD} and stream_options: legal is an object", "invalid_value")
    tokens = {}
    for kind in ("prompt", "output"):
        name, header = f"{kind}_tokens", HEADER.format(kind)
        tokens[kind] = _whole(given.get(name), f"{FIELD}.{name}") or _whole(headers.get(header), f"header {header}")
    most = _whole(body.get("max_completion_tokens"), "max_completion_tokens")
    most = most or _whole(body.get("max_tokens"), "max_tokens")
    estimate = estimated_tokens(body, chat)
    return Asked(
        chat=chat,
        stream=body.get("stream") is True,
        include_usage=options.get("include_usage") is True,
        prompt_tokens=tokens["prompt"] or max(estimate, 1),
        output_tokens=tokens["output"] or (most if body.get("ignore_eos") is True else None),
        min_tokens=_whole(body.get("min_tokens"), "min_tokens", least=0) or 1,
        max_tokens=most,
    )


class Writer:
    """The bytes of one answer.

    Args:
        asked: The request.
        id: Of the answer.
        model: Name of the model.
        created_s: Unix time.
        finish_reason: `stop` or `length`.
    """

    def __init__(self, asked: Asked, id: str, model: str, created_s: int, finish_reason: str) -> None:
        self.asked, self.finish_reason = asked, finish_reason
        self._head = {"id": f"chatcmpl-{id}" if asked.chat else f"cmpl-{id}", "created": created_s, "model": model}
        self._kind = "chat.completion" if asked.chat else "text_completion"
        self._token = self._event([self._choice(WORD, None)])

    def _choice(self, text: str, finish_reason: str | None, role: bool = False) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": 0, "finish_reason": finish_reason}
        if self.asked.chat:
            delta = {"role": "assistant"} if role else {}
            return {**choice, "delta": {**delta, "content": text}}
        return {**choice, "text": text}

    def _event(self, choices: list[Any], usage: dict[str, int] | None = None) -> bytes:
        kind = f"{self._kind}.chunk" if self.asked.chat else self._kind
        data = {**self._head, "object": kind, "choices": choices}
        if usage is not None or self.asked.include_usage:
            data["usage"] = usage
        return b"data: " + json.dumps(data, separators=(",", ":")).encode() + b"\n\n"

    def tokens(self, count: int, first: bool) -> bytes:
        """Events of the next tokens, one each; `first`: preceded by the role."""
        role = self._event([self._choice("", None, role=True)]) if first and self.asked.chat else b""
        return role + self._token * count

    def end(self, output_tokens: int) -> bytes:
        """Last events of a stream."""
        last = self._event([self._choice("", self.finish_reason)])
        if self.asked.include_usage:
            last += self._event([], self._usage(output_tokens))
        return last + b"data: [DONE]\n\n"

    def whole(self, output_tokens: int) -> bytes:
        """The answer in one piece."""
        text, choice = WORD * output_tokens, {"index": 0, "finish_reason": self.finish_reason}
        more = {"message": {"role": "assistant", "content": text}} if self.asked.chat else {"text": text}
        usage = self._usage(output_tokens)
        data = {**self._head, "object": self._kind, "choices": [{**choice, **more}], "usage": usage}
        return json.dumps(data, separators=(",", ":")).encode()

    def _usage(self, output_tokens: int) -> dict[str, int]:
        prompt_tokens = self.asked.prompt_tokens
        total = prompt_tokens + output_tokens
        return {"prompt_tokens": prompt_tokens, "completion_tokens": output_tokens, "total_tokens": total}
