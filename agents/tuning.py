"""Tunes the baselines of a scenario: the same search, on the same workloads, with the same stated budget for each.

The objective is the mean margin over a fixed set of training episodes (common random numbers). Parameters are searched
in `agents.search`, in the ranges of `agents.search_spaces` and `agents.tuning_shipped`; a rule with a few variants is
tried in each. The budget counts simulated requests.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import replace

import numpy as np
import optuna

from agents import tuning_shipped
from agents.objective import Objective, Rule
from agents.outcomes import log_outcomes, log_reuse
from agents.quality import fit_quality, fit_reuse
from agents.search import USUAL_RESTARTS, Budget, Suggest, Tuned, best_of, search_restarts
from agents.search_spaces import cascades, difficulty_threshold, has_verifiers, is_semantic, margin_rule
from agents.workers import Crew
from envs.plant import Plant
from envs.progress import Progress, silent
from marginroute import quality
from marginroute.errors import InputError
from marginroute.margin_rule import MarginRule
from marginroute.rules import DifficultyThreshold, FixedTier, LeastInFlight, Random, RoundRobin, RuleOfThumb

AS_IT_COMES = "shipped-default"  # the one baseline whose parameters stay what gateways ship
CHECKED_EPISODES = 16
SIMILARITIES = (0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.925, 0.95, 0.975, 0.99, 1.0)
FIT_WORTHS = (5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, math.inf)  # judged answers


def check_requests(plant: Plant) -> None:
    """Refuses a scenario whose episodes may be empty: nothing can be tuned or learned on them.

    Raises:
        InputError: one of the first episodes has no request.
    """
    scenario = plant.scenario
    if any(scenario.generate(seed, "train").n_requests == 0 for seed in range(CHECKED_EPISODES)):
        raise InputError(
            f"scenario {scenario.name!r} has episodes of {scenario.horizon_s:g} s without a request; "
            "legal is a longer horizon_s or more arrivals"
        )


class _Tuner:
    """Objectives and progress of one tuning; `restarts` are expected to be made."""

    def __init__(self, plant: Plant, budget: Budget, progress: Progress, restarts: int, crew: Crew | None) -> None:
        check_requests(plant)
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
        self.plant, self.budget = plant, budget
        self.objective = Objective(plant, "train", range(budget.episodes), crew)
        self.validation = Objective(plant, "validation", range(budget.validation_episodes))
        self._progress, self._done, self._total = progress, 0, restarts
        progress(0, restarts)

    def report(self) -> None:
        """One more restart has been made."""
        self._done += 1
        self._progress(min(self._done, self._total), self._total)

    def search(self, suggest: Suggest) -> Tuned:
        """Tunes a rule with several parameters."""
        return search_restarts(suggest, self.plant, self.objective, self.validation, self.budget, self.report)

    def margin(self, name: str, priced: bool, fitted: quality.FittedQuality | None = None) -> Tuned:
        """Tunes a margin rule."""
        return self.search(lambda trial, plant: margin_rule(name, trial, plant, priced, fitted))


def with_threshold(tuned: Tuned, objective: Objective, validation: Objective) -> Tuned:
    """A rule of thumb with the similarity from which it gives stored answers tuned, too."""
    rules: list[Rule] = [replace(tuned.policy, cache_similarity=float(x)) for x in SIMILARITIES]
    best = best_of(rules, objective, validation)
    spent = tuned.requests + best.requests
    return replace(tuned, policy=best.policy, validation_usd_per_1k=best.validation_usd_per_1k, requests=spent)


def _tune_cascade(tuner: _Tuner) -> Tuned:
    """The best list of models with thresholds in the middle, then its thresholds by the same search as all others."""
    rules = cascades(tuner.plant)
    best = rules[int(np.argmax([float(tuner.objective([rule])[0]) for rule in rules]))]
    spent = len(rules) * tuner.objective.requests
    if len(best.order) == 1:
        return Tuned(best, float(tuner.validation([best])[0]), requests=spent)
    names = [f"threshold_{tuner.plant.layout.tier_names[t]}" for t in best.order[:-1]]

    def suggest(trial: optuna.Trial, plant: Plant) -> Rule:
        return replace(best, thresholds=tuple(trial.suggest_float(name, 0.0, 1.0) for name in names))

    found = tuner.search(suggest)
    found.requests += spent
    return found


def adaptive(fitted: Tuned, objective: Objective, validation: Objective) -> Tuned:
    """A rule with fitted P(good) that moves with judged answers, by the best of `FIT_WORTHS`."""
    rule = replace(fitted.policy, name="bid-price-adaptive")
    assert isinstance(rule, MarginRule) and rule.quality is not None
    rules: list[Rule] = [replace(rule, quality=replace(rule.quality, fit_worth=worth)) for worth in FIT_WORTHS]
    best = best_of(rules, objective, validation)
    spent, restarts = fitted.requests + best.requests, fitted.restarts_usd_per_1k
    return replace(best, spread_pct=fitted.spread_pct, requests=spent, restarts_usd_per_1k=restarts)


def tune_margin_rules(
    plant: Plant, budget: Budget, progress: Progress = silent, crew: Crew | None = None
) -> dict[str, Tuned]:
    """Tunes *bid-price* and *bid-price-fitted*: what a training starts from, and the strongest opponents.

    Where judged answers are heard of, *bid-price-adaptive* is the latter with a P(good) that moves with them.

    Args:
        plant: the scenario's constants.
        budget: what each may spend.
        progress: called with (done, total) restarts.
        crew: shares out the populations; None: this process alone.
    """
    tuner = _Tuner(plant, budget, progress, 2 * USUAL_RESTARTS, crew)
    tuned = {"bid-price": tuner.margin("bid-price", True)}
    outcomes = log_outcomes(plant, tuned["bid-price"].policy, range(1000, 1064))
    fitted = fit_quality(**outcomes, n_tiers=len(plant.layout.tier_names), n_tasks=len(plant.layout.task_names))
    if is_semantic(plant):
        reused = log_reuse(plant, tuned["bid-price"].policy, range(1064, 1096))
        fitted = replace(fitted, reuse=fit_reuse(**reused, n_tasks=len(plant.layout.task_names)))
    tuned["bid-price-fitted"] = tuner.margin("bid-price-fitted", True, fitted)
    if plant.scenario.workload.feedback is not None:
        tuned["bid-price-adaptive"] = adaptive(tuned["bid-price-fitted"], tuner.objective, tuner.validation)
    return tuned


def tune_others(
    plant: Plant, budget: Budget, progress: Progress = silent, crew: Crew | None = None
) -> dict[str, Tuned]:
    """Tunes every other baseline; arguments as `tune_margin_rules`."""
    several = [name for name, ranges in tuning_shipped.RANGES.items() if len(ranges) > 1]
    tuner = _Tuner(plant, budget, progress, USUAL_RESTARTS * (2 + len(several)), crew)
    objective, validation = tuner.objective, tuner.validation
    tuned: dict[str, Tuned] = {}
    for t, tier in enumerate(plant.layout.tier_names):
        rule: Rule = FixedTier(f"fixed-{tier}", t)
        tuned[rule.name] = Tuned(rule, float(validation([rule])[0]))
    both = (False, True) if plant.spec.providers else (False,)
    for name, cls in (
        ("random", Random),
        ("round-robin", RoundRobin),
        ("least-in-flight", LeastInFlight),
    ):
        tuned[name] = best_of([cls(name, use_providers=flag) for flag in both], objective, validation)
    tuned["difficulty-threshold"] = tuner.search(difficulty_threshold)
    threshold = tuned["difficulty-threshold"].policy
    assert isinstance(threshold, DifficultyThreshold)
    tuned |= tuning_shipped.tune_shipped(objective, validation, tuner.search, threshold)
    tuned["cascade"] = (
        _tune_cascade(tuner) if has_verifiers(plant) else best_of([cascades(plant)[0]], objective, validation)
    )
    if is_semantic(plant):
        for name in [name for name, x in tuned.items() if isinstance(x.policy, RuleOfThumb) and name != AS_IT_COMES]:
            tuned[name] = with_threshold(tuned[name], objective, validation)
    tuned["expected-margin"] = tuner.margin("expected-margin", priced=False)
    return tuned


def tune_baselines(
    plant: Plant, budget: Budget, progress: Progress = silent, crew: Crew | None = None
) -> dict[str, Tuned]:
    """Tunes every baseline of a scenario; arguments as `tune_margin_rules`."""
    return tune_others(plant, budget, progress, crew) | tune_margin_rules(plant, budget, progress, crew)
