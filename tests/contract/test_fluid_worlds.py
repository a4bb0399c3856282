"""`FluidWorlds`: money by the ledger's rules, from the same scenario as the worlds of requests."""

import math

import numpy as np
import pytest

from envs.economics.ledger import ACCOUNTS, COUNTS
from envs.fluid_worlds import RELEASE_PER_S, SPILL_SHARE, FluidWorlds
from envs.worlds import FleetWorlds
from marginroute import view as v
from marginroute.errors import InputError


@pytest.fixture(scope="module")
def worlds(small_plant):
    return FluidWorlds(small_plant, 2)


def bin_arrivals(workload, tick_s, share):
    """(T, P, K) requests per tick, those of a class split over the pools by `share` (P, K)."""
    ticks = math.ceil(workload.horizon_s / tick_s)
    counts = np.zeros((ticks, share.shape[1]))
    inside = workload.arrived_at_s < workload.horizon_s
    tick = (workload.arrived_at_s[inside] / tick_s).astype(np.int64)
    np.add.at(counts, (np.minimum(tick, ticks - 1), workload.class_index[inside]), 1.0)
    return counts[:, None, :] * share


def play(worlds, workload, tick_s=5.0, levers=None):
    for w in range(worlds.n_worlds):
        worlds.reset(w)
    pools = len(worlds.plant.spec.pools)
    share = np.full((pools, len(worlds.plant.terms)), 1.0 / pools)
    rewards = np.zeros(worlds.n_worlds)
    for amounts in bin_arrivals(workload, tick_s, share):
        worlds.step(np.stack([amounts] * worlds.n_worlds), *(levers or worlds.default_levers()), tick_s)
        rewards += worlds.rewards_usd
    return rewards


def test_rewards_add_up_to_the_ledger(worlds, small_scenario):
    rewards = play(worlds, small_scenario.generate(0, "train"))
    np.testing.assert_allclose(rewards, worlds.ledger_usd.sum(axis=(1, 2)), rtol=1e-12)
    np.testing.assert_array_equal(worlds.ledger_usd[0], worlds.ledger_usd[1])


def test_what_time_brings_is_what_the_engine_world_posts(worlds, small_scenario):
    """GPU-hours and seat revenue of the same 20 s, to the last digit; requests that came are those of the workload."""
    workload = small_scenario.generate(0, "train")
    play(worlds, workload)
    exact = FleetWorlds(worlds.plant, 1)
    exact.load_all([workload])
    while not exact.done.all():
        exact.step(np.array([exact.plant.layout.n_candidates - 1]))
    for account in ("gpu_hours", "seat_revenue"):
        a = ACCOUNTS.index(account)
        np.testing.assert_allclose(worlds.ledger_usd[0, a], exact.ledger_usd[0, a], rtol=1e-9)
    first = COUNTS.index("first_calls")
    np.testing.assert_allclose(worlds.counts[0, first], exact.counts[0, first])


def test_spilled_work_costs_the_provider_price(worlds, small_scenario):
    pool_levers, class_levers = worlds.default_levers()
    class_levers[..., SPILL_SHARE] = 1.0
    play(worlds, small_scenario.generate(0, "train"), levers=(pool_levers, class_levers))
    c = worlds.plant.layout.kind.tolist().index(v.PROVIDER)
    usd = worlds.plant.static_signals[[v.INPUT_USD, v.OUTPUT_USD], c]
    tokens = worlds.counts[0, [COUNTS.index("prompt_tokens"), COUNTS.index("output_tokens")]].sum(axis=1)
    spent = -worlds.ledger_usd[0, ACCOUNTS.index("api_spend")].sum()
    assert 0.0 < spent <= float(usd @ tokens) * (1.0 + 1e-9)


def test_held_work_counts_as_deferred(worlds, small_scenario):
    pool_levers, class_levers = worlds.default_levers()
    pool_levers[..., RELEASE_PER_S] = 0.0
    play(worlds, small_scenario.generate(0, "train"), levers=(pool_levers, class_levers))
    batch = worlds.plant.layout.class_names.index("batch")
    deferred = worlds.counts[0, COUNTS.index("deferred")]
    assert deferred[batch] == pytest.approx(worlds.counts[0, COUNTS.index("first_calls"), batch], rel=1e-6)
    assert deferred.sum() == deferred[batch]


@pytest.mark.parametrize(("tick_s", "shape"), [(0.0, (2, 3, 3)), (float("nan"), (2, 3, 3)), (5.0, (1, 3, 3))])
def test_bad_input_is_one_sentence(worlds, tick_s, shape):
    with pytest.raises(InputError, match="legal is"):
        worlds.step(np.zeros(shape), *worlds.default_levers(), tick_s)
