"""The prefix cache: against a naive one, never losing a block, and harmless where nothing is shared."""

import dataclasses
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from envs.fleet.allocation import allocate
from envs.fleet.engine import advance, drain, reset_world, submit
from envs.fleet.hashes import load_hashes
from envs.fleet.replay import replay
from envs.fleet.spec import FleetSpec, PoolSpec
from envs.fleet.state import ABANDONED, COMPLETED, FAILED
from tests.invariants.engine_cases import hashes, load, pools, small_profile
from tests.invariants.naive_engine import Naive, NaiveReplica

ROOT = Path(__file__).resolve().parents[2]
STATUS = {COMPLETED: "completed", ABANDONED: "abandoned"}
OUTCOME = ("status", "replica", "restarts", "cached_tokens", "first_token_at_s", "completed_at_s")
TOTALS = ("busy_s", "prefill_tokens_done", "decode_tokens_done", "iterations", "reused_tokens", "evicted_blocks")


def _outcome(fleet, w=0, totals=TOTALS):
    fields = {name: fleet.requests[name][w].tolist() for name in OUTCOME}
    return fields | {name: fleet.replicas[name][w].tolist() for name in totals}


def _equal(a, b):
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def _by_request(ragged):
    counts, flat = ragged
    return np.split(flat, np.cumsum(counts)[:-1])


@settings(max_examples=150, deadline=None, derandomize=True)
@given(pools("vllm-v1", prefix_caching=True), st.integers(0, 2**31), st.sampled_from([3.0, 15.0, 100.0]), st.booleans())
def test_every_request_as_in_the_naive_engine(pool, seed, requests_per_s, as_vllm):
    """`as_vllm`: generated blocks can be found at once, which makes no difference while nobody asks for them."""
    pool = dataclasses.replace(pool, replicas=1)
    data = load(seed, 60, requests_per_s)
    ragged = hashes(seed, data, pool.block_size_tokens, share_generated=not as_vllm)
    fleet = replay(FleetSpec((pool,)), **data, hashes=ragged)
    ours = fleet.requests[0]
    taken = ours["status"] != FAILED
    naive = [
        Naive(float(a), int(p), int(o), float(a + q), hashes=own.tolist())
        for a, p, o, q, own, ok in zip(*data.values(), _by_request(ragged), taken, strict=True)
        if ok
    ]
    engine = NaiveReplica(pool, naive, as_vllm)
    engine.run()
    assert [STATUS[s] for s in ours["status"][taken]] == [r.status for r in naive]
    assert ours["restarts"][taken].tolist() == [r.restarts for r in naive]
    assert ours["cached_tokens"][taken].tolist() == [max(r.cached_tokens, 0) for r in naive]
    np.testing.assert_allclose(ours["completed_at_s"][taken], [r.end_s for r in naive], rtol=1e-12)
    np.testing.assert_allclose(ours["first_token_at_s"][taken], [r.first_s for r in naive], rtol=1e-12)
    assert fleet.replicas["evicted_blocks"][0, 0] == engine.kv.evicted
    assert _index(fleet, _names(fleet, ragged), 0) == {
        key: len(blocks) for key, blocks in engine.kv.index.items() if blocks
    }


def test_the_cases_reach_every_path():
    """The comparison above means something only if blocks are shared, evicted, and reused after a preemption."""
    totals = dict.fromkeys(("restarts", "cached_tokens", "evicted_blocks", "reused_tokens"), 0)
    for seed in range(6):
        data = load(seed, 60, 100.0)
        pool = PoolSpec("p", small_profile(), kv_blocks=24, block_size_tokens=4, max_num_seqs=8, prefix_caching=True)
        pool = dataclasses.replace(pool, max_num_batched_tokens=32, in_flight_cap=6)
        fleet = replay(FleetSpec((pool,)), **data, hashes=hashes(seed, data, 4))
        for name in totals:
            totals[name] += int(getattr(fleet, "requests" if name in OUTCOME else "replicas")[name].sum())
    assert min(totals.values()) > 20
    assert totals["reused_tokens"] > totals["cached_tokens"]


def _chain(slots, at, p, field):
    while p >= 0:
        yield p
        p = int(slots[field][at + 2 * p + 1])


def _names(fleet, ragged):
    """Hashes of every stretch, from the requests' lists."""
    cells, names = fleet.slots[0], {}
    for request, own in zip(fleet.requests[0], _by_request(ragged), strict=True):
        begin, k = 0, int(request["hash_at"])
        while begin < len(own):
            end = int(cells["end"][k])
            part = own[begin:end].tolist()
            assert names.setdefault(int(cells["stretch"][k]), part) == part
            begin, k = end, k + 1
    return names


def _run_hashes(fleet, names, r, p):
    cell = fleet.slots[0][int(fleet.replicas[0, r]["block_at"]) + 2 * p]
    own = names[int(cell["stretch"])][int(cell["offset"]) :][: int(cell["length"])]
    assert len(own) == cell["length"] > 0
    return own


def _indexed(fleet, r):
    """Runs in the buckets of a replica."""
    rep, slots = fleet.replicas[0, r], fleet.slots[0]
    at = int(rep["block_at"])
    for b in range(int(fleet.pools["bucket_mask"][rep["pool"]]) + 1):
        yield from _chain(slots, at, int(slots["bucket"][at + 2 * b + 1]), "chain")


def _index(fleet, names, r):
    """Hash to number of blocks."""
    return dict(Counter(h for p in _indexed(fleet, r) for h in _run_hashes(fleet, names, r, p)))


def _held(fleet, r, request):
    """Runs that a request holds."""
    slots, at, here = fleet.slots[0], int(fleet.replicas[0, r]["block_at"]), int(request["hash_at"])
    notes, j, runs = int(request["noted_runs"]), 0, []
    for n in range(notes):
        assert n == 0 or slots["first"][here + n] == j
        end = int(slots["first"][here + n + 1]) if n + 1 < notes else int(request["hashed_blocks"])
        p = int(slots["run"][here + n])
        while j < end:
            runs.append(p)
            j += int(slots["length"][at + 2 * p])
            p = int(slots["after"][at + 2 * p + 1])
    assert j == request["hashed_blocks"]
    return runs


def _check_blocks(pool, fleet, r, ragged):
    """Recounts holders, idle blocks, spare runs and the index from the requests that run on a replica."""
    rep, slots, rows = fleet.replicas[0, r], fleet.slots[0], fleet.requests[0]
    at, names, lists = int(rep["block_at"]), _names(fleet, ragged), _by_request(ragged)
    holders, private, i = {}, 0, int(rep["running_head"])
    while i >= 0:
        request = rows[i]
        tokens = int(request["computed"])
        if request["joined_at"] >= 0:
            tokens += int(rep["counter"] - request["joined_at"])
        elif pool.scheduler != "vllm-v1":
            tokens = int(request["target"])
        hashed = int(request["hashed_blocks"])
        assert hashed <= request["hash_count"]
        runs = _held(fleet, r, request)
        assert [h for p in runs for h in _run_hashes(fleet, names, r, p)] == lists[i][:hashed].tolist()
        for p in runs:
            holders[p] = holders.get(p, 0) + 1
        private += -(-tokens // pool.block_size_tokens) - hashed
        i = int(request["after"])
    idle = list(_chain(slots, at, int(rep["idle_head"]), "after"))
    spare = list(_chain(slots, at, int(rep["spare_head"]), "after"))
    assert sorted([*holders, *idle, *spare]) == list(range(int(rep["used_runs"])))
    assert rep["used_runs"] <= pool.kv_blocks
    assert sorted(_indexed(fleet, r)) == sorted([*holders, *idle])
    assert all(slots["holders"][at + 2 * p] == 0 for p in idle)
    assert all(slots["holders"][at + 2 * p] == n for p, n in holders.items())
    assert sum(len(_run_hashes(fleet, names, r, p)) for p in idle) == rep["idle_blocks"]
    held = sum(len(_run_hashes(fleet, names, r, p)) for p in holders) + private
    in_progress = rep["planned"] > rep["done"] and rep["decodes"]
    assert held <= rep["kv_used_blocks"] <= held + (rep["batch"] if in_progress else 0)
    assert rep["kv_used_blocks"] <= pool.kv_blocks


@settings(max_examples=80, deadline=None, derandomize=True)
@given(pools(prefix_caching=True), st.integers(0, 2**31), st.sampled_from([5.0, 40.0, 300.0]))
def test_blocks_are_held_idle_or_spare(pool, seed, requests_per_s):
    data = load(seed, 50, requests_per_s)
    ragged = hashes(seed, data, pool.block_size_tokens)
    fleet = allocate(FleetSpec((pool,), scrape_interval_s=0.21), 1, 50, len(ragged[1]))
    rows = fleet.requests[0]
    rows["prompt_tokens"], rows["output_tokens"] = data["prompt_tokens"], data["output_tokens"]
    rows["patience_until_s"] = data["arrived_at_s"] + data["patience_s"]
    load_hashes(fleet, 0, ragged)
    reset_world(*fleet.arrays, 0)
    for i, now_s in enumerate(data["arrived_at_s"]):
        advance(*fleet.arrays, 0, now_s)
        for r in range(pool.replicas):
            _check_blocks(pool, fleet, r, ragged)
        submit(*fleet.arrays, 0, i % pool.replicas, i, now_s)
    drain(*fleet.arrays, 0)
    for r in range(pool.replicas):
        _check_blocks(pool, fleet, r, ragged)
    assert (fleet.replicas["kv_used_blocks"] == 0).all()
    assert (rows["cached_tokens"] < np.maximum(rows["prompt_tokens"], 1)).all()
    assert (rows["cached_tokens"] % pool.block_size_tokens == 0).all()
    if (rows["status"] == COMPLETED).all() and rows["restarts"].sum() == 0:
        done, reused = (fleet.replicas[name].sum() for name in ("prefill_tokens_done", "reused_tokens"))
        assert done + reused == rows["prompt_tokens"].sum()
        assert reused == rows["cached_tokens"].sum()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(pools(), st.integers(0, 2**31), st.sampled_from([3.0, 30.0, 300.0]))
def test_without_hashes_caching_changes_no_bit(pool, seed, requests_per_s):
    data = load(seed, 60, requests_per_s)
    on = dataclasses.replace(pool, prefix_caching=True)
    _equal(_outcome(replay(FleetSpec((pool,)), **data)), _outcome(replay(FleetSpec((on,)), **data)))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(pools(), st.integers(0, 2**31), st.sampled_from([3.0, 30.0]))
def test_without_sharing_caching_changes_no_bit_unless_a_request_is_preempted(pool, seed, requests_per_s):
    data = load(seed, 60, requests_per_s)
    on = dataclasses.replace(pool, prefix_caching=True)
    counts = (data["prompt_tokens"] + data["output_tokens"] - 1) // pool.block_size_tokens
    off = replay(FleetSpec((pool,)), **data)
    fleet = replay(FleetSpec((on,)), **data, hashes=(counts, np.arange(counts.sum())))
    if off.requests["restarts"].sum() == 0:
        totals = tuple(name for name in TOTALS if name != "evicted_blocks")
        _equal(_outcome(off, totals=totals), _outcome(fleet, totals=totals))
    assert fleet.requests["cached_tokens"].sum() == 0


@settings(max_examples=60, deadline=None, derandomize=True)
@given(pools(prefix_caching=True), st.integers(0, 2**31), st.sampled_from([3.0, 30.0, 300.0]))
def test_skipping_changes_no_bit(pool, seed, requests_per_s):
    data = load(seed, 60, requests_per_s)
    ragged = hashes(seed, data, pool.block_size_tokens)
    step = dataclasses.replace(pool, skip_iterations=False)
    _equal(
        _outcome(replay(FleetSpec((pool,)), **data, hashes=ragged)),
        _outcome(replay(FleetSpec((step,)), **data, hashes=ragged)),
    )


def test_an_episode_leaves_nothing_to_the_next():
    """A world is reset with an empty cache, and pools with and without one live side by side."""
    pool = PoolSpec("p", small_profile(), kv_blocks=40, block_size_tokens=4, max_num_seqs=8, prefix_caching=True)
    spec = FleetSpec((dataclasses.replace(pool, name="q", prefix_caching=False, kv_blocks=99), pool))
    data = load(1, 50, 60.0)
    ragged = hashes(1, data, 4)
    alone = replay(FleetSpec((pool,)), **data, hashes=ragged)
    fleet = allocate(spec, 2, 50, len(ragged[1]))
    for w in (1, 0, 1):
        rows = fleet.requests[w]
        rows["prompt_tokens"], rows["output_tokens"] = data["prompt_tokens"], data["output_tokens"]
        rows["patience_until_s"] = data["arrived_at_s"] + data["patience_s"]
        load_hashes(fleet, w, ragged)
        reset_world(*fleet.arrays, w)
        for i, now_s in enumerate(data["arrived_at_s"]):
            advance(*fleet.arrays, w, now_s)
            submit(*fleet.arrays, w, 1, i, now_s)
        drain(*fleet.arrays, w)
        for name in ("first_token_at_s", "completed_at_s", "cached_tokens"):
            np.testing.assert_array_equal(fleet.requests[name][w], alone.requests[name][0])


def small_cases():
    """Outcomes of a few small cases; also run by the interpreter, see below."""
    cases = []
    for seed, scheduler in enumerate(["vllm-v1", "prefill-first", "sarathi"]):
        pool = PoolSpec("p", small_profile(), replicas=2, kv_blocks=24, block_size_tokens=4, max_num_seqs=8)
        pool = dataclasses.replace(pool, max_num_batched_tokens=32, scheduler=scheduler, prefix_caching=True)
        data = load(seed, 40, 60.0)
        cases.append(_outcome(replay(FleetSpec((pool,)), **data, hashes=hashes(seed, data, 4))))
    return cases


def test_compiled_equals_interpreted():
    module = "tests.invariants.test_engine_prefix_reference"
    program = f"import json, {module} as t; print(json.dumps(t.small_cases()))"
    environment = {**os.environ, "NUMBA_DISABLE_JIT": "1", "PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    compiled, interpreted = small_cases(), json.loads(run.stdout)
    assert all(sum(case["evicted_blocks"]) > 5 and sum(case["cached_tokens"]) > 20 for case in compiled)
    for a, b in zip(compiled, interpreted, strict=True):
        for name in a:  # to the last bit but for fused multiplications that the compiler may choose
            np.testing.assert_allclose(a[name], b[name], rtol=1e-13, err_msg=name)
