"""A decision: which candidate, with what probability, and why in USD."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Decision:
    """What a policy chose for one request.

    Attributes:
        candidate: index into the view's candidates.
        name: the candidate's name, such as `medium/1`.
        kind: one of `marginroute.view.KINDS`.
        probability: with which the policy chooses it in this view (1 for a deterministic policy).
        policy: name of the policy that decided (the fallback's name if the guard handed over).
        reason_usd: expected USD of the choice by part (revenue, refunds, credits, cost, congestion, margin).
        runner_up: name of the next best candidate, empty if there is none.
        runner_up_usd: expected USD of the choice minus that of the runner-up.
        knobs: levers set beside the choice, such as `{"in_flight_cap": {"large": 24}}`.
        guard: which guard handed the decision to the fallback; empty if none did.
    """

    candidate: int
    name: str
    kind: str
    probability: float
    policy: str
    reason_usd: dict[str, float] = field(default_factory=dict)
    runner_up: str = ""
    runner_up_usd: float = 0.0
    knobs: dict[str, dict[str, int]] = field(default_factory=dict)
    guard: str = ""
