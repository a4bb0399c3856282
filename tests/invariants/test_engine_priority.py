"""Priority scheduling as in vLLM: against a naive engine, whatever is skipped or compiled."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from envs.fleet.replay import replay
from envs.fleet.spec import FleetSpec, PoolSpec
from envs.fleet.state import ABANDONED, COMPLETED, FAILED
from tests.invariants.engine_cases import hashes, load, pools, priorities, small_profile
from tests.invariants.naive_engine import Naive, NaiveReplica

ROOT = Path(__file__).resolve().parents[2]
STATUS = {COMPLETED: "completed", ABANDONED: "abandoned"}
OUTCOME = ("status", "replica", "restarts", "cached_tokens", "first_token_at_s", "completed_at_s")
TOTALS = ("busy_s", "prefill_tokens_done", "decode_tokens_done", "iterations", "restarts", "evicted_blocks")


def _outcome(fleet):
    fields = {name: fleet.requests[name][0].tolist() for name in OUTCOME}
    return fields | {name: fleet.replicas[name][0].tolist() for name in TOTALS}


def _naive(pool, data, priority, taken, ragged=None):
    counts, flat = ragged or (np.zeros(len(priority), np.int64), np.zeros(0, np.int64))
    own = np.split(flat, np.cumsum(counts)[:-1])
    rows = zip(*data.values(), priority, own, taken, strict=True)
    naive = [
        Naive(float(a), int(p), int(o), float(a + q), priority=int(level), hashes=h.tolist())
        for a, p, o, q, level, h, ok in rows
        if ok
    ]
    NaiveReplica(pool, naive).run()
    return naive


def _check_against_naive(pool, data, priority, ragged=None):
    ours = replay(FleetSpec((pool,)), **data, priority=priority, hashes=ragged).requests[0]
    taken = ours["status"] != FAILED
    naive = _naive(pool, data, priority, taken, ragged)
    assert [STATUS[s] for s in ours["status"][taken]] == [r.status for r in naive]
    assert ours["restarts"][taken].tolist() == [r.restarts for r in naive]
    assert ours["cached_tokens"][taken].tolist() == [max(r.cached_tokens, 0) for r in naive]
    np.testing.assert_allclose(ours["completed_at_s"][taken], [r.end_s for r in naive], rtol=1e-12)
    np.testing.assert_allclose(ours["first_token_at_s"][taken], [r.first_s for r in naive], rtol=1e-12)
    return ours


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    pools("vllm-v1", scheduling_policy="priority"),
    st.integers(0, 2**31),
    st.sampled_from([3.0, 15.0, 100.0]),
    st.sampled_from([1, 2, 8]),
)
def test_every_request_as_in_the_naive_engine(pool, seed, requests_per_s, levels):
    pool = dataclasses.replace(pool, replicas=1)
    data = load(seed, 60, requests_per_s)
    _check_against_naive(pool, data, priorities(seed, 60, levels))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    pools("vllm-v1", scheduling_policy="priority", prefix_caching=True),
    st.integers(0, 2**31),
    st.sampled_from([3.0, 15.0, 100.0]),
)
def test_with_a_prefix_cache_too(pool, seed, requests_per_s):
    pool = dataclasses.replace(pool, replicas=1)
    data = load(seed, 60, requests_per_s)
    _check_against_naive(pool, data, priorities(seed, 60), hashes(seed, data, pool.block_size_tokens))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    pools("vllm-v1", scheduling_policy="priority"), st.booleans(), st.integers(0, 2**31), st.sampled_from([3.0, 300.0])
)
def test_skipping_changes_no_bit(pool, caching, seed, requests_per_s):
    pool = dataclasses.replace(pool, prefix_caching=caching)
    data = load(seed, 60, requests_per_s)
    step = dataclasses.replace(pool, skip_iterations=False)
    ragged = hashes(seed, data, pool.block_size_tokens) if caching else None
    runs = [
        _outcome(replay(FleetSpec((p,)), **data, priority=priorities(seed, 60), hashes=ragged)) for p in (pool, step)
    ]
    for name in runs[0]:
        np.testing.assert_array_equal(runs[0][name], runs[1][name], err_msg=name)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(pools("vllm-v1"), st.integers(0, 2**31), st.integers(0, 7))
def test_one_level_is_first_come_first_served(pool, seed, level):
    """Preemption then takes the last of the running list, and the lines are as long as ever."""
    data = load(seed, 60, 60.0)
    by_level = dataclasses.replace(pool, scheduling_policy="priority")
    a, b = (_outcome(replay(FleetSpec((p,)), **data, priority=level)) for p in (pool, by_level))
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def _tight(**changes):
    pool = PoolSpec("p", small_profile(), kv_blocks=24, block_size_tokens=4, max_num_seqs=8, max_num_batched_tokens=32)
    return dataclasses.replace(pool, scheduling_policy="priority", in_flight_cap=6, **changes)


def small_cases():
    """Outcomes of a few small cases; also run by the interpreter, see below."""
    return [
        _outcome(
            replay(FleetSpec((_tight(),), scrape_interval_s=0.5), **load(seed, 40, 60.0), priority=priorities(seed, 40))
        )
        for seed in range(3)
    ]


def test_the_cases_reach_every_path():
    """Who is preempted is not always the last admitted, and some preempt themselves in the middle of the list."""
    by_priority, in_order = [], []
    for seed in range(6):
        data = load(seed, 60, 100.0)
        for policy, restarts in (("priority", by_priority), ("fcfs", in_order)):
            pool = _tight()
            pool = dataclasses.replace(pool, scheduling_policy=policy)
            restarts.append(replay(FleetSpec((pool,)), **data, priority=priorities(seed, 60)).requests["restarts"][0])
    assert np.sum(by_priority) > 20
    assert (np.array(by_priority) != np.array(in_order)).sum() > 20


def test_compiled_equals_interpreted():
    program = "import json; from tests.invariants import test_engine_priority as t; print(json.dumps(t.small_cases()))"
    environment = {**os.environ, "NUMBA_DISABLE_JIT": "1", "PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    compiled, interpreted = small_cases(), json.loads(run.stdout)
    assert sum(sum(case["restarts"]) for case in compiled) > 5
    for a, b in zip(compiled, interpreted, strict=True):
        for name in a:
            np.testing.assert_allclose(a[name], b[name], rtol=1e-13, err_msg=name)
