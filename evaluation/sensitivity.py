"""Which inputs does a gain hang on, and at which value of each is it gone?

Every input is changed alone, by factors of what the scenario says; policies stay as tuned or trained for the scenario
itself (margin rules see prices and contracts in the View and follow them). The same held-out requests are played with
all values. Between neighbouring values the gain is taken as linear, which gives the break-even point.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from agents.workers import Crew
from envs.scenario import Scenario
from envs.scenario_family import changed
from evaluation.cache import cached_play
from evaluation.report import PER_1K
from evaluation.statistics import Estimate, paired_estimate, zeros
from marginroute.errors import InputError
from marginroute.policy import Policy

MOST_INFLUENTIAL = 5
HIGHEST_AUC = 0.99
Changes = dict[str, Any]


@dataclass(frozen=True)
class Input:
    """Something that a scenario states and nobody knows exactly.

    Attributes:
        name: in words.
        today: its value in the scenario, in words.
        factors: five ascending ones, the middle one 1; the second and the fourth are the ends of its bar.
        changes: overrides of the scenario at a factor; none: the input plays no part.
    """

    name: str
    today: str
    factors: tuple[float, float, float, float, float]
    changes: Callable[[float], Changes]


@dataclass(frozen=True)
class Bar:
    """How a gain follows one input.

    Attributes:
        name, today: of the input.
        gains: USD per 1k requests by factor.
        low, high: factors at the ends of the bar.
        break_even: factor nearest to 1 at which the gain is zero; None where there is none between the factors tried.
    """

    name: str
    today: str
    gains: Mapping[float, Estimate]
    low: float
    high: float
    break_even: float | None

    @property
    def swing_usd(self) -> float:
        """How far the gain moves over the bar, USD per 1k requests."""
        middle = self.gains[1.0].mean
        return max(abs(self.gains[end].mean - middle) for end in (self.low, self.high))

    @property
    def break_even_words(self) -> str:
        """Where the gain is gone."""
        if self.break_even is None:
            tried = sorted(self.gains)
            return f"none from x{tried[0]:.3g} to x{tried[-1]:.3g}"
        return f"x{self.break_even:.2f}"


def inputs(scenario: Scenario) -> list[Input]:
    """The inputs that are tried."""
    classes, plans = scenario.plans.classes, scenario.plans.plans
    bad = {name: item.remedies.bad_answer_usd for name, item in classes.items() if item.remedies.bad_answer_usd}
    bad_words = ", ".join(f"{name} {usd:g}" for name, usd in bad.items()) + " USD per bad answer besides refunds"
    found = [
        Input("cost of a bad answer", bad_words, (0.0, 0.5, 1.0, 2.0, 4.0), lambda f: _bad_answer(scenario, f)),
        _signal(scenario),
        Input(
            "prices to customers",
            ", ".join(f"{name} ({plan.kind})" for name, plan in plans.items()),
            (0.5, 0.8, 1.0, 1.25, 2.0),
            lambda f: _prices(scenario, f),
        ),
        Input(
            "prices of APIs",
            ", ".join(f"{name} {x.input_usd_per_mtok:g}/{x.output_usd_per_mtok:g}" for name, x in _apis(scenario))
            + " USD per Mtok in/out",
            (0.25, 0.5, 1.0, 2.0, 4.0),
            lambda f: _api_prices(scenario, f),
        ),
        Input(
            "SLO credits",
            ", ".join(f"{name} {_credit(item):g} of the value" for name, item in classes.items()),
            (0.0, 0.5, 1.0, 2.0, 4.0),
            lambda f: _credits(scenario, f),
        ),
        Input(
            "load", f"x{scenario.load_scale:g}", (0.5, 0.75, 1.0, 1.3, 1.6),
            lambda f: {"load_scale": scenario.load_scale * f},
        ),
    ]  # fmt: skip
    return [item for item in found if item.changes(item.factors[3])]


def tornado(
    scenario: Scenario,
    policies: Mapping[str, Policy],
    shown: str,
    reference: str,
    *,
    episodes: int,
    seed: int = 0,
    workers: int | Crew | None = None,
    use_cache: bool = True,
    step: Callable[[], None] = lambda: None,
) -> list[Bar]:
    """Bars of the most influential inputs, longest first.

    Args:
        scenario: the world.
        policies: by name, `shown` and `reference` among them.
        shown: whose gain it is.
        reference: over whom.
        episodes: per value.
        seed: first held-out seed.
        workers: a crew, or processes.
        use_cache: whether episodes that were played before are looked up.
        step: called after every input.
    """
    two = {name: policies[name] for name in (shown, reference)}

    def gain(changes: Changes) -> Estimate | None:
        try:
            world = changed(scenario, changes, "sensitivity")  # without ranges, as the value today is measured, too
        except InputError:  # the value contradicts another one of the scenario
            return None
        results = cached_play(world, two, episodes, seed, None, workers, use_cache)
        difference_usd = results[shown].margin_usd - results[reference].margin_usd
        return paired_estimate(difference_usd, results[shown].first_calls, scale=PER_1K)

    bars = []
    for item in inputs(scenario):
        tried = {f: gain({} if f == 1.0 else item.changes(f)) for f in dict.fromkeys(item.factors)}
        gains = {f: x for f, x in tried.items() if x is not None}
        step()
        if len({x.mean for x in gains.values()}) == 1:  # the gain does not hang on it
            continue
        low, high = (item.factors[i] if item.factors[i] in gains else 1.0 for i in (1, 3))
        bars.append(Bar(item.name, item.today, gains, low, high, break_even(gains)))
    return sorted(bars, key=lambda bar: -bar.swing_usd)[:MOST_INFLUENTIAL]


def break_even(gains: Mapping[float, Estimate]) -> float | None:
    """The factor nearest to 1 at which the gain is zero, linear between neighbours."""
    return min(zeros((f, x.mean) for f, x in gains.items()), key=lambda f: abs(f - 1.0), default=None)


def _bad_answer(scenario: Scenario, factor: float) -> Changes:
    return {
        f"plans.classes.{name}.remedies.bad_answer_usd": item.remedies.bad_answer_usd * factor
        for name, item in scenario.plans.classes.items()
        if item.remedies.bad_answer_usd
    }


def _signal(scenario: Scenario) -> Input:
    """The quality signal: AUC of a predictor, or correlation of a signal of difficulty."""
    difficulty = scenario.workload.difficulty
    if difficulty.signal_auc is not None:
        edge = difficulty.signal_auc - 0.5
        most = (HIGHEST_AUC - 0.5) / edge if edge > 0.0 else 1.0
        return Input(
            "AUC of the quality signal",
            f"{difficulty.signal_auc:g}; factors are of what it is above 0.5",
            (0.0, 0.5, 1.0, (1.0 + most) / 2.0, most),
            lambda f: {"workload.difficulty.signal_auc": 0.5 + edge * f} if edge > 0.0 else {},
        )
    correlation = float(difficulty.signal_correlation or 1.0)
    most = 1.0 / correlation
    return Input(
        "quality signal",
        f"correlation with difficulty {correlation:g}",
        (0.05, 0.5, 1.0, (1.0 + most) / 2.0, most),
        lambda f: {"workload.difficulty.signal_correlation": min(correlation * f, 1.0)} if most > 1.0 else {},
    )


def _prices(scenario: Scenario, factor: float) -> Changes:
    fields = ("input_usd_per_mtok", "output_usd_per_mtok", "cached_input_usd_per_mtok", "request_usd")
    return {
        f"plans.plans.{name}.{field}": value * factor
        for name, plan in scenario.plans.plans.items()
        for field in (*fields, "seat_usd_per_month", "committed_usd_per_tenant", "credits_usd_per_tenant")
        if (value := getattr(plan, field, None))
    }


def _apis(scenario: Scenario) -> list[tuple[str, Any]]:
    return [(name, x) for name, x in scenario.fleet.providers.items() if x.input_usd_per_mtok is not None]


def _api_prices(scenario: Scenario, factor: float) -> Changes:
    fields = ("input_usd_per_mtok", "output_usd_per_mtok", "cached_input_usd_per_mtok")
    return {
        f"fleet.providers.{name}.{field}": value * factor
        for name, provider in _apis(scenario)
        for field in fields
        if (value := getattr(provider, field))
    }


def _credit(item: Any) -> float:
    slo = item.slo
    return float(max(slo.ttft_credit_share, slo.tpot_credit_share, slo.e2e_credit_share))


def _credits(scenario: Scenario, factor: float) -> Changes:
    return {
        f"plans.classes.{name}.slo.{field}": min(value * factor, 1.0)
        for name, item in scenario.plans.classes.items()
        for field in ("ttft_credit_share", "tpot_credit_share", "e2e_credit_share")
        if (value := getattr(item.slo, field)) and math.isfinite(value)
    }
