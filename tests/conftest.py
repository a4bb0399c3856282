"""What tests of several folders share: one plant per scenario, so that kernels and constants are made once."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import by_hand
import pytest
from sizes import SMALL, TINY, TINY_TRAINING

from envs.fleet_env import FleetEnv
from envs.plant import Plant
from envs.scenario import load_scenario


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


@pytest.fixture(scope="session")
def tiny_plant():
    """quickstart, 25 requests in 5 s: trained, gated and exported in about a second."""
    return Plant(load_scenario("quickstart", TINY))


@pytest.fixture(scope="session")
def tiny_tuned(tiny_plant):
    """Baselines tuned with next to no budget."""
    from agents.search import Budget
    from agents.tuning import tune_baselines

    budget = Budget(requests=1, episodes=2, population=4, restarts=2, validation_episodes=2)
    return tune_baselines(tiny_plant, budget), budget


@pytest.fixture(scope="session")
def tiny_config():
    from agents.config import load_training

    return load_training(None, TINY_TRAINING)


@pytest.fixture(scope="session")
def tiny_arguments():
    """train.py's arguments for the above."""
    sets = [f"{key}={value}" for key, value in TINY.items()]
    return ["quickstart", "--set", *sets, *(f"training.{key}={value}" for key, value in TINY_TRAINING.items())]


@pytest.fixture(scope="session")
def tuned_cache(tmp_path_factory, tiny_plant, tiny_tuned):
    """A cache of tuned baselines that holds those of the tiny scenario, in place of the checkout's."""
    from agents import baselines

    folder = tmp_path_factory.mktemp("baselines")
    baselines.save(folder / f"{tiny_plant.scenario.hash}.yaml", tiny_plant.scenario, *tiny_tuned, "a test")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(baselines, "CACHE", folder)
        yield folder


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory, tiny_arguments, tuned_cache):
    """The folder of a run that trained, passed the gate or not, and exported; not to be changed."""
    import train

    folder = tmp_path_factory.mktemp("runs") / "finished"
    assert train.main([*tiny_arguments, "--out", str(folder)]) == 0
    return folder
