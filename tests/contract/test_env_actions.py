"""Each kind of action chosen once, and what it does to the world and the ledger; in-flight caps of the decider."""

import by_hand
import numpy as np
import pytest
from by_hand import API, CACHE, DEFER, METERED, NIGHT, ONE, SHED, TWO_A, TWO_B, Played, workload

from envs.fleet.state import NO_CAP
from envs.fleet_env import FleetEnv
from envs.plant import Plant
from envs.worlds import FleetWorlds
from marginroute import view as v
from marginroute.errors import InputError


def episode(env, *rows, **kwargs):
    return workload(env.worlds.plant.scenario, *rows, **kwargs)


def test_candidates_and_kinds(hand_env):
    layout = hand_env.worlds.plant.layout
    assert layout.names == ("one/0", "two/0", "two/1", "api", "cache", "defer", "shed")
    assert [v.KINDS[kind] for kind in layout.kind] == ["replica"] * 3 + ["provider", "cache", "defer", "shed"]
    assert layout.tier.tolist() == [0, 1, 1, 2, -1, -1, -1]
    assert hand_env.action_space.n == 7


@pytest.mark.parametrize(("choice", "tier"), [(ONE, 0), (TWO_A, 1), (TWO_B, 1)])
def test_replica_answers_with_its_own_tier(hand_env, choice, tier):
    good = [0, 0, 0]
    good[tier] = 1
    played = Played(hand_env, episode(hand_env, {"good": good}), [choice])
    assert played.actions.tolist() == [1, 0, 0, 0, 0]
    assert played.count("good") == 1 and played.usd("energy") < 0.0
    request = hand_env.worlds.fleet.requests[0, 0]
    assert request["first_token_at_s"] == pytest.approx(0.01) and request["completed_at_s"] == pytest.approx(0.11)
    busy = hand_env.worlds.utilisation[0]
    assert busy == pytest.approx([0.11 / 60.0, 0.0] if choice == ONE else [0.0, 0.11 / 60.0 / 2])


def test_provider_answers_at_its_price_and_pace(hand_env):
    played = Played(hand_env, episode(hand_env, {"good": [0, 0, 1]}), [API])
    assert played.actions.tolist() == [0, 1, 0, 0, 0]
    assert played.count("good") == 1
    assert played.usd("api_spend") == pytest.approx(-0.0061) and played.usd("energy") == 0.0
    request = hand_env.worlds.fleet.requests[0, 0]
    assert request["completed_at_s"] == pytest.approx(0.5 + 10 * 0.02)


def test_provider_noise_is_lognormal_around_the_median(tmp_path):
    keys = {"fleet.providers.api.ttft_sigma": 0.4, "fleet.providers.api.tpot_sigma": 0.2}
    env = FleetEnv(by_hand.scenario(tmp_path, keys))
    Played(env, episode(env, {"provider_noise": [1.0, -1.0]}), [API])
    request = env.worlds.fleet.requests[0, 0]
    assert request["first_token_at_s"] == pytest.approx(0.5 * np.exp(0.4))
    decode_s = request["completed_at_s"] - request["first_token_at_s"]
    assert decode_s == pytest.approx(10 * 0.02 * np.exp(-0.2))


def test_provider_is_illegal_out_of_its_rate_limit(hand_env):
    """Two calls at once, then one more every ten seconds."""
    rows = [{"arrived_at_s": t} for t in (0.0, 1.0, 2.0, 9.0, 10.5)]
    played = Played(hand_env, episode(hand_env, *rows), [API, API, ONE, ONE, API])
    assert [bool(view.legal[API]) for view in played.views] == [True, True, False, False, True]
    assert played.count("failed") == 0


def test_cache_answer(hand_env):
    """Stored when the first answer is complete, for the same tenant, until 20 s after."""
    rows = [
        {"prompt_key": 0, "good": [0, 1, 1], "p_good_prior": [0.2, 0.6, 0.9]},
        {"prompt_key": 0, "arrived_at_s": 0.05},  # not complete yet
        {"prompt_key": 0, "arrived_at_s": 1.0, "p_good_prior": [0.2, 0.6, 0.9]},
        {"prompt_key": 0, "arrived_at_s": 2.0, "tenant_index": 1},
        {"prompt_key": -1, "arrived_at_s": 3.0},
        {"prompt_key": 0, "arrived_at_s": 20.5},
    ]
    played = Played(hand_env, episode(hand_env, *rows), [TWO_A, SHED, CACHE, SHED, SHED, SHED])
    assert [bool(view.legal[CACHE]) for view in played.views] == [False, False, True, False, False, False]
    assert played.views[2].signals[v.P_GOOD_PRIOR, CACHE] == 0.6
    assert played.views[1].signals[v.P_GOOD_PRIOR, CACHE] == 0.0
    assert played.actions.tolist() == [1, 0, 1, 0, 4]
    assert played.count("good") == 2  # the strong tier's good answer, again
    assert played.usd("cache") == pytest.approx(-0.001)
    assert played.count("slo_ok") == 2


def test_cache_repeats_a_bad_answer(hand_env):
    rows = [{"prompt_key": 0, "good": [0, 1, 1]}, {"prompt_key": 0, "good": [0, 1, 1], "arrived_at_s": 1.0}]
    played = Played(hand_env, episode(hand_env, *rows), [ONE, CACHE])
    assert played.count("good") == 0
    assert played.usd("refunds") == pytest.approx(-2 * (0.5 * 0.21 + 0.02))


def test_cache_evicts_the_least_recently_used(hand_env):
    """Room for two: a hit on the older keeps it, and the other one leaves."""
    keys = [0, 1, 0, 2, 0, 1]
    rows = [{"prompt_key": key, "arrived_at_s": float(t)} for t, key in enumerate(keys)]
    played = Played(hand_env, episode(hand_env, *rows), [ONE, ONE, CACHE, ONE, CACHE, SHED])
    assert [bool(view.legal[CACHE]) for view in played.views] == [False, False, True, False, True, False]
    assert played.usd("cache") == pytest.approx(-3 * 0.001)


def test_defer_and_later_release(hand_env):
    """Held for 4 s, offered again, answered then; the wait counts for E2E."""
    rows = [{"class_index": NIGHT}, {"arrived_at_s": 1.0}]
    played = Played(hand_env, episode(hand_env, *rows), [DEFER, ONE, TWO_A])
    assert played.actions.tolist() == [2, 0, 0, 1, 0]
    assert [view.request[v.WAITED_S] for view in played.views] == pytest.approx([0.0, 0.0, 4.0])
    assert [view.request[v.CLASS_INDEX] for view in played.views] == [NIGHT, METERED, NIGHT]
    assert [view.request[v.DEADLINE_LEFT_S] for view in played.views] == pytest.approx([20.0, np.inf, 16.0])
    assert played.count("deferred", NIGHT) == 1 and played.count("first_calls", NIGHT) == 1
    request = hand_env.worlds.fleet.requests[0, 0]
    assert request["dispatched_at_s"] == pytest.approx(4.0) and request["completed_at_s"] == pytest.approx(4.11)
    assert played.count("served", NIGHT) == 1 and played.count("e2e_ok", NIGHT) == 1
    assert [info["now_s"] for info in played.infos] == pytest.approx([1.0, 4.0, 60.0])
    assert [info["elapsed_s"] for info in played.infos] == pytest.approx([1.0, 3.0, 56.0])


def test_defer_is_legal_while_the_deadline_leaves_room(hand_env):
    """20 s to the deadline, 4 s in the queue, and at least as long for the answer: legal at 0, 4 and 8 s."""
    played = Played(hand_env, episode(hand_env, {"class_index": NIGHT}), [DEFER, DEFER, DEFER, ONE])
    assert [bool(view.legal[DEFER]) for view in played.views] == [True, True, True, False]
    assert played.count("deferred") == 3
    assert hand_env.worlds.fleet.requests[0, 0]["dispatched_at_s"] == pytest.approx(12.0)


def test_nothing_is_gained_by_parking_work_at_the_end(hand_env):
    """Held at the horizon of 10 s: bought from the API then, in the last reward."""
    played = Played(hand_env, episode(hand_env, {"class_index": NIGHT}, horizon_s=10.0), [DEFER, DEFER, DEFER])
    assert played.usd("api_spend") == pytest.approx(-0.0061)
    assert played.count("served", NIGHT) == 1
    assert hand_env.worlds.fleet.requests[0, 0]["completed_at_s"] == pytest.approx(10.0 + 0.5 + 10 * 0.02)
    assert played.rewards[-1] == pytest.approx(0.105 - 0.0061 + 2.0 * (by_hand.SEAT_USD_PER_S - 0.005))


def test_backlog_is_settled_in_the_last_reward(hand_env):
    """A request that arrives just before the horizon is answered after it, and paid."""
    played = Played(hand_env, episode(hand_env, {"arrived_at_s": 59.99, "output_tokens": 401}), [ONE])
    assert hand_env.worlds.fleet.requests[0, 0]["completed_at_s"] == pytest.approx(59.99 + 4.01)
    assert played.usd("usage_revenue") == pytest.approx(0.1 + 4.01)
    assert played.usd("gpu_hours") == pytest.approx(-0.3)
    assert hand_env.worlds.utilisation[0] == pytest.approx([0.01 / 60.0, 0.0])


def test_shed(hand_env):
    played = Played(hand_env, episode(hand_env, {}), [SHED])
    assert played.actions.tolist() == [0, 0, 0, 0, 1]
    assert played.count("shed") == 1 and played.infos[-1]["illegal"] == 0
    assert played.usd("unserved_credits") < 0.0


@pytest.mark.parametrize("choice", [CACHE, DEFER, 7, 1000, -1, -7])
def test_an_illegal_index_sheds(hand_env, choice):
    shed = Played(hand_env, episode(hand_env, {}), [SHED])
    played = Played(hand_env, episode(hand_env, {}), [choice])
    assert played.infos[-1]["illegal"] == 1
    np.testing.assert_array_equal(played.ledger_usd, shed.ledger_usd)
    np.testing.assert_array_equal(played.counts, shed.counts)
    np.testing.assert_array_equal(played.actions, shed.actions)


THREE = [{"arrived_at_s": t, "output_tokens": 31} for t in (0.0, 0.015, 0.025)]


def test_a_cap_holds_requests_in_the_gateway(hand_env):
    """One at a time, 0.31 s each: first tokens at 0.01, 0.32 and 0.63 s; the last one misses its 0.4 s."""
    played = Played(hand_env, episode(hand_env, *THREE), [ONE] * 3, in_flight_caps={"one": 1})
    assert [view.signals[v.HELD, ONE] for view in played.views] == [0, 0, 1]
    assert [view.signals[v.IN_FLIGHT, ONE] for view in played.views] == [0, 1, 2]
    assert [view.signals[v.IN_FLIGHT_CAP, ONE] for view in played.views] == [1, 1, 1]
    first_s = hand_env.worlds.fleet.requests["first_token_at_s"][0, :3]
    assert first_s == pytest.approx([0.01, 0.32, 0.63])
    assert played.count("ttft_ok") == 2
    assert played.usd("slo_credits") == pytest.approx(-0.2 * (0.1 + 0.31))


def test_without_a_cap_they_share_the_batch(hand_env):
    played = Played(hand_env, episode(hand_env, *THREE), [ONE] * 3)
    first_s = hand_env.worlds.fleet.requests["first_token_at_s"][0, :3]
    assert first_s == pytest.approx([0.01, 0.03, 0.04])
    assert played.count("ttft_ok") == 3 and played.usd("slo_credits") == 0.0


def test_a_cap_of_one_pool_leaves_the_others(hand_env):
    played = Played(hand_env, episode(hand_env, *THREE), [TWO_A] * 3, in_flight_caps={"one": 1})
    assert played.count("ttft_ok") == 3
    assert [view.signals[v.HELD, TWO_A] for view in played.views] == [0, 0, 0]


def test_a_cap_set_between_steps_releases_at_once(hand_env):
    hand_env.reset(options={"workload": episode(hand_env, *THREE), "in_flight_caps": {"one": 1}})
    hand_env.step(ONE)
    hand_env.step(ONE)
    assert hand_env.view.signals[v.HELD, ONE] == 1
    hand_env.set_in_flight_caps({"one": 8})
    assert hand_env.worlds.fleet.replicas["held"][0, 0] == 0
    hand_env.step(ONE)
    first_s = hand_env.worlds.fleet.requests["first_token_at_s"][0, :3]
    assert first_s == pytest.approx([0.01, 0.04, 0.04])


def test_caps_last_one_episode(hand_env):
    Played(hand_env, episode(hand_env, *THREE), [ONE] * 3, in_flight_caps={"one": 1})
    played = Played(hand_env, episode(hand_env, *THREE), [ONE] * 3)
    assert played.count("ttft_ok") == 3


@pytest.mark.parametrize(("caps", "words"), [({"tow": 1}, "'tow'; legal: one, two"), ({"one": 0}, "is 0; legal is 1")])
def test_illegal_caps_are_refused(hand_env, caps, words):
    with pytest.raises(InputError, match=words):
        hand_env.reset(options={"in_flight_caps": caps})


def test_worlds_start_with_the_configured_caps(tmp_path):
    """Nobody set a cap: replicas have that of their pool, in the View too."""
    plant = Plant(by_hand.scenario(tmp_path, {"fleet.pools.two.in_flight_cap": 3}))
    worlds = FleetWorlds(plant, 2)
    worlds.load_all([workload(plant.scenario, {})] * 2)
    assert worlds.fleet.replicas["in_flight_cap"].tolist() == [[NO_CAP, 3, 3]] * 2
    assert worlds.signals[v.IN_FLIGHT_CAP, 0, :3].tolist() == [NO_CAP, 3, 3]
