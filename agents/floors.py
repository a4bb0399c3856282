"""Floors: a class must reach an SLO attainment or an answer quality, or may lose only so many of its requests.

    --floor slo.enterprise=0.99        share of calls answered inside all SLOs of the class, at least
    --floor quality.enterprise=0.92    share of good answers among its answers, at least
    --floor shed.team=0.01             share of its calls that get no answer (shed, abandoned, failed), at most

One mechanism serves all: every floor has a multiplier, USD per call that keeps it (`MarginParameters.slo_usd`,
`good_usd`, `served_usd`), which enters the score of the margin rule and the learning signal. A quality floor is paid
per good answer of all calls, so that refusing hard requests does not meet it. With g(m) the share that the rule with
multiplier m reaches and f the floor, the multiplier is found by dual ascent (Boyd & Vandenberghe, Convex Optimization,
section 5): m rises while g(m) < f, falls to 0 while g(m) > f. What is aimed at lies `CAUTION` standard errors of a
share over the episodes above the floor, since other episodes judge.

- For a rule, on fixed episodes, only the sign of f - g counts (Rprop, Riedmiller & Braun, ICNN 1993): a step doubles
  until the sign first turns; from then on it halves when the sign turns and grows by a fifth while it stays.
- For PPO, whose shares are noisy and which follows late, the multiplier is the sum of all f - g plus the last one (a PI
  controller: Stooke, Achiam & Abbeel, ICML 2020; the sum alone swings).

What is exported is checked on episodes of its own by the gate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from agents.objective import margins
from envs.economics import ledger as books
from envs.plant import Plant
from envs.workload.requests import Workload
from envs.worlds import FleetWorlds
from marginroute.errors import InputError
from marginroute.margin_rule import MarginRule
from marginroute.view import Array

KINDS = ("slo", "quality", "shed")
"""Rows of the (3, K) multipliers; the third is paid per answer, since what it limits is their lack."""
ROUNDS = 24  # plays of a rule's ascent
EPISODES = 32  # training episodes that it plays
FIRST_SEED = 2000  # of those: not the tuner's, not the learner's
CAUTION = 2.0
DOUBLE, GROW, SHRINK = 2.0, 1.2, 0.5
MIN_UNIT_USD = 1e-6
HIGHEST = 100.0  # multiplier in mean values of a call, beyond which a floor is taken to be out of reach
RATE, PROPORTION = 0.25, 4.0  # of PPO's ascent: mean values of a call per unit of f - g, added up and at once


@dataclass(frozen=True)
class Floor:
    """One floor.

    Attributes:
        kind: `slo`, `quality` or `shed`.
        class_name, class_index: the customer class.
        limit: share, the least (slo, quality) or the most (shed).
    """

    kind: str
    class_name: str
    class_index: int
    limit: float

    @property
    def key(self) -> str:
        """As it is written on the command line, `slo.enterprise`."""
        return f"{self.kind}.{self.class_name}"

    @property
    def at(self) -> tuple[int, int]:
        """Its entry among (3, K) multipliers."""
        return KINDS.index(self.kind), self.class_index

    def share(self, counts: Array) -> float:
        """The share that counts (len(COUNTS), K), summed over episodes, come to; NaN for a class without calls."""
        served = counts[books.SERVED, self.class_index]
        calls = counts[books.CALLS, self.class_index] - counts[books.REFUSED, self.class_index]
        top, bottom = {
            "slo": (counts[books.SLO_OK, self.class_index], calls),
            "quality": (counts[books.GOOD, self.class_index], served),
            "shed": (calls - served, calls),
        }[self.kind]
        return float(top / bottom) if bottom else float("nan")

    def missing(self, counts: Array) -> float:
        """By how much the floor is missed; 0 or less where it is kept, or where the class has no calls."""
        share = self.share(counts)
        gap = share - self.limit if self.kind == "shed" else self.limit - share
        return 0.0 if np.isnan(gap) else gap

    def aimed(self, calls: float) -> Floor:
        """The floor to aim at so that this one holds on other episodes with so many calls of the class."""
        caution = CAUTION * float(np.sqrt(self.limit * (1.0 - self.limit) / max(calls, 1.0)))
        limit = self.limit - caution if self.kind == "shed" else self.limit + caution
        return replace(self, limit=min(max(limit, 0.0), 1.0))


def parse(words: Iterable[str], class_names: Sequence[str]) -> tuple[Floor, ...]:
    """Floors as `--floor` takes them.

    Raises:
        InputError: the value, and what is legal.
    """
    found: dict[str, Floor] = {}
    for word in words:
        key, equals, text = word.partition("=")
        kind, _, class_name = key.partition(".")
        if not equals or kind not in KINDS:
            raise InputError(f"--floor {word!r} is not legal; legal is slo.CLASS=V, quality.CLASS=V or shed.CLASS=V")
        if class_name not in class_names:
            raise InputError(f"--floor {word!r}: class {class_name!r} is not legal; legal: {', '.join(class_names)}")
        try:
            limit = float(text)
        except ValueError:
            limit = float("nan")
        if not 0.0 <= limit <= 1.0:
            raise InputError(f"--floor {word!r}: {text!r} is not legal; legal is a share from 0 to 1")
        if key in found:
            raise InputError(f"--floor {word!r} is given twice; legal is one value for {key}")
        found[key] = Floor(kind, class_name, class_names.index(class_name), limit)
    return tuple(found.values())


def with_multipliers(rule: MarginRule, usd: Array) -> MarginRule:
    """The rule with (3, K) multipliers."""
    slo, good, served = (tuple(row.tolist()) for row in usd)
    parameters = replace(rule.parameters, slo_usd=slo, good_usd=good, served_usd=served)
    return replace(rule, parameters=parameters)


def mean_value_usd(plant: Plant, workload: Workload) -> Array:
    """(K,) what a mean call of each class is worth when answered: the unit of multipliers."""
    values = []
    for k, term in enumerate(plant.terms):
        own = workload.class_index == k
        lengths = (workload.prompt_tokens[own], workload.output_tokens[own])
        prompt_tokens, output_tokens = (float(x.mean()) if own.any() else 0.0 for x in lengths)
        usage_usd = prompt_tokens * term["input_usd_per_token"] + output_tokens * term["output_usd_per_token"]
        values.append(max(usage_usd + float(term["request_value_usd"]), MIN_UNIT_USD))
    return np.array(values)


Play = Callable[[Array], tuple[float, Array]]


@dataclass(frozen=True)
class Found:
    """Where an ascent ended.

    Attributes:
        usd: (3, K) multipliers.
        kept: whether all floors held in the episodes that were played.
        shares: what was reached, by the floor's key.
    """

    usd: Array
    kept: bool
    shares: dict[str, float]


def ascend(floors: Sequence[Floor], play: Play, unit_usd: Array, rounds: int = ROUNDS) -> Found:
    """Rprop on the multipliers of a policy that is played on fixed episodes.

    Args:
        floors: at least one.
        play: multipliers (3, K) -> margin and counts (len(COUNTS), K).
        unit_usd: (K,) size of a first step is a tenth of it.
        rounds: plays.

    Returns:
        The multipliers with the highest margin among those that kept all floors (of equals the smallest), or those
        that missed by least.
    """
    usd, steps = np.zeros((len(KINDS), len(unit_usd))), np.tile(0.1 * unit_usd, (len(KINDS), 1))
    before, turned = {floor: 0.0 for floor in floors}, np.zeros_like(usd, dtype=np.bool_)
    best: tuple[float, float, float] | None = None
    found = Found(usd, False, {})
    for _ in range(rounds):
        margin, counts = play(usd)
        missing = {floor: floor.missing(counts) for floor in floors}
        rank = (-max(max(missing.values()), 0.0), margin, -float(usd.sum()))
        if best is None or rank > best:
            shares = {floor.key: floor.share(counts) for floor in floors}
            best, found = rank, Found(usd.copy(), rank[0] == 0.0, shares)
        if not usd.any() and found.kept:
            break  # nothing binds
        usd = usd.copy()
        for floor, gap in missing.items():
            sign, at = (1.0 if gap > 0.0 else -1.0), floor.at
            turned[at] |= sign * before[floor] < 0.0
            if before[floor]:
                steps[at] *= (GROW if turned[at] else DOUBLE) if sign == before[floor] else SHRINK
            usd[at] = min(max(usd[at] + sign * steps[at], 0.0), HIGHEST * unit_usd[floor.class_index])
            before[floor] = sign
    return found


@dataclass(frozen=True)
class Kept:
    """A margin rule that keeps floors as well as it can.

    Attributes:
        rule: with multipliers.
        floors: what is asked for; aimed: what training aims at.
        found: where the ascent ended, against `aimed`.
        unit_usd: (K,) unit of multipliers.
    """

    rule: MarginRule
    floors: tuple[Floor, ...]
    aimed: tuple[Floor, ...]
    found: Found
    unit_usd: Array


def keep_floors(plant: Plant, rule: MarginRule, floors: Sequence[Floor]) -> Kept:
    """A margin rule with the multipliers with which it keeps the floors on training episodes."""
    worlds = FleetWorlds(plant, EPISODES)
    workloads = [plant.scenario.generate(FIRST_SEED + i, "train") for i in range(EPISODES)]
    calls = sum(np.bincount(x.class_index, minlength=len(plant.terms)) for x in workloads)
    aimed = tuple(floor.aimed(float(calls[floor.class_index])) for floor in floors)
    unit_usd = mean_value_usd(plant, workloads[0])

    def play(usd: Array) -> tuple[float, Array]:
        worlds.load_all(workloads)
        worlds.run(with_multipliers(rule, usd))
        return float(margins(worlds).mean()), worlds.counts.sum(axis=0)

    found = ascend(aimed, play, unit_usd)
    return Kept(with_multipliers(rule, found.usd), tuple(floors), aimed, found, unit_usd)


def pursued(integral_usd: Array, missing: Array, unit_usd: Array) -> tuple[Array, Array]:
    """One step of a PI controller on multipliers: the sum of what was missing, and that with the last of it."""
    most_usd = HIGHEST * unit_usd
    integral_usd = np.clip(integral_usd + RATE * unit_usd * missing, 0.0, most_usd)
    return integral_usd, np.clip(integral_usd + PROPORTION * unit_usd * missing, 0.0, most_usd)


class Ascent:
    """Multipliers that follow the episodes of a training.

    Args:
        kept: the advice and what it aims at; its multipliers are the start.
    """

    def __init__(self, kept: Kept) -> None:
        self.floors, self._unit_usd = kept.aimed, kept.unit_usd
        self.integral_usd = kept.found.usd.copy()
        self.usd = kept.found.usd.copy()

    def update(self, counts: Array) -> None:
        """One step after episodes with these counts (len(COUNTS), K)."""
        for floor in self.floors:
            at, unit_usd = floor.at, self._unit_usd[floor.class_index]
            self.integral_usd[at], self.usd[at] = pursued(self.integral_usd[at], floor.missing(counts), unit_usd)

    def metrics(self) -> dict[str, float]:
        """Multipliers in USD per 1k calls by name, for logs."""
        return {
            f"multiplier_{floor.key}_usd_per_1k": 1000.0 * float(self.integral_usd[floor.at]) for floor in self.floors
        }


def worst_miss(floors: Sequence[Floor], counts: Array) -> float:
    """By how much counts (len(COUNTS), K) miss the worst floor; 0 where all hold."""
    return max((max(floor.missing(counts), 0.0) for floor in floors), default=0.0)
