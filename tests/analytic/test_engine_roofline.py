"""Iteration times and request times by pencil and paper."""

import dataclasses

import numpy as np
import pytest

from envs.fleet.allocation import allocate
from envs.fleet.iteration import batch_seconds, linear_coefficients
from envs.fleet.profile import compact_profile, constant_profile
from envs.fleet.replay import replay
from envs.fleet.spec import FleetSpec, PoolSpec, check_pool
from envs.fleet.state import COMPLETED, FAILED
from marginroute.errors import InputError

KNOTS = {
    "token_knots": [1, 100, 200],
    "token_s": [0.010, 0.010, 0.020],  # weights are read (10 ms) until 100 tokens are computed per read
    "decode_batch_knots": [1, 64],
    "decode_mean_kv_knots": [64, 64 * 64],
    "decode_s": [[64e-7, 4096e-7], [64 * 64e-7, 64 * 4096e-7]],  # 0.1 us per token of context
    "prefill_square_s": 5e-8,
    "prefill_product_s": 1e-7,
}


@pytest.fixture
def profile():
    return compact_profile("paper", KNOTS)


def _pool(profile, **changes):
    return PoolSpec("p", profile, **({"kv_blocks": 100_000, "max_num_batched_tokens": 256} | changes))


def _one(pool, *requests):
    arrived, prompt, output = (np.array(column) for column in zip(*requests, strict=True))
    return replay(FleetSpec((pool,), scrape_interval_s=1e9), arrived.astype(float), prompt, output).requests[0]


def test_corners_of_the_roofline(profile):
    assert batch_seconds(profile, [64]) == pytest.approx(0.010 + 64e-7)  # bound by memory: one decode
    assert batch_seconds(profile, [64] * 64) == pytest.approx(0.010 + 64 * 64e-7)  # 64 cost hardly more
    assert batch_seconds(profile, [], [(200, 0)]) == pytest.approx(0.020 + 5e-8 * 200**2)  # bound by compute
    assert batch_seconds(profile, [], [(400, 0)]) == pytest.approx(0.040 + 5e-8 * 400**2)  # and goes on like that
    assert batch_seconds(profile, [1000], [(50, 500)]) == pytest.approx(0.010 + 1e-4 + 5e-8 * 50**2 + 1e-7 * 50 * 500)


def test_decode_attention_is_linear_in_context_and_in_the_batch(profile):
    lone = batch_seconds(profile, [3000]) - 0.010
    assert batch_seconds(profile, [3000] * 32) - 0.010 == pytest.approx(32 * lone)
    assert batch_seconds(profile, [1000, 5000]) == pytest.approx(batch_seconds(profile, [3000, 3000]))
    assert batch_seconds(profile, [9000]) - 0.010 == pytest.approx(3 * lone)  # beyond the last knot


def test_a_request_alone_takes_the_sum_of_its_iterations(profile):
    """TTFT: chunks of 256 and 44 tokens; then 9 decodes that attend to 301 to 309 tokens."""
    done = _one(_pool(profile), (1.0, 300, 10))[0]
    ttft_s = batch_seconds(profile, [], [(256, 0)]) + batch_seconds(profile, [], [(44, 256)])
    assert done["first_token_at_s"] - 1.0 == pytest.approx(ttft_s, rel=1e-12)
    decode_s = sum(batch_seconds(profile, [kv]) for kv in range(301, 310))
    assert done["completed_at_s"] - done["first_token_at_s"] == pytest.approx(decode_s, rel=1e-12)


def test_chunked_prefill_shares_the_iteration_and_prefill_first_stalls_the_decodes(profile):
    """A prompt arrives while another request decodes: with vLLM V1 each iteration of it carries one decode."""
    requests = (0.0, 10, 200), (0.5, 500, 2)
    mixed = _one(_pool(profile), *requests)
    stalled = _one(_pool(profile, scheduler="prefill-first", max_num_batched_tokens=1024), *requests)
    assert stalled["first_token_at_s"][1] < mixed["first_token_at_s"][1]  # the whole prompt at once
    assert stalled["completed_at_s"][0] > mixed["completed_at_s"][0]  # paid for by the one that decodes


def test_decoding_together_is_nearly_free_while_memory_bound(profile):
    alone = _one(_pool(profile), (0.0, 1, 100))[0]
    together = _one(_pool(profile), *[(0.0, 1, 100)] * 64)
    assert (together["status"] == COMPLETED).all()
    assert together["completed_at_s"].max() < 1.5 * alone["completed_at_s"]


def test_a_request_of_one_output_token_ends_with_its_prefill():
    done = _one(_pool(constant_profile(0.5)), (2.0, 7, 1))[0]
    assert done["first_token_at_s"] == done["completed_at_s"] == 2.5


def test_preemption_recomputes_and_keeps_what_was_streamed():
    """Eight blocks of four tokens, two requests of 8 + 16 tokens: both cannot stay, the later one starts over.

    At one second per iteration: both prefill in the first; 4 tokens of each later both hold 3 blocks, 4 tokens later 4
    blocks; the next boundary (17 cached tokens) finds no block, so the second restarts from 17 + 1 tokens.
    """
    pool = _pool(constant_profile(1.0), kv_blocks=8, block_size_tokens=4)
    first, second = _one(pool, (0.0, 8, 16), (0.0, 8, 16))
    assert (first["restarts"], first["completed_at_s"]) == (0, 16.0)
    assert (second["restarts"], second["first_token_at_s"]) == (1, 1.0)
    # 9 tokens until t = 9; waits for the first to end at 16; prefill of 17 tokens gives token 10 at 17; 6 more
    assert second["completed_at_s"] == 23.0


def test_what_can_never_fit_fails_at_the_door():
    pool = _pool(constant_profile(1.0), kv_blocks=4, block_size_tokens=4)
    fits, fails = _one(pool, (0.0, 8, 9), (0.0, 8, 10))
    assert (fits["status"], fails["status"]) == (COMPLETED, FAILED)
    assert fails["completed_at_s"] == 0.0


def test_linear_coefficients_recover_a_linear_engine():
    knots = KNOTS | {"token_knots": [1, 4096], "token_s": [0.010 + 2e-5, 0.010 + 4096 * 2e-5], "prefill_square_s": 0.0}
    base_s, prefill_s, decode_s, kv_s = linear_coefficients(compact_profile("linear", knots))
    assert base_s == pytest.approx(0.010, rel=1e-6)
    assert prefill_s == pytest.approx(2e-5, rel=1e-6)
    assert decode_s == pytest.approx(2e-5, rel=1e-6)
    assert kv_s == pytest.approx(1e-7, rel=1e-6)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("token_s", [0.01, 0.01], "token_s"),
        ("token_s", [0.01, float("nan"), 0.02], "not finite"),
        ("token_s", [0.01, -0.01, 0.02], "legal is > 0"),
        ("token_knots", [100, 1, 200], "ascending"),
        ("decode_mean_kv_knots", [64, 100], "multiples of 64"),
        ("decode_s", [[1.0, 2.0]], "shape"),
        ("prefill_square_s", "much", "not a number"),
    ],
)
def test_bad_profiles_are_refused_in_one_sentence(key, value, words):
    with pytest.raises(InputError, match=words):
        compact_profile("bad", KNOTS | {key: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [("replicas", 0), ("kv_blocks", 0), ("max_num_batched_tokens", 7), ("scheduler", "orca"), ("watermark_share", 1.0)],
)
def test_bad_pools_are_refused_in_one_sentence(profile, field, value):
    pool = dataclasses.replace(_pool(profile, max_num_seqs=8), **{field: value})
    with pytest.raises(InputError, match=field):
        check_pool(pool)
    with pytest.raises(InputError, match=field):
        allocate(FleetSpec((pool,)), 1, 1)
