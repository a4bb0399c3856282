"""What every adapter drives: decides requests, follows what becomes of them, and writes one record per decision.

An adapter tells, in this order for one request id:

    decide -> (sent -> hedge? -> first_token? -> progress* -> attempt_failed? -> decide?)* -> finished

and carries a decision out where the verdict says `acting`. A request that is decided again after a failed attempt
avoids the candidates that failed it, as long as there is another. A request of which nothing more is heard for
`stale_after_s` is written without an outcome, so that nothing is kept for ever. Candidates go by name, so that a
bundle may be swapped between any two calls.
"""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np

from marginroute import latency, second_call
from marginroute import view as v
from marginroute.bundle import Bundle
from marginroute.control_loop import Report
from marginroute.counters import COUNTERS
from marginroute.decision import Decision
from marginroute.drift import DriftMonitor
from marginroute.exploration import ExploringPolicy
from marginroute.facts import Facts, Outcome, Verdict
from marginroute.feedback import QualityPosterior
from marginroute.holding import Holding
from marginroute.limits import Limit, LimitBook
from marginroute.modes import ModeSettings, ModeSwitch
from marginroute.rate_limits import RateLimit, split
from marginroute.record import changing_rows
from marginroute.record_log import RecordLog
from marginroute.runtime import Runtime, decision_of, retry_after_s, view_of
from marginroute.settling import Pending, cost_usd_of, outcome_of, record_pending, result_of
from marginroute.spans import TracedRecords
from marginroute.telemetry import GatewayState

log = logging.getLogger("marginroute.gateway")

MOST_ANSWERED = 10_000  # answers that may still be judged
COMPARE_EVERY = 4  # requests between two whose fallback is put a value on
LONGEST_RETRY_S = 3600.0  # that a request beyond a limit is told to stay away


class Companion(Protocol):
    """Something that runs beside a gateway until it closes."""

    def stop(self) -> None:
        """Ends it."""


class Gateway:
    """Decides, follows and records. Thread-safe.

    Args:
        bundle: whose policy decides, under its guard.
        records: where records go.
        settings: how far the bundle may act.
        can: what the gateway could carry out beside sending a request on (see `telemetry.GatewayState`).
        stale_after_s: silence after which a request is written off.
        prefix_block_tokens: tokens per block hash of a prompt (see `telemetry.GatewayState`).
        posterior: what feedback says of P(good), if anything.
        explore: share of the decisions acted on that are drawn, and the USD that one may cost at most.
        clock: seconds that never jump.
        on_event: told of rollbacks and swaps, as plain data.
        waiting: `hold_s` and `lease_s` of requests that wait here (see `hold_queue.HoldQueue`).
        priority: by class, from 1 (first) up; requests that wait for a full replica go by it.
        limits: on spend, rate and retries.
        rate_limits: by provider, in place of the bundle's.

    Attributes:
        decided: decisions by candidate, kind, guard, and whether they are acted on.
        left_out: decisions that a replica was left out of, since its scrape was too old, by candidate.
        limits: what has been used of each.
        hedges: times that a second call was asked for, made, and first.
        workers: that share their counters, this one included.

    Raises:
        InputError: exploration is asked of a bundle without a margin rule, or the posterior is of another bundle.
    """

    def __init__(
        self,
        bundle: Bundle,
        records: RecordLog | TracedRecords,
        settings: ModeSettings | None = None,
        can: Collection[str] = ("shed",),
        stale_after_s: float = 7200.0,
        prefix_block_tokens: int = 0,
        posterior: QualityPosterior | None = None,
        explore: tuple[float, float] | None = None,
        clock: Callable[[], float] = time.monotonic,
        on_event: Callable[[dict[str, Any]], object] = lambda event: None,
        waiting: tuple[float, float] = (60.0, 30.0),
        priority: Mapping[str, int] | None = None,
        limits: Sequence[Limit] = (),
        rate_limits: Mapping[str, RateLimit] | None = None,
    ) -> None:
        self.clock = self._clock = clock
        self._on_event, self._explore, self._hold_s = on_event, explore, waiting[0]
        self._priority, self._rate_limits = dict(priority or {}), dict(rate_limits or {})
        self.switch = ModeSwitch(settings or ModeSettings(), clock, self._tell)
        self._records, self._stale_after_s, self._can = records, stale_after_s, frozenset(can)
        self._prefix_block_tokens = prefix_block_tokens
        self._note = getattr(records, "note", None)  # spans want to know their parents
        self._runtime = self._made(bundle, posterior)
        self._pending: OrderedDict[str, Pending] = OrderedDict()
        self._answered: OrderedDict[str, tuple[str, str, float]] = OrderedDict()  # tier, task, P(good) expected
        self._lock = threading.RLock()
        self._count = 0
        self.decided: dict[tuple[str, str, str, bool], int] = {}
        self.left_out: dict[str, int] = {}
        self.hedges = {"asked": 0, "sent": 0, "won": 0}
        self.limits, self.workers = LimitBook(limits), 1
        self._companions: list[Companion] = []
        self.holding: Holding | None = None
        if bundle.controller is not None or {"defer", "hold"} & self._can:
            self.holding = Holding(self, self._can, *waiting)
            self.holding.take(self._runtime)
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
    def drift(self) -> DriftMonitor | None:
        """Judges the distribution of requests, if the bundle says what training has seen."""
        return self._runtime.drift

    @property
    def pending(self) -> int:
        """Requests decided and not finished."""
        return len(self._pending)

    def decide(self, facts: Facts) -> Verdict:
        """What to do with a request, and whether to do it.

        A request that is asked about again gets the same verdict, unless it was acted on and its attempt has failed:
        then the rest of the candidates are decided on.

        Raises:
            InputError: a class, task or tier that the bundle does not know.
        """
        self._write_off()
        with self._lock:
            earlier = self._pending.get(facts.id)
            holding = self.holding
            released = holding is not None and holding.released(facts.id)
            if earlier is not None and not (earlier.verdict.acting and earlier.sent_to in earlier.tried) | released:
                self._seen(facts.id, earlier)
                return earlier.verdict
            if holding is not None:
                facts = holding.facts_of(facts, None if earlier is None else earlier.began_s)
            runtime = self._runtime
            self._count += 1
            compared = self._count % COMPARE_EVERY == 0
            breach = None
            if self.limits:
                tries = 1 if earlier is None else 0 if released else earlier.verdict.attempt + 1
                breach = self.limits.ask(facts, self._class(facts), tries)
        if facts.traceparent and self._note is not None:
            self._note(facts.id, facts.traceparent)
        if earlier is None:
            acting, attempt, waited_s = self.switch.acts(facts.id, facts.tenant, facts.session), 1, 0.0
        else:
            acting, attempt = True, earlier.verdict.attempt + 1
            waited_s = self._clock() - earlier.began_s
        view = view_of(runtime, facts, attempt, waited_s, earlier.tried if earlier else set())
        if runtime.drift is not None and earlier is None:
            with self._lock:
                if runtime.drift.wants(self._clock()):
                    runtime.saw(view)
        drifted = runtime.drift is not None and runtime.drift.drifted
        here = view.legal[: view.layout.n_answering].any() or self._only_spent(facts)
        reason = "drift" if drifted else "" if here else "missing"
        refused = breach is not None and breach.refuse
        if holding is not None and not refused:
            with self._lock:
                holding.narrow(view, facts, earlier is None)
        decision = decision_of(runtime, view, acting, breach, reason)
        shed = decision.kind == v.KINDS[v.SHED]
        later_s = min(max(breach.left_s, 1.0), LONGEST_RETRY_S) if breach is not None and refused else None
        verdict = Verdict(decision, acting, attempt, later_s or retry_after_s(view) if shed else 0.0)
        self.switch.decided(acting, decision.guard != "" and not refused)
        judged = compared and self.switch.settings.mode != "shadow" and not refused
        pending = Pending(
            facts=facts if facts.prompt is None else replace(facts, prompt=None),
            runtime=runtime,
            verdict=verdict,
            request=view.request,
            changing=changing_rows(view.signals),
            legal=view.legal,
            decided_at_s=time.time(),
            arrived_at_s=time.time() if earlier is None else earlier.arrived_at_s,
            seen_s=self._clock(),
            began_s=self._clock() if earlier is None else earlier.began_s,
            compared=judged,
            tried=set() if earlier is None else earlier.tried,
        )
        with self._lock:
            self._pending[facts.id] = pending
            self._note_decision(decision, acting)
            if self.limits:
                self._settle_spend(earlier, 0.0)
                pending.reserved_usd = abs(decision.reason_usd.get("cost", 0.0)) if not shed else 0.0
                self.limits.spend(facts, self._class(facts), pending.reserved_usd)
            if holding is not None and acting and holding.decided(facts, decision.kind, pending.began_s):
                pending.verdict = verdict = replace(verdict, held=True)
        if earlier is not None:
            self._records.write(record_pending(earlier))
        return verdict

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
        return None if pending is None else self._clock() - pending.began_s

    def sent(self, id: str, candidate: str, streamed: bool) -> bool:
        """The gateway sends a decided request to a candidate: ours where it is acted on, else of its own choice.

        Returns:
            True if it has to wait for its turn, since the candidate is full (`on_line`).
        """
        with self._lock:
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
            pending.sent_to, pending.sent_s, waits = candidate, self._clock(), False
            if self.holding is not None and pending.verdict.acting:
                self.state.end(id, "moved")
                waits = self.holding.sent(id, candidate, runtime.state.in_flight_at(c), self._rank(pending.facts))
            facts, estimate_s = pending.facts, None
            if not streamed and pending.runtime is runtime:
                decision = pending.verdict.decision
                estimate_s = decision.estimate_s if decision.candidate == c else None
                if estimate_s is None:
                    (ttft_s, tpot_s), _ = latency.estimate(pending.view())
                    estimate_s = float(ttft_s[c]), float(tpot_s[c])
            names = runtime.bundle.layout
            runtime.state.begin(
                id,
                c,
                facts.prompt_tokens,
                facts.class_name if facts.class_name in names.class_names else None,
                facts.task_name if facts.task_name in names.task_names else None,
                estimate_s,
                facts.hashes,
                facts.block_tokens,
                facts.session,
            )
        return waits

    def on_line(self, id: str, wake: Callable[[], object] | None) -> bool:
        """The caller of a request that waits is there, to be woken from any thread, or hangs up (None).

        Returns:
            Whether it has to wait; it has not if its turn has come already.
        """
        if self.holding is None:
            return False
        with self._lock:
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
        with self._lock:
            holding.tick()
            wakes, lost = holding.pump(self._runtime)
            left_s = holding.next_s() - self._clock()
        for wake in wakes:
            wake()
        for id in lost:
            self.finished(id, Outcome("abandoned"))
        return left_s

    def hedge(self, id: str, available: Collection[str] | None = None) -> Verdict | None:
        """No first token of a request has come so far: who gets it, too. Who has it, means nobody: wait.

        None where there is nothing to decide: this gateway cannot hedge, or the request is with no candidate.

        Args:
            id: of the request.
            available: candidates that may serve it now; None: those of its last decision.
        """
        if "hedge" not in self._can:
            return None
        with self._lock:
            pending, runtime, now_s = self._pending.get(id), self._runtime, self._clock()
            c = None if pending is None else runtime.index.get(pending.sent_to)
            if pending is None or c is None or pending.sent_to in pending.tried:
                return None
            self._seen(id, pending)
            facts = pending.facts if available is None else replace(pending.facts, available=available)
            waits = self.holding is not None and self.holding.waits(id)
            free = not (waits or pending.calls or self.state.begun(id))
            if free and self.limits:
                free = self.limits.ask(facts, self._class(facts), pending.verdict.attempt + 1) is None
        under_way = c, max(now_s - pending.sent_s, 1e-6)
        view = view_of(runtime, facts, 2, now_s - pending.began_s, pending.tried, under_way)
        if pending.runtime is runtime:
            view.signals[v.P_GOOD_PRIOR] = pending.changing[v.P_GOOD_PRIOR - v.N_STATIC_SIGNALS]
        second_call.narrow(view, c, free)
        decision = decision_of(runtime, view, False, reason="drift" if runtime.drift and runtime.drift.drifted else "")
        acting, attempt = pending.verdict.acting, pending.verdict.attempt
        with self._lock:
            self._count += 1
            self._note_decision(decision, acting)
            self.hedges["asked"] += 1
            still = self._pending.get(id) is pending and runtime.index.get(pending.sent_to) == c and not pending.calls
            if acting and still and decision.candidate != c:
                self.hedges["sent"] += 1
                pending.second, pending.calls = decision.name, (pending.sent_to, decision.name)
                runtime.state.begin(
                    second_call.second_key(id),
                    decision.candidate,
                    facts.prompt_tokens,
                    self._class(facts),
                    facts.task_name,
                    None,
                    facts.hashes,
                    facts.block_tokens,
                )
            elif decision.candidate != c and acting:  # it has been answered meanwhile
                decision = replace(decision, candidate=c, name=pending.sent_to, kind=v.KINDS[view.layout.kind[c]])
        return Verdict(decision, acting, attempt)

    def first_token(self, id: str, ago_s: float = 0.0, candidate: str = "") -> None:
        """The first token of a stream came `ago_s` seconds ago; of two calls, from `candidate`; empty: the first."""
        with self._lock:
            pending = self._pending.get(id)
            if pending is not None and pending.second:
                self.hedges["won"] += second_call.answered_by(self.state, pending, candidate or pending.sent_to)
            self.state.first_token(id if pending is None else second_call.key_of(pending), ago_s)

    def progress(self, id: str, tokens: int) -> None:
        """An answer has streamed `tokens` output tokens so far."""
        with self._lock:
            pending = self._pending.get(id)
            self.state.progress(id if pending is None else second_call.key_of(pending), tokens)

    def attempt_failed(self, id: str, candidate: str = "", retry_after_s: float | None = None) -> None:
        """One attempt failed; the gateway may try again. Of two calls that at `candidate`; empty: both.

        `retry_after_s`: a provider has refused it, its rate limit being spent, and takes the next call after that time.
        """
        with self._lock:
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

    def scraped(self, candidate: str, waiting: float, running: float, kv_usage: float, age_s: float) -> None:
        """An engine's metrics page said so `age_s` seconds ago; ignored for a candidate that the bundle lacks."""
        with self._lock:
            c = self._runtime.index.get(candidate)
            if c is not None:
                self.state.scraped(c, waiting, running, kv_usage, age_s)

    def rate_limit_told(
        self,
        candidate: str,
        requests_left: float | None = None,
        tokens_left: float | None = None,
        retry_after_s: float | None = None,
        ago_s: float = 0.0,
    ) -> bool:
        """A provider's response said what is left of its rate limits (see `RateBook.told`); False: it is none."""
        with self._lock:
            c = self._runtime.index.get(candidate, -1)
            return self.state.rates.told(c, requests_left, tokens_left, retry_after_s, ago_s)

    def finished(self, id: str, outcome: Outcome) -> bool:
        """Records what happened; False if the request is unknown or was recorded before."""
        with self._lock:
            runtime = self._runtime
            kind = runtime.bundle.layout.kind[runtime.index.get(outcome.served_by, -1)]
            taught = outcome.output_tokens if kind <= v.PROVIDER else None  # a stored answer says nothing of an engine
            pending = self._pending.pop(id, None)
            key = id
            if pending is not None:
                if pending.second:
                    self.hedges["won"] += second_call.answered_by(self.state, pending, outcome.served_by)
                key = second_call.key_of(pending)
            self.state.end(key, outcome.status, taught, outcome.attempt_ttft_s, outcome.attempt_e2e_s)
            if pending is not None:
                second_call.over(self.state, pending)
            if pending is not None and outcome.status == "completed":
                self._remember_answer(pending, outcome.served_by)
        if pending is None:
            return False
        record = record_pending(pending)
        for name in ("status", "served_by", "ttft_s", "e2e_s", "prompt_tokens", "output_tokens"):
            setattr(record, name, getattr(outcome, name))
        record.cost_usd = cost_usd_of(pending, outcome) if outcome.cost_usd is None else outcome.cost_usd
        if pending.calls and outcome.cost_usd is None and record.cost_usd is not None:
            record.cost_usd += second_call.spare_usd(pending, outcome)
        if self.limits:
            with self._lock:
                self._settle_spend(pending, record.cost_usd or 0.0)
        result = result_of(pending, outcome, record.cost_usd)
        self.switch.finished(pending.verdict.acting, result)
        counted = outcome_of(pending, outcome, result.slos_met)
        if counted is not None:
            runtime.state.settled(pending.facts.class_name, *counted)
        if self.holding is not None:
            with self._lock:
                self.holding.ended(pending.facts, outcome.status, result.slos_met)
            self.turn()
        self._records.write(record)
        return True

    def judged(self, id: str, good: bool) -> bool:
        """Somebody or something has judged the answer to a finished request; False if it is not remembered.

        The View's `surprise` and `judged` of its tier and task go by it from the next decision on.
        """
        with self._lock:
            tier, task, expected = self._answered.pop(id, ("", "", 0.0))
            layout = self.bundle.layout
            if tier not in layout.tier_names or task not in layout.task_names:
                return False
            self.state.judged(layout.tier_names.index(tier), layout.task_names.index(task), float(good) - expected)
        return True

    def _remember_answer(self, pending: Pending, served_by: str) -> None:
        c, layout = pending.runtime.index.get(served_by, -1), pending.runtime.bundle.layout
        if layout.kind[c] > v.PROVIDER:
            return
        task = layout.task_names[int(pending.request[v.TASK_INDEX])]
        expected = float(pending.changing[v.P_GOOD_PRIOR - v.N_STATIC_SIGNALS, c])
        if (fitted := pending.runtime.policy.quality) is not None:
            tier, prompt_tokens = layout.tier[c], float(pending.request[v.PROMPT_TOKENS])
            expected = fitted.of_one(expected, tier, int(pending.request[v.TASK_INDEX]), prompt_tokens)
        self._answered[pending.facts.id] = layout.tier_names[layout.tier[c]], task, expected
        while len(self._answered) > MOST_ANSWERED:
            self._answered.popitem(last=False)

    def swap(self, bundle: Bundle, posterior: QualityPosterior | None = None) -> None:
        """Puts another bundle in charge, between two decisions; what is known and in flight is carried over by name.

        Raises:
            InputError: the bundle cannot do what this gateway was set up for; the old one stays.
        """
        with self._lock:
            old = self._runtime
            new = self._made(bundle, posterior)
            new.state.take_over(old.state)
            if self.holding is not None:
                self.holding.take(new)
            self._runtime = new
        digests = {"bundle": bundle.digest[:12], "before": old.bundle.digest[:12]}
        self._tell({"event": "bundle", "at_s": time.time(), **digests})

    def reported(self, pool: str, report: Report) -> bool:
        """An autoscaler says what there is of a pool; False if no controller wants to know."""
        with self._lock:
            return self.holding is not None and self.holding.reported(pool, report)

    def replicas_wanted(self) -> dict[str, int] | None:
        """By pool; None: there is no controller, it has not ticked yet, or it may not act (shadow mode, rollback)."""
        with self._lock:
            loop = None if self.holding is None else self.holding.loop
            return None if loop is None or loop.ticks == 0 or self.switch.share < 1.0 else loop.replicas()

    def to_share(self) -> tuple[dict[str, Any], dict[str, float], list[str]]:
        """What other workers are told (see `shared`), and what they are asked.

        Returns:
            Counters by candidate; what was used of limits since the last time; counters of limits that are of interest.
        """
        with self._lock:
            names, counters = self._runtime.bundle.layout.names, self.state.counters()
            queued = [0 if self.holding is None else self.holding.queue.queued(name) for name in names]
            rows = np.array([*(counters[name] for name in COUNTERS), queued]).T.tolist()
            told = {name: row for name, row in zip(names, rows, strict=True) if any(row)}
            fresh, asked = self.limits.to_share()
            used, rates = self.state.rates.to_share()
            fresh, asked = fresh | used, [*asked, *rates]
        return {"counts": told, "arrivals_per_s": self.state.arrivals_per_s}, fresh, asked

    def not_shared(self, fresh: Mapping[str, float]) -> None:
        """The exchange failed: what was used is told the next time."""
        with self._lock:
            limits, rates = split(fresh)
            self.state.rates.not_shared(rates)
            for name, amount in limits.items():
                self.limits.fresh[name] = self.limits.fresh.get(name, 0.0) + amount

    def shared(self, others: Mapping[str, Any], totals: Mapping[str, float]) -> None:
        """What other workers have at candidates, and what all have used of limits; empty: there are none."""
        with self._lock:
            layout, index = self._runtime.bundle.layout, self._runtime.index
            rows = np.zeros((len(COUNTERS) + 1, layout.n_candidates))
            for name, values in others.get("counts", {}).items():
                if name in index:
                    rows[:, index[name]] = values
            by_row = {v.SIGNAL_NAMES.index(name): rows[i] for i, name in enumerate(COUNTERS)} if others else {}
            at_engines = rows[COUNTERS.index("in_flight")] - rows[-1]
            self.state.others(by_row, at_engines, float(others.get("arrivals_per_s", 0.0)))
            limits, rates = split(totals)
            self.limits.shared(limits)
            self.state.rates.shared(rates)
        self.turn()

    def status(self) -> dict[str, Any]:
        """Mode, rollback, bundle and what is under way, as plain data."""
        bundle = self.bundle
        return {
            **self.switch.status(),
            "policy": bundle.policy.name,
            "bundle": bundle.digest[:12],
            "pending": self.pending,
            "in_flight": self.state.in_flight,
            "decisions": self._count,
            "workers": self.workers,
            **({} if self.holding is None else self.holding.status()),
            **({"hedges": dict(self.hedges)} if "hedge" in self._can else {}),
        }

    def keep(self, companion: Companion) -> None:
        """Stops something that runs beside the gateway when that closes."""
        self._companions.append(companion)

    def close(self) -> None:
        """Writes what is still pending, without outcome, and closes the log."""
        while self._companions:
            self._companions.pop().stop()
        with self._lock:
            left = list(self._pending.values())
            self._pending.clear()
        for pending in left:
            self._records.write(record_pending(pending))
        self._records.close()

    def _made(self, bundle: Bundle, posterior: QualityPosterior | None) -> Runtime:
        state = GatewayState(
            bundle,
            self._clock,
            can=self._can,
            hold_s=self._hold_s,
            stale_after_s=self._stale_after_s,
            prefix_block_tokens=self._prefix_block_tokens,
            posterior=posterior,
            rate_limits=self._rate_limits,
        )
        guarded, explorer = bundle.guarded(), None
        if self._explore is not None:
            share, limit_usd = self._explore
            seed = int.from_bytes(os.urandom(8), "big")
            explorer = ExploringPolicy(guarded, bundle.required_estimate(), share, limit_usd, seed)
        index = {name: c for c, name in enumerate(bundle.layout.names)}
        blind = () if bundle.predictor is not None else ("difficulty_signal",)
        drift = None if bundle.histograms is None else DriftMonitor(bundle.histograms, blind)
        return Runtime(bundle, state, guarded, explorer, bundle.estimate, index, drift)

    def _seen(self, id: str, pending: Pending) -> None:
        """A sign of life of a request: it is written off later."""
        pending.seen_s = self._clock()
        self._pending.move_to_end(id)

    def _class(self, facts: Facts) -> str:
        return facts.class_name or self._runtime.bundle.layout.class_names[0]

    def _only_spent(self, facts: Facts) -> bool:
        """Whether a provider may serve a request but for its rate limit."""
        names = self.bundle.layout.names
        spent = [names[c] for c in self.state.rates.spent(facts.prompt_tokens)]
        return any(facts.available is None or name in facts.available for name in spent)

    def _note_decision(self, decision: Decision, acting: bool) -> None:
        key = decision.name, decision.kind, decision.guard, acting
        self.decided[key] = self.decided.get(key, 0) + 1
        for name in decision.left_out:
            self.left_out[name] = self.left_out.get(name, 0) + 1

    def _settle_spend(self, pending: Pending | None, cost_usd: float) -> None:
        """What was reserved for a request becomes what it cost."""
        if pending is not None:
            self.limits.spend(pending.facts, self._class(pending.facts), cost_usd - pending.reserved_usd)
            pending.reserved_usd = 0.0

    def _rank(self, facts: Facts) -> int:
        return self._priority.get(facts.class_name or "", 1 + max(self._priority.values(), default=0))

    def _tell(self, event: dict[str, Any]) -> None:
        log.warning("marginroute: %s: %s", event["event"], event.get("reason") or event.get("bundle", ""))
        self._on_event(event)

    def _write_off(self) -> None:
        now_s, stale = self._clock(), []
        with self._lock:
            while self._pending:
                id, oldest = next(iter(self._pending.items()))
                if now_s - oldest.seen_s <= self._stale_after_s:
                    break
                stale.append(self._pending.pop(id))
                self._settle_spend(oldest, 0.0)
                if self.holding is not None:
                    self.holding.queue.leave(id)
        for pending in stale:
            self._records.write(record_pending(pending))
