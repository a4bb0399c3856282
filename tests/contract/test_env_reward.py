"""Reward equals report: the rewards of an episode add up to its margin, whatever the policy does."""

import numpy as np
import pytest
from by_hand import GPU_USD_PER_S, SEAT_USD_PER_S, Played, workload

from envs.economics import ledger as books
from envs.fleet_env import FleetEnv
from envs.rule_kernel import default_advice
from envs.vector_env import FleetVecEnv, FleetVectorEnv
from marginroute.margin_rule import MarginParameters, MarginRule
from marginroute.rules import LeastInFlight


def legal_at_random(env, rng):
    return rng.choice(np.flatnonzero(env.action_masks()))


def anything_at_random(env, rng):
    return rng.integers(-2, env.action_space.n + 3)


def by_rule(rule):
    def decide(env, rng):
        return rule.decide(env.view).candidate

    return decide


POLICIES = {
    "legal": legal_at_random,
    "anything": anything_at_random,
    "least-in-flight": by_rule(LeastInFlight("least-in-flight", use_providers=True)),
    "expected-margin": None,
    "shed everything": lambda env, rng: env.action_space.n - 1,
}


@pytest.fixture(scope="module")
def env(small_scenario):
    return FleetEnv(small_scenario)


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("seed", [0, 1])
def test_rewards_add_up_to_the_ledger(env, name, seed):
    decide = POLICIES[name] or by_rule(default_advice(env.worlds.plant))
    rng = np.random.default_rng(seed)
    _, info = env.reset(options={"seed": seed})
    margin_usd, rewards, done = 0.0, [], False
    while not done:
        _, reward, terminated, done, info = env.step(decide(env, rng))
        assert not terminated
        rewards.append(reward)
        assert reward == pytest.approx(info["ledger_usd"].sum() - margin_usd, rel=1e-9, abs=1e-12)
        margin_usd = info["ledger_usd"].sum()
    assert sum(rewards) == pytest.approx(margin_usd, rel=1e-9)
    assert round(100 * sum(rewards)) == round(100 * margin_usd)
    assert abs(margin_usd) > 0.01
    served = env.worlds.counts[0, books.SERVED].sum()
    assert served == 0 if name == "shed everything" else served > 20


def test_signs_of_the_accounts(env):
    rng = np.random.default_rng(3)
    env.reset(options={"seed": 3})
    done = False
    while not done:
        *_, done, info = env.step(legal_at_random(env, rng))
    totals = dict(zip(books.ACCOUNTS, info["ledger_usd"].sum(axis=1), strict=True))
    assert all(totals[name] >= 0.0 for name in books.REVENUE_ACCOUNTS)
    assert all(totals[name] > 0.0 for name in ("usage_revenue", "seat_revenue"))
    assert all(usd <= 0.0 for name, usd in totals.items() if name not in books.REVENUE_ACCOUNTS)
    assert all(totals[name] < 0.0 for name in ("refunds", "api_spend", "gpu_hours", "energy", "unserved_credits"))


@pytest.mark.parametrize("earlier", [[], [{}]], ids=["first episode", "after another"])
def test_an_episode_without_requests_pays_for_its_gpus(hand_env, earlier):
    """Nothing arrives: nothing to decide, but the hour is paid; the first step reports it."""
    scenario = hand_env.worlds.plant.scenario
    if earlier:
        Played(hand_env, workload(scenario, *earlier), [0])
    observation, _ = hand_env.reset(options={"workload": workload(scenario)})
    assert hand_env.observation_space.contains(observation)
    _, reward, _, truncated, info = hand_env.step(0)
    assert truncated
    assert info["ledger_usd"].sum() == pytest.approx(60.0 * (SEAT_USD_PER_S - GPU_USD_PER_S))
    assert reward == pytest.approx(info["ledger_usd"].sum())
    assert hand_env.step(0)[1] == 0.0


def test_step_after_the_end_changes_nothing(hand_env):
    played = Played(hand_env, workload(hand_env.worlds.plant.scenario, {}), [0])
    _, reward, _, truncated, info = hand_env.step(0)
    assert truncated and reward == 0.0
    np.testing.assert_array_equal(info["ledger_usd"], played.ledger_usd)


def test_vec_env_rewards_and_summary_are_the_ledgers(small_plant):
    """Three worlds, two episodes each, random legal play: rewards of an episode add up to the reported margin."""
    env = FleetVecEnv(small_plant, 3)
    env.reset()
    rng = np.random.default_rng(0)
    sums, before_usd, episodes = np.zeros(3), np.zeros(3), [[], [], []]
    while min(map(len, episodes)) < 2:
        masks = env.action_masks()
        _, rewards, dones, infos = env.step(np.where(masks, rng.random(masks.shape), -1.0).argmax(axis=1))
        sums += rewards
        for w in range(3):
            if dones[w]:
                assert infos[w]["TimeLimit.truncated"]
                assert infos[w]["episode"]["r"] == pytest.approx(sums[w], rel=1e-5)
                assert infos[w]["fleet"]["margin_usd_per_1k"] == pytest.approx(sums[w] * 10.0, rel=1e-5)
                episodes[w].append(sums[w])
                sums[w] = before_usd[w] = 0.0
            else:
                now_usd = env.worlds.ledger_usd[w].sum()
                assert rewards[w] == pytest.approx(now_usd - before_usd[w], rel=1e-5, abs=1e-7)
                before_usd[w] = now_usd


def test_vec_env_keeps_the_advice_caps_over_episodes(small_plant):
    """The learner plays with the caps that evaluation will play with, in the second episode too."""
    stations = len(small_plant.layout.station_names)
    parameters = MarginParameters((0.0,) * stations, cap_share=4.0 / 128.0)
    env = FleetVecEnv(small_plant, 2, advice=MarginRule("capped", parameters))
    env.reset()
    wanted = np.round(small_plant.slots * 4.0 / 128.0)[small_plant.spec.pool_of_replica]
    assert (env.worlds.fleet.replicas["in_flight_cap"] == wanted).all()
    finished = 0
    while finished < 2:
        _, _, dones, _ = env.step(env.worlds.advice.decide_batch(env.worlds.view()))
        finished += dones.sum()
        assert (env.worlds.fleet.replicas["in_flight_cap"] == wanted).all()


def test_vector_env_keeps_its_caps_over_episodes(small_scenario):
    env = FleetVectorEnv(2, small_scenario)
    env.reset(seed=0, options={"in_flight_caps": [3] * len(small_scenario.pool_names)})
    dones = np.zeros(2, dtype=bool)
    while not dones.any():
        *_, dones, _ = env.step(env.worlds.advice.decide_batch(env.worlds.view()))
    assert (env.worlds.fleet.replicas["in_flight_cap"] == 3).all()
