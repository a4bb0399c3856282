"""What a gateway sees and does: caps, hold queue, scrapes, patience, third-party providers."""

import math

import numpy as np
import pytest

from envs.fleet.allocation import allocate
from envs.fleet.engine import advance, drain, pop_finished, reset_world, set_in_flight_cap, submit
from envs.fleet.profile import constant_profile
from envs.fleet.provider import provider_available, submit_provider
from envs.fleet.spec import FleetSpec, PoolSpec, ProviderSpec
from envs.fleet.state import ABANDONED, COMPLETED, FAILED


def _fleet(rows, providers=(), **changes):
    pool = PoolSpec("p", constant_profile(1.0), **({"max_num_seqs": 2, "max_num_batched_tokens": 8} | changes))
    fleet = allocate(FleetSpec((pool,), providers, scrape_interval_s=4.0), 1, len(rows))
    for i, (prompt, output, patience_until_s) in enumerate(rows):
        request = fleet.requests[0, i : i + 1]
        request["prompt_tokens"], request["output_tokens"] = prompt, output
        request["patience_until_s"] = patience_until_s
    reset_world(*fleet.arrays, 0)
    return fleet


def test_the_hold_queue_keeps_what_is_above_the_cap():
    fleet = _fleet([(1, 3, math.inf)] * 5, in_flight_cap=2)
    rep = fleet.replicas[0, 0:1]
    for i in range(5):
        submit(*fleet.arrays, 0, 0, i, 0.0)
    assert (rep["in_flight"][0], rep["held"][0], rep["waiting"][0]) == (5, 3, 2)
    advance(*fleet.arrays, 0, 3.5)  # two have ended at 3, two more came through and run
    assert (rep["in_flight"][0], rep["held"][0], rep["running"][0]) == (3, 1, 2)
    set_in_flight_cap(*fleet.arrays, 0, 0, 8, 3.5)
    assert (rep["held"][0], rep["waiting"][0]) == (0, 1)
    drain(*fleet.arrays, 0)
    assert fleet.requests["completed_at_s"][0].tolist() == [3.0, 3.0, 6.0, 6.0, 9.0]


def test_counters_of_the_gateway_follow_first_tokens():
    fleet = _fleet([(6, 3, math.inf)])
    rep = fleet.replicas[0, 0:1]
    submit(*fleet.arrays, 0, 0, 0, 0.0)
    assert (rep["pending_prefill_tokens"][0], rep["decoding"][0], rep["decoding_tokens"][0]) == (6, 0, 0)
    advance(*fleet.arrays, 0, 1.0)
    assert (rep["pending_prefill_tokens"][0], rep["decoding"][0], rep["decoding_tokens"][0]) == (0, 1, 7)
    advance(*fleet.arrays, 0, 2.9)
    assert rep["decoding_tokens"][0] == 8
    advance(*fleet.arrays, 0, 3.0)
    assert (rep["in_flight"][0], rep["decoding"][0], rep["decoding_tokens"][0]) == (0, 0, 0)
    assert pop_finished(fleet.worlds, fleet.requests, 0) == 0
    assert pop_finished(fleet.worlds, fleet.requests, 0) == -1


def test_scrapes_are_as_old_as_they_say():
    """Every 4 s from 4 s on (one replica: phase 4 s): what was there then, not what is there now."""
    fleet = _fleet([(16, 30, math.inf)] * 3, max_num_batched_tokens=64, kv_blocks=40)
    rep = fleet.replicas[0, 0:1]
    for i in range(3):
        submit(*fleet.arrays, 0, 0, i, 0.5)
    advance(*fleet.arrays, 0, 3.9)
    assert (rep["scraped_running"][0], rep["scraped_at_s"][0]) == (0, 0.0)
    advance(*fleet.arrays, 0, 7.9)
    assert (rep["scraped_running"][0], rep["scraped_waiting"][0], rep["scraped_at_s"][0]) == (2, 1, 4.0)
    assert rep["scraped_kv_usage"][0] == pytest.approx(4 / 40)  # two contexts of 17 to 20 tokens
    drain(*fleet.arrays, 0)
    assert rep["scraped_at_s"][0] == 4.0
    advance(*fleet.arrays, 0, 1000.0)
    assert (rep["scraped_running"][0], rep["scraped_kv_usage"][0], rep["scraped_at_s"][0]) == (0, 0.0, 1000.0)


def test_users_leave_before_the_first_token_only():
    """Two run for 10 s; the third is gone when its turn comes, the fourth at its late first token."""
    rows = [(1, 10, 0.9), (1, 10, math.inf), (1, 5, 9.5), (1, 5, 10.5), (1, 5, math.inf)]
    fleet = _fleet([(1, 10, 5.0), *rows[1:]])
    for i in range(5):
        submit(*fleet.arrays, 0, 0, i, 0.0)
    drain(*fleet.arrays, 0)
    done = fleet.requests[0]
    assert done["status"].tolist() == [COMPLETED, COMPLETED, ABANDONED, ABANDONED, COMPLETED]
    assert done["completed_at_s"].tolist() == [10.0, 10.0, 10.0, 11.0, 15.0]
    assert np.isnan(done["first_token_at_s"][2:4]).all()
    assert fleet.replicas["kv_used_blocks"][0, 0] == 0


def test_provider_calls_end_at_their_own_time_in_order():
    fleet = _fleet([(1, 11, math.inf), (1, 1, math.inf), (1, 5, 0.4)], (ProviderSpec("api"),))
    for i in range(3):
        submit_provider(*fleet.arrays, 0, 0, i, 0.0, 0.5, 0.1)
    assert fleet.providers["in_flight"][0, 0] == 3
    ended = []
    for now_s in (0.3, 0.45, 0.5, 1.4, 1.5):
        advance(*fleet.arrays, 0, now_s)
        while (i := pop_finished(fleet.worlds, fleet.requests, 0)) >= 0:
            ended.append((now_s, i, int(fleet.requests["status"][0, i])))
    assert ended == [(0.45, 2, ABANDONED), (0.5, 1, COMPLETED), (1.5, 0, COMPLETED)]
    assert fleet.requests["first_token_at_s"][0, 0] == 0.5
    assert fleet.providers["in_flight"][0, 0] == 0


def test_the_rate_limit_is_a_token_bucket():
    """60 a minute, burst of 2: two at once, then one per second; above it a call fails at once."""
    provider = ProviderSpec("api", requests_per_minute=60.0, burst_requests=2.0)
    fleet = _fleet([(1, 1, math.inf)] * 5, (provider,))
    for i in range(2):
        assert provider_available(fleet.providers, 0, 0, 0.0)
        submit_provider(*fleet.arrays, 0, 0, i, 0.0, 0.5, 0.1)
    assert not provider_available(fleet.providers, 0, 0, 0.99)
    submit_provider(*fleet.arrays, 0, 0, 2, 0.5, 0.5, 0.1)
    assert fleet.requests["status"][0, 2] == FAILED
    assert provider_available(fleet.providers, 0, 0, 1.0)
    submit_provider(*fleet.arrays, 0, 0, 3, 1.0, 0.5, 0.1)
    assert not provider_available(fleet.providers, 0, 0, 1.5)
    assert provider_available(fleet.providers, 0, 0, 100.0)
