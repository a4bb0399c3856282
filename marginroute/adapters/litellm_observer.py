"""What LiteLLM tells its callbacks, translated into the life of a request; free of LiteLLM itself.

Prompts are counted, hashed in blocks of their UTF-8 bytes (a gateway has no tokeniser), and read once by the bundle's
quality predictor if it has one; they are never kept. Nothing here is allowed to fail a request: the callback catches
what is raised.
"""

from __future__ import annotations

import datetime
import json
import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from marginroute.facts import Facts, Outcome
from marginroute.gateway import Gateway
from marginroute.latency import running_mean
from marginroute.operation import OperationSettings
from marginroute.prefix_index import MAX_BLOCKS, block_hashes

log = logging.getLogger("marginroute.litellm")

GENERATION = ("acompletion", "atext_completion", "aresponses", "anthropic_messages", "completion", "responses")
TOKENS_PER_CHARACTER = 0.25  # English prose; corrected by the usage that upstreams report
RECENT_PROMPTS = 200.0


@dataclass(frozen=True)
class Settings(OperationSettings):
    """What the operator sets, beside what every adapter knows.

    Attributes:
        class_field: key of the metadata of a virtual key or team that names the customer class.
        default_class: class of requests without it; empty: the bundle's first.
        task_field: key of the request's own metadata that names the task type.
        default_task: task type of requests without it; empty: the bundle's first.
        candidates: candidate by deployment id or by LiteLLM model name, for deployments without
            `model_info.marginroute_candidate`.
    """

    class_field: str = "customer_class"
    default_class: str = ""
    task_field: str = "task_type"
    default_task: str = ""
    candidates: Mapping[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class _Call:
    """A decided request: characters of its prompt, and LiteLLM's logging object while a first token is awaited."""

    characters: int
    awaited: Any = None


class Observer:
    """Follows every request through the hooks of LiteLLM.

    Args:
        gateway: decides and records.
        settings: of the operator.

    Attributes:
        errors: exceptions of ours by hook; none of them reached a request.
    """

    def __init__(self, gateway: Gateway, settings: Settings) -> None:
        self.gateway, self.settings = gateway, settings
        self.errors: dict[str, int] = {}
        self._warned: set[str] = set()
        self._calls: dict[str, _Call] = {}  # in order of decision
        self._tokens_per_character, self._weight = TOKENS_PER_CHARACTER, 1.0
        self._block_bytes = round(settings.prefix_block_tokens / TOKENS_PER_CHARACTER)

    def failed(self, hook: str, error: Exception) -> None:
        """Counts an exception of ours, and logs the first of each hook."""
        self.errors[hook] = self.errors.get(hook, 0) + 1
        if self.errors[hook] == 1:
            log.warning("marginroute: %s failed; later ones are only counted (%r)", hook, error)

    def decide(self, deployments: list[dict[str, Any]], messages: Any, kwargs: Mapping[str, Any]) -> None:
        """An attempt is about to be routed; the first attempt of a request is decided."""
        id, logging_obj = kwargs.get("litellm_call_id"), kwargs.get("litellm_logging_obj")
        call_type = str(getattr(logging_obj, "call_type", None) or GENERATION[0])
        if not id or call_type not in GENERATION or kwargs.get("no-log") is True:
            return
        self._see_first_tokens()
        available = {c for d in deployments if (c := self._candidate(d.get("model_info"), _model(d)))}
        prompt = messages if _count_characters(messages) else _body(kwargs)
        characters = _count_characters(prompt)
        hashes, tokens_per_byte = self._hashes(prompt, kwargs.get("tools"), characters)
        if id in self._calls:
            return
        facts = Facts(
            id,
            max(round(characters * self._tokens_per_character), 1),
            class_name=self._known("class", _customer_class(kwargs, self.settings.class_field)),
            task_name=self._known("task", _requester(kwargs).get(self.settings.task_field)),
            available=available,
            hashes=hashes,
            block_tokens=self._block_bytes * tokens_per_byte,
            prompt=None if self.gateway.bundle.predictor is None else _question(messages) or _question(_body(kwargs)),
        )
        self.gateway.decide(facts)
        self._calls[id] = _Call(characters)

    def sent(self, kwargs: Mapping[str, Any]) -> None:
        """An attempt leaves for the deployment that LiteLLM picked."""
        id, streamed = kwargs.get("litellm_call_id", ""), kwargs.get("stream") is True
        candidate = self._candidate(kwargs.get("model_info"), str(kwargs.get("model")))
        if not candidate:
            return
        self.gateway.sent(id, candidate, streamed)
        if streamed and id in self._calls:
            self._calls[id].awaited = kwargs.get("litellm_logging_obj")

    def attempt_failed(self, kwargs: Mapping[str, Any]) -> None:
        """An attempt failed; LiteLLM may try again."""
        id = kwargs.get("litellm_call_id", "")
        if id in self._calls:
            self._calls[id].awaited = None
        self.gateway.attempt_failed(id)

    def request_failed(self, data: Mapping[str, Any]) -> None:
        """LiteLLM gave up on a request."""
        id = data.get("litellm_call_id", "")
        arrived_at_s = self.gateway.arrived_at_s(id)
        self._calls.pop(id, None)
        if arrived_at_s is not None:
            self.gateway.finished(id, Outcome("failed", e2e_s=max(time.time() - arrived_at_s, 0.0)))

    def completed(self, kwargs: Mapping[str, Any]) -> None:
        """An answer is complete."""
        payload = kwargs["standard_logging_object"]
        id = kwargs.get("litellm_call_id") or payload["litellm_call_id"]
        arrived_at_s = self.gateway.arrived_at_s(id)
        call = self._calls.pop(id, None)
        if arrived_at_s is None or call is None:
            return
        end_s, sent_s = float(payload["endTime"]), float(payload["startTime"])
        first_s = float(payload["completionStartTime"]) if payload.get("stream") else None
        prompt_tokens, output_tokens = int(payload["prompt_tokens"] or 0), int(payload["completion_tokens"] or 0)
        if call.characters and prompt_tokens:
            self._tokens_per_character, self._weight = running_mean(
                self._tokens_per_character, self._weight, prompt_tokens / call.characters, RECENT_PROMPTS
            )
        cost_usd = float(payload.get("response_cost") or 0.0)
        outcome = Outcome(
            status="completed",
            served_by=self._served_by(kwargs, payload),
            ttft_s=None if first_s is None else max(first_s - arrived_at_s, 0.0),
            e2e_s=max(end_s - arrived_at_s, 0.0),
            attempt_ttft_s=None if first_s is None else max(first_s - sent_s, 0.0),
            attempt_e2e_s=max(end_s - sent_s, 0.0),
            prompt_tokens=prompt_tokens,
            output_tokens=output_tokens,
            cost_usd=cost_usd if cost_usd > 0.0 else None,
        )
        self.gateway.finished(id, outcome)

    def _served_by(self, kwargs: Mapping[str, Any], payload: Mapping[str, Any]) -> str:
        if payload.get("cache_hit") is True:
            return "cache"
        info = (kwargs.get("litellm_params") or {}).get("model_info") or {}
        return self._candidate(info, str(kwargs.get("model")))

    def _hashes(self, prompt: Any, tools: Any, characters: int) -> tuple[list[int], float]:
        """Block hashes of a prompt, tools first as engines put them, and tokens per byte."""
        if self._block_bytes == 0 or not self.gateway.state.hashes_prompts:
            return [], 0.0
        data = b"\0".join(text.encode("utf-8", "replace") for text in (*_texts_of_tools(tools), *_texts(prompt)))
        tokens_per_byte = characters * self._tokens_per_character / max(len(data), 1)
        return block_hashes(data[: MAX_BLOCKS * self._block_bytes], self._block_bytes), tokens_per_byte

    def _candidate(self, info: Any, model: str) -> str:
        """Name of the candidate that a deployment is; empty if it is none."""
        info = info if isinstance(info, Mapping) else {}
        mapped = self.settings.candidates
        name = info.get("marginroute_candidate") or mapped.get(str(info.get("id"))) or mapped.get(model)
        if not name or str(name) not in self.gateway.bundle.layout.names:
            self._warn_once(
                f"deployment {info.get('id') or model} is no candidate of the bundle ({name or 'not mapped'}); legal: "
                + ", ".join(self.gateway.bundle.layout.names)
            )
            return ""
        return str(name)

    def _known(self, what: str, name: Any) -> str:
        """A class or task that the bundle knows; the default for any other."""
        layout, settings = self.gateway.bundle.layout, self.settings
        known = layout.class_names if what == "class" else layout.task_names
        default = (settings.default_class if what == "class" else settings.default_task) or known[0]
        if name is None or name == "":
            return default
        if name in known:
            return str(name)
        self._warn_once(f"{what} {str(name)[:60]!r} is not in the bundle; taken as {default!r}")
        return default

    def _warn_once(self, message: str) -> None:
        if message not in self._warned and len(self._warned) < 100:
            self._warned.add(message)
            log.warning("marginroute: %s", message)

    def _see_first_tokens(self) -> None:
        """Looks which streams have got their first token since the last decision; forgets calls written off."""
        while self._calls and self.gateway.arrived_at_s(next(iter(self._calls))) is None:
            self._calls.pop(next(iter(self._calls)))
        for id, call in self._calls.items():
            started = getattr(call.awaited, "completion_start_time", None)
            if isinstance(started, datetime.datetime):
                self.gateway.first_token(id, max((datetime.datetime.now() - started).total_seconds(), 0.0))
                call.awaited = None


def _model(deployment: Mapping[str, Any]) -> str:
    return str((deployment.get("litellm_params") or {}).get("model"))


def _metadata(kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
    return kwargs.get("metadata") or kwargs.get("litellm_metadata") or {}


def _requester(kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
    """Metadata that the client sent along."""
    return _metadata(kwargs).get("requester_metadata") or {}


def _customer_class(kwargs: Mapping[str, Any], name: str) -> Any:
    """From what the operator attached to the key or its team; a client cannot choose its class."""
    for source in ("user_api_key_auth_metadata", "user_api_key_metadata", "user_api_key_team_metadata"):
        value = (_metadata(kwargs).get(source) or {}).get(name)
        if value:
            return value
    return None


def _body(kwargs: Mapping[str, Any]) -> Any:
    body = (kwargs.get("proxy_server_request") or {}).get("body") or {}
    return [body.get(key) for key in ("messages", "prompt", "input", "instructions", "system")]


def _texts_of_tools(tools: Any) -> Iterator[str]:
    if tools:
        yield json.dumps(tools, sort_keys=True, default=str)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from _texts(value.get("content") or value.get("text"))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)


def _question(value: Any) -> str | None:
    """What the user asked last: text of the last message from `user`, or of the last text where there are no roles."""
    if isinstance(value, list | tuple):
        asked = [item for item in value if isinstance(item, Mapping) and item.get("role") == "user"]
        if asked:
            return "\n".join(_texts(asked[-1])) or None
        for item in reversed(value):
            if question := _question(item):
                return question
        return None
    return "\n".join(_texts(value)) or None


def _count_characters(value: Any) -> int:
    """Characters of text in messages or prompts; images and tools count through the correction by usage."""
    return sum(len(text) for text in _texts(value))
