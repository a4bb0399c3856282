"""The search that tunes rules: CMA-ES in populations, restarted until two restarts agree, within a stated budget.

Parameter sets of a population play side by side as worlds of one kernel call. The best of each restart are compared on
validation episodes, and the spread between restarts is published: a rule whose restarts disagree is not tuned.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import optuna

from agents.objective import Objective, Rule
from envs.plant import Plant
from envs.scenario import Scenario

AGREEMENT = 0.005  # restarts agree when their validation margins differ by less than this share
GENERATIONS, LEAST_EPISODES = 12, 4  # what CMA-ES needs of the first to get anywhere, and what tells rules apart
ANYWHERE = 2  # restarts that start anywhere
USUAL_RESTARTS = ANYWHERE + 1
FINALISTS = 8  # trials of a restart that are compared on validation
SMALL_STEP = 0.06  # of a search that goes on from something good, as a share of each parameter's range


@dataclass(frozen=True)
class Budget:
    """What one baseline may spend.

    Attributes:
        requests: simulated requests for one restart of one baseline.
        episodes: training episodes of the objective.
        population: parameter sets of a generation.
        restarts: most restarts; three are made where there is anything to search, if so many are allowed.
        validation_episodes: on which restarts are compared.
    """

    requests: int = 2_000_000
    episodes: int = 16
    population: int = 16
    restarts: int = 4
    validation_episodes: int = 32

    @classmethod
    def of(cls, requests: int, scenario: Scenario) -> Budget:
        """The budget of `requests` whose objective leaves room for `GENERATIONS`, if few episodes allow it."""
        asked = requests / (GENERATIONS * cls.population * max(scenario.generate(0, "train").n_requests, 1))
        return cls(requests=requests, episodes=min(max(int(asked), LEAST_EPISODES), cls.episodes))


@dataclass
class Tuned:
    """A tuned baseline with the evidence for its tuning.

    Attributes:
        policy: the heuristic with its parameters.
        validation_usd_per_1k: its margin on validation episodes.
        spread_pct: difference of the two best restarts, per cent of the margin; 0 without parameters.
        requests: simulated requests spent.
    """

    policy: Rule
    validation_usd_per_1k: float
    spread_pct: float = 0.0
    requests: int = 0
    restarts_usd_per_1k: list[float] = field(default_factory=list)


Suggest = Callable[[optuna.Trial, Plant], Rule]


@dataclass(frozen=True)
class Finalist:
    """A rule that a search has played.

    Attributes:
        usd: its margin per 1k requests.
        rule: as it was played.
        parameters: what the search chose, by name.
    """

    usd: float
    rule: Rule
    parameters: dict[str, float]


def _search(
    suggest: Suggest, plant: Plant, objective: Objective, budget: Budget, seed: int, start: dict[str, float] | None
) -> tuple[list[Finalist], int]:
    """One CMA-ES run, in small steps where it has a start; the `FINALISTS` best rules, and requests spent."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # x0 and sigma0 end with Optuna 6, which is not allowed
        sampler = optuna.samplers.CmaEsSampler(
            seed=seed, popsize=budget.population, x0=start, sigma0=SMALL_STEP if start else None
        )
    study = optuna.create_study(direction="maximize", sampler=sampler)
    best: list[Finalist] = []
    spent = 0
    while not best or spent < budget.requests:
        trials = [study.ask() for _ in range(budget.population)]
        rules = [suggest(trial, plant) for trial in trials]
        for trial, rule, usd in zip(trials, rules, objective(rules), strict=True):
            study.tell(trial, float(usd))
            best.append(Finalist(float(usd), rule, trial.params))
        best = sorted(best, key=lambda trial: -trial.usd)[:FINALISTS]
        spent += objective.requests * budget.population
    return best, spent


def search_restarts(
    suggest: Suggest,
    plant: Plant,
    objective: Objective,
    validation: Objective,
    budget: Budget,
    report: Callable[[], None],
) -> Tuned:
    """Restarts until the two best agree on validation, or the restarts are spent.

    Two start anywhere; those after them, of which there is one at least, start at the best that was found so far. What
    a few episodes rank first owes something to their luck: of a restart's finalists the one that earns most on
    validation counts.
    """
    found: list[Finalist] = []
    spent = 0
    for restart in range(max(budget.restarts, ANYWHERE)):
        start = found[0].parameters if restart >= ANYWHERE else None
        finalists, requests = _search(suggest, plant, objective, budget, restart, start)
        spent += requests
        earned = validation([trial.rule for trial in finalists])
        winner = int(earned.argmax())
        found.append(replace(finalists[winner], usd=float(earned[winner])))
        found.sort(key=lambda trial: -trial.usd)
        report()
        if restart >= ANYWHERE and found[0].usd - found[1].usd <= AGREEMENT * abs(found[0].usd):
            break
    best_usd = found[0].usd
    spread = 100.0 * (best_usd - found[1].usd) / max(abs(best_usd), 1e-9)
    return Tuned(found[0].rule, best_usd, spread, spent, [trial.usd for trial in found])


def best_of(rules: list[Rule], objective: Objective, validation: Objective) -> Tuned:
    """Tries each of a few variants on the objective."""
    scores = [float(objective([rule])[0]) for rule in rules]
    best = rules[int(np.argmax(scores))]
    return Tuned(best, float(validation([best])[0]), 0.0, objective.requests * len(rules))
