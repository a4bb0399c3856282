"""What every adapter that is asked from outside shares: endpoints of candidates, names of classes and tasks, settings.

A `Desk` stands between a protocol (Envoy's, HTTP) and the gateway that decides.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any, TypeVar

from marginroute import view as v
from marginroute.adapters.adapter import Adapter
from marginroute.capabilities import abilities
from marginroute.errors import InputError
from marginroute.operation import OperationSettings, open_gateway
from marginroute.operation_file import read_yaml


@dataclass(frozen=True)
class DeskSettings(OperationSettings):
    """What the operator sets, beside what every adapter knows.

    Attributes:
        endpoints: where each candidate is reached, such as `10.0.0.7:8000`.
        can: what the gateway can do beside sending a request on (`capabilities.GATEWAYS`).
    """

    endpoints: Mapping[str, str] = field(default_factory=dict)
    can: tuple[str, ...] = ("shed",)


class Desk(Adapter[DeskSettings]):
    """Decides for one protocol server.

    Args:
        settings: of the operator.
        gateway: which one is behind it, of `capabilities.GATEWAYS`.

    Attributes:
        endpoint: address by candidate; name_at: candidate by address.

    Raises:
        InputError: the bundle, a name in the settings, or the log is unusable.
    """

    def __init__(self, settings: DeskSettings, gateway: str) -> None:
        super().__init__(open_gateway(settings, abilities(gateway, settings.can)), settings)
        layout = self.gateway.bundle.layout
        try:
            serving = layout.names[: int((layout.kind <= v.PROVIDER).sum())]
            check_names("endpoints", settings.endpoints, serving)
            for key, known in (("default_class", layout.class_names), ("default_task", layout.task_names)):
                check_names(key, filter(None, [getattr(settings, key)]), known)
        except InputError:
            self.gateway.close()
            raise
        self.endpoint = dict(settings.endpoints)
        self.name_at = {address: name for name, address in self.endpoint.items()}

    def close(self) -> None:
        """Writes what is pending and closes the log."""
        self.gateway.close()


def check_names(what: str, names: Iterable[str], known: Sequence[str]) -> None:
    """Raises InputError at the first name that is not known."""
    for name in names:
        if name not in known:
            raise InputError(f"{what}: {name!r} is unknown; legal: {', '.join(known)}")


Settings = TypeVar("Settings", bound=OperationSettings)


def read_settings(cls: type[Settings], path: str | None, given: Mapping[str, Any]) -> Settings:
    """Settings from a YAML file and from a command line, which wins.

    Raises:
        InputError: something is missing, unreadable, unknown or of the wrong kind.
    """
    values: dict[str, Any] = {} if path is None else read_yaml(path, path)
    known = {f.name: f for f in fields(cls)}
    for key, value in values.items():
        if key not in known:
            raise InputError(f"{path}: unknown key {key!r}; legal: {', '.join(known)}")
        if not _fits(value, known[key]):
            raise InputError(f"{path}: {key} = {value!r} is of the wrong kind; see docs/gateways.md")
    values |= {key: value for key, value in given.items() if value is not None}
    for name in ("bundle", "log"):
        if not values.get(name):
            raise InputError(f"no {name} is named; give it on the command line or in the file of --config")
    return cls(**values)


def _fits(value: Any, setting: Field[Any]) -> bool:
    """Whether a value is of the kind of a setting's default."""
    if value is None:
        return "None" in str(setting.type)
    if setting.name == "limits":
        return True  # `limits_from` looks at it
    default = "" if setting.default is MISSING else setting.default
    if callable(setting.default_factory):
        default = setting.default_factory()
    if isinstance(default, bool):
        return isinstance(value, bool)
    if default is None or isinstance(default, int | float):
        number = isinstance(value, int) or (isinstance(value, float) and not isinstance(default, int))
        return number and not isinstance(value, bool)
    if isinstance(default, tuple):
        return isinstance(value, list) and all(isinstance(x, str) for x in value)
    if not isinstance(default, dict):
        return isinstance(value, str)
    named = isinstance(value, dict) and all(isinstance(key, str) for key in value)
    other = setting.name in ("rollback", "priority", "rate_limits")
    return named and (other or all(isinstance(x, str) for x in value.values()))
