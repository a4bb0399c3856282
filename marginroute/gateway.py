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
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from marginroute import second_call
from marginroute import view as v
from marginroute.bundle import Bundle
from marginroute.contracts import REFUSED
from marginroute.control_loop import Report
from marginroute.decision import Decision
from marginroute.drift import DriftMonitor
from marginroute.facts import Facts, Verdict
from marginroute.feedback import QualityPosterior
from marginroute.following import Following
from marginroute.limits import Limit, LimitBook
from marginroute.modes import ModeSettings, ModeSwitch
from marginroute.rate_limits import RateLimit
from marginroute.record_log import RecordLog
from marginroute.runtime import Runtime, Setup, decision_of, retry_after_s, view_of
from marginroute.settling import pending_of, record_pending
from marginroute.spans import TracedRecords
from marginroute.view import View

log = logging.getLogger("marginroute.gateway")

COMPARE_EVERY = 4  # requests between two whose fallback is put a value on
LONGEST_RETRY_S = 3600.0  # that a request beyond a limit is told to stay away


class Gateway(Following):
    """Decides; what becomes of it, `Following` follows and records. Thread-safe.

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
        self._on_event = on_event
        self._note = getattr(records, "note", None)  # spans want to know their parents
        self._count, self.workers = 0, 1
        self.decided: dict[tuple[str, str, str, bool], int] = {}
        self.left_out: dict[str, int] = {}
        setup = Setup(
            clock, frozenset(can), waiting[0], stale_after_s, prefix_block_tokens, dict(rate_limits or {}), explore
        )
        switch = ModeSwitch(settings or ModeSettings(), clock, self._tell)
        runtime, book = setup.runtime(bundle, posterior), LimitBook(limits)
        super().__init__(setup, runtime, records, switch, book, dict(priority or {}), waiting)

    @property
    def drift(self) -> DriftMonitor | None:
        """Judges the distribution of requests, if the bundle says what training has seen."""
        return self._runtime.drift

    def decide(self, facts: Facts) -> Verdict:
        """What to do with a request, and whether to do it.

        A request that is asked about again gets the same verdict, unless it was acted on and its attempt has failed:
        then the rest of the candidates are decided on.

        Raises:
            InputError: a class, task or tier that the bundle does not know.
        """
        self._write_off()
        with self.lock:
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
            waited_s = self.clock() - earlier.began_s
        view = view_of(runtime, facts, attempt, waited_s, earlier.tried if earlier else set())
        reason = self._why_fallback(runtime, view, facts, earlier is None)
        refused = breach is not None and breach.refuse
        if holding is not None and not refused:
            with self.lock:
                holding.narrow(view, facts, earlier is None)
        decision = decision_of(runtime, view, acting, breach, reason)
        shed = decision.kind == v.KINDS[v.SHED]
        later_s = min(max(breach.left_s, 1.0), LONGEST_RETRY_S) if breach is not None and refused else None
        verdict = Verdict(decision, acting, attempt, later_s or retry_after_s(view) if shed else 0.0)
        self.switch.decided(acting, decision.guard != "" and not refused)
        judged = compared and self.switch.settings.mode != "shadow" and not refused
        pending = pending_of(facts, runtime, verdict, view, self.clock(), judged, earlier)
        with self.lock:
            self._pending[facts.id] = pending
            if earlier is not None:
                self._pending.move_to_end(facts.id)
            self._note_decision(decision, acting)
            if self.limits:
                if earlier is not None:
                    self._settle_spend(earlier, 0.0)
                pending.reserved_usd = abs(decision.reason_usd.get("cost", 0.0)) if not shed else 0.0
                self.limits.spend(facts, self._class(facts), pending.reserved_usd)
            if holding is not None and acting and holding.decided(facts, decision.kind, pending.began_s):
                pending.verdict = verdict = replace(verdict, held=True)
        if earlier is not None:
            self._records.write(record_pending(earlier))
        return verdict

    def hedge(self, id: str, available: Collection[str] | None = None) -> Verdict | None:
        """No first token of a request has come so far: who gets it, too. Who has it, means nobody: wait.

        None where there is nothing to decide: this gateway cannot hedge, or the request is with no candidate.

        Args:
            id: of the request.
            available: candidates that may serve it now; None: those of its last decision.
        """
        if "hedge" not in self._setup.can:
            return None
        with self.lock:
            pending, runtime, now_s = self._pending.get(id), self._runtime, self.clock()
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
        with self.lock:
            self._count += 1
            self._note_decision(decision, acting)
            self.hedges["asked"] += 1
            still = self._pending.get(id) is pending and runtime.index.get(pending.sent_to) == c and not pending.calls
            if acting and still and decision.candidate != c:
                self.hedges["sent"] += 1
                second_call.send(runtime, pending, decision)
            elif decision.candidate != c and acting:  # it has been answered meanwhile
                decision = replace(decision, candidate=c, name=pending.sent_to, kind=v.KINDS[view.layout.kind[c]])
        return Verdict(decision, acting, attempt)

    def scraped(self, candidate: str, waiting: float, running: float, kv_usage: float, age_s: float) -> None:
        """An engine's metrics page said so `age_s` seconds ago; ignored for a candidate that the bundle lacks."""
        with self.lock:
            c = self._runtime.index.get(candidate)
            if c is not None:
                self.state.scraped(c, waiting, running, kv_usage, age_s)

    def swap(self, bundle: Bundle, posterior: QualityPosterior | None = None) -> None:
        """Puts another bundle in charge, between two decisions; what is known and in flight is carried over by name.

        Raises:
            InputError: the bundle cannot do what this gateway was set up for; the old one stays.
        """
        with self.lock:
            old = self._runtime
            new = self._setup.runtime(bundle, posterior)
            new.state.take_over(old.state)
            if self.holding is not None:
                self.holding.take(new)
            self._runtime = new
        digests = {"bundle": bundle.digest[:12], "before": old.bundle.digest[:12]}
        self._tell({"event": "bundle", "at_s": time.time(), **digests})

    def reported(self, pool: str, report: Report) -> bool:
        """An autoscaler says what there is of a pool; False if no controller wants to know."""
        with self.lock:
            return self.holding is not None and self.holding.reported(pool, report)

    def replicas_wanted(self) -> dict[str, int] | None:
        """By pool; None: there is no controller, it has not ticked yet, or it may not act (shadow mode, rollback)."""
        with self.lock:
            loop = None if self.holding is None else self.holding.loop
            return None if loop is None or loop.ticks == 0 or self.switch.share < 1.0 else loop.replicas()

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
            **({"hedges": dict(self.hedges)} if "hedge" in self._setup.can else {}),
        }

    def _why_fallback(self, runtime: Runtime, view: View, facts: Facts, first: bool) -> str:
        """Why the fallback decides, if it does for a reason of the gateway's; a request's first View shows drift."""
        if runtime.drift is not None and first:
            with self.lock:
                if runtime.drift.wants(self.clock()):
                    runtime.saw(view)
        if runtime.drift is not None and runtime.drift.drifted:
            return "drift"
        if view.request.item(v.STANDING) == REFUSED:
            return ""  # by the contract: that says nothing of the candidates
        here = 1 in view.legal.tobytes()[: view.layout.n_answering]  # a third of the time of `any`
        return "" if here or self._only_spent(facts) else "missing"

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

    def _tell(self, event: dict[str, Any]) -> None:
        log.warning("marginroute: %s: %s", event["event"], event.get("reason") or event.get("bundle", ""))
        self._on_event(event)
