"""Prefix caching with answers known on paper."""

import dataclasses

import numpy as np
import pytest

from envs.fleet.allocation import allocate
from envs.fleet.engine import advance, drain, reset_world, submit
from envs.fleet.hashes import engine_hashes, load_hashes
from envs.fleet.iteration import batch_seconds
from envs.fleet.replay import replay
from envs.fleet.spec import FleetSpec, PoolSpec
from marginroute.errors import InputError
from tests.invariants.engine_cases import small_profile

SIZE = 16
POOL = PoolSpec("p", small_profile(), kv_blocks=100, max_num_batched_tokens=200, prefix_caching=True)


def _run(prompts, outputs, hashes, gap_s=100.0, pool=POOL):
    """Requests one after the other, or all at once (gap 0); returns the fleet."""
    ragged = (np.array([len(own) for own in hashes]), np.array([h for own in hashes for h in own]))
    arrived_at_s = gap_s * np.arange(len(prompts))
    return replay(FleetSpec((pool,)), arrived_at_s, np.array(prompts), np.array(outputs), hashes=ragged)


@pytest.mark.parametrize(("prompt", "cached"), [(15, 0), (16, 0), (17, 16), (64, 48), (65, 64), (79, 64)])
def test_a_repeated_prompt_computes_its_last_token_or_block(prompt, cached):
    own = list(range(prompt // SIZE))
    fleet = _run([prompt] * 3, [1] * 3, [own] * 3)
    rows = fleet.requests[0]
    assert rows["cached_tokens"].tolist() == [0, cached, cached]
    ttft_s = rows["first_token_at_s"] - rows["dispatched_at_s"]
    chunks = [(prompt, 0), (prompt - cached, cached), (prompt - cached, cached)]
    np.testing.assert_allclose(ttft_s, [batch_seconds(POOL.profile, [], [chunk]) for chunk in chunks], rtol=1e-9)
    assert fleet.replicas["prefill_tokens_done"][0, 0] == 3 * prompt - 2 * cached
    assert fleet.replicas["reused_tokens"][0, 0] == 2 * cached


def test_prompts_that_are_scheduled_together_share_already():
    fleet = _run([65, 65], [1, 1], [range(4)] * 2, gap_s=0.0)
    together_s = batch_seconds(POOL.profile, [], [(65, 0), (1, 64)])
    np.testing.assert_allclose(fleet.requests[0]["first_token_at_s"], together_s, rtol=1e-12)


def test_a_prompt_in_chunks_is_found_up_to_what_was_computed():
    """Budget 50: 50 tokens, then the other 15 beside the second prompt, which by then needs only its last token."""
    pool = dataclasses.replace(POOL, max_num_seqs=8, max_num_batched_tokens=50)
    rows = _run([65, 65], [1, 1], [range(4)] * 2, gap_s=0.0, pool=pool).requests[0]
    assert rows["cached_tokens"].tolist() == [0, 64]
    end_s = batch_seconds(pool.profile, [], [(50, 0)]) + batch_seconds(pool.profile, [], [(15, 50), (1, 64)])
    np.testing.assert_allclose(rows["first_token_at_s"], end_s, rtol=1e-12)


def test_a_follow_up_turn_finds_the_answer_too():
    """Prompt 40 and answer 60: 99 tokens in the cache at the end (the last one is never fed back), 6 full blocks."""
    for given, cached in ((6, 96), (2, 32), (0, 0)):
        rows = _run([40, 130], [60, 5], [range(given), range(8)]).requests[0]
        assert rows["cached_tokens"].tolist() == [0, cached]


def test_the_least_recently_used_goes_first_and_ends_before_beginnings():
    """Ten blocks; a and b of four hashed and one partial block each. c needs seven: 2 are empty, 4 + 1 are evicted."""
    pool = dataclasses.replace(POOL, kv_blocks=10)
    a, b, c = range(0, 4), range(10, 14), range(20, 26)
    fleet = _run([65, 65, 100], [1] * 3, [a, b, c], pool=pool)
    assert fleet.replicas["evicted_blocks"][0, 0] == 5
    assert _run([65, 65, 100, 65], [1] * 4, [a, b, c, a], pool=pool).requests[0]["cached_tokens"][3] == 0
    assert _run([65, 65, 100, 65], [1] * 4, [a, b, c, b], pool=pool).requests[0]["cached_tokens"][3] == 48
    # looking at a again makes b the older one
    assert _run([65, 65, 65, 100, 65], [1] * 5, [a, b, a, c, a], pool=pool).requests[0]["cached_tokens"][4] == 48


def test_a_cache_of_one_request_keeps_nothing_for_others():
    pool = dataclasses.replace(POOL, kv_blocks=5)
    a, b = range(0, 4), range(10, 14)
    rows = _run([65] * 4, [1] * 4, [a, b, a, b], pool=pool).requests[0]
    assert (rows["cached_tokens"] == 0).all()
    assert _run([65] * 2, [1] * 2, [a, a], pool=pool).requests[0]["cached_tokens"].tolist() == [0, 64]


def test_shared_blocks_are_held_once():
    fleet = allocate(FleetSpec((POOL,)), 1, 3, 12)
    rows = fleet.requests[0]
    rows["prompt_tokens"], rows["output_tokens"], rows["patience_until_s"] = 65, 50, np.inf
    load_hashes(fleet, 0, ([4, 4, 4], [*range(4)] * 3))
    reset_world(*fleet.arrays, 0)
    for i in range(3):
        submit(*fleet.arrays, 0, 0, i, 0.0)
    advance(*fleet.arrays, 0, 1e-3)  # all three prefill
    assert fleet.replicas["kv_used_blocks"][0, 0] == 4 + 3
    assert fleet.replicas["idle_blocks"][0, 0] == 0
    drain(*fleet.arrays, 0)
    assert fleet.replicas["kv_used_blocks"][0, 0] == 0
    assert fleet.replicas["idle_blocks"][0, 0] == 4


def test_a_preempted_request_recomputes_only_what_was_evicted():
    """Two answers outgrow six blocks; the later request comes back when the first has ended."""
    pool = dataclasses.replace(POOL, kv_blocks=6)
    counts, flat = engine_hashes([33, 33], [40, 40], ([0, 0], []), SIZE, SIZE)
    done = {}
    for name, caching in (("off", False), ("on", True)):
        spec = FleetSpec((dataclasses.replace(pool, prefix_caching=caching),))
        arrived = np.zeros(2)
        done[name] = replay(spec, arrived, np.array([33, 33]), np.array([40, 40]), hashes=(counts, flat))
    on, off = done["on"], done["off"]
    assert on.requests["restarts"][0].tolist() == off.requests["restarts"][0].tolist() == [0, 1]
    saved = off.replicas["prefill_tokens_done"][0, 0] - on.replicas["prefill_tokens_done"][0, 0]
    assert saved == on.replicas["reused_tokens"][0, 0] > 0
    assert on.requests["cached_tokens"].sum() == 0  # as reported: of the first admission


def test_hashes_of_large_blocks_are_cut_into_the_engines():
    """Blocks of 64 tokens, an engine of 16: a prompt of 100 has 6 full blocks; what follows has hashes of its own."""
    counts, flat = engine_hashes([100, 70, 10, 130], [30, 1, 1, 10], ([2, 2, 1, 1], [7, 9, 7, 5, 3, 7]), 64, 16)
    a, b, c, d = np.split(flat, np.cumsum(counts)[:-1])
    assert counts.tolist() == [8, 4, 0, 8]
    assert (a[:4] == b).all()  # both begin with 7; of 9 and 5 nothing is left to compare
    assert (a[:4] == d[:4]).all()  # and no further: d has no second hash
    assert len(set(flat.tolist())) == 4 + 4 + 0 + 4
    assert c.size == 0


@pytest.mark.parametrize(
    ("counts", "flat", "words"),
    [
        ([1], [3], "1 counts"),
        ([1, 2], [3], "1 hashes"),
        ([1, -1], [], "0 or more per request"),
        ([1, 1], [3, -4], "-4"),
        ([1, 2], [3, 4, 4], "request 2 has 4 twice"),
    ],
)
def test_hashes_that_mean_nothing_are_refused(counts, flat, words):
    with pytest.raises(InputError, match=words):
        engine_hashes([100, 100], [1, 1], (counts, flat), 16, 16)


def test_what_cannot_be_is_refused():
    with pytest.raises(InputError, match="multiple"):
        engine_hashes([100], [1], ([1], [3]), 40, 16)
    with pytest.raises(InputError, match="at most 2"):
        load_hashes(allocate(FleetSpec((POOL,)), 1, 1, 2), 0, ([3], [1, 2, 3]))
    with pytest.raises(InputError, match="prefix_caching"):
        allocate(FleetSpec((dataclasses.replace(POOL, scheduler="sarathi", vidur_quirks=True),)), 1, 1)
