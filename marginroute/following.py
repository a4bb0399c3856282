"""Follows the requests of a gateway that were decided: where their calls are, who waits, and what comes of each.

Every request leaves one record per decision: that of an earlier attempt when it is decided again, the last one with its
outcome, or without where it is written off or the gateway closes.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import partial
from typing import Protocol

from marginroute import second_call
from marginroute import view as v
from marginroute.answered import Answered
from marginroute.bundle import Bundle
from marginroute.facts import Facts, Outcome
from marginroute.holding import Holding
from marginroute.limits import LimitBook
from marginroute.modes import ModeSwitch
from marginroute.record_log import RecordLog
from marginroute.runtime import Runtime, Setup
from marginroute.settling import Pending, outcome_of, record_finished, record_pending, result_of
from marginroute.spans import TracedRecords
from marginroute.telemetry import GatewayState


class Companion(Protocol):
    """Something that runs beside a gateway until it closes."""

    def stop(self) -> None:
        """Ends it."""


class Following:
    """What becomes of decided requests; a `gateway.Gateway` decides them. Thread-safe.

    Args:
        setup: what the gateway can do.
        runtime: the bundle at work.
        records: where records go.
        switch: told how requests end.
        limits: told what they cost.
        priority: by class, from 1 (first) up; requests that wait for a full replica go by it.
        waiting: `hold_s` and `lease_s` of requests that wait here (see `hold_queue.HoldQueue`).

    Attributes:
        clock: seconds that never jump.
        lock: held while anything changes; the thread that has it may take it again.
        switch: how far the bundle may act.
        limits: what has been used of each.
        holding: who waits, and the controller; None: nobody can, and there is none.
        hedges: times that a second call was asked for, made, and first.
    """

    def __init__(
        self,
        setup: Setup,
        runtime: Runtime,
        records: RecordLog | TracedRecords,
        switch: ModeSwitch,
        limits: LimitBook,
        priority: Mapping[str, int],
        waiting: tuple[float, float],
    ) -> None:
        self.clock, self.lock = setup.clock, threading.RLock()
        self.switch, self.limits = switch, limits
        self.hedges = {"asked": 0, "sent": 0, "won": 0}
        self._setup, self._runtime, self._records, self._priority = setup, runtime, records, priority
        self._pending: OrderedDict[str, Pending] = OrderedDict()  # longest silent first
        self._answered = Answered()
        self._companions: list[Companion] = []
        self.holding: Holding | None = None
        if runtime.bundle.controller is not None or {"defer", "hold"} & setup.can:
            self.holding = Holding(self, setup.can, *waiting)
            self.holding.take(runtime)
            self.keep(self.holding.start())

    @property
    def bundle(self) -> Bundle:
        """The bundle that decides now."""
        return self._runtime.bundle

    @property
    def state(self) -> GatewayState:
        """What the gateway knows."""
        return self._runtime.state

    @property
    def pending(self) -> int:
        """Requests decided and not finished."""
        return len(self._pending)

    def arrived_at_s(self, id: str) -> float | None:
        """Unix time of a pending request's first decision."""
        pending = self._pending.get(id)
        return None if pending is None else pending.arrived_at_s

    def sent_to(self, id: str) -> str:
        """Candidate that has a pending request; empty: none has. Of two, the first one."""
        pending = self._pending.get(id)
        return "" if pending is None else pending.sent_to

    def waited_s(self, id: str) -> float | None:
        """Seconds since a pending request's first decision, by the clock that never jumps."""
        pending = self._pending.get(id)
        return None if pending is None else self.clock() - pending.began_s

    def sent(self, id: str, candidate: str, streamed: bool) -> bool:
        """The gateway sends a decided request to a candidate: ours where it is acted on, else of its own choice.

        Returns:
            True if it has to wait for its turn, since the candidate is full (`on_line`).
        """
        with self.lock:
            pending, runtime = self._pending.get(id), self._runtime
            c = runtime.index.get(candidate)
            if pending is None or c is None:
                return False
            if pending.sent_to == candidate and candidate not in pending.tried:
                return self.holding is not None and self.holding.waits(id)
            if candidate == pending.second:
                return False  # `hedge` has counted it
            second_call.over(self.state, pending)
            pending.calls = ()
            pending.sent_to, pending.sent_s, waits = candidate, self.clock(), False
            if self.holding is not None and pending.verdict.acting:
                self.state.end(id, "moved")
                waits = self.holding.sent(id, candidate, runtime.state.in_flight_at(c), self._rank(pending.facts))
            estimate_s = None if streamed or pending.runtime is not runtime else pending.estimate_s(c)
            runtime.begin(id, c, pending.facts, estimate_s, pending.facts.session)
        return waits

    def on_line(self, id: str, wake: Callable[[], object] | None) -> bool:
        """The caller of a request that waits is there, to be woken from any thread, or hangs up (None).

        Returns:
            Whether it has to wait; it has not if its turn has come already.
        """
        if self.holding is None:
            return False
        with self.lock:
            if (pending := self._pending.get(id)) is not None:
                self._seen(id, pending)
            waits = self.holding.on_line(id, wake)
        if waits and wake is not None:
            self.turn()
        return waits

    def turn(self) -> float:
        """Lets through who can go on, and asks the controller if it is time; seconds until there is more to do."""
        holding = self.holding
        if holding is None:
            return math.inf
        with self.lock:
            holding.tick()
            wakes, lost = holding.pump(self._runtime)
            left_s = holding.next_s() - self.clock()
        for wake in wakes:
            wake()
        for id in lost:
            self.finished(id, Outcome("abandoned"))
        return left_s

    def first_token(self, id: str, ago_s: float = 0.0, candidate: str = "") -> None:
        """The first token of a stream came `ago_s` seconds ago; of two calls, from `candidate`; empty: the first."""
        with self.lock:
            pending = self._pending.get(id)
            if pending is not None and pending.second:
                self.hedges["won"] += second_call.answered_by(self.state, pending, candidate or pending.sent_to)
            self.state.first_token(id if pending is None else second_call.key_of(pending), ago_s)

    def progress(self, id: str, tokens: int) -> None:
        """An answer has streamed `tokens` output tokens so far."""
        with self.lock:
            pending = self._pending.get(id)
            self.state.progress(id if pending is None else second_call.key_of(pending), tokens)

    def attempt_failed(self, id: str, candidate: str = "", retry_after_s: float | None = None) -> None:
        """One attempt failed; the gateway may try again. Of two calls that at `candidate`; empty: both.

        `retry_after_s`: a provider has refused it, its rate limit being spent, and takes the next call after that time.
        """
        with self.lock:
            pending = self._pending.get(id)
            if retry_after_s is not None and pending is not None:
                self.rate_limit_told(candidate or pending.sent_to, retry_after_s=retry_after_s)
            if pending is None:
                self.state.end(id, "failed")
            elif not second_call.failed(self.state, pending, candidate):
                return
            elif pending.sent_to:
                pending.tried |= {pending.sent_to, *pending.calls}
                pending.calls = ()
            if self.holding is not None:
                self.holding.queue.leave(id)
        self.turn()

    def rate_limit_told(
        self,
        candidate: str,
        requests_left: float | None = None,
        tokens_left: float | None = None,
        retry_after_s: float | None = None,
        ago_s: float = 0.0,
    ) -> bool:
        """A provider's response said what is left of its rate limits (see `RateBook.told`); False: it is none."""
        with self.lock:
            c = self._runtime.index.get(candidate, -1)
            return self.state.rates.told(c, requests_left, tokens_left, retry_after_s, ago_s)

    def finished(self, id: str, outcome: Outcome) -> bool:
        """Records what happened; False if the request is unknown or was recorded before."""
        settle = self.ended(id, outcome)
        if settle is not None:
            settle()
        return settle is not None

    def ended(self, id: str, outcome: Outcome) -> Callable[[], None] | None:
        """The first half of `finished`: its calls leave the counters. What is returned does the rest, and may wait.

        None if the request is unknown or was recorded before.
        """
        with self.lock:
            runtime = self._runtime
            pending = self._pending.pop(id, None)
            self._leaves(id, pending, outcome)
        return None if pending is None else partial(self._settle, pending, outcome, runtime)

    def _settle(self, pending: Pending, outcome: Outcome, runtime: Runtime) -> None:
        record = record_finished(pending, outcome)
        if self.limits:
            with self.lock:
                self._settle_spend(pending, record.cost_usd or 0.0)
        result = result_of(pending, outcome, record.cost_usd)
        self.switch.finished(pending.verdict.acting, result)
        counted = outcome_of(pending, outcome, result.slos_met)
        if counted is not None:
            runtime.state.settled(pending.facts.class_name, *counted)
        if self.holding is not None:
            with self.lock:
                self.holding.ended(pending.facts, outcome.status, result.slos_met)
            self.turn()
        self._records.write(record)

    def judged(self, id: str, good: bool) -> bool:
        """Somebody or something has judged the answer to a finished request; False if it is not remembered.

        The View's `surprise` and `judged` of its tier and task go by it from the next decision on.
        """
        with self.lock:
            found = self._answered.judged(id, good, self.bundle.layout)
            if found is not None:
                self.state.judged(*found)
        return found is not None

    def keep(self, companion: Companion) -> None:
        """Stops something that runs beside the gateway when that closes."""
        self._companions.append(companion)

    def close(self) -> None:
        """Writes what is still pending, without outcome, and closes the log."""
        while self._companions:
            self._companions.pop().stop()
        with self.lock:
            left = list(self._pending.values())
            self._pending.clear()
        for pending in left:
            self._records.write(record_pending(pending))
        self._records.close()

    def _leaves(self, id: str, pending: Pending | None, outcome: Outcome) -> None:
        """The calls of a request leave the counters; what its answer teaches, if there is one, is learnt."""
        kind = self.bundle.layout.kind[self._runtime.index.get(outcome.served_by, -1)]
        taught = outcome.output_tokens if kind <= v.PROVIDER else None  # a stored answer says nothing of an engine
        key = id
        if pending is not None:
            if pending.second:
                self.hedges["won"] += second_call.answered_by(self.state, pending, outcome.served_by)
            key = second_call.key_of(pending)
        self.state.end(key, outcome.status, taught, outcome.attempt_ttft_s, outcome.attempt_e2e_s)
        if pending is not None:
            second_call.over(self.state, pending)
            if outcome.status == "completed":
                self._answered.note(pending, outcome.served_by)

    def _seen(self, id: str, pending: Pending) -> None:
        """A sign of life of a request: it is written off later."""
        pending.seen_s = self.clock()
        self._pending.move_to_end(id)

    def _class(self, facts: Facts) -> str:
        return facts.class_name or self.bundle.layout.class_names[0]

    def _rank(self, facts: Facts) -> int:
        return self._priority.get(facts.class_name or "", 1 + max(self._priority.values(), default=0))

    def _settle_spend(self, pending: Pending, cost_usd: float) -> None:
        """What was reserved for a request becomes what it cost."""
        self.limits.spend(pending.facts, self._class(pending.facts), cost_usd - pending.reserved_usd)
        pending.reserved_usd = 0.0

    def _write_off(self) -> None:
        now_s, stale = self.clock(), []
        with self.lock:
            while self._pending:
                id, oldest = next(iter(self._pending.items()))
                if now_s - oldest.seen_s <= self._setup.stale_after_s:
                    break
                stale.append(self._pending.pop(id))
                self._settle_spend(oldest, 0.0)
                if self.holding is not None:
                    self.holding.queue.leave(id)
        for pending in stale:
            self._records.write(record_pending(pending))
