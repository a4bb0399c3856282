"""What tuning and validation maximise: the mean margin of rules that play the same episodes side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import fields, replace
from typing import Any

import numpy as np

from agents.workers import Crew
from envs.plant import Plant
from envs.scenario import Scenario, Split
from envs.worlds import FleetWorlds
from marginroute import view as v
from marginroute.gateway_rules import ShippedRule
from marginroute.margin_rule import MarginParameters, MarginRule
from marginroute.quality import FittedQuality
from marginroute.rules import Cascade, DifficultyThreshold, RuleOfThumb
from marginroute.view import Array, Layout, View

Rule = MarginRule | RuleOfThumb


class Exploring:
    """Plays a rule, and now and then a random legal replica or provider; logs outcomes for the fit of P(good)."""

    def __init__(self, rule: Rule, share: float, seed: int) -> None:
        self.name, self._rule, self._share = f"exploring {rule.name}", rule, share
        self._rng = np.random.default_rng(seed)

    def decide(self, view: View) -> Any:
        """Not used while logging."""
        return self._rule.decide(view)

    def decide_batch(self, view: View) -> Array:
        """The rule's choices, a share of them replaced."""
        choice = self._rule.decide_batch(view)
        able = view.legal & (view.layout.kind <= v.PROVIDER)
        any_able = np.where(able, self._rng.random(able.shape), -1.0).argmax(axis=-1)
        explore = (self._rng.random(choice.shape) < self._share) & able.any(axis=-1)
        return np.where(explore & (view.layout.kind[choice] <= v.PROVIDER), any_able, choice)

    def in_flight_caps(self, layout: Layout, slots: Array) -> Array | None:
        """The rule's caps."""
        return self._rule.in_flight_caps(layout, slots)

    @property
    def quality(self) -> FittedQuality | None:
        """The rule's."""
        return self._rule.quality


def margins(worlds: FleetWorlds) -> Array:
    """(N,) margin of ended worlds in USD per 1k first calls."""
    first_calls = worlds.counts[:, 0].sum(axis=1)
    return worlds.ledger_usd.sum(axis=(1, 2)) / np.maximum(first_calls, 1) * 1000.0


def stack(rules: list[Rule], worlds_each: int) -> Rule:
    """One rule that plays rule l in worlds l * worlds_each .. (l + 1) * worlds_each - 1."""

    def column(values: list[Any], shape: tuple[int, ...]) -> Array:
        return np.repeat(np.array(values, dtype=np.float64), worlds_each, axis=0).reshape(*shape)

    n = len(rules) * worlds_each
    first = rules[0]
    if isinstance(first, MarginRule):
        sets = [rule.parameters for rule in rules if isinstance(rule, MarginRule)]
        stacked = {f.name: column([getattr(p, f.name) for p in sets], (n, -1)) for f in fields(MarginParameters)}
        return replace(first, parameters=MarginParameters(**stacked))
    if isinstance(first, ShippedRule):
        numbers = [f.name for f in fields(first) if isinstance(getattr(first, f.name), float)]
        return replace(first, **{name: column([getattr(rule, name) for rule in rules], (n, 1)) for name in numbers})
    if isinstance(first, Cascade):
        cascades = [rule.thresholds for rule in rules if isinstance(rule, Cascade)]
        return replace(first, thresholds=column(cascades, (n, -1)))
    assert isinstance(first, DifficultyThreshold)
    thresholds = [rule for rule in rules if isinstance(rule, DifficultyThreshold)]
    return replace(
        first,
        cutoffs=column([rule.cutoffs for rule in thresholds], (n, -1)),
        load_shift=column([rule.load_shift for rule in thresholds], (n,)),
    )


class Objective:
    """Mean margin of rules on a fixed set of episodes.

    Args:
        plant: the scenario's constants.
        split, seeds: the episodes.
        crew: shares out populations, with the same numbers; None: this process plays them at once.
    """

    def __init__(self, plant: Plant, split: Split, seeds: Iterable[int], crew: Crew | None = None) -> None:
        self.plant, seeds = plant, tuple(seeds)
        self.workloads = [plant.scenario.generate(seed, split) for seed in seeds]
        self.requests = sum(workload.n_requests for workload in self.workloads)
        self._worlds: dict[int, FleetWorlds] = {}
        self.counts: Array = np.zeros(0)  # (len(COUNTS), K) over all rules and episodes last played by this process
        self._crew = crew
        self._job = crew.job(start_objective, (plant.scenario, split, seeds)) if crew is not None else None

    def each(self, rule: Rule) -> Array:
        """(N,) margin per 1k first calls of a rule in each episode."""
        self([rule])
        return margins(self._worlds[1])

    def __call__(self, rules: list[Rule]) -> Array:
        """(L,) mean margin per 1k first calls of each rule."""
        if self._crew is not None and self._job is not None and len(rules) > 1:
            each = -(-len(rules) // self._crew.size)
            found = self._job.each([(at, rules[at : at + each]) for at in range(0, len(rules), each)])
            return np.concatenate([usd for _, usd in sorted(found, key=lambda part: part[0])])
        if len(rules) not in self._worlds:
            self._worlds[len(rules)] = FleetWorlds(self.plant, len(rules) * len(self.workloads))
        worlds = self._worlds[len(rules)]
        worlds.load_all(self.workloads * len(rules))
        worlds.run(rules[0] if len(rules) == 1 else stack(rules, len(self.workloads)))
        self.counts = worlds.counts.sum(axis=0)
        return margins(worlds).reshape(len(rules), -1).mean(axis=1)


def start_objective(
    scenario: Scenario, split: Split, seeds: Iterable[int]
) -> Callable[[tuple[int, list[Rule]]], tuple[int, Array]]:
    """What a member of a crew plays its part of a population with."""
    objective = Objective(Plant(scenario), split, seeds)
    return lambda part: (part[0], objective(part[1]))
