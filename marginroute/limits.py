"""What an operator lets a tenant, a class, a session or everybody use up in a period; beyond it requests are refused.

    limits:
      - {of: tenant, usd: 50, per: day}                   spend: what their answers cost the operator
      - {of: class, name: batch, usd: 900, per: month}    of one class alone
      - {of: tenant, requests: 600, per: minute}          rate
      - {of: session, requests: 200, per: hour}           a runaway agent
      - {of: all, retries: 100, per: minute, then: fallback}   a retry storm

A period begins with the minute, hour, day or month of UTC, or is so many seconds. Spend is reserved by the decision's
own estimate and settled by what the answer really cost, so that many requests at once cannot pass a budget together.
With shared counters (`shared`) all workers count together; else each worker counts its own requests.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from marginroute.errors import InputError
from marginroute.facts import Facts

OF = ("all", "class", "tenant", "session")
WHAT = ("usd", "requests", "retries")
PERIODS_S = {"minute": 60.0, "hour": 3600.0, "day": 86400.0}
THEN = ("refuse", "fallback")
MOST_SHARED = 500  # counters that others are asked for at a time
MOST_KEYS = 100_000  # of which use is remembered; those that were quiet for longest are forgotten


@dataclass(frozen=True)
class Limit:
    """One limit.

    Attributes:
        of: whose use is counted, one of `OF`; requests without a tenant or session are not counted by it.
        what: is counted: `usd`, `requests`, or `retries`.
        most: of that, in a period.
        per: `minute`, `hour`, `day`, `month`, or seconds.
        name: of the one class, tenant or session that it is for; empty: each has its own.
        then: `refuse` requests beyond it, or let the `fallback` decide.
    """

    of: str
    what: str
    most: float
    per: str | float
    name: str = ""
    then: str = "refuse"

    @property
    def reason(self) -> str:
        """As records and metrics name it."""
        kind = {"usd": "budget", "requests": "rate", "retries": "retries"}[self.what]
        return f"{kind}-{self.of}"

    def key(self, facts: Facts, class_name: str) -> str | None:
        """Whose use a request is; None: nobody's that this limit knows."""
        if self.of == "all":
            return ""
        who = {"class": class_name, "tenant": facts.tenant, "session": facts.session}[self.of]
        return who if who and self.name in ("", who) else None

    def period(self, unix_s: float) -> tuple[str, float]:
        """Name of the period that a time is in, and seconds until it ends."""
        if self.per == "month":
            at = time.gmtime(unix_s)
            following = (at.tm_year + at.tm_mon // 12, at.tm_mon % 12 + 1)
            return f"{at.tm_year}-{at.tm_mon}", _month_s(*following) - unix_s
        length_s = PERIODS_S[self.per] if isinstance(self.per, str) else float(self.per)
        number = unix_s // length_s
        return str(int(number)), (number + 1.0) * length_s - unix_s


def _month_s(year: int, month: int) -> float:
    import calendar

    return float(calendar.timegm((year, month, 1, 0, 0, 0)))


@dataclass(frozen=True)
class Breach:
    """A request is beyond a limit: which, what follows, and when the period ends."""

    reason: str
    refuse: bool
    left_s: float


class LimitBook:
    """Use by limit, whom it is of, and period; not thread-safe (its gateway's lock is held).

    Args:
        limits: of the operator.
        wall_s: Unix time.

    Attributes:
        used: amount by counter name, in order of last use; `fresh`: the same since it was last shared.
        others: what other workers have used, where counters are shared.
    """

    def __init__(self, limits: Sequence[Limit], wall_s: Callable[[], float] = time.time) -> None:
        self._limits, self._wall_s = tuple(limits), wall_s
        self.used: OrderedDict[str, float] = OrderedDict()
        self.fresh: dict[str, float] = {}
        self.others: dict[str, float] = {}
        self._told: dict[str, float] = {}
        self.sharing = False
        self.breaches: dict[str, int] = {}

    def __bool__(self) -> bool:
        return bool(self._limits)

    def ask(self, facts: Facts, class_name: str, attempt: int) -> Breach | None:
        """Counts an attempt of a request, unless it is refused; the first limit that it is beyond."""
        found, now_s, counted = None, self._wall_s(), []
        for i, limit in enumerate(self._limits):
            own = {"requests": attempt == 1, "retries": attempt > 1, "usd": True}[limit.what]
            if not own or (key := limit.key(facts, class_name)) is None:
                continue
            period, left_s = limit.period(now_s)
            name = f"{i}:{period}:{key}"
            if self.sharing and name not in self.used:
                self._add(name, 0.0)  # what others have used of it will be asked for
            if self.amount(name) >= limit.most and (found is None or (limit.then == "refuse" and not found.refuse)):
                found = Breach(limit.reason, limit.then == "refuse", left_s)
            elif limit.what != "usd":
                counted.append(name)
        if found is not None:
            self.breaches[found.reason] = self.breaches.get(found.reason, 0) + 1
        if found is None or not found.refuse:
            for name in counted:
                self._add(name, 1.0)
        return found

    def spend(self, facts: Facts, class_name: str, usd: float) -> None:
        """Reserves USD for a request, gives some back (negative), or takes what it cost."""
        if usd == 0.0:
            return
        now_s = self._wall_s()
        for i, limit in enumerate(self._limits):
            if limit.what == "usd" and (key := limit.key(facts, class_name)) is not None:
                self._add(f"{i}:{limit.period(now_s)[0]}:{key}", usd)

    def amount(self, name: str) -> float:
        """Used by all workers."""
        return self.used.get(name, 0.0) + self.others.get(name, 0.0)

    def to_share(self) -> tuple[dict[str, float], list[str]]:
        """What was used since the last time, and the counters that others may have moved: those asked for last."""
        self.sharing = True
        fresh, self.fresh = {name: x for name, x in self.fresh.items() if x}, {}
        asked = [*fresh, *(name for name in islice(reversed(self.used), MOST_SHARED) if name not in fresh)]
        self._told = {name: self.used.get(name, 0.0) for name in asked}
        return fresh, asked

    def not_shared(self, fresh: Mapping[str, float]) -> None:
        """The exchange failed: what was used is told the next time."""
        for name, amount in fresh.items():
            self.fresh[name] = self.fresh.get(name, 0.0) + amount

    def shared(self, totals: Mapping[str, float]) -> None:
        """What all workers have used, of the counters that were asked for."""
        if len(self.others) > MOST_KEYS or not totals:
            self.others.clear()
        for name, total in totals.items():
            self.others[name] = total - self._told.get(name, 0.0)

    def _add(self, name: str, amount: float) -> None:
        self.used[name] = self.used.get(name, 0.0) + amount
        if self.sharing:
            self.fresh[name] = self.fresh.get(name, 0.0) + amount
        self.used.move_to_end(name)
        while len(self.used) > MOST_KEYS:
            gone, _ = self.used.popitem(last=False)
            self.fresh.pop(gone, None)
            self.others.pop(gone, None)


def limits_from(rows: Any) -> tuple[Limit, ...]:
    """Limits from an operator's settings.

    Raises:
        InputError: one is not as the module says.
    """
    if not isinstance(rows, Sequence) or isinstance(rows, str):
        raise InputError("limits must be a list, such as [{of: tenant, usd: 50, per: day}]")
    return tuple(_limit(row, f"limits[{i}]") for i, row in enumerate(rows))


def _limit(row: Any, place: str) -> Limit:
    if not isinstance(row, Mapping):
        raise InputError(f"{place} must map names to values, such as {{of: tenant, usd: 50, per: day}}")
    known = ("of", *WHAT, "per", "name", "then")
    if (unknown := next((key for key in row if key not in known), None)) is not None:
        raise InputError(f"{place}.{unknown} is unknown; legal: {', '.join(known)}")
    what = [name for name in WHAT if name in row]
    if len(what) != 1:
        raise InputError(f"{place} must name one of {', '.join(WHAT)}")
    most, per = row[what[0]], row.get("per", "")
    if isinstance(most, bool) or not isinstance(most, int | float) or not 0.0 <= most < 1e15:
        raise InputError(f"{place}.{what[0]} = {most!r}; legal is a number from 0 up")
    number = isinstance(per, int | float) and not isinstance(per, bool) and 1.0 <= per < 1e9
    if not number and per not in (*PERIODS_S, "month"):
        raise InputError(f"{place}.per = {per!r}; legal: {', '.join(PERIODS_S)}, month, or seconds from 1 up")
    for key, legal in (("of", OF), ("then", THEN)):
        if row.get(key, legal[0]) not in legal:
            raise InputError(f"{place}.{key} = {row[key]!r}; legal: {', '.join(legal)}")
    return Limit(row.get("of", "all"), what[0], float(most), per, str(row.get("name", "")), row.get("then", "refuse"))
