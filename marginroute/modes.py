"""How far a bundle may act: shadow, canary or live, and back to shadow by itself when limits break.

    shadow   it decides beside the gateway and changes nothing
    canary   it acts on a share of the requests, the same tenants (sessions, requests) every time
    live     it acts on every request

After a rollback nothing is acted on for a while, then a small share in probation under tighter limits, then the
configured mode again: a limit that is broken now and then does not switch a gateway back and forth.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from marginroute.errors import InputError
from marginroute.rollback import ACTED, CONTROL, RollbackLimits, Window, broken

MODES = ("shadow", "canary", "live")
CANARY_BY = ("tenant", "session", "request")
CHECKS = 100  # of the limits in a window, at most
MOST_DOUBLINGS = 6

IN_FORCE, ROLLED_BACK, PROBATION = "in force", "rolled back", "probation"


@dataclass(frozen=True)
class ModeSettings:
    """What the operator allows.

    Attributes:
        mode: one of `MODES`.
        canary_share: of tenants, sessions or requests that a canary acts on.
        canary_by: what the share is drawn by; a request without a tenant or session is drawn by itself.
        canary_tenants: acted on in a canary whatever their hash says.
        rollback: when to go back to shadow.
    """

    mode: str = "shadow"
    canary_share: float = 0.05
    canary_by: str = "tenant"
    canary_tenants: tuple[str, ...] = ()
    rollback: RollbackLimits = field(default_factory=RollbackLimits)

    def __post_init__(self) -> None:
        for name, legal in (("mode", MODES), ("canary_by", CANARY_BY)):
            if getattr(self, name) not in legal:
                raise InputError(f"{name} = {getattr(self, name)!r}; legal: {', '.join(legal)}")
        if isinstance(self.canary_share, str) or not 0.0 <= self.canary_share <= 1.0:
            raise InputError(f"canary_share = {self.canary_share!r}; legal is 0 to 1")

    @property
    def share(self) -> float:
        """Of the requests that may be acted on."""
        return self.canary_share if self.mode == "canary" else float(self.mode == "live")


def position(key: str) -> float:
    """Where a key stands in [0, 1): the same on every machine, so that a growing share keeps whom it had."""
    return int.from_bytes(hashlib.blake2b(key.encode("utf-8", "replace"), digest_size=8).digest(), "big") / 2.0**64


@dataclass(slots=True)
class Result:
    """What became of one request, as far as limits ask.

    Attributes:
        failed: there was no answer because of errors.
        slos_met: whether every SLO that could be judged was met; None if none could.
        surplus_usd: earned minus what the fallback was expected to earn; None if that was not estimated.
        value_usd: of the request to its customer.
    """

    failed: bool
    slos_met: bool | None = None
    surplus_usd: float | None = None
    value_usd: float = 0.0


class ModeSwitch:
    """Says which requests are acted on, and rolls back. Thread-safe.

    Args:
        settings: of the operator.
        clock: seconds that never jump.
        on_event: told of every change, as plain data (`event`, `at_s` in Unix time, `reason`, `until_s`).
    """

    def __init__(
        self,
        settings: ModeSettings,
        clock: Callable[[], float] = time.monotonic,
        on_event: Callable[[dict[str, Any]], object] = lambda event: None,
    ) -> None:
        self.settings, self._clock, self._on_event = settings, clock, on_event
        self._window = Window(settings.rollback.window_s)
        self._lock = threading.Lock()
        self._state, self._since_s, self._until_s = IN_FORCE, clock(), 0.0
        self._checked_s = clock()
        self._doublings, self.rollbacks, self.reason = 0, 0, ""

    @property
    def state(self) -> str:
        """`in force`, `rolled back` or `probation`."""
        return self._state

    @property
    def share(self) -> float:
        """Of the requests that are acted on now."""
        if self._state == IN_FORCE:
            return self.settings.share
        if self._state == ROLLED_BACK:
            return 0.0
        return min(self.settings.share, self.settings.rollback.probation_share)

    def acts(self, request: str, tenant: str = "", session: str = "") -> bool:
        """Whether a new request is acted on."""
        self._advance()
        share, settings = self.share, self.settings
        if share <= 0.0 or share >= 1.0:
            return share > 0.0
        if settings.mode == "canary" and self._state == IN_FORCE and tenant in settings.canary_tenants:
            return True
        key = {"tenant": tenant, "session": session, "request": request}[settings.canary_by] or request
        return position(key) < share

    def decided(self, acted: bool, guarded: bool) -> None:
        """A decision was made; `guarded`: the guard handed it to the fallback."""
        with self._lock:
            counts = self._window.at(self._clock(), ACTED if acted else CONTROL)
            counts.decisions += 1.0
            counts.guarded += guarded

    def finished(self, acted: bool, result: Result) -> None:
        """A request has ended."""
        with self._lock:
            counts = self._window.at(self._clock(), ACTED if acted else CONTROL)
            counts.requests += 1.0
            counts.failed += result.failed
            if result.slos_met is not None:
                counts.judged += 1.0
                counts.met += result.slos_met
            if result.surplus_usd is not None:
                counts.compared += 1.0
                counts.surplus_usd += result.surplus_usd
                counts.surplus_usd2 += result.surplus_usd**2
                counts.value_usd += result.value_usd
        self._advance()

    def roll_back(self, reason: str) -> None:
        """Acts on nothing for the time that the settings say."""
        with self._lock:
            event = self._roll_back(reason, self._clock())
        self._on_event(event)

    def resume_rolled_back(self, left_s: float, reason: str) -> None:
        """Takes over a rollback that an earlier process had made and that has `left_s` seconds to go."""
        with self._lock:
            now_s = self._clock()
            self._state, self._since_s, self._until_s, self.reason = ROLLED_BACK, now_s, now_s + left_s, reason

    def status(self) -> dict[str, Any]:
        """Mode, state and the figures of the window, as plain data."""
        with self._lock:
            now_s = self._clock()
            control, acted = self._window.sums(now_s)
            left_s = max(self._until_s - now_s, 0.0) if self._state == ROLLED_BACK else 0.0
        return {
            "mode": self.settings.mode,
            "state": self._state,
            "share": self.share,
            "rollbacks": self.rollbacks,
            "reason": self.reason,
            "left_s": left_s,
            "acted": _figures(acted),
            "control": _figures(control),
        }

    def _advance(self) -> None:
        """Judges the limits, a hundred times a window at most, and moves from state to state."""
        now_s, limits = self._clock(), self.settings.rollback
        if self.settings.mode == "shadow" or now_s - self._checked_s < limits.window_s / CHECKS:
            return
        with self._lock:
            self._checked_s = now_s
            event = self._step(now_s, limits)
        if event is not None:
            self._on_event(event)

    def _step(self, now_s: float, limits: RollbackLimits) -> dict[str, Any] | None:
        control, acted = self._window.sums(now_s)
        if self._state == ROLLED_BACK:
            if now_s < self._until_s:
                return None
            if broken(limits.tightened(), control, acted):  # the guard's share is seen in shadow mode too
                self._until_s = now_s + limits.window_s
                return None
            self._window.clear()
            self._state, self._since_s = PROBATION, now_s
            return {"event": "probation", "at_s": time.time(), "reason": self.reason, "share": self.share}
        if reason := broken(limits, control, acted):
            return self._roll_back(reason, now_s)
        long_enough = now_s - self._since_s >= limits.window_s and acted.requests >= limits.min_requests
        if self._state == PROBATION and long_enough and not broken(limits.tightened(), control, acted):
            self._state, self._since_s = IN_FORCE, now_s
            return {"event": "in force", "at_s": time.time(), "reason": self.reason, "share": self.share}
        return None

    def _roll_back(self, reason: str, now_s: float) -> dict[str, Any]:
        hold_s = self.settings.rollback.hold_s
        again = self.rollbacks > 0 and now_s - self._until_s < 10.0 * hold_s
        self._doublings = min(self._doublings + 1, MOST_DOUBLINGS) if again else 0
        hold_s *= 2.0**self._doublings
        self._window.clear()
        self._state, self._since_s, self._until_s, self.reason = ROLLED_BACK, now_s, now_s + hold_s, reason
        self.rollbacks += 1
        at_s = time.time()
        return {"event": "rollback", "at_s": at_s, "reason": reason, "until_s": at_s + hold_s}


def _figures(counts: Any) -> dict[str, float | None]:
    def share(part: float, whole: float) -> float | None:
        return part / whole if whole else None

    return {
        "requests": counts.requests,
        "error_rate": share(counts.failed, counts.requests),
        "slo_attainment": share(counts.met, counts.judged),
        "surplus_usd_per_1k_requests": share(1e3 * counts.surplus_usd, counts.compared),
        "guard_share": share(counts.guarded, counts.decisions),
    }
