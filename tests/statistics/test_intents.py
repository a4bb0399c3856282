"""Questions asked again in other words: popularity, drift, similarity and reuse against closed forms."""

import numpy as np
import pytest
from scipy import stats

from envs.scenario import load_scenario
from envs.workload.intents import IntentSpec, Reuse, draw_intents, draw_reuse
from marginroute.response_cache import p_reuse

PLAIN = {
    "share": 1.0, "per_tenant": 5, "common": 0, "common_share": 0.0, "exponent": 1.0, "turnover_per_s": 0.0,
    "exact_share": 0.0, "spread": 0.5, "dimensions": 2,
}  # fmt: skip
HORIZON_S = 3600.0


def draw(m, tenants=1, seed=0, **changes):
    rng = np.random.default_rng(seed)
    tenant = rng.integers(0, tenants, m).astype(np.int32)
    at_s = np.sort(rng.random(m)) * HORIZON_S
    return tenant, draw_intents(IntentSpec(**(PLAIN | changes)), rng, tenant, at_s, HORIZON_S)


def members(asked):
    order = np.argsort(asked.family_index, kind="stable")
    order = order[asked.family_index[order] >= 0]
    return np.split(order, np.flatnonzero(np.diff(asked.family_index[order])) + 1)


def test_popularity_falls_like_the_power_of_the_rank():
    _, asked = draw(200_000)
    counts = np.sort(np.bincount(asked.family_index))[::-1]
    expected = 1.0 / np.arange(1, 6)
    np.testing.assert_allclose(counts / counts.sum(), expected / expected.sum(), rtol=0.02)
    assert (asked.source == np.arange(200_000)).all() and (asked.prompt_key == asked.source).all()


def test_intents_belong_to_a_tenant_unless_they_are_common():
    tenant, asked = draw(50_000, tenants=10, share=0.8, common=3, common_share=0.25)
    sizes = {len(set(tenant[rows])) for rows in members(asked)}
    assert sizes == {1, 10}
    common = sum(len(rows) for rows in members(asked) if len(set(tenant[rows])) == 10)
    assert (asked.family_index < 0).mean() == pytest.approx(0.2, abs=0.01)
    assert common / (asked.family_index >= 0).sum() == pytest.approx(0.25, abs=0.01)


def test_intents_give_way_at_their_rate():
    """Five places, four changes an hour each: 5 (1 + 4) intents are expected, Poisson for the changes."""
    found = [draw(3_000, seed=seed, turnover_per_s=4.0 / 3600.0, exponent=0.0)[1] for seed in range(40)]
    intents = np.array([asked.family_index.max() + 1 for asked in found])
    assert intents.mean() == pytest.approx(25.0, abs=4.0 * np.sqrt(20.0 / 40.0))
    for rows in members(found[0]):  # one after the other: nobody asks for the old one again
        assert (np.diff(rows) > 0).all()


def test_words_are_repeated_at_their_share():
    _, asked = draw(50_000, exact_share=0.3)
    repeated = asked.source != np.arange(50_000)
    assert repeated.mean() == pytest.approx(0.3, abs=0.01)
    assert (asked.source <= np.arange(50_000)).all() and (asked.source == asked.source[asked.source]).all()
    np.testing.assert_array_equal(asked.embedding, asked.embedding[asked.source])
    np.testing.assert_array_equal(asked.family_index, asked.family_index[asked.source])


def test_distance_of_a_pair_is_exponential_for_small_spread():
    """1 - cos is spread ** 2 chi2_2, exponential with mean 2 spread ** 2."""
    _, asked = draw(40_000, spread=0.05, per_tenant=1)
    vectors = asked.embedding.astype(np.float64)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0, rtol=1e-6)
    distance = 1.0 - (vectors[::2] * vectors[1::2]).sum(axis=1)
    assert distance.mean() == pytest.approx(2 * 0.05**2, rel=0.03)
    assert stats.kstest(distance, stats.expon(scale=2 * 0.05**2).cdf).statistic < 0.02


def test_hit_ratios_are_those_of_the_published_table():
    """AWS: 63,796 queries of about 3,640 intents into an empty cache; here a sixth of both."""
    _, asked = draw(10_632, per_tenant=607, exponent=0.0, exact_share=0.05)
    nearest = np.zeros(10_632)
    for rows in members(asked):
        near = asked.embedding[rows] @ asked.embedding[rows].T
        nearest[rows] = np.where(np.tri(len(rows), k=-1, dtype=bool), near, 0.0).max(axis=1)
    thresholds = np.array([0.99, 0.95, 0.90, 0.80, 0.75, 0.50])
    ratios = (nearest[:, None] >= thresholds - 1e-6).mean(axis=0)
    np.testing.assert_allclose(ratios, [0.235, 0.560, 0.745, 0.876, 0.903, 0.943], atol=0.045)


def test_answers_are_right_with_the_stated_probability():
    task = np.repeat(np.arange(2, dtype=np.int32), 50_000)
    reuse = (Reuse(0.7, 0.05, np.inf), Reuse(0.9, 0.02, 100.0))
    needed, valid_s = draw_reuse(reuse, np.random.default_rng(0), task)
    for similarity in (0.6, 0.75, 0.9, 0.97):
        for j, item in enumerate(reuse):
            right = (needed[task == j] <= similarity).mean()
            assert right == pytest.approx(p_reuse(similarity, item.half_similarity, item.width), abs=0.01)
    assert (needed <= 1.0).all() and np.isinf(valid_s[task == 0]).all()
    assert (valid_s[task == 1] >= 50.0).mean() == pytest.approx(np.exp(-0.5), abs=0.01)


OVER = {
    "drift": {},
    "workload.recurring.share": 0.0,
    "workload.intents": {"share": 0.9, "per_tenant": 5, "exact_share": 0.2},
}


@pytest.mark.parametrize("more", [{}, {"workload.season": {"daily": [1.0, 1.2]}, "requests_per_episode": None}])
def test_an_intent_is_one_kind_of_work_and_answered_alike(more):
    """Through the generator, and through the composition of seasons and sessions."""
    workload = load_scenario("quickstart", OVER | more).generate(3)
    assert workload.has_families and workload.embedding.shape == (workload.n_requests, 3)
    for rows in members(workload):
        for name in ("task_index", "difficulty_signal", "good", "p_good"):
            assert (getattr(workload, name)[rows] == getattr(workload, name)[rows[0]]).all()
    for name in ("prompt_tokens", "output_tokens", "embedding", "family_index"):
        _, first, same = np.unique(workload.prompt_key, return_index=True, return_inverse=True)
        np.testing.assert_array_equal(getattr(workload, name), getattr(workload, name)[first[same]])
    lengths = [len(set(workload.prompt_tokens[rows])) for rows in members(workload) if len(rows) > 10]
    assert min(lengths) > 3  # other words, other lengths
