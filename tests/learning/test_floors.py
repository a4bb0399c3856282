"""Floors: multipliers known on paper are found, by the rule and by PPO, and the gate refuses what breaks a floor."""

import copy

import by_hand
import numpy as np
import pytest
import torch

from agents.config import load_training
from agents.floors import (
    KINDS,
    PROPORTION,
    RATE,
    Ascent,
    Floor,
    Found,
    Kept,
    ascend,
    keep_floors,
    parse,
    with_multipliers,
    worst_miss,
)
from agents.run import Run
from agents.train import train
from envs.economics import ledger as books
from envs.plant import Plant
from envs.scenario import Scenario
from envs.vector_env import ObservedWorlds, default_advice
from envs.worlds import FleetWorlds
from evaluation.gate import broken, losses
from marginroute.errors import InputError
from marginroute.heuristics import from_dict, to_dict
from marginroute.quality import normal_cdf

P_WEAK, P_STRONG = normal_cdf(0.0), normal_cdf(2.0)
PROMPT, OUTPUT = 200, 100
DEARER_USD = (PROMPT * (30.0 - 10.0) + OUTPUT * (40.0 - 20.0)) * 1e-6  # strong over weak, energy of one request
MULTIPLIER_USD = DEARER_USD / (P_STRONG - P_WEAK)  # per good answer, at which both are worth the same


def cheap_or_good():
    """All requests alike, one class; a cheap tier that is right half of the time and a dear one that nearly always is.

    Nothing is paid for a bad answer: the margin alone wants the cheap one.
    """
    data = copy.deepcopy(by_hand.SCENARIO)
    fleet, plans = data["fleet"], data["plans"]
    for tier, ability in (("weak", 0.0), ("strong", 2.0), ("hosted", -4.0)):
        fleet["tiers"][tier]["quality"] = {"slope": 0.0, "ability": {"chat": ability, "code": ability}}
    fleet["pools"]["two"]["replicas"], fleet["providers"] = 1, {}
    del fleet["response_cache"], fleet["batch_queue"]
    plans["plans"] = {"metered": {"kind": "usage", "input_usd_per_mtok": 30.0, "output_usd_per_mtok": 60.0}}
    plans["classes"] = {"metered": {"plan": "metered"}}
    one_length = {"components": [{"weight": 1.0, "median_tokens": 1, "sigma": 1e-4}], "max_tokens": 800}
    data["workload"] |= {
        "class_share": {"metered": 1.0},
        "recurring": {"share": 0.0, "prompts_per_tenant": 1, "zipf_exponent": 1.0},
        "prompt_tokens": copy.deepcopy(one_length),
        "output_tokens": copy.deepcopy(one_length),
    }
    for name, tokens in (("prompt_tokens", PROMPT), ("output_tokens", OUTPUT)):
        data["workload"][name]["components"][0]["median_tokens"] = tokens
    return Plant(Scenario.model_validate({"name": "cheap or good", **data}))


@pytest.fixture(scope="module")
def toy():
    return cheap_or_good()


def counts_of(calls=100, served=100, good=80, slo_ok=90):
    """(len(COUNTS), 1)"""
    counts = np.zeros((len(books.COUNTS), 1))
    rows = [books.CALLS, books.SERVED, books.GOOD, books.SLO_OK]
    counts[rows, 0] = (calls, served, good, slo_ok)
    return counts


def test_shares_by_hand():
    counts = counts_of(calls=100, served=95, good=76, slo_ok=90)
    slo, quality, shed = (Floor(kind, "a", 0, 0.5) for kind in KINDS)
    assert [floor.share(counts) for floor in (slo, quality, shed)] == pytest.approx([0.9, 0.8, 0.05])
    assert [floor.missing(counts) for floor in (slo, quality, shed)] == pytest.approx([-0.4, -0.3, -0.45])
    assert worst_miss([slo, quality, shed], counts) == 0.0
    assert worst_miss([Floor("shed", "a", 0, 0.01)], counts) == pytest.approx(0.04)
    assert Floor("slo", "a", 0, 0.9).missing(counts_of(calls=0, served=0, good=0, slo_ok=0)) == 0.0


def test_what_is_aimed_at_is_stricter_and_stays_a_share():
    assert Floor("slo", "a", 0, 0.9).aimed(900.0).limit == pytest.approx(0.92)  # two standard errors of 0.01
    assert Floor("shed", "a", 0, 0.1).aimed(900.0).limit == pytest.approx(0.08)
    assert Floor("slo", "a", 0, 0.999).aimed(10.0).limit == 1.0


def test_an_ascent_finds_a_multiplier_known_on_paper():
    """The dearer candidate costs u more, u uniform on [0, 1], and meets the SLO with 0.95 instead of 0.55.

    With multiplier m it is taken where 0.4 m > u: a share 0.4 m, and g(m) = 0.55 + 0.16 m = 0.7 at m = 0.9375.
    """
    floor = Floor("slo", "a", 0, 0.7)

    def play(usd):
        share = min(0.4 * usd[0, 0], 1.0)
        return -0.5 * share**2, counts_of(calls=1.0, slo_ok=0.55 + 0.4 * share)

    found = ascend([floor], play, np.ones(1), rounds=40)
    assert found.kept and found.usd[0, 0] == pytest.approx(0.9375, abs=1e-3)
    assert not found.usd[1:].any()


def test_a_floor_that_holds_costs_nothing():
    found = ascend([Floor("slo", "a", 0, 0.5)], lambda usd: (0.0, counts_of(slo_ok=60)), np.ones(1))
    assert found.kept and not found.usd.any()


def test_a_floor_out_of_reach_is_said_to_be():
    found = ascend([Floor("slo", "a", 0, 0.9)], lambda usd: (0.0, counts_of(slo_ok=60)), np.ones(1))
    assert not found.kept and found.shares == {"slo.a": pytest.approx(0.6)}


def test_a_rule_keeps_its_floor_at_the_multiplier_on_paper(toy):
    floors = parse(["quality.metered=0.9"], toy.layout.class_names)
    kept = keep_floors(toy, default_advice(toy), floors)
    assert kept.found.kept and kept.found.shares["quality.metered"] > 0.9
    assert 1.0 <= kept.found.usd[1, 0] / MULTIPLIER_USD < 1.05
    assert from_dict(to_dict(kept.rule)).parameters == kept.rule.parameters


def test_no_multipliers_change_nothing_and_parts_add_up(toy):
    advice = default_advice(toy)
    zero, some = (with_multipliers(advice, np.full((3, 1), usd)) for usd in (0.0, 0.02))
    worlds = FleetWorlds(toy, 1)
    worlds.load_all([toy.scenario.generate(0, "validation")])
    view = worlds.view()[0]
    plain, free, priced = (rule.assess(view) for rule in (advice, zero, some))
    np.testing.assert_array_equal(plain.score_usd, free.score_usd)
    np.testing.assert_array_equal(plain.margin_usd, priced.margin_usd)
    np.testing.assert_allclose(priced.score_usd - plain.score_usd, 0.02 * priced.kept.sum(axis=0))
    np.testing.assert_allclose(priced.kept[:, :2].T, [[1.0, P_WEAK, 1.0], [1.0, P_STRONG, 1.0]])
    assert priced.kept[:, -1].tolist() == [0.0, 0.0, 0.0]  # shed keeps nothing
    parts = some.decide(view).reason_usd
    assert parts["margin"] + parts["congestion"] + parts["floors"] == pytest.approx(priced.best_usd.item())


def test_the_learning_signal_pays_what_a_floor_is_worth(toy):
    """By multipliers of the advice or by those of the ascent: the same USD."""
    advice = default_advice(toy)
    usd = np.array([[0.0], [0.5], [0.25]])
    signals = []
    for rule, floor_usd in ((with_multipliers(advice, usd), None), (with_multipliers(advice, 0.0 * usd), usd)):
        worlds = ObservedWorlds(toy, 2, rule, None)
        worlds.floor_usd = floor_usd
        worlds.load_all([toy.scenario.generate(seed, "validation") for seed in (0, 1)])
        worlds.observe()
        signals.append(worlds.signal_usd(np.array([0, 1])))
    np.testing.assert_allclose(*signals)


def test_ppo_mixes_where_the_multiplier_makes_both_worth_the_same(toy, tmp_path):
    """From the cheap tier and no multiplier, dual ascent during the training arrives at the one on paper."""
    torch.set_num_threads(1)
    settings = {"n_envs": 16, "rollout_steps": 32, "minibatch": 256, "width": 16, "learning_rate": 0.003}
    settings |= {"steps": 30_720, "temperature_share": 1.0, "entropy_coefficient": 0.02, "tau_s": 0.0}
    settings |= {"normaliser_episodes": 4, "validation_episodes": 4, "validations": 2, "target_kl": None}
    config = load_training(None, settings)
    floors = parse(["quality.metered=0.75"], toy.layout.class_names)
    advice = with_multipliers(default_advice(toy), np.zeros((3, 1)))
    start = Kept(advice, floors, floors, Found(np.zeros((3, 1)), False, {}), np.array([0.012]))
    run = Run(tmp_path / "run")
    run.create(toy.scenario, config, 0, "a test")
    train(toy, advice, config, run, 0, kept=start)
    last = run.info()["history"][-1]
    assert last["multiplier_quality.metered_usd_per_1k"] == pytest.approx(1000.0 * MULTIPLIER_USD, rel=0.1)


def test_ascent_rises_below_the_floor_and_falls_above():
    floors, zero = (Floor("slo", "a", 0, 0.9),), np.zeros((3, 1))
    ascent = Ascent(Kept(None, floors, floors, Found(zero, False, {}), np.array([0.02])))
    ascent.update(counts_of(slo_ok=80))
    assert ascent.integral_usd[0, 0] == pytest.approx(0.02 * RATE * 0.1)
    assert ascent.usd[0, 0] == pytest.approx(0.02 * (RATE + PROPORTION) * 0.1)
    assert ascent.metrics() == {"multiplier_slo.a_usd_per_1k": pytest.approx(20.0 * RATE * 0.1)}
    ascent.update(counts_of(slo_ok=100))
    assert ascent.integral_usd[0, 0] == ascent.usd[0, 0] == 0.0
    assert not zero.any()


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("slo.metered", "legal is slo.CLASS=V"),
        ("speed.metered=1", "legal is slo.CLASS=V"),
        ("slo.gold=0.9", "class 'gold' is not legal; legal: metered"),
        ("slo.metered=90", "'90' is not legal; legal is a share from 0 to 1"),
        ("slo.metered=nan", "'nan' is not legal"),
        ("slo.metered=high", "'high' is not legal"),
    ],
)
def test_what_is_no_floor(word, sentence):
    with pytest.raises(InputError, match=sentence):
        parse([word], ("metered",))
    with pytest.raises(InputError, match="given twice"):
        parse(["slo.metered=0.9", "slo.metered=0.8"], ("metered",))


def test_the_gate_refuses_what_a_class_pays_for(small_plant):
    from evaluation.protocol import play
    from marginroute.rules import FixedTier

    workloads = [small_plant.scenario.generate(seed, "validation") for seed in range(2)]
    weak, strong = (play(small_plant, FixedTier("fixed", tier), "fixed", workloads, (0, 1)) for tier in (0, 3))
    assert losses(strong, strong) == []
    assert any("points of quality" in words for words in losses(weak, strong))
    assert any("gets no answer" in words for words in losses(weak, strong))
    floors = parse(["quality.enterprise=0.99", "shed.team=1.0"], small_plant.layout.class_names)
    assert [words.split(" is ")[0] for words in broken(floors, weak)] == ["quality.enterprise"]
