"""LiteLLM proxy in shadow mode: every request is decided and recorded, and nothing about its routing changes.

In the proxy's configuration:

    litellm_settings:
      callbacks: ["marginroute.adapters.litellm.shadow"]

with MARGINROUTE_BUNDLE and MARGINROUTE_LOG (or a YAML file of `Settings` named by MARGINROUTE_CONFIG) in its
environment, and `model_info: {marginroute_candidate: small/0}` on each deployment. See docs/gateways.md.

What the hooks of LiteLLM 1.106 are used for, as observed on the proxy (all keyed by `litellm_call_id`):

    async_filter_deployments                   each attempt, before a deployment is picked: the first one is decided
    async_pre_call_deployment_hook             each attempt, after it: an in-flight entry begins
    async_post_call_failure_deployment_hook    each failed attempt: it ends
    async_log_success_event                    once, when an answer is complete: outcome
    async_post_call_failure_hook               once, when the proxy gives up: outcome

`async_log_failure_event` is of no use here: it fires at the first failed attempt and stays silent at the last. First
tokens are read off LiteLLM's own logging object at the next decision, since any streaming hook would slow the stream.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from marginroute.adapters.litellm_observer import Observer, Settings, log
from marginroute.errors import InputError
from marginroute.operation import open_gateway

_WANTED = {"bundle": "folder written by export.py", "log": "JSONL file for decision records"}


def settings_from(environ: Mapping[str, str]) -> Settings:
    """Settings from MARGINROUTE_CONFIG (a YAML file), MARGINROUTE_BUNDLE and MARGINROUTE_LOG; the latter two win.

    Raises:
        InputError: something is missing, unreadable or unknown.
    """
    values: dict[str, Any] = {}
    if path := environ.get("MARGINROUTE_CONFIG"):
        values = _read_yaml(path)
        known = [f.name for f in fields(Settings)]
        unknown = next((key for key in values if key not in known), None)
        if unknown is not None:
            raise InputError(f"{path}: unknown key {unknown!r}; legal: {', '.join(known)}")
        if not isinstance(values.get("candidates", {}), Mapping):
            raise InputError(f"{path}: candidates must map deployments to candidates")
    for name in ("bundle", "log"):
        value = environ.get(f"MARGINROUTE_{name.upper()}") or values.get(name)
        if not value:
            raise InputError(f"MARGINROUTE_{name.upper()} is not set; name the {_WANTED[name]}")
        values[name] = str(value)
    return Settings(**values)


def _read_yaml(path: str) -> dict[str, Any]:
    import yaml

    try:
        with open(path, encoding="utf-8") as file:
            values = yaml.safe_load(file)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"MARGINROUTE_CONFIG {path} is unreadable or not YAML: {error}") from None
    if not isinstance(values, dict):
        raise InputError(f"MARGINROUTE_CONFIG {path} must map settings to values")
    return values


def build(settings: Settings) -> Observer:
    """Loads the bundle, opens the log and says so.

    Raises:
        InputError: the bundle, a default class or task, or the log is unusable.
    """
    if settings.mode != "shadow":
        raise InputError(f"mode {settings.mode!r} is not legal with LiteLLM; legal is shadow")
    gateway = open_gateway(settings)
    layout = gateway.bundle.layout
    for default, known, what in (
        (settings.default_class, layout.class_names, "default_class"),
        (settings.default_task, layout.task_names, "default_task"),
    ):
        if default and default not in known:
            raise InputError(f"{what} {default!r} is not in the bundle; legal: {', '.join(known)}")
    return Observer(gateway, settings)


def callback(observer: Observer | None) -> Any:
    """A LiteLLM CustomLogger that reports to the observer; without one, it does nothing at all."""
    from litellm.integrations.custom_logger import CustomLogger

    if observer is None:
        return CustomLogger()
    watch: Observer = observer

    class ShadowLogger(CustomLogger):  # type: ignore[misc]
        """LiteLLM calls these by keyword: their names and those of their arguments are its interface."""

        marginroute = watch

        async def async_filter_deployments(
            self,
            model: str,
            healthy_deployments: Any,
            messages: Any,
            request_kwargs: dict[str, Any] | None = None,
            parent_otel_span: Any = None,
        ) -> Any:
            try:
                watch.decide(healthy_deployments, messages, request_kwargs or {})
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
                watch.attempt_failed(request_data)
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

    return ShadowLogger()


def _build_shadow() -> Any:
    import atexit

    try:
        observer = build(settings_from(os.environ))
    except Exception as error:  # a gateway must start without us
        log.error("marginroute: shadow mode is off: %s", error if isinstance(error, InputError) else repr(error))
        return callback(None)
    atexit.register(observer.gateway.close)
    return callback(observer)


def __getattr__(name: str) -> Any:
    """`shadow`, the callback that LiteLLM's configuration names, is built when it is first asked for."""
    if name != "shadow":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()["shadow"] = _build_shadow()
    return globals()["shadow"]
