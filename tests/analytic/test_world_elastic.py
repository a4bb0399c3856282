"""Faults, retries and scaling of a world, worked out by hand: decisions, times, and every cent."""

import dataclasses
import math

import by_hand
import numpy as np
import pytest
from by_hand import API, METERED, ONE, SEAT_USD_PER_S, SHED, TWO_A, TWO_B, Played, workload

from envs.fleet_env import FleetEnv
from envs.worlds import FleetWorlds
from marginroute import view as v
from marginroute.margin_rule import MarginParameters, MarginRule
from marginroute.rules import LeastInFlight

INPUT, OUTPUT = 1000e-6, 10000e-6  # USD per token that a metered customer pays
STEP_S = by_hand.STEP_S


def _play(tmp_path, rows, choices, overrides=None, faults=(), horizon_s=60.0):
    changes = {"fleet.faults": list(faults), **(overrides or {})}
    scenario = by_hand.scenario(tmp_path, {k: x for k, x in changes.items() if x != []})
    episode = workload(scenario, *rows, horizon_s=horizon_s)
    if faults:
        episode = dataclasses.replace(episode, faults=scenario.generate(0).faults)
    return Played(FleetEnv(scenario), episode, choices)


CRASH = {"pool": "one", "index": 0, "starts_at_s": 0.505, "duration_s": 20.0}
REQUEST = {"prompt_tokens": 100, "output_tokens": 100}


def test_a_request_on_a_crashed_replica_is_decided_again(tmp_path):
    """Sent at 0, 50 tokens streamed at 0.505 s, when the replica crashes; the second replica answers in 1 s."""
    played = _play(tmp_path, [REQUEST], [ONE, TWO_A], faults=[CRASH])
    assert played.count("retries") == 1 and played.count("first_calls") == 1 and played.count("served") == 1
    assert played.infos[0]["now_s"] == 0.505  # connections break at once
    assert played.views[1].request[v.WAITED_S] == 0.505
    assert played.views[1].legal[ONE]  # not detected yet
    assert played.views[1].signals[v.RECENT_ERRORS, ONE] == pytest.approx(0.2)  # 1 of 5
    load, request = played.env.worlds.loads[0, 0], played.env.worlds.fleet.requests[0, 0]
    assert request["first_token_at_s"] == pytest.approx(0.505 + STEP_S)
    assert request["completed_at_s"] == pytest.approx(0.505 + 100 * STEP_S)
    assert load["answered_by"] == TWO_A
    # energy: 100 prompt and 49 generated tokens in the KV cache of `one`, then the whole answer at `two`
    lost = 100 * 10e-6 + 49 * 20e-6
    assert played.usd("energy", METERED) == pytest.approx(-(lost + 100 * 30e-6 + 100 * 40e-6), rel=1e-12)
    assert played.usd("usage_revenue") == pytest.approx(100 * INPUT + 100 * OUTPUT)
    # TTFT counts from arrival: 0.515 s is above the 0.4 s that were promised
    assert played.usd("slo_credits") == pytest.approx(-0.2 * (100 * INPUT + 100 * OUTPUT))
    assert sum(played.rewards) == pytest.approx(played.ledger_usd.sum(), abs=1e-12)


def test_attempts_run_out(tmp_path):
    """The dead replica refuses twice at the same instant; after three attempts the request has failed."""
    played = _play(tmp_path, [REQUEST], [ONE, ONE, ONE], faults=[CRASH])
    assert (played.count("retries"), played.count("failed"), played.count("served")) == (2, 1, 0)
    assert [info["now_s"] for info in played.infos] == [0.505, 0.505, 60.0]
    value = 100 * INPUT + expected_output_tokens(played) * OUTPUT
    assert played.usd("unserved_credits") == pytest.approx(-(0.25 * value + 0.03))


def expected_output_tokens(played):
    """Output tokens that the gateway expects of a metered chat, which unserved credits are computed from."""
    return float(played.env.worlds.lengths["value"][0, METERED, 0])


def test_backoff_puts_the_retry_later(tmp_path):
    played = _play(tmp_path, [REQUEST], [ONE, API], {"fleet.retries.backoff_s": 2.0}, [CRASH])
    assert played.infos[0]["now_s"] == pytest.approx(2.505)


@pytest.mark.parametrize("connection_errors", [True, False])
def test_the_gateway_knows_after_detection_only(tmp_path, connection_errors):
    """Down from 2.005 to 22.005, detected at 7.005, loaded 3 s after the repair."""
    crash = {"pool": "one", "starts_at_s": 2.005, "duration_s": 20.0}
    overrides = {"fleet.pools.one.detect_s": 5.0, "fleet.pools.one.load_s": 3.0}
    overrides["fleet.pools.one.connection_errors"] = connection_errors
    rows = [{"arrived_at_s": float(t)} for t in range(1, 29)]
    played = _play(tmp_path, rows, [SHED] * 28, overrides, [crash])
    legal = [bool(view.legal[ONE]) for view in played.views]
    assert legal == [t <= 7.005 or t >= 25.005 for t in range(1, 29)]
    age = [float(view.signals[v.TELEMETRY_AGE_S, ONE]) for view in played.views]
    assert max(age[:2]) <= 1.0 and age[20] > 19.0 and max(age[26:]) <= 2.0


def test_a_hanging_request_comes_back_when_the_failure_is_detected(tmp_path):
    overrides = {"fleet.pools.one.detect_s": 5.0, "fleet.pools.one.connection_errors": False}
    played = _play(tmp_path, [REQUEST], [ONE, TWO_B], overrides, [CRASH])
    assert played.infos[0]["now_s"] == 5.505
    assert not played.views[1].legal[ONE]


def test_a_hanging_request_is_bought_out_at_the_horizon(tmp_path):
    overrides = {"fleet.pools.one.detect_s": 500.0, "fleet.pools.one.connection_errors": False}
    played = _play(tmp_path, [REQUEST], [ONE], overrides, [CRASH | {"duration_s": 500.0}])
    assert played.count("served") == 1
    assert played.usd("api_spend") == pytest.approx(-(100 * 50e-6 + 100 * 100e-6))
    assert played.env.worlds.fleet.requests["completed_at_s"][0, 0] == pytest.approx(60.0 + 0.5 + 99 * 0.02)


def test_without_a_provider_what_hangs_at_the_horizon_has_failed(tmp_path):
    overrides = {"fleet.pools.one.detect_s": 500.0, "fleet.pools.one.connection_errors": False}
    overrides["fleet.providers"] = {}
    played = _play(tmp_path, [REQUEST], [ONE], overrides, [CRASH | {"duration_s": 500.0}])
    assert (played.count("served"), played.count("failed"), played.count("shed")) == (0, 1, 0)


@pytest.mark.parametrize(("error_after_s", "now_s"), [(0.0, 1.0), (3.0, 4.0)])
def test_calls_in_an_outage_come_back(tmp_path, error_after_s, now_s):
    """Nobody else arrives in between: the world stops for the error itself."""
    overrides = {"fleet.providers.api.error_after_s": error_after_s}
    outage = {"provider": "api", "starts_at_s": 0.5, "duration_s": 2.0}
    played = _play(tmp_path, [{**REQUEST, "arrived_at_s": 1.0}], [API, TWO_A], overrides, [outage])
    assert played.infos[0]["now_s"] == now_s
    assert played.usd("api_spend") == 0.0  # an error is not billed
    assert (played.count("retries"), played.count("served")) == (1, 1)
    assert played.views[1].legal[API]  # the rate limit still has room, and nobody tells a gateway about outages
    assert played.views[1].signals[v.RECENT_ERRORS, API] == pytest.approx(0.2)


def test_slow_spells(tmp_path):
    """The pool takes 3 times as long from the start; the API from 10 s to 20 s."""
    faults = [
        {"pool": "one", "starts_at_s": 0.0, "duration_s": 100.0, "slowdown": 3.0},
        {"provider": "api", "starts_at_s": 10.0, "duration_s": 10.0, "slowdown": 4.0},
    ]
    rows = [{**REQUEST, "arrived_at_s": t} for t in (0.0, 5.0, 15.0, 25.0)]
    played = _play(tmp_path, rows, [ONE, API, API, API], faults=faults)
    requests = played.env.worlds.fleet.requests[0, :4]
    e2e_s = requests["completed_at_s"] - requests["dispatched_at_s"]
    np.testing.assert_allclose(e2e_s, [3.0, 0.5 + 99 * 0.02, 4 * (0.5 + 99 * 0.02), 0.5 + 99 * 0.02])


def test_tokens_per_minute_are_a_legal_mask(tmp_path):
    """600 tokens a minute, 100 at once: after a prompt of 90 the next one of 50 has to wait for 4 s."""
    rows = [{"prompt_tokens": 90, "output_tokens": 1}, *({"prompt_tokens": 50, "arrived_at_s": t} for t in (3.9, 4.2))]
    overrides = {"fleet.providers.api.tokens_per_minute": 600.0}
    played = _play(tmp_path, rows, [API, SHED, SHED], overrides)
    assert [bool(view.legal[API]) for view in played.views] == [True, False, True]


def _scaled(tmp_path, targets, overrides=None, horizon_s=60.0):
    """An episode in which pool `two` (2 replicas, 2 GPUs each at 3.60 USD) gets a target at each of some times."""
    scenario = by_hand.scenario(tmp_path, {"fleet.pools.two.max_replicas": 4, **(overrides or {})})
    worlds = FleetWorlds(scenario, 1)
    worlds.load(0, workload(scenario, *({"arrived_at_s": t} for t in targets), horizon_s=horizon_s))
    seen = {}
    for now_s, target in targets.items():
        assert worlds.desks["now_s"][0] == now_s
        worlds.set_replicas(np.array([1, target]))
        seen[now_s] = worlds.legal[0, 1:5].tolist()
        worlds.step(np.array([worlds.legal.shape[1] - 1]))
    assert worlds.done.all()
    return worlds, seen


def test_gpu_hours_are_the_integral_of_what_is_powered(tmp_path):
    """Pool `two`: 2 replicas to 10 s, 4 to 30 s, 1 to 40 s, 3 to the horizon at 60 s; `one` all the time."""
    targets = {10.0: 4, 30.0: 1, 40.0: 3}
    worlds, _ = _scaled(tmp_path, targets, {"fleet.pools.two.load_s": 5.0})
    replica_s = 2 * 10 + 4 * 20 + 1 * 10 + 3 * 20
    expected = (60.0 * 1 + replica_s * 2) * 3.6 / 3600.0
    gpu_usd = worlds.ledger_usd[0, list(by_hand.ACCOUNTS).index("gpu_hours"), -1]
    assert gpu_usd == pytest.approx(-expected, rel=1e-12)
    assert worlds.own["powered_s"][0, 1:5].sum() == pytest.approx(replica_s)
    seat_usd = worlds.ledger_usd[0, list(by_hand.ACCOUNTS).index("seat_revenue")].sum()
    assert seat_usd == pytest.approx(SEAT_USD_PER_S * 60.0)


def test_reserved_replicas_have_their_own_price_and_are_paid_always(tmp_path):
    overrides = {"fleet.pools.two.reserved_replicas": 2, "fleet.pools.two.reserved_gpu_usd_per_hour": 1.8}
    overrides["fleet.pools.two.min_replicas"] = 0
    worlds, seen = _scaled(tmp_path, {0.0: 0, 20.0: 3, 50.0: 0}, overrides)
    assert seen[0.0] == [False] * 4
    gpu_usd = worlds.ledger_usd[0, list(by_hand.ACCOUNTS).index("gpu_hours"), -1]
    assert gpu_usd == pytest.approx(-(60.0 * 3.6 + 2 * 2 * 60.0 * 1.8 + 2 * 30.0 * 3.6) / 3600.0, rel=1e-12)


def test_only_active_replicas_are_legal(tmp_path):
    overrides = {"fleet.pools.two.provision_s": 10.0, "fleet.pools.two.load_s": 5.0}
    _, seen = _scaled(tmp_path, {0.0: 3, 14.9: 3, 15.0: 3, 20.0: 1}, overrides)
    assert seen == {
        0.0: [True, True, False, False],
        14.9: [True, True, False, False],
        15.0: [True, True, True, False],
        20.0: [True, False, False, False],
    }


def test_the_episode_of_a_fleet_that_could_scale_but_does_not_is_that_of_one_that_cannot(tmp_path):
    """Rows for replicas that never start change no outcome and no cent."""
    rows = [{"arrived_at_s": 0.3 * i, "output_tokens": 40 + i} for i in range(60)]
    totals = []
    for overrides in ({}, {"fleet.pools.two.max_replicas": 5}):
        scenario = by_hand.scenario(tmp_path, overrides)
        worlds = FleetWorlds(scenario, 1)
        worlds.load(0, workload(scenario, *rows))
        worlds.run(LeastInFlight("least-in-flight"))
        totals.append((worlds.ledger_usd[0].copy(), worlds.counts[0].copy(), worlds.utilisation[0].copy()))
    np.testing.assert_allclose(totals[1][0], totals[0][0], rtol=1e-12)
    np.testing.assert_array_equal(totals[1][1], totals[0][1])
    np.testing.assert_allclose(totals[1][2], totals[0][2], rtol=1e-12)


def test_none_restores_the_size_at_the_start(tmp_path):
    scenario = by_hand.scenario(tmp_path, {"fleet.pools.two.max_replicas": 4})
    worlds = FleetWorlds(scenario, 1)
    worlds.load(0, workload(scenario, {"arrived_at_s": 1.0}))
    worlds.set_replicas(np.array([[1, 4]]))
    assert worlds.legal[0, :5].all()
    worlds.set_replicas(None)
    assert worlds.legal[0, :5].tolist() == [True, True, True, False, False]


def _view_with_errors(hand_env, scenario, errors):
    hand_env.reset(options={"workload": workload(scenario, {})})
    view = hand_env.view
    view.signals[v.RECENT_ERRORS, list(errors)] = list(errors.values())
    return view


def test_errors_count_as_lost_value(hand_env, hand_scenario):
    """Expected margin falls by e (revenue + unserved credit - refunds - credits), whatever happens to the retry."""
    rule = MarginRule("expected-margin", MarginParameters((0.0,) * 3))
    clean = rule.assess(_view_with_errors(hand_env, hand_scenario, {}))
    failing = rule.assess(_view_with_errors(hand_env, hand_scenario, {ONE: 0.5}))
    assert failing.stay[ONE] == pytest.approx(0.5 * clean.stay[ONE])
    cost, unserved = clean.parts_usd[0, ONE], float(clean.unserved_usd)
    gain = clean.margin_usd[ONE] + unserved + cost
    assert failing.margin_usd[ONE] == pytest.approx(0.5 * gain - unserved - cost)


def test_rules_of_thumb_let_a_failing_candidate_cool_down(hand_env, hand_scenario):
    """Else least-in-flight would send everything to the replica that is empty because it is dead."""
    rule = LeastInFlight("least-in-flight")
    view = _view_with_errors(hand_env, hand_scenario, {ONE: 0.36})
    view.signals[v.IN_FLIGHT, [TWO_A, TWO_B]] = 5.0, 4.0
    assert rule.decide_batch(view) == TWO_B
    view.signals[v.RECENT_ERRORS, ONE] = 0.2
    assert rule.decide_batch(view) == ONE
    view.signals[v.RECENT_ERRORS, [ONE, TWO_A, TWO_B]] = 0.9
    assert rule.decide_batch(view) in (ONE, TWO_A, TWO_B, API)  # still better than shedding


def test_errors_fade_by_half_every_ten_seconds(tmp_path):
    rows = [REQUEST, *({"arrived_at_s": 0.505 + t} for t in (10.0, 20.0))]
    played = _play(tmp_path, rows, [ONE, TWO_A, SHED, SHED], faults=[CRASH])
    shares = [view.signals[v.RECENT_ERRORS, ONE] for view in played.views]
    np.testing.assert_allclose(shares, [0.0, 0.2, 0.1, 0.05])


def test_an_answer_halves_the_doubt_less_than_an_error_raises_it(tmp_path):
    """0.2 after the error; an answer 1 s later leaves 0.2 * 2^-0.1 * 4/5."""
    outage = {"provider": "api", "starts_at_s": 0.0, "duration_s": 0.1}
    rows = [{"output_tokens": 1}, {"arrived_at_s": 0.5, "output_tokens": 1}, {"arrived_at_s": 1.0}]
    played = _play(tmp_path, rows, [API, SHED, API, SHED], faults=[outage])
    assert played.views[3].signals[v.RECENT_ERRORS, API] == pytest.approx(0.2 * math.pow(0.5, 0.1) * 0.8)
