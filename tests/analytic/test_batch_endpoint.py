"""A provider's batch endpoint: who may use it, what it costs, and what an answer that comes too late costs."""

import by_hand
import numpy as np
import pytest
from by_hand import METERED, NIGHT, SEATS, Played, workload

from envs.fleet_env import FleetEnv
from envs.plant import Plant
from evaluation.bound_dual import DualBound
from evaluation.bound_options import make_options
from marginroute import view as v
from marginroute.errors import InputError
from marginroute.margin_rule import MarginParameters, MarginRule

API, BATCH, CACHE, DEFER, SHED = 3, 4, 5, 6, 7
ENDPOINT = by_hand.SCENARIO["fleet"]["providers"]["api"] | {
    "batch_discount": 0.5,
    "cached_input_usd_per_mtok": 20.0,
    "ttft_median_s": 12.0,
    "tpot_median_s": 0.001,
    "requests_per_minute": 600.0,
}


def _scenario(tmp_path, **changes):
    providers = {"api": by_hand.SCENARIO["fleet"]["providers"]["api"], "api-batch": ENDPOINT | changes}
    return by_hand.scenario(tmp_path, {"fleet.providers": providers})


def test_half_price_for_those_who_may_wait(tmp_path):
    """100 prompt and 11 output tokens at 25 and 50 USD per million; the answer is there after 12.01 s."""
    scenario = _scenario(tmp_path)
    rows = [{"class_index": k, "arrived_at_s": float(k)} for k in (METERED, SEATS, NIGHT)]
    played = Played(FleetEnv(scenario), workload(scenario, *rows), [API, API, BATCH])
    assert [bool(view.legal[BATCH]) for view in played.views] == [False, False, True]
    assert played.usd("api_spend", NIGHT) == pytest.approx(-(100 * 25e-6 + 11 * 50e-6), rel=1e-12)
    assert played.usd("api_spend", METERED) == pytest.approx(-(100 * 50e-6 + 11 * 100e-6), rel=1e-12)
    assert played.env.worlds.fleet.requests["completed_at_s"][0, 2] == pytest.approx(2.0 + 12.0 + 0.01)
    assert played.usd("slo_credits", NIGHT) == 0.0 and played.count("slo_ok", NIGHT) == 1
    static = played.views[2].signals[:, BATCH]
    assert static[[v.INPUT_USD, v.CACHED_INPUT_USD, v.OUTPUT_USD]] == pytest.approx([25e-6, 10e-6, 50e-6])


def test_an_answer_that_comes_too_late_owes_its_credit(tmp_path):
    """Held back for 20 s and answered after 12.01 s more: beyond the 30 s that night work is promised."""
    scenario = _scenario(tmp_path)
    episode = workload(scenario, {"class_index": NIGHT, "deadline_s": 40.0})
    played = Played(FleetEnv(scenario), episode, [DEFER] * 5 + [BATCH])
    value_usd = 100 * 500e-6 + 11 * 5000e-6
    assert played.usd("slo_credits", NIGHT) == pytest.approx(-0.5 * value_usd)
    assert played.count("slo_ok") == 0


def test_margin_rules_price_the_discount_and_the_turnaround(tmp_path):
    """On time it beats the API by half its price; nearly certain to be late it loses half of what is paid."""
    rule = MarginRule("expected-margin", MarginParameters((0.0,) * 4, sharpness=50.0))
    found = []
    for turnaround_s in (12.0, 60.0):
        env = FleetEnv(_scenario(tmp_path, ttft_median_s=turnaround_s, requests_per_minute=1e6))
        env.reset(options={"workload": workload(env.worlds.plant.scenario, {"class_index": NIGHT})})
        found.append((rule.assess(env.view), env.view))
    (early, view), (late, _) = found
    expected_tokens = view.request[v.EXPECTED_OUTPUT_TOKENS]
    listed_usd = 100 * 50e-6 + expected_tokens * 100e-6
    assert early.margin_usd[BATCH] - early.margin_usd[API] == pytest.approx(0.5 * listed_usd, rel=1e-6)
    value_usd = 100 * 500e-6 + expected_tokens * 5000e-6
    assert early.margin_usd[BATCH] - late.margin_usd[BATCH] == pytest.approx(0.5 * value_usd, rel=1e-3)


def test_what_is_left_at_the_horizon_is_not_bought_there(tmp_path):
    scenario = _scenario(tmp_path, input_usd_per_mtok=500.0)
    episode = workload(scenario, {"class_index": NIGHT, "arrived_at_s": 55.0})
    played = Played(FleetEnv(scenario), episode, [DEFER, DEFER])
    assert played.usd("api_spend") == pytest.approx(-(100 * 50e-6 + 11 * 100e-6))


def test_the_bound_knows_of_it(tmp_path):
    """Night work alone, each answered in time at half price or at the engines: no choice earns more than the bound."""
    scenario = _scenario(tmp_path)
    plant = Plant(scenario)
    episode = workload(
        scenario, *({"class_index": NIGHT, "good": [0, 0, 1], "arrived_at_s": float(t)} for t in range(5))
    )
    bound_usd = DualBound(make_options(plant, episode)).search().bound_usd
    played = {c: Played(FleetEnv(scenario), episode, [c] * 5).ledger_usd.sum() for c in (0, 1, API, BATCH)}
    assert max(played, key=played.get) == BATCH
    assert played[API] < played[BATCH] <= bound_usd + 1e-9
    assert bound_usd == pytest.approx(played[BATCH], abs=1e-3)


def test_numbers_that_make_no_sense(tmp_path):
    with pytest.raises(InputError, match=r"batch_discount.*is not legal"):
        _scenario(tmp_path, batch_discount=1.0)
    plans = {"plans.classes.night.delay_tolerant": None, "fleet.batch_queue": None}
    providers = {"fleet.providers": {"api-batch": ENDPOINT}}
    with pytest.raises(InputError, match="no class may wait"):
        by_hand.scenario(tmp_path, {**providers, **plans})
    with pytest.raises(InputError, match=r"at any time; legal is plans\.classes\.night\.slo\.e2e_s"):
        by_hand.scenario(tmp_path, {**providers, "plans.classes.night.slo": {}})
    only = {"plans.classes.seats.entitlements": {"stations": ["api-batch"]}}
    with pytest.raises(InputError, match="leave no pool or provider"):
        by_hand.scenario(tmp_path, {**providers, **only})


def test_prices_of_others_are_what_they_were(tmp_path):
    plain, with_batch = Plant(by_hand.scenario(tmp_path)), Plant(_scenario(tmp_path))
    np.testing.assert_array_equal(plain.static_signals[:, :4], with_batch.static_signals[:, :4])
