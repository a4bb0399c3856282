"""Spot machines: what they cost, who is lost when they are reclaimed, and when they come back, worked out by hand."""

import dataclasses

import by_hand
import numpy as np
import pytest
from by_hand import ONE, SHED, TWO_A, TWO_B, Played, workload
from replicas import all_paid_s, one_pool, states

from envs.fleet import engine
from envs.fleet.scaling import advance, fail_replica, reclaim_replica, set_replicas
from envs.fleet.state import ACTIVE, DOWN, DRAINING, LEAVING, OFF, STARTING
from envs.fleet_env import FleetEnv
from envs.fluid_worlds import FluidWorlds
from envs.plant import Plant
from envs.scenario_faults import faults
from envs.worlds import FleetWorlds
from marginroute.errors import InputError

SPOT = {"replicas": 1, "gpu_usd_per_hour": 1.2, "notice_s": 2.0}
OVERRIDES = {"fleet.pools.two.spot": SPOT, "fleet.pools.two.provision_s": 3.0, "fleet.pools.two.load_s": 4.0}
RECLAIM = {"pool": "two", "index": 1, "starts_at_s": 10.0, "duration_s": 20.0, "reclaimed": True}


def _play(tmp_path, rows, choices):
    scenario = by_hand.scenario(tmp_path, {**OVERRIDES, "fleet.faults": [RECLAIM]})
    episode = dataclasses.replace(workload(scenario, *rows), faults=scenario.generate(0).faults)
    return Played(FleetEnv(scenario), episode, choices)


def test_a_reclaimed_machine_gives_notice_loses_what_is_left_and_is_not_paid_until_it_is_back(tmp_path):
    """Notice at 10 s, gone at 12 s, capacity at 30 s, serving at 37 s; of two requests one ends within the notice."""
    rows = [
        {"arrived_at_s": 9.9, "output_tokens": 100},  # ends at 10.9
        {"arrived_at_s": 9.9, "output_tokens": 400},  # would end at 13.9
        *({"arrived_at_s": t} for t in (10.1, 36.9, 37.1)),
    ]
    played = _play(tmp_path, rows, [TWO_B, TWO_B, SHED, TWO_A, SHED, SHED])
    assert [bool(view.legal[TWO_B]) for view in played.views] == [True, True, False, False, False, True]
    assert [bool(view.legal[TWO_A]) for view in played.views] == [True] * 6
    assert played.infos[2]["now_s"] == 12.0  # the lost one comes back
    requests = played.env.worlds.fleet.requests[0]
    assert requests["completed_at_s"][0] == pytest.approx(10.9)
    assert requests["completed_at_s"][1] == pytest.approx(12.0 + 4.0)
    assert (played.count("retries"), played.count("served"), played.count("shed")) == (1, 2, 3)
    on_demand_usd, spot_usd = (60 * 1 + 60 * 2) * 3.6, (12 + 30) * 2 * 1.2
    assert played.usd("gpu_hours") == pytest.approx(-(on_demand_usd + spot_usd) / 3600.0, rel=1e-12)
    assert sum(played.rewards) == pytest.approx(played.ledger_usd.sum(), abs=1e-12)


def test_spot_machines_that_stay_only_cost_less(tmp_path):
    """Nothing else changes: the same outcomes, and 1 of 2 replicas of 2 GPUs at 1.20 in place of 3.60 USD per hour."""
    rows = [{"arrived_at_s": 0.3 * i, "output_tokens": 40 + i} for i in range(30)]
    choices = [(ONE, TWO_A, TWO_B)[i % 3] for i in range(30)]
    played = []
    for overrides in ({}, {"fleet.pools.two.spot": SPOT}):
        scenario = by_hand.scenario(tmp_path, overrides)
        played.append(Played(FleetEnv(scenario), workload(scenario, *rows), choices))
    listed, spot = played
    assert spot.usd("gpu_hours") == pytest.approx(-60 * (1 + 2) * 3.6 / 3600 - 60 * 2 * 1.2 / 3600, rel=1e-12)
    gained_usd = spot.ledger_usd.sum() - listed.ledger_usd.sum()
    assert gained_usd == pytest.approx(60 * 2 * 2.4 / 3600)
    np.testing.assert_array_equal(spot.counts, listed.counts)


def _fleet(rows=(), **changes):
    """Three of four replicas of one pool run, the last two on spot; 30 s until a machine comes, 10 s to load."""
    pool = {"replicas": 3, "max_replicas": 4, "spot_replicas": 2, "provision_s": 30.0, "load_s": 10.0, "notice_s": 5.0}
    return one_pool(8, rows, **(pool | changes))


def test_nobody_gets_a_machine_before_there_is_capacity():
    """Off when it is reclaimed, asked for 10 s later: the start waits until 60 s, then takes 40 s, and is paid then."""
    fleet = _fleet()
    reclaim_replica(*fleet.arrays, 0, 3, 60.0, 0.0)
    assert states(fleet)[3] == OFF
    advance(*fleet.arrays, 0, 10.0)
    set_replicas(*fleet.arrays, 0, 0, 4, 10.0)
    assert states(fleet) == [ACTIVE, ACTIVE, ACTIVE, DOWN]
    advance(*fleet.arrays, 0, 60.0)
    assert states(fleet)[3] == STARTING
    advance(*fleet.arrays, 0, 100.0)
    assert states(fleet)[3] == ACTIVE
    assert all_paid_s(fleet, 100.0) == [100.0, 100.0, 100.0, 40.0]


def test_a_start_is_lost_at_once_and_one_given_up_does_not_come_back():
    fleet = _fleet()
    set_replicas(*fleet.arrays, 0, 0, 4, 0.0)
    advance(*fleet.arrays, 0, 10.0)
    reclaim_replica(*fleet.arrays, 0, 3, 50.0, 10.0)
    assert states(fleet)[3] == DOWN
    advance(*fleet.arrays, 0, 20.0)
    set_replicas(*fleet.arrays, 0, 0, 3, 20.0)
    assert states(fleet) == [ACTIVE, ACTIVE, ACTIVE, OFF]
    advance(*fleet.arrays, 0, 200.0)
    assert states(fleet)[3] == OFF
    assert all_paid_s(fleet, 200.0)[3] == 10.0


def test_the_later_of_two_reclaims_counts_and_a_crash_while_leaving_is_the_end():
    fleet = _fleet([(1, 90)])
    engine.submit(*fleet.arrays, 0, 2, 0, 0.0)
    reclaim_replica(*fleet.arrays, 0, 2, 40.0, 0.0)
    assert states(fleet)[2] == LEAVING
    reclaim_replica(*fleet.arrays, 0, 2, 70.0, 0.0)
    advance(*fleet.arrays, 0, 3.0)
    fail_replica(*fleet.arrays, 0, 2, 10.0, 3.0)
    assert states(fleet)[2] == DOWN and engine.pop_finished(fleet.worlds, fleet.requests, 0) == 0
    advance(*fleet.arrays, 0, 69.0)
    assert states(fleet)[2] == DOWN
    advance(*fleet.arrays, 0, 110.0)
    assert states(fleet)[2] == ACTIVE
    assert all_paid_s(fleet, 110.0)[2] == 3.0 + 40.0


@pytest.mark.parametrize(("output_tokens", "paid_s"), [(3, 3.0), (90, 5.0)])
def test_one_that_is_scaled_down_while_leaving_ends_by_itself_or_with_the_machine(output_tokens, paid_s):
    fleet = _fleet([(1, output_tokens)])
    engine.submit(*fleet.arrays, 0, 2, 0, 0.0)
    reclaim_replica(*fleet.arrays, 0, 2, 40.0, 0.0)
    set_replicas(*fleet.arrays, 0, 0, 2, 0.0)  # those that leave go first
    assert states(fleet) == [ACTIVE, ACTIVE, DRAINING, OFF]
    set_replicas(*fleet.arrays, 0, 0, 3, 0.0)
    assert states(fleet)[2] == LEAVING  # calling off the drain does not keep the machine
    set_replicas(*fleet.arrays, 0, 0, 2, 0.0)
    advance(*fleet.arrays, 0, 100.0)
    assert states(fleet)[2] == OFF
    assert all_paid_s(fleet, 100.0)[2] == paid_s


def test_the_time_for_which_machines_are_kept_has_its_closed_form(tmp_path):
    """A renewal process: of 80 s kept and 20 s absent 0.8 is kept; a failure law of its own has other luck."""
    overrides = {"fleet.pools.two.spot": {**SPOT, "mean_time_between_s": 80.0, "mean_absence_s": 20.0}}
    overrides["fleet.pools.two.faults"] = {"mean_time_between_s": 80.0, "mean_repair_s": 20.0}
    rows = faults(by_hand.scenario(tmp_path, overrides, horizon_s=400_000.0), (7,))
    spot, failed = rows[rows["kind"] == 3], rows[(rows["kind"] == 0) & (rows["index"] == 2)]
    assert set(spot["index"]) == {2} and len(failed) > 1000
    absent_s = (np.minimum(spot["ends_at_s"], 400_000.0) - spot["starts_at_s"]).sum()
    assert abs(absent_s / 400_000.0 - 0.2) < 4 * 0.0036  # standard error as in test_engine_faults.py
    assert not np.isin(spot["starts_at_s"], failed["starts_at_s"]).any()


def test_the_surrogate_pays_what_the_engine_pays(tmp_path):
    two = {"max_replicas": 4, "spot": SPOT, "reserved_replicas": 1, "reserved_gpu_usd_per_hour": 2.4}
    overrides = {f"fleet.pools.two.{key}": value for key, value in two.items()}
    plant = Plant(by_hand.scenario(tmp_path, overrides, horizon_s=10.0))
    fluid, engines = FluidWorlds(plant, 1), FleetWorlds(plant, 1)
    for replicas, rate in ((2, 2.4 + 3.6), (4, 2.4 + 2 * 3.6 + 1.2)):
        fluid.reset(0)
        pool_levers, class_levers = fluid.default_levers()
        pool_levers[0, 1, 1] = replicas
        shape = (1, len(plant.spec.pools), len(plant.terms))
        fluid.step(np.zeros(shape), pool_levers, class_levers, 10.0)
        gpu_usd = fluid.ledger_usd[0, list(by_hand.ACCOUNTS).index("gpu_hours"), -1]
        assert gpu_usd == pytest.approx(-10.0 * (3.6 + 2 * rate) / 3600.0)
    np.testing.assert_allclose(engines.own["gpu_usd_per_s"][0, 1:5] * 1800.0, [2.4, 3.6, 3.6, 1.2])


def test_numbers_that_make_no_sense(tmp_path):
    with pytest.raises(InputError, match=r"3 spot\.replicas; legal is 1 to 2"):
        by_hand.scenario(tmp_path, {"fleet.pools.two.spot": {**SPOT, "replicas": 3}})
    with pytest.raises(InputError, match="0 is no spot replica of two; legal is 1 to 1"):
        by_hand.scenario(tmp_path, {**OVERRIDES, "fleet.faults": [RECLAIM | {"index": 0}]})
    with pytest.raises(InputError, match="legal is a pool alone"):
        by_hand.scenario(tmp_path, {**OVERRIDES, "fleet.faults": [RECLAIM | {"slowdown": 2.0}]})
