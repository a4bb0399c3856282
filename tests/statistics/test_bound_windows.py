"""The compiled parts of the bounds against their definitions, and the floor of a pool against all of its batches."""

import numpy as np
import pytest
from scipy.optimize import linprog

from envs.plant import Plant
from envs.scenario import load_scenario
from evaluation.bound_dual import DualBound
from evaluation.bound_options import make_options
from evaluation.bound_windows import fill_table, runs
from evaluation.hull import _steepest_floor

SMALL = {"horizon_s": 30.0, "requests_per_episode": 90, "load_scale": 2.0, "fleet.response_cache": None}


def test_the_table_finds_the_cheapest_bucket_of_every_window():
    rng = np.random.default_rng(0)
    stations, buckets = 3, 23
    prices = rng.integers(0, 4, (stations, buckets - 1)).astype(float)  # ties, too
    ends = np.array([(s, a, b) for s in range(stations) for a in range(buckets) for b in range(a, buckets)])
    left, right, levels = runs(*ends.T, stations, buckets)
    usd = np.empty((levels, stations, buckets))
    at = np.empty(usd.shape, dtype=np.int32)
    fill_table(prices, usd, at)
    free_after = np.column_stack([prices, np.zeros(stations)])
    lowest = [free_after[s, a : b + 1].min() for s, a, b in ends]
    np.testing.assert_array_equal(np.minimum(usd.ravel()[left], usd.ravel()[right]), lowest)
    earliest = [s * buckets + a + free_after[s, a : b + 1].argmin() for s, a, b in ends]
    first = usd.ravel()[left] <= usd.ravel()[right]
    np.testing.assert_array_equal(np.where(first, at.ravel()[left], at.ravel()[right]), earliest)


@pytest.mark.parametrize("scale", [0.0, 1e-3, 1e-2, 0.1])
def test_the_bound_is_what_its_formula_says_of_all_options(scale):
    """Options that are left out because others are better in all respects change nothing at any prices."""
    plant = Plant(load_scenario("quickstart", SMALL))
    o = make_options(plant, plant.scenario.generate(0, "heldout"))
    dual = DualBound(o)
    assert len(dual.options.request) < len(o.request)
    prices = scale * np.random.default_rng(1).random((dual.stations, dual.buckets))
    free_after = np.column_stack([np.where(dual.limited[:, None], prices, 0.0), np.zeros(dual.stations)])
    best_usd = o.unserved_usd.copy()
    for k in range(len(o.request)):
        begin = int(o.from_s[k] / dual.bucket_s)
        cheapest = [
            free_after[o.station[k], begin : int(min(until_s / dual.bucket_s, dual.buckets)) + 1].min()
            for until_s in (o.prefill_until_s[k], o.decode_until_s[k])
        ]
        usd = o.value_usd[k] - o.prefill_s[k] * cheapest[0] - o.decode_s[k] * cheapest[1]
        best_usd[o.request[k]] = max(best_usd[o.request[k]], usd)
    kept = np.maximum(np.diff(free_after[:, :-1], prepend=0.0, axis=1), 0.0).sum(axis=1)
    sold_usd = float((free_after[:, :-1] * dual.sold).sum() + o.capacity.burst @ kept)
    assert dual.evaluate(prices)[0] == pytest.approx(o.shared_usd + sold_usd + best_usd.sum(), abs=1e-9)


@pytest.mark.parametrize("least", [None, 7])
@pytest.mark.parametrize("seed", range(4))
def test_the_floor_is_the_steepest_under_all_batches(seed, least):
    """Five seats, a budget of 12 tokens, two vertices of the attended tokens for each batch: all listed."""
    rng = np.random.default_rng(seed)
    slots, budget = 5, 12
    token_s = np.cumsum(rng.uniform(0.1, 1.0, budget + 1))
    mixed_s = token_s - np.cumsum(rng.uniform(0.0, 0.02, budget + 1)) * (np.arange(budget + 1) > 0)
    kv_tokens = np.sort(rng.uniform(1.0, 50.0, (slots + 1, 2)), axis=1) * np.arange(slots + 1)[:, None]
    decode_s = 0.5 + rng.uniform(0.01, 0.1) * kv_tokens
    weight = tuple(rng.uniform(0.1, 1.0, 3))
    rows, seconds = [], []
    for n in range(slots + 1):
        for tokens in range(max(n, 1), budget + 1):
            mine_s = token_s[tokens] if tokens == n else mixed_s[tokens]
            for kv, more_s in zip(kv_tokens[n], decode_s[n], strict=True):
                rows.append([tokens - n, n, kv])
                seconds.append(mine_s + (more_s if n else 0.0))
    always = [[-1.0, 1.0, 0.0], [0.0, 0.0, 1.0]] if least is None else [[-1.0 - least, 1.0, 1.0 + least]]
    exact = linprog(-np.array(weight), rows + always, seconds + [0.0] * len(always), method="highs")
    floor = np.array(_steepest_floor(token_s, mixed_s, kv_tokens, decode_s, weight, least))
    assert (np.array(rows) @ floor <= np.array(seconds) * (1.0 + 1e-12)).all()
    assert (np.array(always) @ floor <= 1e-12).all()
    assert floor @ weight == pytest.approx(-exact.fun, rel=1e-5)
