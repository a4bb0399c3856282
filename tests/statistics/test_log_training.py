"""Training from a log: a scenario that is wrong about its models is put right by a tenth of the outcomes."""

import json

import numpy as np
import pytest

import train
from agents.baselines import baselines_for
from agents.export import make_bundle
from agents.run import Run
from envs.plant import Plant
from envs.scenario import load_scenario
from evaluation.log_training import judge, judged_line, read_labels, refit
from evaluation.simulated_log import write_log
from marginroute import bundle as bundles
from marginroute.errors import InputError
from marginroute.exploration import ExploringPolicy

BLIND = [f"fleet.tiers.{tier}.quality.ability.{task}" for tier in ("small", "medium", "large", "hosted")
         for task in ("chat", "extraction", "code", "reasoning")]  # fmt: skip
WRONG = dict.fromkeys(BLIND, 1.0) | {
    f"fleet.tiers.{tier}.quality.prior_ability": ability
    for tier, ability in (("small", 0.7), ("medium", 1.2), ("large", 1.45), ("hosted", 1.8))
}


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    """The log of a gateway whose models answer as in quickstart; one answer in ten is labelled."""
    path = tmp_path_factory.mktemp("log") / "log.jsonl"
    right = load_scenario("quickstart")
    rule = baselines_for(right)["bid-price"]
    write_log(path, Plant(right), ExploringPolicy(rule, rule, share=0.3, limit_usd=0.02), range(8), labels=0.1)
    return path


def test_a_tenth_of_the_outcomes_puts_the_abilities_right(log):
    wrong, right = load_scenario("quickstart", WRONG), load_scenario("quickstart")
    overrides, fit = refit(wrong, log)
    assert 400 < fit.labels.sum() < 1200
    true = np.array(right.workload_spec.quality.ability)
    before, after = (np.abs(ability - true) for ability in (np.full(true.shape, 1.0), fit.ability))
    assert (after < 3.5 * fit.sd).all()
    labelled = fit.labels > 20
    assert labelled.any() and after[labelled].mean() < 0.6 * before[labelled].mean()
    again = load_scenario("quickstart", {**WRONG, **overrides})
    np.testing.assert_allclose(again.workload_spec.quality.ability, fit.ability, atol=1e-6)
    assert again.workload_spec.quality.prior_ability == pytest.approx(wrong.workload_spec.quality.prior_ability)


def test_a_log_without_labels_is_refused(log, tmp_path):
    rows = [json.loads(line) | {"good": None} for line in log.read_text().splitlines()[:50]]
    path = tmp_path / "blind.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    with pytest.raises(InputError, match="hold 0 answers of which it says whether they were good"):
        refit(load_scenario("quickstart", WRONG), path)
    with pytest.raises(InputError, match="cannot be read"):
        refit(load_scenario("quickstart"), tmp_path / "none.jsonl")


def test_a_world_that_hedges_writes_no_log(tmp_path):
    plant = Plant(load_scenario("quickstart", {"plans.classes.team.hedge_after_s": 0.5}))
    policy = baselines_for(load_scenario("quickstart"))["bid-price"]
    with pytest.raises(InputError, match="hedges"):
        write_log(tmp_path / "log.jsonl", plant, ExploringPolicy(policy, policy, 0.1, 0.01), [0])
    assert not (tmp_path / "log.jsonl").exists()


def test_a_log_of_shadow_mode_teaches_the_same(log, tmp_path):
    """What answered counts, not what the bundle would have chosen; nothing can be said off-policy."""
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    path = tmp_path / "shadow.jsonl"
    shadow = [row | {"mode": "shadow", "choice": "small/0", "kind": "replica", "probability": 1.0} for row in rows]
    path.write_text("\n".join(map(json.dumps, shadow)) + "\n")
    scenario = load_scenario("quickstart", WRONG)
    np.testing.assert_array_equal(refit(scenario, path)[1].ability, refit(scenario, log)[1].ability)
    rule, plant = baselines_for(load_scenario("quickstart"))["bid-price"], Plant(load_scenario("quickstart"))
    judged = judge(path, make_bundle(plant, rule, rule, {}, {}))
    assert judged_line(judged).endswith("no answer, it was written in shadow mode, where choices have no probabilities")


def test_train_from_a_log(log, tiny_arguments, tmp_path, capsys):
    """The command: refitted, tuned and trained in the refitted world, judged on the lines that it did not see."""
    run = tmp_path / "run"
    words = [*tiny_arguments, "training.tuning_requests=1", "--log", str(log), "--out", str(run)]
    assert train.main(words) == 0
    out = capsys.readouterr().out
    assert "labelled answers move the tiers' abilities" in out and "off-policy on the log's last 30%" in out
    info = Run(run).info()
    assert info["off_policy"]["overlap"]["decisions"] > 1000 and info["log_overrides"].keys() >= set(BLIND)
    bundle = bundles.load(run / "bundle")
    assert judge(log, bundle)["overlap"] == info["off_policy"]["overlap"]
    assert len(read_labels(log, bundle.layout)) > 400
    assert f"compare it: python evaluate.py --policy {run}" in out  # which plays the run's own world
