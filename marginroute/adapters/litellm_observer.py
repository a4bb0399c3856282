"""What LiteLLM tells its callbacks, translated into the life of a request; free of LiteLLM itself.

Prompts are counted, hashed in blocks of their UTF-8 bytes (a gateway has no tokeniser), and read once by the bundle's
quality predictor if it has one; they are never kept. Nothing here is allowed to fail a request but a decision to shed:
the callback catches what else is raised.
"""

from __future__ import annotations

import datetime
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from marginroute import view as v
from marginroute.adapters import litellm_request as read
from marginroute.adapters.adapter import Adapter
from marginroute.adapters.afterwards import Afterwards
from marginroute.adapters.chat import TOKENS_PER_CHARACTER, TokenRatio
from marginroute.adapters.litellm_request import Settings
from marginroute.adapters.rate_headers import told_by
from marginroute.facts import Facts, Outcome, Verdict
from marginroute.gateway import Gateway
from marginroute.prefix_index import MAX_BLOCKS, block_hashes

JUMP_S = 1.0  # by which two clocks may disagree on how long a request took
MOST_STORED = 10_000  # stored answers whose tier is remembered
SHED = v.KINDS[v.SHED]
CACHE = v.KINDS[v.CACHE]

Deployments = list[dict[str, Any]]


class ShedRequest(Exception):  # noqa: N818 (an answer, not an error)
    """The bundle sheds a request; `retry_after_s` is what the client is told."""

    def __init__(self, retry_after_s: float) -> None:
        super().__init__("shed")
        self.retry_after_s = retry_after_s


@dataclass(slots=True)
class _Call:
    """A decided request: characters of its prompt, whether it was shed, and its key in the response cache."""

    characters: int
    shed: bool = False
    cache_key: str = ""


def _times(payload: Mapping[str, Any], arrived_at_s: float, waited_s: float) -> dict[str, float | None]:
    """Latencies of an answer. LiteLLM's times are those on the wall: across a jump only our own clock counts."""
    if abs(time.time() - arrived_at_s - waited_s) > JUMP_S:
        return {"e2e_s": waited_s, "attempt_e2e_s": waited_s}
    end_s, sent_s = float(payload["endTime"]), float(payload["startTime"])
    times: dict[str, float | None] = {
        "e2e_s": max(end_s - arrived_at_s, 0.0),
        "attempt_e2e_s": max(end_s - sent_s, 0.0),
    }
    if payload.get("stream"):
        first_s = float(payload["completionStartTime"])
        times["ttft_s"] = max(first_s - arrived_at_s, 0.0)
        times["attempt_ttft_s"] = max(first_s - sent_s, 0.0)
    return times


class Observer(Adapter[Settings]):
    """Follows every request through the hooks of LiteLLM, and says where it goes where the bundle may act.

    Args:
        gateway: decides and records.
        settings: of the operator.
        cache_key: key of a call in LiteLLM's response cache, empty if it has none; None: there is no cache to look at.

    Attributes:
        afterwards: what completed answers have earned, and their records, are worked out there.
    """

    def __init__(
        self, gateway: Gateway, settings: Settings, cache_key: Callable[[dict[str, Any]], str] | None = None
    ) -> None:
        super().__init__(gateway, settings)
        self._calls: OrderedDict[str, _Call] = OrderedDict()  # in order of decision
        self._awaited: dict[str, Any] = {}  # LiteLLM's logging objects of streams without a first token
        self.afterwards = Afterwards(partial(self.failed, "record of an answer"))
        gateway.keep(self.afterwards)
        self._cache_key = cache_key if settings.use_cache else None
        self._stored: OrderedDict[str, str] = OrderedDict()  # key in the response cache -> tier that answered
        self._ratio = TokenRatio()
        self._block_bytes = round(settings.prefix_block_tokens / TOKENS_PER_CHARACTER)

    def route(self, model: str, deployments: Deployments, messages: Any, kwargs: dict[str, Any]) -> Deployments:
        """Decides an attempt that is about to be routed; returns the deployments that LiteLLM may still pick from.

        Raises:
            ShedRequest: the bundle acts on the request and sheds it.
        """
        names = self._names(deployments, kwargs)
        verdict = self._decide(model, set(names.values()), messages, kwargs)
        if verdict is None or not verdict.acting or not names:
            return deployments
        decision, call = verdict.decision, self._calls.get(kwargs["litellm_call_id"])
        if decision.kind == SHED:
            if call is not None:
                call.shed = True
            raise ShedRequest(verdict.retry_after_s)
        if call is not None and call.cache_key in self._stored and decision.kind != CACHE:
            kwargs["cache"] = {**(kwargs.get("cache") or {}), "no-cache": True}
        wanted = decision.runner_up if decision.kind == CACHE else decision.name  # should the stored answer be gone
        return [d for i, d in enumerate(deployments) if names.get(i) == wanted] or deployments

    def _names(self, deployments: Deployments, kwargs: Mapping[str, Any]) -> dict[int, str]:
        """Candidate by position of a deployment, without those that LiteLLM will drop from a retry anyway."""
        dropped = {
            *(kwargs.get("_excluded_deployment_ids") or ()),
            *(kwargs.get("_retry_skipped_deployment_ids") or ()),
        }
        found = {}
        for i, deployment in enumerate(deployments):
            info = deployment.get("model_info")
            name = self._candidate(info, read.model_of(deployment))
            if name and (info or {}).get("id") not in dropped:
                found[i] = name
        return found

    def _decide(self, model: str, available: set[str], messages: Any, kwargs: dict[str, Any]) -> Verdict | None:
        id = kwargs.get("litellm_call_id")
        if not id or not read.is_generation(kwargs):
            return None
        self._see_first_tokens()
        prompt = messages if read.count_characters(messages) else read.body_of(kwargs)
        characters = read.count_characters(prompt)
        hashes, tokens_per_byte = self._hashes(prompt, kwargs.get("tools"), characters)
        asks = self.gateway.bundle.predictor is not None
        cache_key = self._key({**kwargs, "model": model, "messages": messages})
        standing, quota_left, complaint = read.account_told(kwargs, self.settings)
        if complaint:
            self.warn_once(complaint)
        facts = Facts(
            id,
            self._ratio.tokens(characters),
            class_name=self.known("class", read.attached(kwargs, self.settings.class_field)),
            task_name=self.known("task", read.requester_of(kwargs).get(self.settings.task_field)),
            tenant=read.tenant_of(kwargs),
            session=read.session_of(kwargs),
            traceparent=read.traceparent_of(kwargs),
            available=available,
            cached_tier=self._stored.get(cache_key),
            standing=standing,
            quota_left=quota_left,
            hashes=hashes,
            block_tokens=self._block_bytes * tokens_per_byte,
            prompt=(read.question_of(messages) or read.question_of(read.body_of(kwargs))) if asks else None,
        )
        self._calls.setdefault(id, _Call(characters, cache_key=cache_key))
        return self.decide(facts)

    def prioritise(self, key: Any, data: dict[str, Any], call_type: str) -> None:
        """Gives a request the priority of its class, before it is routed."""
        if not self.settings.priority or call_type not in read.GENERATION or "priority" in data:
            return
        name = self.known("class", read.class_of_key(key, self.settings.class_field))
        number = self.settings.priority.get(name)
        tenant = str(getattr(key, "team_id", None) or getattr(key, "api_key", None) or "")
        session = read.session_of(data)
        if number and self.gateway.switch.acts(str(data.get("litellm_call_id") or ""), tenant, session):
            data["priority"] = number
            if self.settings.engine_priority:
                data["extra_body"] = {**(data.get("extra_body") or {}), "priority": number}

    def sent(self, kwargs: Mapping[str, Any]) -> None:
        """An attempt leaves for the deployment that LiteLLM picked."""
        id, streamed = kwargs.get("litellm_call_id", ""), kwargs.get("stream") is True
        candidate = self._candidate(kwargs.get("model_info"), str(kwargs.get("model")))
        if not candidate:
            return
        self.gateway.sent(id, candidate, streamed)
        if streamed and id in self._calls:
            self._awaited[id] = kwargs.get("litellm_logging_obj")

    def attempt_failed(self, kwargs: Mapping[str, Any], error: Exception) -> None:
        """An attempt failed; LiteLLM may try again."""
        id = kwargs.get("litellm_call_id", "")
        self._awaited.pop(id, None)
        told = told_by(*read.response_of(error))
        if told:
            self.gateway.rate_limit_told(self.gateway.sent_to(id), **told)
        self.gateway.attempt_failed(id)

    def request_failed(self, data: Mapping[str, Any]) -> None:
        """LiteLLM gave up on a request, or we have shed it."""
        id = data.get("litellm_call_id", "")
        waited_s, call = self.gateway.waited_s(id), self._forget(id)
        if waited_s is None:
            return
        if call is not None and call.shed:
            self.gateway.finished(id, Outcome("shed"))
        else:
            self.gateway.finished(id, Outcome("failed", e2e_s=waited_s))

    def completed(self, kwargs: Mapping[str, Any]) -> None:
        """An answer is complete."""
        payload = kwargs["standard_logging_object"]
        id = kwargs.get("litellm_call_id") or payload["litellm_call_id"]
        arrived_at_s, waited_s = self.gateway.arrived_at_s(id), self.gateway.waited_s(id)
        call = self._forget(id)
        if arrived_at_s is None or waited_s is None or call is None:
            return
        prompt_tokens, output_tokens = int(payload["prompt_tokens"] or 0), int(payload["completion_tokens"] or 0)
        self._ratio.learn(call.characters, prompt_tokens)
        cost_usd = float(payload.get("response_cost") or 0.0)
        outcome = Outcome(
            status="completed",
            served_by=self._served_by(kwargs, payload),
            **_times(payload, arrived_at_s, waited_s),
            prompt_tokens=prompt_tokens,
            output_tokens=output_tokens,
            cost_usd=cost_usd if cost_usd > 0.0 else None,
        )
        self._remember(call.cache_key, outcome.served_by)
        self._see_rate_limit(payload, outcome)
        settle = self.gateway.ended(id, outcome)
        if settle is not None:
            self.afterwards.add(settle)

    def _see_rate_limit(self, payload: Mapping[str, Any], outcome: Outcome) -> None:
        """What the headers of an answer said, which came with its first token."""
        told = told_by(200, read.headers_of(payload))
        if told and outcome.served_by != CACHE:
            since_s = (outcome.attempt_e2e_s or 0.0) - (outcome.attempt_ttft_s or outcome.attempt_e2e_s or 0.0)
            self.gateway.rate_limit_told(outcome.served_by, **told, ago_s=since_s)

    def _forget(self, id: str) -> _Call | None:
        self._awaited.pop(id, None)
        return self._calls.pop(id, None)

    def _key(self, call: dict[str, Any]) -> str:
        return "" if self._cache_key is None else self._cache_key(call)

    def _remember(self, cache_key: str, candidate: str) -> None:
        """Notes which tier gave the answer that LiteLLM has stored now."""
        layout = self.gateway.bundle.layout
        if not cache_key or candidate not in layout.names:
            return
        tier = int(layout.tier[layout.names.index(candidate)])
        if tier >= 0:
            self._stored[cache_key] = layout.tier_names[tier]
            self._stored.move_to_end(cache_key)
        while len(self._stored) > MOST_STORED:
            self._stored.popitem(last=False)

    def _served_by(self, kwargs: Mapping[str, Any], payload: Mapping[str, Any]) -> str:
        if payload.get("cache_hit") is True:
            return CACHE
        info = (kwargs.get("litellm_params") or {}).get("model_info") or {}
        return self._candidate(info, str(kwargs.get("model")))

    def _hashes(self, prompt: Any, tools: Any, characters: int) -> tuple[list[int], float]:
        """Block hashes of a prompt, tools first as engines put them, and tokens per byte."""
        if self._block_bytes == 0 or not self.gateway.state.hashes_prompts:
            return [], 0.0
        texts = (*read.texts_of_tools(tools), *read.texts(prompt))
        data = b"\0".join(text.encode("utf-8", "replace") for text in texts)
        tokens_per_byte = characters * self._ratio.value / max(len(data), 1)
        return block_hashes(data[: MAX_BLOCKS * self._block_bytes], self._block_bytes), tokens_per_byte

    def _candidate(self, info: Any, model: str) -> str:
        """Name of the candidate that a deployment is; empty if it is none."""
        info = info if isinstance(info, Mapping) else {}
        mapped = self.settings.candidates
        name = info.get("marginroute_candidate") or mapped.get(str(info.get("id"))) or mapped.get(model)
        if not name or str(name) not in self.gateway.bundle.layout.names:
            self.warn_once(
                f"deployment {info.get('id') or model} is no candidate of the bundle ({name or 'not mapped'}); legal: "
                + ", ".join(self.gateway.bundle.layout.names)
            )
            return ""
        return str(name)

    def _see_first_tokens(self) -> None:
        """Looks which streams have got their first token since the last decision; forgets calls written off."""
        while self._calls and self.gateway.arrived_at_s(next(iter(self._calls))) is None:
            self._forget(next(iter(self._calls)))
        for id, logging_obj in list(self._awaited.items()):
            started = getattr(logging_obj, "completion_start_time", None)
            if isinstance(started, datetime.datetime):
                self.gateway.first_token(id, max((datetime.datetime.now() - started).total_seconds(), 0.0))
                del self._awaited[id]
