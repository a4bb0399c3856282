"""Priority scheduling with a known answer: one token per iteration of constant length is a textbook server."""

import copy

import by_hand
import numpy as np
import pytest

from envs.fleet.profile import constant_profile
from envs.fleet.replay import replay
from envs.fleet.spec import FleetSpec, PoolSpec
from envs.fleet_env import FleetEnv

STEP_S = 0.001
MEAN_TOKENS = 1000


def _server(policy="priority", cap=2**31 - 1):
    pool = PoolSpec("server", constant_profile(STEP_S), kv_blocks=10**7, max_num_seqs=1, max_num_batched_tokens=64)
    pool = PoolSpec(**{**vars(pool), "scheduling_policy": policy, "in_flight_cap": cap})
    return FleetSpec((pool,), scrape_interval_s=1e9)


def _waits(spec, arrived_at_s, output_tokens, priority):
    prompts = np.ones(len(arrived_at_s), np.int64)
    done = replay(spec, arrived_at_s, prompts, output_tokens, priority=priority).requests[0]
    return done["first_token_at_s"] - arrived_at_s - STEP_S


@pytest.mark.parametrize("cap", [1, 3, 2**31 - 1])
def test_levels_wait_as_cobham_says(cap):
    """W_k = W_0 / ((1 - s_{k-1}) (1 - s_k)), s_k the load of levels up to k, W_0 = sum of lambda E[S^2] / 2 (M/G/1).

    A. Cobham, Priority assignment in waiting line problems, Operations Research 2 (1954). It does not matter in which
    of the two lines, the gateway's or the engine's, the requests wait.
    """
    rng, n, rate = np.random.default_rng(17), 400_000, 0.8
    level = rng.choice([0, 2, 7], n, p=[0.25, 0.35, 0.4])
    tokens = np.where(level == 7, rng.geometric(1.0 / MEAN_TOKENS, n), MEAN_TOKENS)
    arrived_at_s = np.cumsum(rng.exponential(1.0 / rate, n))
    waits = _waits(_server(cap=cap), arrived_at_s, tokens, level)
    before, residual_s = 0.0, rate * np.mean((tokens * STEP_S) ** 2) / 2.0
    for k in (0, 2, 7):
        these = level == k
        after = before + rate * these.mean() * tokens[these].mean() * STEP_S
        known = residual_s / ((1.0 - before) * (1.0 - after))
        assert waits[these].mean() == pytest.approx(known, rel=0.05), k
        before = after


def test_first_come_first_served_within_a_level_and_the_last_level_starves():
    """Level 0 alone is more than the server can do, so that nobody else begins before the last of it has."""
    rng, n = np.random.default_rng(23), 3000
    arrived_at_s = np.cumsum(rng.exponential(1.0, n))
    level = rng.choice([0, 1, 5], n, p=[0.6, 0.2, 0.2])
    started_at_s = _waits(_server(), arrived_at_s, np.full(n, 2 * MEAN_TOKENS), level) + arrived_at_s
    busy = arrived_at_s > arrived_at_s[100]  # the queue of level 0 is empty at times in the beginning
    for k in (0, 1, 5):
        assert (np.diff(started_at_s[level == k]) > 0.0).all()
    first = [started_at_s[busy & (level == k)].min() for k in (1, 5)]
    last = [started_at_s[level == k].max() for k in (0, 1)]
    assert first[0] > last[0] and first[1] > last[1]


def test_with_equal_lengths_no_request_of_the_first_level_waits_longer_than_without_priorities():
    rng, n = np.random.default_rng(29), 20_000
    arrived_at_s = np.cumsum(rng.exponential(1.1, n))
    level = rng.integers(0, 2, n)
    tokens = np.full(n, MEAN_TOKENS)
    by_priority, in_order = (_waits(_server(policy), arrived_at_s, tokens, level) for policy in ("priority", "fcfs"))
    assert (by_priority <= in_order + 1e-6)[level == 0].all()
    assert by_priority[level == 0].mean() < 0.4 * in_order[level == 0].mean()
    assert by_priority[level == 1].mean() > 1.3 * in_order[level == 1].mean()
    assert by_priority.sum() == pytest.approx(in_order.sum(), rel=1e-6)  # the order is no work


def test_a_class_of_the_plans_goes_first(tmp_path):
    """Four requests at once, one slot: seats (priority 0) before night (2) before metered (7), in either line."""
    classes = copy.deepcopy(by_hand.SCENARIO["plans"])
    for name, priority in (("metered", 7), ("seats", 0), ("night", 2)):
        classes["classes"][name]["priority"] = priority
    rows = [{"class_index": k, "arrived_at_s": 0.001 * i} for i, k in enumerate((0, 0, 2, 1))]
    first_token_at_s = {}
    for policy in ("fcfs", "priority"):
        for cap in (1, 8):
            one = {"max_num_seqs": 1, "in_flight_cap": cap, "scheduling_policy": policy}
            fleet = copy.deepcopy(by_hand.SCENARIO["fleet"])
            fleet["pools"]["one"] |= one
            scenario = by_hand.scenario(tmp_path, fleet=fleet, plans=classes)
            env = FleetEnv(scenario)
            by_hand.Played(env, by_hand.workload(scenario, *rows), [by_hand.ONE] * 4)
            first_token_at_s[policy, cap] = env.worlds.fleet.requests["first_token_at_s"][0, :4]
    for cap in (1, 8):
        assert np.argsort(first_token_at_s["fcfs", cap]).tolist() == [0, 1, 2, 3]
        assert np.argsort(first_token_at_s["priority", cap]).tolist() == [0, 3, 2, 1]
