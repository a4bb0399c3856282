"""The gateway's prefix index: known answers, its bound, and the engine's cache as the truth that it estimates."""

import dataclasses
import math
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from envs.fleet.replay import replay
from envs.fleet.spec import FleetSpec
from marginroute.errors import InputError
from marginroute.prefix_index import PrefixIndex, block_hashes
from tests.invariants.engine_cases import hashes, load, pools


def test_it_counts_blocks_from_the_first_on():
    index = PrefixIndex([10, 10, 10, 0])
    index.insert(0, [1, 2, 3, 4])
    index.insert(1, [1, 2, 7])
    index.insert(3, [1, 2, 3])  # no capacity, no memory
    assert index.match([1, 2, 3, 4, 5]).tolist() == [4, 2, 0, 0]
    assert index.match([9]).tolist() == index.match([]).tolist() == [0, 0, 0, 0]
    assert [index.size(c) for c in range(4)] == [4, 3, 0, 0]


def test_it_forgets_the_least_recently_used_and_ends_before_beginnings():
    index = PrefixIndex([6])
    index.insert(0, [1, 2, 3])
    index.insert(0, [11, 12, 13])
    index.match([1, 2, 3])  # looking is not using
    index.insert(0, [21, 22])
    assert index.match([1, 2, 3]).tolist() == [1]
    assert index.match([11, 12, 13]).tolist() == [3]
    index.insert(0, [1])
    index.insert(0, [31, 32])
    assert index.match([1]).tolist() == [1]
    assert index.match([11, 12, 13]).tolist() == [1]
    index.insert(0, list(range(100, 120)))
    assert index.match(list(range(100, 120))).tolist() == [6]
    assert index.size(0) == 6


def _oracle(history, capacity):
    """Distinct blocks by last use, most recent first, cut at the capacity."""
    order = []
    for prompt in history:
        kept = prompt[:capacity]
        order = kept + [block for block in order if block not in kept]
        order = order[:capacity]
    return order


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    st.lists(st.integers(0, 12), min_size=1, max_size=3),
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3), st.integers(1, 9)), max_size=30),
)
def test_it_remembers_what_a_list_would(capacity, sent):
    index = PrefixIndex(capacity)
    history = [[] for _ in capacity]
    for c, family, length in sent:
        c %= len(capacity)
        prompt = [100 * family + j for j in range(length)]
        index.insert(c, prompt)
        history[c].append(prompt)
    known = [set(_oracle(prompts, n)) for prompts, n in zip(history, capacity, strict=True)]
    for family in range(4):
        prompt = [100 * family + j for j in range(10)]
        wanted = [next((j for j, block in enumerate(prompt) if block not in own), 10) for own in known]
        assert index.match(prompt).tolist() == wanted
    assert [index.size(c) for c in range(len(capacity))] == [len(own) for own in known]
    assert set(index._holders) == set().union(*known)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(pools(prefix_caching=True), st.integers(0, 2**31), st.booleans())
def test_an_engine_reuses_what_the_index_says_or_less(pool, seed, ample):
    """Requests one after the other: exactly the index with ample blocks, at most the index with the engine's blocks."""
    pool = dataclasses.replace(pool, replicas=1, kv_blocks=10_000 if ample else pool.kv_blocks)
    data = load(seed, 60, 1.0)
    data["arrived_at_s"], data["patience_s"][:] = 1e4 * np.arange(60), np.inf
    counts, flat = hashes(seed, data, pool.block_size_tokens)
    rows = replay(FleetSpec((pool,)), **data, hashes=(counts, flat)).requests[0]
    index = PrefixIndex([pool.kv_blocks])
    for row, own in zip(rows, np.split(flat, np.cumsum(counts)[:-1]), strict=True):
        if row["status"] != 2:
            continue  # could never fit
        blocks = min(int(index.match(own.tolist())[0]), (int(row["prompt_tokens"]) - 1) // pool.block_size_tokens)
        cached = row["cached_tokens"] // pool.block_size_tokens
        assert cached == blocks if ample else cached <= blocks
        index.insert(0, own.tolist())


@pytest.mark.parametrize("kind", ["tokens", "bytes"])
def test_block_hashes_are_chained_and_the_same_in_every_process(kind):
    a, b = bytes(range(40)), bytes([*range(20), 99, *range(21, 40)])
    if kind == "tokens":
        a, b = list(a), list(b)
    ours, other = block_hashes(a, 8), block_hashes(b, 8)
    assert len(ours) == len(set(ours)) == 5
    assert ours[:2] == other[:2]
    assert not set(ours[2:]) & set(other)
    assert all(0 <= value < 2**63 for value in ours)
    assert block_hashes(a[:39], 8) == ours[:4]
    assert block_hashes(a[:7], 8) == []
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2]), "PYTHONHASHSEED": "7"}
    program = f"from marginroute.prefix_index import block_hashes; print(block_hashes({a!r}, 8))"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment)
    assert run.stdout.strip() == str(ours)


def test_threads_leave_it_consistent():
    index = PrefixIndex([50, 50])

    def work(seed):
        rng = np.random.default_rng(seed)
        for _ in range(300):
            family, length = int(rng.integers(0, 10)), int(rng.integers(1, 20))
            prompt = [1000 * family + j for j in range(length)]
            index.insert(int(rng.integers(0, 2)), prompt)
            assert (index.match(prompt) <= length).all()

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for c in range(2):
        assert index.size(c) == 50
        assert set(index._recent[c]) == {block for block, holders in index._holders.items() if holders >> c & 1}


def test_what_cannot_be_is_refused():
    with pytest.raises(InputError, match=r"capacity_blocks\[1\] = -1"):
        PrefixIndex([1, -1])
    with pytest.raises(InputError, match="block_size = 0"):
        block_hashes([1, 2], 0)


def test_a_block_lives_as_long_after_its_last_use_as_its_candidate_lets_it():
    index = PrefixIndex([9, 9], [10.0, math.inf])
    for candidate in (0, 1):
        index.insert(candidate, [1, 2, 3], 0.0)
    index.insert(0, [1, 2], 6.0)
    assert index.match([1, 2, 3], 10.0).tolist() == [3, 3]
    assert index.match([1, 2, 3], 10.5).tolist() == [2, 3]
    assert index.match([1, 2, 3], 16.5).tolist() == [0, 3] and index.size(0) == 0


@pytest.mark.parametrize("ttl_s", [0.0, -1.0, math.nan])
def test_a_time_to_live_that_is_not_positive_is_refused(ttl_s):
    with pytest.raises(InputError, match=r"ttl_s\[1\] = .*; legal is more than 0"):
        PrefixIndex([1, 1], [math.inf, ttl_s])
