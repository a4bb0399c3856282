"""Hours of the day, days of the week, and growth: a clock that runs faster when there is more traffic.

Any arrival process is drawn on operational time u(t), the integral of the season's factor, and mapped back. Its local
burstiness stays what it is; only the rate follows the season (Cinlar, "Introduction to stochastic processes", 1975,
on time changes).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

DAY_S = 86400.0
WEEK_S = 7.0 * DAY_S
_STEP_S = 300.0


@dataclass(frozen=True)
class Season:
    """How the rate varies over a week.

    Attributes:
        daily: (H,) relative rates at H even times of a day, joined by straight lines.
        weekly: (7,) relative rates of the days from Monday on.
        growth_per_day: relative growth of the rate a day, compounding from the start of the episode.
        start_h: hour of the week at which an episode starts; None draws it.
    """

    daily: tuple[float, ...] = (1.0,)
    weekly: tuple[float, ...] = (1.0,) * 7
    growth_per_day: float = 0.0
    start_h: float | None = None

    def factor(self, week_s: Array) -> Array:
        """Rate relative to the mean of a week, at seconds since Monday 0:00; any shape."""
        hours = (week_s % DAY_S) / DAY_S * len(self.daily)
        daily = np.interp(hours, np.arange(len(self.daily) + 1), (*self.daily, self.daily[0]))
        day = (week_s % WEEK_S // DAY_S).astype(np.int64)
        return daily / np.mean(self.daily) * (np.array(self.weekly) / np.mean(self.weekly))[day]

    def clock(self, rng: np.random.Generator, start_s: float, end_s: float) -> tuple[Array, Array]:
        """Times (G,) of an episode from `start_s` to `end_s` and the operational time at each, from 0."""
        week_s = rng.random() * WEEK_S if self.start_h is None else self.start_h * 3600.0
        edges = np.linspace(start_s, end_s, max(2, int((end_s - start_s) / _STEP_S) + 2))
        middle = 0.5 * (edges[1:] + edges[:-1])
        factor = self.factor(week_s + middle) * np.exp(np.log1p(self.growth_per_day) * middle / DAY_S)
        return edges, np.append(0.0, np.cumsum(factor * np.diff(edges)))
