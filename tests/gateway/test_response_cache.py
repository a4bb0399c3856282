"""The gateway's index of stored answers: cosine, partitions, age, eviction."""

import numpy as np
import pytest

from marginroute.errors import InputError
from marginroute.response_cache import ResponseCache


def cache(**changes):
    return ResponseCache(**({"dimensions": 3, "capacity": 3, "ttl_s": 10.0} | changes))


def test_the_nearest_answer_of_any_length_of_vector():
    index = cache()
    index.store("t", "a", [2.0, 0.0, 0.0], 1, 0.0, "answer a")
    index.store("t", "b", [0.0, 5.0, 0.0], 2, 1.0, "answer b")
    hit = index.look_up("t", "c", [0.6, 0.8, 0.0], 3.0)
    assert (hit.key, hit.tier, hit.answer, hit.age_s) == ("b", 2, "answer b", 2.0)
    assert hit.similarity == pytest.approx(0.8)
    assert index.look_up("t", "c", [0.1, 0.1, 1.0], 3.0) is None  # 0.1 is below the least similarity


def test_the_same_key_is_the_same_prompt_whatever_its_embedding_says():
    index = cache()
    index.store("t", "a", [1.0, 0.0, 0.0], 0, 0.0)
    index.store("t", "b", [0.0, 1.0, 0.0], 0, 0.0)
    hit = index.look_up("t", "a", [0.0, 1.0, 0.0], 0.0)
    assert (hit.key, hit.similarity) == ("a", 1.0)


def test_tenants_are_apart_unless_shared():
    for shared, found in ((False, False), (True, True)):
        index = cache(shared=shared)
        index.store("one", "a", [1.0, 0.0, 0.0], 0, 0.0)
        assert (index.look_up("two", "a", [1.0, 0.0, 0.0], 0.0) is not None) == found


def test_answers_grow_old():
    index = cache()
    index.store("t", "a", [1.0, 0.0, 0.0], 0, 0.0)
    index.store("t", "b", [0.8, 0.6, 0.0], 0, 5.0)
    assert index.look_up("t", "a", [1.0, 0.0, 0.0], 10.0).key == "a"
    assert index.look_up("t", "a", [1.0, 0.0, 0.0], 10.1).key == "b"  # the nearest that is fresh
    assert index.look_up("t", "a", [1.0, 0.0, 0.0], 15.1) is None
    index.store("t", "a", [1.0, 0.0, 0.0], 0, 16.0)
    assert index.look_up("t", "a", [1.0, 0.0, 0.0], 20.0).age_s == 4.0


def test_the_least_recently_used_goes_first_over_all_tenants():
    index = cache()
    for t, (tenant, key) in enumerate((("x", "a"), ("y", "b"), ("x", "c"))):
        index.store(tenant, key, np.eye(3)[t], 0, float(t))
    index.use("x", "a")
    index.store("y", "d", [1.0, 1.0, 1.0], 0, 3.0)
    assert len(index) == 3
    found = [index.look_up(*who, vector, 3.0) for who, vector in ((("x", "a"), [1, 0, 0]), (("y", "b"), [0, 1, 0]))]
    assert found[0].key == "a" and found[1].key == "d"  # b is gone, d is at 0.58


def test_it_equals_a_search_over_everything(seed=0):
    """A thousand stores and look-ups against the plain definition."""
    rng, index, plain = np.random.default_rng(seed), cache(capacity=40, ttl_s=50.0), {}
    for step in range(1000):
        tenant, key, now_s = str(rng.integers(3)), str(rng.integers(60)), float(step)
        vector = rng.standard_normal(3)
        vector /= np.linalg.norm(vector)
        if rng.random() < 0.5:
            plain.pop((tenant, key), None)
            if len(plain) >= 40:
                del plain[next(iter(plain))]
            plain[tenant, key] = (vector, now_s)
            index.store(tenant, key, vector, 0, now_s)
            continue
        fresh = {
            k: 1.0 if k == key else float(e @ vector)
            for (t, k), (e, at_s) in plain.items()
            if t == tenant and now_s - at_s <= 50.0
        }
        best = max(fresh, key=fresh.get, default=None)
        hit = index.look_up(tenant, key, vector, now_s)
        if best is None or fresh[best] < 0.5:
            assert hit is None
        else:
            assert hit.key == (key if key in fresh else best) and hit.similarity == pytest.approx(fresh[best], abs=1e-6)
            index.use(tenant, hit.key)
            plain[tenant, hit.key] = plain.pop((tenant, hit.key))


@pytest.mark.parametrize("embedding", [[1.0, 2.0], [0.0, 0.0, 0.0], [float("nan"), 0.0, 0.0], [[1.0, 0.0, 0.0]]])
def test_a_vector_that_is_none_is_refused_in_one_sentence(embedding):
    with pytest.raises(InputError, match="legal is a vector of 3 numbers"):
        cache().look_up("t", "a", embedding, 0.0)


@pytest.mark.parametrize("name", ["dimensions", "capacity", "ttl_s"])
def test_sizes_are_positive(name):
    with pytest.raises(InputError, match=f"{name} is 0"):
        cache(**{name: 0})
