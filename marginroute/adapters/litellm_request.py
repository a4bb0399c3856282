"""What LiteLLM's dictionaries say of a request: class, tenant, session, text. Free of LiteLLM itself."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from marginroute.adapters.account import account_of, share_left
from marginroute.adapters.chat import question as question_of
from marginroute.adapters.chat import texts
from marginroute.operation import OperationSettings

__all__ = ["question_of", "texts"]  # of `chat`, for the observer

GENERATION = ("acompletion", "atext_completion", "aresponses", "anthropic_messages", "completion", "responses")


@dataclass(frozen=True)
class Settings(OperationSettings):
    """What the operator sets, beside what every adapter knows.

    Attributes:
        class_field: key of the metadata of a virtual key or team that names the customer class.
        standing_field: key of the same metadata that says how the customer stands, one of `contracts.STANDINGS`.
        quota_left_field: key of the same that says which share of the allowance is left; without it, LiteLLM's own
            budgets of key and team say so.
        task_field: key of the request's own metadata that names the task type.
        candidates: candidate by deployment id or by LiteLLM model name, for deployments without
            `model_info.marginroute_candidate`.
        engine_priority: the same number goes along to the engine, as vLLM's `priority`.
        metrics: loopback `host:port` where Prometheus finds metrics; further workers take the next ports.
        use_cache: *cache* is a candidate where LiteLLM's response cache holds an answer of a known tier.
    """

    class_field: str = "customer_class"
    standing_field: str = "standing"
    quota_left_field: str = "quota_left"
    task_field: str = "task_type"
    candidates: Mapping[str, str] = field(default_factory=dict)
    engine_priority: bool = False
    use_cache: bool = False
    metrics: str = ""


def is_generation(kwargs: Mapping[str, Any]) -> bool:
    """Whether a call asks a model for text, and is to be recorded."""
    call_type = str(getattr(kwargs.get("litellm_logging_obj"), "call_type", None) or GENERATION[0])
    return call_type in GENERATION and kwargs.get("no-log") is not True


def model_of(deployment: Mapping[str, Any]) -> str:
    """LiteLLM's model name of a deployment."""
    return str((deployment.get("litellm_params") or {}).get("model"))


def metadata_of(kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
    """What LiteLLM knows of the caller."""
    return kwargs.get("metadata") or kwargs.get("litellm_metadata") or {}


def requester_of(kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
    """Metadata that the client sent along."""
    return metadata_of(kwargs).get("requester_metadata") or {}


def attached(kwargs: Mapping[str, Any], name: str) -> Any:
    """What the operator attached to the key or its team, such as its class, which a client cannot choose."""
    for source in ("user_api_key_auth_metadata", "user_api_key_metadata", "user_api_key_team_metadata"):
        value = (metadata_of(kwargs).get(source) or {}).get(name)
        if value is not None and value != "":
            return value
    return None


def account_told(kwargs: Mapping[str, Any], settings: Settings) -> tuple[str, float, str]:
    """Standing, share of the allowance that is left, and what was not legal of them (see `account.account_of`)."""
    left = attached(kwargs, settings.quota_left_field)
    if left is None:
        metadata = metadata_of(kwargs)
        budgets = [
            share_left(metadata.get(f"{whose}_spend"), metadata.get(f"{whose}_max_budget"))
            for whose in ("user_api_key", "user_api_key_team")
        ]
        left = min((share for share in budgets if share is not None), default=None)
    return account_of(attached(kwargs, settings.standing_field), left)


def class_of_key(key: Any, name: str) -> Any:
    """The same before routing, from LiteLLM's own object of a verified key."""
    for source in ("metadata", "team_metadata"):
        value = (getattr(key, source, None) or {}).get(name)
        if value:
            return value
    return None


def tenant_of(kwargs: Mapping[str, Any]) -> str:
    """Team of the key, else the (hashed) key: what a client cannot choose."""
    metadata = metadata_of(kwargs)
    return str(metadata.get("user_api_key_team_id") or metadata.get("user_api_key_hash") or "")


def session_of(kwargs: Mapping[str, Any]) -> str:
    """The session that a client named; empty if it named none."""
    return str(kwargs.get("litellm_session_id") or metadata_of(kwargs).get("session_id") or "")


def traceparent_of(kwargs: Mapping[str, Any]) -> str:
    """W3C trace context that the client sent; empty if it sent none."""
    headers = (kwargs.get("proxy_server_request") or {}).get("headers") or {}
    return str(headers.get("traceparent") or "")[:100]


def response_of(error: Exception) -> tuple[int, dict[str, object]]:
    """Status and headers of the response that a provider's error stands for; 0 and none for LiteLLM's own refusals."""
    if str(getattr(error, "category", "")).startswith("litellm"):
        return 0, {}
    headers = getattr(error, "litellm_response_headers", None) or getattr(
        getattr(error, "response", None), "headers", None
    )
    return int(getattr(error, "status_code", None) or 0), {str(k).lower(): x for k, x in dict(headers or {}).items()}


def headers_of(payload: Mapping[str, Any]) -> dict[str, object]:
    """Headers of a response, as LiteLLM's standard logging object has them."""
    headers = (payload.get("hidden_params") or {}).get("additional_headers") or {}
    return {str(name).lower().replace("_", "-"): value for name, value in headers.items()}


def body_of(kwargs: Mapping[str, Any]) -> Any:
    """Where text stands in bodies without messages."""
    body = (kwargs.get("proxy_server_request") or {}).get("body") or {}
    return [body.get(key) for key in ("messages", "prompt", "input", "instructions", "system")]


def texts_of_tools(tools: Any) -> Iterator[str]:
    """Tools as one text."""
    if tools:
        yield json.dumps(tools, sort_keys=True, default=str)


def count_characters(value: Any) -> int:
    """Characters of text in messages or prompts; images and tools count through the correction by usage."""
    return sum(len(text) for text in texts(value))
