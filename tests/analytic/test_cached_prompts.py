"""What an expected cached prefix changes in estimates, costs and features, and that it changes nothing else."""

import by_hand
import numpy as np
import pytest

from envs.plant import Plant
from envs.vector_env import FleetVecEnv
from envs.worlds import FleetWorlds
from marginroute import latency, pricing
from marginroute import view as v
from marginroute.features import CANDIDATE_FEATURES, candidate_features
from marginroute.margin_rule import MarginParameters, assess

CACHED, API = 320.0, 3  # tokens; the candidate of quickstart's provider


@pytest.fixture(scope="module")
def views(small_plant):
    """A View of quickstart with nothing cached, and one with a part of the prompt cached at `small/0` and the API."""
    worlds = FleetWorlds(small_plant, 1)
    worlds.load(0, small_plant.scenario.generate(0))
    plain = worlds.view()[0].copy()
    plain.request[v.PROMPT_TOKENS] = 400.0
    cached = plain.copy()
    cached.signals[v.CACHED_TOKENS, [0, API]] = CACHED
    return plain, cached


def test_cached_tokens_take_no_prefill(views):
    (plain_s, plain_work_s), (cached_s, cached_work_s) = (latency.estimate(view) for view in views)
    token_s = views[0].signals[v.PREFILL_TOKEN_S]
    saved_s = np.where(np.arange(len(token_s)) == 0, CACHED * token_s, 0.0)
    assert saved_s[0] > 0.0
    np.testing.assert_allclose(plain_work_s - cached_work_s, saved_s, rtol=1e-9, atol=1e-15)
    np.testing.assert_allclose(plain_s[0] - cached_s[0], saved_s, rtol=1e-9, atol=1e-15)
    np.testing.assert_array_equal(plain_s[1], cached_s[1])


def test_cached_tokens_have_their_own_price(views):
    parameters = MarginParameters((0.0,) * len(views[0].layout.station_names))
    plain, cached = (assess(view, parameters).parts_usd[0] for view in views)
    saved_usd = CACHED * (views[0].signals[v.INPUT_USD] - views[0].signals[v.CACHED_INPUT_USD])
    expected = np.where(views[1].signals[v.CACHED_TOKENS] > 0.0, saved_usd, 0.0)
    np.testing.assert_allclose(plain - cached, expected, rtol=1e-9, atol=1e-15)
    assert expected[API] == pytest.approx(CACHED * 0.9e-6)  # 1 and 0.1 USD per million tokens
    assert pricing.answer_usd(100, 40, 10, 2.0, 0.5, 3.0) == 60 * 2.0 + 40 * 0.5 + 10 * 3.0


def test_the_share_of_the_prompt_is_a_feature(views):
    parameters = MarginParameters((0.0,) * len(views[0].layout.station_names))
    column = [feature.name for feature in CANDIDATE_FEATURES].index("cached_share")
    plain, cached = (candidate_features(view, assess(view, parameters))[:, column] for view in views)
    assert not plain.any()
    assert cached[0] == cached[API] == pytest.approx(CACHED / 400.0) and np.count_nonzero(cached) == 2


def test_sessions_reach_the_learner_episode_after_episode(tmp_path, monkeypatch):
    """Worlds that start at different points of an episode with fewer decisions than requests, through two resets."""
    scenario = by_hand.scenario(tmp_path, {"fleet.pools.two.prefix_caching": True, "horizon_s": 20.0})
    generated = type(scenario).generate

    def linked(self, seed, split="train"):
        return by_hand.as_sessions(generated(self, seed, split), seed)

    monkeypatch.setattr(type(scenario), "generate", linked)
    env = FleetVecEnv(Plant(scenario), 3, stagger=True)
    env.reset()
    ends, total = np.zeros(3), 0.0
    for step in range(150):
        legal = env.action_masks()
        choices = np.argmax(legal * ((np.arange(legal.shape[1]) + step) % 3), axis=1)
        observations, rewards, dones, infos = env.step(choices)
        ends += dones
        total += rewards.sum()
        assert np.isfinite(observations).all()
        assert all(np.isfinite(list(infos[w]["episode"].values())).all() for w in np.flatnonzero(dones))
    assert (ends >= 2).all() and np.isfinite(total)
    assert linked(scenario, 0).has_sessions
