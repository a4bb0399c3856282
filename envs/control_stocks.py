"""What stocks are worth to a controller by the time of the day: the terminal values of a limited horizon.

    price of a stock = (margin of a fleet that has more of it - margin of the fleet without) / how much more

Both fleets meet the same arrivals and are run by the same tuned rule, until no held request is left that both began
with; training days of the surrogate, at times `EVERY_S` apart, mean over days. Stocks: held requests by class and age,
replicas ready and on their way, calls that a provider's limit leaves.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from envs.control_lookahead import Lookahead, view_of
from envs.control_plant import ControlPlant, traffic_of
from envs.control_worlds import FluidControl
from marginroute.control import DAY_S, Array, ControlLayout, ControlView
from marginroute.control_rules import RuleController

DAYS = 4
EVERY_S = 7200.0
HELD_S = 900.0  # of all replicas' work that a fleet holds more of: enough for whole replicas to follow


def stocks(view: ControlView) -> Array:
    """(N, S) what the worlds of a view have: held work by class and age, calls by provider."""
    return np.concatenate([view.held.reshape(len(view.held), -1), view.allowance], axis=-1)


@dataclass(frozen=True, eq=False)
class StockPrices:
    """Prices (H, S) in USD at `H` times of the day from 0:00, joined by straight lines."""

    usd: Array

    def value_usd(self, view: ControlView) -> Array:
        """(N,) of what the worlds of a view have."""
        at = view.time_s % DAY_S / DAY_S * len(self.usd)
        left = at.astype(np.int64) % len(self.usd)
        right = (at - np.floor(at))[:, None]
        usd = self.usd[left] * (1.0 - right) + self.usd[(left + 1) % len(self.usd)] * right
        return np.asarray((usd * stocks(view)).sum(axis=-1))


def more(view: ControlView) -> Iterator[tuple[int, float, ControlView]]:
    """(stock, how much more of it, the view with that) for every stock that a scenario has."""
    layout, (_, k, parts) = view.layout, view.held.shape
    s = 0
    for of_class in range(k):
        for part in range(parts):
            if layout.holds[of_class]:
                held = view.held.copy()
                held[:, of_class, part] += HELD_S * layout.requests_per_s.sum()
                yield s, HELD_S * float(layout.requests_per_s.sum()), replace(view, held=held)
            s += 1
    for v in range(len(layout.provider_names)):
        allowance = view.allowance.copy()
        allowance[:, v] = 0.0
        if np.isfinite(layout.allowance[v]) and layout.allowance[v] > 0.0:
            yield s, -float(layout.allowance[v]), replace(view, allowance=allowance)
        s += 1


def measure(plant: ControlPlant, rule: RuleController, days: int = DAYS) -> StockPrices:
    """Plays training days by the rule, and what follows at times of the day with more of each stock."""
    layout = plant.layout
    played = [traffic_of(plant.plant.scenario, seed, "train", layout.tick_s) for seed in range(days)]
    arrivals = np.stack([traffic.arrivals for traffic in played])
    worlds = FluidControl(plant, days)
    for w, traffic in enumerate(played):
        worlds.load(w, traffic)
    cases = list(more(worlds.view()))
    ahead = Lookahead(plant, days * (len(cases) + 1))
    every = max(round(EVERY_S / layout.tick_s), 1)
    longest = _longest(layout)
    sums, seen = np.zeros((round(DAY_S / EVERY_S), stocks(worlds.view()).shape[1])), np.zeros(round(DAY_S / EVERY_S))
    rule = rule.anew()
    while not worlds.done.all():
        view, now = worlds.view(), int(worlds.tick[0])
        if now % every == 0:
            hour = int(view.time_s[0] % DAY_S / EVERY_S)
            usd = _gains(ahead, view, rule, arrivals[:, now : now + longest])
            for (stock, amount, _), gain_usd in zip(cases, usd, strict=True):
                sums[hour, stock] += gain_usd / amount
            seen[hour] += 1
        worlds.step(rule.act(view))
    mean = sums.sum(axis=0) / max(seen.sum(), 1.0)
    return StockPrices(np.where(seen[:, None] > 0, sums / np.maximum(seen, 1.0)[:, None], mean))


def _longest(layout: ControlLayout) -> int:
    """Ticks after which held work is gone, and replicas have come."""
    longest_s = max([*layout.deadline_s[layout.holds], 2.0 * float(layout.lag_s.max())])
    return int(np.ceil(longest_s / layout.tick_s)) + 1


def _gains(ahead: Lookahead, view: ControlView, rule: RuleController, arrivals: Array) -> Array:
    """(C,) mean margin over days that each case earns more than the fleet as it is."""
    views = [view, *(changed for _, _, changed in more(view))]
    days, rows = len(view.time_s), len(views) * len(view.time_s)
    all_of = view_of(view, np.tile(np.arange(days), len(views)))
    joined = replace(
        all_of,
        pools=np.concatenate([x.pools for x in views]),
        held=np.concatenate([x.held for x in views]),
        allowance=np.concatenate([x.allowance for x in views]),
    )
    ahead.begin(joined, np.tile(arrivals, (len(views), 1, 1)))
    rule = rule.of_worlds(np.arange(rows) % days)
    for _ in range(arrivals.shape[1]):
        ahead.step(rule.act(ahead.view()))
    usd = ahead.ledger_usd.sum(axis=(1, 2)).reshape(len(views), days)
    return np.asarray((usd[1:] - usd[0]).mean(axis=1))
