"""The semantic response cache by hand: who finds what, what it costs, and what a wrong hit is posted as."""

import dataclasses

import by_hand
import numpy as np
import pytest
from by_hand import CACHE, METERED, ONE, SEATS, SHED, STEP_S, Played, workload

from envs.fleet_env import FleetEnv
from marginroute import view as v
from marginroute.response_cache import p_reuse

SEMANTIC = {
    "fleet.response_cache.semantic": {
        "min_similarity": 0.6, "embed_s": 0.02, "embed_usd_per_mtok": 10.0, "lookup_usd": 0.0001,
        "half_similarity": 0.8, "width": 0.05,
    }
}  # fmt: skip
VALUE_USD = 100 * 1000e-6 + 11 * 10_000e-6  # of a metered request: 0.21


def vectors(*cosines):
    """Unit vectors in the plane whose cosines with (1, 0) are the given ones."""
    return np.array([(c, np.sqrt(1.0 - c * c)) for c in cosines], dtype=np.float32)


def episode(scenario, rows, embedding, family=0, needed=0.7, valid_s=np.inf):
    """Requests with keys of their own; `family`, `needed` and `valid_s` are one for all or one each."""
    plain = workload(scenario, *({"prompt_key": i} | row for i, row in enumerate(rows)))
    m = len(rows)
    return dataclasses.replace(
        plain,
        family_index=np.broadcast_to(family, m),
        embedding=embedding,
        needed_similarity=np.broadcast_to(needed, m),
        valid_for_s=np.broadcast_to(valid_s, m),
    )


@pytest.fixture(scope="module")
def semantic(tmp_path_factory):
    return FleetEnv(by_hand.scenario(tmp_path_factory.mktemp("semantic"), SEMANTIC))


def exactly(x):
    return pytest.approx(x, rel=1e-6, abs=1e-9)


def seen(played, step):
    return played.views[step].signals[:, CACHE]


def test_the_nearest_answer_is_found_and_its_risk_shown(semantic):
    """Prompts at cosines 1, 0.65 and 0.8 of the third; the second is nearer to neither limit."""
    rows = [{"arrived_at_s": 0.0}, {"arrived_at_s": 1.0}, {"arrived_at_s": 5.0}]
    played = Played(semantic, episode(semantic.worlds.plant.scenario, rows, vectors(1.0, 0.65, 0.8)), [ONE, ONE, CACHE])
    assert [bool(view.legal[CACHE]) for view in played.views] == [False, True, True]
    assert seen(played, 1)[v.SIMILARITY] == exactly(0.65)
    nearest = vectors(0.65)[0] @ vectors(0.8)[0]  # 0.976
    assert seen(played, 2)[v.SIMILARITY] == exactly(float(nearest))
    assert seen(played, 2)[v.ENTRY_AGE_S] == exactly(4.0 - 11 * STEP_S)
    assert seen(played, 2)[v.P_GOOD_PRIOR] == exactly(0.5 * p_reuse(float(nearest), 0.8, 0.05))
    assert seen(played, 0)[[v.SIMILARITY, v.ENTRY_AGE_S, v.P_GOOD_PRIOR]].tolist() == [0.0, 0.0, 0.0]


def test_a_right_hit_earns_in_full_and_a_wrong_one_is_a_bad_answer(semantic):
    """Similarity 0.8; one request needs 0.7, the other 0.9. Refund: half of 0.21 and 0.02 for handling."""
    rows = [{"arrived_at_s": 0.0}, {"arrived_at_s": 5.0}]
    for needed, wrong in ((0.7, 0), (0.9, 1)):
        both = episode(semantic.worlds.plant.scenario, rows, vectors(1.0, 0.8), needed=needed)
        played = Played(semantic, both, [ONE, CACHE])
        assert (played.count("cache_hits"), played.count("wrong_hits")) == (1, wrong)
        assert played.count("good", METERED) == 2 - wrong
        assert played.usd("usage_revenue") == exactly(2 * VALUE_USD)
        assert played.usd("refunds") == exactly(-wrong * (0.5 * VALUE_USD + 0.02))
        # two prompts of 100 tokens embedded and looked up, one answer stored
        assert played.usd("cache") == exactly(-2 * (100 * 10e-6 + 0.0001) - 0.001)


def test_an_answer_that_was_bad_stays_bad(semantic):
    rows = [{"arrived_at_s": 0.0, "good": [0, 1, 1]}, {"arrived_at_s": 5.0}]
    played = Played(semantic, episode(semantic.worlds.plant.scenario, rows, vectors(1.0, 0.8)), [ONE, CACHE])
    assert (played.count("cache_hits"), played.count("wrong_hits"), played.count("good")) == (1, 0, 0)


def test_facts_change(semantic):
    """Stored at 0.11 s and given at 5 s: right if it may be 4.9 s old, wrong if only 4.8; the words are the same."""
    for valid_s, wrong in ((4.9, 0), (4.8, 1)):
        rows = [{"arrived_at_s": 0.0, "prompt_key": 0}, {"arrived_at_s": 5.0, "prompt_key": 0}]
        both = episode(semantic.worlds.plant.scenario, rows, vectors(1.0, 1.0), valid_s=valid_s)
        played = Played(semantic, both, [ONE, CACHE])
        assert seen(played, 1)[v.SIMILARITY] == 1.0
        assert played.count("wrong_hits") == wrong


def test_every_look_up_takes_its_time(semantic):
    """The embedding's 20 ms come before anything is decided: TTFT is 0.03 s at the engine, 0.025 s from the cache."""
    rows = [{"arrived_at_s": 0.0}, {"arrived_at_s": 5.0}, {"arrived_at_s": 6.0, "prompt_key": -1}]
    three = episode(semantic.worlds.plant.scenario, rows, vectors(1.0, 0.8, 1.0), family=[0, 0, -1])
    played = Played(semantic, three, [ONE, CACHE, ONE])
    assert [float(view.request[v.WAITED_S]) for view in played.views] == [0.02, 0.02, 0.0]


def test_promises_count_from_the_arrival(tmp_path):
    """An SLO of 25 ms for the first token: 10 ms at the engine keep it, 20 ms of embedding before them do not."""
    for embed_s, kept in ((0.0, 1), (0.02, 0)):
        changes = SEMANTIC | {"plans.classes.metered.slo.ttft_s": 0.025}
        env = FleetEnv(by_hand.scenario(tmp_path, changes | {"fleet.response_cache.semantic.embed_s": embed_s}))
        played = Played(env, episode(env.worlds.plant.scenario, [{}], vectors(1.0)), [ONE])
        assert played.count("ttft_ok") == kept


def test_patience_counts_from_the_arrival(tmp_path):
    """Who waits 15 ms is gone after an embedding of 20 ms."""
    env = FleetEnv(by_hand.scenario(tmp_path, SEMANTIC))
    one = episode(env.worlds.plant.scenario, [{"patience_s": 0.015}], vectors(1.0))
    assert Played(env, one, [ONE]).count("abandoned") == 1


TENANTS = [{"arrived_at_s": 0.0, "tenant_index": 0}, {"arrived_at_s": 5.0, "tenant_index": 1}]


@pytest.mark.parametrize("same_words", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_nobody_finds_an_answer_of_another_tenant_unless_shared(tmp_path, shared, same_words):
    env = FleetEnv(by_hand.scenario(tmp_path, SEMANTIC | {"fleet.response_cache.shared": shared}))
    rows = [row | ({"prompt_key": 0} if same_words else {}) for row in TENANTS]
    both = episode(env.worlds.plant.scenario, rows, vectors(1.0, 1.0 if same_words else 0.9))
    played = Played(env, both, [ONE, CACHE if shared else SHED])
    assert bool(played.views[1].legal[CACHE]) == shared


def test_an_answer_overwritten_by_another_tenant_is_not_lost(semantic):
    """Two tenants ask the same words; each keeps an answer of its own."""
    rows = [row | {"prompt_key": 0} for row in (*TENANTS, TENANTS[0] | {"arrived_at_s": 8.0})]
    three = episode(semantic.worlds.plant.scenario, rows, vectors(1.0, 1.0, 1.0))
    played = Played(semantic, three, [ONE, ONE, CACHE])
    assert seen(played, 2)[v.ENTRY_AGE_S] == exactly(8.0 - 11 * STEP_S)


def test_a_class_whose_terms_forbid_it_is_neither_looked_up_nor_stored(tmp_path):
    env = FleetEnv(by_hand.scenario(tmp_path, SEMANTIC | {"plans.classes.metered.entitlements.cache": False}))
    rows = [{"arrived_at_s": t, "class_index": k} for t, k in ((0.0, METERED), (5.0, METERED), (6.0, SEATS))]
    played = Played(env, episode(env.worlds.plant.scenario, rows, vectors(1.0, 0.9, 0.9)), [ONE, ONE, ONE])
    assert not any(view.legal[CACHE] for view in played.views)
    assert played.usd("cache", METERED) == 0.0 and float(played.views[0].request[v.WAITED_S]) == 0.0
    assert played.usd("cache", SEATS) == exactly(-(100 * 10e-6 + 0.0001) - 0.001)


def test_least_recently_used_answers_go_first_and_old_ones_are_passed_over(semantic):
    """Room for two; the first is used before the third comes, so that the second goes. After 20 s nothing is fresh."""
    times = (0.0, 1.0, 2.0, 3.0, 4.0, 22.0, 40.0)
    rows = [{"arrived_at_s": t} for t in times]
    embedding = vectors(1.0, 0.0, 0.999, -1.0, 0.01, 0.99, 0.99)
    many = episode(semantic.worlds.plant.scenario, rows, embedding, family=[0, 0, 0, 0, 0, 0, 0])
    played = Played(semantic, many, [ONE, ONE, CACHE, ONE, SHED, ONE, SHED])
    legal = [bool(view.legal[CACHE]) for view in played.views]
    # 4: the neighbour of the second finds nothing; 5: the first is 21.9 s old; 6: that of 22 s is 17.9 s old
    assert legal == [False, False, True, False, False, False, True]
    assert seen(played, 6)[v.SIMILARITY] == exactly(1.0)


def test_exact_caches_ignore_meaning(hand_env):
    rows = [{"arrived_at_s": 0.0}, {"arrived_at_s": 5.0}]
    both = episode(hand_env.worlds.plant.scenario, rows, vectors(1.0, 0.99))
    played = Played(hand_env, both, [ONE, ONE])
    assert not played.views[1].legal[CACHE] and played.count("cache_hits") == 0
