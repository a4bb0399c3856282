"""Hit rates on Mooncake's conversation trace as a function of the cache's size, against published-trace statistics.

The statistics count every 512-token block of a trace, the last, partial one of each prompt included, in an LRU list
without engine. The index is such a list. To compare the engine, every prompt gets as many full blocks as the trace
lists and one token more, requests are served one at a time, and one block is added for that last token; token hits
weigh blocks by the tokens that the trace has in them. Skipped where the data is not beside the checkout.
"""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from envs.fleet.hashes import engine_hashes
from envs.fleet.profile import constant_profile
from envs.fleet.replay import replay
from envs.fleet.spec import FleetSpec, PoolSpec
from marginroute.prefix_index import PrefixIndex

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
TRACE, STATS = SHARED / "traces" / "mooncake_conversation_trace.jsonl.gz", SHARED / "stats" / "mooncake_prefix.json"
TOKENS = 512
ROUNDING = 1e-4  # of the statistics
SIZES = ("500", "1000", "3000", "10000", "30000", "50000", "100000", "None")

pytestmark = pytest.mark.skipif(not TRACE.exists() or not STATS.exists(), reason=f"{SHARED} has no Mooncake trace")


@pytest.fixture(scope="module")
def trace():
    with gzip.open(TRACE) as file:
        return [json.loads(line) for line in file]


@pytest.fixture(scope="module")
def stats():
    return json.loads(STATS.read_text())["conv"]


def _capacity(size, stats):
    return stats["unique"] + 1000 if size == "None" else int(size)


def _compare(trace, stats, size, blocks):
    """`blocks`: (M,) blocks found of each request."""
    lengths = np.array([row["input_length"] for row in trace])
    n_blocks = sum(len(row["hash_ids"]) for row in trace)
    found = {
        "block_hit": blocks.sum() / n_blocks,
        "token_hit": np.minimum(blocks * TOKENS, lengths).sum() / lengths.sum(),
    }
    for name, value in found.items():
        assert value == pytest.approx(stats[f"LRU_{size}"][name], abs=ROUNDING), name


@pytest.mark.parametrize("size", SIZES)
def test_index(trace, stats, size):
    index = PrefixIndex([_capacity(size, stats)])
    found = []
    for row in trace:
        found.append(int(index.match(row["hash_ids"])[0]))
        index.insert(0, row["hash_ids"])
    _compare(trace, stats, size, np.array(found))


@pytest.mark.parametrize("size", SIZES)
def test_engine(trace, stats, size):
    counts = np.array([len(row["hash_ids"]) for row in trace])
    flat = np.array([h for row in trace for h in row["hash_ids"]])
    pool = PoolSpec(
        "p",
        constant_profile(0.01),
        kv_blocks=_capacity(size, stats) + 1,
        block_size_tokens=TOKENS,
        max_num_batched_tokens=200_000,
        prefix_caching=True,
    )
    prompts, outputs = counts * TOKENS + 1, np.ones_like(counts)
    rows = replay(FleetSpec((pool,)), np.arange(len(trace)), prompts, outputs, hashes=(counts, flat)).requests[0]
    assert (rows["status"] == 2).all()
    _compare(trace, stats, size, rows["cached_tokens"] // TOKENS)


def test_engine_and_index_agree_under_load(trace):
    """The trace as it is, with queueing and chunked prefill, and ample blocks: the same blocks for every request."""
    arrived_at_s = np.array([row["timestamp"] / 1e3 for row in trace])
    prompts, outputs = (np.array([row[key] for row in trace]) for key in ("input_length", "output_length"))
    ragged = np.array([len(row["hash_ids"]) for row in trace]), np.array([h for row in trace for h in row["hash_ids"]])
    counts, flat = engine_hashes(prompts, outputs, ragged, TOKENS, TOKENS)
    pool = PoolSpec(
        "p",
        constant_profile(0.01),
        kv_blocks=300_000,
        block_size_tokens=TOKENS,
        max_num_batched_tokens=8192,
        prefix_caching=True,
    )
    rows = replay(FleetSpec((pool,)), arrived_at_s, prompts, outputs, hashes=(counts, flat)).requests[0]
    index = PrefixIndex([300_000])
    lists = np.split(flat, np.cumsum(counts)[:-1])
    for row, own in zip(rows, lists, strict=True):
        most = (int(row["prompt_tokens"]) - 1) // TOKENS
        assert row["cached_tokens"] == TOKENS * min(int(index.match(own.tolist())[0]), most)
        index.insert(0, own.tolist())
    assert rows["cached_tokens"].sum() / prompts.sum() == pytest.approx(0.36, abs=0.03)
