"""Sessions on paper: a follow-up arrives its think time after the answer before it, or never.

A request of 11 tokens alone on a replica is answered after 0.11 s, by the API after 0.5 + 10 * 0.02 = 0.7 s.
"""

import dataclasses

import numpy as np
import pytest
from by_hand import API, CACHE, DEFER, METERED, NIGHT, ONE, SEATS, SHED, TWO_A, play_timed, workload

from envs import world_sessions as sessions
from envs.worlds import FleetWorlds
from marginroute import view as v


def play(scenario, rows, choices, **options):
    """A played episode of requests of one session, and the times of its decisions."""
    episode = workload(scenario, *({"session_index": 0} | row for row in rows), **options)
    return play_timed(scenario, episode, choices)


def states(played, n):
    """What became of the first n requests."""
    return played.env.worlds.loads["arrival"][0, :n].tolist()


@pytest.mark.parametrize(
    ("think_s", "choice", "answered_s"), [(2.0, ONE, 0.11), (0.3, ONE, 0.11), (0.0, ONE, 0.11), (0.25, API, 0.7)]
)
def test_a_follow_up_arrives_its_think_time_after_the_answer(hand_scenario, think_s, choice, answered_s):
    """At least a millisecond later; a request that comes long after makes no difference."""
    rows = [{}, {"parent_index": 0, "think_s": think_s}, {"arrived_at_s": 50.0}]
    played, times = play(hand_scenario, rows, [choice, ONE, SHED])
    assert times == pytest.approx([0.0, answered_s + max(think_s, 0.001), 50.0])
    assert played.views[1].request[v.WAITED_S] == 0.0
    ttft_s = played.env.worlds.fleet.requests["first_token_at_s"][0, 1] - times[1]
    assert ttft_s == pytest.approx(0.01)
    assert (played.count("first_calls"), played.count("calls"), played.count("served")) == (2, 3, 2)


def test_every_call_of_a_long_run_comes_at_its_time(hand_scenario):
    """Ten calls in a row, each 1 ms after the last, beside a session that thinks for 0.2 s."""
    rows = [{}, *({"parent_index": i, "think_s": 0.0} for i in range(9))]
    rows += [{"session_index": 1, "arrived_at_s": 0.05}]
    rows += [{"session_index": 1, "parent_index": 10 + i, "think_s": 0.2} for i in range(3)]
    played, times = play(hand_scenario, rows, [ONE] + 13 * [ONE], horizon_s=30.0)
    assert played.count("served") == 14
    ended_s = played.env.worlds.fleet.requests["completed_at_s"][0]
    expected = sorted([0.0, *(ended_s[:9] + 0.001), 0.05, *(ended_s[10:13] + 0.2)])
    assert times == pytest.approx(expected)


def test_a_fan_out_arrives_together_in_order(hand_scenario):
    rows = [{}, *({"parent_index": 0, "think_s": 1.0, "prompt_tokens": 100 + i} for i in range(3))]
    played, times = play(hand_scenario, rows, [ONE, ONE, TWO_A, API])
    assert times == pytest.approx([0.0, 1.11, 1.11, 1.11])
    assert [view.request[v.PROMPT_TOKENS] for view in played.views] == [100, 100, 101, 102]


def test_an_answer_from_the_cache_goes_on_too(hand_scenario):
    """Answered 5 ms after the look-up."""
    rows = [{"prompt_key": 0}, {"arrived_at_s": 3.0, "prompt_key": 0}, {"parent_index": 1, "think_s": 1.0}]
    _, times = play(hand_scenario, rows, [ONE, CACHE, ONE])
    assert times == pytest.approx([0.0, 3.0, 4.005])


def test_a_held_request_is_followed_when_it_has_been_answered(hand_scenario):
    night = {"class_index": NIGHT, "deadline_s": 20.0}
    rows = [night, night | {"parent_index": 0, "think_s": 1.0}]
    _, times = play(hand_scenario, rows, [DEFER, ONE, ONE])
    assert times == pytest.approx([0.0, 4.0, 5.11])


TREE = [{}, {"parent_index": 0, "class_index": SEATS}, {"parent_index": 1}, {"parent_index": 0}, {"parent_index": 2}]


@pytest.mark.parametrize(
    ("first", "choice", "end"),
    [
        ({}, SHED, "shed"),
        ({"patience_s": 0.3}, API, "abandoned"),
        ({"prompt_tokens": 20_000}, ONE, "failed"),
    ],
)
def test_a_session_ends_where_a_request_gets_no_answer(hand_scenario, first, choice, end):
    played, _ = play(hand_scenario, [TREE[0] | first, *TREE[1:]], [choice])
    assert played.count(end) == 1 and played.count("calls") == 1
    assert [played.count("lost_calls", k) for k in (METERED, SEATS, NIGHT)] == [3, 1, 0]
    assert states(played, 5) == [sessions.ARRIVED] + 4 * [sessions.NEVER]


def test_one_branch_may_end_and_the_other_go_on(hand_scenario):
    """Both follow-ups of the first arrive together; the first is shed, with the two behind it."""
    played, _ = play(hand_scenario, TREE, [ONE, SHED, ONE])
    assert states(played, 5) == [sessions.ARRIVED] * 2 + [sessions.NEVER, sessions.ARRIVED, sessions.NEVER]
    assert (played.count("calls"), played.count("lost_calls"), played.count("served")) == (3, 2, 2)


@pytest.mark.parametrize(("arrived_at_s", "think_s"), [(59.95, 0.0), (50.0, 9.89), (50.0, 100.0)])
def test_what_would_come_after_the_horizon_never_arrives_and_is_not_lost(hand_scenario, arrived_at_s, think_s):
    rows = [{"arrived_at_s": arrived_at_s}, {"parent_index": 0, "think_s": think_s}, {"parent_index": 1}]
    played, _ = play(hand_scenario, rows, [ONE])
    assert (played.count("calls"), played.count("served"), played.count("lost_calls")) == (1, 1, 0)
    assert states(played, 3) == [sessions.ARRIVED] + 2 * [sessions.EXPECTED]


def test_patience_and_deadlines_count_from_the_arrival(hand_scenario):
    night = {"class_index": NIGHT, "deadline_s": 20.0, "parent_index": 0, "think_s": 30.0}
    rows = [{}, night, {"parent_index": 1, "think_s": 1.0, "patience_s": 0.3}]
    played, times = play(hand_scenario, rows, [ONE, ONE, API])
    assert times == pytest.approx([0.0, 30.11, 31.22])
    assert played.views[1].request[v.DEADLINE_LEFT_S] == pytest.approx(20.0)
    assert played.count("abandoned") == 1  # the API's first token comes after 0.5 s
    assert played.env.worlds.fleet.requests["completed_at_s"][0, 2] == pytest.approx(31.52)


def test_arrival_rates_count_follow_ups(hand_scenario):
    rows = [{"arrived_at_s": 1.0}, {"parent_index": 0, "think_s": 0.89}]
    played, _ = play(hand_scenario, rows, [ONE, ONE])
    assert [view.request[v.ARRIVAL_RATE_PER_S] for view in played.views] == pytest.approx([1.0, 1.0])


def test_think_times_of_requests_that_follow_nobody_mean_nothing(hand_scenario):
    rows = [{"session_index": -1, "think_s": 7.0}, {"session_index": -1, "arrived_at_s": 1.0}]
    _, times = play(hand_scenario, rows, [ONE, ONE])
    assert times == [0.0, 1.0]


def test_the_next_episode_knows_nothing_of_the_last(hand_scenario):
    """An episode that is cut short with follow-ups on their way leaves none behind."""
    worlds = FleetWorlds(hand_scenario, 1)
    episode = workload(hand_scenario, {}, {"arrived_at_s": 1.0}, {"arrived_at_s": 50.0})
    linked = dataclasses.replace(episode, parent_index=[-1, 0, -1], think_s=[0.0, 20.0, 0.0])
    worlds.load(0, linked)
    worlds.step(np.array([ONE]))
    worlds.load(0, episode)
    assert worlds.desks["leading"][0] == worlds.desks["ready"][0] == worlds.own["leading"].sum() == 0
    worlds.step(np.array([ONE]))
    assert worlds.desks["now_s"][0] == 1.0
