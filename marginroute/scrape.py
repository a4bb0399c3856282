"""Fetches the metrics pages of engines into a gateway's View, each at its own moment.

All endpoints share one thread. Every one is asked `every_s` seconds after the last time, give or take `JITTER`,
starting somewhere in the first interval, so that neither they nor several gateways fall into step. A page that does not
come in time leaves what was known and lets its age grow: the guard judges ages.
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


class _Endpoint:
    """One page and its timers."""

    def __init__(self, scraper: Scraper, name: str, url: str) -> None:
        self._scraper, self.name, self.url = scraper, name, url
        self._connection = PageConnection(address_of(url, f"telemetry of {name}"), MOST_PAGE_BYTES, self._done)
        self._timeout: asyncio.TimerHandle | None = None
        self._opening: asyncio.Task[None] | None = None
        self._asked_s = 0.0
        self.failing = ""

    def ask(self) -> None:
        """Fetches the page now, and plans the next time."""
        loop, scraper = asyncio.get_running_loop(), self._scraper
        self._asked_s = time.monotonic()
        self._timeout = loop.call_later(scraper.timeout_s, self._connection.give_up, "it does not answer in time")
        if not self._connection.ask():
            self._opening = loop.create_task(self._connection.fetch())
        loop.call_later(scraper.every_s * (1.0 + JITTER * (2.0 * random.random() - 1.0)), self.ask)

    def close(self) -> None:
        """Closes the connection."""
        self._connection.close()

    def _done(self, page: bytes | None, reason: str) -> None:
        if self._timeout is not None:
            self._timeout.cancel()
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
            self._loop.call_later(self.every_s * random.random(), endpoint.ask)
        try:
            self._loop.run_forever()
        finally:
            for endpoint in self.endpoints:
                endpoint.close()
            for task in asyncio.all_tasks(self._loop):
                task.cancel()
            self._loop.run_until_complete(asyncio.sleep(0.0))
            self._loop.close()
