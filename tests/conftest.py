"""What tests of several folders share: one plant per scenario, so that kernels and constants are made once."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import by_hand
import pytest

from envs.fleet_env import FleetEnv
from envs.scenario import load_scenario
from envs.worlds import Plant

SMALL = {"horizon_s": 20.0, "requests_per_episode": 100}


@pytest.fixture(scope="session")
def hand_scenario(tmp_path_factory):
    """The scenario of `by_hand`."""
    return by_hand.scenario(tmp_path_factory.mktemp("by_hand"))


@pytest.fixture(scope="session")
def hand_plant(hand_scenario):
    return Plant(hand_scenario)


@pytest.fixture
def hand_env(hand_scenario):
    """A fresh `FleetEnv` on the scenario of `by_hand`."""
    return FleetEnv(hand_scenario)


@pytest.fixture(scope="session")
def small_scenario():
    """quickstart, 100 requests in 20 s."""
    return load_scenario("quickstart", SMALL)


@pytest.fixture(scope="session")
def small_plant(small_scenario):
    return Plant(small_scenario)
