"""LiteLLM's callback for a closed loop in slow motion: the gateway's seconds are those of the emulated fleet.

LOOP_SPEED is the fleet's seconds per second on the wall. Only numpy and marginroute are imported, as on a gateway host.
"""

from __future__ import annotations

import os
import time
from dataclasses import replace
from typing import Any

from marginroute.adapters import litellm as adapter
from marginroute.adapters.litellm_observer import Observer
from marginroute.adapters.litellm_request import Settings
from marginroute.facts import Outcome
from marginroute.gateway import Gateway
from marginroute.operation import open_gateway
from marginroute.operation_file import settings_from

TIMES = ("ttft_s", "e2e_s", "attempt_ttft_s", "attempt_e2e_s")


class _Slow:
    """A gateway that is told times on the wall and hears them in the fleet's seconds."""

    def __init__(self, gateway: Gateway, speed: float) -> None:
        self._gateway, self._speed = gateway, speed

    def __getattr__(self, name: str) -> Any:
        return getattr(self._gateway, name)

    def first_token(self, id: str, ago_s: float = 0.0) -> None:
        self._gateway.first_token(id, ago_s * self._speed)

    def rate_limit_told(self, candidate: str, **told: float) -> bool:
        seen = {name: x * self._speed if name.endswith("_s") else x for name, x in told.items()}
        return self._gateway.rate_limit_told(candidate, **seen)

    def waited_s(self, id: str) -> float | None:
        waited_s = self._gateway.waited_s(id)
        return None if waited_s is None else waited_s / self._speed

    def finished(self, id: str, outcome: Outcome) -> bool:
        seen = {name: value * self._speed for name in TIMES if (value := getattr(outcome, name)) is not None}
        return self._gateway.finished(id, replace(outcome, **seen))


def _router() -> Any:
    speed = float(os.environ["LOOP_SPEED"])
    settings = settings_from(os.environ, Settings)
    gateway = open_gateway(settings, clock=lambda: time.monotonic() * speed)
    return adapter.callback(Observer(_Slow(gateway, speed), settings))  # type: ignore[arg-type]


router = _router()
