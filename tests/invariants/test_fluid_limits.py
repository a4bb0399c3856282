"""The fluid surrogate where the answer is known, and what no load and no lever may break."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.invariants.fluid_cases_by_hand import SLOTS, STAY_S, backlog, fleet, levers, run

ROOT = Path(__file__).resolve().parents[2]
TICK_S = 10.0


def steady(fluid, per_s, ticks=60):
    """(T, N, P, K) the same arrivals in every tick."""
    return np.full((ticks, *fluid.flows.shape), per_s * TICK_S)


def test_zero_arrivals_do_nothing():
    fluid = fleet()
    total = run(fluid, steady(fluid, 0.0), *levers(fluid), TICK_S)
    assert all(not values.any() for values in total.values())
    assert not fluid.stations["busy_share"].any() and not backlog(fluid).any()


def test_an_empty_fleet_serves_nothing_and_loses_whoever_has_patience():
    fluid = fleet(replicas=(0.0, 0.0))
    total = run(fluid, steady(fluid, 1.0), *levers(fluid), TICK_S)
    assert not total["served"].any()
    arrived = total["arrived"] - total["failed"]
    np.testing.assert_allclose(total["abandoned"] + backlog(fluid), arrived)


@pytest.mark.parametrize("replicas", [1.0, 5.0, 60.0])
def test_infinite_capacity_is_an_infinite_server(replicas):
    """Without slowing down or waiting: Little's law, nobody lost, and one replica idle as often as Poisson(n) is 0."""
    fluid = fleet(replicas=(replicas,), lag_s=(0.0,), caps=(1e9,), slots=4096.0, slower_s=0.0)
    per_s = 0.4 * replicas
    total = run(fluid, steady(fluid, per_s, 200), *levers(fluid), TICK_S)
    run(fluid, steady(fluid, 30 * per_s, 2), *levers(fluid), 30 * TICK_S)  # arrivals of a long tick: all of Poisson's
    flows = fluid.flows[0, 0]
    np.testing.assert_allclose(flows["running"], per_s * STAY_S * np.array([1.0, 1.5 * 0.9]), rtol=1e-3)
    np.testing.assert_allclose(flows["waiting"], 0.0, atol=1e-6)
    assert total["abandoned"].max() < 1e-6 * total["served"].max()
    if replicas == 1.0:
        assert abs(fluid.stations["busy_share"][0, 0] - (1.0 - np.exp(-flows["running"].sum()))) < 0.005


def test_an_overloaded_pool_serves_what_its_slots_can():
    """S at full slots for both classes in equal shares, and a line that grows by the rest."""
    fluid = fleet(replicas=(2.0,), lag_s=(0.0,), caps=(1e9,), patience_s=1e9)
    arrivals = steady(fluid, 10.0, 60)
    arrivals[..., 1] /= 0.9  # a tenth of the second class fails at once
    total = run(fluid, arrivals, *levers(fluid), TICK_S)
    before = total["served"].sum()
    last = run(fluid, arrivals[:10], *levers(fluid), TICK_S)["served"].sum()
    full_s = STAY_S + 0.1 * (SLOTS - 1.0)
    assert last / (10 * TICK_S) == pytest.approx(2.0 * SLOTS / (full_s * 1.25), rel=0.01)
    assert before > 0.0 and fluid.flows["waiting"].sum() > 1000.0


amounts = st.lists(st.floats(0.0, 400.0), min_size=4, max_size=4)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(amounts, st.floats(0.0, 1.0), st.floats(0.0, 1.0), st.floats(1.0, 64.0), st.floats(0.0, 9.0),
                       st.one_of(st.just(np.inf), st.floats(0.0, 20.0))), min_size=1, max_size=30),
    st.sampled_from([5.0, 17.0, 60.0]),
)  # fmt: skip
def test_nothing_appears_or_disappears(ticks, tick_s):
    fluid = fleet()
    gone = np.zeros(fluid.flows.shape)
    for amount, shed, spill, cap, replicas, release in ticks:
        of_pools, of_classes = levers(fluid)
        of_pools[0, 0], of_classes[0, :, 0], of_classes[0, :, 1] = (cap, replicas, release), shed, spill
        total = run(fluid, [np.array(amount).reshape(1, 2, 2)], of_pools, of_classes, tick_s)
        gone += total["arrived"]
        for name in ("failed", "shed", "spilled", "served", "abandoned"):
            assert total[name].min() >= -1e-12
            gone -= total[name]
        assert (total["served_slo_ok"] <= total["served"] + 1e-9).all()
        assert (fluid.stations["busy_share"] >= 0.0).all() and (fluid.stations["busy_share"] <= 1.0 + 1e-12).all()
    assert backlog(fluid).min() >= -1e-12
    np.testing.assert_allclose(gone, backlog(fluid), atol=1e-9 * max(1.0, 2000.0 * len(ticks)))


def test_more_load_is_never_less_busy_nor_better_served():
    """Up to the quadrature: 0.2 of 6,000 requests served, 0.2 points of those in time."""
    figures = []
    for per_s in np.linspace(0.2, 12.0, 25):
        fluid = fleet(replicas=(2.0,), lag_s=(0.0,), caps=(1e9,), patience_s=1e9)
        total = run(fluid, steady(fluid, per_s), *levers(fluid), TICK_S)
        served = total["served"].sum()
        figures.append((served, fluid.stations["busy_share"][0, 0], -total["served_slo_ok"].sum() / served))
    assert (np.diff(np.array(figures), axis=0) > (-0.2, -1e-9, -2e-3)).all()
    assert np.ptp(np.array(figures), axis=0).min() > 0.5


def test_levers_do_what_they_say():
    fluid = fleet()
    of_pools, of_classes = levers(fluid)
    of_classes[0, 0] = 0.25, 0.0
    total = run(fluid, steady(fluid, 2.0, 6), of_pools, of_classes, TICK_S)
    np.testing.assert_allclose(total["shed"][0, :, 0], 0.25 * total["arrived"][0, :, 0])
    of_classes[0, :, :] = 0.0, 1.0  # all of 76 requests a tick; 10 at once and one a second may be called
    total = run(fluid, steady(fluid, 2.0, 6), of_pools, of_classes, TICK_S)
    assert total["spilled"].sum() == pytest.approx(10.0 + 60.0)


def test_held_work_leaves_in_time_and_not_before():
    fluid = fleet()
    of_pools, of_classes = levers(fluid)
    of_pools[..., 2] = 0.0
    first = run(fluid, steady(fluid, 1.0, 5), of_pools, of_classes, TICK_S)
    assert not first["admitted"][..., 1].any()
    np.testing.assert_allclose(fluid.held.sum(axis=3)[..., 1], first["deferred"][..., 1])
    second = run(fluid, steady(fluid, 0.0, 3), of_pools, of_classes, TICK_S)
    np.testing.assert_allclose(second["admitted"][..., 1], 3 * 9.0)  # the first three ticks' come to their deadline
    of_pools[..., 2] = 0.5
    assert run(fluid, steady(fluid, 0.0, 1), of_pools, of_classes, TICK_S)["admitted"][..., 1].min() >= 5.0


def test_replicas_come_after_their_lag_and_drain():
    fluid = fleet(replicas=(2.0,), lag_s=(30.0,), caps=(1e9,))
    of_pools, of_classes = levers(fluid)
    of_pools[0, 0, 1] = 5.0
    ready = []
    for _ in range(5):
        run(fluid, steady(fluid, 1.0, 1), of_pools, of_classes, TICK_S)
        ready.append(float(fluid.stations["ready"][0, 0]))
        assert fluid.stations["paid_replicas"][0, 0] == 5.0
    assert ready == [2.0, 2.0, 2.0, 5.0, 5.0]
    of_pools[0, 0, 1] = 1.0
    run(fluid, steady(fluid, 1.0, 1), of_pools, of_classes, TICK_S)
    assert fluid.stations["ready"][0, 0] == 1.0 and 0.0 < fluid.stations["draining"][0, 0] < 4.0
    run(fluid, steady(fluid, 1.0, 10), of_pools, of_classes, TICK_S)
    assert fluid.stations["paid_replicas"][0, 0] == pytest.approx(1.0, abs=1e-3)


def test_worlds_do_not_touch_each_other():
    rng = np.random.default_rng(0)
    arrivals = rng.poisson(20.0, (20, 3, 2, 2)).astype(float)
    together = fleet(3)
    run(together, arrivals, *levers(together), TICK_S)
    for w in range(3):
        alone = fleet(1)
        run(alone, arrivals[:, w : w + 1], *levers(alone), TICK_S)
        np.testing.assert_array_equal(alone.flows[0], together.flows[w])


PROGRAM = """
import json, numpy as np
from tests.invariants.fluid_cases_by_hand import backlog, fleet, levers, run
fluid = fleet()
total = run(fluid, np.random.default_rng(0).poisson(30.0, (12, 1, 2, 2)).astype(float), *levers(fluid), 15.0)
print(json.dumps([total[name].tolist() for name in sorted(total)] + [backlog(fluid).tolist()]))
"""


def test_compiled_equals_interpreted():
    results = []
    for disable in ("0", "1"):
        environment = {**os.environ, "NUMBA_DISABLE_JIT": disable, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
        )
        results.append(np.array(json.loads(done.stdout)))
    np.testing.assert_allclose(results[0], results[1], rtol=1e-11, atol=1e-11)
