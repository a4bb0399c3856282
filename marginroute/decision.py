"""A decision: which candidate, with what probability, and why in USD."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from marginroute.view import KINDS, Array, View


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
        guard: which guard handed the decision to the fallback; empty if none did.
        support: names of the candidates that might have been chosen; empty: only this one.
        left_out: names of replicas that the guard took out of the choice, since their scrape is too old.
        estimate_s: expected TTFT and TPOT of the choice, where they are at hand (`latency.estimate` tells them always).
    """

    candidate: int
    name: str
    kind: str
    probability: float
    policy: str
    reason_usd: dict[str, float] = field(default_factory=dict)
    runner_up: str = ""
    runner_up_usd: float = 0.0
    guard: str = ""
    support: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    estimate_s: tuple[float, float] | None = field(default=None, compare=False)


def decided(
    candidate: int,
    name: str,
    kind: str,
    policy: str,
    reason_usd: dict[str, float],
    runner_up: str,
    runner_up_usd: float,
    estimate_s: tuple[float, float] | None = None,
) -> Decision:
    """A certain decision; a third of the time that the constructor of a frozen dataclass takes."""
    decision = object.__new__(Decision)
    vars(decision).update(
        {
            "candidate": candidate,
            "name": name,
            "kind": kind,
            "probability": 1.0,
            "policy": policy,
            "reason_usd": reason_usd,
            "runner_up": runner_up,
            "runner_up_usd": runner_up_usd,
            "guard": "",
            "support": (),
            "left_out": (),
            "estimate_s": estimate_s,
        }
    )
    return decision


def best_legal(scores: Array, legal: Array) -> Array:
    """Index of the best legal candidate along the last axis; the first one on a tie."""
    return np.where(legal, scores, -np.inf).argmax(axis=-1)


def explain(
    policy: str, view: View, scores: Array, reason_usd: Callable[[int], dict[str, float]], scale_usd: float = 1.0
) -> Decision:
    """Turns the scores of one view into a Decision with its runner-up.

    Args:
        policy: name to record.
        view: one decision (no leading axis).
        scores: (C,) by which the policy ranks; `scale_usd` turns a difference of them into USD.
        reason_usd: parts of the expected USD of a candidate.
        scale_usd: USD per unit of score.
    """
    ranked = np.where(view.legal, scores, -np.inf)
    choice = int(ranked.argmax())
    best = float(ranked[choice])
    ranked[choice] = -np.inf
    second = int(ranked.argmax())
    there_is_another = ranked[second] > -np.inf
    return decided(
        candidate=choice,
        name=view.layout.names[choice],
        kind=KINDS[int(view.layout.kind[choice])],
        policy=policy,
        reason_usd=reason_usd(choice),
        runner_up=view.layout.names[second] if there_is_another else "",
        runner_up_usd=(best - float(ranked[second])) * scale_usd if there_is_another else 0.0,
    )
