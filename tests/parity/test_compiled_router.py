"""The compiled least-in-flight rule of benchmarks and `envs simulate` is the policy of marginroute/rules.py."""

import numpy as np
import pytest

from benchmarks.simulator_fleet import least_in_flight_up
from envs.fleet import scaling
from envs.fleet.replay import least_in_flight
from envs.plant import Plant
from envs.scenario import load_scenario
from envs.worlds import FleetWorlds
from marginroute.rules import LeastInFlight

REPLICAS = {f"fleet.pools.{name}.replicas": n for name, n in (("small", 4), ("medium", 2), ("large", 3))}


@pytest.fixture(scope="module")
def plant():
    return Plant(load_scenario("quickstart", REPLICAS | {"horizon_s": 20.0, "requests_per_episode": 300}))


def played(plant, seed):
    """Worlds with every replica legal in most decisions, and the policy's choice at each of them."""
    worlds = FleetWorlds(plant, 1)
    worlds.load_all([plant.scenario.generate(seed, "train")])
    policy = LeastInFlight("least-in-flight")
    while not worlds.desks["done"].all():
        choice = policy.decide_batch(worlds.view())
        yield worlds, int(choice[0])
        worlds.step(choice)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_compiled_rule_chooses_as_the_heuristic(plant, seed):
    replicas = plant.spec.n_replicas
    compared, busy = 0, set()
    for worlds, choice in played(plant, seed):
        if worlds.legal[0, :replicas].all() and choice < replicas:  # not an answer from the cache
            assert least_in_flight(worlds.fleet.replicas, 0, 0, replicas) == choice
            assert least_in_flight_up(worlds.fleet.replicas, 0) == choice
            compared += 1
            busy.add(choice)
    assert compared > 200
    assert len(busy) == replicas


def test_a_replica_known_to_be_down_is_passed_over(plant):
    for worlds, _ in played(plant, 2):
        arrays, fleet = worlds.fleet.arrays, worlds.fleet.replicas
        now_s = float(worlds.fleet.worlds["clock_s"][0])
        best = least_in_flight_up(fleet, 0)
        scaling.fail_replica(*arrays, 0, best, now_s + 1e6, now_s)
        scaling.settle_changes(*arrays, 0, now_s + 1e5)
        others = [r for r in range(plant.spec.n_replicas) if r != best]
        expected = others[int(np.argmin(fleet["in_flight"][0][others]))]
        assert least_in_flight_up(fleet, 0) == expected
        break
