"""What a margin rule expects of every candidate, in USD: margin, its parts, and the score that ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from marginroute.view import Array


@dataclass(slots=True)
class Assessment:
    """Expected USD of each candidate for a request; arrays are (..., C) unless said otherwise, and what is (..., 1) is
    () for one decision.

    Attributes:
        p_good: probability of a good answer.
        latency_s: (2, ..., C) estimated TTFT from now, and TPOT, in seconds.
        stay: probability that the user is still there for the first token and the call does not fail; 0 for *defer* and
            *shed*.
        fill: in-flight requests per sequence slot; share of a provider's rate limit that is spent.
        value_usd: (..., 1) value of the request when answered, the base of refunds and credits.
        usage_usd: (..., 1) what the customer pays for it, at the price of prompt tokens that are not cached.
        unserved_usd: (..., 1) credit if it gets no answer.
        bad_usd: loss by a bad answer, times `stay`.
        parts_usd: (4, ..., C) cost of the answer with what cached prompt tokens are cheaper to the customer, expected
            service credits, expected refunds, and congestion (the price of the capacity taken; not a cash flow).
        margin_usd: expected cash; what *defer* is worth by the rule's own estimate.
        score_usd: margin minus congestion, plus what floors add; what the rule ranks by.
        best_usd: (..., 1) highest score of a legal candidate.
        kept: (3, ...) chances that floors are about: SLOs met, a good answer, any answer; None without floors.
        floor_usd: what the floors' multipliers add to the score; None without floors.
    """

    p_good: Array
    latency_s: Array
    stay: Array
    fill: Array
    value_usd: Array
    usage_usd: Array
    unserved_usd: Array
    bad_usd: Array
    parts_usd: Array
    margin_usd: Array
    score_usd: Array
    best_usd: Array
    kept: Array | None = None
    floor_usd: Array | None = None

    def parts(self, candidate: int) -> dict[str, float]:
        """Expected USD of one candidate of a single view, by part; the cash parts add up to the margin.

        A deferred request has no cash yet: its expected margin is that of a later answer.
        """
        c = candidate
        return usd_by_part(
            float(self.stay[c]),
            float(self.margin_usd[c]),
            float(self.usage_usd),
            float(self.unserved_usd),
            self.parts_usd[:, c].tolist(),
            None if self.floor_usd is None else float(self.floor_usd[c]),
        )


def usd_by_part(
    stay: float,
    margin_usd: float,
    usage_usd: float,
    unserved_usd: float,
    parts_usd: Sequence[float],
    floor_usd: float | None,
) -> dict[str, float]:
    """The figures of an `Assessment` for one candidate, as a reason (see `Assessment.parts`)."""
    revenue = stay * usage_usd
    cost, credits, refunds, congestion = parts_usd
    unserved = -(1.0 - stay) * unserved_usd
    later = margin_usd - (revenue - refunds - credits + unserved - cost)
    if abs(later) > 1e-12:
        unserved, later = 0.0, margin_usd
    parts = {
        "revenue": revenue,
        "refunds": -refunds,
        "service_credits": -credits,
        "unserved_credits": unserved,
        "cost": -cost,
        "later_answer": later if abs(later) > 1e-12 else 0.0,
        "margin": margin_usd,
        "congestion": -congestion,
    }
    if floor_usd is not None:
        parts["floors"] = floor_usd
    return parts
