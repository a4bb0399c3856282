"""One formula, any batch shape: one decision at a gateway is bit by bit what training computed for many."""

import dataclasses

import numpy as np
import pytest

from envs.rule_kernel import default_advice
from envs.worlds import FleetWorlds
from marginroute import features, latency
from marginroute.margin_rule import DEFER_COLUMN, MarginParameters, MarginRule
from marginroute.quality import FittedQuality
from marginroute.rules import DifficultyThreshold, FixedTier, LeastInFlight, Random, RoundRobin, ShuffledMix
from marginroute.view import View

WORLDS = 5


@pytest.fixture(scope="module")
def batches(small_plant):
    """Views of five worlds along episodes played at random."""
    worlds = FleetWorlds(small_plant, WORLDS)
    worlds.load_all([small_plant.scenario.generate(seed, "train") for seed in range(WORLDS)])
    rng, found = np.random.default_rng(0), []
    while not worlds.done.any():
        found.append(worlds.view().copy())
        worlds.step(np.where(worlds.legal, rng.random(worlds.legal.shape), -1.0).argmax(axis=1))
    defer = np.array([view.legal[:, DEFER_COLUMN] for view in found])
    assert (defer.any(axis=1) & ~defer.all(axis=1)).any()  # some worlds may defer where others may not
    return found


@pytest.fixture(scope="module")
def fitted_rule(small_plant):
    tiers, tasks = len(small_plant.layout.tier_names), len(small_plant.layout.task_names)
    rng = np.random.default_rng(3)
    intercept, slope = rng.normal(0.0, 1.0, (tiers, tasks)), rng.uniform(0.5, 1.5, (tiers, tasks))
    quality = FittedQuality(intercept, slope, rng.normal(0.0, 1.0, tiers))
    stations = len(small_plant.layout.station_names)
    return MarginRule("bid-price-fitted", MarginParameters((0.004,) * stations, 1.7, 1.3, 0.9, 2.5, 0.95, 0.1), quality)


def rules(plant, fitted_rule):
    ranks = tuple(range(len(plant.layout.tier_names)))
    return [
        default_advice(plant),
        fitted_rule,
        FixedTier("fixed", 1),
        Random("random", use_providers=True, seed=4),
        RoundRobin("round-robin", use_providers=True),
        LeastInFlight("least-in-flight"),
        DifficultyThreshold("difficulty-threshold", ranks, tuple(x - 1.0 for x in ranks[1:]), 0.5),
        ShuffledMix("shuffled-mix", tuple(1.0 for _ in ranks), seed=2),
    ]


def same(one, many, axis):
    """World by world, the result for one View is the row of the result for all."""
    for w, alone in enumerate(one):
        np.testing.assert_array_equal(alone, np.take(many, w, axis=axis))


def test_latency_estimates(batches):
    for view in batches[::5]:
        latency_s, work_s = latency.estimate(view)
        single = [latency.estimate(view[w]) for w in range(WORLDS)]
        same([x[0] for x in single], latency_s, axis=1)
        same([x[1] for x in single], work_s, axis=0)


@pytest.mark.parametrize("which", [0, 1], ids=["expected-margin", "bid-price-fitted"])
def test_assessments(batches, small_plant, fitted_rule, which):
    rule = rules(small_plant, fitted_rule)[which]
    for view in batches:
        many = rule.assess(view)
        single = [rule.assess(view[w]) for w in range(WORLDS)]
        for field in dataclasses.fields(many):
            axis = 1 if field.name in ("latency_s", "parts_usd") else 0
            if getattr(many, field.name) is None:
                assert all(getattr(x, field.name) is None for x in single)
                continue
            same([getattr(x, field.name) for x in single], getattr(many, field.name), axis)


def test_features_and_observations(batches, small_plant, fitted_rule):
    spec = features.feature_spec(small_plant.layout)
    for view in batches[::3]:
        many = fitted_rule.assess(view)
        single = [fitted_rule.assess(view[w]) for w in range(WORLDS)]
        for columns in (features.candidate_features, features.context_features):
            same([columns(view[w], x) for w, x in enumerate(single)], columns(view, many), 0)
        same([features.advice_logits(x, 0.03) for x in single], features.advice_logits(many, 0.03), 0)
        same([features.observe(view[w], x, spec) for w, x in enumerate(single)], features.observe(view, many, spec), 0)


def test_a_batch_of_any_size_gives_the_same_rows(batches, fitted_rule, small_plant):
    """The order and the company of a world in its batch do not matter."""
    spec = features.feature_spec(small_plant.layout)
    view = batches[40]
    for chosen in ([3], [4, 0], [2, 1, 3, 0, 4, 2, 2]):
        part = View(view.layout, view.signals[:, chosen], view.request[:, chosen], view.legal[chosen])
        whole = features.observe(view, fitted_rule.assess(view), spec)
        np.testing.assert_array_equal(features.observe(part, fitted_rule.assess(part), spec), whole[chosen])


@pytest.mark.parametrize("which", range(8))
def test_heuristics_decide_one_as_they_decide_many(batches, small_plant, fitted_rule, which):
    rule = rules(small_plant, fitted_rule)[which]
    chosen = set()
    for view in batches:
        many = rule.decide_batch(view)
        assert many.shape == (WORLDS,)
        for w in range(WORLDS):
            decision = rule.decide(view[w])
            assert decision.candidate == many[w] == rule.decide_batch(view[w])
            assert view.legal[w, decision.candidate]
            assert decision.name == view.layout.names[decision.candidate]
            chosen.add(decision.kind)
    assert len(chosen) > 1


def test_reasons_add_up(batches, small_plant, fitted_rule):
    """Cash parts of a decision's reason are its margin; margin and congestion are its score."""
    for view in batches[::2]:
        for w in range(WORLDS):
            assessment = fitted_rule.assess(view[w])
            decision = fitted_rule.decide(view[w])
            parts = dict(decision.reason_usd)
            margin, congestion = parts.pop("margin"), parts.pop("congestion")
            assert sum(parts.values()) == pytest.approx(margin, rel=1e-9, abs=1e-12)
            assert margin + congestion == pytest.approx(assessment.score_usd[decision.candidate], rel=1e-9, abs=1e-12)
            if decision.runner_up:
                other = view.layout.names.index(decision.runner_up)
                gap = assessment.score_usd[decision.candidate] - assessment.score_usd[other]
                assert decision.runner_up_usd == pytest.approx(gap, abs=1e-12) and gap >= 0.0
