"""The Report: every figure of a comparison, once; `document` and `table` only lay it out.

Definitions. "Per 1k" divides by exogenous first calls, so that shedding and retries do not change the denominator.
Contribution margin = revenue - service credits - refunds - variable cost (API, energy, cache); margin = contribution
margin - GPU-hours. `delta_pct` is per cent of the reference's contribution margin, which stays meaningful near
break-even. SLO attainment = answered inside every SLO of the class / first calls (a shed request missed it); quality =
good / answered; shed = not answered, whoever gave up / first calls. The figures of the classes are per 1k first calls
of all classes, so that they add up to the policy's contribution margin.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from envs.economics.ledger import ACCOUNTS
from evaluation.assumptions import Assumption
from evaluation.bounds import Bounds
from evaluation.calibration import verdict_words
from evaluation.results import EpisodeResults, Floats, check_paired
from evaluation.router_cost import router_usd_per_1k
from evaluation.statistics import (
    Estimate,
    holm,
    interquartile_mean,
    paired_estimate,
    paired_interval,
    ratio_of_sums,
    sign_flip_p_value,
)
from marginroute.errors import InputError
from marginroute.view import KINDS

PER_1K = 1000.0
SHORT_S = 360.0
"""Below it a time in hours would be 0.0."""
UNTUNED = "-default"
"""Ends the name of a rule with its parameters as they come."""
SECONDS_PER_HOUR = 3600.0
NO_ROOM_PCT = 1.0
"""`gap_closed` is null where the bound leaves less room than this share of contribution margin."""


@dataclass(frozen=True)
class Paired:
    """A policy against the best heuristic on the same requests.

    Attributes:
        vs: name of the reference.
        delta_usd_per_1k: difference of margins with its paired interval.
        delta_pct: the difference in per cent of the reference's contribution margin; NaN where that is not positive.
        p_value: two-sided sign-flip test over episodes.
        p_holm: the same, adjusted for the number of policies compared.
        net_usd_per_1k: the difference less what deciding costs, see `evaluation.router_cost`.
    """

    vs: str
    delta_usd_per_1k: Estimate
    delta_pct: float
    p_value: float
    p_holm: float
    net_usd_per_1k: float


@dataclass(frozen=True)
class Report:
    """A finished comparison.

    Attributes:
        scenario: name.
        results: by policy name.
        margin_usd_per_1k, margin_usd_per_hour, contribution_usd_per_1k: estimates by policy name.
        best_heuristic: chosen on validation seeds; None if no heuristic took part.
        paired: by name of every policy but the best heuristic.
        bounds: of the same episodes; None where they were not computed.
        calibration: verdict of the last backtest of the scenario; None where there was none.
        assumptions: the inputs and where they come from.
        tuned: whether the heuristics are tuned; else rules of thumb as they come.
    """

    scenario: str
    results: Mapping[str, EpisodeResults]
    margin_usd_per_1k: Mapping[str, Estimate]
    margin_usd_per_hour: Mapping[str, Estimate]
    contribution_usd_per_1k: Mapping[str, Estimate]
    best_heuristic: str | None
    paired: Mapping[str, Paired]
    bounds: Bounds | None = None
    calibration: Mapping[str, Any] | None = None
    assumptions: Sequence[Assumption] = ()
    tuned: bool = True

    @property
    def episodes(self) -> int:
        """E."""
        return len(next(iter(self.results.values())).seeds)

    @property
    def ranking(self) -> list[str]:
        """Policy names, highest margin first."""
        return sorted(self.results, key=lambda name: -self.margin_usd_per_1k[name].mean)

    @property
    def bounds_usd_per_1k(self) -> dict[str, float | None]:
        """Margin per 1k first calls of each bound; None where it was not computed."""
        names = ("clairvoyant", "same_information")
        if self.bounds is None:
            return dict.fromkeys(names)
        calls = next(iter(self.results.values())).first_calls
        return {name: float(ratio_of_sums(getattr(self.bounds, f"{name}_usd"), calls, PER_1K)) for name in names}

    def iqm_usd_per_1k(self, name: str) -> float:
        """Interquartile mean over episodes of the margin per 1k first calls."""
        results = self.results[name]
        return float(interquartile_mean(PER_1K * results.margin_usd / results.first_calls))

    def untuned_usd_per_1k(self, name: str) -> float | None:
        """Margin of the same rule as it comes (`NAME-default`); None where that did not take part."""
        untuned = self.margin_usd_per_1k.get(f"{name}{UNTUNED}")
        return None if untuned is None else untuned.mean

    def share_of_bound(self, name: str) -> Estimate | None:
        """Of the clairvoyant bound, same episodes; None without a positive one.

        Both before the GPU-hours that are paid in any case: contribution margins, unless replicas are rented.
        """
        if self.bounds is None:
            return None
        of_bound_usd = self.bounds.clairvoyant_usd - self.bounds.gpu_usd
        if not (of_bound_usd > 0.0).all():
            return None
        return paired_estimate(self.results[name].margin_usd - self.bounds.gpu_usd, of_bound_usd)

    def gap_closed(self, name: str) -> float | None:
        """(policy - best heuristic) / (same-information bound - best heuristic); None where there is no room."""
        bound = self.bounds_usd_per_1k["same_information"]
        if bound is None or self.best_heuristic is None:
            return None
        reference = self.margin_usd_per_1k[self.best_heuristic].mean
        room = bound - reference
        if room < NO_ROOM_PCT / 100.0 * self.contribution_usd_per_1k[self.best_heuristic].mean or room <= 0.0:
            return None
        return (self.margin_usd_per_1k[name].mean - reference) / room


def build_report(
    scenario: str,
    results: Mapping[str, EpisodeResults],
    best_heuristic: str | None,
    bounds: Bounds | None = None,
    calibration: Mapping[str, Any] | None = None,
    assumptions: Sequence[Assumption] = (),
    tuned: bool = True,
) -> Report:
    """Computes intervals and paired differences.

    Args:
        scenario: name to report.
        results: by policy name, all on the same episodes.
        best_heuristic: name in `results` that the others are compared with, chosen on other seeds.
        bounds: of the same episodes, where known.
        calibration: of the scenario, see `evaluation.calibration`.
        assumptions: of the scenario, see `evaluation.assumptions`.
        tuned: whether the heuristics among the results are.

    Raises:
        InputError: the results are not from the same requests, or the bounds from other episodes.
    """
    check_paired(results)
    if best_heuristic is not None and best_heuristic not in results:
        raise InputError(f"best heuristic {best_heuristic!r} is not among the results: {', '.join(results)}")
    if bounds is not None and not np.array_equal(bounds.seeds, next(iter(results.values())).seeds):
        raise InputError("the bounds are of other episodes than the results: compute them again")
    first_calls = next(iter(results.values())).first_calls.astype(np.float64)
    hours = next(iter(results.values())).horizon_s / SECONDS_PER_HOUR
    margin_usd = np.array([r.margin_usd for r in results.values()])
    contribution_usd = np.array([r.contribution_usd for r in results.values()])
    contribution = _estimates(results, contribution_usd, first_calls, PER_1K)
    paired: dict[str, Paired] = {}
    if best_heuristic is not None:
        reference = list(results).index(best_heuristic)
        difference_usd = margin_usd - margin_usd[reference]
        base = contribution[best_heuristic].mean
        for name, delta, x in zip(
            results,
            _estimates(results, difference_usd, first_calls, PER_1K).values(),
            difference_usd,
            strict=True,
        ):
            if name != best_heuristic:
                pct = 100.0 * delta.mean / base if base > 0.0 else math.nan
                net = delta.mean - router_usd_per_1k(results[name])
                paired[name] = Paired(best_heuristic, delta, pct, sign_flip_p_value(x), math.nan, net)
        adjusted = holm([pair.p_value for pair in paired.values()])
        paired = {name: replace(x, p_holm=float(p)) for (name, x), p in zip(paired.items(), adjusted, strict=True)}
    return Report(
        scenario=scenario,
        results=results,
        margin_usd_per_1k=_estimates(results, margin_usd, first_calls, PER_1K),
        margin_usd_per_hour=_estimates(results, margin_usd, hours, 1.0),
        contribution_usd_per_1k=contribution,
        best_heuristic=best_heuristic,
        paired=paired,
        bounds=bounds,
        calibration=calibration,
        assumptions=assumptions,
        tuned=tuned,
    )


def warnings_of(report: Report) -> list[str]:
    """What stands above a report: the verdict of a backtest, and whether nothing was tuned."""
    untuned = "No tuned baseline is in this comparison: its rules of thumb are as they come; train.py tunes them."
    return [words for words in (verdict_words(report.calibration), "" if report.tuned else untuned) if words]


def played_words(episodes: int) -> str:
    """How many held-out episodes were played."""
    return f"{episodes} held-out episode{'s' if episodes != 1 else ''}"


def accounts_usd_per_1k(results: EpisodeResults) -> dict[str, float]:
    """Every account per 1k first calls, costs negative; they add up to the margin."""
    totals = ratio_of_sums(results.ledger_usd.sum(axis=2).T, results.first_calls, PER_1K)
    return dict(zip(ACCOUNTS, totals.tolist(), strict=True))


def action_shares(results: EpisodeResults) -> dict[str, float]:
    """Share of each kind of decision."""
    total = results.action_counts.sum(axis=0)
    return dict(zip(KINDS, (total / max(int(total.sum()), 1)).tolist(), strict=True))


def shed_shares(results: EpisodeResults) -> Floats:
    """(K,) share of first calls that got no answer: shed, abandoned or failed."""
    return results.share("shed") + results.share("abandoned") + results.share("failed")


def _estimates(names: Mapping[str, Any], numerators: Floats, denominator: Floats, scale: float) -> dict[str, Estimate]:
    """Intervals of one row (E,) per name."""
    columns = np.stack(paired_interval(numerators, denominator, scale=scale), axis=-1)
    return {name: Estimate(*map(float, row)) for name, row in zip(names, columns, strict=True)}
