"""Prefix caching in the world, on paper: what the View expects, what the engines reuse, and what it saves.

Blocks of 16 tokens, 100 tokens per iteration of 10 ms: a prompt of 400 tokens takes 4 iterations, of which 24 blocks,
384 tokens, can be reused.
"""

import dataclasses

import by_hand
import numpy as np
import pytest
from by_hand import API, CACHE, ONE, SHED, TWO_A, TWO_B, Played, workload

from envs.fleet_env import FleetEnv
from envs.scenario import load_scenario
from envs.worlds import FleetWorlds
from marginroute import view as v
from marginroute.errors import InputError

CACHING = {
    **{f"fleet.pools.{pool}.prefix_caching": True for pool in ("one", "two")},
    **{f"fleet.pools.{pool}.max_num_batched_tokens": 100 for pool in ("one", "two")},
    "fleet.providers.api.requests_per_minute": 60.0,
    "fleet.providers.api.cached_input_usd_per_mtok": 5.0,
    "fleet.providers.api.prompt_cache_ttl_s": 8.0,
}
PROMPT = {"prompt_tokens": 400, "output_tokens": 11}


@pytest.fixture(scope="module")
def caching(tmp_path_factory):
    return by_hand.scenario(tmp_path_factory.mktemp("caching"), CACHING)


def alike(scenario, *arrived_at_s, blocks=25, **fields):
    """Requests with the same prompt; its hashes in blocks of 16 tokens, 25 full ones."""
    rows = [PROMPT | {"arrived_at_s": at_s} | fields for at_s in arrived_at_s]
    return hashed(workload(scenario, *rows), [range(blocks)] * len(rows))


def hashed(episode, lists, **fields):
    """The episode with these block hashes."""
    return dataclasses.replace(
        episode,
        prefix_block_tokens=16,
        prefix_count=[len(own) for own in lists],
        prefix_hash=np.array([block for own in lists for block in own], dtype=np.int64),
        **fields,
    )


def cached(played):
    """Cached tokens of the candidates, View by View."""
    return [view.signals[v.CACHED_TOKENS].tolist() for view in played.views]


def test_a_view_expects_what_was_sent_and_the_engine_reuses_it(caching):
    played = Played(FleetEnv(caching), alike(caching, 0.0, 10.0, 20.0), [ONE, ONE, TWO_A])
    assert cached(played) == [[0.0] * 7, [399.0] + [0.0] * 6, [399.0] + [0.0] * 6]
    request = played.env.worlds.fleet.requests[0]
    assert request["cached_tokens"].tolist()[:3] == [0, 384, 0]
    ttft_s = request["first_token_at_s"] - [0.0, 10.0, 20.0]
    assert ttft_s == pytest.approx([0.04, 0.01, 0.04])


def test_saved_prefill_saves_energy(caching):
    played = Played(FleetEnv(caching), alike(caching, 0.0, 10.0), [ONE, ONE])
    assert played.usd("energy") == pytest.approx(-((400 + 16) * 10e-6 + 2 * 11 * 20e-6))


def test_a_provider_bills_the_cached_share_until_it_forgets(caching):
    """Sent at 0, 5 and 10 s, each within 8 s of the last; at 18.5 s the prompt is gone."""
    played = Played(FleetEnv(caching), alike(caching, 0.0, 5.0, 10.0, 18.5), [API] * 4)
    assert [row[API] for row in cached(played)] == [0.0, 399.0, 399.0, 0.0]
    full_usd, cached_usd = 400 * 50e-6, 399 * 5e-6 + 50e-6
    assert played.usd("api_spend") == pytest.approx(-(2 * full_usd + 2 * cached_usd + 4 * 11 * 100e-6))


def test_an_abandoned_call_is_billed_at_the_same_prices(caching):
    episode = alike(caching, 0.0, 5.0, patience_s=0.3)
    played = Played(FleetEnv(caching), episode, [API] * 2)
    assert played.count("abandoned") == 2
    assert played.usd("api_spend") == pytest.approx(-(400 * 50e-6 + 399 * 5e-6 + 50e-6))


def test_expected_reuse_is_not_pending(caching):
    """Two equal prompts at once: of the second only the last token is expected to need a prefill."""
    played = Played(FleetEnv(caching), alike(caching, 0.0, 0.0, 0.0, 20.0), [ONE, ONE, ONE, SHED])
    pending = [view.signals[v.PENDING_PREFILL_TOKENS, ONE] for view in played.views]
    assert pending == [0.0, 400.0, 401.0, 0.0]


def test_long_prompts_fill_the_record_of_a_small_cache(tmp_path):
    """The record has room for the 30 blocks of a small KV cache: the second prompt pushes out the end of the first."""
    scenario = by_hand.scenario(
        tmp_path,
        CACHING | {"fleet.pools.one.kv_blocks": 76, "fleet.pools.two.prefix_caching": False},
    )
    episode = hashed(
        workload(scenario, *({"arrived_at_s": 5.0 * i, "prompt_tokens": 800} for i in range(4))),
        [range(50), range(100, 150), range(50), range(100, 150)],
    )
    played = Played(FleetEnv(scenario), episode, [ONE, ONE, SHED, SHED])
    assert [row[ONE] for row in cached(played)] == [0.0, 0.0, 26 * 16.0, 799.0]
    assert [row[TWO_A] for row in cached(played)] == [0.0] * 4


def test_a_follow_up_finds_the_answer_before_it(caching):
    """A turn of 400 + 240 tokens, then the same with a question behind: the engine has all 40 blocks but the last."""
    rows = [{"prompt_tokens": 400, "output_tokens": 240}, {"arrived_at_s": 10.0, "prompt_tokens": 672}]
    episode = hashed(
        workload(caching, *rows), [range(25), range(42)], session_index=[0, 0], parent_index=[-1, 0], think_s=[0.0, 7.6]
    )
    played = Played(FleetEnv(caching), episode, [ONE, ONE])
    assert played.env.worlds.fleet.requests["cached_tokens"][0, 1] == 39 * 16  # the last generated token has no KV yet
    assert cached(played)[1][ONE] == 400.0


def test_a_replica_that_goes_is_expected_back_without_its_cache(tmp_path):
    scenario = by_hand.scenario(tmp_path, CACHING | {"fleet.pools.two.min_replicas": 1})
    worlds = FleetWorlds(scenario, 1)
    worlds.load(0, alike(scenario, 0.0, 10.0, 20.0, 30.0))
    expected = []
    for choice, replicas in ((TWO_B, 2), (SHED, 1), (SHED, 2), (TWO_B, 2)):
        expected.append(float(worlds.signals[v.CACHED_TOKENS, 0, TWO_B]))
        worlds.set_replicas(np.array([1, replicas]))
        worlds.step(np.array([choice]))
    assert expected == [0.0, 399.0, 0.0, 0.0]
    assert worlds.fleet.requests["cached_tokens"][0].tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("other", ["without hashes", "without caches"])
def test_nothing_is_expected(caching, hand_scenario, other):
    scenario = hand_scenario if other == "without caches" else caching
    episode = alike(scenario, 0.0, 10.0)
    if other == "without hashes":
        episode = workload(scenario, *(PROMPT | {"arrived_at_s": at_s} for at_s in (0.0, 10.0)))
    played = Played(FleetEnv(scenario), episode, [ONE, ONE])
    assert cached(played) == [[0.0] * 7] * 2
    assert not played.env.worlds.fleet.requests["cached_tokens"].any()


def test_an_episode_begins_with_empty_caches_and_other_worlds_go_on(caching):
    """Loading a longer episode into one world while the other is in the middle of its own."""
    one, other = FleetWorlds(caching, 1), FleetWorlds(caching, 2)
    short, long = alike(caching, 0.0, 10.0), alike(caching, *(float(i) for i in range(9)))
    one.load(0, short)
    other.load_all([short, short])
    one.step(np.array([TWO_B]))
    other.step(np.array([TWO_B, TWO_B]))
    other.load(1, long)
    assert not other.view()[1].signals[v.CACHED_TOKENS].any()
    assert other.view()[0].signals[v.CACHED_TOKENS, TWO_B] == 399.0
    one.step(np.array([TWO_B]))
    other.step(np.array([TWO_B, CACHE]))
    assert other.fleet.requests["cached_tokens"][0, 1] == one.fleet.requests["cached_tokens"][0, 1] == 384
    np.testing.assert_array_equal(other.ledger_usd[0], one.ledger_usd[0])


def test_blocks_that_do_not_fit_are_refused(caching):
    episode = dataclasses.replace(alike(caching, 0.0), prefix_block_tokens=24, prefix_count=[17], prefix_hash=range(17))
    with pytest.raises(InputError, match="block hashes over 24 tokens; legal is a multiple of the engine's 16"):
        FleetWorlds(caching, 1).load(0, episode)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"fleet.pools.two.block_size_tokens": 32}, "32 differs between caching pools; legal is 16"),
        ({"fleet.providers.api.cached_input_usd_per_mtok": 60.0}, "legal is at most input_usd_per_mtok, 50.0"),
    ],
)
def test_scenarios_that_are_refused(tmp_path, overrides, message):
    with pytest.raises(InputError, match=message):
        by_hand.scenario(tmp_path, CACHING | overrides)


def test_list_prices_bring_their_cached_price():
    provider = load_scenario("quickstart").fleet.providers["api"]
    assert (provider.input_usd_per_mtok, provider.cached_input_usd_per_mtok) == (1.0, 0.1)
    own = load_scenario("quickstart", {"fleet.providers.api.cached_input_usd_per_mtok": 0.5}).fleet.providers["api"]
    assert own.cached_input_usd_per_mtok == 0.5
