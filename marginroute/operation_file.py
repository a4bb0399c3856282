"""An operator's settings from a YAML file and the environment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar

from marginroute.errors import InputError
from marginroute.operation import OperationSettings

_WANTED = {"bundle": "folder written by export.py", "log": "JSONL file for decision records"}
_MAPPINGS = ("rollback", "candidates", "priority", "telemetry", "rate_limits")
_LISTS = ("canary_tenants",)

S = TypeVar("S", bound=OperationSettings)


def settings_from(environ: Mapping[str, str], kind: type[S]) -> S:
    """Settings from MARGINROUTE_CONFIG (a YAML file), MARGINROUTE_BUNDLE and MARGINROUTE_LOG; the latter two win.

    Args:
        environ: environment variables.
        kind: the adapter's settings.

    Raises:
        InputError: something is missing, unreadable, unknown or of the wrong type.
    """
    values: dict[str, Any] = {}
    if path := environ.get("MARGINROUTE_CONFIG"):
        values = read_yaml(path, f"MARGINROUTE_CONFIG {path}")
        _check(path, values, kind)
    for name in ("bundle", "log"):
        value = environ.get(f"MARGINROUTE_{name.upper()}") or values.get(name)
        if not value:
            raise InputError(f"MARGINROUTE_{name.upper()} is not set; name the {_WANTED[name]}")
        values[name] = str(value)
    return kind(**values)


def _check(path: str, values: dict[str, Any], kind: type[OperationSettings]) -> None:
    """Keys that exist, and values of the type of their default."""
    known = {f.name: f.default for f in fields(kind)}
    for key, value in values.items():
        if key not in known:
            raise InputError(f"{path}: unknown key {key!r}; legal: {', '.join(known)}")
        if key in _MAPPINGS and not isinstance(value, Mapping):
            raise InputError(f"{path}: {key} must map names to values")
        if key == "limits":
            continue  # `limits_from` looks at it
        if key in _LISTS:
            if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
                raise InputError(f"{path}: {key} must be a list of names")
            values[key] = tuple(value)
        default = known[key]
        if isinstance(default, bool):
            if not isinstance(value, bool):
                raise InputError(f"{path}: {key} = {value!r}; legal is true or false")
        elif isinstance(default, int | float) and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise InputError(f"{path}: {key} = {value!r}; legal is a number")


def read_yaml(path: str, what: str) -> dict[str, Any]:
    """The mapping in a YAML file; `what` names it in errors.

    Raises:
        InputError: unreadable, not YAML, or no mapping.
    """
    import yaml

    try:
        with open(path, encoding="utf-8") as file:
            values = yaml.safe_load(file)
    except OSError as error:
        raise InputError(f"{what} cannot be read ({error.strerror})") from None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{what} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise InputError(f"{what} must map settings to values")
    return values
