"""train.py, export.py and evaluate.py in a scenario with a controller: both deciders in one run and one bundle."""

import json

import numpy as np
import pytest
from sizes import TINY_TRAINING

import evaluate
import export
import train
from agents import baselines, control_tuning
from agents.control_tuning import PRICE_SHARES
from agents.run import Run
from benchmarks import deciders
from envs.control_plant import ControlPlant
from envs.control_worlds import EngineControl
from envs.plant import Plant
from envs.scenario import load_scenario
from envs.worlds import FleetWorlds
from evaluation.deciders import Deciders
from evaluation.protocol import evaluate_policies
from marginroute import bundle
from marginroute.card import model_card
from marginroute.control_policy import learned_of, rule_of

MINUTES = {
    "horizon_s": 240.0,
    "control.tick_s": 20.0,
    "plans.classes.batch.delay_tolerant.deadline_s": 120.0,
    "fleet.pools.main.provision_s": 20.0,
    "fleet.pools.main.load_s": 20.0,
}
CONTROLLER = {
    **{"steps": 480, "groups": 2, "group_size": 2, "rollout_ticks": 12, "epochs": 1, "minibatch": 48, "width": 8},
    **{"tuning_ticks": 1, "validations": 2, "validation_episodes": 2, "choice_episodes": 2, "gate_episodes": 2},
}
SETS = [f"{key}={x}" for key, x in MINUTES.items()]
TRAINING = [f"training.{key}={x}" for key, x in TINY_TRAINING.items()]
TRAINING += [f"training.controller.{key}={x}" for key, x in CONTROLLER.items()]


@pytest.fixture(scope="module")
def scenario():
    return load_scenario("day_night", MINUTES)


@pytest.fixture(scope="module")
def cache(tmp_path_factory, scenario):
    """Margin rules of the scenario, tuned with next to no budget, where tuned baselines are looked for."""
    from agents.search import Budget
    from agents.train import router_scenario
    from agents.tuning import tune_margin_rules

    folder = tmp_path_factory.mktemp("baselines")
    budget = Budget(requests=1, episodes=2, population=4, restarts=2, validation_episodes=2)
    tuned = tune_margin_rules(Plant(router_scenario(scenario)), budget)
    baselines.save(folder / f"{scenario.hash}.yaml", scenario, tuned, budget, "a test")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(baselines, "CACHE", folder)
        patch.setattr(baselines, "SHIPPED", folder)
        yield folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory, cache):
    """A run of train.py with both deciders."""
    run = tmp_path_factory.mktemp("runs") / "minutes"
    assert train.main(["day_night", "--out", str(run), "--set", *SETS, *TRAINING]) == 0
    return run


def test_a_run_holds_both_deciders(finished, scenario):
    info = Run(finished).info()
    assert info["status"] == "finished" and {"gate", "controller", "history", "controller_history"} <= info.keys()
    assert np.isfinite(info["controller"]["gate"]["ci95"]).all() and info["controller"]["gate"]["episodes"] == 2
    read = bundle.load(finished / "bundle")
    assert read.scenario == {"name": "day_night", "hash": scenario.hash}
    assert (learned_of(read.controller) == "residual") == info["controller"]["gate"]["learned"]
    assert rule_of(read.controller).name == info["controller"]["rule"]
    rules, best = baselines.load_controllers(finished / "baselines.yaml", ControlPlant(scenario).layout)
    assert len(rules) == 8 and best == info["controller"]["rule"]
    assert rule_of(read.controller).to_dict() == rules[best].to_dict()
    chosen = baselines.load(finished / "baselines.yaml")[0]["controllers"]["router"]
    earned = chosen["validation_usd_per_1k"]
    assert tuple(earned) == PRICE_SHARES and max(earned, key=earned.get) == chosen["price_share"]
    tuned = baselines.advice_and_fallback(finished / "baselines.yaml")[0]
    beside = baselines.router_beside(finished / "baselines.yaml")
    assert beside.parameters == tuned.at_price(chosen["price_share"]).parameters


def test_what_a_router_earns_beside_a_rule_is_what_its_days_earn(finished, scenario, monkeypatch):
    plant = ControlPlant(scenario)
    rules, best = baselines.load_controllers(finished / "baselines.yaml", plant.layout)
    router = baselines.advice_and_fallback(finished / "baselines.yaml")[0]
    monkeypatch.setattr(control_tuning, "PRICE_DAYS", 4)
    earned = control_tuning.prices_beside(plant, router, rules[best])
    for share, usd in earned.items():
        pair = Deciders(rules[best], router.at_price(share))
        first = control_tuning.FIRST_PRICE_SEED
        [played] = evaluate_policies(
            scenario, {"pair": pair}, 4, split="validation", first_seed=first, workers=1
        ).values()
        assert usd == pytest.approx((1000.0 * played.margin_usd / played.first_calls).mean(), abs=1e-9)


@pytest.mark.parametrize("learned", [True, False])
def test_export_writes_what_the_gates_said(finished, tmp_path, learned, capsys):
    run = Run(finished)
    before = run.info()
    try:
        run.update(
            gate=before["gate"] | {"learned": learned},
            controller=before["controller"] | {"gate": before["controller"]["gate"] | {"learned": learned}},
        )
        assert export.main([str(finished), "--out", str(tmp_path / "bundle")]) == 0
    finally:
        run.update(gate=before["gate"], controller=before["controller"])
    word = "residual" if learned else "none"
    assert f"learned: {word}; controller learned: {word}" in capsys.readouterr().out
    read = bundle.load(tmp_path / "bundle")
    assert (read.learned, learned_of(read.controller)) == (word, word)
    assert "Controller\n  policy: " in model_card(tmp_path / "bundle")
    worlds = EngineControl(FleetWorlds(run.scenario(), 1), read.controller.layout)
    worlds.load_seed(0, 0, "validation")
    levers = read.controller.anew().decide(worlds.view())
    assert levers.replicas.shape == (1, 1) and 1.0 <= levers.replicas[0, 0] <= 8.0


def test_evaluate_plays_the_chain_and_every_controller(finished, tmp_path, capsys):
    target = tmp_path / "report.json"
    arguments = ["day_night", "--policy", str(finished), "--episodes", "2", "--no-cache", "--set", *SETS]
    page = tmp_path / "page.html"
    assert evaluate.main([*arguments, "--bound", "--json", str(target), "--report", str(page)]) == 0
    assert 'id="margins"' in page.read_text() and 'id="timeline"' not in page.read_text()
    document = json.loads(target.read_text())
    margins = [x["margin_usd_per_1k_requests"]["mean"] for x in document["policies"].values()]
    assert max(margins) <= document["bounds"]["same_information"] <= document["bounds"]["clairvoyant"]
    rule = Run(finished).info()["controller"]["rule"]
    assert document["best_heuristic"] == f"bid-price-fitted + {rule}"
    assert {f"bid-price-fitted + {name}" for name in ("static", "hpa", "keda", "predictive-edf")} <= set(
        document["policies"]
    )
    assert any(name.startswith("marginroute + ") for name in document["policies"])
    assert set(document["policies"][document["best_heuristic"]]["shed"]) == {"enterprise", "team", "batch"}
    capsys.readouterr()
    for flags, words in (
        (["--baselines", "bid-price"], "is no controller; legal is all, none, static"),
        (["--explain", "3"], "--explain does not know controllers"),
    ):
        assert evaluate.main([*arguments, *flags]) == 2
        assert words in capsys.readouterr().err


def test_mpc_is_played_by_name_on_the_days_of_the_others(finished, tmp_path):
    target = tmp_path / "report.json"
    rule = Run(finished).info()["controller"]["rule"]
    words = ["day_night", "--policy", str(finished), "--baselines", f"{rule},mpc", "--episodes", "2", "--no-cache"]
    assert evaluate.main([*words, "--workers", "1", "--json", str(target), "--set", *SETS]) == 0
    document = json.loads(target.read_text())
    assert f"bid-price-fitted + {rule}" == document["best_heuristic"]
    assert "bid-price-fitted + mpc" in document["policies"]


def test_reports_of_controllers_are_sums_of_their_rewards(scenario, finished):
    """Margin of the examiner = sum of the rewards of the ticks, with a router and with the plain gateway."""
    controller = bundle.load(finished / "bundle").controller
    router = bundle.load(finished / "bundle").guarded()
    for decider in (None, router):
        pair = Deciders(controller, decider)
        [results] = evaluate_policies(scenario, {pair.name: pair}, 2, workers=1).values()
        worlds = EngineControl(FleetWorlds(scenario, 2), controller.layout, decider)
        for w in range(2):
            worlds.load_seed(w, w, "heldout")
        total, ours = np.zeros(2), controller.anew()
        while not worlds.done.all():
            worlds.step(ours.act(worlds.view()))
            total += worlds.rewards_usd
        np.testing.assert_allclose(results.margin_usd, total, rtol=0.0, atol=1e-9)


def test_one_decider_alone(tmp_path, cache, capsys):
    run = tmp_path / "controller"
    deciders = "training.deciders=controller"
    assert train.main(["day_night", "--out", str(run), "--set", *SETS, *TRAINING, deciders]) == 0
    assert "controller gate: learned minus" in capsys.readouterr().out
    assert not (run / "policy.zip").exists() and bundle.load(run / "bundle").learned == "none"
    assert export.main([str(run), "--out", str(tmp_path / "bundle")]) == 0


def test_the_benchmark_of_deciders_has_a_row_for_each(finished, tmp_path, capsys):
    assert deciders.main([str(finished), "--days", "2"]) == 0
    rows = json.loads(capsys.readouterr().out)["figures"]
    assert rows[deciders.ALONE]["gain_usd_per_1k"] == 0.0
    for row in rows.values():
        gain = row["usd_per_1k"] - rows[deciders.ALONE]["usd_per_1k"]
        assert row["gain_usd_per_1k"] == pytest.approx(gain, abs=2e-4)
    if not Run(finished).info()["controller"]["gate"]["learned"]:
        assert rows["controller network"] == rows[deciders.ALONE]
    for words, sentence in (([finished, "--days", "1"], "--days 1"), ([tmp_path], "is not a complete run folder")):
        assert deciders.main([str(word) for word in words]) == 2
        assert sentence in capsys.readouterr().err


def test_the_table_of_results_has_the_controller_beside_the_best_rule(finished, scenario):
    from benchmarks.result_rows import rows

    (row,) = rows(scenario, [finished, finished], 2, 0)
    learned = bundle.load(finished / "bundle").controller
    router = baselines.router_beside(finished / "baselines.yaml")
    ours, theirs = Deciders(learned, router), Deciders(rule_of(learned), router)
    played = evaluate_policies(scenario, {"ours": ours, "theirs": theirs}, 2)
    gain_usd = (played["ours"].margin_usd - played["theirs"].margin_usd).sum()
    assert row["best_heuristic"] == theirs.name and row["episodes"] == 2
    assert row["gain"]["usd_per_1k"] == pytest.approx(1000.0 * gain_usd / played["ours"].first_calls.sum(), abs=1e-9)
    assert row["gain_by_seed"][0] == row["gain_by_seed"][1]
