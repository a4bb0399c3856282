"""Tuning: the same budget and episodes for every baseline, and a fit of P(good) that finds what is there."""

from dataclasses import replace

import numpy as np
import pytest
from sizes import TINY

from agents import baselines, search
from agents.control_tuning import FIRST_VALIDATION_SEED, ControlObjective
from agents.objective import Objective
from agents.quality import fit_quality
from agents.rules_of_thumb import nothing_to_tune
from agents.search import Budget
from agents.search_spaces import cascades, tier_prices
from agents.train import router_scenario
from agents.tuning import FIT_WORTHS, tune_baselines, tune_margin_rules, tune_others
from envs.control_plant import ControlPlant
from envs.plant import Plant
from envs.scenario import load_scenario
from marginroute.errors import InputError
from marginroute.gateway_rules import REPLICA_RULES, TIER_RULES
from marginroute.heuristics import from_dict, to_dict
from marginroute.margin_rule import MarginParameters, MarginRule
from marginroute.quality import normal_cdf
from marginroute.rules import Cascade, DifficultyThreshold

SHIPPED = sorted(baselines.SHIPPED.glob("*.yaml"))
CONTROLLED = [path for path in SHIPPED if load_scenario(path.stem).control]

NAMES = ("random", "round-robin", "least-in-flight", "difficulty-threshold", "cascade", "expected-margin", "bid-price")


def test_every_named_baseline_is_tuned(tiny_plant, tiny_tuned):
    tuned, _ = tiny_tuned
    fixed = [f"fixed-{tier}" for tier in tiny_plant.layout.tier_names]
    shipped = {*REPLICA_RULES, *TIER_RULES, "shipped", "shipped-default"} - {"least-request"}
    assert set(tuned) == {*fixed, *NAMES, *shipped, "bid-price-fitted", "bid-price-adaptive"}
    for name, found in tuned.items():
        assert found.policy.name == name and np.isfinite(found.validation_usd_per_1k)
    assert tuned["bid-price-fitted"].policy.quality is not None and tuned["bid-price"].policy.quality is None
    assert not any(tuned["expected-margin"].policy.parameters.station_usd_per_s)
    assert any(tuned["bid-price"].policy.parameters.station_usd_per_s)


def test_an_adaptive_rule_is_the_fitted_one_with_the_best_weight(tiny_plant, tiny_tuned):
    """Everything else is the fitted rule's, the objective prefers no other weight, and nobody adapts to silence."""
    tuned, budget = tiny_tuned
    fitted, adapted = tuned["bid-price-fitted"].policy, tuned["bid-price-adaptive"].policy
    assert adapted.quality.fit_worth in FIT_WORTHS and fitted.quality.fit_worth == np.inf
    assert replace(adapted, name=fitted.name, quality=fitted.quality) == fitted
    objective = Objective(tiny_plant, "train", range(budget.episodes))
    usd = [objective([replace(adapted, quality=replace(adapted.quality, fit_worth=x))])[0] for x in FIT_WORTHS]
    assert adapted.quality.fit_worth == FIT_WORTHS[int(np.argmax(usd))]
    assert from_dict(to_dict(adapted)).quality.fit_worth == adapted.quality.fit_worth
    silent = Plant(load_scenario("quickstart", TINY | {"workload.feedback": None}))
    assert "bid-price-adaptive" not in tune_margin_rules(silent, budget)


def test_every_search_gets_the_same_budget(tiny_tuned):
    tuned, budget = tiny_tuned
    searched = ("difficulty-threshold", "expected-margin", "bid-price", "bid-price-fitted", "multi-factor")
    spent = {tuned[name].requests for name in searched}
    assert spent == {2 * budget.population * budget.episodes * 25}  # two restarts of one generation
    assert all(len(tuned[name].restarts_usd_per_1k) == 2 for name in searched)
    for name in searched:
        best, second = tuned[name].restarts_usd_per_1k
        assert best == tuned[name].validation_usd_per_1k >= second
        assert tuned[name].spread_pct == pytest.approx(100.0 * (best - second) / abs(best))


def test_a_cascade_is_tuned_where_somebody_looks(tiny_tuned):
    """Cheapest first, at most three models, a threshold for each but the last."""
    verifier = {"sensitivity": 0.9, "specificity": 0.8, "max_attempts": 3, "verify_s": 0.01}
    plant = Plant(load_scenario("quickstart", TINY | {"fleet.verifiers": {"judge": verifier}}))
    _, budget = tiny_tuned
    rule = tune_others(plant, budget)["cascade"].policy
    prices = tier_prices(plant)
    assert isinstance(rule, Cascade) and 1 <= len(rule.order) <= 3 and len(rule.thresholds) == len(rule.order) - 1
    assert (np.diff(prices[list(rule.order)]) >= 0.0).all() and all(0.0 <= x <= 1.0 for x in rule.thresholds)
    objective = Objective(plant, "train", range(budget.episodes))
    lists = cascades(plant)
    assert len(lists) == 4 + 6 + 4
    best = max(lists, key=lambda x: float(objective([x])[0]))
    assert best.order == rule.order
    pair = [Cascade("cascade", (0, 3), (x,)) for x in (0.0, 0.9)]
    together = objective(list(pair))
    np.testing.assert_array_equal(together, [objective([x])[0] for x in pair])
    assert "cascade" not in nothing_to_tune(plant)


def test_rules_without_parameters_are_there_in_old_files_too(tiny_plant):
    rules = nothing_to_tune(tiny_plant)
    assert set(rules) == {"session-affinity", "cascade"}
    assert rules["cascade"].order == (int(np.argmin(tier_prices(tiny_plant))),)


def test_tuning_is_reproducible(tiny_plant, tiny_tuned):
    tuned, budget = tiny_tuned
    again = tune_baselines(tiny_plant, budget)
    assert {name: to_dict(x.policy) for name, x in again.items()} == {
        name: to_dict(x.policy) for name, x in tuned.items()
    }


def test_rules_side_by_side_earn_what_each_earns_alone(small_plant):
    objective = Objective(small_plant, "train", range(2))
    stations = len(small_plant.layout.station_names)
    ranks = (0, 1, 2, 3)
    rules = [
        MarginRule("a", MarginParameters((0.0,) * stations, cap_share=0.05)),
        MarginRule("b", MarginParameters((0.01,) * stations, 2.0, 1.5, 0.5, 2.0, 1.0, 4.0)),
    ]
    thresholds = [DifficultyThreshold("t", ranks, (-1.0, 0.0, 1.0), shift) for shift in (0.0, 3.0)]
    for pair in (rules, thresholds):
        together = objective(list(pair))
        np.testing.assert_array_equal(together, [objective([rule])[0] for rule in pair])


def test_objective_plays_the_same_episodes_each_time(small_plant):
    rule = MarginRule("a", MarginParameters((0.0,) * len(small_plant.layout.station_names)))
    objective = Objective(small_plant, "train", range(2))
    assert objective([rule])[0] == objective([rule])[0] == Objective(small_plant, "train", range(2))([rule])[0]
    assert objective([rule])[0] != Objective(small_plant, "validation", range(2))([rule])[0]


def test_fit_recovers_what_a_task_changes():
    """Outcomes drawn from prior and truth that differ by task: the fit predicts the truth, not the prior."""
    rng = np.random.default_rng(0)
    n = 40_000
    tier, task = rng.integers(0, 2, n), rng.integers(0, 2, n)
    signal = rng.standard_normal(n)
    shift = np.array([[1.0, -1.0], [0.0, 0.5]])[tier, task]
    prior, truth = normal_cdf(0.5 - 0.5 * signal), normal_cdf(0.5 - 0.5 * signal + shift)
    good = (rng.random(n) < truth).astype(float)
    fitted = fit_quality(tier, task, prior, np.full(n, 1000.0), good, n_tiers=2, n_tasks=2)
    logit = fitted.intercept[tier, task] + fitted.slope[tier, task] * np.log(prior / (1.0 - prior))
    predicted = 1.0 / (1.0 + np.exp(-logit))
    assert np.abs(predicted - truth).mean() < 0.02 < 0.1 < np.abs(prior - truth).mean()
    assert fitted.length == pytest.approx(0.0, abs=1e-6)


def test_no_outcomes_no_correction():
    none = np.array([], dtype=np.int64)
    fitted = fit_quality(none, none, none.astype(float), none.astype(float), none.astype(float), 2, 3)
    assert not fitted.intercept.any() and (fitted.slope == 1.0).all() and not fitted.length.any()


def test_tuned_baselines_survive_their_file(tmp_path, tiny_plant, tiny_tuned):
    tuned, budget = tiny_tuned
    path = tmp_path / "baselines.yaml"
    baselines.save(path, tiny_plant.scenario, tuned, budget, "a test")
    data, rules = baselines.load(path)
    assert data["scenario_hash"] == tiny_plant.scenario.hash and data["budget"]["population"] == budget.population
    assert {name: to_dict(rule) for name, rule in rules.items()} == {
        name: to_dict(found.policy) for name, found in tuned.items()
    }


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("schema: 2\nbaselines: {}", "no tuned baselines of schema 1"),
        ("schema: 1\nbaselines: {a: {}}", "incomplete"),
        ("schema: 1\nbaselines: {a: {policy: {rule: clever}}}", "unknown heuristic rule 'clever'"),
        ("schema: 1\nbaselines: {a: {policy: {rule: margin, name: a}}}", "missing or unknown parameter"),
        ("schema: 1\nbaselines: {a: {policy: {rule: random, name: a, sides: 6}}}", "missing or unknown parameter"),
        ("schema: 1\nbaselines: {a: {policy: [1, 2]}}", "is no mapping"),
        ("[", "well-formed YAML"),
    ],
)
def test_a_broken_file_is_refused(tmp_path, text, words):
    path = tmp_path / "baselines.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=words):
        baselines.load(path)


def test_prices_of_another_fleet_are_refused(tmp_path, small_scenario, tiny_plant, tiny_tuned):
    rule = MarginRule("bid-price", MarginParameters((0.0, 0.0)))
    data = {"schema": 1, "scenario_hash": small_scenario.hash}
    data["baselines"] = {"bid-price": {"policy": to_dict(rule)}}
    import yaml

    (tmp_path / baselines.FILE).write_text(yaml.safe_dump(data))
    with pytest.raises(InputError, match="has prices for 2 pools and providers"):
        baselines.baselines_for(small_scenario, tmp_path)


def test_heuristics_survive_plain_data(tiny_tuned):
    for found in tiny_tuned[0].values():
        assert to_dict(from_dict(to_dict(found.policy))) == to_dict(found.policy)


def test_later_restarts_go_on_from_the_best_and_validation_picks(monkeypatch):
    """Each restart finds a rule that training episodes rank first and one that earns more on validation."""
    usd_of = {"a": 1.0, "b": 3.0, "c": 2.0, "d": 5.0, "e": 4.0, "f": 6.0, "g": 0.0, "h": 8.0}
    finalists, starts = iter(("ab", "cd", "ef", "gh")), []

    def found(suggest, plant, objective, budget, seed, start):
        starts.append(start)
        return [search.Finalist(9.0 - i, rule, {"x": rule}) for i, rule in enumerate(next(finalists))], 7

    monkeypatch.setattr(search, "_search", found)
    tuned = search.search_restarts(
        None, None, None, lambda rules: np.array([usd_of[rule] for rule in rules]), Budget(restarts=4), lambda: None
    )
    assert starts == [None, None, {"x": "d"}, {"x": "f"}]
    assert (tuned.policy, tuned.restarts_usd_per_1k, tuned.requests) == ("h", [8.0, 6.0, 5.0, 3.0], 28)
    assert tuned.spread_pct == pytest.approx(25.0)


def test_budget_defaults_restart_at_least_twice():
    assert Budget().restarts >= 2


@pytest.mark.parametrize(("requests", "episodes"), [(1, 4), (12 * 16 * 9 * 100, 9), (10**9, 16)])
def test_a_budget_leaves_room_for_generations(small_scenario, requests, episodes):
    """Twelve generations of sixteen rules on as many episodes of 100 requests as fit, from 4 to 16."""
    assert small_scenario.generate(0, "train").n_requests == 100
    assert Budget.of(requests, small_scenario) == Budget(requests=requests, episodes=episodes)


def test_baselines_whose_restarts_differ_are_told(tiny_tuned, tiny_plant, tmp_path, capsys):
    tuned, budget = tiny_tuned
    loose = {
        name: replace(found, spread_pct=pct) for (name, found), pct in zip(tuned.items(), (0.4, 0.6), strict=False)
    }
    baselines.save(tmp_path / "b.yaml", tiny_plant.scenario, loose, budget, "a test")
    baselines.tell_loose(baselines.load(tmp_path / "b.yaml")[0])
    within, beyond = loose
    said = capsys.readouterr().err
    assert f"{beyond} (0.6 %)" in said and f"{within} (" not in said


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_baselines_earn_what_their_file_says(path):
    """In the scenario and the world of today, on the validation episodes that chose them."""
    scenario = load_scenario(path.stem)
    document, rules = baselines.load(path)
    assert document["scenario_hash"] == scenario.hash
    plant, episodes = Plant(router_scenario(scenario)), document["budget"]["validation_episodes"]
    validation = Objective(plant, "validation", range(episodes))
    said = document["baselines"]["bid-price-fitted"]["validation_usd_per_1k"]
    assert float(validation([rules["bid-price-fitted"]])[0]) == pytest.approx(said, abs=2e-6)


@pytest.mark.slow  # two minutes of days
@pytest.mark.parametrize("path", CONTROLLED, ids=lambda path: path.stem)
def test_shipped_controllers_earn_what_their_file_says(path):
    scenario = load_scenario(path.stem)
    document = baselines.load(path)[0]
    control = ControlPlant(scenario)
    controllers, best = baselines.load_controllers(path, control.layout)
    said = document["controllers"]["rules"][best]["validation_usd_per_1k"]
    episodes = document["controllers"]["budget"]["validation_episodes"]
    days = ControlObjective(control, "validation", range(FIRST_VALIDATION_SEED, FIRST_VALIDATION_SEED + episodes))
    assert float(days([controllers[best]])[0]) == pytest.approx(said, abs=2e-6)
