"""When a bundle must stop acting: limits, the window that they are judged over, and what breaks them.

Two groups of requests are counted apart over the last `window_s` seconds: those that the bundle acted on, and those
that were left to the gateway (the control group of a canary). *Surplus* is what a request really earned minus what
the fallback heuristic was expected to earn on it. The surplus of the control group, where there is one, is taken off:
it holds whatever the expectation gets wrong for every request alike.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields

from marginroute.errors import InputError

BUCKETS = 20  # of a window
SIGMAS = 2.0  # standard errors by which a surplus must be below its limit

CONTROL, ACTED = 0, 1


@dataclass(frozen=True)
class RollbackLimits:
    """Limits beyond which a bundle stops acting; None switches one off.

    Attributes:
        error_rate: most of the requests acted on that may fail.
        slo_attainment: least of the answers acted on that must meet every SLO of their class.
        margin_loss: most that may be lost against the fallback, as a share of the value of the requests.
        guard_share: most of all decisions that the guard may hand to the fallback (stale telemetry, drift, NaN).
        window_s: seconds that are looked back.
        min_requests: fewer in the window break nothing.
        hold_s: seconds in shadow mode after a rollback; doubles with each one that follows within ten of them.
        probation_share: of the requests, acted on after that for at least a window.
        recovery: share of each limit that must not be passed in probation.
    """

    error_rate: float | None = 0.1
    slo_attainment: float | None = 0.7
    margin_loss: float | None = 0.2
    guard_share: float | None = 0.5
    window_s: float = 300.0
    min_requests: int = 50
    hold_s: float = 600.0
    probation_share: float = 0.05
    recovery: float = 0.5

    def __post_init__(self) -> None:
        shares = ("error_rate", "slo_attainment", "margin_loss", "guard_share", "probation_share", "recovery")
        for name in shares:
            value = getattr(self, name)
            may_be_none = name not in ("probation_share", "recovery")
            if not (value is None and may_be_none) and not (_is_number(value) and 0.0 <= value <= 1.0):
                raise InputError(f"rollback.{name} = {value!r}; legal is 0 to 1" + ", or null" * may_be_none)
        for name in ("window_s", "hold_s"):
            if not (_is_number(getattr(self, name)) and getattr(self, name) > 0.0):
                raise InputError(f"rollback.{name} = {getattr(self, name)!r}; legal is a number above 0")
        if not isinstance(self.min_requests, int) or self.min_requests < 1:
            raise InputError(f"rollback.min_requests = {self.min_requests!r}; legal is a whole number above 0")

    def tightened(self) -> RollbackLimits:
        """The limits of probation."""
        return RollbackLimits(
            error_rate=_times(self.error_rate, self.recovery),
            slo_attainment=None if self.slo_attainment is None else 1.0 - (1.0 - self.slo_attainment) * self.recovery,
            margin_loss=_times(self.margin_loss, self.recovery),
            guard_share=_times(self.guard_share, self.recovery),
            window_s=self.window_s,
            min_requests=self.min_requests,
        )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)


def _times(limit: float | None, factor: float) -> float | None:
    return None if limit is None else limit * factor


@dataclass(slots=True)
class Counts:
    """What became of the requests of one group; sums over requests.

    Attributes:
        decisions: made.
        guarded: of those, handed to the fallback by the guard.
        requests: finished.
        failed: of those, without an answer because of errors.
        judged: answered, with an SLO that could be judged.
        met: of those, with every SLO met.
        compared: whose surplus is known.
        surplus_usd: earned minus expected of the fallback.
        surplus_usd2: its squares.
        value_usd: of the compared ones.
    """

    decisions: float = 0.0
    guarded: float = 0.0
    requests: float = 0.0
    failed: float = 0.0
    judged: float = 0.0
    met: float = 0.0
    compared: float = 0.0
    surplus_usd: float = 0.0
    surplus_usd2: float = 0.0
    value_usd: float = 0.0

    def add(self, other: Counts) -> None:
        """Adds the other's sums."""
        for name in _COUNTS:
            setattr(self, name, getattr(self, name) + getattr(other, name))

    @property
    def mean_usd(self) -> float:
        """Mean surplus."""
        return self.surplus_usd / self.compared if self.compared else 0.0

    @property
    def error_usd2(self) -> float:
        """Squared standard error of the mean surplus."""
        if self.compared < 2:
            return 0.0
        variance = max(self.surplus_usd2 / self.compared - self.mean_usd**2, 0.0)
        return variance / (self.compared - 1.0)


_COUNTS = tuple(f.name for f in fields(Counts))


@dataclass
class Window:
    """Counts of both groups over about the last `window_s` seconds, in buckets."""

    window_s: float
    _buckets: dict[int, tuple[Counts, Counts]] = field(default_factory=dict)

    def at(self, now_s: float, group: int) -> Counts:
        """Where to count what happens now."""
        number = int(now_s / self.window_s * BUCKETS)
        bucket = self._buckets.get(number)
        if bucket is None:
            self._forget(number)
            bucket = self._buckets[number] = (Counts(), Counts())
        return bucket[group]

    def sums(self, now_s: float) -> tuple[Counts, Counts]:
        """(control, acted) of the window that ends now."""
        self._forget(int(now_s / self.window_s * BUCKETS))
        total = Counts(), Counts()
        for bucket in self._buckets.values():
            for mine, theirs in zip(total, bucket, strict=True):
                mine.add(theirs)
        return total

    def clear(self) -> None:
        """Starts over."""
        self._buckets.clear()

    def _forget(self, number: int) -> None:
        for old in [n for n in self._buckets if n <= number - BUCKETS]:
            del self._buckets[old]


def broken(limits: RollbackLimits, control: Counts, acted: Counts) -> str:
    """What limit the counts break, in words; empty if none."""
    window, least = f"over the last {limits.window_s:g} s", limits.min_requests
    decisions = control.decisions + acted.decisions
    if limits.guard_share is not None and decisions >= least:
        share = (control.guarded + acted.guarded) / decisions
        if share > limits.guard_share:
            return f"the guard took {share:.0%} of the decisions {window}; the limit is {limits.guard_share:.0%}"
    if limits.error_rate is not None and acted.requests >= least:
        rate = acted.failed / acted.requests
        if rate > limits.error_rate:
            return f"{rate:.1%} of the requests acted on failed {window}; the limit is {limits.error_rate:.1%}"
    if limits.slo_attainment is not None and acted.judged >= least:
        attained = acted.met / acted.judged
        if attained < limits.slo_attainment:
            return f"SLO attainment was {attained:.1%} {window}; the limit is {limits.slo_attainment:.1%}"
    return _loss(limits, control, acted, window)


def _loss(limits: RollbackLimits, control: Counts, acted: Counts, window: str) -> str:
    if limits.margin_loss is None or acted.compared < limits.min_requests:
        return ""
    allowed_usd = limits.margin_loss * acted.value_usd / acted.compared
    lost_usd, error_usd2 = -acted.mean_usd, acted.error_usd2
    if control.compared >= limits.min_requests:
        lost_usd, error_usd2 = lost_usd + control.mean_usd, error_usd2 + control.error_usd2
    if lost_usd - SIGMAS * math.sqrt(error_usd2) <= allowed_usd:
        return ""
    return (
        f"margin was {1e3 * lost_usd:.4g} USD per 1,000 requests below the fallback's {window}; "
        f"the limit is {1e3 * allowed_usd:.4g}"
    )
