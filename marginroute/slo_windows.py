"""The open SLO windows of a gateway's classes: what one more miss costs, from the outcomes that it has seen.

The same as `envs.economics.accounts` keeps for a simulated world; the formula is `contracts.window_miss_usd`. Windows
begin when the gateway does. What the customer is credited is for its billing system to say.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from marginroute import contracts
from marginroute.latency import running_mean


@dataclass(slots=True)
class _Window:
    terms: Mapping[str, float]
    closes_at_s: float
    decided: float = 0.0
    missed: float = 0.0
    value_usd: float = 0.0
    miss_rate: float = 0.0
    mean_value_usd: float = 0.0
    gap_s: float = 1.0
    last_at_s: float = 0.0
    outcomes: float = 0.0

    def close(self, now_s: float) -> None:
        """Begins the next window if this one has ended."""
        if now_s >= self.closes_at_s:
            length_s = self.terms["window_s"]
            self.closes_at_s += length_s * (math.floor((now_s - self.closes_at_s) / length_s) + 1.0)
            self.decided = self.missed = self.value_usd = 0.0


class SloWindows:
    """Windows of the classes that have any.

    Args:
        terms: contract of each class, by name of the term.
        now_s: of the gateway's clock.
    """

    def __init__(self, terms: Sequence[Mapping[str, float]], now_s: float) -> None:
        self._windows = {
            k: _Window(term, now_s + term["window_s"], last_at_s=now_s)
            for k, term in enumerate(terms)
            if term.get("window_s", math.inf) < math.inf
        }

    def note(self, k: int, met: bool, value_usd: float, now_s: float) -> None:
        """A request of class k met every SLO or did not; `value_usd` is 0 if it got no answer."""
        window = self._windows.get(k)
        if window is None:
            return
        window.close(now_s)
        window.decided += 1.0
        window.missed += not met
        window.value_usd += value_usd
        weight, recent = window.outcomes, contracts.RECENT_OUTCOMES
        window.miss_rate, after = running_mean(window.miss_rate, weight, float(not met), recent)
        window.mean_value_usd, after = running_mean(window.mean_value_usd, weight, value_usd, recent)
        window.gap_s, after = running_mean(window.gap_s, weight, max(now_s - window.last_at_s, 0.0), recent)
        window.outcomes, window.last_at_s = after, now_s

    def miss_usd(self, k: int, now_s: float) -> float:
        """Expected credit that one more miss of class k causes; 0 without a window."""
        window = self._windows.get(k)
        if window is None:
            return 0.0
        window.close(now_s)
        to_come = (window.closes_at_s - now_s) / max(window.gap_s, 1e-6)
        prior, term = contracts.PRIOR_OUTCOMES, window.terms
        seen = window.outcomes
        return contracts.window_miss_usd(
            window.missed,
            window.decided,
            to_come,
            (seen * window.miss_rate + prior * contracts.PRIOR_MISS_RATE) / (seen + prior),
            window.value_usd + (to_come + 1.0) * window.mean_value_usd,
            term["window_target"],
            term["window_share"],
            term["window_low_target"],
            term["window_low_share"],
        )

    def take_over(self, old: SloWindows, classes: Mapping[int, int]) -> None:
        """Goes on where the windows of an earlier bundle are; `classes` maps its classes to these."""
        for theirs, k in classes.items():
            mine, before = self._windows.get(k), old._windows.get(theirs)
            if mine is not None and before is not None and before.terms["window_s"] == mine.terms["window_s"]:
                before.terms = mine.terms
                self._windows[k] = before
