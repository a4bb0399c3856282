"""The content-blind controls: same shares, same money, and nothing to match where no tier is dear."""

import numpy as np
import pytest

from evaluation import cache
from evaluation.contest import Entrants, Play, hold
from evaluation.controls import (
    CONTROLS,
    MATCHED_COST,
    SHUFFLED_MIX,
    Mix,
    answer_cost_usd,
    matched_mixes,
    unit_cost_usd,
)
from evaluation.report import build_report
from marginroute.rules import DifficultyThreshold, FixedTier, LeastInFlight

PLAY = Play(8, workers=1)


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setattr(cache, "CACHE", tmp_path)


@pytest.fixture(scope="module")
def scenario():
    from envs.scenario import load_scenario

    return load_scenario("quickstart", {"horizon_s": 60.0, "requests_per_episode": 300})


def test_both_controls_take_part_and_spend_what_they_should(scenario):
    policy = DifficultyThreshold("threshold", rank_of_tier=(0, 1, 2, 3), cutoffs=(-9.0, 0.0, 0.6))
    contest = hold(scenario, Entrants({"threshold": policy}, {"cheap": FixedTier("cheap", 0)}, CONTROLS), PLAY)
    results = contest.results
    assert list(results) == ["threshold", "cheap", SHUFFLED_MIX, MATCHED_COST]
    wanted, matched = answer_cost_usd(results["threshold"]), answer_cost_usd(results[MATCHED_COST])
    assert matched == pytest.approx(wanted, rel=0.05)
    assert results[SHUFFLED_MIX].tier_shares == pytest.approx(results["threshold"].tier_shares, abs=0.05)
    best_of_validation = contest.policies[MATCHED_COST]
    assert sum(best_of_validation.tier_shares) == pytest.approx(1.0)


def test_a_policy_that_never_pays_is_matched_by_mixes_that_never_pay(scenario):
    policy = LeastInFlight("own", use_providers=False)
    results = cache.cached_play(scenario, {"own": policy}, 4, 0, workers=1)
    mixes = matched_mixes(scenario, {"own": policy}, results, ["own"], PLAY)
    assert mixes[MATCHED_COST].tier_shares[3] < 0.01


def test_unit_costs_are_those_of_the_scenario(scenario):
    usd = unit_cost_usd(scenario)
    assert len(usd) == 4 and int(np.argmax(usd)) == 3
    assert usd[0] < usd[1] < usd[2] < usd[3] / 10.0  # energy against an API


def test_no_match_without_a_dear_tier(hand_scenario):
    assert matched_mixes(hand_scenario, {}, {}, [], PLAY) == {}


def test_shares_of_a_mix():
    assert Mix((0.25, 0.75, 0.0), 0.2).shares(2) == pytest.approx((0.2, 0.6, 0.2))


def test_p_values_are_adjusted_and_the_untuned_composite_is_a_column():
    from episodes import make_results

    rng = np.random.default_rng(0)
    results = {name: make_results(name) for name in ("best", "a", "b", "shipped", "shipped-default")}
    for name in ("a", "b", "shipped"):
        results[name].ledger_usd[:, 0, 0] += rng.normal(0.0, 0.2, len(results[name].seeds))
    report = build_report("quickstart", results, "best")
    for paired in report.paired.values():
        assert paired.p_value <= paired.p_holm <= 1.0
        assert paired.net_usd_per_1k < paired.delta_usd_per_1k.mean
    smallest = min(report.paired.values(), key=lambda x: x.p_value)
    assert smallest.p_holm == pytest.approx(min(4.0 * smallest.p_value, 1.0))
    assert report.untuned_usd_per_1k("shipped") == report.margin_usd_per_1k["shipped-default"].mean
    assert report.untuned_usd_per_1k("a") is None
