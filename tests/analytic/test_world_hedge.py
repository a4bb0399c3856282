"""Hedging on paper: when a call is sent twice, who answers, and what both calls cost.

A request of 100 prompt and 11 output tokens alone on a replica has its first token after 0.01 s and its last after
0.11 s; the API takes 0.5 s and 0.02 s per further token. Class `metered` hedges after 0.2 s.
"""

import dataclasses

import by_hand
import numpy as np
import pytest
from by_hand import API, CACHE, DEFER, METERED, NIGHT, ONE, SEATS, SHED, TWO_A, TWO_B, Played, workload

from envs.fleet.state import ABANDONED, COMPLETED
from envs.fleet_env import FleetEnv
from envs.fluid_worlds import FluidWorlds
from envs.plant import Plant
from envs.scenario import load_scenario
from envs.worlds import FleetWorlds
from marginroute import view as v
from marginroute.errors import InputError

AFTER_S = 0.2
HEDGING = {"plans.classes.metered.hedge_after_s": AFTER_S}
API_PROMPT_USD, ONE_PROMPT_USD, TWO_PROMPT_USD = 100 * 50e-6, 100 * 10e-6, 100 * 30e-6
API_USD, ONE_USD, TWO_USD = API_PROMPT_USD + 11 * 100e-6, ONE_PROMPT_USD + 11 * 20e-6, TWO_PROMPT_USD + 11 * 40e-6


def play(tmp_path, choices, *rows, overrides=None, faults=(), **keys):
    """The episode of the given requests (one, if none is given) under hedging and faults."""
    changes = HEDGING | ({"fleet.faults": list(faults)} if faults else {}) | (overrides or {})
    world = by_hand.scenario(tmp_path, changes)
    made = workload(world, *(rows or ({},)), **keys)
    if faults:
        made = dataclasses.replace(made, faults=world.generate(0).faults)
    return Played(FleetEnv(world), made, choices)


def slow(pool, times, **keys):
    return {"pool": pool, "starts_at_s": 0.0, "duration_s": 50.0, "slowdown": times} | keys


def request_of(played, i=0):
    return played.env.worlds.fleet.requests[0, i]


def spent(played):
    return {"api": -played.usd("api_spend"), "energy": -played.usd("energy")}


def counted(played):
    return {name: played.count(name) for name in ("calls", "served", "hedged", "hedges_won", "retries")}


ONCE = {"calls": 1, "served": 1, "hedged": 1, "hedges_won": 0, "retries": 0}


def test_the_second_call_answers_and_both_are_paid(tmp_path):
    """The API would take 0.5 s; `one` gets the request at 0.2 s. The API bills its prompt."""
    played = play(tmp_path, [API, ONE])
    assert [info["now_s"] for info in played.infos] == [AFTER_S, 60.0]
    assert request_of(played)["first_token_at_s"] == pytest.approx(AFTER_S + 0.01)
    assert request_of(played)["completed_at_s"] == pytest.approx(AFTER_S + 0.11)
    assert played.env.worlds.loads["answered_by"][0, 0] == ONE
    assert counted(played) == ONCE | {"hedges_won": 1} and played.count("ttft_ok") == 1
    assert spent(played) == pytest.approx({"api": API_PROMPT_USD, "energy": ONE_USD})
    assert sum(played.rewards) == pytest.approx(played.ledger_usd.sum(), abs=1e-12)
    assert played.actions[[v.REPLICA, v.PROVIDER]].tolist() == [1, 1]


def test_a_hedge_that_loses_is_cancelled_and_charged(tmp_path):
    """`one` is a hundred times as slow, its prefill from 0.2 s on takes 1 s; the API answers at 0.5 s."""
    played = play(tmp_path, [API, ONE], faults=[slow("one", 100.0)])
    assert request_of(played)["first_token_at_s"] == pytest.approx(0.5)
    assert played.env.worlds.loads["answered_by"][0, 0] == API and counted(played) == ONCE
    assert spent(played) == pytest.approx({"api": API_USD, "energy": ONE_PROMPT_USD})
    spare = request_of(played, 1)
    assert (spare["status"], spare["completed_at_s"]) == (ABANDONED, pytest.approx(1.2))


def test_waiting_costs_nothing(tmp_path):
    played = play(tmp_path, [API, API])
    assert request_of(played)["first_token_at_s"] == pytest.approx(0.5)
    assert counted(played) == ONCE | {"hedged": 0} and spent(played) == pytest.approx({"api": API_USD, "energy": 0.0})
    assert played.actions.sum() == 1 and len(played.rewards) == 2


@pytest.mark.parametrize("choice", [CACHE, DEFER, SHED, -1, 99])
def test_an_illegal_choice_is_to_wait(tmp_path, choice):
    played = play(tmp_path, [API, choice])
    assert counted(played) == ONCE | {"hedged": 0} and played.infos[-1]["illegal"] == 1
    assert played.count("shed") == 0


def test_what_waits_in_line_costs_nothing(tmp_path):
    """`one` takes one request at a time and is busy for 4 s: the second call is never looked at, and dropped then."""
    rows = [{"output_tokens": 400, "class_index": SEATS}, {}]
    played = play(tmp_path, [ONE, API, ONE], *rows, overrides={"fleet.pools.one.max_num_seqs": 1})
    energy = -played.usd("energy", METERED)
    assert (energy, -played.usd("api_spend")) == pytest.approx((0.0, API_USD))
    assert request_of(played, 3)["completed_at_s"] == pytest.approx(4.0)


def test_a_slow_replica_is_left_behind(tmp_path):
    """Slow by 100: its prefill would take 1 s. What it has prefilled then is energy; the answer comes from `two`."""
    played = play(tmp_path, [ONE, TWO_B], faults=[slow("one", 100.0)])
    assert request_of(played)["first_token_at_s"] == pytest.approx(AFTER_S + 0.01)
    assert spent(played) == pytest.approx({"api": 0.0, "energy": ONE_PROMPT_USD + TWO_USD})
    assert counted(played) == ONCE | {"hedges_won": 1}


def test_a_stuck_replica_is_left_behind(tmp_path):
    """It hangs from 0.005 s on, in the middle of the prefill, and is detected at 10 s: no retry, one answer."""
    crash = {"pool": "one", "starts_at_s": 0.005, "duration_s": 40.0}
    hang = {"fleet.pools.one.connection_errors": False, "fleet.pools.one.detect_s": 10.0}
    played = play(tmp_path, [ONE, TWO_A], faults=[crash], overrides=hang)
    assert request_of(played)["first_token_at_s"] == pytest.approx(AFTER_S + 0.01)
    assert counted(played) == ONCE | {"hedges_won": 1} and request_of(played)["status"] == COMPLETED
    assert spent(played) == pytest.approx({"api": 0.0, "energy": ONE_PROMPT_USD + TWO_USD})


@pytest.mark.parametrize("lost", ["first", "second"])
def test_a_call_that_is_lost_leaves_the_other_alone(tmp_path, lost):
    """`one`, ten times as slow, crashes at 0.25 s; nothing is tried again. The API answers at 0.5 s, or at 0.7 s."""
    faults = [slow("one", 50.0), {"pool": "one", "starts_at_s": 0.25, "duration_s": 10.0}]
    choices, first_token_at_s = ([ONE, API], 0.7) if lost == "first" else ([API, ONE], 0.5)
    played = play(tmp_path, choices, faults=faults)
    assert request_of(played)["first_token_at_s"] == pytest.approx(first_token_at_s)
    assert counted(played) == ONCE and played.count("failed") == 0
    assert spent(played) == pytest.approx({"api": API_USD, "energy": ONE_PROMPT_USD})
    assert played.env.worlds.own["error_share"][0, ONE] == pytest.approx(0.2)


def test_two_that_are_lost_are_one_attempt(tmp_path):
    """Both crash at 0.25 s: one retry, which has a timer of its own."""
    down = [{"pool": pool, "starts_at_s": 0.25, "duration_s": 50.0} for pool in ("one", "two")]
    faults = [slow("one", 50.0), slow("two", 50.0), *down]
    played = play(tmp_path, [ONE, TWO_A, API, TWO_B], faults=faults)
    assert [info["now_s"] for info in played.infos] == pytest.approx([0.2, 0.25, 0.45, 60.0])
    assert counted(played) == ONCE | {"hedged": 2, "hedges_won": 1, "retries": 1}
    assert request_of(played)["first_token_at_s"] == pytest.approx(0.45 + 0.01)


def test_of_two_first_tokens_at_once_the_first_call_stays(tmp_path):
    """`one` is 30 times as slow: 0.2 + 0.3 s is when the API answers. It has streamed one token."""
    played = play(tmp_path, [API, ONE], faults=[slow("one", 30.0)])
    assert request_of(played)["first_token_at_s"] == request_of(played, 1)["first_token_at_s"] == 0.5
    assert counted(played) == ONCE
    assert spent(played) == pytest.approx({"api": API_USD, "energy": ONE_PROMPT_USD + 20e-6})
    assert request_of(played, 1)["completed_at_s"] == 0.5


def test_users_leave_both_calls(tmp_path):
    played = play(tmp_path, [API, ONE], {"patience_s": 0.3}, faults=[slow("one", 100.0)])
    assert (played.count("abandoned"), played.count("served"), played.count("hedged")) == (1, 0, 1)
    assert spent(played) == pytest.approx({"api": API_PROMPT_USD, "energy": ONE_PROMPT_USD})


def test_at_the_horizon_the_race_is_run_to_its_end(tmp_path):
    for choices, won, first_token_at_s in (([API, TWO_A], 1, 60.0), ([API, ONE], 0, 60.29)):
        played = play(tmp_path, choices, {"arrived_at_s": 59.79}, faults=[slow("one", 100.0, duration_s=99.0)])
        assert counted(played) == ONCE | {"hedges_won": won}
        assert request_of(played)["first_token_at_s"] == pytest.approx(first_token_at_s)


def test_follow_ups_wait_for_the_answer(tmp_path):
    rows = [{"session_index": 0}, {"session_index": 0, "parent_index": 0, "think_s": 1.0}]
    played = play(tmp_path, [API, ONE, ONE], *rows)
    assert played.infos[1]["now_s"] == pytest.approx(AFTER_S + 0.11 + 1.0)
    assert played.views[2].signals[v.SESSION_IDLE_S, ONE] == pytest.approx(0.11 + 1.0 + AFTER_S)


def test_what_a_verifier_turns_down_is_asked_again_and_hedged_again(tmp_path):
    """Answered by the second call; asked again at the API, and hedged again while its cancelled call is gone."""
    verifier = {"sensitivity": 0.9, "specificity": 0.8, "max_attempts": 2, "verify_s": 0.05}
    world = by_hand.scenario(tmp_path, HEDGING | {"fleet.verifiers": {"tests": verifier}})
    made = dataclasses.replace(workload(world, {}), attempt_luck=np.full((1, 2, 3), [-6.0, 1.0, 1.0]))
    played = Played(FleetEnv(world), made, [API, ONE, API, TWO_A])
    asked_s = AFTER_S + 0.11 + 0.05
    assert [info["now_s"] for info in played.infos] == pytest.approx([AFTER_S, asked_s, asked_s + AFTER_S, 60.0])
    assert counted(played) == ONCE | {"hedged": 2, "hedges_won": 2} and played.count("turned_down") == 1
    assert played.views[3].signals[v.TRIED, :4].tolist() == [1.0, 0.0, 0.0, 1.0]
    assert not played.views[3].legal[CACHE]
    assert spent(played) == pytest.approx({"api": 2 * API_PROMPT_USD, "energy": ONE_USD + TWO_USD})


def test_the_view_says_where_the_request_is(tmp_path):
    played = play(tmp_path, [API, API, ONE], {}, {"arrived_at_s": 5.0})
    first, second, third = played.views
    assert first.legal[SHED] and third.legal[SHED]
    assert second.legal.tolist() == [True] * 4 + [False] * 3
    assert second.signals[v.UNDER_WAY_S].tolist() == [0.0, 0.0, 0.0, AFTER_S, 0.0, 0.0, 0.0]
    assert second.signals[v.TRIED].tolist() == [0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0]
    assert second.request[v.WAITED_S] == AFTER_S and second.signals[v.IN_FLIGHT, API] == 1.0
    for other in (first, third):
        assert not other.signals[[v.UNDER_WAY_S, v.TRIED]].any()


def test_there_is_no_decision_where_nobody_else_may(tmp_path):
    """Entitled to the API alone; another class does not hedge; an answer has begun."""
    overrides = {"plans.classes.metered.entitlements": {"stations": ["api"]}}
    assert len(play(tmp_path, [API], overrides=overrides).rewards) == 1
    assert len(play(tmp_path, [API], {"class_index": SEATS}).rewards) == 1
    assert len(play(tmp_path, [ONE], {"output_tokens": 400}).rewards) == 1


def test_a_request_that_lost_its_row_is_not_hedged_again_before_it_is_free(tmp_path):
    """The first call hangs at `one`; the second one is lost and tried again: no timer comes to a decision then."""
    hang = {"fleet.pools.one.connection_errors": False, "fleet.pools.one.detect_s": 50.0}
    faults = [{"pool": "one", "starts_at_s": 0.005, "duration_s": 55.0}]
    faults.append({"pool": "two", "index": 0, "starts_at_s": 0.25, "duration_s": 55.0})
    played = play(tmp_path, [ONE, TWO_A, API], faults=faults, overrides=hang)
    assert [info["now_s"] for info in played.infos] == pytest.approx([0.2, 0.25, 60.0])
    assert counted(played) == ONCE | {"hedges_won": 1, "retries": 1}
    assert request_of(played)["first_token_at_s"] == pytest.approx(0.75)


def test_batch_work_may_hedge_too(tmp_path):
    played = play(
        tmp_path,
        [DEFER, API, TWO_A],
        {"class_index": NIGHT, "deadline_s": 20.0},
        overrides={"plans.classes.night.hedge_after_s": 0.1},
    )
    assert [info["now_s"] for info in played.infos] == pytest.approx([4.0, 4.1, 60.0])
    assert played.views[2].signals[v.UNDER_WAY_S, API] == pytest.approx(0.1)


def test_a_timer_that_never_rings_changes_no_bit(tmp_path):
    """The rows for second calls are there, and nothing else happens: Views and ledger are the same to the bit."""
    played = []
    for overrides in ({}, {"plans.classes.metered.hedge_after_s": 1e6}):
        worlds = FleetWorlds(by_hand.scenario(tmp_path, overrides), 1)
        worlds.load(0, worlds.plant.scenario.generate(1))
        rng, bits = np.random.default_rng(0), []
        while not worlds.done[0]:
            view = worlds.view()
            bits.append(b"".join(np.ascontiguousarray(x).tobytes() for x in (view.signals, view.request, view.legal)))
            worlds.step(np.where(worlds.legal, rng.random(worlds.legal.shape), -1.0).argmax(axis=1))
        played.append((bits, worlds.ledger_usd.tobytes(), worlds.counts.tobytes()))
    assert played[0] == played[1] and len(played[0][0]) > 40


def test_the_view_does_not_know_what_is_coming(tmp_path):
    """Output length and quality are others: up to the race's end every View is the same to the bit."""
    world, seen = by_hand.scenario(tmp_path, HEDGING), []
    clock = [{"arrived_at_s": 0.05 * step, "class_index": SEATS} for step in range(1, 6)]
    for hidden in ({"output_tokens": 11}, {"output_tokens": 300, "good": [0, 0, 0], "p_good": [0.1] * 3}):
        worlds = FleetWorlds(world, 1)
        worlds.load(0, workload(world, {} | hidden, *clock))
        views = []
        while not worlds.done[0]:
            view, hedging = worlds.view(), worlds.desks["hedging"][0]
            views.append(b"".join(np.ascontiguousarray(x).tobytes() for x in (view.signals, view.request, view.legal)))
            worlds.step(np.array([TWO_A if hedging else API if len(views) == 1 else SHED]))
        seen.append(views)
    assert seen[0] == seen[1] and len(seen[0]) == 7


def test_each_gateway_instance_counts_its_own_second_call(tmp_path):
    """Of two instances the one that decides sees both calls of its own request, and none of the other's."""
    world = by_hand.scenario(tmp_path, HEDGING | {"fleet.gateways": 2})
    rows = [{}, *({"arrived_at_s": 0.25, "class_index": SEATS} for _ in range(6))]
    worlds = FleetWorlds(world, 1)
    worlds.load(0, workload(world, *rows))
    mine, seen = int(worlds.loads["gateway"][0, 0]), []
    for choice in [API, ONE, *[SHED] * 6]:
        seen.append((int(worlds.loads["gateway"][0, worlds.desks["current"][0]]), worlds.view().signals[:, 0].copy()))
        worlds.step(np.array([choice]))
    assert worlds.done[0] and len({gateway for gateway, _ in seen}) == 2
    for gateway, signals in seen[2:]:
        assert signals[v.IN_FLIGHT, [ONE, API]].tolist() == [float(gateway == mine), 0.0]
    assert (worlds.own["sent_head"] == -1).all()


def test_what_does_not_go_together_is_refused(tmp_path):
    plant = Plant(load_scenario("quickstart", {"plans.classes.team.hedge_after_s": 0.5}))
    with pytest.raises(InputError, match="hedge_after_s, which the fluid surrogate"):
        FluidWorlds(plant, 1)
