"""The world's prefix index against the class that a gateway uses: equal answers, whatever is sent where and when."""

import dataclasses

import by_hand
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from envs import prefix_kernel
from envs.fleet.state import record_array
from envs.prefixes import GatewayPrefixes
from envs.world_state import LOAD
from marginroute import view as v
from marginroute.errors import InputError
from marginroute.prefix_index import PrefixIndex

BLOCK = 4


def prompts(draw):
    """Hashes of prompts that go on from one another: a block and all before it, by a tree."""
    lists, fresh = [], 0
    for _ in range(draw(st.integers(1, 12))):
        before = draw(st.sampled_from(lists)) if lists and draw(st.booleans()) else []
        shared = before[: draw(st.integers(0, len(before)))]
        own = draw(st.integers(0, 6))
        lists.append(shared + [100 + fresh + j for j in range(own)])
        fresh += own
    return lists


@st.composite
def streams(draw):
    """Prompts, capacities and times to live of three candidates, and sends: seconds later, candidate, request."""
    lists = prompts(draw)
    capacity = draw(st.lists(st.integers(0, 12), min_size=3, max_size=3))
    ttl_s = draw(st.lists(st.sampled_from([1.0, 3.0, np.inf]), min_size=3, max_size=3))
    sends = draw(
        st.lists(st.tuples(st.sampled_from([0.0, 0.5, 1.0, 2.0]), st.integers(0, 2), st.integers(0, len(lists) - 1)))
    )
    return lists, capacity, ttl_s, sends


def workload_of(scenario, lists):
    """A workload whose prompts are just long enough for their hashes."""
    rows = [{"arrived_at_s": float(i), "prompt_tokens": BLOCK * len(own) + 1} for i, own in enumerate(lists)]
    return dataclasses.replace(
        by_hand.workload(scenario, *rows),
        prefix_block_tokens=BLOCK,
        prefix_count=[len(own) for own in lists],
        prefix_hash=np.array([block for own in lists for block in own], dtype=np.int64),
    )


def kernel_index(workload, capacity, ttl_s, max_sends):
    """The compiled index of one world with these candidates, and its requests."""
    static = np.zeros((v.N_STATIC_SIGNALS, len(capacity)))
    static[v.PREFIX_CAPACITY_TOKENS] = np.array(capacity) * BLOCK
    static[v.PREFIX_TTL_S] = np.where(np.isinf(ttl_s), v.UNLIMITED, ttl_s)
    prefixes = GatewayPrefixes(static, len(capacity), 1, max_sends)
    prefixes.make_room(workload)
    loads = record_array((1, workload.n_requests), LOAD)
    loads["prompt_tokens"][0] = workload.prompt_tokens
    prefixes.load(0, workload, loads[0])
    return prefixes.arrays, loads


@settings(max_examples=200, deadline=None, derandomize=True)
@given(stream=streams())
def test_equal_to_the_gateways_class(hand_scenario, stream):
    lists, capacity, ttl_s, sends = stream
    workload = workload_of(hand_scenario, lists)
    theirs = PrefixIndex(capacity, ttl_s)
    ours, loads = kernel_index(workload, capacity, ttl_s, max(len(sends), 1))
    now_s = 0.0
    for later_s, c, i in sends:
        now_s += later_s
        theirs.insert(c, lists[i], now_s)
        prefix_kernel.insert(ours, loads, 0, c, i, now_s)
        for row, own in enumerate(lists):
            expected = theirs.match(own, now_s)
            found = [prefix_kernel.match(ours, loads, 0, c, row, now_s) if capacity[c] else 0 for c in range(3)]
            assert found == expected.tolist()
        assert [int(ours.marks["blocks"][0, c]) for c in range(3) if capacity[c]] == [
            theirs.size(c) for c in range(3) if capacity[c]
        ]


def test_a_restart_empties_the_record_of_one_candidate(hand_scenario):
    workload = workload_of(hand_scenario, [[1, 2, 3], [1, 2, 4]])
    index, loads = kernel_index(workload, [9, 9], [np.inf, np.inf], 2)
    for c in (0, 1):
        prefix_kernel.insert(index, loads, 0, c, 0, 0.0)
    prefix_kernel.forget(index, loads, 0, 0, 0)
    assert [prefix_kernel.match(index, loads, 0, c, 1, 0.0) for c in (0, 1)] == [0, 2]
    assert int(index.marks["blocks"][0, 0]) == 0


def test_without_a_free_record_a_send_is_not_noted(hand_scenario):
    workload = workload_of(hand_scenario, [[1], [2]])
    index, loads = kernel_index(workload, [9], [np.inf], 1)
    for i in (0, 1, 0):
        prefix_kernel.insert(index, loads, 0, 0, i, 0.0)
    assert [prefix_kernel.match(index, loads, 0, 0, i, 0.0) for i in (0, 1)] == [1, 1]


def test_hashes_that_do_not_stand_for_all_before_are_refused(hand_scenario):
    workload = workload_of(hand_scenario, [[1, 2], [3, 2]])
    with pytest.raises(InputError, match="prefix_hash 2 of request 1 stands elsewhere behind other blocks"):
        workload.prefix_ids  # noqa: B018


def test_numbers_follow_the_first_appearance(hand_scenario):
    workload = workload_of(hand_scenario, [[], [900, 5], [], [900, 7], []])
    assert workload.prefix_ids.tolist() == [0, 1, 0, 2]
    assert workload_of(hand_scenario, [[]]).prefix_ids.tolist() == []
