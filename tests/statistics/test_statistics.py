"""Closed forms, enumeration and textbook examples."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from evaluation.statistics import (
    Estimate,
    holm,
    interquartile_mean,
    paired_estimate,
    paired_interval,
    ratio_of_sums,
    sign_flip_p_value,
)

usd = st.lists(st.floats(-1e4, 1e4), min_size=5, max_size=40)


def test_sign_flip_equals_enumeration():
    x = np.random.default_rng(0).normal(0.4, 1.0, 9)
    sums = [abs(sum(s * v for s, v in zip(signs, x, strict=True))) for signs in product((-1, 1), repeat=9)]
    expected = np.mean(np.array(sums) >= abs(x.sum()) - 1e-12)
    assert sign_flip_p_value(x) == pytest.approx(expected, abs=1e-15)


def test_sign_flip_when_every_difference_has_one_sign():
    assert sign_flip_p_value(np.ones(10)) == 2 / 2**10
    assert sign_flip_p_value(-np.arange(1.0, 6.0)) == 2 / 2**5
    assert sign_flip_p_value(np.zeros(6)) == 1.0


def test_sign_flip_by_monte_carlo_agrees_with_the_exact_one(monkeypatch):
    x = np.random.default_rng(1).normal(0.5, 1.0, 14)
    exact = sign_flip_p_value(x)
    monkeypatch.setattr("evaluation.statistics.EXACT_SIGN_FLIP_EPISODES", 0)
    assert sign_flip_p_value(x) == pytest.approx(exact, abs=4 * np.sqrt(exact / 20_000))


def test_holm_textbook_example():
    # Holm (1979) on p = .01, .04, .03, .005: 4 x .005, 3 x .01, 2 x .03, then .06 again by monotonicity.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.9]) == pytest.approx([1.0, 1.0])


def test_interquartile_mean_closed_forms():
    assert interquartile_mean([5, 8, 4, 38, 8, 6, 9, 7, 7, 3, 1, 6]) == pytest.approx(6.5)
    # Nine values: a quarter is 2.25 of them, so the third and seventh count by three quarters.
    assert interquartile_mean([1, 3, 5, 7, 9, 11, 13, 15, 17]) == pytest.approx(9.0)
    assert interquartile_mean([0, 0, 1, 4, 100]) == pytest.approx((0.75 * 0 + 1 + 0.75 * 4) / 2.5)
    assert interquartile_mean([3.0]) == 3.0


def test_interquartile_mean_of_an_arithmetic_progression_is_its_middle():
    for n in range(1, 30):
        assert interquartile_mean(np.arange(n)) == pytest.approx((n - 1) / 2)


def test_interquartile_mean_works_on_the_last_axis():
    x = np.random.default_rng(2).normal(size=(3, 5, 17))
    assert interquartile_mean(x)[2, 4] == pytest.approx(float(interquartile_mean(x[2, 4])))


def test_ratio_of_sums_is_not_the_mean_of_ratios():
    assert ratio_of_sums([1.0, 9.0], [1.0, 3.0], 1000.0) == pytest.approx(2500.0)
    assert np.isnan(ratio_of_sums([0.0], [0.0]))


def test_a_ratio_with_equal_denominators_is_a_scaled_mean():
    x = np.random.default_rng(3).gamma(2.0, size=40)
    of_ratio = paired_interval(x, np.full(40, 250.0), scale=1000.0)
    of_mean = paired_interval(x, scale=4.0)
    np.testing.assert_allclose(of_ratio, of_mean, rtol=1e-12)


def test_a_large_normal_sample_gives_the_student_interval():
    x = np.random.default_rng(4).normal(size=2_000)
    _, low, high = paired_interval(x)
    expected = stats.t.interval(0.95, 1_999, x.mean(), stats.sem(x))
    assert (low, high) == pytest.approx(expected, abs=0.03 * (expected[1] - expected[0]))


def test_a_right_skewed_sample_stretches_the_interval_to_the_right():
    mean, low, high = paired_interval(np.random.default_rng(5).exponential(size=40))
    assert high - mean > 1.15 * (mean - low)


def test_seven_episodes_give_the_student_interval():
    x = np.array([1.0, 4.0, 2.0, 7.0, 5.0, 3.0, 2.5])
    estimate = paired_estimate(x)
    assert (estimate.low, estimate.high) == pytest.approx(stats.t.interval(0.95, 6, x.mean(), stats.sem(x)))


@pytest.mark.parametrize("rest", [0.0, 1e-7])
@pytest.mark.parametrize("different", [1, 2, 4])
def test_policies_that_differ_in_few_episodes_get_the_student_interval(rest, different):
    x = np.full(32, rest) * np.arange(32)
    x[:different] = 5.0 + np.arange(different)
    estimate = paired_estimate(x)
    assert (estimate.low, estimate.high) == pytest.approx(stats.t.interval(0.95, 31, x.mean(), stats.sem(x)))


def test_identical_policies_differ_by_exactly_nothing():
    assert paired_estimate(np.zeros(32)) == Estimate(0.0, 0.0, 0.0)


def test_one_episode_has_no_interval():
    estimate = paired_estimate([3.0], [2.0], scale=10.0)
    assert estimate.mean == 15.0
    assert np.isnan(estimate.low)
    assert np.isnan(estimate.high)
    assert not estimate.excludes_zero


def test_series_of_one_call_equal_single_calls():
    x = np.random.default_rng(6).gamma(2.0, size=(5, 32))
    n = np.random.default_rng(7).integers(50, 150, 32)
    together = np.array(paired_interval(x, n))
    single = np.array([paired_interval(row, n) for row in x]).T
    np.testing.assert_allclose(together, single, rtol=1e-10)


def test_same_seed_same_interval():
    x = np.random.default_rng(8).gamma(2.0, size=32)
    assert paired_estimate(x, seed=4) == paired_estimate(x, seed=4)
    assert paired_estimate(x, seed=4) != paired_estimate(x, seed=5)


@pytest.mark.parametrize("n", [np.zeros(4), -np.ones(4), np.ones(3)])
def test_a_denominator_must_be_positive_and_fit(n):
    with pytest.raises(ValueError, match="4 positive numbers"):
        paired_interval(np.ones(4), n)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 40), st.floats(0.1, 100.0), st.floats(-1e3, 1e3))
def test_intervals_move_with_the_data(seed, episodes, factor, shift):
    x = np.random.default_rng(seed).lognormal(0.0, 1.5, episodes)
    base, moved = paired_interval(x, resamples=99), paired_interval(factor * x + shift, resamples=99)
    np.testing.assert_allclose(moved, factor * np.array(base) + shift, rtol=1e-7, atol=1e-6)
    assert base[1] <= base[0] <= base[2]


@settings(max_examples=100, deadline=None)
@given(usd)
def test_intervals_are_finite_and_of_the_data_s_scale(values):
    x = np.array(values)
    _, low, high = paired_interval(x, resamples=199)
    assert np.isfinite([low, high]).all()
    assert high - low <= 100.0 * np.ptp(x) + 1e-9
