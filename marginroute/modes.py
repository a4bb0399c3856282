"""How far a bundle may act. Shadow mode: it decides beside the gateway, changes nothing, and every request is recorded.

A `Shadow` is told by an adapter what the gateway does, in this order for one request id:

    decide -> (sent -> first_token? -> attempt_failed?)* -> finished

and writes one DecisionRecord when the request has finished. A request of which nothing more is heard for
`stale_after_s` is written without an outcome, so that nothing is kept for ever.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from marginroute import latency, pricing
from marginroute import view as v
from marginroute.bundle import Bundle
from marginroute.decision import Decision
from marginroute.feedback import QualityPosterior
from marginroute.record import DecisionRecord, RecordLog, record_of
from marginroute.telemetry import GatewayState
from marginroute.view import Array


@dataclass(frozen=True)
class Outcome:
    """What really happened to a request; None where unknown.

    Attributes:
        status: `completed` or `failed`.
        served_by: candidate that answered, empty if none did or it is not one of the bundle's.
        ttft_s: from the request's arrival to its first token.
        e2e_s: from the request's arrival to its last token.
        attempt_ttft_s: the same from the start of the attempt that answered.
        attempt_e2e_s: the same.
        prompt_tokens: as counted by who answered.
        output_tokens: the same.
        cost_usd: what the answer cost the operator; None: by the bundle's figures for the candidate.
    """

    status: str
    served_by: str = ""
    ttft_s: float | None = None
    e2e_s: float | None = None
    attempt_ttft_s: float | None = None
    attempt_e2e_s: float | None = None
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    cost_usd: float | None = None


@dataclass
class _Pending:
    """A request that was decided and has not finished; latency estimates are (C,) seconds, cached tokens (C,)."""

    record: DecisionRecord
    decided_at_s: float  # own clock
    class_name: str | None
    task_name: str | None
    ttft_s: Array
    tpot_s: Array
    cached_tokens: Array
    hashes: Sequence[int]
    block_tokens: float | None


class Shadow:
    """Decides every request beside a gateway and records what the gateway did instead. Thread-safe.

    Args:
        bundle: whose policy decides, under its guard.
        log: where the records go.
        can: what the gateway could carry out beside sending a request on (see `telemetry.GatewayState`).
        stale_after_s: silence after which a request is written off.
        prefix_block_tokens: tokens per block hash of a prompt (see `telemetry.GatewayState`).
        posterior: what feedback says of P(good), if anything.
    """

    def __init__(
        self,
        bundle: Bundle,
        log: RecordLog,
        can: Collection[str] = ("shed",),
        stale_after_s: float = 7200.0,
        prefix_block_tokens: int = 0,
        posterior: QualityPosterior | None = None,
    ) -> None:
        self.bundle = bundle
        self.state = GatewayState(
            bundle,
            can=can,
            stale_after_s=stale_after_s,
            prefix_block_tokens=prefix_block_tokens,
            posterior=posterior,
        )
        self.candidate = {name: c for c, name in enumerate(bundle.layout.names)}
        self._policy, self._log, self._stale_after_s = bundle.guarded(), log, stale_after_s
        self._pending: OrderedDict[str, _Pending] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def pending(self) -> int:
        """Requests decided and not finished."""
        return len(self._pending)

    def decide(
        self,
        id: str,
        prompt_tokens: int,
        class_name: str | None = None,
        task_name: str | None = None,
        difficulty_signal: float = 0.0,
        available: Collection[int] | None = None,
        hashes: Sequence[int] = (),
        block_tokens: float | None = None,
        prompt: str | None = None,
    ) -> Decision | None:
        """What the policy would do with a new request; None if it was decided before (the gateway tries again).

        The prompt's text serves the bundle's quality predictor, if it has one, and is not kept.
        """
        self._write_off()
        with self._lock:
            if id in self._pending:
                return None
        view = self.state.view(
            prompt_tokens,
            class_name,
            task_name,
            difficulty_signal,
            available=available,
            hashes=hashes,
            block_tokens=block_tokens,
            prompt=prompt,
        )
        decision = self._policy.decide(view)
        digest = self.bundle.digest[:12]
        record = record_of(decision, view, id=id, decided_at_s=time.time(), mode="shadow", bundle=digest)
        (ttft_s, tpot_s), _ = latency.estimate(view)
        with self._lock:
            self._pending[id] = _Pending(
                record,
                time.monotonic(),
                class_name,
                task_name,
                ttft_s,
                tpot_s,
                view.signals[v.CACHED_TOKENS],
                hashes,
                block_tokens,
            )
        return decision

    def decided_at_s(self, id: str) -> float | None:
        """Unix time of a pending request's decision."""
        pending = self._pending.get(id)
        return None if pending is None else pending.record.decided_at_s

    def sent(self, id: str, candidate: int, streamed: bool) -> None:
        """The gateway sends a decided request to a candidate of its own choice."""
        pending = self._pending.get(id)
        if pending is None:
            return
        estimate_s = None if streamed else (float(pending.ttft_s[candidate]), float(pending.tpot_s[candidate]))
        prompt_tokens = int(pending.record.request["prompt_tokens"])
        self.state.begin(
            id,
            candidate,
            prompt_tokens,
            pending.class_name,
            pending.task_name,
            estimate_s,
            pending.hashes,
            pending.block_tokens,
        )

    def first_token(self, id: str, ago_s: float) -> None:
        """The first token of a stream came `ago_s` seconds ago."""
        self.state.first_token(id, ago_s)

    def attempt_failed(self, id: str) -> None:
        """One attempt failed; the gateway may try again."""
        self.state.end(id, "failed")

    def finished(self, id: str, outcome: Outcome) -> bool:
        """Records what happened; False if the request is unknown or was recorded before."""
        kind = self.bundle.layout.kind[self.candidate.get(outcome.served_by, -1)]
        taught = outcome.output_tokens if kind <= v.PROVIDER else None  # a stored answer says nothing of an engine
        self.state.end(id, outcome.status, taught, outcome.attempt_ttft_s, outcome.attempt_e2e_s)
        with self._lock:
            pending = self._pending.pop(id, None)
        if pending is None:
            return False
        record = pending.record
        for name in ("status", "served_by", "ttft_s", "e2e_s", "prompt_tokens", "output_tokens"):
            setattr(record, name, getattr(outcome, name))
        record.cost_usd = (
            self._cost_usd(outcome, pending.cached_tokens) if outcome.cost_usd is None else outcome.cost_usd
        )
        self._log.write(record)
        return True

    def close(self) -> None:
        """Writes what is still pending, without outcome, and closes the log."""
        with self._lock:
            left = list(self._pending.values())
            self._pending.clear()
        for pending in left:
            self._log.write(pending.record)
        self._log.close()

    def _cost_usd(self, outcome: Outcome, cached_tokens: Array) -> float | None:
        c = self.candidate.get(outcome.served_by)
        if c is None or outcome.prompt_tokens is None or outcome.output_tokens is None:
            return None
        static = self.bundle.static_signals[:, c]
        tokens = outcome.prompt_tokens, min(cached_tokens[c], outcome.prompt_tokens), outcome.output_tokens
        prices = static[v.INPUT_USD], static[v.CACHED_INPUT_USD], static[v.OUTPUT_USD]
        return float(static[v.CALL_USD] + pricing.answer_usd(*tokens, *prices))

    def _write_off(self) -> None:
        now_s, stale = time.monotonic(), []
        with self._lock:
            while self._pending:
                id, oldest = next(iter(self._pending.items()))
                if now_s - oldest.decided_at_s <= self._stale_after_s:
                    break
                stale.append(self._pending.pop(id))
        for pending in stale:
            self._log.write(pending.record)
