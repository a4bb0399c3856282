"""Own counters of every candidate: what a gateway has in flight where, and how fast answers came back.

Counters follow the life of each request that the gateway sends somewhere:

    begin -> first_token -> progress* -> end

An entry ends exactly once, whatever happens: `end` may be called again, a second `begin` of the same id (a retry) ends
the first attempt, and an entry that shows no sign of life for `stale_after_s` is dropped.

Two things a gateway cannot see are filled in, so that a counter means the same for every kind of call. An answer that
is not streamed has its first token when the estimate given to `begin` says so. A stream whose tokens nobody reports
with `progress` grows by one token per recent TPOT of its candidate.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from dataclasses import dataclass, replace

import numpy as np

from marginroute import view as v
from marginroute.latency import RECENT_ANSWERS, RECENT_CALLS, recent_errors, running_mean
from marginroute.view import Array, Layout

COUNTERS = ("in_flight", "pending_prefill_tokens", "decoding", "decoding_tokens")


@dataclass(slots=True)
class Entry:
    """One request in flight; times by the gateway's own clock.

    Attributes:
        candidate: index of the replica or provider that it was sent to.
        prompt_tokens: known or estimated.
        cached_tokens: of those, expected to be cached there; they are not pending.
        cell: indices of class and task.
        begun_at_s: when it was sent.
        alive_at_s: last sign of life.
        estimate_s: expected TTFT and TPOT of an answer that is not streamed; None for a stream.
        first_token_at_s: seen or expected; None before.
        tokens: streamed, as far as `progress` told.
        silent: nobody called `progress`.
    """

    candidate: int
    prompt_tokens: int
    cell: tuple[int, int]
    begun_at_s: float
    alive_at_s: float
    estimate_s: tuple[float, float] | None
    first_token_at_s: float | None = None
    tokens: int = 0
    silent: bool = True
    cached_tokens: int = 0

    @property
    def prefill_tokens(self) -> int:
        """Prompt tokens that are expected to be computed."""
        return self.prompt_tokens - self.cached_tokens

    def used_tokens(self, status: str, answer_tokens: float) -> float:
        """What the call has used of a provider's tokens since it was sent; less the prompt if it was refused.

        `answer_tokens`: of the answer, known or expected.
        """
        if status == "completed":
            return float(answer_tokens)
        return -self.prompt_tokens if status == "failed" and not self.tokens else self.tokens


class Counters:
    """Counters over the candidates of a layout; not thread-safe (see `telemetry.GatewayState`).

    Providers only count what is in flight: the world's view shows no more of them.

    Args:
        layout: the candidates.
        static_signals: (S_static, C) their constants.
        stale_after_s: silence after which an entry is taken for dead.

    Attributes:
        signals: (S, C) rows of a View; counters and recent latencies are kept up to date.
    """

    def __init__(self, layout: Layout, static_signals: Array, stale_after_s: float) -> None:
        self._stale_after_s = stale_after_s
        self._entries: OrderedDict[str, Entry] = OrderedDict()  # longest silent first
        self._expected_first: list[tuple[float, str]] = []  # heap: first tokens that nobody will see
        self._replicas = layout.n_replicas
        self._silent = np.zeros((2, self._replicas))  # silent streams: their number, sum of their first-token times
        serving = int((layout.kind <= v.PROVIDER).sum())
        self._weight = np.zeros(serving)
        self._n_silent, self._erring = 0, False  # of those, and whether any call has failed: most often there is none
        self._errors = np.zeros((2, layout.n_candidates))  # share of recent calls that failed, and as of when
        self.signals = np.zeros((len(v.SIGNALS), layout.n_candidates))
        self.signals[: v.N_STATIC_SIGNALS] = static_signals
        self.signals[v.SESSION_IDLE_S] = v.UNLIMITED
        static = static_signals[:, :serving]
        self.signals[v.RECENT_TTFT_S, :serving] = static[v.FIXED_TTFT_S]
        self.signals[v.RECENT_TPOT_S, :serving] = static[v.FIXED_TPOT_S] + static[v.BASE_S]

    def __len__(self) -> int:
        return len(self._entries)

    def begin(self, id: str, entry: Entry) -> None:
        """A request leaves for a candidate; an earlier attempt of the same id has ended."""
        self.end(id)
        self._entries[id] = entry
        self.signals[v.IN_FLIGHT, entry.candidate] += 1
        if entry.candidate < self._replicas:
            self.signals[v.PENDING_PREFILL_TOKENS, entry.candidate] += entry.prefill_tokens
        if entry.estimate_s is not None:
            heapq.heappush(self._expected_first, (entry.begun_at_s + entry.estimate_s[0], id))

    def begun(self, id: str) -> bool:
        """Whether an entry has its first token, or is not there."""
        entry = self._entries.get(id)
        return entry is None or entry.first_token_at_s is not None

    def first_token(self, id: str, at_s: float, now_s: float) -> None:
        """The first token came at `at_s`; ignored for an unknown request, or one that has its first token."""
        entry = self._entries.get(id)
        if entry is not None and entry.first_token_at_s is None:
            self._start_decoding(entry, min(max(at_s, entry.begun_at_s), now_s))
            self._touch(id, entry, now_s)

    def progress(self, id: str, tokens: int, now_s: float) -> None:
        """An answer has streamed `tokens` output tokens so far."""
        entry = self._entries.get(id)
        if entry is None:
            return
        self._start_decoding(entry, now_s)
        if entry.candidate < self._replicas:
            if entry.silent:
                self._silence(entry, -1.0)
            self.signals[v.DECODING_TOKENS, entry.candidate] += tokens - entry.tokens
        entry.silent, entry.tokens = False, tokens
        self._touch(id, entry, now_s)

    def end(self, id: str) -> Entry | None:
        """Takes a request out of all counters; None if it is not in them (any more)."""
        entry = self._entries.pop(id, None)
        if entry is None:
            return None
        c = entry.candidate
        self.signals[v.IN_FLIGHT, c] -= 1
        if c < self._replicas and entry.first_token_at_s is None:
            self.signals[v.PENDING_PREFILL_TOKENS, c] -= entry.prefill_tokens
        elif c < self._replicas:
            self.signals[v.DECODING, c] -= 1
            self.signals[v.DECODING_TOKENS, c] -= entry.prompt_tokens + entry.tokens
            if entry.silent:
                self._silence(entry, -1.0)
        return entry

    def learn(self, entry: Entry, output_tokens: int, ttft_s: float | None, e2e_s: float) -> None:
        """Takes an answer of `output_tokens` tokens into the recent TTFT and TPOT of its candidate.

        The E2E of an answer whose first token nobody saw is split in the ratio of its estimate.
        """
        if entry.estimate_s is not None:
            expected_s = entry.estimate_s[0] + entry.estimate_s[1] * (output_tokens - 1)
            ttft_s = e2e_s * entry.estimate_s[0] / expected_s if expected_s > 0.0 else e2e_s
        elif ttft_s is None:
            ttft_s = e2e_s if entry.first_token_at_s is None else entry.first_token_at_s - entry.begun_at_s
        ttft_s = min(max(ttft_s, 0.0), e2e_s)
        tpot_s = (e2e_s - ttft_s) / max(output_tokens - 1, 1)
        mine, weight = self.signals[:, entry.candidate], self._weight[entry.candidate]
        mine[v.RECENT_TTFT_S], new_weight = running_mean(mine[v.RECENT_TTFT_S], weight, ttft_s, RECENT_ANSWERS)
        mine[v.RECENT_TPOT_S], _ = running_mean(mine[v.RECENT_TPOT_S], weight, tpot_s, RECENT_ANSWERS)
        self._weight[entry.candidate] = new_weight

    def take_over(
        self, old: Counters, candidates: dict[int, int], classes: dict[int, int], tasks: dict[int, int]
    ) -> None:
        """Goes on where the counters of an earlier bundle end; the maps lead from old indices to new ones."""
        for theirs, c in candidates.items():
            for row in (v.RECENT_TTFT_S, v.RECENT_TPOT_S, v.WAITING, v.RUNNING, v.KV_USAGE):
                self.signals[row, c] = old.signals[row, theirs]
            self._weight[c], self._errors[:, c] = old._weight[theirs], old._errors[:, theirs]
        self._erring = old._erring
        for id, entry in old._entries.items():
            if entry.candidate not in candidates:
                continue
            cell = classes.get(entry.cell[0], 0), tasks.get(entry.cell[1], 0)
            mine = replace(entry, candidate=candidates[entry.candidate], cell=cell)
            mine.first_token_at_s, mine.tokens, mine.silent = None, 0, True
            self.begin(id, mine)
            if entry.first_token_at_s is not None:
                self._start_decoding(mine, entry.first_token_at_s)
                if not entry.silent:
                    self.progress(id, entry.tokens, entry.alive_at_s)

    def note_call(self, candidate: int, failed: bool, now_s: float) -> None:
        """A call to a replica or provider has failed, or has not."""
        share, at_s = self._errors[:, candidate]
        if failed or share > 0.0:
            share = recent_errors(share, max(now_s - at_s, 0.0))
            self._erring = True
            self._errors[:, candidate] = share + (float(failed) - share) / RECENT_CALLS, max(now_s, at_s)

    def settle(self, now_s: float) -> None:
        """Drops entries that went silent, and starts answers whose first token nobody will see."""
        while self._entries:
            id, entry = next(iter(self._entries.items()))
            if now_s - entry.alive_at_s <= self._stale_after_s:
                break
            self.end(id)
        while self._expected_first and self._expected_first[0][0] <= now_s:
            due_s, id = heapq.heappop(self._expected_first)
            waiting = self._entries.get(id)
            if waiting is not None and waiting.estimate_s and waiting.begun_at_s + waiting.estimate_s[0] == due_s:
                self._start_decoding(waiting, due_s)

    def snapshot(self, now_s: float) -> Array:
        """(S, C) copy of the signals, silent streams grown to now."""
        self.settle(now_s)
        signals = self.signals.copy()
        if self._erring:
            signals[v.RECENT_ERRORS] = recent_errors(self._errors[0], np.maximum(now_s - self._errors[1], 0.0))
        if self._n_silent:
            count, since_s = self._silent
            tpot_s = signals[v.RECENT_TPOT_S, : self._replicas]
            elapsed_s = np.maximum(count * now_s - since_s, 0.0)
            signals[v.DECODING_TOKENS, : self._replicas] += elapsed_s / np.where(tpot_s > 0.0, tpot_s, np.inf)
        return signals

    def _touch(self, id: str, entry: Entry, now_s: float) -> None:
        entry.alive_at_s = now_s
        self._entries.move_to_end(id)

    def _start_decoding(self, entry: Entry, at_s: float) -> None:
        if entry.first_token_at_s is not None:
            return
        entry.first_token_at_s, entry.tokens = at_s, 1
        c = entry.candidate
        if c < self._replicas:
            self.signals[v.PENDING_PREFILL_TOKENS, c] -= entry.prefill_tokens
            self.signals[v.DECODING, c] += 1
            self.signals[v.DECODING_TOKENS, c] += entry.prompt_tokens + entry.tokens
            self._silence(entry, 1.0)

    def _silence(self, entry: Entry, sign: float) -> None:
        """Adds (or takes away) a stream that nobody reports tokens of."""
        self._n_silent += 1 if sign > 0.0 else -1
        silent = self._silent[:, entry.candidate]
        silent += sign, sign * (entry.first_token_at_s or 0.0)
        if silent[0] == 0.0:
            silent[1] = 0.0
