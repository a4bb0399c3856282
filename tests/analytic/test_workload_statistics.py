"""Statistics of requests against figures known on paper, and the hit curve against a naive LRU cache."""

from collections import OrderedDict

import numpy as np
import pytest

from envs.workload.prefix_hits import NEVER, hit_curve, needed_blocks
from envs.workload.statistics import clock_of, fano, ks_two_samples, mean_of, on_clock, summary
from envs.workload.traces import Trace


def naive_hits(requests, size):
    """Blocks found, leading run only, in an LRU cache of `size` blocks, touched from the last to the first."""
    cache, found = OrderedDict(), 0
    for blocks in requests:
        for block in blocks:
            if block not in cache:
                break
            found += 1
        for block in reversed(blocks):
            cache[block] = None
            cache.move_to_end(block)
            while len(cache) > size:
                cache.popitem(last=False)
    return found


@pytest.mark.parametrize("seed", range(6))
def test_the_hit_curve_equals_a_naive_cache_of_every_size(seed):
    rng = np.random.default_rng(seed)
    requests = [[int(rng.integers(6)) * 100 + place for place in range(int(rng.integers(1, 9)))] for _ in range(80)]
    count = np.array([len(blocks) for blocks in requests])
    hashes = np.array([block for blocks in requests for block in blocks])
    sizes = np.arange(1, 60)
    curve = hit_curve(hashes, count, 10, 10 * count, 10.0 * sizes)
    expected = np.array([naive_hits(requests, size) for size in sizes]) / count.sum()
    # A request longer than the cache evicts its own first touches: a size in between may hold more of its head
    fits = sizes >= count.max()
    np.testing.assert_allclose(curve[fits], expected[fits])
    assert expected[fits][0] < expected[fits][-1] == hit_curve(hashes, count, 10, 10 * count, np.array([np.inf]))[0]


def test_a_block_is_found_once_the_blocks_used_since_fit():
    need = needed_blocks(np.array([1, 2, 3, 1, 2, 9, 1]), np.array([3, 2, 1, 1]))
    assert need.tolist() == [NEVER, NEVER, NEVER, 1, 2, NEVER, 2]


def poisson(rate, span_s, seed=0):
    rng = np.random.default_rng(seed)
    times = np.sort(rng.random(rng.poisson(rate * span_s))) * span_s
    lengths = np.full(len(times), 10, dtype=np.int32)
    return Trace("drawn", times - times[0], lengths, lengths)


def test_poisson_arrivals_have_fano_one_at_every_scale():
    figures = summary(poisson(20.0, 40_000.0))
    np.testing.assert_allclose(figures.fano, 1.0, atol=0.1)
    assert figures.gap_cv == pytest.approx(1.0, abs=0.01) and figures.rate_per_s == pytest.approx(20.0, rel=0.01)


def test_even_arrivals_do_not_vary_and_bunched_ones_do():
    even = np.arange(10_000) * 0.1 + 0.05
    assert fano(even, 1.0) == pytest.approx(0.0, abs=0.01)
    assert fano(np.repeat(np.arange(0.0, 20_000.0, 2.0), 5), 1.0) == pytest.approx(2.5, rel=0.01)


def test_a_coarse_clock_is_noticed_and_applied():
    trace = poisson(10.0, 3000.0)
    rounded = Trace("", np.floor(trace.arrived_at_s / 3.0) * 3.0, trace.prompt_tokens, trace.output_tokens)
    assert clock_of(trace) == 0.0 and clock_of(rounded) == 3.0
    np.testing.assert_allclose(summary(trace, 3.0).fano, summary(rounded, 3.0).fano, rtol=0.1)


@pytest.mark.parametrize("begins_s", [0.0, 1.4, 1.5])
def test_ticks_that_are_milliseconds_off_stay_apart(begins_s):
    rng = np.random.default_rng(0)
    counts = rng.poisson(30.0, 2000)
    ticks_s = begins_s + 3.0 * np.arange(2000) + rng.uniform(-0.002, 0.002, 2000)
    ticks_s[0] = begins_s
    times_s = on_clock(np.repeat(ticks_s, counts), 3.0)
    assert times_s[0] >= 0.0 and len(np.unique(times_s)) == 2000
    kept = counts[:-1]  # the last tick fills no whole window
    assert fano(times_s, 3.0) == pytest.approx(kept.var(ddof=1) / kept.mean())
    np.testing.assert_array_equal(on_clock(ticks_s, 0.0), ticks_s)


def test_figures_of_several_streams_are_means():
    both = [summary(poisson(rate, 400.0)) for rate in (5.0, 15.0)]
    mean = mean_of(both)
    assert mean.requests == (both[0].requests + both[1].requests) // 2
    assert mean.fano[1] == pytest.approx(0.5 * (both[0].fano[1] + both[1].fano[1]))
    assert mean.hits == () and np.isnan(mean.repeat_share) and mean_of(both[:1]).prompt == both[0].prompt


def test_ks_of_two_samples():
    assert ks_two_samples(np.array([1, 2, 3, 4]), np.array([3, 4, 5, 6])) == 0.5
    assert ks_two_samples(np.array([1, 2]), np.array([1, 2, 1, 2])) == 0.0


def test_clients_sessions_and_repeats():
    tokens = np.array([100, 10, 1000, 100, 10, 1000, 100, 10, 100, 100], dtype=np.int32)
    trace = Trace(
        "",
        np.arange(10) * 700.0,
        tokens,
        tokens * 2,
        tenant_name=np.array(list("abcabcabaa")),
        prompt_key=np.array([0, 1, -1, 0, 1, -1, 0, 2, -1, -1], dtype=np.int32),
        session_index=np.array([0, 0, 1, 0, -1, 1, 0, 0, -1, -1], dtype=np.int32),
        parent_index=np.array([-1, 0, -1, 1, -1, 2, 3, 6, -1, -1], dtype=np.int32),
        think_s=np.array([np.nan, 1.0, np.nan, 2.0, np.nan, 3.0, 4.0, 5.0, np.nan, np.nan]),
    )
    figures = summary(trace)
    assert figures.clients == 3 and figures.top_client_share == 0.5 and figures.client_correlation == pytest.approx(1.0)
    assert figures.length_correlation == pytest.approx(1.0) and figures.repeat_share == 0.3
    assert figures.sessions == 2 and figures.session_requests[4] == 3.5 and figures.follow_share == 0.5
    assert figures.think[1] == 3.0 and trace.turn().tolist() == [0, 1, 0, 2, 0, 1, 3, 4, 0, 0]
    assert figures.active_share == pytest.approx(0.5 * 5 / 11 + 0.3 * 3 / 11 + 0.2 * 2 / 11)
