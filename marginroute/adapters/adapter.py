"""What every adapter has: the gateway that decides, names of classes and tasks, and a voice that does not repeat."""

from __future__ import annotations

import logging
import time
from typing import Generic, TypeVar

from marginroute.adapters.metrics import Histogram
from marginroute.facts import Facts, Verdict
from marginroute.gateway import Gateway
from marginroute.operation import OperationSettings

log = logging.getLogger("marginroute.gateway")

MOST_WARNINGS = 100
_Settings = TypeVar("_Settings", bound=OperationSettings)


class Adapter(Generic[_Settings]):
    """One protocol in front of a gateway.

    Attributes:
        gateway: decides and records.
        settings: of the operator.
        took: time of decisions.
        errors: exceptions of ours by place; none of them reached a request.
        warned: what the operator was told, once each.
    """

    def __init__(self, gateway: Gateway, settings: _Settings) -> None:
        self.gateway, self.settings = gateway, settings
        self.took = Histogram()
        self.errors: dict[str, int] = {}
        self.warned: set[str] = set()

    def decide(self, facts: Facts) -> Verdict:
        """What to do with a request, timed."""
        began_s = time.perf_counter()
        verdict = self.gateway.decide(facts)
        self.took.add(time.perf_counter() - began_s)
        return verdict

    def known(self, what: str, name: object) -> str:
        """A `class` or `task` that the bundle knows; the default for any other."""
        layout, settings = self.gateway.bundle.layout, self.settings
        known = layout.class_names if what == "class" else layout.task_names
        default = (settings.default_class if what == "class" else settings.default_task) or known[0]
        if name is None or name == "":
            return default
        if name in known:
            return str(name)
        self.warn_once(f"{what} {str(name)[:60]!r} is not in the bundle; taken as {default!r}")
        return default

    def failed(self, where: str, error: Exception) -> None:
        """Counts an exception of ours, and logs the first of each place."""
        self.errors[where] = self.errors.get(where, 0) + 1
        if self.errors[where] == 1:
            log.warning("marginroute: %s failed; later ones are only counted (%r)", where, error)

    def warn_once(self, message: str) -> None:
        """Logs what an operator should see, once."""
        if message not in self.warned and len(self.warned) < MOST_WARNINGS:
            self.warned.add(message)
            log.warning("marginroute: %s", message)
