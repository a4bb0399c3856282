"""LiteLLM proxy: the bundle decides every request, in shadow mode beside LiteLLM's own routing or in place of it.

In the proxy's configuration:

    litellm_settings:
      callbacks: ["marginroute.adapters.litellm.router"]

with a YAML file of `Settings` named by MARGINROUTE_CONFIG (or MARGINROUTE_BUNDLE and MARGINROUTE_LOG) in its
environment, and `model_info: {marginroute_candidate: small/0}` on each deployment.
`marginroute.adapters.litellm.shadow` is the same, but never acts whatever the settings say. See docs/gateways.md.

What the hooks of LiteLLM 1.106 are used for, as observed on the proxy (all keyed by `litellm_call_id`):

    async_pre_call_hook                        before routing: priority of the class
    async_filter_deployments                   each attempt, before a deployment is picked: it is decided, and the
                                               deployments are narrowed down to the chosen one, or the request is shed
    async_pre_call_deployment_hook             each attempt, after it: an in-flight entry begins
    async_post_call_failure_deployment_hook    each failed attempt: it ends
    async_log_success_event                    once, when an answer is complete: outcome
    async_post_call_failure_hook               once, when the proxy gives up: outcome

`async_log_failure_event` is of no use here: it fires at the first failed attempt and stays silent at the last. First
tokens are read off LiteLLM's own logging object at the next decision, since any streaming hook would slow the stream.
A request is shed by the one exception that LiteLLM neither retries nor falls back on.
"""

from __future__ import annotations

import math
import os
from dataclasses import replace
from typing import Any

from marginroute.adapters.adapter import log
from marginroute.adapters.litellm_observer import Observer, ShedRequest
from marginroute.adapters.litellm_request import Settings
from marginroute.adapters.metrics_server import MetricsServer
from marginroute.capabilities import abilities
from marginroute.errors import InputError
from marginroute.operation import open_gateway
from marginroute.operation_file import settings_from


def build(settings: Settings) -> Observer:
    """Loads the bundle, opens the log and says so.

    Raises:
        InputError: a setting, the bundle, a default class or task, or the log is unusable.
    """
    can = abilities("litellm", ("shed", "cache") if settings.use_cache else ("shed",))
    gateway = open_gateway(settings, can)
    layout = gateway.bundle.layout
    for values, known, what in (
        ((settings.default_class,), layout.class_names, "default_class"),
        ((settings.default_task,), layout.task_names, "default_task"),
    ):
        for value in values:
            if value and value not in known:
                raise InputError(f"{what} {value!r} is not in the bundle; legal: {', '.join(known)}")
    observer = Observer(gateway, settings, _cache_key)
    if settings.metrics:
        gateway.keep(MetricsServer(observer, settings.metrics).start())
    return observer


def _cache_key(call: dict[str, Any]) -> str:
    """Key of a call in LiteLLM's response cache; empty without a cache."""
    import litellm

    if litellm.cache is None:
        return ""
    call = {key: value for key, value in call.items() if key != "litellm_params"}  # where it would leave the key
    return str(litellm.cache.get_cache_key(**call))


def callback(observer: Observer | None) -> Any:
    """A LiteLLM CustomLogger that reports to the observer; without one, it does nothing at all."""
    from litellm.integrations.custom_logger import CustomLogger

    if observer is None:
        return CustomLogger()
    watch: Observer = observer

    class RoutingLogger(CustomLogger):  # type: ignore[misc]
        """LiteLLM calls these by keyword: their names and those of their arguments are its interface."""

        marginroute = watch

        async def async_pre_call_hook(self, user_api_key_dict: Any, cache: Any, data: Any, call_type: Any) -> None:
            try:
                watch.prioritise(user_api_key_dict, data, str(call_type))
            except Exception as error:
                watch.failed("priority", error)

        async def async_filter_deployments(
            self,
            model: str,
            healthy_deployments: Any,
            messages: Any,
            request_kwargs: dict[str, Any] | None = None,
            parent_otel_span: Any = None,
        ) -> Any:
            try:
                return watch.route(
                    model, healthy_deployments, messages, {} if request_kwargs is None else request_kwargs
                )
            except ShedRequest as shed:
                raise _refusal(shed) from None
            except Exception as error:
                watch.failed("decision", error)
            return healthy_deployments

        async def async_pre_call_deployment_hook(self, kwargs: dict[str, Any], call_type: Any) -> None:
            try:
                watch.sent(kwargs)
            except Exception as error:
                watch.failed("start of a call", error)

        async def async_post_call_failure_deployment_hook(
            self, request_data: Any, exception: Exception, call_type: Any, fallback_depth: int | None = None
        ) -> None:
            try:
                watch.attempt_failed(request_data, exception)
            except Exception as error:
                watch.failed("end of a call", error)

        async def async_post_call_failure_hook(
            self, request_data: Any, original_exception: Exception, user_api_key_dict: Any, traceback_str: Any = None
        ) -> None:
            try:
                watch.request_failed(request_data)
            except Exception as error:
                watch.failed("record of a failure", error)

        async def async_log_success_event(self, kwargs: Any, response_obj: Any, start_time: Any, end_time: Any) -> None:
            try:
                watch.completed(kwargs)
            except Exception as error:
                watch.failed("record of an answer", error)

    return RoutingLogger()


def _build(shadow: bool) -> Any:
    import atexit

    try:
        settings = settings_from(os.environ, Settings)
        observer = build(replace(settings, mode="shadow") if shadow else settings)
    except Exception as error:  # a gateway must start without us
        log.error("marginroute: it is off: %s", error if isinstance(error, InputError) else repr(error))
        return callback(None)
    atexit.register(observer.gateway.close)
    return callback(observer)


def _refusal(shed: ShedRequest) -> Exception:
    """What LiteLLM turns into status 429 with Retry-After, at once."""
    from litellm.exceptions import GuardrailRaisedException

    refusal = GuardrailRaisedException(
        guardrail_name="marginroute",
        message="Too many requests: this one was shed; try again later",
        should_wrap_with_default_message=False,
        status_code=429,
    )
    refusal.headers = {"retry-after": str(math.ceil(shed.retry_after_s))}
    return refusal


def __getattr__(name: str) -> Any:
    """`router` and `shadow`, which LiteLLM's configuration names, are built when they are first asked for."""
    if name not in ("router", "shadow"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = _build(shadow=name == "shadow")
    return globals()[name]
