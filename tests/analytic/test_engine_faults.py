"""What a fault does to a replica and a provider: who is lost, when, and what comes back."""

import math

import numpy as np
import pytest

from envs.fleet import engine
from envs.fleet.allocation import allocate
from envs.fleet.faults import slow_replica
from envs.fleet.hashes import load_hashes
from envs.fleet.profile import constant_profile
from envs.fleet.provider import provider_available, submit_provider
from envs.fleet.scaling import advance, fail_replica, set_replicas, takes_requests
from envs.fleet.spec import FleetSpec, PoolSpec, ProviderSpec
from envs.fleet.state import ABANDONED, ACTIVE, COMPLETED, DOWN, FAILED, IN_FLIGHT, LOST, STARTING
from envs.workload import faults as f


def _fleet(rows=(), providers=(), max_hashes=0, **changes):
    pool = {"max_num_seqs": 2, "max_num_batched_tokens": 8, "load_s": 10.0, "detect_s": 5.0} | changes
    spec = FleetSpec((PoolSpec("p", constant_profile(1.0), **pool),), providers, 4.0)
    fleet = allocate(spec, 1, max(len(rows), 1), max_hashes)
    for i, (prompt, output) in enumerate(rows):
        fleet.requests["prompt_tokens"][0, i], fleet.requests["output_tokens"][0, i] = prompt, output
    fleet.requests["patience_until_s"] = math.inf
    engine.reset_world(*fleet.arrays, 0)
    return fleet


def _popped(fleet):
    rows = []
    while (i := engine.pop_finished(fleet.worlds, fleet.requests, 0)) >= 0:
        rows.append(i)
    return rows


def test_a_crash_ends_what_the_engine_had_and_detection_what_the_gateway_held():
    """2 run, 1 waits, 1 is held (cap 3); the crash at 2.5 s loses three, the detection at 7.5 s the fourth."""
    fleet = _fleet([(1, 9)] * 6, in_flight_cap=3)
    rep = fleet.replicas[0, 0:1]
    for i in range(4):
        engine.submit(*fleet.arrays, 0, 0, i, 0.0)
    advance(*fleet.arrays, 0, 2.5)
    assert (rep["running"][0], rep["waiting"][0], rep["held"][0]) == (2, 1, 1)
    fail_replica(*fleet.arrays, 0, 0, 60.0, 2.5)
    assert _popped(fleet) == [0, 1, 2]
    assert fleet.requests["status"][0, :4].tolist() == [LOST, LOST, LOST, IN_FLIGHT]
    # lost work: the prompt and the one token that had gone into the KV cache
    assert fleet.requests["computed"][0, :3].tolist() == [2, 2, 0]
    assert (rep["in_flight"][0], rep["held"][0], rep["pending_prefill_tokens"][0]) == (1, 1, 1)
    assert (rep["kv_used_blocks"][0], rep["decoding"][0], rep["decoding_tokens"][0]) == (0, 0, 0)
    assert takes_requests(fleet.replicas[0, 0])
    advance(*fleet.arrays, 0, 4.0)
    engine.submit(*fleet.arrays, 0, 0, 4, 4.0)  # nobody knows: refused
    assert _popped(fleet) == [4]
    advance(*fleet.arrays, 0, 7.5)
    assert _popped(fleet) == [3]
    assert not takes_requests(fleet.replicas[0, 0])
    advance(*fleet.arrays, 0, 69.9)
    assert rep["state"][0] == STARTING
    advance(*fleet.arrays, 0, 70.0)  # repaired at 60, loaded at 70
    assert rep["state"][0] == ACTIVE
    engine.submit(*fleet.arrays, 0, 0, 5, 70.0)
    engine.drain(*fleet.arrays, 0)
    assert fleet.requests["completed_at_s"][0, 5] == 79.0
    assert rep["busy_s"][0] + max(90.0 - rep["busy_from_s"][0], 0.0) == pytest.approx(2.5 + 9.0)


def test_without_connection_errors_everything_hangs_until_detection():
    fleet = _fleet([(1, 9)] * 4, connection_errors=False)
    rep = fleet.replicas[0, 0:1]
    for i in range(3):
        engine.submit(*fleet.arrays, 0, 0, i, 0.0)
    advance(*fleet.arrays, 0, 2.5)
    before = {name: rep[name][0] for name in ("in_flight", "decoding", "decoding_tokens", "pending_prefill_tokens")}
    fail_replica(*fleet.arrays, 0, 0, 60.0, 2.5)
    advance(*fleet.arrays, 0, 6.0)
    assert _popped(fleet) == []
    assert {name: rep[name][0] for name in before} == before  # own counters show nothing
    engine.submit(*fleet.arrays, 0, 0, 3, 6.0)
    engine.set_in_flight_cap(*fleet.arrays, 0, 0, 50, 6.0)
    advance(*fleet.arrays, 0, 7.4)
    assert _popped(fleet) == []
    advance(*fleet.arrays, 0, 20.0)
    assert _popped(fleet) == [0, 1, 2, 3]
    assert (fleet.requests["completed_at_s"][0] == 7.5).all()
    assert rep["in_flight"][0] == 0


def test_a_repair_before_detection_ends_what_hangs():
    fleet = _fleet([(1, 9)], connection_errors=False)
    engine.submit(*fleet.arrays, 0, 0, 0, 0.0)
    fail_replica(*fleet.arrays, 0, 0, 2.0, 1.0)
    advance(*fleet.arrays, 0, 20.0)
    assert fleet.requests["completed_at_s"][0, 0] == 2.0
    assert fleet.replicas["state"][0, 0] == ACTIVE


def test_two_failures_at_once_last_until_the_later_repair():
    fleet = _fleet()
    fail_replica(*fleet.arrays, 0, 0, 20.0, 1.0)
    advance(*fleet.arrays, 0, 10.0)
    fail_replica(*fleet.arrays, 0, 0, 50.0, 10.0)
    advance(*fleet.arrays, 0, 59.0)
    assert fleet.replicas["state"][0, 0] == STARTING
    advance(*fleet.arrays, 0, 60.0)
    assert fleet.replicas["state"][0, 0] == ACTIVE


def test_a_dead_replica_answers_no_scrape():
    fleet = _fleet([(1, 90)])
    engine.submit(*fleet.arrays, 0, 0, 0, 0.0)
    advance(*fleet.arrays, 0, 8.5)
    assert fleet.replicas["scraped_at_s"][0, 0] == 8.0
    fail_replica(*fleet.arrays, 0, 0, 30.0, 8.5)
    advance(*fleet.arrays, 0, 39.0)
    assert fleet.replicas["scraped_at_s"][0, 0] == 8.0  # its age grows
    assert fleet.replicas["state"][0, 0] == STARTING
    advance(*fleet.arrays, 0, 41.0)
    assert (fleet.replicas["scraped_at_s"][0, 0], fleet.replicas["scraped_running"][0, 0]) == (40.0, 0)


@pytest.mark.parametrize("connection_errors", [True, False])
def test_a_failure_empties_the_prefix_cache(connection_errors):
    """The same prompt of 3 blocks three times: cached for the second, gone for the third, after the crash between."""
    rows = [(12, 2)] * 3
    changes = {"prefix_caching": True, "block_size_tokens": 4, "max_num_batched_tokens": 16}
    fleet = _fleet(rows, **changes, connection_errors=connection_errors, max_hashes=9)
    load_hashes(fleet, 0, (np.array([3, 3, 3]), np.array([1, 2, 3] * 3)))
    for i, now_s in enumerate((0.0, 10.0)):
        advance(*fleet.arrays, 0, now_s)
        engine.submit(*fleet.arrays, 0, 0, i, now_s)
    advance(*fleet.arrays, 0, 10.5)
    assert fleet.replicas["idle_blocks"][0, 0] + fleet.replicas["kv_used_blocks"][0, 0] > 0
    fail_replica(*fleet.arrays, 0, 0, 20.0, 10.5)
    advance(*fleet.arrays, 0, 40.0)
    assert (fleet.replicas["idle_blocks"][0, 0], fleet.replicas["kv_used_blocks"][0, 0]) == (0, 0)
    engine.submit(*fleet.arrays, 0, 0, 2, 40.0)
    engine.drain(*fleet.arrays, 0)
    assert fleet.requests["cached_tokens"][0].tolist() == [0, 8, 0]
    assert fleet.requests["status"][0].tolist() == [COMPLETED, LOST, COMPLETED]


def test_a_slow_replica_takes_factor_times_as_long_from_the_next_iteration_on():
    """10 iterations of 1 s; slow by 3 from 2.5 s to 10 s: ends at 1, 2, 3 (in progress), 6, 9, 12 (again), 13, ..."""
    fleet = _fleet([(1, 10)])
    engine.submit(*fleet.arrays, 0, 0, 0, 0.0)
    advance(*fleet.arrays, 0, 2.5)
    slow_replica(*fleet.arrays, 0, 0, 3.0, 2.5)
    advance(*fleet.arrays, 0, 10.0)
    slow_replica(*fleet.arrays, 0, 0, 1.0, 10.0)
    engine.drain(*fleet.arrays, 0)
    assert fleet.requests["first_token_at_s"][0, 0] == 1.0
    assert fleet.requests["completed_at_s"][0, 0] == 12.0 + 4.0


def test_slower_by_a_factor_is_a_scaled_clock():
    """Slow from the start: every time is the healthy one times the factor, whatever the schedule."""
    rows = [(5, 9), (8, 20), (2, 4), (7, 15), (3, 1)]
    ends = []
    for factor in (1.0, 2.5):
        fleet = _fleet(rows, kv_blocks=6, block_size_tokens=8)
        slow_replica(*fleet.arrays, 0, 0, factor, 0.0)
        for i in range(len(rows)):
            engine.submit(*fleet.arrays, 0, 0, i, 0.0)
        engine.drain(*fleet.arrays, 0)
        ends.append(fleet.requests["completed_at_s"][0].copy())
    np.testing.assert_allclose(ends[1], 2.5 * ends[0], rtol=1e-12)


API = ProviderSpec("api", requests_per_minute=math.inf)


def _call(fleet, i, now_s):
    submit_provider(*fleet.arrays, 0, 0, i, now_s, 0.5, 0.1)


def test_a_provider_outage_ends_new_calls_at_once():
    fleet = _fleet([(1, 11)] * 2, (API,))
    _call(fleet, 0, 0.0)
    fleet.providers["down"] = 1
    _call(fleet, 1, 0.2)
    assert _popped(fleet) == [1]
    assert fleet.requests["status"][0].tolist() == [IN_FLIGHT, LOST]
    assert fleet.providers["in_flight"][0, 0] == 1
    engine.advance(*fleet.arrays, 0, 5.0)
    assert fleet.requests["status"][0, 0] == COMPLETED  # was sent before


def test_a_provider_outage_with_timeouts():
    fleet = _fleet([(1, 11)] * 2, (ProviderSpec("api", error_after_s=3.0),))
    fleet.providers["down"] = 1
    fleet.requests["patience_until_s"][0, 1] = 2.0
    _call(fleet, 0, 0.0)
    _call(fleet, 1, 0.0)
    assert (fleet.providers["in_flight"][0, 0], fleet.worlds["doomed_calls"][0]) == (2, 1)
    engine.advance(*fleet.arrays, 0, 5.0)
    assert fleet.requests["status"][0].tolist() == [LOST, ABANDONED]
    assert fleet.requests["completed_at_s"][0].tolist() == [3.0, 2.0]
    assert (fleet.providers["in_flight"][0, 0], fleet.worlds["doomed_calls"][0]) == (0, 0)


def test_a_degraded_provider_takes_factor_times_as_long():
    fleet = _fleet([(1, 11)] * 2, (API,))
    fleet.providers["slowdown"] = 3.0
    _call(fleet, 0, 1.0)
    fleet.providers["slowdown"] = 1.0
    _call(fleet, 1, 1.0)
    engine.advance(*fleet.arrays, 0, 9.0)
    np.testing.assert_allclose(fleet.requests["first_token_at_s"][0], [2.5, 1.5])
    np.testing.assert_allclose(fleet.requests["completed_at_s"][0], [5.5, 2.5])


def test_tokens_per_minute_count_prompts_when_sent_and_answers_when_complete():
    """600 per minute are 10 per s; the bucket holds 100. 90 prompt tokens leave 10; 1.5 s later 11 came out."""
    fleet = _fleet([(90, 11), (15, 1), (500, 1)], (ProviderSpec("api", tokens_per_minute=600.0),))
    _call(fleet, 0, 0.0)
    assert not provider_available(fleet.providers, 0, 0, 0.4, 15)  # 14 left
    assert provider_available(fleet.providers, 0, 0, 0.6, 15)
    engine.advance(*fleet.arrays, 0, 1.5)  # 10 + 15 - 11 = 14
    assert not provider_available(fleet.providers, 0, 0, 1.5, 15)
    _call(fleet, 1, 1.5)
    assert fleet.requests["status"][0, 1] == FAILED
    assert provider_available(fleet.providers, 0, 0, 1.7, 15)
    assert not provider_available(fleet.providers, 0, 0, 10.0, 500)  # 99 left
    assert provider_available(fleet.providers, 0, 0, 10.2, 500)  # full: a prompt that could never fit goes


def test_time_lost_to_faults_has_its_closed_form():
    """Availability of an alternating renewal process: 1 - repair / (service + repair), here 0.8."""
    laws = (f.FaultLaw(f.OF_REPLICA, 0, 80.0, 20.0),)
    horizon_s = 400_000.0
    rows = f.draw_faults(laws, horizon_s, [7])
    lost_s = (np.minimum(rows["ends_at_s"], horizon_s) - rows["starts_at_s"]).sum()
    # about 4,000 cycles; the standard error of the share is 0.8 * 0.2 * sqrt(2 / 4000) = 0.0036
    assert abs(lost_s / horizon_s - 0.2) < 4 * 0.0036
    assert (rows["starts_at_s"][1:] > rows["ends_at_s"][:-1]).all()


def test_another_law_does_not_move_the_faults_of_the_first():
    one = f.FaultLaw(f.OF_REPLICA, 0, 80.0, 20.0)
    other = f.FaultLaw(f.OF_PROVIDER, 0, 50.0, 5.0, slowdown=2.0)
    alone = f.draw_faults((one,), 1000.0, [3])
    both = f.draw_faults((one, other), 1000.0, [3])
    np.testing.assert_array_equal(both[both["kind"] == f.OF_REPLICA], alone)
    assert len(both) > len(alone) > 0


def test_changes_step_by_step():
    """Overlapping slowdowns multiply, overlapping outages last until the last one ends."""
    rows = np.concatenate(
        [
            f.fault(f.OF_REPLICA, 1, 1.0, 5.0, 2.0),
            f.fault(f.OF_REPLICA, 1, 3.0, 7.0, 3.0),
            f.fault(f.OF_REPLICA, 0, 4.0, 6.0),
            f.fault(f.OF_PROVIDER, 0, 2.0, 4.0),
            f.fault(f.OF_PROVIDER, 0, 3.0, 8.0),
        ]
    )
    steps = f.changes(f.in_order(rows))
    slow = [(row["at_s"], row["slowdown"]) for row in steps if row["kind"] == f.OF_REPLICA and row["down"] < 0]
    assert slow == [(1.0, 2.0), (3.0, 6.0), (5.0, 3.0), (7.0, 1.0)]
    down = [(row["at_s"], row["until_s"]) for row in steps if row["kind"] == f.OF_REPLICA and row["down"] == 1]
    assert down == [(4.0, 6.0)]
    outage = [(row["at_s"], row["down"]) for row in steps if row["kind"] == f.OF_PROVIDER]
    assert outage == [(2.0, 1), (3.0, 1), (4.0, 1), (8.0, 0)]
    assert (np.diff(steps["at_s"]) >= 0.0).all()
    assert len(f.changes(f.no_faults())) == 0


def test_a_starting_replica_that_fails_starts_again():
    fleet = _fleet(replicas=1, max_replicas=2, provision_s=20.0)
    set_replicas(*fleet.arrays, 0, 0, 2, 0.0)
    advance(*fleet.arrays, 0, 25.0)
    fail_replica(*fleet.arrays, 0, 1, 40.0, 25.0)
    assert fleet.replicas["state"][0, 1] == DOWN
    assert not takes_requests(fleet.replicas[0, 1])
    advance(*fleet.arrays, 0, 49.0)
    assert fleet.replicas["state"][0, 1] == STARTING
    advance(*fleet.arrays, 0, 50.0)
    assert fleet.replicas["state"][0, 1] == ACTIVE
