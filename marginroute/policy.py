"""What every policy can do, learned or not."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import numpy as np

from marginroute.decision import Decision
from marginroute.view import KINDS, Array, Layout, View


@runtime_checkable
class Policy(Protocol):
    """A decider: a heuristic, or an exported network with its heuristic."""

    name: str

    def decide(self, view: View) -> Decision:
        """Decides one request and says why."""

    def decide_batch(self, view: View) -> Array:
        """Decides for N worlds; returns candidate indices, (N,) int64 (or a scalar array for one decision)."""

    def in_flight_caps(self, layout: Layout, slots: Array) -> Array | None:
        """In-flight cap per station, (S,) float64, for replicas with `slots` (S,) sequences; None leaves them."""


def best_legal(scores: Array, legal: Array) -> Array:
    """Index of the best legal candidate along the last axis; the first one on a tie."""
    return np.where(legal, scores, -np.inf).argmax(axis=-1)


def explain(
    policy: str, view: View, scores: Array, reason_usd: dict[str, Array], scale_usd: float = 1.0
) -> Decision:
    """Turns the scores of one view into a Decision with its runner-up.

    Args:
        policy: name to record.
        view: one decision (no leading axis).
        scores: (C,) by which the policy ranks; `scale_usd` turns a difference of them into USD.
        reason_usd: parts of the expected USD, each (C,).
        scale_usd: USD per unit of score.
    """
    ranked = np.where(view.legal, scores, -np.inf)
    choice = int(ranked.argmax())
    runner_up, runner_up_usd = "", 0.0
    rest = ranked.copy()
    rest[choice] = -np.inf
    second = int(rest.argmax())
    if np.isfinite(rest[second]):
        runner_up = view.layout.names[second]
        runner_up_usd = float(ranked[choice] - ranked[second]) * scale_usd
    return Decision(
        candidate=choice,
        name=view.layout.names[choice],
        kind=KINDS[int(view.layout.kind[choice])],
        probability=1.0,
        policy=policy,
        reason_usd={part: float(usd[choice]) for part, usd in reason_usd.items()},
        runner_up=runner_up,
        runner_up_usd=runner_up_usd,
    )
