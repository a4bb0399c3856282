"""Faces of the world: Gymnasium single and vector, Stable-Baselines3; what their checkers ask, and that they agree."""

import warnings

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from stable_baselines3.common.env_checker import check_env as check_env_of_sb3

import envs
from envs.fleet_env import ENV_ID, FleetEnv
from envs.vector_env import FleetVecEnv, FleetVectorEnv
from envs.worlds import FleetWorlds
from marginroute import features
from marginroute import view as v
from marginroute.errors import InputError


def random_legal(masks, rng):
    return np.where(masks, rng.random(masks.shape), -1.0).argmax(axis=-1)


def test_gymnasium_checker_has_nothing_to_say(small_scenario):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(gymnasium.make(ENV_ID, scenario=small_scenario, render_mode="ansi").unwrapped)


def test_sb3_checker_has_nothing_to_say(small_scenario):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env_of_sb3(FleetEnv(small_scenario), warn=True)


def test_make(small_scenario):
    env = gymnasium.make(ENV_ID, scenario=small_scenario)
    assert isinstance(env.unwrapped, FleetEnv)
    observation, info = env.reset(seed=4)
    assert env.observation_space.contains(observation)
    assert info["action_mask"].shape == (env.action_space.n,)
    envs.register()  # registering again changes nothing
    assert gymnasium.spec(ENV_ID).entry_point == "envs.fleet_env:FleetEnv"


def test_make_vec_takes_the_vector_entry_point(small_scenario):
    env = gymnasium.make_vec(ENV_ID, num_envs=3, vectorization_mode="vector_entry_point", scenario=small_scenario)
    assert isinstance(env.unwrapped, FleetVectorEnv)
    observation, info = env.reset(seed=4)
    assert env.observation_space.contains(observation)
    assert observation.shape == (3, *env.single_observation_space.shape)
    observation, rewards, terminated, truncated, info = env.step(env.action_space.sample())
    assert env.observation_space.contains(observation)
    assert rewards.shape == terminated.shape == truncated.shape == (3,) and not terminated.any()
    assert info["action_mask"].shape == (3, env.single_action_space.n)


def test_observation_of_every_decision_is_in_its_space(small_scenario):
    env = FleetEnv(small_scenario)
    observation, info = env.reset(seed=1)
    rng, done = np.random.default_rng(1), False
    spec, candidates = env.worlds.spec, env.action_space.n
    while not done:
        assert env.observation_space.contains(observation)
        _, _, advice, legal = features.split(observation, candidates, spec)
        np.testing.assert_array_equal(legal, info["action_mask"])
        assert legal[-1] == 1.0  # shedding is always possible
        assert advice[legal > 0.5].max() == 0.0
        observation, _, _, done, info = env.step(random_legal(info["action_mask"], rng))
    assert env.observation_space.contains(observation)


def test_seed_and_options_choose_the_episode(small_scenario):
    env = FleetEnv(small_scenario)
    first, _ = env.reset(seed=7)
    other, _ = env.reset(seed=8)
    again, _ = env.reset(seed=7)
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    by_number, _ = env.reset(options={"seed": 11})
    given, _ = env.reset(options={"workload": small_scenario.generate(11, "train")})
    np.testing.assert_array_equal(by_number, given)
    held_out, _ = FleetEnv(small_scenario, split="heldout").reset(options={"seed": 11})
    assert not np.array_equal(by_number, held_out)


def test_render_ansi(small_scenario):
    env = FleetEnv(small_scenario, render_mode="ansi")
    env.reset(seed=0)
    text = env.render()
    assert all(name in text for name in env.worlds.plant.layout.names)
    assert "margin" in text and "last: none" in text
    env.step(0)
    assert f"last: {env.worlds.plant.layout.names[0]}" in env.render()
    env.step(10_000)
    assert "last: shed (illegal)" in env.render()
    assert FleetEnv(small_scenario).render() is None


def test_an_unknown_render_mode_is_refused(small_scenario):
    with pytest.raises(InputError, match="'human' is not offered; legal: None, 'ansi'"):
        FleetEnv(small_scenario, render_mode="human")


def test_view_is_a_copy(small_scenario):
    env = FleetEnv(small_scenario)
    env.reset(seed=0)
    view = env.view
    before = view.signals.copy()
    env.step(0)
    np.testing.assert_array_equal(view.signals, before)
    assert not np.array_equal(view.signals, env.view.signals)


def test_single_and_vector_env_agree_step_by_step(small_scenario):
    """N worlds in one call give what N single environments give, over the end of an episode."""
    n = 3
    vector = FleetVectorEnv(n, small_scenario)
    together, info = vector.reset(seed=21)
    draws = np.random.Generator(np.random.PCG64(np.random.SeedSequence(21)))
    episodes = [int(draws.integers(2**31)) for _ in range(n)]
    singles = [FleetEnv(small_scenario) for _ in range(n)]
    alone = [env.reset(options={"seed": episode})[0] for env, episode in zip(singles, episodes, strict=True)]
    rng, over = np.random.default_rng(0), np.zeros(n, dtype=bool)
    while not over.any():
        np.testing.assert_array_equal(together, np.stack(alone))
        actions = random_legal(info["action_mask"], rng)
        together, rewards, _, over, info = vector.step(actions)
        results = [env.step(action) for env, action in zip(singles, actions, strict=True)]
        np.testing.assert_array_equal(rewards, [result[1] for result in results])
        np.testing.assert_array_equal(over, [result[3] for result in results])
        if not over.any():
            np.testing.assert_array_equal(info["elapsed_s"], [result[4]["elapsed_s"] for result in results])
        alone = [result[0] for result in results]
    w = int(np.flatnonzero(over)[0])
    assert info["_final_obs"][w]
    np.testing.assert_array_equal(info["final_obs"][w], alone[w])
    assert info["final_info"]["elapsed_s"][w] == results[w][4]["elapsed_s"]
    fresh = FleetEnv(small_scenario).reset(options={"seed": int(draws.integers(2**31))})[0]
    np.testing.assert_array_equal(together[w], fresh)


def test_one_world_of_a_batch_is_the_same_world_alone(small_plant):
    """Every array of a world, bit by bit, whether it runs alone or as one of four."""
    workloads = [small_plant.scenario.generate(seed, "validation") for seed in range(4)]
    batch = FleetWorlds(small_plant, 4)
    batch.load_all(workloads)
    rng = np.random.default_rng(0)
    choices = []
    while not batch.done.all():
        choices.append(random_legal(batch.legal, rng))
        batch.step(choices[-1])
    for w in (0, 2):
        alone = FleetWorlds(small_plant, 1)
        alone.load(0, workloads[w])
        for choice in choices:
            alone.step(choice[w : w + 1])
        for name in ("ledger_usd", "counts", "action_counts", "utilisation"):
            np.testing.assert_array_equal(getattr(alone, name)[0], getattr(batch, name)[w], err_msg=name)
        ended = alone.fleet.requests[0, : workloads[w].n_requests]
        for field in ("status", "replica", "dispatched_at_s", "first_token_at_s", "completed_at_s"):
            np.testing.assert_array_equal(ended[field], batch.fleet.requests[field][w, : len(ended)], err_msg=field)


def test_vec_env_is_the_worlds(small_plant):
    """Rewards, masks, elapsed time and observations of the VecEnv are those of FleetWorlds under the same choices."""
    env = FleetVecEnv(small_plant, 2)
    observation = env.reset()
    worlds = FleetWorlds(small_plant, 2)
    worlds.load_all([small_plant.scenario.generate(seed, "train") for seed in range(2)])
    worlds.set_in_flight_caps(env.worlds.advice.in_flight_caps(small_plant.layout, small_plant.slots))
    rng, dones = np.random.default_rng(5), np.zeros(2, dtype=bool)
    while not dones.any():
        np.testing.assert_array_equal(env.action_masks(), worlds.legal)
        assessment = env.worlds.advice.assess(worlds.view())
        wanted = features.observe(worlds.view(), assessment, env.worlds.spec)
        np.testing.assert_allclose(observation, wanted, rtol=1e-6, atol=1e-6)
        choices = random_legal(worlds.legal, rng)
        signal = assessment.score_usd + (worlds.p_true - assessment.p_good) * assessment.bad_usd
        wanted = signal[np.arange(2), choices]
        observation, rewards, dones, _ = env.step(choices)
        worlds.step(choices)
        np.testing.assert_array_equal(rewards, worlds.reward_usd.astype(np.float32))
        np.testing.assert_array_equal(env.elapsed_s, worlds.elapsed_s)
        np.testing.assert_allclose(env.learning_signal, wanted, rtol=1e-9, atol=1e-15)
        np.testing.assert_array_equal(dones, worlds.done)


def test_learning_signal_of_an_illegal_choice_is_that_of_shedding(small_plant):
    env = FleetVecEnv(small_plant, 1)
    env.reset()
    cache, shed = small_plant.layout.names.index("cache"), small_plant.layout.names.index("shed")
    assert not env.action_masks()[0, cache]
    signals = env.worlds.signal_usd(np.array([cache])), env.worlds.signal_usd(np.array([shed]))
    assert signals[0] == signals[1] < 0.0


def test_signal_logits_are_advice_logits_with_the_true_p_good(small_plant):
    """They rank candidates as the learning signal does, and where the prediction is the truth they are the advice's."""
    env = FleetVecEnv(small_plant, 3)
    observation, worlds, rng = env.reset(), env.worlds, np.random.default_rng(5)
    c = small_plant.layout.n_candidates
    for _ in range(60):
        advice, legal = observation[:, -2 * c : -c], worlds.legal
        logits = env.signal_logits()
        signals = np.stack([worlds.signal_usd(np.full(3, i)) for i in range(c)], axis=1)
        best = np.where(legal, signals, -np.inf).argmax(axis=1)
        np.testing.assert_array_equal(np.where(legal, logits, -np.inf).max(axis=1), 0.0)
        np.testing.assert_array_equal(logits[np.arange(3), best], 0.0)
        kept, worlds.p_true[...] = worlds.p_true.copy(), worlds._seen.p_good
        np.testing.assert_allclose(np.where(legal, env.signal_logits(), 0.0), np.where(legal, advice, 0.0), atol=1e-4)
        worlds.p_true[...] = kept
        observation, _, _, _ = env.step(random_legal(worlds.legal, rng))


def test_stagger_spreads_the_starts(small_plant):
    env = FleetVecEnv(small_plant, 4, stagger=True)
    env.reset()
    decided = env.worlds.desks["sequence"]
    assert decided.tolist() == [0, 25, 50, 75]
    assert (np.diff(env.worlds.desks["now_s"]) > 0).all()
    assert not env.worlds.done.any()


def test_kinds_of_candidates_stand_in_the_observation(small_scenario):
    env = FleetEnv(small_scenario)
    observation, _ = env.reset(seed=0)
    candidate, *_ = features.split(observation, env.action_space.n, env.worlds.spec)
    names = [feature.name for feature in env.worlds.spec.candidate]
    kinds = candidate[:, [names.index(f"kind_{kind}") for kind in v.KINDS]]
    np.testing.assert_array_equal(kinds, np.eye(len(v.KINDS))[env.worlds.plant.layout.kind])
    legal = candidate[:, names.index("legal")]
    np.testing.assert_array_equal(legal, env.action_masks())
