"""Replicas that come and go: lags, order, and the seconds for which their machines are paid, in closed form."""

import numpy as np
import pytest
from replicas import all_paid_s, one_pool, states

from envs.fleet import engine
from envs.fleet.scaling import advance, fail_replica, set_replicas
from envs.fleet.state import ACTIVE, DOWN, DRAINING, LOST, OFF, STARTING
from marginroute.errors import InputError


def _fleet(rows=(), **changes):
    """Two of four replicas run; 30 s until a machine comes, 10 s more until it serves."""
    pool = {"replicas": 2, "max_replicas": 4, "provision_s": 30.0, "load_s": 10.0}
    return one_pool(max(len(rows), 1), rows, **(pool | changes))


def test_a_start_takes_provisioning_and_loading():
    fleet = _fleet()
    assert states(fleet) == [ACTIVE, ACTIVE, OFF, OFF]
    advance(*fleet.arrays, 0, 5.0)
    set_replicas(*fleet.arrays, 0, 0, 3, 5.0)
    assert states(fleet) == [ACTIVE, ACTIVE, STARTING, OFF]  # the lowest that is off
    advance(*fleet.arrays, 0, 44.9)
    assert states(fleet)[2] == STARTING
    advance(*fleet.arrays, 0, 100.0)
    assert states(fleet)[2] == ACTIVE
    assert fleet.replicas["scraped_at_s"][0, 2] > 45.0  # ready at 45 s, scraped since
    assert all_paid_s(fleet, 100.0) == [100.0, 100.0, 95.0, 0.0]


@pytest.mark.parametrize(("paid_from_load", "paid_s"), [(False, 95.0), (True, 65.0)])
def test_paid_from_provisioning_or_from_loading(paid_from_load, paid_s):
    fleet = _fleet(paid_from_load=paid_from_load)
    advance(*fleet.arrays, 0, 5.0)
    set_replicas(*fleet.arrays, 0, 0, 3, 5.0)
    advance(*fleet.arrays, 0, 100.0)
    assert all_paid_s(fleet, 100.0)[2] == paid_s


def test_a_start_that_is_called_off_before_the_machine_is_there():
    for paid_from_load, paid_s in ((False, 20.0), (True, 0.0)):
        fleet = _fleet(paid_from_load=paid_from_load)
        set_replicas(*fleet.arrays, 0, 0, 4, 0.0)
        advance(*fleet.arrays, 0, 20.0)
        set_replicas(*fleet.arrays, 0, 0, 3, 20.0)
        assert states(fleet) == [ACTIVE, ACTIVE, STARTING, OFF]  # of two equal starts the higher one
        advance(*fleet.arrays, 0, 100.0)
        assert states(fleet) == [ACTIVE, ACTIVE, ACTIVE, OFF]
        assert all_paid_s(fleet, 100.0)[3] == paid_s


def test_the_emptiest_drains_and_is_paid_until_its_last_request_ends():
    fleet = _fleet([(1, 12), (1, 7), (1, 3)])
    engine.submit(*fleet.arrays, 0, 0, 0, 0.0)
    engine.submit(*fleet.arrays, 0, 0, 2, 0.0)
    engine.submit(*fleet.arrays, 0, 1, 1, 0.0)
    advance(*fleet.arrays, 0, 2.5)
    set_replicas(*fleet.arrays, 0, 0, 1, 2.5)
    assert states(fleet)[:2] == [ACTIVE, DRAINING]
    advance(*fleet.arrays, 0, 50.0)
    assert states(fleet)[:2] == [ACTIVE, OFF]
    assert fleet.requests["completed_at_s"][0].tolist() == [12.0, 7.0, 3.0]  # drained, not cut
    assert all_paid_s(fleet, 50.0)[:2] == [50.0, 7.0]
    assert fleet.replicas["busy_s"][0, 1] == 7.0


@pytest.mark.parametrize("look_s", [7.0, 7.25, 30.0])
def test_when_a_drained_replica_goes_off_does_not_depend_on_who_looks(look_s):
    fleet = _fleet([(1, 7)])
    engine.submit(*fleet.arrays, 0, 1, 0, 0.0)
    advance(*fleet.arrays, 0, 1.0)
    set_replicas(*fleet.arrays, 0, 0, 1, 1.0)  # replica 0 is the emptier one
    assert states(fleet)[:2] == [OFF, ACTIVE]
    set_replicas(*fleet.arrays, 0, 0, 2, 1.0)
    advance(*fleet.arrays, 0, 3.0)
    set_replicas(*fleet.arrays, 0, 0, 1, 3.0)  # calls off the start
    fleet.pools["min_replicas"] = 0
    set_replicas(*fleet.arrays, 0, 0, 0, 3.0)
    assert states(fleet)[:2] == [OFF, DRAINING]
    advance(*fleet.arrays, 0, look_s)
    advance(*fleet.arrays, 0, 40.0)
    assert all_paid_s(fleet, 40.0)[:2] == [3.0, 7.0]


def test_a_drain_is_called_off_before_anything_starts():
    fleet = _fleet([(1, 9), (1, 9)])
    for r in range(2):
        engine.submit(*fleet.arrays, 0, r, r, 0.0)
    set_replicas(*fleet.arrays, 0, 0, 1, 0.0)
    assert states(fleet)[:2] == [ACTIVE, DRAINING]
    set_replicas(*fleet.arrays, 0, 0, 3, 0.0)
    assert states(fleet) == [ACTIVE, ACTIVE, STARTING, OFF]
    assert fleet.worlds["draining"][0] == 0


def test_targets_are_kept_between_the_bounds():
    fleet = _fleet(min_replicas=1)
    set_replicas(*fleet.arrays, 0, 0, 0, 0.0)
    assert states(fleet) == [ACTIVE, OFF, OFF, OFF]
    set_replicas(*fleet.arrays, 0, 0, 99, 0.0)
    assert states(fleet) == [ACTIVE, STARTING, STARTING, STARTING]


def test_reserved_replicas_are_paid_always_and_drained_last():
    fleet = _fleet(reserved_replicas=2, replicas=3)
    set_replicas(*fleet.arrays, 0, 0, 2, 0.0)
    assert states(fleet) == [ACTIVE, ACTIVE, OFF, OFF]
    set_replicas(*fleet.arrays, 0, 0, 1, 0.0)
    assert sorted(states(fleet)[:2]) == [ACTIVE, OFF]
    advance(*fleet.arrays, 0, 100.0)
    assert all_paid_s(fleet, 100.0) == [100.0, 100.0, 0.0, 0.0]


def test_paid_seconds_are_the_integral_of_the_powered_replicas():
    """A staircase of targets on an idle pool: 2, then 4 from 10 s, 1 from 20 s, 3 from 30 s to 130 s."""
    fleet = _fleet()
    for now_s, target in ((10.0, 4), (20.0, 1), (30.0, 3)):
        advance(*fleet.arrays, 0, now_s)
        set_replicas(*fleet.arrays, 0, 0, target, now_s)
    advance(*fleet.arrays, 0, 130.0)
    assert sum(all_paid_s(fleet, 130.0)) == 2 * 10.0 + 4 * 10.0 + 1 * 10.0 + 3 * 100.0
    assert states(fleet).count(ACTIVE) == 3


def test_a_replica_that_does_not_run_refuses():
    fleet = _fleet([(1, 2)])
    engine.submit(*fleet.arrays, 0, 3, 0, 0.0)
    assert fleet.requests["status"][0, 0] == LOST
    assert engine.pop_finished(fleet.worlds, fleet.requests, 0) == 0
    assert (fleet.worlds["submitted"][0], fleet.worlds["lost"][0]) == (1, 1)


def test_scaling_down_gives_up_failed_replicas_first():
    fleet = _fleet(detect_s=5.0)
    fail_replica(*fleet.arrays, 0, 0, 1000.0, 0.0)
    assert states(fleet)[:2] == [DOWN, ACTIVE]
    advance(*fleet.arrays, 0, 8.0)
    set_replicas(*fleet.arrays, 0, 0, 1, 8.0)
    assert states(fleet)[:2] == [OFF, ACTIVE]
    assert all_paid_s(fleet, 20.0)[:2] == [8.0, 20.0]


def test_without_lags_a_replica_is_there_at_once():
    fleet = _fleet([(1, 2)], provision_s=0.0, load_s=0.0)
    set_replicas(*fleet.arrays, 0, 0, 3, 0.0)
    assert states(fleet) == [ACTIVE, ACTIVE, ACTIVE, OFF]
    engine.submit(*fleet.arrays, 0, 2, 0, 0.0)
    engine.drain(*fleet.arrays, 0)
    assert fleet.requests["completed_at_s"][0, 0] == 2.0


@pytest.mark.parametrize(
    "changes",
    [{"max_replicas": 1}, {"min_replicas": 3}, {"reserved_replicas": 5}, {"load_s": -1.0}, {"load_s": np.inf}],
)
def test_numbers_that_make_no_sense(changes):
    with pytest.raises(InputError, match=next(iter(changes))):
        _fleet(**changes)
