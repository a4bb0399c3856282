"""Queues with a known answer: one token per iteration of constant length makes the engine a textbook server.

With max_num_seqs = c, prompts of one token and iterations of `STEP_S`, a request with k output tokens holds one of c
servers for k STEP_S. The token of its prefill is the first of the k, so its wait is TTFT - STEP_S.
"""

import math

import numpy as np
import pytest

from envs.fleet.allocation import allocate
from envs.fleet.engine import advance, drain, reset_world, submit
from envs.fleet.profile import constant_profile
from envs.fleet.replay import replay
from envs.fleet.spec import FleetSpec, PoolSpec

STEP_S = 0.001
MEAN_TOKENS = 1000  # a mean service of one second in steps of a thousandth


def _server(c):
    pool = PoolSpec("server", constant_profile(STEP_S), kv_blocks=10**7, max_num_seqs=c, max_num_batched_tokens=2048)
    return FleetSpec((pool,), scrape_interval_s=1e9)


def _waits(spec, arrived_at_s, output_tokens):
    done = replay(spec, arrived_at_s, np.ones(len(arrived_at_s), np.int64), output_tokens).requests[0]
    return done["first_token_at_s"] - arrived_at_s - STEP_S


def _poisson(rng, rate, n):
    return np.cumsum(rng.exponential(1.0 / rate, n))


def _pollaczek_khinchine(rate, service_s):
    return rate * np.mean(service_s**2) / (2.0 * (1.0 - rate * np.mean(service_s)))


@pytest.mark.parametrize("kind", ["deterministic", "geometric", "two-point"])
@pytest.mark.parametrize("rho", [0.5, 0.8])
def test_one_server_waits_as_pollaczek_and_khinchine_say(kind, rho):
    rng, n = np.random.default_rng(7), 200_000
    tokens = {
        "deterministic": lambda: np.full(n, MEAN_TOKENS),
        "geometric": lambda: rng.geometric(1.0 / MEAN_TOKENS, n),
        "two-point": lambda: np.where(rng.random(n) < 0.9, 400, 6400),
    }[kind]()
    waits = _waits(_server(1), _poisson(rng, rho, n), tokens)
    assert waits.mean() == pytest.approx(_pollaczek_khinchine(rho, tokens * STEP_S), rel=0.06)


def test_mm1_waits_longer_than_t_with_the_known_probability():
    """P(W > t) = rho exp(-(mu - lambda) t) in M/M/1."""
    rng, n, rho = np.random.default_rng(3), 300_000, 0.7
    waits = _waits(_server(1), _poisson(rng, rho, n), rng.geometric(1.0 / MEAN_TOKENS, n))
    for t in (0.5, 2.0, 5.0):
        assert (waits > t).mean() == pytest.approx(rho * math.exp(-(1.0 - rho) * t), rel=0.06)


def _erlang_c(c, load):
    """Probability that an arrival of M/M/c waits, load = lambda / mu."""
    last = load**c / math.factorial(c) * c / (c - load)
    return last / (sum(load**k / math.factorial(k) for k in range(c)) + last)


@pytest.mark.parametrize(("c", "rho"), [(2, 0.7), (5, 0.8), (16, 0.9)])
def test_c_servers_wait_as_erlang_says(c, rho):
    """W = C(c, a) / (c mu - lambda); half a step more, because the batch changes only between iterations."""
    rng, n = np.random.default_rng(11), 200_000
    rate = rho * c
    waits = _waits(_server(c), _poisson(rng, rate, n), rng.geometric(1.0 / MEAN_TOKENS, n))
    known = _erlang_c(c, rate) / (c - rate)
    assert waits.mean() - STEP_S / 2 == pytest.approx(known, rel=0.06)


def test_littles_law_and_poisson_arrivals_see_time_averages():
    """Arrivals find on average lambda times the mean stay in flight."""
    rng, n, rate = np.random.default_rng(5), 20_000, 4.0
    arrived_at_s, tokens = _poisson(rng, rate, n), rng.geometric(1.0 / MEAN_TOKENS, n)
    fleet = allocate(_server(6), 1, n)
    rows = fleet.requests[0]
    rows["prompt_tokens"], rows["output_tokens"], rows["patience_until_s"] = 1, tokens, np.inf
    reset_world(*fleet.arrays, 0)
    found = np.zeros(n)
    for i, now_s in enumerate(arrived_at_s):
        advance(*fleet.arrays, 0, now_s)
        found[i] = fleet.replicas[0, 0]["in_flight"]
        submit(*fleet.arrays, 0, 0, i, now_s)
    drain(*fleet.arrays, 0)
    stay_s = (rows["completed_at_s"] - arrived_at_s).mean()
    effective_rate = n / arrived_at_s[-1]
    assert found.mean() == pytest.approx(effective_rate * stay_s, rel=0.03)


def test_all_servers_are_equally_busy_at_the_offered_load():
    """Utilisation law: busy share of a replica = lambda E[S], whatever the routing."""
    rng, n = np.random.default_rng(9), 50_000
    pool = PoolSpec(
        "servers", constant_profile(STEP_S), replicas=4, kv_blocks=10**7, max_num_seqs=1, max_num_batched_tokens=64
    )
    arrived_at_s, tokens = _poisson(rng, 2.4, n), rng.geometric(1.0 / MEAN_TOKENS, n)
    fleet = replay(FleetSpec((pool,), scrape_interval_s=1e9), arrived_at_s, np.ones(n, np.int64), tokens)
    busy_s = fleet.replicas["busy_s"][0]
    assert busy_s.sum() == pytest.approx(tokens.sum() * STEP_S, rel=1e-9)
    assert busy_s.sum() / 4 / arrived_at_s[-1] == pytest.approx(0.6, rel=0.02)
