"""Speculative decoding: gains and losses known on paper, and what it costs to leave the luck of acceptance out."""

import dataclasses

import numpy as np
import pytest

from envs.fleet.iteration import batch_seconds, linear_coefficients
from envs.fleet.profile import compact_profile, constant_profile
from envs.fleet.replay import replay
from envs.fleet.spec import FleetSpec, PoolSpec, check_pool
from envs.fleet.speculation import Speculation
from envs.plant import Plant
from envs.scenario import load_scenario
from envs.scenario_files import locate, read_yaml
from marginroute import view as v
from marginroute.errors import InputError
from tests.invariants.naive_engine import Naive, NaiveReplica

STEP_S = 0.01
ROOFLINE = {  # 10 ms up to 100 tokens, then in proportion
    "token_knots": [1, 100, 200],
    "token_s": [0.010, 0.010, 0.020],
    "decode_batch_knots": [1, 256],
    "decode_mean_kv_knots": [1, 4096],
    "decode_s": [[0.0, 0.0], [0.0, 0.0]],
}


def _pool(profile, speculation=None, **changes):
    fields = {"kv_blocks": 100_000, "max_num_batched_tokens": 4096} | changes
    return PoolSpec("p", profile, **fields, speculation=speculation)


def _decode_s(pool, requests, output_tokens):
    """Seconds from the first token to the last of requests that decode together."""
    ones = np.ones(requests, np.int64)
    done = replay(FleetSpec((pool,), scrape_interval_s=1e9), np.zeros(requests), ones, output_tokens * ones).requests[0]
    return float((done["completed_at_s"] - done["first_token_at_s"])[0])


@pytest.mark.parametrize("acceptance", [0.0, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("draft_tokens", [1, 4, 7])
@pytest.mark.parametrize("cost", [0.0, 0.1])
def test_a_model_bound_by_memory_gains_what_leviathan_says(acceptance, draft_tokens, cost):
    """(1 - a^(k+1)) / ((1 - a) (k c + 1)), theorem 3.8."""
    speculation = Speculation(draft_tokens, acceptance, cost)
    plain, drafted = (_decode_s(_pool(constant_profile(STEP_S), s), 8, 20_001) for s in (None, speculation))
    tokens = draft_tokens + 1 if acceptance == 1.0 else (1 - acceptance ** (draft_tokens + 1)) / (1 - acceptance)
    assert speculation.tokens_per_iteration == pytest.approx(tokens)
    assert plain / drafted == pytest.approx(tokens / (1.0 + draft_tokens * cost), rel=1e-3)


def test_it_gains_at_small_batches_loses_at_large_ones_and_stops_where_it_is_told():
    profile = compact_profile("roofline", ROOFLINE)
    speculation = Speculation(3, 0.5)  # 1.875 tokens for the linear layers' work on 4
    for batch, gain in ((1, 1.875), (25, 1.875), (50, 1.875 / 2), (200, 1.875 / 4)):
        pools = (_pool(profile, s, max_num_seqs=256) for s in (None, speculation))
        plain, drafted = (_decode_s(pool, batch, 4001) for pool in pools)
        assert plain / drafted == pytest.approx(gain, rel=2e-3), batch
    stops = _pool(profile, dataclasses.replace(speculation, max_batch=40), max_num_seqs=256)
    assert _decode_s(stops, 41, 4001) == _decode_s(_pool(profile, max_num_seqs=256), 41, 4001)
    assert _decode_s(stops, 40, 4001) < 0.9 * _decode_s(stops, 41, 4001)


def test_an_iteration_checks_every_draft_token_and_reads_the_cache_once():
    data = ROOFLINE | {"decode_s": [[0.0, 4095e-7], [0.0, 256 * 4095e-7]]}
    profile = compact_profile("paper", data)
    plain = batch_seconds(profile, [1001] * 40)
    assert plain == pytest.approx(0.010 + 40 * 1e-4)
    assert batch_seconds(profile, [1001] * 40, (), Speculation(4, 0.7)) == pytest.approx(0.020 + 40 * 1e-4)
    draft_s = 4 * 0.05 * plain
    assert batch_seconds(profile, [1001] * 40, (), Speculation(4, 0.7, 0.05)) == pytest.approx(0.024 + draft_s)


def test_a_gateway_expects_the_time_per_token():
    profile = compact_profile("8b", read_yaml(locate("llama-3.1-8b-h100", "profile")))
    plain, drafted = linear_coefficients(profile), linear_coefficients(profile, Speculation(4, 0.8, 0.02))
    assert drafted[0] < 0.4 * plain[0]  # the weights are read once for several tokens
    assert drafted[1] == pytest.approx(plain[1], rel=0.15)  # a prompt is as long as ever
    batch, kv = 16, 16 * 1000
    expected_s = drafted[0] + drafted[2] * batch + drafted[3] * kv
    pool = _pool(profile, Speculation(4, 0.8, 0.02), max_num_seqs=256)
    rows = np.ones(batch, np.int64)
    done = replay(FleetSpec((pool,), scrape_interval_s=1e9), np.zeros(batch), 900 * rows, 201 * rows).requests[0]
    tpot_s = (done["completed_at_s"] - done["first_token_at_s"])[-1] / 200
    assert expected_s == pytest.approx(tpot_s, rel=0.15)


def test_a_pool_of_a_scenario_speculates():
    overrides = {"fleet.pools.large.speculation": {"draft_tokens": 4, "acceptance": 0.7, "draft_cost": 0.05}}
    plain, drafted = Plant(load_scenario("quickstart")), Plant(load_scenario("quickstart", overrides))
    assert drafted.spec.pools[2].speculation == Speculation(4, 0.7, 0.05)
    tpot_s = [plant.static_signals[v.BASE_S, : plant.spec.n_replicas] for plant in (plain, drafted)]
    assert (tpot_s[1][:2] == tpot_s[0][:2]).all() and tpot_s[1][2] < 0.6 * tpot_s[0][2]


@pytest.mark.parametrize(
    ("speculation", "words"),
    [
        (Speculation(0, 0.5), "speculation.draft_tokens = 0, legal is 1 to 32"),
        (Speculation(4, 1.5), "speculation.acceptance = 1.5, legal is from 0 to 1"),
        (Speculation(4, 0.5, -1.0), "speculation.draft_cost"),
        (Speculation(4, 0.5, 0.0, 0), "speculation.max_batch"),
        (Speculation(32, 0.5), "max_num_batched_tokens = 4096, legal is 4224 or more"),
    ],
)
def test_bad_speculation_is_refused_in_one_sentence(speculation, words):
    with pytest.raises(InputError, match=words):
        check_pool(_pool(constant_profile(STEP_S), speculation))


class _Lucky(NaiveReplica):
    """The naive engine with acceptance drawn, token by token, for every sequence and iteration."""

    def __init__(self, pool, requests, rng):
        super().__init__(pool, requests)
        self.rng = rng

    def _gain(self, request, tokens):
        if self.speculation is None:
            return 1
        refused = np.flatnonzero(self.rng.random(self.speculation.draft_tokens) >= self.speculation.acceptance)
        return 1 + int(refused[0] if refused.size else self.speculation.draft_tokens)


def compare_with_luck(seed, n, requests_per_s, speculation):
    """Relative errors in mean and p95 of TTFT, TPOT and E2E of the engine against drawn acceptance."""
    profile = compact_profile("70b", read_yaml(locate("llama-3.1-70b-h100-tp4", "profile")))
    rng = np.random.default_rng(seed)
    arrived_at_s = np.cumsum(rng.exponential(1.0 / requests_per_s, n))
    prompt = np.clip(rng.lognormal(np.log(400), 0.6, n), 8, 4000).astype(np.int64)
    output = np.clip(rng.lognormal(np.log(120), 0.7, n), 8, 1000).astype(np.int64)
    pool = _pool(profile, speculation, kv_blocks=20_000, max_num_seqs=64, max_num_batched_tokens=1024)
    ours = replay(FleetSpec((pool,), scrape_interval_s=1e9), arrived_at_s, prompt, output).requests[0]
    naive = [Naive(float(a), int(p), int(o)) for a, p, o in zip(arrived_at_s, prompt, output, strict=True)]
    _Lucky(pool, naive, rng).run()
    first_s, end_s = (np.array([getattr(r, name) for r in naive]) for name in ("first_s", "end_s"))
    times = {}
    for name, first, end in (("ours", ours["first_token_at_s"], ours["completed_at_s"]), ("luck", first_s, end_s)):
        times[name] = (first - arrived_at_s, (end - first) / (output - 1), end - arrived_at_s)
    return {
        name: (a.mean() / b.mean() - 1.0, np.percentile(a, 95) / np.percentile(b, 95) - 1.0)
        for name, a, b in zip(("ttft", "tpot", "e2e"), times["ours"], times["luck"], strict=True)
    }


@pytest.mark.parametrize("requests_per_s", [1.0, 6.0])
def test_the_luck_of_acceptance_hardly_moves_the_times_of_a_load(requests_per_s):
    """Per request the number of iterations varies, over a load that is lost in the spread of the lengths."""
    errors = compare_with_luck(1, 400, requests_per_s, Speculation(4, 0.7, 0.05))
    assert abs(errors["e2e"][0]) < 0.02 and abs(errors["e2e"][1]) < 0.04
    assert abs(errors["tpot"][0]) < 0.03 and abs(errors["ttft"][0]) < 0.03
    assert -0.3 < errors["tpot"][1] < 0.0  # the unluckiest streams are slower than any of ours
