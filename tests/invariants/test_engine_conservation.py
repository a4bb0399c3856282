"""Requests, tokens, KV blocks and time: nothing appears or disappears, whatever the fleet and the load."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from envs.fleet.allocation import allocate
from envs.fleet.engine import advance, busy_seconds, drain, pop_finished, reset_world, set_in_flight_cap, submit
from envs.fleet.provider import provider_available, submit_provider
from envs.fleet.spec import FleetSpec, ProviderSpec
from envs.fleet.state import ABANDONED, COMPLETED, FAILED, IN_FLIGHT
from tests.invariants.engine_cases import load, pools

PROVIDER = ProviderSpec("api", ttft_s=0.3, tpot_s=0.01, requests_per_minute=120.0)


def _held_blocks(pool, rep, request):
    """Blocks that a running request must hold, from its own fields."""
    if request["joined_at"] >= 0:
        tokens = request["computed"] + rep["counter"] - request["joined_at"]
    else:
        tokens = request["computed"] if pool.scheduler == "vllm-v1" else request["target"]
    return -(-int(tokens) // pool.block_size_tokens)


def _check_replica(pool, rep, requests):
    """Compares every counter of a replica with a recount over all requests."""
    mine = requests[requests["status"] == IN_FLIGHT]
    first = ~np.isnan(mine["first_token_at_s"])
    assert rep["in_flight"] == len(mine)
    assert rep["in_flight"] == rep["held"] + rep["waiting"] + rep["running"]
    assert rep["running"] <= pool.max_num_seqs
    assert rep["decoding"] == first.sum()
    assert rep["pending_prefill_tokens"] == mine["prompt_tokens"][~first].sum()
    batch = mine["joined_at"] >= 0
    assert rep["batch"] == batch.sum()
    assert 0 <= rep["kv_used_blocks"] <= pool.kv_blocks
    running = []
    i = int(rep["running_head"])
    while i >= 0:
        running.append(i)
        i = int(requests[i]["after"])
    assert len(running) == rep["running"]
    streamed = mine["computed"] + rep["counter"] - mine["joined_at"] + 1
    assert rep["kv_sum"] == streamed[batch].sum()
    stalled = mine["target"][first & ~batch].sum()  # preempted in mid-answer
    assert rep["decoding_tokens"] == streamed[batch].sum() + stalled
    # between iterations nothing is reserved for a decode that has not run; within one, one block per boundary at most
    held = sum(_held_blocks(pool, rep, requests[i]) for i in running)
    in_progress = rep["planned"] > rep["done"] and rep["decodes"]
    assert held <= rep["kv_used_blocks"] <= held + (rep["batch"] if in_progress else 0)


def _run(pool, data, seed, providers=(PROVIDER,)):
    """Sends everything somewhere at random, checking after each step; returns the fleet and what was popped."""
    rng = np.random.default_rng(seed)
    n = len(data["arrived_at_s"])
    spec = FleetSpec((pool,), providers, scrape_interval_s=0.21)
    fleet = allocate(spec, 1, n)
    rows = fleet.requests[0]
    rows["prompt_tokens"], rows["output_tokens"] = data["prompt_tokens"], data["output_tokens"]
    rows["patience_until_s"] = data["arrived_at_s"] + data["patience_s"]
    reset_world(*fleet.arrays, 0)
    popped = []
    for i, now_s in enumerate(data["arrived_at_s"]):
        advance(*fleet.arrays, 0, now_s)
        for r in range(pool.replicas):
            there = (rows["replica"] == r) & (rows["status"] > 0)
            _check_replica(pool, fleet.replicas[0, r], _only(rows, there))
        while (j := pop_finished(fleet.worlds, fleet.requests, 0)) >= 0:
            popped.append(j)
        where = int(rng.integers(0, pool.replicas + len(providers)))
        if where == pool.replicas:
            legal = provider_available(fleet.providers, 0, 0, now_s)
            submit_provider(*fleet.arrays, 0, 0, i, now_s, 0.3, 0.01)
            assert (rows["status"][i] == IN_FLIGHT) == legal
        else:
            submit(*fleet.arrays, 0, where, i, now_s)
        if rng.random() < 0.1:
            set_in_flight_cap(*fleet.arrays, 0, int(rng.integers(0, pool.replicas)), int(rng.integers(1, 20)), now_s)
    drain(*fleet.arrays, 0)
    while (j := pop_finished(fleet.worlds, fleet.requests, 0)) >= 0:
        popped.append(j)
    return fleet, popped


def _only(rows, chosen):
    """All rows, those not chosen marked as not submitted, so that row numbers in lists stay valid."""
    copy = rows.copy()
    copy["status"][~chosen] = 0
    return copy


@settings(max_examples=60, deadline=None, derandomize=True)
@given(pools(), st.integers(0, 2**31), st.sampled_from([5.0, 40.0, 300.0]))
def test_nothing_appears_or_disappears(pool, seed, requests_per_s):
    data = load(seed, 50, requests_per_s)
    fleet, popped = _run(pool, data, seed)
    rows, world = fleet.requests[0], fleet.worlds[0]
    assert sorted(popped) == list(range(50))  # every request ended once
    assert world["submitted"] == 50 == world["completed"] + world["abandoned"] + world["failed"]
    counts = [int((rows["status"] == status).sum()) for status in (COMPLETED, ABANDONED, FAILED)]
    assert counts == [world["completed"], world["abandoned"], world["failed"]]
    for rep in fleet.replicas[0]:
        for field in ("in_flight", "held", "waiting", "running", "decoding", "batch", "kv_sum", "kv_used_blocks"):
            assert rep[field] == 0, field
        assert rep["pending_prefill_tokens"] == rep["decoding_tokens"] == 0
    assert (fleet.slots["boundaries"] == 0).all()
    assert fleet.providers["in_flight"].sum() == 0
    done = rows[rows["status"] == COMPLETED]
    assert (done["dispatched_at_s"] < done["first_token_at_s"]).all()
    assert (done["first_token_at_s"] <= done["completed_at_s"]).all()
    assert (done["first_token_at_s"] <= done["patience_until_s"]).all()
    assert (np.isnan(rows["first_token_at_s"][rows["status"] != COMPLETED])).all()
    gone = rows[rows["status"] == ABANDONED]
    assert (gone["completed_at_s"] >= gone["patience_until_s"]).all()


@settings(max_examples=30, deadline=None, derandomize=True)
@given(pools(), st.integers(0, 2**31))
def test_tokens_are_computed_once_without_restarts_and_more_often_with(pool, seed):
    data = load(seed, 40, 60.0)
    data["patience_s"][:] = np.inf
    fleet, _ = _run(pool, data, seed, ())
    rows = fleet.requests[0]
    done = rows[rows["status"] == COMPLETED]
    prefilled = fleet.replicas["prefill_tokens_done"].sum()
    decoded = fleet.replicas["decode_tokens_done"].sum()
    restarts = int(done["restarts"].sum())
    assert fleet.replicas["restarts"].sum() == restarts
    if restarts == 0:
        assert prefilled == done["prompt_tokens"].sum()
        assert decoded == (done["output_tokens"] - 1).sum()
    else:
        # a restart computes more prompt, and the token that ends its prefill is not a decode
        assert prefilled > done["prompt_tokens"].sum()
        assert (done["output_tokens"] - 1).sum() - restarts <= decoded <= (done["output_tokens"] - 1).sum()


@settings(max_examples=20, deadline=None, derandomize=True)
@given(pools(), st.integers(0, 2**31))
def test_busy_time_is_the_time_with_work(pool, seed):
    """Work conservation: a replica is busy exactly while something is in flight there."""
    data = load(seed, 40, 20.0)
    fleet, _ = _run(pool, data, seed, ())
    rows = fleet.requests[0]
    for r, rep in enumerate(fleet.replicas[0]):
        mine = rows[(rows["replica"] == r) & (rows["status"] != FAILED) & (rows["status"] > 0)]
        busy_s, end_s = 0.0, -np.inf
        for start, end in sorted(zip(mine["dispatched_at_s"], mine["completed_at_s"], strict=True)):
            busy_s += max(0.0, end - max(start, end_s))
            end_s = max(end, end_s)
        if (mine["status"] == COMPLETED).all():  # who leaves early is dropped without work
            np.testing.assert_allclose(busy_seconds(rep, 1e9), busy_s, rtol=1e-9)
        assert busy_seconds(rep, 1e9) <= busy_s + 1e-9
