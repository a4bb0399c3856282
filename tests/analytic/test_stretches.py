"""Block hashes cut into stretches, against the definition."""

import numpy as np
import pytest

from envs.fleet.allocation import allocate
from envs.fleet.hashes import load_hashes
from envs.fleet.profile import constant_profile
from envs.fleet.spec import FleetSpec, PoolSpec

POOL = PoolSpec("p", constant_profile(0.01), prefix_caching=True)


def _stretches(lists):
    """Per request its (number of the stretch, end), as they are loaded."""
    counts, flat = np.array([len(own) for own in lists]), np.array([h for own in lists for h in own], dtype=np.int64)
    fleet = allocate(FleetSpec((POOL,)), 1, len(lists), flat.size)
    load_hashes(fleet, 0, (counts, flat))
    cells, found = fleet.slots[0], []
    for own, at in zip(lists, fleet.requests["hash_at"][0], strict=True):
        found.append([])
        while (found[-1][-1][1] if found[-1] else 0) < len(own):
            cell = cells[at + len(found[-1])]
            found[-1].append((int(cell["stretch"]), int(cell["end"])))
    return found


def test_stretches_end_where_requests_go_apart_or_end():
    a, b, c, d = [1, 2, 3, 4, 5, 6], [1, 2, 3, 7, 8], [1, 2, 3, 4], [9, 10]
    assert _stretches([a, b, c, d, []]) == [
        [(0, 3), (1, 4), (2, 6)],
        [(0, 3), (3, 5)],
        [(0, 3), (1, 4)],
        [(4, 2)],
        [],
    ]


def test_large_numbers_mean_the_same():
    lists = [[5, 2**50, 7], [5, 2**50], [2**62]]
    assert _stretches(lists) == _stretches([[0, 1, 2], [0, 1], [3]]) == [[(0, 2), (1, 3)], [(0, 2)], [(2, 1)]]


@pytest.mark.parametrize("seed", range(40))
def test_stretches_of_any_lists_are_the_longest(seed):
    """Lists that need not be paths in a tree: hashes belong together if all their neighbours say so."""
    rng = np.random.default_rng(seed)
    base, lists = rng.permutation(30).tolist(), []
    for _ in range(int(rng.integers(1, 8))):
        begin = int(rng.integers(0, 20)) * int(rng.random() < 0.4)
        own = base[begin : begin + int(rng.integers(0, 12))]
        lists.append(own + [h for h in rng.integers(0, 40, int(rng.integers(0, 3))).tolist() if h not in own][:1])
    before, behind = {}, {}
    for own in lists:
        for j, h in enumerate(own):
            before.setdefault(h, set()).add(own[j - 1] if j else None)
            behind.setdefault(h, set()).add(own[j + 1] if j + 1 < len(own) else None)
    content = {}
    for own, found in zip(lists, _stretches(lists), strict=True):
        ends = [
            j + 1
            for j, h in enumerate(own)
            if j + 1 == len(own) or behind[h] != {own[j + 1]} or before[own[j + 1]] != {h}
        ]
        assert [end for _, end in found] == ends
        for (number, end), begin in zip(found, [0, *ends], strict=False):
            assert content.setdefault(number, own[begin:end]) == own[begin:end]
    assert len({tuple(part) for part in content.values()}) == len(content)
