"""Margin rules in the compiled loop: every decision that the numpy rule makes, to the last cent of the ledger."""

from dataclasses import replace

import numpy as np
import pytest

from agents.objective import stack
from envs import rule_kernel
from envs import worlds as worlds_module
from envs.control_plant import ControlPlant
from envs.control_worlds import EngineControl
from envs.plant import Plant
from envs.scenario import load_scenario
from envs.worlds import FleetWorlds
from marginroute.control_rules import standard_rules
from marginroute.margin_rule import MarginParameters, MarginRule
from marginroute.quality import FittedQuality

EPISODES = {  # what a rule may meet: feedback, sessions, quotas, caches, deferral, failures, gateways, verifiers
    "everything": {"horizon_s": 60.0},
    "seats_quota": {"horizon_s": 60.0},
    "semantic_cache": {"horizon_s": 60.0, "fleet.gateways": 3},
    "long_context": {"horizon_s": 60.0},
}
DAY = {"horizon_s": 7200.0, "workload.season.start_h": 18.0}


def rule(plant, seed, floors=False):
    rng = np.random.default_rng(seed)
    layout = plant.layout
    tiers, tasks, k = len(layout.tier_names), len(layout.task_names), len(layout.class_names)
    prices = tuple(rng.uniform(0.0, 0.003, len(layout.station_names)))
    more = [tuple(rng.uniform(0.0, 0.002, k)) for _ in range(3)] if floors else []
    fitted = FittedQuality(
        rng.normal(0.0, 0.3, (tiers, tasks)), rng.uniform(0.7, 1.3, (tiers, tasks)), np.zeros(tiers), fit_worth=20.0
    )
    return MarginRule(f"rule {seed}", MarginParameters(prices, 1.3, 1.1, 0.9, 4.0, 0.9, 1.5, 0.9, *more), fitted)


def by_numpy(worlds, policy, decisions=None):
    """What `FleetWorlds.run` does with any other policy."""
    worlds.follow(policy)
    while not worlds.done.all() and decisions != 0:
        worlds.step(policy.decide_batch(worlds.view()))
        decisions = None if decisions is None else decisions - 1
    return worlds


def loaded(plant, n=3):
    worlds = FleetWorlds(plant, n)
    worlds.load_all([plant.scenario.generate(seed, "train") for seed in range(n)])
    return worlds


def assert_same(one, other):
    assert one.action_counts.sum() > 0
    np.testing.assert_array_equal(one.action_counts, other.action_counts)
    np.testing.assert_array_equal(one.counts, other.counts)
    np.testing.assert_array_equal(one.ledger_usd, other.ledger_usd)


@pytest.mark.parametrize("name", EPISODES)
def test_whole_episodes_are_the_same(name, monkeypatch):
    monkeypatch.setattr(worlds_module, "AT_ONCE", 1000)
    plant = Plant(load_scenario(name, EPISODES[name]))
    for policy in (rule(plant, 1), rule(plant, 2, floors=True)):
        worlds = loaded(plant)
        worlds.run(policy)
        assert worlds.done.all()
        assert_same(worlds, by_numpy(loaded(plant), policy))


def test_parameters_of_every_world_are_its_own():
    plant = Plant(load_scenario("everything", EPISODES["everything"]))
    rules = [replace(rule(plant, 1), parameters=rule(plant, seed, floors=True).parameters) for seed in (1, 2, 3)]
    stacked, alone = loaded(plant), []
    stacked.run(stack(rules, 1))
    assert_same(stacked, by_numpy(loaded(plant), stack(rules, 1)))
    for w, one in enumerate(rules):
        worlds = loaded(plant)
        worlds.run(one)
        alone.append(worlds.ledger_usd[w])
    np.testing.assert_array_equal(stacked.ledger_usd, alone)


def test_it_stops_after_so_many_decisions():
    plant = Plant(load_scenario("everything", EPISODES["everything"]))
    worlds = loaded(plant)
    worlds.run(rule(plant, 1), 7)
    assert (worlds.action_counts.sum(axis=1) == 7).all()
    assert_same(worlds, by_numpy(loaded(plant), rule(plant, 1), 7))


def test_hedging_is_left_to_numpy():
    plant = Plant(load_scenario("quickstart", {"plans.classes.enterprise.hedge_after_s": 1.0}))
    assert not rule_kernel.is_compiled(rule(plant, 1), FleetWorlds(plant, 1))
    assert rule_kernel.is_compiled(rule(plant, 1), loaded(Plant(load_scenario("quickstart"))))


def test_levers_leave_a_rule_the_same_choices():
    plant = ControlPlant(load_scenario("day_night", DAY))
    policy, worlds = rule(plant.plant, 1), []
    for compiled in (True, False):
        control = EngineControl(loaded(plant.plant, 2), plant.layout, policy)
        assert control._compiled
        control._compiled = compiled
        controller = standard_rules(plant.layout)["hpa-edf"].anew()
        rng = np.random.default_rng(0)
        while not control.done.all():
            action = controller.act(control.view())
            control.step(np.clip(action + rng.normal(0.0, 0.5, action.shape), -1.0, 1.0))  # spills, sheds, holds
        worlds.append(control.worlds)
    assert (worlds[0].action_counts[:, [0, 1, 3, 4]] > 0).all()
    assert_same(*worlds)
