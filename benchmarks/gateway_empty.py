"""LiteLLM's callback that does nothing, with the hooks of marginroute's: what LiteLLM itself spends on having one."""

from __future__ import annotations

from typing import Any

from litellm.integrations.custom_logger import CustomLogger


class Empty(CustomLogger):
    """LiteLLM calls these by keyword."""

    async def async_pre_call_hook(self, user_api_key_dict: Any, cache: Any, data: Any, call_type: Any) -> None:
        """Nothing."""

    async def async_filter_deployments(
        self,
        model: str,
        healthy_deployments: Any,
        messages: Any,
        request_kwargs: Any = None,
        parent_otel_span: Any = None,
    ) -> Any:
        """All of them."""
        return healthy_deployments

    async def async_pre_call_deployment_hook(self, kwargs: dict[str, Any], call_type: Any) -> None:
        """Nothing."""

    async def async_log_success_event(self, kwargs: Any, response_obj: Any, start_time: Any, end_time: Any) -> None:
        """Nothing."""


callback = Empty()
