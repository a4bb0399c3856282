"""One world of the fleet engine that runs by the clock on the wall: seconds there times `speed` are its seconds.

The world moves when a request arrives and when an iteration ends. Event loops round their timers up to milliseconds;
`fine_loop` does not, so tokens are late by the work that the loop has to do. A loop that cannot keep up hands over
several tokens at once; the world's times stay right, since they are the engine's.
"""

from __future__ import annotations

import asyncio
import dataclasses
import math
import select
import selectors
import time
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from envs.fleet import engine, scaling
from envs.fleet.allocation import Fleet, allocate
from envs.fleet.faults import slow_replica
from envs.fleet.provider import submit_provider
from envs.fleet.spec import FleetSpec
from envs.fleet.state import ACTIVE, COMPLETED, DRAINING, FAILED, LEAVING, LOST, NO_CAP
from envs.fleet.streaming import next_change_s, streamed

MOST_IN_FLIGHT = 8192  # over all replicas and providers


if hasattr(selectors, "EpollSelector"):

    class _FineSelector(selectors.EpollSelector):
        """Waits for microseconds, where epoll itself waits for whole milliseconds."""

        def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
            """Events within `timeout` seconds."""
            if timeout is not None and timeout > 0.0:
                select.select([self.fileno()], [], [], timeout)
                timeout = 0.0
            return super().select(timeout)


def fine_loop() -> asyncio.AbstractEventLoop:
    """An event loop with fine timers, where the system has them."""
    if hasattr(selectors, "EpollSelector"):
        return asyncio.SelectorEventLoop(_FineSelector())
    return asyncio.new_event_loop()


@dataclasses.dataclass(frozen=True)
class Station:
    """What has an address of its own: a replica or a provider.

    Attributes:
        name: First part of its path.
        model: Name under which it serves its model.
        replica: Index over all replicas, or None.
        provider: Index of the provider, or None.
        max_model_len: Most tokens of prompt and answer together.
    """

    name: str
    model: str
    replica: int | None
    provider: int | None
    max_model_len: int


class Answer:
    """One request as its handler sees it; times in the world's seconds.

    Attributes:
        station: Who answers.
        prompt_tokens: Of the request.
        output_tokens: That it will have.
        tokens: Streamed so far.
        ended: Nothing will follow.
        refused: The engine or the provider would not take it.
        lost: A fault has ended it.
        gone: Its user has hung up.
    """

    __slots__ = (
        "_waiter",
        "ended",
        "gone",
        "last_token_s",
        "lost",
        "output_tokens",
        "prompt_tokens",
        "refused",
        "row",
        "station",
        "submitted_s",
        "tokens",
    )

    def __init__(self, station: Station, prompt_tokens: int, output_tokens: int, row: int, now_s: float) -> None:
        self.station, self.prompt_tokens, self.output_tokens, self.row = station, prompt_tokens, output_tokens, row
        self.submitted_s, self.last_token_s = now_s, math.nan
        self.tokens, self.ended, self.refused, self.gone = 0, False, False, False
        self.lost = False
        self._waiter: asyncio.Future[None] | None = None

    async def more_than(self, tokens: int) -> None:
        """Returns once there are more tokens than that, the answer has ended, or its user has hung up."""
        while self.tokens <= tokens and not (self.ended or self.gone):
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter

    def wake(self) -> None:
        """Lets the handler look."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


Observer = Callable[[Answer, int, float], None]
"""Called with (answer, new tokens, world's time of the last of them); `answer` is as of before them."""


class LiveFleet:
    """The fleet, its clock, and the answers that are under way.

    Args:
        spec: The fleet. Its in-flight caps are a gateway's business and are left out.
        speed: The world's seconds per second.
        seed: Of the providers' latencies.
        on_tokens: Sees every token.
    """

    def __init__(self, spec: FleetSpec, speed: float, seed: int, on_tokens: Observer) -> None:
        pools = tuple(dataclasses.replace(pool, in_flight_cap=NO_CAP) for pool in spec.pools)
        self.spec, self.speed = dataclasses.replace(spec, pools=pools), speed
        self.fleet: Fleet = allocate(self.spec, 1, MOST_IN_FLIGHT)
        self._rng, self._on_tokens = np.random.default_rng(seed), on_tokens
        self._requests = {name: self.fleet.requests[0][name] for name in self.fleet.requests.dtype.names}
        self._free = list(range(MOST_IN_FLIGHT - 1, -1, -1))
        self._answers: dict[int, Answer] = {}
        self._listed: tuple[npt.NDArray[np.int64], list[Answer]] | None = None
        self._timer: asyncio.Handle | None = None
        self._due_s = math.inf
        self._compile()
        self._started_at_s = time.perf_counter()

    @property
    def now_s(self) -> float:
        """The world's time by the wall's clock."""
        return (time.perf_counter() - self._started_at_s) * self.speed

    @property
    def in_flight(self) -> int:
        """Answers that are under way."""
        return len(self._answers)

    def submit(self, station: Station, prompt_tokens: int, output_tokens: int) -> Answer | None:
        """Sends a request now; None where there is no room for one more."""
        self._advance()
        if not self._free:
            return None
        row, now_s = self._free.pop(), float(self.fleet.worlds[0]["clock_s"])
        self._write(row, prompt_tokens, output_tokens)
        answer = Answer(station, prompt_tokens, output_tokens, row, now_s)
        if station.provider is None:
            engine.submit(*self.fleet.arrays, 0, station.replica, row, now_s)
        else:
            provider = self.spec.providers[station.provider]
            ttft_z, tpot_z = self._rng.standard_normal(2)
            ttft_s = provider.ttft_s * math.exp(provider.ttft_sigma * ttft_z)
            tpot_s = provider.tpot_s * math.exp(provider.tpot_sigma * tpot_z)
            submit_provider(*self.fleet.arrays, 0, station.provider, row, now_s, ttft_s, tpot_s)
        self._answers[row], self._listed = answer, None
        if self._requests["status"][row] in (FAILED, LOST):
            self._look()
        self._due_s = now_s  # an idle replica starts at once
        self._schedule()
        return answer

    def leave(self, answer: Answer) -> None:
        """The user is gone: what waits is dropped when its turn comes, what runs is computed to its end."""
        if not answer.ended:
            self._requests["patience_until_s"][answer.row] = self.fleet.worlds[0]["clock_s"]

    def serves(self, station: Station) -> bool:
        """Whether a replica runs, or a provider has no outage."""
        self.refresh()
        if station.provider is not None:
            return not self.fleet.providers[0][station.provider]["down"]
        return self.fleet.replicas[0][station.replica]["state"] in (ACTIVE, DRAINING, LEAVING)

    def cause_fault(self, station: Station, duration_s: float, slowdown: float) -> None:
        """A fault from now on: `slowdown` is a factor on latency, or inf for down."""
        self._advance()
        now_s = float(self.fleet.worlds[0]["clock_s"])
        after_s, loop = duration_s / self.speed, asyncio.get_running_loop()
        if station.provider is not None:
            provider = self.fleet.providers[0, station.provider : station.provider + 1]
            name, value, healthy = ("down", 1, 0) if math.isinf(slowdown) else ("slowdown", slowdown, 1.0)
            provider[name] = value
            loop.call_later(after_s, provider.__setitem__, name, healthy)
        elif math.isinf(slowdown):
            scaling.fail_replica(*self.fleet.arrays, 0, station.replica, now_s + duration_s, now_s)
        else:
            self._slow(station.replica, slowdown)
            loop.call_later(after_s, self._slow, station.replica, 1.0)
        self._look()
        self._schedule()

    def set_replicas(self, pool: int, target: int) -> None:
        """Scales a pool from now on."""
        self._advance()
        scaling.set_replicas(*self.fleet.arrays, 0, pool, target, float(self.fleet.worlds[0]["clock_s"]))
        self._look()
        self._schedule()

    def _slow(self, replica: int | None, factor: float) -> None:
        self._advance()
        slow_replica(*self.fleet.arrays, 0, replica, factor, float(self.fleet.worlds[0]["clock_s"]))
        self._look()
        self._schedule()

    def retry_after_s(self, station: Station, prompt_tokens: int) -> float:
        """Seconds on the wall until a provider takes such a call, if it has no other."""
        row, now_s = self.fleet.providers[0][station.provider], float(self.fleet.worlds[0]["clock_s"])
        limit = self.spec.providers[station.provider].rate_limit
        tokens = min(prompt_tokens, limit.size_tokens)
        opens_s = (
            float(row["bucket_at_s"]) + (1.0 - float(row["bucket"])) / limit.requests_per_s,
            float(row["token_bucket_at_s"]) + (tokens - float(row["token_bucket"])) / limit.tokens_per_s,
        )
        left_s = [at_s - now_s for at_s in opens_s if math.isfinite(at_s)]  # not finite: there is no such limit
        return max([0.0, *left_s]) / self.speed

    def stop(self) -> None:
        """Ends every answer where it is."""
        if self._timer is not None:
            self._timer.cancel()
        for answer in self._answers.values():
            answer.ended = True
            answer.wake()

    def refresh(self) -> None:
        """Moves the world to now."""
        self._advance()
        self._schedule()

    def _write(self, row: int, prompt_tokens: int, output_tokens: int) -> None:
        engine.reset_request(self.fleet.requests, 0, row)
        self._requests["prompt_tokens"][row] = prompt_tokens
        self._requests["output_tokens"][row] = output_tokens
        self._requests["patience_until_s"][row] = math.inf

    def _compile(self) -> None:
        """Runs a request through every kernel, so that no user waits for the compiler."""
        arrays, rows = self.fleet.arrays, np.zeros(1, np.int64)
        engine.reset_world(*arrays, 0)
        self._write(0, 8, 2)
        engine.submit(*arrays, 0, 0, 0, 0.0)
        if self.spec.providers:
            self._write(1, 8, 2)
            submit_provider(*arrays, 0, 0, 1, 0.0, 0.1, 0.1)
        self._look(rows, [Answer(Station("", "", 0, None, 0), 8, 2, 0, 0.0)])
        scaling.advance(*arrays, 0, 1e9)
        while engine.pop_finished(self.fleet.worlds, self.fleet.requests, 0) >= 0:
            pass
        engine.reset_world(*arrays, 0)

    def _advance(self) -> None:
        scaling.advance(*self.fleet.arrays, 0, max(self.now_s, float(self.fleet.worlds[0]["clock_s"])))
        if self._answers:
            self._look()

    def _look(self, rows: npt.NDArray[np.int64] | None = None, answers: list[Answer] | None = None) -> None:
        """Tells every answer what is new, and finds out when there will be more."""
        if rows is None or answers is None:
            if self._listed is None:
                listed = list(self._answers.values())
                self._listed = np.array([answer.row for answer in listed], np.int64), listed
            rows, answers = self._listed
        fleet = self.fleet
        tokens, token_at_s = np.empty(len(rows), np.int64), np.empty(len(rows))
        streamed(fleet.worlds, fleet.replicas, fleet.requests, 0, rows, tokens, token_at_s)
        self._due_s = next_change_s(fleet.worlds, fleet.replicas, fleet.requests, 0, rows, tokens)
        self._due_s = min(self._due_s, float(fleet.worlds[0]["next_change_s"]))
        for answer, count, at_s in zip(answers, tokens.tolist(), token_at_s.tolist(), strict=True):
            if count > answer.tokens:
                self._on_tokens(answer, count - answer.tokens, at_s)
                answer.tokens, answer.last_token_s = count, at_s
                answer.wake()
        self._collect()

    def _collect(self) -> None:
        """Ends the answers whose request has ended, and frees its row."""
        while (row := engine.pop_finished(self.fleet.worlds, self.fleet.requests, 0)) >= 0:
            self._free.append(row)
            answer = self._answers.pop(row, None)
            self._listed = None
            if answer is not None:
                status = self._requests["status"][row]
                answer.ended, answer.refused, answer.lost = True, status != COMPLETED, status == LOST
                answer.wake()

    def _schedule(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if not self._answers:
            return
        loop = asyncio.get_running_loop()
        left_s = (self._due_s - self.now_s) / self.speed
        if left_s > 0.0:
            self._timer = loop.call_later(left_s, self._tick)
        else:
            self._timer = loop.call_soon(self._tick)

    def _tick(self) -> None:
        self._timer = None
        self._advance()
        self._schedule()
