"""Tunes the heuristic controllers of a scenario on the fluid surrogate, by the search that tunes the router's rules.

The objective is the mean margin over fixed training episodes (the same arrivals for every rule); CMA-ES is restarted
until two restarts agree on validation episodes, and the spread is published (`agents.tuning`). The budget counts
control ticks. The rule that is best on validation is the reference, the starting point of the learned controller, and
what a bundle falls back to.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import fields

import numpy as np
import optuna

from agents.objective import margins
from agents.search import USUAL_RESTARTS, Budget, Tuned, search_restarts
from envs.control_plant import ControlPlant, Traffic, traffic_of
from envs.control_worlds import EngineControl, FluidControl
from envs.progress import Progress, silent
from envs.scenario import Split
from envs.worlds import FleetWorlds
from marginroute.control import Array
from marginroute.control_rules import ControlParameters, RuleController, standard_rules
from marginroute.margin_rule import MarginRule

FIRST_VALIDATION_SEED = 20_000  # validation seeds before it belong to the router and to the gates
FIRST_PRICE_SEED, PRICE_DAYS = 40_000, 16  # validation days of the engine, on which the router's price is chosen
AT_ONCE = 4  # worlds of a day: what a day of requests takes in memory
PRICE_SHARES = (1.0, 0.5, 0.25, 0.0)


def control_budget(ticks: int) -> Budget:
    """What one rule may spend on one restart, in ticks: a few episodes, many sets of parameters."""
    return Budget(requests=ticks, episodes=8, population=12, restarts=4, validation_episodes=16)


def stack(rules: list[RuleController], worlds_each: int) -> RuleController:
    """One rule that plays rule l in worlds l * worlds_each .. (l + 1) * worlds_each - 1."""
    values = {
        f.name: np.repeat([float(getattr(rule.parameters, f.name)) for rule in rules], worlds_each)
        for f in fields(ControlParameters)
    }
    return rules[0].with_parameters(**values)


def play(worlds: FluidControl, controller: RuleController, episodes: list[Traffic]) -> Array:
    """(N,) margin in USD per 1k requests that a controller earns, an episode in every world."""
    for w, traffic in enumerate(episodes):
        worlds.load(w, traffic)
    worlds.run(controller)
    calls = np.array([traffic.arrivals.sum() for traffic in episodes])
    return np.asarray(worlds.ledger_usd.sum(axis=(1, 2)) / np.maximum(calls, 1.0) * 1000.0)


class ControlObjective:
    """Mean margin of rules on a fixed set of fluid episodes.

    Args:
        plant: the scenario.
        split, seeds: the episodes.

    Attributes:
        requests: what a rule's play costs, in control ticks.
    """

    def __init__(self, plant: ControlPlant, split: Split, seeds: Iterable[int]) -> None:
        self.plant = plant
        self.traffic = [traffic_of(plant.plant.scenario, seed, split, plant.layout.tick_s) for seed in seeds]
        self.requests = plant.ticks * len(self.traffic)
        self._worlds: dict[int, FluidControl] = {}

    def __call__(self, rules: list[RuleController]) -> Array:
        """(L,) mean margin per 1k requests of each rule."""
        n = len(rules) * len(self.traffic)
        if n not in self._worlds:
            self._worlds[n] = FluidControl(self.plant, n)
        usd = play(self._worlds[n], stack(rules, len(self.traffic)), self.traffic * len(rules))
        return np.asarray(usd.reshape(len(rules), -1).mean(axis=1))


def suggest(trial: optuna.Trial, rule: RuleController) -> RuleController:
    """The rule with parameters of a trial: those that it uses."""
    layout, values = rule.layout, {}
    if rule.scaling == "static":
        least = float((layout.min_replicas / layout.max_replicas).min())
        values["replicas"] = trial.suggest_float("replicas", min(least, 0.99), 1.0)
    else:
        low, high = {"hpa": (0.1, 1.5), "keda": (0.1, 4.0), "predictive": (0.4, 1.3)}[rule.scaling]
        values["target"] = trial.suggest_float("target", low, high)
        values["hold_down_s"] = trial.suggest_float("hold_down_s", 0.0, 3600.0)
    forecasts = rule.scaling == "predictive" or rule.release == "edf"
    if forecasts or layout.provider_names:
        values["trend"] = trial.suggest_float("trend", 0.0, 1.5)
    if rule.scaling == "predictive":
        values["slack"] = trial.suggest_float("slack", 0.0, 1.0)
        if rule.release != "at-once":
            values["held_share"] = trial.suggest_float("held_share", 0.0, 1.5)
    if rule.release != "at-once":
        values["fill"] = trial.suggest_float("fill", 0.3, 1.4)
        values["urgency"] = trial.suggest_float("urgency", 1.0, 3.0)
    values["cap_share"] = 2.0 ** trial.suggest_float("log2_cap_share", -2.0, 1.0)
    if layout.provider_names:
        values["spill_from"] = trial.suggest_float("spill_from", 0.8, 3.0)
        values["pace_s"] = 60.0 * 2.0 ** trial.suggest_float("log2_pace_min", 0.0, 8.0)
    return rule.with_parameters(**values)


def tune_controllers(plant: ControlPlant, budget: Budget, progress: Progress = silent) -> dict[str, Tuned]:
    """Every heuristic controller of a scenario, tuned.

    Args:
        plant: the scenario.
        budget: what each may spend; `Budget.requests` counts control ticks.
        progress: called with (done, total) restarts.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    objective = ControlObjective(plant, "train", range(budget.episodes))
    seeds = range(FIRST_VALIDATION_SEED, FIRST_VALIDATION_SEED + budget.validation_episodes)
    validation = ControlObjective(plant, "validation", seeds)
    rules = standard_rules(plant.layout)
    done, total = 0, USUAL_RESTARTS * len(rules)

    def report() -> None:
        nonlocal done
        done += 1
        progress(min(done, total), total)

    progress(0, total)
    return {
        name: search_restarts(
            lambda trial, _, rule=rule: suggest(trial, rule), plant, objective, validation, budget, report
        )
        for name, rule in rules.items()
    }


def best(tuned: dict[str, Tuned]) -> str:
    """Name of the rule that earns most on validation."""
    return max(tuned, key=lambda name: tuned[name].validation_usd_per_1k)


def prices_beside(
    plant: ControlPlant, router: MarginRule, controller: RuleController, progress: Progress = silent
) -> dict[float, float]:
    """What a router earns beside a controller by the share of its price of congestion that is left, in USD per 1k.

    A router is tuned with levers at rest, and asks a price for every replica that fills up. Caps, spill and more
    replicas are a controller's answers to the same, and what both charge for is charged for twice.
    """
    scenario, found = plant.plant.scenario, []
    for first in range(0, PRICE_DAYS, AT_ONCE):
        days = [scenario.generate(FIRST_PRICE_SEED + first + i, "validation") for i in range(AT_ONCE)]
        for i, share in enumerate(PRICE_SHARES):
            progress(len(PRICE_SHARES) * first + i * AT_ONCE, len(PRICE_SHARES) * PRICE_DAYS)
            worlds = FleetWorlds(plant.plant, AT_ONCE)
            worlds.load_all(days)
            rule = router.at_price(share)
            worlds.expect(rule.quality)
            EngineControl(worlds, plant.layout, rule).run(controller)
            found.append(margins(worlds))
    progress(len(PRICE_SHARES) * PRICE_DAYS, len(PRICE_SHARES) * PRICE_DAYS)
    usd = np.array(found).reshape(-1, len(PRICE_SHARES), AT_ONCE).mean(axis=(0, 2))
    return dict(zip(PRICE_SHARES, usd.tolist(), strict=True))
