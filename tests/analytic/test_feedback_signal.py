"""What judged answers do to the View's `surprise` and `judged`: when, for whom, how much, beyond which expectation."""

import math
from dataclasses import replace

import by_hand
import numpy as np
import pytest
from by_hand import API, ONE, SHED, TWO_A, TWO_B, Played

from envs.fleet_env import FleetEnv
from marginroute import latency
from marginroute import view as v
from marginroute.quality import FittedQuality

DELAY_S = 3.0
TOLD = slice(v.SURPRISE, v.TIER_CONFIDENCE + 1)  # surprise, confidence, and both over all tasks


@pytest.fixture(scope="module")
def env(tmp_path_factory):
    overrides = {"workload.feedback": {"share": 0.5, "delay_s": DELAY_S}}
    return FleetEnv(by_hand.scenario(tmp_path_factory.mktemp("judged"), overrides))


def shown(env, rows, choices, judged):
    """(B, 4, C) what the View tells of judged answers before each decision."""
    episode = by_hand.workload(env.worlds.plant.scenario, *rows)
    object.__setattr__(episode, "judged", np.array(judged, dtype=np.uint8))
    return np.array([view.signals[TOLD] for view in Played(env, episode, choices).views])


def test_one_judgement_is_heard_after_its_delay_by_tier_and_task(env):
    """11 tokens at 10 ms: the answer is complete after 0.11 s, and judged 3 s later. Expected was 0.5, it was bad."""
    bad = {"good": [0, 0, 0]}
    times = [0.0, 3.1, 3.12, 3.13]
    rows = [{"arrived_at_s": t} | bad for t in times[:3]] + [{"arrived_at_s": times[3], "task_index": 1} | bad]
    told = shown(env, rows, [TWO_A, SHED, SHED, SHED], [1, 0, 0, 0])
    assert not told[:2].any()  # not yet
    for c in (TWO_A, TWO_B):
        assert told[2, :, c] == pytest.approx(2 * [-0.5, 1.0 / 11.0])
        assert told[3, :, c] == pytest.approx([0.0, 0.0, -0.5, 1.0 / 11.0])  # another task of the same model
    assert not told[:, :, [ONE, API]].any()


def test_many_judgements_tend_to_the_true_surprise(env):
    """Good answers of which half were expected to be good: +0.5 each, of the last forty or so."""
    n = 60
    rows = [{"arrived_at_s": 0.5 * i} for i in range(n)]
    told = shown(env, rows, [ONE] * n, [1] * n)
    assert told[-1, :, ONE] == pytest.approx(2 * [0.5 * math.sqrt(latency.RECENT_JUDGED), 40.0 / 50.0])
    assert (np.diff(told[:, 0, ONE]) >= 0.0).all() and not told[:, :, API].any()


def test_surprise_is_what_differs_from_the_policys_own_fit(env):
    """Where a fit expects three of four answers to be good, a good one surprises less."""
    worlds = env.worlds
    tiers, tasks = len(worlds.plant.layout.tier_names), len(worlds.plant.layout.task_names)
    tier = worlds.plant.layout.tier[ONE]
    intercept = np.zeros((tiers, tasks))
    intercept[tier, 0] = np.log(3.0)  # at a prior of 0.5 and a thousand prompt tokens
    worlds.expect(FittedQuality(intercept, np.ones((tiers, tasks)), np.full(tiers, 0.7)))
    try:
        rows = [{"arrived_at_s": t, "prompt_tokens": 1000} for t in (0.0, 9.0)]
        told = shown(env, rows, [ONE, SHED], [1, 0])
    finally:
        worlds.expect(None)
    assert told[1, :, ONE] == pytest.approx(2 * [0.25, 1.0 / 11.0])


def test_an_adaptive_fit_moves_by_what_surprised_it(env):
    """Four bad answers of four expected to be half good: P falls from 0.5 by 2 of 4 + 8, and is never negative."""
    tiers, tasks = len(env.worlds.plant.layout.tier_names), len(env.worlds.plant.layout.task_names)
    rows = [{"arrived_at_s": 0.5 * i, "good": [0, 0, 0]} for i in range(4)] + [{"arrived_at_s": 9.0}]
    episode = by_hand.workload(env.worlds.plant.scenario, *rows)
    object.__setattr__(episode, "judged", np.ones(5, dtype=np.uint8))
    view = Played(env, episode, [TWO_A] * 4 + [SHED]).views[-1]
    fit = FittedQuality(np.zeros((tiers, tasks)), np.ones((tiers, tasks)), np.zeros(tiers))
    moved = replace(fit, fit_worth=8.0).p_good(view) - fit.p_good(view)
    assert moved[[TWO_A, TWO_B]] == pytest.approx(-2.0 / 12.0)
    assert not moved[[ONE, API, SHED]].any()
    assert replace(fit, fit_worth=1e-9).p_good(view)[TWO_A] == pytest.approx(0.0, abs=1e-6)


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
