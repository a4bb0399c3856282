"""What several workers of one gateway tell each other through Redis; off the path of requests.

A thread exchanges, every `every_s`: this worker's counters go there, the others' come back and are added to what this
one knows (`telemetry.GatewayState.others`, `limits.LimitBook.others`). A decision reads memory only, so that a slow or
dead Redis delays none; what others did in the last moment is not seen yet.

Nothing can leak: a worker's counters stand under a lease that it renews, and count no more once that has run out
(killed, hung, cut off). A worker that Redis is lost to goes on with its own counters alone, and says so once.

Keys, all under one prefix: hash `PREFIX:workers` (worker -> JSON with its lease by Redis' clock), and one number with
an expiry for each limit, whom it is of, and period, and for each rate limit of a provider, `PREFIX:limit:...`. They
hold candidates, classes, tenants and sessions by name; no text, no key of a customer.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import urllib.parse
import uuid
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from marginroute import view as v
from marginroute.counters import COUNTERS
from marginroute.errors import InputError
from marginroute.rate_limits import split

if TYPE_CHECKING:
    from marginroute.gateway import Gateway

log = logging.getLogger("marginroute.gateway")

LEASE_INTERVALS, LEAST_LEASE_S = 10.0, 2.0
LIMIT_KEPT_S = 40 * 86400  # longer than any named period
TIMEOUT_S = 1.0
ROWS = (*COUNTERS, "queued")


def without_secrets(url: str) -> str:
    """A URL as it may be logged."""
    parts = urllib.parse.urlsplit(url)
    host = parts.hostname or ""
    return f"{parts.scheme}://{host}:{parts.port or 6379}{parts.path}"


class SharedCounters:
    """Exchanges counters in a thread of its own.

    Args:
        gateway: whose counters they are.
        url: `redis://`, `rediss://` or `unix://`.
        every_s: seconds between two exchanges.
        prefix: of all keys; gateways that serve other candidates need another one.

    Attributes:
        workers: that are alive, this one included.
        failures: exchanges that failed.

    Raises:
        InputError: the package is missing, or the URL is not legal.
    """

    def __init__(self, gateway: Gateway, url: str, every_s: float = 0.2, prefix: str = "marginroute") -> None:
        try:
            import redis
        except ImportError:
            raise InputError("redis is not installed; pip install 'marginroute[redis]'") from None
        if not every_s > 0.0:
            raise InputError(f"shared_s {every_s}; legal is a number above 0")
        try:
            self._redis: Any = redis.Redis.from_url(
                url, socket_timeout=TIMEOUT_S, socket_connect_timeout=TIMEOUT_S, decode_responses=True
            )
        except ValueError:
            raise InputError(f"shared {without_secrets(url)}: legal is redis://, rediss:// or unix://") from None
        self._gateway, self._every_s, self._prefix = gateway, every_s, prefix
        self._where = without_secrets(url)
        self.worker = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self.lease_s = max(LEASE_INTERVALS * every_s, LEAST_LEASE_S)
        self.workers, self.failures, self._failing = 0, 0, 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="marginroute-shared", daemon=True)

    def start(self) -> SharedCounters:
        """Starts to exchange."""
        self._thread.start()
        return self

    def stop(self) -> None:
        """Ends the thread and takes this worker's counters away."""
        self._stop.set()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(self._every_s + 2.0 * TIMEOUT_S)
        try:
            self._redis.hdel(f"{self._prefix}:workers", self.worker)
            self._redis.close()
        except Exception:
            log.debug("marginroute: %s is gone; the lease of this worker ends by itself", self._where)

    def exchange(self) -> None:
        """One exchange; raises what redis-py raises."""
        mine, fresh, asked = to_share(self._gateway)
        with self._redis.pipeline(transaction=False) as pipe:
            pipe.time()
            pipe.hgetall(f"{self._prefix}:workers")
            for name in fresh:
                pipe.incrbyfloat(self._key(name), fresh[name])
                pipe.expire(self._key(name), LIMIT_KEPT_S)
            if asked:
                pipe.mget([self._key(name) for name in asked])
            try:
                (seconds, micros), found, *more = pipe.execute()
            except Exception:
                not_shared(self._gateway, fresh)
                raise
        totals = dict(zip(asked, (float(x or 0.0) for x in more[-1]), strict=True)) if asked else {}
        now_s = seconds + 1e-6 * micros
        mine["until_s"] = now_s + self.lease_s
        self._redis.hset(f"{self._prefix}:workers", self.worker, json.dumps(mine))
        others = []
        for worker, text in found.items():
            if worker == self.worker:
                continue
            told = _parsed(text)
            if told is None or told["until_s"] < now_s:
                self._redis.hdel(f"{self._prefix}:workers", worker)
            else:
                others.append(told)
        self.workers = self._gateway.workers = 1 + len(others)
        take(self._gateway, _sum(others), totals)

    def _key(self, name: str) -> str:
        return f"{self._prefix}:limit:{name}"

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self.exchange()
                if self._failing:
                    log.warning("marginroute: counters are shared again through %s", self._where)
                self._failing = 0
            except Exception as error:
                self._failed(error)
            self._stop.wait(self._every_s)

    def _failed(self, error: Exception) -> None:
        self.failures += 1
        self._failing += 1
        if self._failing == 1:
            kind = type(error).__name__  # its text may hold the URL
            log.warning("marginroute: %s fails (%s); this worker goes on with its own counters", self._where, kind)
        if self._failing * self._every_s >= self.lease_s:
            self.workers = self._gateway.workers = 1
            take(self._gateway, {}, {})


def to_share(gateway: Gateway) -> tuple[dict[str, Any], dict[str, float], list[str]]:
    """What other workers are told, and what they are asked.

    Returns:
        Counters by candidate; what was used of limits since the last time; counters of limits that are of interest.
    """
    with gateway.lock:
        state, holding = gateway.state, gateway.holding
        names, counters = gateway.bundle.layout.names, state.counters()
        queued = [0 if holding is None else holding.queue.queued(name) for name in names]
        rows = np.array([*(counters[name] for name in COUNTERS), queued]).T.tolist()
        told = {name: row for name, row in zip(names, rows, strict=True) if any(row)}
        fresh, asked = gateway.limits.to_share()
        used, rates = state.rates.to_share()
        return {"counts": told, "arrivals_per_s": state.arrivals_per_s}, fresh | used, [*asked, *rates]


def not_shared(gateway: Gateway, fresh: Mapping[str, float]) -> None:
    """The exchange failed: what was used is told the next time."""
    with gateway.lock:
        limits, rates = split(fresh)
        gateway.state.rates.not_shared(rates)
        gateway.limits.not_shared(limits)


def take(gateway: Gateway, others: Mapping[str, Any], totals: Mapping[str, float]) -> None:
    """What other workers have at candidates, and what all have used of limits; empty: there are none."""
    with gateway.lock:
        index = {name: c for c, name in enumerate(gateway.bundle.layout.names)}
        rows = np.zeros((len(ROWS), len(index)))
        for name, values in others.get("counts", {}).items():
            if name in index:
                rows[:, index[name]] = values
        by_row = {v.SIGNAL_NAMES.index(name): rows[i] for i, name in enumerate(COUNTERS)} if others else {}
        at_engines = rows[COUNTERS.index("in_flight")] - rows[-1]
        gateway.state.others(by_row, at_engines, float(others.get("arrivals_per_s", 0.0)))
        limits, rates = split(totals)
        gateway.limits.shared(limits)
        gateway.state.rates.shared(rates)
    gateway.turn()


def _parsed(text: str) -> dict[str, Any] | None:
    try:
        told = json.loads(text)
        return told if isinstance(told, dict) and float(told["until_s"]) >= 0.0 else None
    except (ValueError, KeyError, TypeError):
        return None


def _sum(others: list[dict[str, Any]]) -> dict[str, Any]:
    """What all other workers have at each candidate, `ROWS` by name, and their arrivals per second."""
    counts: dict[str, np.ndarray[Any, Any]] = {}
    rate = 0.0
    for told in others:
        rate += float(told.get("arrivals_per_s", 0.0))
        for name, row in told.get("counts", {}).items():
            if isinstance(row, list) and len(row) == len(ROWS):
                counts[name] = counts.get(name, np.zeros(len(ROWS))) + np.array(row, dtype=np.float64)
    return {"counts": counts, "arrivals_per_s": rate}
