"""Single values of JSON records, checked: tokens, seconds, instants, hash numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from envs.workload.traces import MAX_TOKENS, MAX_UNIX_S
from marginroute.errors import InputError

Place = tuple[object, int]  # file and line


def bad(place: Place, key: str, value: Any, legal: str) -> InputError:
    """The sentence that names file, line, key and value, and says what is legal."""
    path, line = place
    shown = "missing" if value is None else repr(value)
    return InputError(f"{path}, line {line}: {key} is {shown[:80]}; legal is {legal}")


def is_number(value: Any) -> bool:
    """Whether it is a finite int or float, not a truth value."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def tokens(place: Place, record: Mapping[str, Any], key: str) -> int:
    """A token count, 1 or more."""
    value = record.get(key)
    if type(value) is int and 1 <= value <= MAX_TOKENS:
        return value
    if not is_number(value) or not 1 <= value <= MAX_TOKENS or value != int(value):
        raise bad(place, key, value, f"an integer from 1 to {MAX_TOKENS}")
    return int(value)


def number(place: Place, record: Mapping[str, Any], key: str, legal: str) -> float:
    """A finite number."""
    value = record.get(key)
    if not is_number(value):
        raise bad(place, key, value, legal)
    return float(value)


def optional(value: Any) -> float:
    """A number, or nan for anything else."""
    return float(value) if is_number(value) else math.nan


def seconds(place: Place, record: Mapping[str, Any], key: str) -> float:
    """A duration, 0 or more; nan where it is unknown (missing, null or NaN)."""
    value = record.get(key)
    if value is None or value != value:
        return math.nan
    if not is_number(value) or value < 0:
        raise bad(place, key, value, "0 or more seconds, or nothing")
    return float(value)


def objects(place: Place, record: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    """A list of objects; missing and null are an empty one."""
    values = record.get(key)
    if values is None:
        return []
    if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
        raise bad(place, key, values, "a list of objects")
    return values


def instant(place: Place, record: Mapping[str, Any], key: str) -> float:
    """Seconds since 1970 of a Unix time or an ISO timestamp (UTC where it names no zone)."""
    value = record.get(key)
    if type(value) is float and -MAX_UNIX_S < value < MAX_UNIX_S:
        return value
    if isinstance(value, str):
        try:
            moment = datetime.fromisoformat(value)
            return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
        except ValueError:
            pass
    elif is_number(value):
        if abs(value) > MAX_UNIX_S:
            path, line = place
            raise InputError(f"{path}, line {line}: {key} {value!r} looks like milliseconds; legal is seconds")
        return float(value)
    raise bad(place, key, value, "a Unix time in seconds or an ISO timestamp")


def hash_ids(place: Place, record: Mapping[str, Any], key: str = "hash_ids") -> list[int]:
    """Whole numbers of 63 bits, one per prompt block."""
    values = record.get(key)
    legal = isinstance(values, list) and set(map(type, values)) <= {int}
    if not legal or (values and not (min(values) >= 0 and max(values) < 1 << 63)):
        raise bad(place, key, values, "a list of whole numbers from 0 to 2**63 - 1")
    return values
