"""Faults and scaling on demand: POST /emulate/faults and /emulate/replicas of a running emulator.

    {"station": "small-0", "duration_s": 20}                  the replica (or provider) is down
    {"station": "small-0", "duration_s": 20, "slowdown": 3}   it takes three times as long
    {"pool": "small", "replicas": 2}                          scales a pool, with its lags

Seconds are the fleet's. A replica that is down, starting or off answers 503 to everything, and what it was answering
breaks off; a provider that is down answers 503 to requests.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from envs.emulator_requests import RequestError
from envs.emulator_world import LiveFleet, Station


def _object(body: bytes, legal: str) -> dict[str, Any]:
    try:
        data = json.loads(body)
    except ValueError:
        data = None
    if not isinstance(data, dict):
        raise RequestError(400, f"the body is no JSON object; legal is {legal}", "invalid_request_error")
    return data


def _number(data: Mapping[str, Any], key: str, least: float) -> float:
    value = data.get(key)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value < least:
        raise RequestError(400, f"{key} is {value!r}; legal is a number from {least:g} on", "invalid_request_error")
    return float(value)


def cause_fault(live: LiveFleet, stations: Mapping[str, Station], body: bytes) -> None:
    """Lets a replica or provider fail, or slows it down, from now on.

    Raises:
        RequestError: the body does not say which, for how long, or how slow.
    """
    data = _object(body, '{"station": NAME, "duration_s": SECONDS, "slowdown": FACTOR}')
    station = stations.get(str(data.get("station")))
    if station is None:
        legal = ", ".join(stations)
        raise RequestError(
            400, f"station {data.get('station')!r} is unknown; legal is {legal}", "invalid_request_error"
        )
    duration_s = _number(data, "duration_s", 0.001)
    slowdown = math.inf if data.get("slowdown") is None else _number(data, "slowdown", 1.0)
    live.cause_fault(station, duration_s, slowdown)


def scale(live: LiveFleet, body: bytes) -> None:
    """Scales a pool.

    Raises:
        RequestError: the body does not say which, or to how many.
    """
    data = _object(body, '{"pool": NAME, "replicas": NUMBER}')
    names = [pool.name for pool in live.spec.pools]
    if data.get("pool") not in names:
        legal = ", ".join(names)
        raise RequestError(400, f"pool {data.get('pool')!r} is unknown; legal is {legal}", "invalid_request_error")
    live.set_replicas(names.index(data["pool"]), int(_number(data, "replicas", 0)))
