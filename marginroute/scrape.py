"""Fetches the metrics pages of engines into a gateway's View, each at its own moment.

All endpoints share one thread. Every one is asked `every_s` seconds after the last time, give or take `JITTER`,
starting somewhere in the first interval, so that neither they nor several gateways fall into step. What is due within a
`GRAIN` is done together: waking the thread up costs more than a page does. A page that does not come in time leaves
what was known and lets its age grow: the guard judges ages.
"""

from __future__ import annotations

import asyncio
import logging
import random
import threading
import time
from collections.abc import Mapping

from marginroute.errors import InputError
from marginroute.gateway import Gateway
from marginroute.metric_pages import MOST_PAGE_BYTES, engine_load
from marginroute.page_client import PageConnection, address_of

log = logging.getLogger("marginroute.gateway")

JITTER = 0.1  # of the interval
GRAIN = 0.05  # of the timeout


class _Endpoint:
    """One page, and when something is to be done about it."""

    def __init__(self, scraper: Scraper, name: str, url: str) -> None:
        self._scraper, self.name, self.url = scraper, name, url
        self._connection = PageConnection(address_of(url, f"telemetry of {name}"), MOST_PAGE_BYTES, self._done)
        self._opening: asyncio.Task[None] | None = None
        self._asked_s = self._due_s = 0.0
        self.next_s, self.failing = 0.0, ""

    def begin(self, now_s: float) -> None:
        """Plans the first time."""
        self.next_s = self._due_s = now_s + self._scraper.every_s * random.random()

    def act(self, now_s: float) -> None:
        """Gives up a page that is late, and fetches it if it is due."""
        self._connection.give_up("it does not answer in time")
        if now_s < self._due_s:
            return
        scraper = self._scraper
        self._asked_s, self.next_s = now_s, now_s + scraper.timeout_s
        planned_s = max(self._due_s, now_s - scraper.grain_s)
        self._due_s = planned_s + scraper.every_s * (1.0 + JITTER * (2.0 * random.random() - 1.0))
        if not self._connection.ask():
            self._opening = asyncio.get_running_loop().create_task(self._connection.fetch())

    def close(self) -> None:
        """Closes the connection."""
        self._connection.close()

    def _done(self, page: bytes | None, reason: str) -> None:
        self.next_s = self._due_s
        if page is None:
            self._failed(reason)
            return
        try:
            load = engine_load(page)
        except InputError as error:
            self._failed(str(error))
            return
        age_s = time.monotonic() - self._asked_s
        self._scraper.gateway.scraped(self.name, load.waiting, load.running, load.kv_usage, age_s)
        self._scraper.scrapes += 1
        if self.failing:
            log.warning("marginroute: telemetry of %s is back", self.name)
            self.failing = ""

    def _failed(self, reason: str) -> None:
        self._scraper.failures += 1
        if not self.failing:
            log.warning("marginroute: telemetry of %s (%s) fails: %s", self.name, self.url, reason)
        self.failing = reason


class Scraper:
    """Scrapes in a thread of its own until `stop`.

    Args:
        gateway: whose View it feeds.
        urls: metrics page by candidate.
        every_s: seconds between two scrapes of one page.
        timeout_s: seconds after which one is given up; at most `every_s` of them count.

    Attributes:
        grain_s: what is due within it is done together.
        scrapes: pages that were read.
        failures: pages that did not come, or could not be read.

    Raises:
        InputError: a candidate, URL or interval that is not legal.
    """

    def __init__(self, gateway: Gateway, urls: Mapping[str, str], every_s: float = 1.0, timeout_s: float = 1.0) -> None:
        if not (every_s > 0.0 and timeout_s > 0.0):
            raise InputError(f"telemetry_s {every_s}, telemetry_timeout_s {timeout_s}; legal are numbers above 0")
        replicas = gateway.bundle.layout.names[: gateway.bundle.layout.n_replicas]
        for name in urls:
            if name not in replicas:
                raise InputError(f"telemetry of {name!r}: no replica of the bundle; legal: {', '.join(replicas)}")
        self.gateway, self.every_s, self.timeout_s = gateway, every_s, min(timeout_s, (1.0 - JITTER) * every_s)
        self.grain_s = GRAIN * self.timeout_s
        self.scrapes = self.failures = 0
        self.endpoints = [_Endpoint(self, name, str(url)) for name, url in urls.items()]
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="marginroute-telemetry", daemon=True)

    def start(self) -> Scraper:
        """Starts to scrape; from now on the age of every page that is never seen grows."""
        for endpoint in self.endpoints:
            self.gateway.scraped(endpoint.name, 0.0, 0.0, 0.0, 0.0)
        self._thread.start()
        return self

    def stop(self) -> None:
        """Ends the thread and closes the connections."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(5.0)

    @property
    def failing(self) -> dict[str, str]:
        """Candidates whose last scrape failed, and why."""
        return {endpoint.name: endpoint.failing for endpoint in self.endpoints if endpoint.failing}

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        for endpoint in self.endpoints:
            endpoint.begin(time.monotonic())
        self._loop.call_soon(self._act)
        try:
            self._loop.run_forever()
        finally:
            for endpoint in self.endpoints:
                endpoint.close()
            opening = asyncio.all_tasks(self._loop)
            for task in opening:
                task.cancel()
            self._loop.run_until_complete(asyncio.wait(opening) if opening else asyncio.sleep(0.0))
            self._loop.close()

    def _act(self) -> None:
        now_s = time.monotonic()
        for endpoint in self.endpoints:
            if now_s >= endpoint.next_s:
                endpoint.act(now_s)
        self._loop.call_later(self.grain_s, self._act)
