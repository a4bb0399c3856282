"""Speculative decoding: against a naive engine, whatever is skipped, observed or compiled."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from envs.fleet.allocation import allocate
from envs.fleet.engine import advance, drain, reset_world, submit
from envs.fleet.replay import replay
from envs.fleet.spec import FleetSpec, PoolSpec
from envs.fleet.speculation import PACE_ONE, Speculation, floor_sum
from envs.fleet.state import ABANDONED, COMPLETED, FAILED
from tests.invariants.engine_cases import hashes, load, pools, priorities, small_profile
from tests.invariants.naive_engine import Naive, NaiveReplica

ROOT = Path(__file__).resolve().parents[2]
STATUS = {COMPLETED: "completed", ABANDONED: "abandoned"}
OUTCOME = ("status", "replica", "restarts", "cached_tokens", "first_token_at_s", "completed_at_s")
TOTALS = ("busy_s", "prefill_tokens_done", "decode_tokens_done", "iterations", "restarts", "counter", "evicted_blocks")


def _outcome(fleet):
    fields = {name: fleet.requests[name][0].tolist() for name in OUTCOME}
    return fields | {name: fleet.replicas[name][0].tolist() for name in TOTALS}


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    n=st.integers(0, 300),
    phase=st.integers(0, PACE_ONE - 1),
    pace=st.integers(PACE_ONE, 33 * PACE_ONE),
)
def test_floors_are_summed(n, phase, pace):
    assert floor_sum(n, phase, pace) == sum((phase + j * pace) // PACE_ONE for j in range(n))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    st.booleans().flatmap(
        lambda p: pools("vllm-v1", scheduling_policy="priority" if p else "fcfs", prefix_caching=p, speculation=True)
    ),
    st.integers(0, 2**31),
    st.sampled_from([3.0, 15.0, 100.0]),
)
def test_every_request_as_in_the_naive_engine(pool, seed, requests_per_s):
    pool = dataclasses.replace(pool, replicas=1)
    data, level = load(seed, 60, requests_per_s), priorities(seed, 60)
    ragged = hashes(seed, data, pool.block_size_tokens)
    fleet = replay(FleetSpec((pool,)), **data, hashes=ragged if pool.prefix_caching else None, priority=level)
    ours = fleet.requests[0]
    taken = ours["status"] != FAILED
    limit = pool.kv_blocks * pool.block_size_tokens - pool.speculation.draft_tokens
    assert (taken == (data["prompt_tokens"] + data["output_tokens"] - 1 <= limit)).all()
    own = np.split(ragged[1], np.cumsum(ragged[0])[:-1])
    naive = [
        Naive(float(a), int(p), int(o), float(a + q), priority=int(k), hashes=h.tolist() if pool.prefix_caching else ())
        for a, p, o, q, k, h, ok in zip(*data.values(), level, own, taken, strict=True)
        if ok
    ]
    NaiveReplica(pool, naive).run()
    assert [STATUS[s] for s in ours["status"][taken]] == [r.status for r in naive]
    assert ours["restarts"][taken].tolist() == [r.restarts for r in naive]
    np.testing.assert_allclose(ours["completed_at_s"][taken], [r.end_s for r in naive], rtol=1e-12)
    np.testing.assert_allclose(ours["first_token_at_s"][taken], [r.first_s for r in naive], rtol=1e-12)
    rep = fleet.replicas[0, 0]
    assert rep["kv_used_blocks"] == rep["batch"] == rep["decoding_tokens"] == rep["kv_sum"] == 0
    if not ours["restarts"].any():
        done = ours["status"] == COMPLETED
        assert rep["decode_tokens_done"] == (data["output_tokens"][done] - 1).sum()


@settings(max_examples=80, deadline=None, derandomize=True)
@given(pools(speculation=True), st.integers(0, 2**31), st.sampled_from([3.0, 30.0, 300.0]))
def test_skipping_changes_no_bit(pool, seed, requests_per_s):
    data = load(seed, 60, requests_per_s)
    step = dataclasses.replace(pool, skip_iterations=False)
    a, b = (_outcome(replay(FleetSpec((p,)), **data)) for p in (pool, step))
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(pools(speculation=True), st.integers(0, 2**31))
def test_looking_changes_no_bit(pool, seed):
    data = load(seed, 40, 20.0)
    looks = np.sort(np.random.default_rng(seed).uniform(0.0, data["arrived_at_s"][-1], 100))
    outcomes = []
    for instants in ([], looks):
        fleet = allocate(FleetSpec((pool,), scrape_interval_s=0.13), 1, 40)
        rows = fleet.requests[0]
        rows["prompt_tokens"], rows["output_tokens"] = data["prompt_tokens"], data["output_tokens"]
        rows["patience_until_s"] = data["arrived_at_s"] + data["patience_s"]
        reset_world(*fleet.arrays, 0)
        for now_s, _, i in sorted(
            [(t, 1, i) for i, t in enumerate(data["arrived_at_s"])] + [(t, 0, -1) for t in instants]
        ):
            advance(*fleet.arrays, 0, now_s)
            if i >= 0:
                submit(*fleet.arrays, 0, i % pool.replicas, i, now_s)
        drain(*fleet.arrays, 0)
        outcomes.append(_outcome(fleet))
    for name in outcomes[0]:
        np.testing.assert_array_equal(outcomes[0][name], outcomes[1][name], err_msg=name)


@pytest.mark.parametrize(("acceptance", "draft_tokens"), [(0.0, 3), (0.5, 1), (1.0, 4)])
def test_whole_paces_are_exact(acceptance, draft_tokens):
    """a = 0 yields one token, a = 1 yields k + 1."""
    speculation = Speculation(draft_tokens, acceptance)
    assert speculation.pace == PACE_ONE * {0.0: 1.0, 0.5: 1.5, 1.0: 5.0}[acceptance]


def small_cases():
    """Outcomes of a few small cases; also run by the interpreter, see below."""
    cases = []
    for seed, scheduler in enumerate(["vllm-v1", "prefill-first", "sarathi"]):
        pool = PoolSpec("p", small_profile(), replicas=2, kv_blocks=24, block_size_tokens=4, max_num_seqs=8)
        speculation = Speculation(3, 0.7, 0.05, 6)
        pool = dataclasses.replace(
            pool, max_num_batched_tokens=32, scheduler=scheduler, in_flight_cap=6, speculation=speculation
        )
        cases.append(_outcome(replay(FleetSpec((pool,), scrape_interval_s=0.5), **load(seed, 40, 60.0))))
    return cases


def test_compiled_equals_interpreted():
    program = (
        "import json; from tests.invariants import test_engine_speculation as t; print(json.dumps(t.small_cases()))"
    )
    environment = {**os.environ, "NUMBA_DISABLE_JIT": "1", "PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    compiled, interpreted = small_cases(), json.loads(run.stdout)
    assert sum(sum(case["restarts"]) for case in compiled) > 5
    for a, b in zip(compiled, interpreted, strict=True):
        for name in a:
            np.testing.assert_allclose(a[name], b[name], rtol=1e-13, err_msg=name)
