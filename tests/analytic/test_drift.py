"""What drifts inside an episode: courses by hand, what they do to answers, calls and bills, what stays."""

import dataclasses

import by_hand
import numpy as np
import pytest
from by_hand import API, METERED, Played, workload
from hypothesis import given
from hypothesis import strategies as st

from envs.fleet_env import FleetEnv
from envs.scenario import load_scenario
from envs.workload import drift as d
from envs.workload.faults import OF_PRICE, OF_PROVIDER, fault
from envs.workload.requests import Workload
from marginroute import view as v
from marginroute.errors import InputError
from marginroute.quality import normal_cdf


def law(**fields):
    return d.DriftLaw(**{"after_s": (0.0, 10.0), "tasks": (True, False)} | fields)


def test_a_course_is_straight_between_its_knots():
    falling = d.Drift(law(tier=1, ability_by=(0.0, -2.0)), begins_at_s=5.0)
    at_s, task = np.array([4.0, 5.0, 7.5, 15.0, 99.0, 99.0]), np.array([0, 0, 0, 0, 0, 1])
    shift = d.ability_shift([falling, falling], at_s, task, n_tiers=3)
    np.testing.assert_allclose(shift[:, 1], [0.0, 0.0, -1.0, -4.0, -4.0, 0.0])
    assert not shift[:, [0, 2]].any()
    assert d.ability_shift([d.Drift(law(provider=0, price_times=(1.0, 2.0)), 0.0)], at_s, task, 3) is None


def test_factors_become_stairs_of_the_same_mean():
    rising = d.Drift(law(provider=1, latency_times=(1.0, 3.0)), begins_at_s=5.0)
    stairs = d.as_faults([rising])
    assert (stairs["kind"] == OF_PROVIDER).all() and (stairs["index"] == 1).all() and len(stairs) == d.STAIRS + 1
    inside = stairs[:-1]
    assert (inside["ends_at_s"] - inside["starts_at_s"]) @ inside["slowdown"] == pytest.approx(10.0 * 2.0)
    assert tuple(stairs[-1])[2:] == (15.0, np.inf, 3.0)
    level = d.as_faults([d.Drift(law(provider=0, price_times=(2.0, 2.0)), 1.0)])
    assert [tuple(row) for row in level] == [(OF_PRICE, 0, 1.0, 11.0, 2.0), (OF_PRICE, 0, 11.0, np.inf, 2.0)]


def test_when_it_begins_and_whether_it_happens():
    laws = [law(starts_at_s=20.0, start_spread_s=30.0, episode_share=0.3), law()]
    drawn = [d.draw_drifts(laws, (1, seed)) for seed in range(2000)]
    begins_s = np.array([drifts[0].begins_at_s for drifts in drawn if len(drifts) == 2])
    assert len(begins_s) / 2000 == pytest.approx(0.3, abs=0.04)
    assert begins_s.min() >= 20.0 and begins_s.max() < 50.0 and begins_s.mean() == pytest.approx(35.0, abs=1.5)
    assert drawn == [d.draw_drifts(laws, (1, seed)) for seed in range(2000)]


@given(
    st.lists(st.tuples(st.floats(0, 50), st.floats(0.1, 60), st.floats(0.5, 4)), max_size=5),
    st.floats(0, 60),
    st.floats(0, 30),
)
def test_the_least_factor_of_a_span(stairs, from_s, span_s):
    rows = [fault(OF_PRICE, 0, at_s, at_s + length_s, factor) for at_s, length_s, factor in stairs]
    rows += [fault(OF_PRICE, 1, 0.0, 99.0, 0.01), fault(OF_PROVIDER, 0, 0.0, 99.0, 0.01)]
    faults = np.concatenate(rows)
    edges_s = [at_s for start_s, length_s, _ in stairs for at_s in (start_s, start_s + length_s)]
    moments_s = [from_s, from_s + span_s, *(at_s for at_s in edges_s if from_s <= at_s <= from_s + span_s)]
    factors = [np.prod([f for s, n, f in stairs if s <= at_s < s + n]) for at_s in moments_s]
    found = d.least_factor(faults, OF_PRICE, 0, np.array([from_s]), np.array([from_s + span_s]))
    assert found == pytest.approx(min(factors))


def play(tmp_path, drift, rows):
    scenario = by_hand.scenario(tmp_path, drift={"api": {"provider": "api"} | drift})
    episode = dataclasses.replace(workload(scenario, *rows), faults=scenario.generate(0).faults)
    return Played(FleetEnv(scenario), episode, [API] * len(rows))


REQUESTS = [{"prompt_tokens": 100, "output_tokens": 51, "arrived_at_s": at_s} for at_s in (1.0, 11.0)]
CALL_USD = 100 * 50e-6 + 51 * 100e-6


def test_a_call_is_billed_at_the_price_of_when_it_was_sent(tmp_path):
    """The first call ends at 2.5 s, after the price has doubled at 2 s, and still costs what it did."""
    played = play(tmp_path, {"price_times": [2.0], "starts_at_s": 2.0}, REQUESTS)
    assert played.usd("api_spend", METERED) == pytest.approx(-3.0 * CALL_USD, rel=1e-12)
    assert played.views[1].signals[v.INPUT_USD, API] == pytest.approx(50e-6)  # the price table is as it was
    assert sum(played.rewards) == pytest.approx(played.ledger_usd.sum(), abs=1e-12)


def test_a_slow_api_is_seen_by_its_latencies_only(tmp_path):
    played = play(tmp_path, {"latency_times": [3.0], "starts_at_s": 10.0}, [*REQUESTS, {"arrived_at_s": 30.0}])
    request = played.env.worlds.fleet.requests[0]
    np.testing.assert_allclose(request["first_token_at_s"][:2], [1.5, 12.5])
    np.testing.assert_allclose(request["completed_at_s"][:2], [1.5 + 50 * 0.02, 12.5 + 50 * 0.06])
    before, after = played.views[1].signals[:, API], played.views[2].signals[:, API]
    assert before[v.RECENT_TTFT_S] == pytest.approx(0.5) and after[v.RECENT_TTFT_S] > 0.5
    assert after[v.FIXED_TTFT_S] == before[v.FIXED_TTFT_S] == 0.5
    assert played.usd("api_spend", METERED) == pytest.approx(-2.0 * CALL_USD - 100 * 50e-6 - 11 * 100e-6)


def test_only_outcomes_drift():
    """A tier that gets worse: P(good) by hand, everything that a gateway sees as it was, and so are all other tiers."""
    small = {"horizon_s": 60.0, "requests_per_episode": 300}
    worse = {"tier": "medium", "tasks": ["code"], "ability_by": [-1.5], "starts_at_s": 30.0}
    plain, drifting = (load_scenario("quickstart", small | more).generate(3) for more in ({}, {"drift": {"m": worse}}))
    for name in Workload.visible():
        np.testing.assert_array_equal(getattr(plain, name), getattr(drifting, name))
    moved = (plain.p_good != drifting.p_good).any(axis=1)
    assert (moved == ((plain.task_index == 2) & (plain.arrived_at_s >= 30.0))).all() and moved.any()
    assert (plain.p_good[:, [0, 2, 3]] == drifting.p_good[:, [0, 2, 3]]).all()
    from scipy.stats import norm

    probit = norm.ppf(plain.p_good[moved, 1] / 0.96)
    np.testing.assert_allclose(drifting.p_good[moved, 1], 0.96 * normal_cdf(probit - 1.5), atol=1e-9)
    assert (drifting.good[:, 1] <= plain.good[:, 1]).all()


@pytest.mark.parametrize(
    ("drift", "parts"),
    [
        ({"tier": "medium"}, ["changes nothing"]),
        ({"ability_by": [1.0]}, ["tier without ability_by"]),
        ({"tier": "medium", "ability_by": [1.0, 2.0]}, ["has 2 ability_by", "one per knot"]),
        ({"tier": "medium", "ability_by": [1.0, 2.0], "after_s": [3.0, 3.0]}, ["legal is ascending"]),
        ({"tier": "huge", "ability_by": [1.0]}, ["drift.x.tier", "'huge'"]),
        ({"tier": "medium", "tasks": ["coding"], "ability_by": [1.0]}, ["drift.x.tasks", "'coding'"]),
        ({"provider": "ap", "price_times": [1.0]}, ["drift.x.provider", "did you mean api"]),
        ({"provider": "api", "latency_times": [0.5]}, ["drift.x.latency_times.0", "0.5"]),
    ],
)
def test_a_drift_that_makes_no_sense_is_refused(drift, parts):
    with pytest.raises(InputError) as error:
        load_scenario("quickstart", {"drift": {"x": drift}})
    assert all(part in str(error.value) for part in parts), error.value
