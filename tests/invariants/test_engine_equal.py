"""The same numbers whatever is skipped, observed, batched or compiled."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from envs.fleet.allocation import allocate
from envs.fleet.engine import advance, drain, reset_world, submit
from envs.fleet.replay import replay
from envs.fleet.spec import FleetSpec, PoolSpec
from tests.invariants.engine_cases import load, pools, small_profile

ROOT = Path(__file__).resolve().parents[2]
OUTCOME = ("status", "replica", "restarts", "first_token_at_s", "completed_at_s")
TOTALS = ("busy_s", "prefill_tokens_done", "decode_tokens_done", "iterations", "restarts", "counter")


def _outcome(fleet, w=0):
    fields = {name: fleet.requests[name][w].tolist() for name in OUTCOME}
    return fields | {name: fleet.replicas[name][w].tolist() for name in TOTALS}


def _equal(a, b):
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(pools(), st.booleans(), st.integers(0, 2**31), st.sampled_from([3.0, 30.0, 300.0]))
def test_skipping_changes_no_bit(pool, quirks, seed, requests_per_s):
    pool = dataclasses.replace(pool, vidur_quirks=quirks and pool.scheduler != "vllm-v1")
    data = load(seed, 60, requests_per_s)
    step = dataclasses.replace(pool, skip_iterations=False)
    _equal(_outcome(replay(FleetSpec((pool,)), **data)), _outcome(replay(FleetSpec((step,)), **data)))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(pools(), st.integers(0, 2**31))
def test_looking_changes_no_bit(pool, seed):
    """Advancing at arbitrary instants in between, and scraping or not, leaves every outcome and scrape as it was."""
    data = load(seed, 40, 20.0)
    rng = np.random.default_rng(seed)
    looks = np.sort(rng.uniform(0.0, data["arrived_at_s"][-1], 100))
    outcomes, scrapes = [], []
    for instants in ([], looks):
        fleet = allocate(FleetSpec((pool,), scrape_interval_s=0.13), 1, 40)
        rows = fleet.requests[0]
        rows["prompt_tokens"], rows["output_tokens"] = data["prompt_tokens"], data["output_tokens"]
        rows["patience_until_s"] = data["arrived_at_s"] + data["patience_s"]
        reset_world(*fleet.arrays, 0)
        seen = []
        times = sorted([(t, 1, i) for i, t in enumerate(data["arrived_at_s"])] + [(t, 0, -1) for t in instants])
        for now_s, _, i in times:
            advance(*fleet.arrays, 0, now_s)
            if i >= 0:
                submit(*fleet.arrays, 0, i % pool.replicas, i, now_s)
                names = [name for name in fleet.replicas.dtype.names if name.startswith("scraped")]
                seen.append([fleet.replicas[name][0].tolist() for name in names])
        drain(*fleet.arrays, 0)
        outcomes.append(_outcome(fleet))
        scrapes.append(seen)
    _equal(*outcomes)
    assert scrapes[0] == scrapes[1]


def test_a_world_in_a_batch_is_as_alone():
    pool = PoolSpec("p", small_profile(), replicas=2, kv_blocks=40, max_num_seqs=8, max_num_batched_tokens=32)
    loads = [load(seed, 50, 60.0) for seed in range(3)]
    fleet = allocate(FleetSpec((pool,)), 3, 50)
    for w, data in enumerate(loads):
        rows = fleet.requests[w]
        rows["prompt_tokens"], rows["output_tokens"] = data["prompt_tokens"], data["output_tokens"]
        rows["patience_until_s"] = data["arrived_at_s"] + data["patience_s"]
        reset_world(*fleet.arrays, w)
    for i in range(50):  # interleaved
        for w, data in enumerate(loads):
            advance(*fleet.arrays, w, data["arrived_at_s"][i])
            r = int(np.argmin(fleet.replicas["in_flight"][w]))
            submit(*fleet.arrays, w, r, i, data["arrived_at_s"][i])
    for w, data in enumerate(loads):
        drain(*fleet.arrays, w)
        _equal(_outcome(fleet, w), _outcome(replay(FleetSpec((pool,)), **data)))


def small_cases():
    """Outcomes of a few small cases; also run by the interpreter, see below."""
    cases = []
    for seed, scheduler in enumerate(["vllm-v1", "prefill-first", "sarathi"]):
        pool = PoolSpec("p", small_profile(), replicas=2, kv_blocks=24, block_size_tokens=4, max_num_seqs=8)
        pool = dataclasses.replace(pool, max_num_batched_tokens=32, scheduler=scheduler, in_flight_cap=6)
        cases.append(_outcome(replay(FleetSpec((pool,), scrape_interval_s=0.5), **load(seed, 40, 60.0))))
    return cases


def test_compiled_equals_interpreted():
    program = "import json; from tests.invariants import test_engine_equal as t; print(json.dumps(t.small_cases()))"
    environment = {**os.environ, "NUMBA_DISABLE_JIT": "1", "PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    compiled, interpreted = small_cases(), json.loads(run.stdout)
    assert sum(sum(case["restarts"]) for case in compiled) > 5
    for a, b in zip(compiled, interpreted, strict=True):
        for name in a:  # to the last bit but for fused multiplications that the compiler may choose
            np.testing.assert_allclose(a[name], b[name], rtol=1e-13, err_msg=name)
