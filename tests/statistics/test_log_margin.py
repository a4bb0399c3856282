"""What a log has earned: on the world's own log the ledger's sum, by class and account."""

import importlib
from pathlib import Path

import numpy as np
import pytest
from sizes import SMALL

from envs.economics.ledger import ACCOUNTS
from envs.plant import Plant
from envs.scenario import load_scenario
from envs.worlds import FleetWorlds
from evaluation.backtest import backtest, requests_of
from evaluation.log_margin import margin_by_class
from evaluation.simulated_log import write_log
from marginroute.rules import LeastInFlight

SEEDS = [0, 1]


@pytest.fixture(scope="module")
def small_plant():
    """quickstart, 100 requests in 20 s, none of them asked twice: a stored answer leaves nothing in a log."""
    return Plant(load_scenario("quickstart", {**SMALL, "workload.recurring.share": 0.0}))


@pytest.fixture(scope="module")
def earned(small_plant, tmp_path_factory):
    path = tmp_path_factory.mktemp("logs") / "log.jsonl"
    write_log(path, small_plant, LeastInFlight("least-in-flight"), SEEDS, "heldout")
    logged = requests_of(small_plant, path)
    return logged, margin_by_class(small_plant, logged)


def account(worlds, name):
    """(K,) USD of an account over all worlds; the last column is nobody's."""
    return worlds.ledger_usd[:, ACCOUNTS.index(name), :-1].sum(axis=0)


def test_a_log_with_all_labels_adds_up_to_the_ledger(small_plant, earned):
    logged, found = earned
    worlds = FleetWorlds(small_plant, len(SEEDS))
    worlds.load_all([small_plant.scenario.generate(seed, "heldout") for seed in SEEDS])
    worlds.run(LeastInFlight("least-in-flight"))
    rows = list(found["classes"].values())
    usd = {key: np.array([row[key] * row["requests"] / 1e3 for row in rows]) for key in ("usage", "credits", "cost")}
    assert np.allclose(usd["usage"], account(worlds, "usage_revenue"))
    assert np.allclose(usd["credits"], account(worlds, "slo_credits"))
    assert found["labelled"] == 1.0
    refunds = np.array([row["refunds"] * row["requests"] / 1e3 for row in rows])
    assert np.allclose(refunds, account(worlds, "refunds"))
    assert usd["cost"].sum() <= 0.0 and sum(row["requests"] for row in rows) == len(logged.candidate)


def test_parts_add_up_and_gpu_hours_are_the_fleets(small_plant, earned):
    _, found = earned
    for row in found["classes"].values():
        parts = sum(row[key] for key in ("usage", "seats", "credits", "refunds", "unserved", "cost"))
        assert row["margin"] == pytest.approx(parts) and 0.0 <= row["slo"] <= 1.0
    pools = small_plant.scenario.fleet.pools.values()
    listed = sum(pool.replicas * pool.gpus_per_replica * pool.gpu_usd_per_hour for pool in pools)
    assert found["gpu_usd_per_hour"] == pytest.approx(listed)


def test_without_feedback_the_prior_stands_in(small_plant, tmp_path):
    write_log(tmp_path / "log.jsonl", small_plant, LeastInFlight("least-in-flight"), [0], "heldout", labels=0.0)
    found = margin_by_class(small_plant, requests_of(small_plant, tmp_path / "log.jsonl"))
    assert found["labelled"] == 0.0
    assert all(row["refunds"] < 0.0 for row in found["classes"].values() if row["answered"] > 0.0)


def test_the_practice_log_is_one_that_the_world_predicts(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "examples")
    log = tmp_path / "decisions.jsonl"
    assert importlib.import_module("practice_log").main(["--minutes", "1", "--out", str(log)]) == 0
    assert log.read_text().count("\n") >= 300
    assert backtest(load_scenario("quickstart"), log)["calibrated"]
