"""The engine against a naive one, request by request, under queueing, preemption, abandonment and hold queues."""

import dataclasses

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from envs.fleet.replay import replay
from envs.fleet.spec import FleetSpec, PoolSpec
from envs.fleet.state import ABANDONED, COMPLETED, FAILED
from tests.invariants.engine_cases import load, pools, small_profile
from tests.invariants.naive_engine import Naive, NaiveReplica

STATUS = {COMPLETED: "completed", ABANDONED: "abandoned"}


@settings(max_examples=60, deadline=None, derandomize=True)
@given(pools("vllm-v1"), st.integers(0, 2**31), st.sampled_from([3.0, 15.0, 100.0]))
def test_every_request_as_in_the_naive_engine(pool, seed, requests_per_s):
    pool = dataclasses.replace(pool, replicas=1)
    data = load(seed, 60, requests_per_s)
    ours = replay(FleetSpec((pool,)), **data).requests[0]
    taken = ours["status"] != FAILED
    limit = pool.kv_blocks * pool.block_size_tokens
    assert (taken == (data["prompt_tokens"] + data["output_tokens"] - 1 <= limit)).all()
    naive = [
        Naive(float(a), int(p), int(o), float(a + q))
        for a, p, o, q, ok in zip(*data.values(), taken, strict=True)
        if ok
    ]
    NaiveReplica(pool, naive).run()
    assert [STATUS[s] for s in ours["status"][taken]] == [r.status for r in naive]
    assert ours["restarts"][taken].tolist() == [r.restarts for r in naive]
    np.testing.assert_allclose(ours["completed_at_s"][taken], [r.end_s for r in naive], rtol=1e-12)
    np.testing.assert_allclose(ours["first_token_at_s"][taken], [r.first_s for r in naive], rtol=1e-12)


def test_the_cases_reach_every_path():
    """The comparison above means something only if preemption, abandonment and holding occur."""
    restarts = abandoned = 0
    for seed in range(6):
        data = load(seed, 60, 100.0)
        pool = PoolSpec("p", small_profile(), kv_blocks=24, block_size_tokens=4, max_num_seqs=8)
        pool = dataclasses.replace(pool, max_num_batched_tokens=32, in_flight_cap=6)
        done = replay(FleetSpec((pool,)), **data).requests[0]
        restarts += int(done["restarts"].sum())
        abandoned += int((done["status"] == ABANDONED).sum())
    assert restarts > 20
    assert abandoned > 20
