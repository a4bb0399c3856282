"""The switches of the recipe do what they say."""

import numpy as np
import pytest

from benchmarks import ablations
from envs.scenario import load_scenario
from envs.scenario_family import middle
from envs.vector_env import FleetVecEnv
from marginroute.errors import InputError
from marginroute.margin_rule import MarginParameters, MarginRule


@pytest.fixture(scope="module")
def advice(small_plant):
    stations = len(small_plant.layout.station_names)
    return MarginRule("bid-price", MarginParameters((0.05,) * (stations - 1) + (0.0,)))


def one_step(plant, advice, **switches):
    """The environment after its first step, in which everybody goes to the first replica; the step's rewards."""
    env = FleetVecEnv(plant, 3, advice=advice, signal_scale_usd=0.5, **switches)
    env.reset()
    for _ in range(5):
        congestion_usd = advice.assess(env.worlds.view()).parts_usd[3, :, 0]
        rewards = env.step(np.zeros(3, dtype=np.int64))[1]
    return env, rewards, congestion_usd


def test_the_shadow_price_is_the_congestion_price(small_plant, advice):
    with_price, _, congestion_usd = one_step(small_plant, advice)
    without, _, same = one_step(small_plant, advice, shadow_price=False)
    np.testing.assert_array_equal(congestion_usd, same)
    assert congestion_usd.max() > 0.0
    np.testing.assert_allclose(without.learning_signal - with_price.learning_signal, congestion_usd / 0.5)


def test_the_ledger_as_signal_is_the_reward(small_plant, advice):
    env, rewards, _ = one_step(small_plant, advice, signal="ledger")
    np.testing.assert_allclose(env.learning_signal, rewards / 0.5, rtol=1e-5)
    assert not np.allclose(one_step(small_plant, advice)[0].learning_signal, env.learning_signal)


def test_the_middle_of_a_family():
    ranges = {"load_scale": {"low": 0.5, "high": 2.0, "log": True}}
    assert middle(load_scenario("quickstart", {"ranges": ranges})).load_scale == pytest.approx(1.0)
    plain = load_scenario("quickstart")
    assert middle(plain) is plain


def test_every_row_of_the_ablations_is_a_legal_configuration():
    from agents.config import load_training

    default = load_training(None, {})
    for name, (_, changes) in ablations.ROWS.items():
        assert (load_training(None, changes) == default) == (name == "full")


def test_the_table_of_ablations_goes_on_where_it_stopped(tmp_path, tiny_plant, tiny_arguments, tuned_cache, capsys):
    sets = [word for word in tiny_arguments if "=" in word and not word.startswith("training.")]
    words = ["quickstart", "--set", *sets, "--quick", "--only", "full,no_feedback", "--out", str(tmp_path)]
    assert ablations.main(words) == 0
    first = capsys.readouterr()
    results = sorted(tmp_path.rglob("ablation.json"))
    written = [path.stat().st_mtime_ns for path in results]
    assert len(results) == 2 and "| no_feedback | the network does not hear of judged answers |" in first.err
    assert ablations.main(words) == 0
    assert [path.stat().st_mtime_ns for path in results] == written
    assert ablations.main([*words[:-4], "--only", "nothing"]) == 2
    assert "legal: full, no_residual" in capsys.readouterr().err


def test_ablations_need_tuned_baselines(tmp_path, monkeypatch):
    from benchmarks import ablation_runs

    monkeypatch.setattr("agents.baselines.find", lambda scenario: None)
    with pytest.raises(InputError, match="has no tuned baselines"):
        ablation_runs.row(load_scenario("quickstart"), tmp_path / "row", {}, 0, 1, 2)
