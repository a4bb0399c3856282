"""What judged answers do to the View's `recent_quality`: when, for whom, how much."""

import by_hand
import numpy as np
import pytest
from by_hand import API, ONE, SHED, TWO_A, TWO_B, Played

from envs.fleet_env import FleetEnv
from marginroute import latency
from marginroute import view as v

DELAY_S = 3.0
RECENT_QUALITY = v.RECENT_QUALITY


@pytest.fixture(scope="module")
def env(tmp_path_factory):
    overrides = {"workload.feedback": {"share": 0.5, "delay_s": DELAY_S}}
    return FleetEnv(by_hand.scenario(tmp_path_factory.mktemp("judged"), overrides))


def shown(env, rows, choices, judged):
    """(B, C) `recent_quality` before each decision."""
    episode = by_hand.workload(env.worlds.plant.scenario, *rows)
    object.__setattr__(episode, "judged", np.array(judged, dtype=np.uint8))
    return np.array([view.signals[RECENT_QUALITY] for view in Played(env, episode, choices).views])


def test_one_judgement_is_heard_after_its_delay_by_tier_and_task(env):
    """11 tokens at 10 ms: the answer is complete after 0.11 s, and judged 3 s later. Expected was 0.5, it was bad."""
    bad = {"good": [0, 0, 0]}
    times = [0.0, 3.1, 3.12, 3.13]
    rows = [{"arrived_at_s": t} | bad for t in times[:3]] + [{"arrived_at_s": times[3], "task_index": 1} | bad]
    quality = shown(env, rows, [TWO_A, SHED, SHED, SHED], [1, 0, 0, 0])
    said = latency.recent_quality(-0.5, 1.0)
    assert said == pytest.approx(-0.5 / (1.0 + latency.PRIOR_JUDGED))
    assert not quality[:2].any() and not quality[3].any()  # not yet; another task
    assert quality[2, [TWO_A, TWO_B]] == pytest.approx([said, said]) and not quality[2, [ONE, API]].any()


def test_many_judgements_tend_to_the_true_surprise(env):
    """Good answers of which half were expected to be good: +0.5, drawn towards 0 by the prior's weight."""
    n = 60
    rows = [{"arrived_at_s": 0.5 * i} for i in range(n)]
    quality = shown(env, rows, [ONE] * n, [1] * n)
    horizon = latency.RECENT_JUDGED
    assert quality[-1, ONE] == pytest.approx(0.5 * horizon / (horizon + latency.PRIOR_JUDGED))
    assert (np.diff(quality[:, ONE]) >= 0.0).all() and not quality[:, API].any()


def test_what_is_not_judged_is_not_heard_of(env):
    rows = [{"arrived_at_s": float(i)} for i in range(20)]
    assert not shown(env, rows, [ONE] * 20, [0] * 20).any()


def test_the_draws_of_a_scenario_without_feedback_stay(env, tmp_path):
    without, with_it = by_hand.scenario(tmp_path).generate(7), env.worlds.plant.scenario.generate(7)
    for name in without.array_names():
        if name != "judged":
            np.testing.assert_array_equal(getattr(without, name), getattr(with_it, name), err_msg=name)
    assert not without.judged.any()
    assert 0.3 < with_it.judged.mean() < 0.7
