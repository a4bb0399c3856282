"""How far a correction is followed, under which stresses that is asked, and what a policy does before it is told."""

from dataclasses import replace

import numpy as np
import pytest
from scorers import random_scorer

from agents import strength
from agents.export import residual_policy
from agents.strength import STRENGTHS, best_strength, scaled
from envs.scenario import load_scenario
from envs.scenario_family import stressed
from envs.vector_env import default_advice
from envs.worlds import FleetWorlds
from evaluation.suite import scenario_names
from marginroute import view as v


@pytest.fixture(scope="module")
def policy(small_plant, tiny_config):
    """A network that knows nothing and says much."""
    advice = default_advice(small_plant)
    learned, spec = random_scorer(small_plant, tiny_config, advice, seed=3)
    return residual_policy(learned, advice, spec)


@pytest.mark.parametrize("name", scenario_names())
def test_every_scenario_can_be_stressed(name):
    """Each stress is a legal scenario, differs from the scenario, and is none of those that are held out."""
    scenario = load_scenario(name)
    conditions = [scenario.under(condition).hash for condition in scenario.conditions]
    stresses = stressed(scenario)
    assert len({world.hash for world in stresses.values()}) == len(stresses) >= 3
    assert not {scenario.hash, *conditions} & {world.hash for world in stresses.values()}
    assert stresses["40 % more load"].load_scale == pytest.approx(1.4 * scenario.load_scale)


def test_stresses_of_a_fleet_with_everything():
    scenario = load_scenario("quickstart")
    stresses = stressed(scenario)
    assert stresses["four gateways"].fleet.gateways == 4
    (outage,) = stresses["a replica of large out"].fleet.faults
    assert (outage.starts_at_s, outage.duration_s) == (48.0, 96.0)
    assert scenario.drift and not stresses["no drift"].drift
    (drift,) = stresses["api dear and slow, no other drift"].drift.values()
    assert (drift.provider, drift.price_times, drift.latency_times) == ("api", [1.5], [2.0])


def test_the_surest_gain_is_chosen(policy, small_scenario, monkeypatch):
    """At full strength the mean gain is largest and doubtful; at a half it is sure; below, sure and smaller."""
    rng = np.random.default_rng(0)

    def gains(scenario, policy, episodes):
        noise = rng.normal(0.0, 1.0, episodes)
        return np.stack([mean + spread * noise for mean, spread in zip(*rows, strict=True)])

    rows = (0.30, 0.28, 0.25, 0.15, 0.1), (2.0, 1.5, 0.05, 0.05, 0.05)
    monkeypatch.setattr(strength, "_gains", gains)
    found, by_world = best_strength(small_scenario, policy, 40)
    assert found == 0.5
    assert set(by_world) == {"as it is", *stressed(small_scenario)}
    assert by_world["as it is"][2] == pytest.approx(0.25, abs=0.05)


@pytest.mark.parametrize(("harmless", "chosen"), [((0.35, 0.25), 0.35), ((), 0.25)])
def test_a_stress_can_speak_against_a_strength(policy, small_scenario, monkeypatch, harmless, chosen):
    """The stronger the surer, but under one stress only the harmless strengths do not lose."""
    named = stressed(small_scenario)

    def gains(scenario, policy, episodes):
        harmful = scenario.hash == named["four gateways"].hash
        means = [x if x in harmless or not harmful else -x for x in STRENGTHS]
        return np.array(means)[:, None] + np.linspace(-0.01, 0.01, episodes)

    monkeypatch.setattr(strength, "_gains", gains)
    assert best_strength(small_scenario, policy, 16)[0] == chosen


def test_bad_luck_under_a_stress_is_no_harm(policy, small_scenario, monkeypatch):
    """A mean below zero by less than its error says nothing against a strength."""
    named = stressed(small_scenario)

    def gains(scenario, policy, episodes):
        unlucky = scenario.hash == named["four gateways"].hash
        noise = np.where(np.arange(episodes) % 2, 0.3, -0.3)
        return np.array([-0.05 if unlucky else x for x in STRENGTHS])[:, None] + noise

    monkeypatch.setattr(strength, "_gains", gains)
    assert best_strength(small_scenario, policy, 64)[0] == 1.0


def test_what_harms_is_followed_least(policy, small_scenario):
    loud = replace(policy, network=replace(policy.network, head=100.0 * policy.network.head))
    found, by_world = best_strength(small_scenario, loud, 4)
    assert max(by_world["as it is"]) < 0.0
    assert found == STRENGTHS[-1]


def test_strength_scales_the_correction(policy, small_plant):
    worlds = FleetWorlds(small_plant, 2)
    worlds.load_all([small_plant.scenario.generate(seed, "validation") for seed in range(2)])
    inputs = policy.inputs(worlds.view())
    advice = policy.network.kappa * inputs.advice
    whole = policy.logits(inputs) - advice
    assert abs(whole).max() > 1.0
    np.testing.assert_allclose(scaled(policy, 0.25).logits(inputs) - advice, 0.25 * whole, rtol=1e-4, atol=1e-4)


def test_before_it_is_told_anything_it_is_the_advice(policy, small_plant):
    """And afterwards it is not: trust comes with judged answers."""
    network = replace(policy.network, kappa=np.ones(1, "f4"), trust=np.array([0.0, 1.0], "f4"))
    policy = replace(policy, network=network)
    worlds = FleetWorlds(small_plant, 4)
    worlds.load_all([small_plant.scenario.generate(seed, "validation") for seed in range(4)])
    same = {False: [], True: []}
    while not worlds.done.any():
        view = worlds.view()
        ours, theirs = policy.decide_batch(view), policy.advice.decide_batch(view)
        told = (view.signals[v.TIER_CONFIDENCE] > 0.0).any(axis=-1)
        for known, equal in zip(told.tolist(), (ours == theirs).tolist(), strict=True):
            same[known].append(equal)
        worlds.step(theirs)
    assert len(same[False]) > 20 and all(same[False])
    assert len(same[True]) > 20 and not all(same[True])
