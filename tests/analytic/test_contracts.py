"""Allowances and windowed SLO credits against closed forms and simulation."""

import math

import numpy as np
import pytest

from marginroute import contracts

INF = math.inf


@pytest.mark.parametrize(
    ("account", "stands"),
    [
        ({}, "within"),
        ({"requests_left": 1.0}, "within"),
        ({"requests_left": 0.5}, "best_effort"),
        ({"requests_left": 0.0, "beyond": contracts.CHARGE}, "overage"),
        ({"requests_left": 0.0, "beyond": contracts.REFUSE}, "refused"),
        ({"balance_usd": 0.0}, "refused"),
        ({"balance_usd": 1e-9}, "within"),
        ({"bucket": 0.99}, "refused"),
        ({"prompt_tokens": 101.0}, "refused"),
    ],
)
def test_standing(account, stands):
    usual = {
        "requests_left": INF, "balance_usd": INF, "bucket": INF, "prompt_tokens": 100.0, "context_tokens": 100.0,
        "beyond": contracts.SERVE,
    }  # fmt: skip
    assert contracts.STANDINGS[contracts.standing(**{**usual, **account})] == stands


def test_a_bucket_refills_to_its_size():
    assert contracts.refilled(1.0, 10.0, 0.5, 4.0) == 3.0
    assert contracts.refilled(9.0, 10.0, 0.5, 4.0) == 10.0
    assert contracts.refilled(0.0, 10.0, INF, 0.0) == INF


@pytest.mark.parametrize(("met", "share"), [(100, 0.0), (95, 0.0), (94, 0.1), (90, 0.1), (89, 0.25), (0, 0.25)])
def test_a_window_below_its_target_is_credited(met, share):
    assert contracts.window_credit_share(met, 100, 0.95, 0.1, 0.90, 0.25) == share
    assert contracts.window_credit_share(0, 0, 0.95, 0.1, 0.90, 0.25) == 0.0


@pytest.mark.parametrize("missed", [0, 3, 5, 8, 10, 12, 16, 17])
@pytest.mark.parametrize(("decided", "to_come"), [(20, 180), (100, 100), (150, 50)])
def test_cost_of_one_more_miss_is_the_difference_it_makes(missed, decided, to_come):
    """Against exact binomial sums: expected credit with this request missed, less that with it met."""
    rate, value_usd, total = 0.04, 50.0, decided + to_come + 1
    further = range(to_come + 1)
    chance = np.array([math.comb(to_come, k) * rate**k * (1.0 - rate) ** (to_come - k) for k in further])

    def expected_usd(mine):
        met = [total - missed - mine - k for k in further]
        shares = [contracts.window_credit_share(x, total, 0.95, 0.1, 0.92, 0.3) for x in met]
        return value_usd * float(chance @ np.array(shares))

    difference_usd = expected_usd(1) - expected_usd(0)
    usd = contracts.window_miss_usd(missed, decided, to_come, rate, value_usd, 0.95, 0.1, 0.92, 0.3)
    assert usd == pytest.approx(difference_usd, rel=1e-9, abs=1e-12)


def test_a_lost_or_safe_window_costs_nothing_more():
    for missed in (0, 60):
        assert contracts.window_miss_usd(missed, 90, 10, 0.02, 100.0, 0.95, 0.1, 0.0, 0.0) < 0.02
    at_the_edge = contracts.window_miss_usd(5, 90, 10, 0.02, 100.0, 0.95, 0.1, 0.0, 0.0)
    assert at_the_edge > 8.0
