"""Answers that may still be judged: which model gave each, to which task, and the P(good) that the policy expected."""

from __future__ import annotations

from collections import OrderedDict

from marginroute import view as v
from marginroute.settling import Pending
from marginroute.view import Layout

MOST_ANSWERED = 10_000  # the oldest are forgotten


class Answered:
    """Not thread-safe (its gateway's lock is held)."""

    def __init__(self) -> None:
        self._answers: OrderedDict[str, tuple[str, str, float]] = OrderedDict()  # tier, task, P(good) expected

    def note(self, pending: Pending, served_by: str) -> None:
        """A request was answered; nothing for an answer that no model has just given."""
        c, layout = pending.runtime.index.get(served_by, -1), pending.runtime.bundle.layout
        if layout.kind[c] > v.PROVIDER:
            return
        task = layout.task_names[int(pending.request[v.TASK_INDEX])]
        expected = float(pending.changing[v.P_GOOD_PRIOR - v.N_STATIC_SIGNALS, c])
        if (fitted := pending.runtime.policy.quality) is not None:
            tier, prompt_tokens = layout.tier[c], float(pending.request[v.PROMPT_TOKENS])
            expected = fitted.of_one(expected, tier, int(pending.request[v.TASK_INDEX]), prompt_tokens)
        self._answers[pending.facts.id] = layout.tier_names[layout.tier[c]], task, expected
        while len(self._answers) > MOST_ANSWERED:
            self._answers.popitem(last=False)

    def judged(self, id: str, good: bool, layout: Layout) -> tuple[int, int, float] | None:
        """Tier and task of an answer that was judged, and by how much it is better than expected; None: unknown."""
        tier, task, expected = self._answers.pop(id, ("", "", 0.0))
        if tier not in layout.tier_names or task not in layout.task_names:
            return None
        return layout.tier_names.index(tier), layout.task_names.index(task), float(good) - expected
