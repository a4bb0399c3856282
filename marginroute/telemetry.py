"""What a gateway knows by itself -> View: own counters, own latencies, lengths and arrival rate, and scraped metrics.

The world (`envs.world`) shows its policy the same signals with the same meaning, so that a policy decides in a gateway
on what it was trained on.
"""

from __future__ import annotations

import math
import struct
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np

from marginroute import view as v
from marginroute.answer_lengths import AnswerLengths
from marginroute.arrivals import Arrivals
from marginroute.bundle import Bundle
from marginroute.cached_prompts import CachedPrompts
from marginroute.contract_terms import ContractTerms
from marginroute.counters import COUNTERS, Counters, Entry
from marginroute.elsewhere import FRESH_S, Elsewhere
from marginroute.expected_quality import ExpectedQuality
from marginroute.facts import Trial
from marginroute.feedback import QualityPosterior
from marginroute.judged_answers import JudgedAnswers
from marginroute.legal_mask import LegalMask
from marginroute.names import index_of, indices, places
from marginroute.rate_limits import RateBook, RateLimit
from marginroute.response_cache import Hit
from marginroute.session_map import SessionMap
from marginroute.slo_windows import SloWindows
from marginroute.view import Array, View

_ZERO = np.array(0.0)  # see `View.asked`
_write_asked = struct.Struct(f"{v.INPUT_PRICE_USD}d").pack_into  # what the contract does not fix


class GatewayState:
    """Thread-safe state of one gateway process, and the Views made of it.

    Args:
        bundle: whose candidates, contracts and prior are shown.
        clock: seconds that never jump.
        can: what this gateway can do beside sending a request on: any of `cache`, `defer`, `shed`, `hold`. Candidates
            that it cannot carry out are not legal; without `hold` no in-flight cap is shown, because none is kept.
        hold_s: seconds after which a deferred request is decided again (with `defer`).
        stale_after_s: silence after which a request in flight is taken for dead.
        prefix_block_tokens: tokens that a block hash of a prompt stands for, about; 0: prompts are not hashed.
        posterior: what feedback says of P(good), if anything.
        rate_limits: by provider, in place of the bundle's.

    Attributes:
        rates: what is left of the providers' rate limits.
        hashes_prompts: whether block hashes of a prompt tell this gateway anything.
    """

    def __init__(
        self,
        bundle: Bundle,
        clock: Callable[[], float] = time.monotonic,
        can: Collection[str] = (),
        hold_s: float = math.inf,
        stale_after_s: float = 900.0,
        prefix_block_tokens: int = 0,
        posterior: QualityPosterior | None = None,
        rate_limits: Mapping[str, RateLimit] | None = None,
    ) -> None:
        self.layout, self._clock, self._can = bundle.layout, clock, frozenset(can)
        self._serving = serving = int((self.layout.kind <= v.PROVIDER).sum())
        self._classes, self._tasks = indices(self.layout.class_names), indices(self.layout.task_names)
        self._tier = self.layout.tier[:serving]
        self._lock = threading.Lock()
        self._counters = Counters(self.layout, bundle.static_signals, stale_after_s)
        self._prompts = CachedPrompts(bundle.static_signals, prefix_block_tokens)
        self.hashes_prompts = self._prompts.known
        self._elsewhere = Elsewhere(self.layout.n_candidates)
        self._sessions = SessionMap()
        self.rates = RateBook(self.layout, {**bundle.rate_limits, **(rate_limits or {})}, clock)
        self._scraped_at_s, self._now_s = np.full(self.layout.n_candidates, np.inf), np.array(0.0)
        self._scraped = False  # whether any page was
        self._quality = ExpectedQuality(bundle, posterior)
        self._contracts = ContractTerms(bundle)
        self._windows = SloWindows(self._contracts.terms, clock())
        self._legal = LegalMask(bundle, self._can, hold_s, self._contracts.delay_tolerant, self.rates)
        self._lengths = AnswerLengths(bundle.output_tokens)
        self._judged = JudgedAnswers(len(self.layout.tier_names), len(self.layout.task_names))
        self._arrivals, self._sequence = Arrivals(clock()), 0
        caps = bundle.policy.in_flight_caps(self.layout, bundle.slots) if "hold" in self._can else None
        self._counters.signals[v.IN_FLIGHT_CAP] = v.UNLIMITED
        if caps is not None:
            replicas = self.layout.n_replicas
            self._counters.signals[v.IN_FLIGHT_CAP, :replicas] = caps[self.layout.station[:replicas]]

    def begin(
        self,
        id: str,
        candidate: int,
        prompt_tokens: int,
        class_name: str | None = None,
        task_name: str | None = None,
        estimate_s: tuple[float, float] | None = None,
        hashes: Sequence[int] = (),
        block_tokens: float | None = None,
        session: str = "",
    ) -> None:
        """A request leaves for a candidate; an earlier attempt with the same id has failed.

        Args:
            id: of the request.
            candidate: index of a replica or provider.
            prompt_tokens: known or estimated.
            class_name: whose output lengths the answer will teach; None: the first of the bundle.
            task_name: the same.
            estimate_s: expected TTFT and TPOT, for an answer that is not streamed.
            hashes: of the prompt's blocks (`prefix_index.block_hashes`).
            block_tokens: tokens per block of this prompt; None: the usual number.
            session: conversation or agent run; empty: none.
        """
        cell = self._cell(class_name, task_name)
        with self._lock:
            now_s = self._clock()
            self._sessions.note(session, candidate, now_s)
            entry = Entry(candidate, prompt_tokens, cell, now_s, now_s, estimate_s)
            entry.cached_tokens = self._prompts.sent(candidate, prompt_tokens, hashes, block_tokens, now_s)
            self._counters.begin(id, entry)
            self.rates.sent(candidate, prompt_tokens)
            if candidate < self.layout.n_replicas:
                self._elsewhere.sent(entry.prefill_tokens)

    def first_token(self, id: str, ago_s: float = 0.0) -> None:
        """The first token of an answer came `ago_s` seconds ago; ignored if unknown or seen before."""
        with self._lock:
            now_s = self._clock()
            self._counters.first_token(id, now_s - ago_s, now_s)

    def progress(self, id: str, tokens: int) -> None:
        """An answer has streamed `tokens` output tokens so far."""
        with self._lock:
            self._counters.progress(id, tokens, self._clock())

    def begun(self, id: str) -> bool:
        """Whether a request has its first token, or is not in flight (any more)."""
        with self._lock:
            return self._counters.begun(id)

    def moved(self, session: str, candidate: str) -> None:
        """A session's call is answered by another candidate than it was first sent to."""
        with self._lock:
            self._sessions.note(session, self.layout.names.index(candidate), self._clock())

    def end(
        self,
        id: str,
        status: str = "completed",
        output_tokens: int | None = None,
        ttft_s: float | None = None,
        e2e_s: float | None = None,
    ) -> bool:
        """A request has left its candidate, for whatever reason; False if it was not in flight (any more).

        Args:
            id: of the request.
            status: only a `completed` answer teaches latencies and lengths; a `failed` one counts as an error of its
                candidate; any other says nothing.
            output_tokens: of the answer, where known.
            ttft_s: as the gateway measured it from `begin`; None: by this object's own clock.
            e2e_s: the same.
        """
        with self._lock:
            entry = self._counters.end(id)
            if entry is None:
                return False
            if entry.candidate >= self.layout.n_replicas:
                answer_tokens = output_tokens or self._lengths.tokens.item(entry.cell)
                self.rates.answered(entry.candidate, entry.used_tokens(status, answer_tokens))
            if status in ("completed", "failed"):
                self._counters.note_call(entry.candidate, status == "failed", self._clock())
            if status == "completed" and output_tokens:
                e2e_s = self._clock() - entry.begun_at_s if e2e_s is None else e2e_s
                self._counters.learn(entry, output_tokens, ttft_s, e2e_s)
                self._lengths.learn(entry.cell, output_tokens)
            return True

    def judged(self, tier: int, task: int, surprise: float) -> None:
        """An answer of a tier turned out good (1) or bad (0), which is `surprise` more than the P(good) expected."""
        with self._lock:
            self._judged.note(tier, task, surprise)

    def settled(self, class_name: str | None, met: bool, value_usd: float) -> None:
        """A request met every SLO or did not (no answer: with a value of 0); its class's SLO window counts it."""
        k = 0 if class_name is None else self.layout.class_names.index(class_name)
        with self._lock:
            self._windows.note(k, met, value_usd, self._clock())

    def scraped(self, candidate: int, waiting: float, running: float, kv_usage: float, age_s: float = 0.0) -> None:
        """An engine's metrics page said so `age_s` seconds ago."""
        with self._lock:
            self._counters.signals[[v.WAITING, v.RUNNING, v.KV_USAGE], candidate] = waiting, running, kv_usage
            self._scraped_at_s[candidate], self._scraped = self._clock() - age_s, True
            if age_s <= FRESH_S:
                mine = self._counters.signals[:, candidate]
                held = max(mine[v.IN_FLIGHT] - mine[v.IN_FLIGHT_CAP], 0.0) if "hold" in self._can else 0.0
                self._elsewhere.scraped(self._counters.signals, candidate, held)

    def view(
        self,
        prompt_tokens: int,
        class_name: str | None = None,
        task_name: str | None = None,
        difficulty_signal: float = 0.0,
        *,
        waited_s: float = 0.0,
        deadline_left_s: float = math.inf,
        attempt: int = 1,
        available: Collection[int] | None = None,
        cached: Hit | None = None,
        hashes: Sequence[int] = (),
        block_tokens: float | None = None,
        standing: str = "within",
        quota_left: float = 1.0,
        prompt: str | None = None,
        session: str = "",
        trial: Trial | None = None,
        under_way: tuple[int, float] | None = None,
    ) -> View:
        """What is known for the next decision; counts as one, and as an arrival if it is the request's first.

        Args:
            prompt_tokens: known or estimated.
            class_name: customer class; None: the first of the bundle.
            task_name: task type; None: the first of the bundle.
            difficulty_signal: standardised predictor of difficulty.
            waited_s: seconds since the request arrived.
            deadline_left_s: seconds until its deadline.
            attempt: 1 for a new request; more for one that is decided again.
            available: replicas and providers that may serve it now; None: all.
            cached: the stored answer that the gateway has for this request, if any.
            hashes: of the prompt's blocks, as in `begin`.
            block_tokens: tokens per block of this prompt; None: the usual number.
            standing: of the request with its customer's account, one of `contracts.STANDINGS`; a prompt longer than its
                class may send is refused, whatever is said here.
            quota_left: share of its customer's allowance that is left.
            prompt: text to predict P(good) from, in place of the prior and of `difficulty_signal`, if the bundle has a
                predictor; it is not kept.
            session: conversation or agent run; empty: none.
            trial: what a verifier has turned down; its last answer may be delivered in place of a stored one.
            under_way: at a hedge timer: candidate that has the request, whose choice means to wait, and for how long.

        Raises:
            InputError: a class, task or tier that the bundle does not know.
        """
        cell = self._cell(class_name, task_name)
        p_good, difficulty_signal = self._quality.of_tiers(prompt, difficulty_signal, cell[1])
        with self._lock:
            now_s = self._clock()
            if attempt == 1:
                self._arrivals.note(now_s)
            signals = self._signals(cell[1], now_s)
            if (cached_tokens := self._prompts.tokens(prompt_tokens, hashes, block_tokens, now_s)) is not None:
                signals[v.CACHED_TOKENS] = cached_tokens
            if (last := self._sessions.find(session)) is not None:
                signals[v.SESSION_IDLE_S, last[0]] = now_s - last[1]
            output_tokens = self._lengths.tokens.item(cell)
            arrival_rate_per_s = self._arrivals.per_s + self._elsewhere.arrivals_per_s
            miss_usd = self._windows.miss_usd(cell[0], now_s) if standing in ("within", "overage") else 0.0
            sequence = self._sequence
            self._sequence += 1
        self._quality.show(signals, p_good, cached, trial)
        asked = self._contracts.request(cell[0])
        _write_asked(
            asked,
            0,
            max(prompt_tokens, 1),
            output_tokens,
            *cell,
            difficulty_signal,
            waited_s,
            deadline_left_s,
            arrival_rate_per_s,
            sequence,
            *((0.0, 0.0) if trial is None else (len(trial.tiers), trial.score)),
            0.0,
            0.0,
        )
        request = np.frombuffer(asked)
        refused = self._contracts.show(cell[0], request, standing, quota_left)
        if miss_usd:
            request[[v.MISS_USD, v.UNSERVED_CREDIT_USD]] += miss_usd
        spent = self.rates.spent(prompt_tokens, signals[v.LIMIT_SPENT])
        stored_by = None if cached is None else cached.tier
        legal = self._legal.of(cell[0], deadline_left_s, available, stored_by, trial is not None, spent)
        if refused:
            legal[:] = np.arange(len(legal)) == len(legal) - 1
        if under_way is not None:
            signals[v.UNDER_WAY_S, under_way[0]], signals[v.TRIED, under_way[0]] = under_way[1], 1.0
            legal[self._serving :] = False
            legal[under_way[0]] = True
        return View(self.layout, signals, request, legal)

    def _signals(self, task: int, now_s: float) -> Array:
        """(S, C) what is known of the candidates; of the request only its task matters."""
        signals = self._counters.snapshot(now_s)
        self._judged.show(signals, task, self._tier)
        self._elsewhere.add_to(signals)
        if self._scraped:
            self._now_s[...] = now_s
            age_s = signals[v.TELEMETRY_AGE_S]
            np.subtract(self._now_s, self._scraped_at_s, age_s)
            np.maximum(age_s, _ZERO, out=age_s)  # 0: there is nothing to scrape
        if "hold" in self._can:
            signals[v.HELD] = np.maximum(signals[v.IN_FLIGHT] - signals[v.IN_FLIGHT_CAP], 0.0)
        return signals

    def take_over(self, old: GatewayState) -> None:
        """Goes on where the state of an earlier bundle ends; candidates, classes and tasks are matched by name.

        What was in flight at a candidate that is no more leaves the counters; block hashes are carried over where they
        stand for as many tokens.
        """
        with old._lock, self._lock:
            candidates = places(self.layout.names[: self._serving], old.layout.names[: old._serving])
            classes = places(self.layout.class_names, old.layout.class_names)
            tasks = places(self.layout.task_names, old.layout.task_names)
            self._counters.take_over(old._counters, candidates, classes, tasks)
            self._sessions.take_over(old._sessions, candidates)
            self._prompts.take_over(old._prompts, candidates)
            for theirs, c in candidates.items():
                self._scraped_at_s[c] = old._scraped_at_s[theirs]
            self._scraped = old._scraped
            self._lengths.take_over(old._lengths, classes, tasks)
            self._judged.take_over(old._judged, places(self.layout.tier_names, old.layout.tier_names), tasks)
            self._elsewhere.take_over(old._elsewhere, candidates)
            self.rates.take_over(old.rates, candidates)
            self._windows.take_over(old._windows, classes)
            self._arrivals.take_over(old._arrivals)
            self._sequence = old._sequence

    @property
    def in_flight(self) -> int:
        """Requests in flight at all candidates."""
        with self._lock:
            return len(self._counters)

    def counters(self) -> dict[str, Array]:
        """Copies of the raw counters by name, (C,) each."""
        with self._lock:
            return {name: self._counters.signals[v.SIGNAL_NAMES.index(name)].copy() for name in COUNTERS}

    def telemetry_age_s(self) -> Array:
        """(C,) seconds since the last scrape; 0 where nothing was ever scraped."""
        with self._lock:
            age_s: Array = np.maximum(self._clock() - self._scraped_at_s, 0.0)
            return age_s

    def set_caps(self, caps: Sequence[float]) -> None:
        """In-flight caps (C,) that the gateway keeps from now on."""
        with self._lock:
            self._counters.signals[v.IN_FLIGHT_CAP] = caps

    def in_flight_at(self, candidate: int) -> float:
        """Requests in flight at one candidate, with those that wait for it here; other workers' at the engine too."""
        return float(self._counters.signals[v.IN_FLIGHT, candidate] + self._elsewhere.at_engines[candidate])

    @property
    def arrivals_per_s(self) -> float:
        """Requests per second that this worker gets; 0 before the first two, or once it has been quiet for long."""
        with self._lock:
            return self._arrivals.per_s_at(self._clock())

    def others(self, rows: Mapping[int, Array], at_engines: Array, arrivals_per_s: float) -> None:
        """What other workers of this gateway have: rows of signals, (C,) each; those at the engines; their arrivals."""
        with self._lock:
            self._elsewhere.told(rows, at_engines, arrivals_per_s)

    def _cell(self, class_name: str | None, task_name: str | None) -> tuple[int, int]:
        try:
            return self._classes[class_name], self._tasks[task_name]
        except (KeyError, TypeError):
            k = index_of(class_name, self.layout.class_names, "customer class")
            return k, index_of(task_name, self.layout.task_names, "task type")
