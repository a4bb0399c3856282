"""Rate limits of third-party providers: two token buckets per provider that a call must find room in.

Requests per minute: a call takes 1 from a bucket that fills at the limit. Tokens per minute: a call takes its prompt
when it is sent and its answer when that is complete; it needs room for the prompt (a full bucket is enough for a longer
one), so that answers may leave a debt. `has_room`, `contracts.refilled` and the sizes in `RateLimit` are what the
simulated world (`envs.fleet.provider`) goes by, too.

A provider's own word goes before the count: what its responses say is left of a limit lowers a bucket, and a refusal
(429) empties it and holds calls back until the time that it names.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from marginroute import view as v
from marginroute.contracts import refilled
from marginroute.errors import InputError
from marginroute.view import Array, Layout

BURST_S = 10.0  # of the limit that a bucket holds where its size is not given
LONGEST_HOLD_S = 3600.0  # that a provider's word can hold calls back
SHARED, WHAT = "rate", ("requests", "tokens")  # names under which workers share what they have used


def has_room(requests_left: float, tokens_left: float, prompt_tokens: float, size_tokens: float) -> bool:
    """Whether a call may be sent to a provider whose buckets hold so much; `size_tokens`: of the one of tokens."""
    return requests_left >= 1.0 and (tokens_left >= prompt_tokens or tokens_left >= size_tokens)


def share_spent(requests_left: float, size_requests: float, tokens_left: float, size_tokens: float) -> float:
    """Share of the buckets that is spent, of the emptier one; above 1 where answers have left a debt.

    What is not limited has an infinite size.
    """
    spent = 0.0
    if size_requests < math.inf:
        spent = max(spent, 1.0 - requests_left / size_requests)
    if size_tokens < math.inf:
        spent = max(spent, 1.0 - tokens_left / size_tokens)
    return spent


@dataclass(frozen=True)
class RateLimit:
    """What a provider lets through.

    Attributes:
        requests_per_minute: inf: any number.
        burst_requests: that may be sent at once after a quiet time; 0: ten seconds of the limit, at least 1.
        tokens_per_minute: of prompts and answers; inf: any number.
        burst_tokens: that may be used at once after a quiet time; 0: ten seconds of the limit.
    """

    requests_per_minute: float = math.inf
    burst_requests: float = 0.0
    tokens_per_minute: float = math.inf
    burst_tokens: float = 0.0

    @property
    def requests_per_s(self) -> float:
        """Rate at which the bucket of requests fills."""
        return self.requests_per_minute / 60.0

    @property
    def tokens_per_s(self) -> float:
        """Rate at which the bucket of tokens fills."""
        return self.tokens_per_minute / 60.0

    @property
    def per_s(self) -> tuple[float, float]:
        """Rates at which the buckets fill, of requests and of tokens."""
        return self.requests_per_s, self.tokens_per_s

    @property
    def limited(self) -> bool:
        """Whether it refuses anything."""
        return math.isfinite(min(self.per_s))

    @property
    def size_requests(self) -> float:
        """Of a full bucket."""
        return self.burst_requests or max(1.0, BURST_S * self.requests_per_s)

    @property
    def size_tokens(self) -> float:
        """Of a full bucket."""
        return self.burst_tokens or BURST_S * self.tokens_per_s

    def to_dict(self) -> dict[str, float]:
        """Plain data without what is not limited, for a bundle's manifest."""
        return {f.name: float(x) for f in fields(self) if (x := getattr(self, f.name)) != f.default}


class _Bucket:
    """One provider's two buckets; amounts are as of the times beside them, so that there is never less than those."""

    __slots__ = ("held_until_s", "limited", "per_s", "requests", "requests_at_s", "size", "tokens", "tokens_at_s")

    def __init__(self, limit: RateLimit, now_s: float) -> None:
        self.size, self.per_s, self.limited = (limit.size_requests, limit.size_tokens), limit.per_s, limit.limited
        self.requests, self.tokens = self.size
        self.requests_at_s = self.tokens_at_s = now_s
        self.held_until_s = -math.inf

    def requests_left(self, now_s: float) -> float:
        return refilled(self.requests, self.size[0], self.per_s[0], now_s - self.requests_at_s)

    def tokens_left(self, now_s: float) -> float:
        return refilled(self.tokens, self.size[1], self.per_s[1], now_s - self.tokens_at_s)

    def take(self, requests: float, tokens: float, now_s: float) -> None:
        if requests:
            self.requests, self.requests_at_s = self.requests_left(now_s) - requests, now_s
        if tokens:
            self.tokens, self.tokens_at_s = self.tokens_left(now_s) - tokens, now_s

    def lower(self, requests: float, tokens: float, now_s: float) -> None:
        """No more than so much is left."""
        self.requests, self.requests_at_s = min(self.requests_left(now_s), requests), now_s
        self.tokens, self.tokens_at_s = min(self.tokens_left(now_s), tokens), now_s


class RateBook:
    """The buckets of a layout's providers, by candidate. Thread-safe.

    Args:
        layout: the candidates.
        limits: by name of a provider; others have none until they hold calls back themselves.
        clock: seconds that never jump; every bucket is full to begin with.

    Attributes:
        left_out: decisions that a provider was left out of, its limit being spent, by candidate.
    """

    def __init__(self, layout: Layout, limits: Mapping[str, RateLimit], clock: Callable[[], float]) -> None:
        self._names, self._clock, self._lock = layout.names, clock, threading.Lock()
        providers = np.flatnonzero(layout.kind == v.PROVIDER).tolist()
        self._buckets = {c: _Bucket(limits.get(layout.names[c], RateLimit()), clock()) for c in providers}
        self._watched = [(c, bucket) for c, bucket in self._buckets.items() if bucket.limited]
        self.left_out: dict[int, int] = {}
        self._sharing = False
        self._fresh: dict[str, float] = {}
        self._own: dict[str, float] = {}  # used here, as far as others were told
        self._others: dict[str, float] = {}  # used elsewhere, as of the last exchange

    def spent(self, prompt_tokens: float, shares: Array | None = None) -> list[int]:
        """Candidates that would refuse a call with such a prompt now.

        Args:
            prompt_tokens: of the call.
            shares: (C,) where the share of its limits that is spent is written for each provider that has any.
        """
        found: list[int] = []
        if self._watched:
            with self._lock:
                now_s = self._clock()
                for c, bucket in self._watched:
                    requests, tokens = bucket.requests_left(now_s), bucket.tokens_left(now_s)
                    if shares is not None:
                        shares[c] = share_spent(requests, bucket.size[0], tokens, bucket.size[1])
                    if now_s < bucket.held_until_s or not has_room(requests, tokens, prompt_tokens, bucket.size[1]):
                        found.append(c)
        return found

    def sent(self, candidate: int, prompt_tokens: float) -> None:
        """A call leaves for a candidate; one that is no provider has no limit."""
        self._take(candidate, 1.0, prompt_tokens)

    def answered(self, candidate: int, output_tokens: float) -> None:
        """A call has ended after so many tokens."""
        self._take(candidate, 0.0, output_tokens)

    def told(
        self,
        candidate: int,
        requests_left: float | None = None,
        tokens_left: float | None = None,
        retry_after_s: float | None = None,
        ago_s: float = 0.0,
    ) -> bool:
        """A provider has said what is left of its limits, `ago_s` seconds ago; False of a candidate that is none.

        Args:
            candidate: whose word it is.
            requests_left: None: it did not say.
            tokens_left: the same.
            retry_after_s: it has refused a call, and takes the next one after that time; None: it has not.
            ago_s: since it said so; what has been refilled since is added.
        """
        if (bucket := self._buckets.get(candidate)) is None:
            return False
        with self._lock:
            now_s = self._clock()
            requests, tokens = (
                math.inf if amount is None else refilled(amount, size, per_s, ago_s)
                for amount, size, per_s in zip((requests_left, tokens_left), bucket.size, bucket.per_s, strict=True)
            )
            if retry_after_s is not None:
                requests = min(requests, 0.0)
                self._hold(candidate, now_s - ago_s + min(retry_after_s, LONGEST_HOLD_S))
            bucket.lower(requests, tokens, now_s)
        return True

    def note_left_out(self, candidates: Sequence[int]) -> None:
        """A decision is made without these providers, since their limits are spent."""
        with self._lock:
            for c in candidates:
                self.left_out[c] = self.left_out.get(c, 0) + 1

    def take_over(self, old: RateBook, candidates: Mapping[int, int]) -> None:
        """Goes on where the book of an earlier bundle ends; `candidates` leads from its indices to these."""
        with old._lock, self._lock:
            now_s = self._clock()
            for theirs, c in candidates.items():
                if theirs in old._buckets and c in self._buckets:
                    was = old._buckets[theirs]
                    self._buckets[c].lower(was.requests_left(now_s), was.tokens_left(now_s), now_s)
                    if was.held_until_s > now_s:
                        self._hold(c, was.held_until_s)
                    if theirs in old.left_out:
                        self.left_out[c] = old.left_out[theirs]
            self._sharing, self._fresh, self._own, self._others = old._sharing, old._fresh, old._own, old._others

    def to_share(self) -> tuple[dict[str, float], list[str]]:
        """What was used since the last time, and the names of what all workers have used."""
        with self._lock:
            self._sharing = True
            fresh, self._fresh = self._fresh, {}
            for name, amount in fresh.items():
                self._own[name] = self._own.get(name, 0.0) + amount
            return fresh, [self._name(c, what) for c, bucket in self._watched if bucket.limited for what in WHAT]

    def not_shared(self, fresh: Mapping[str, float]) -> None:
        """The exchange failed: what was used is told the next time."""
        with self._lock:
            for name, amount in fresh.items():
                self._own[name] -= amount
                self._fresh[name] = self._fresh.get(name, 0.0) + amount

    def shared(self, totals: Mapping[str, float]) -> None:
        """What all workers have used: what others have since the last exchange is taken here, too; empty: none told."""
        with self._lock:
            before, self._others = self._others, {}
            now_s = self._clock()
            for c, bucket in self._watched:
                names = [self._name(c, what) for what in WHAT]
                if not all(name in totals for name in names):
                    continue
                others = {name: totals[name] - self._own.get(name, 0.0) for name in names}
                requests, tokens = (max(x - before.get(name, x), 0.0) for name, x in others.items())
                bucket.take(requests, tokens, now_s)
                self._others |= others

    def _name(self, candidate: int, what: str) -> str:
        return f"{SHARED}:{self._names[candidate]}:{what}"

    def _hold(self, candidate: int, until_s: float) -> None:
        bucket = self._buckets[candidate]
        bucket.held_until_s = max(bucket.held_until_s, until_s)
        if all(c != candidate for c, _ in self._watched):
            self._watched.append((candidate, bucket))

    def _take(self, candidate: int, requests: float, tokens: float) -> None:
        bucket = self._buckets.get(candidate)
        if bucket is None or not bucket.limited:
            return
        with self._lock:
            bucket.take(requests, tokens, self._clock())
            if self._sharing:
                for what, amount in zip(WHAT, (requests, tokens), strict=True):
                    name = self._name(candidate, what)
                    self._fresh[name] = self._fresh.get(name, 0.0) + amount


def split(amounts: Mapping[str, float]) -> tuple[dict[str, float], dict[str, float]]:
    """Amounts that workers share: those of other limits, and those of providers."""
    rates = {name: amount for name, amount in amounts.items() if name.startswith(f"{SHARED}:")}
    return {name: amount for name, amount in amounts.items() if name not in rates}, rates


def rate_limits_from(rows: Any) -> dict[str, RateLimit]:
    """Rate limits by provider, from an operator's settings or a manifest.

    Raises:
        InputError: one is not as `RateLimit` says.
    """
    if not isinstance(rows, Mapping):
        raise InputError("rate_limits must map providers to limits, such as {api: {requests_per_minute: 90}}")
    return {str(name): _limit(row, f"rate_limits.{name}") for name, row in rows.items()}


def _limit(row: Any, place: str) -> RateLimit:
    if not isinstance(row, Mapping):
        raise InputError(f"{place} must map names to values, such as {{requests_per_minute: 90}}")
    known = [f.name for f in fields(RateLimit)]
    for key, x in row.items():
        if key not in known:
            raise InputError(f"{place}.{key} is unknown; legal: {', '.join(known)}")
        if isinstance(x, bool) or not isinstance(x, int | float) or not 0.0 < x < 1e15:
            raise InputError(f"{place}.{key} = {x!r}; legal is a number above 0")
    return RateLimit(**{key: float(x) for key, x in row.items()})


def check_providers(limits: Mapping[str, RateLimit], layout: Layout) -> None:
    """Raises InputError at a name that is no provider of the layout."""
    known: Sequence[str] = [name for name, kind in zip(layout.names, layout.kind, strict=True) if kind == v.PROVIDER]
    for name in limits:
        if name not in known:
            raise InputError(f"rate_limits: {name!r} is no provider of the bundle; legal: {', '.join(known) or 'none'}")
