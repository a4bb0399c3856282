"""A request between its decision and its end: what was known, its record, and what it has earned."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field, replace

import numpy as np

from marginroute import contracts, earnings, latency, pricing
from marginroute import view as v
from marginroute.facts import Facts, Outcome, Verdict
from marginroute.modes import Result
from marginroute.record import DecisionRecord, changing_rows, record_known
from marginroute.runtime import Runtime, fallback_usd_of
from marginroute.view import Array, View


@dataclass(slots=True)
class Pending:
    """A request that was decided and has not finished.

    Attributes:
        facts: of the request, without its prompt.
        runtime: that decided.
        verdict: the last one.
        request: (Q,) signals; `changing` (S - S_static, C) and `legal` (C,): the rest of what was known.
        decided_at_s: Unix time; `arrived_at_s`: that of the first decision.
        seen_s: own clock at the decision; `began_s`: at the first one.
        compared: whether what it earns is held against what is expected of the fallback's choice.
        tried: candidates that have failed it.
        sent_to: candidate of the attempt under way.
        reserved_usd: of the spend limits.
        sent_s: own clock when the attempt under way was sent.
        second: candidate of a second call while nobody has answered; empty: there is none.
        second_answers: whether the call that goes on is the second one.
        calls: candidates that got the request at a time, if two did.
    """

    facts: Facts
    runtime: Runtime
    verdict: Verdict
    request: Array
    changing: Array
    legal: Array
    decided_at_s: float
    arrived_at_s: float
    seen_s: float
    began_s: float
    compared: bool
    tried: set[str] = field(default_factory=set)
    sent_to: str = ""
    reserved_usd: float = 0.0
    sent_s: float = 0.0
    second: str = ""
    second_answers: bool = False
    calls: tuple[str, ...] = ()

    def view(self) -> View:
        """What the policy saw, at the precision of a record."""
        bundle = self.runtime.bundle
        return View(bundle.layout, np.concatenate([bundle.static_signals, self.changing]), self.request, self.legal)

    def estimate_s(self, candidate: int) -> tuple[float, float]:
        """TTFT and TPOT that are expected at a candidate."""
        decision = self.verdict.decision
        if decision.candidate == candidate and decision.estimate_s is not None:
            return decision.estimate_s
        (ttft_s, tpot_s), _ = latency.estimate(self.view())
        return float(ttft_s[candidate]), float(tpot_s[candidate])


def pending_of(
    facts: Facts, runtime: Runtime, verdict: Verdict, view: View, now_s: float, compared: bool, earlier: Pending | None
) -> Pending:
    """A request that has just been decided, at `now_s` of the gateway's clock; `earlier`: its decision before."""
    unix_s = time.time()
    return Pending(
        facts=facts if facts.prompt is None else replace(facts, prompt=None),
        runtime=runtime,
        verdict=verdict,
        request=view.request,
        changing=changing_rows(view.signals),
        legal=view.legal,
        decided_at_s=unix_s,
        arrived_at_s=unix_s if earlier is None else earlier.arrived_at_s,
        seen_s=now_s,
        began_s=now_s if earlier is None else earlier.began_s,
        compared=compared,
        tried=set() if earlier is None else earlier.tried,
    )


def record_pending(pending: Pending) -> DecisionRecord:
    """Its record, without an outcome."""
    return record_known(
        pending.verdict.decision,
        pending.runtime.bundle.layout,
        pending.request,
        pending.legal,
        pending.changing,
        id=pending.facts.id,
        decided_at_s=pending.decided_at_s,
        mode="live" if pending.verdict.acting else "shadow",
        bundle=pending.runtime.bundle.digest[:12],
    )


def record_finished(pending: Pending, outcome: Outcome) -> DecisionRecord:
    """Its record, with its outcome; the cost is by the bundle's figures where the gateway does not know it."""
    record = record_pending(pending)
    for name in ("status", "served_by", "ttft_s", "e2e_s", "prompt_tokens", "output_tokens"):
        setattr(record, name, getattr(outcome, name))
    record.cost_usd = cost_usd_of(pending, outcome) if outcome.cost_usd is None else outcome.cost_usd
    if pending.calls and outcome.cost_usd is None and record.cost_usd is not None:
        record.cost_usd += spare_usd(pending, outcome)
    return record


def cost_usd_of(pending: Pending, outcome: Outcome) -> float | None:
    """USD that the answer cost by the bundle's figures for who gave it; None if that or the tokens are unknown."""
    c = pending.runtime.index.get(outcome.served_by)
    if c is None or outcome.prompt_tokens is None or outcome.output_tokens is None:
        return None
    static, cached = pending.runtime.bundle.static_signals[:, c], pending.changing[v.CACHED_TOKENS - v.N_STATIC_SIGNALS]
    tokens = outcome.prompt_tokens, min(float(cached[c]), outcome.prompt_tokens), outcome.output_tokens
    prices = static[v.INPUT_USD], static[v.CACHED_INPUT_USD], static[v.OUTPUT_USD]
    return float(static[v.CALL_USD] + pricing.answer_usd(*tokens, *prices))


def spare_usd(pending: Pending, outcome: Outcome) -> float:
    """What the prompt of a call that did not answer costs, by the bundle's figures."""
    static, index = pending.runtime.bundle.static_signals, pending.runtime.index
    spare = [name for name in pending.calls if name != outcome.served_by]
    return float(sum(static[v.INPUT_USD, index[name]] for name in spare) * (outcome.prompt_tokens or 0))


def outcome_of(pending: Pending, outcome: Outcome, slos_met: bool | None) -> tuple[bool, float] | None:
    """Whether a request met its SLOs and what its answer was worth, as its SLO window counts it; None: not at all."""
    request = pending.request
    if int(request[v.STANDING]) not in (contracts.WITHIN, contracts.OVERAGE):
        return None
    if outcome.status != "completed":
        return (False, 0.0) if outcome.status in ("failed", "shed", "abandoned") else None
    if slos_met is None or outcome.prompt_tokens is None or outcome.output_tokens is None:
        return None
    prices = request[v.INPUT_PRICE_USD], request[v.OUTPUT_PRICE_USD]
    usage_usd = pricing.tokens_usd(outcome.prompt_tokens, outcome.output_tokens, *prices)
    return slos_met, float(usage_usd + request[v.REQUEST_USD] + request[v.REQUEST_VALUE_USD])


def result_of(pending: Pending, outcome: Outcome, cost_usd: float | None) -> Result:
    """What the limits of a rollback ask of an outcome."""
    result, request = Result(outcome.status == "failed"), pending.request
    answered = outcome.status == "completed" and outcome.e2e_s is not None and outcome.output_tokens is not None
    ttft_s, e2e_s = (math.nan if s is None else s for s in (outcome.ttft_s, outcome.e2e_s))
    if answered:
        result.slos_met = earnings.slos_met(request, ttft_s, e2e_s, outcome.output_tokens or 0)
    c = pending.runtime.index.get(outcome.served_by)
    known = (answered and c is not None) or outcome.status in ("failed", "shed")
    fallback_usd = fallback_usd_of(pending.runtime, pending.view()) if pending.compared and known else None
    if fallback_usd is None:
        return result
    earned_usd = earnings.unserved_usd(request) if not answered else earnings.answered_usd(
        request,
        ttft_s,
        outcome.e2e_s,
        outcome.prompt_tokens or 0,
        outcome.output_tokens,
        pending.changing[v.P_GOOD_PRIOR - v.N_STATIC_SIGNALS, c],
    )  # fmt: skip
    prices = request[v.INPUT_PRICE_USD], request[v.OUTPUT_PRICE_USD]
    usage_usd = pricing.tokens_usd(request[v.PROMPT_TOKENS], request[v.EXPECTED_OUTPUT_TOKENS], *prices)
    result.surplus_usd = float(earned_usd - (cost_usd or 0.0) - fallback_usd)
    result.value_usd = float(usage_usd + request[v.REQUEST_USD] + request[v.REQUEST_VALUE_USD])
    return result
