"""The workload's prefix hashes and sessions: defaults that change nothing, and what is refused."""

import dataclasses

import numpy as np
import pytest
from by_hand import workload

from marginroute.errors import InputError


@pytest.fixture(scope="module")
def three(hand_scenario):
    return workload(hand_scenario, {}, {"arrived_at_s": 1.0}, {"arrived_at_s": 2.0})


def test_by_default_nobody_follows_and_nothing_is_hashed(three):
    assert three.prefix_block_tokens == 0 and three.prefix_hash.shape == (0,)
    assert three.prefix_count.tolist() == [0, 0, 0]
    assert three.session_index.tolist() == three.parent_index.tolist() == [-1, -1, -1]
    assert not three.has_sessions and three.think_s.dtype == np.float64


def test_follow_ups_and_hashes_are_kept(three):
    full = dataclasses.replace(
        three,
        prefix_block_tokens=16,
        prefix_count=[6, 7, 0],  # 100 tokens: 6 full blocks, and the beginning of a seventh
        prefix_hash=[*range(6), *range(7)],
        session_index=[0, 0, 1],
        parent_index=[-1, 0, -1],
        think_s=[0.0, 2.5, 0.0],
    )
    assert full.has_sessions and full.prefix_hash.dtype == np.int64 and not full.prefix_hash.flags.writeable


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"parent_index": [-1, 1, -1]}, "parent_index of request 1 is 1; legal is an earlier request, or -1"),
        ({"parent_index": [-1, 0]}, "2 parent_index; legal is one per request, 3"),
        ({"think_s": [0.0, -1.0, 0.0]}, "think_s of request 1 is -1.0; legal is 0 or more seconds"),
        ({"think_s": [0.0, np.inf, 0.0]}, "think_s of request 1 is inf"),
        ({"session_index": [3, 4, 5], "parent_index": [-1, 0, -1]}, "session_index of request 1 is 4; legal is that"),
        ({"arrived_at_s": np.array([1.0, 5.0, 0.5])}, "arrived_at_s of request 2 is 0.5"),
        ({"prefix_count": [1, 0, 0], "prefix_hash": [5]}, "prefix_count of request 0 is 1"),
        ({"prefix_block_tokens": 16, "prefix_count": [1, 0, 8], "prefix_hash": [*range(9)]}, "of request 2 is 8"),
        ({"prefix_block_tokens": 16, "prefix_count": [1, 0, 0]}, "add up to 1, and 0 prefix_hash"),
        ({"prefix_block_tokens": 16, "prefix_count": [1, 0, 0], "prefix_hash": [-4]}, "prefix_hash -4; legal is 0"),
        ({"prefix_block_tokens": -1}, "prefix_block_tokens is -1"),
    ],
)
def test_what_is_refused(three, changed, message):
    with pytest.raises(InputError, match=message.replace("(", r"\(")):
        dataclasses.replace(three, **changed)


def test_only_roots_are_in_order_of_arrival(three):
    mixed = dataclasses.replace(three, arrived_at_s=np.array([1.0, 0.0, 2.0]), parent_index=[-1, 0, -1])
    assert mixed.arrived_at_s.tolist() == [1.0, 0.0, 2.0]
