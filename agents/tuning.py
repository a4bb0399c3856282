"""Tunes the baselines of a scenario: the same search, on the same workloads, with the same stated budget for each.

The objective is the mean margin over a fixed set of training episodes (common random numbers). Numeric parameters are
searched by Optuna's CMA-ES in populations that play side by side as worlds of one kernel call, restarted until two
restarts agree (or the budget ends); the best of each restart are compared on validation episodes, and the spread
between restarts is published: a baseline whose restarts disagree is not tuned. The budget counts simulated requests.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

import numpy as np
import optuna

from agents.objective import Exploring, Objective, Rule
from agents.quality import fit_quality, fit_reuse
from agents.workers import Crew
from envs.plant import Plant
from envs.progress import Progress, silent
from envs.scenario import Scenario
from envs.worlds import FleetWorlds
from marginroute import heuristics, quality
from marginroute import view as v
from marginroute.errors import InputError
from marginroute.heuristics import Cascade, DifficultyThreshold, MarginParameters, MarginRule, RuleOfThumb
from marginroute.view import Array

AS_IT_COMES = "shipped-default"  # the one baseline whose parameters stay what gateways ship
AGREEMENT = 0.005  # restarts agree when their validation margins differ by less than this share
CHECKED_EPISODES = 16
GENERATIONS, LEAST_EPISODES = 12, 4  # what CMA-ES needs of the first to get anywhere, and what tells rules apart
ANYWHERE = 2  # restarts that start anywhere
USUAL_RESTARTS = ANYWHERE + 1
FINALISTS = 8  # trials of a restart that are compared on validation
SMALL_STEP = 0.06  # of a search that goes on from something good, as a share of each parameter's range
SIMILARITIES = (0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.925, 0.95, 0.975, 0.99, 1.0)
FIT_WORTHS = (5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, math.inf)  # judged answers
REUSED_SHARE = 0.5  # of the stored answers found that are given while outcomes are logged
CASCADE_TIERS = 3  # models in a cascade at most, as in FrugalGPT
EXPLORED_SHARE = 0.2  # of decisions made at random while outcomes are logged for the fit of P(good)


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


def _margin_rule(
    name: str, trial: optuna.Trial, plant: Plant, priced: bool, fitted: quality.FittedQuality | None
) -> Rule:
    scarce = [True] * len(plant.spec.pools) + [provider.rate_limit.limited for provider in plant.spec.providers]
    prices = [
        10.0 ** trial.suggest_float(f"log10_price_{station}", -5.0, 0.0) if priced and is_scarce else 0.0
        for station, is_scarce in zip(plant.layout.station_names, scarce, strict=True)
    ]
    parameters = MarginParameters(
        station_usd_per_s=tuple(prices),
        fill_power=trial.suggest_float("fill_power", 0.0, 4.0) if priced else 1.0,
        ttft_scale=2.0 ** trial.suggest_float("log2_ttft_scale", -2.0, 3.0),
        tpot_scale=2.0 ** trial.suggest_float("log2_tpot_scale", -1.0, 2.0),
        sharpness=2.0 ** trial.suggest_float("log2_sharpness", 0.0, 4.0),
        defer_share=trial.suggest_float("defer_share", 0.5, 1.1),
        cap_share=2.0 ** trial.suggest_float("log2_cap_share", -4.0, 2.0),
        cache_similarity=(
            trial.suggest_float("cache_similarity", 0.4, 1.0) if is_semantic(plant) and fitted is None else 0.0
        ),
    )
    return MarginRule(name, parameters, fitted)


def is_semantic(plant: Plant) -> bool:
    """Whether the response cache finds prompts that only mean the same."""
    return bool(plant.config[0]["cache_semantic"])


def with_threshold(tuned: Tuned, objective: Objective, validation: Objective) -> Tuned:
    """A rule of thumb with the similarity from which it gives stored answers tuned, too."""
    rules = [replace(tuned.policy, cache_similarity=float(x)) for x in SIMILARITIES]
    best = rules[int(np.argmax([float(objective([rule])[0]) for rule in rules]))]
    spent = tuned.requests + len(rules) * objective.requests
    return replace(tuned, policy=best, validation_usd_per_1k=float(validation([best])[0]), requests=spent)


def tier_ranks(plant: Plant) -> tuple[int, ...]:
    """(T,) rank of each tier by its prior P(good) on an average request, 0 for the weakest."""
    workload = plant.scenario.generate(0, "train")
    return tuple(int(rank) for rank in workload.p_good_prior.mean(axis=0).argsort().argsort())


def _difficulty_threshold(trial: optuna.Trial, plant: Plant) -> Rule:
    ranks = tier_ranks(plant)
    cutoffs = sorted(trial.suggest_float(f"cutoff_{i}", -3.0, 3.0) for i in range(len(ranks) - 1))
    shift = trial.suggest_float("load_shift", 0.0, 4.0)
    return DifficultyThreshold("difficulty-threshold", ranks, tuple(cutoffs), shift)


def tier_prices(plant: Plant) -> Array:
    """(T,) USD that an average answer of each tier costs the operator at its cheapest candidate."""
    layout, static = plant.layout, plant.static_signals
    workload = plant.scenario.generate(0, "train")
    prompt_tokens, output_tokens = workload.prompt_tokens.mean(), plant.output_tokens.mean()
    usd = static[v.CALL_USD] + prompt_tokens * static[v.INPUT_USD] + output_tokens * static[v.OUTPUT_USD]
    tiers = range(len(layout.tier_names))
    return np.array([usd[layout.tier == t].min() if (layout.tier == t).any() else np.inf for t in tiers])


def cascades(plant: Plant) -> list[Cascade]:
    """FrugalGPT's lists: every choice of up to `CASCADE_TIERS` models, cheapest first; thresholds in the middle."""
    prices = tier_prices(plant)
    cheapest_first = [int(t) for t in np.argsort(prices, kind="stable") if np.isfinite(prices[t])]
    lists = [x for m in range(1, CASCADE_TIERS + 1) for x in itertools.combinations(cheapest_first, m)]
    return [Cascade("cascade", order, (0.5,) * (len(order) - 1)) for order in lists]


def has_verifiers(plant: Plant) -> bool:
    """Whether anybody looks at answers: without, a cascade ends with its first model."""
    return bool(plant.verifiers["max_attempts"].any())


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


def _best_of(rules: list[Rule], objective: Objective, validation: Objective) -> Tuned:
    """Tries each of a few variants on the objective."""
    scores = [float(objective([rule])[0]) for rule in rules]
    best = rules[int(np.argmax(scores))]
    return Tuned(best, float(validation([best])[0]), 0.0, objective.requests * len(rules))


def log_outcomes(plant: Plant, rule: Rule, seeds: Iterable[int]) -> dict[str, Array]:
    """Plays training episodes with some exploration and returns resolved outcomes as `fit_quality` takes them."""
    worlds = FleetWorlds(plant, len(list(seeds)))
    worlds.load_all([plant.scenario.generate(seed, "train") for seed in seeds])
    worlds.run(Exploring(rule, EXPLORED_SHARE, seed=0))
    request, load = worlds.fleet.requests, worlds.loads
    w, i = np.nonzero((request["status"] == 2) & (np.arange(load.shape[1]) < worlds.desks["n_requests"][:, None]))
    tier = plant.layout.tier[load["answered_by"][w, i]]
    trials = worlds.books.arrays.trials
    if trials.shape[1]:  # of what was asked again, the first answer counts: later ones have a history
        tier = np.where(load["turned_down"][w, i] > 0, trials["first_tier"][w, i], tier)
    return {
        "tier": tier,
        "task": load["task_index"][w, i].astype(np.int64),
        "prior": worlds.prior[w, i, tier],
        "prompt_tokens": load["prompt_tokens"][w, i].astype(np.float64),
        "good": worlds.good[w, i, tier].astype(np.float64),
    }


def log_reuse(plant: Plant, rule: Rule, seeds: Iterable[int]) -> dict[str, Array]:
    """Plays training episodes, gives half of what the cache finds, and returns the outcomes as `fit_reuse` takes them.

    A gateway learns them from feedback, or from a sample that is answered anew and compared.
    """
    worlds = FleetWorlds(plant, len(list(seeds)))
    worlds.load_all([plant.scenario.generate(seed, "train") for seed in seeds])
    worlds.follow(rule)
    rng, c = np.random.default_rng(0), plant.layout.names.index("cache")
    rows: list[Array] = []
    while not worlds.done.all():
        view = worlds.view()
        give = view.legal[:, c] & ~worlds.done & (rng.random(worlds.n_worlds) < REUSED_SHARE)
        seen = view.signals[[v.P_GOOD_PRIOR, v.SIMILARITY, v.ENTRY_AGE_S], :, c]
        rows.append(np.stack([view.request[v.TASK_INDEX], *seen, worlds.p_true[:, c]])[:, give])
        worlds.step(np.where(give, c, rule.decide_batch(view)))
    task, prior, similarity, age_s, good = np.concatenate(rows, axis=1)
    return {"task": task.astype(np.int64), "prior": prior, "similarity": similarity, "age_s": age_s, "good": good}


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
        return self.search(lambda trial, plant: _margin_rule(name, trial, plant, priced, fitted))


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


def adaptive(fitted: Tuned, objective: Objective, validation: Objective) -> Tuned:
    """A rule with fitted P(good) that moves with judged answers, by the best of `FIT_WORTHS`."""
    rule = replace(fitted.policy, name="bid-price-adaptive")
    assert isinstance(rule, MarginRule) and rule.quality is not None
    rules: list[Rule] = [replace(rule, quality=replace(rule.quality, fit_worth=worth)) for worth in FIT_WORTHS]
    best = _best_of(rules, objective, validation)
    spent, restarts = fitted.requests + best.requests, fitted.restarts_usd_per_1k
    return replace(best, spread_pct=fitted.spread_pct, requests=spent, restarts_usd_per_1k=restarts)


def tune_others(
    plant: Plant, budget: Budget, progress: Progress = silent, crew: Crew | None = None
) -> dict[str, Tuned]:
    """Tunes every other baseline; arguments as `tune_margin_rules`."""
    from agents import tuning_shipped

    several = [name for name, ranges in tuning_shipped.RANGES.items() if len(ranges) > 1]
    tuner = _Tuner(plant, budget, progress, USUAL_RESTARTS * (2 + len(several)), crew)
    objective, validation = tuner.objective, tuner.validation
    tuned: dict[str, Tuned] = {}
    for t, tier in enumerate(plant.layout.tier_names):
        rule: Rule = heuristics.FixedTier(f"fixed-{tier}", t)
        tuned[rule.name] = Tuned(rule, float(validation([rule])[0]))
    both = (False, True) if plant.spec.providers else (False,)
    for name, cls in (
        ("random", heuristics.Random),
        ("round-robin", heuristics.RoundRobin),
        ("least-in-flight", heuristics.LeastInFlight),
    ):
        tuned[name] = _best_of([cls(name, use_providers=flag) for flag in both], objective, validation)
    tuned["difficulty-threshold"] = tuner.search(_difficulty_threshold)
    threshold = tuned["difficulty-threshold"].policy
    assert isinstance(threshold, DifficultyThreshold)
    tuned |= tuning_shipped.tune_shipped(objective, validation, tuner.search, threshold)
    tuned["cascade"] = (
        _tune_cascade(tuner) if has_verifiers(plant) else _best_of([cascades(plant)[0]], objective, validation)
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
