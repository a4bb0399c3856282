"""Histograms of latency: quantiles within a bin of the exact ones, and addition."""

import numpy as np
import pytest

from evaluation.latency import BINS, GROWTH, histogram, quantile


@pytest.mark.parametrize("q", [0.5, 0.95, 0.99])
def test_quantiles_are_within_a_bin_of_the_exact_ones(q):
    x = np.random.default_rng(0).lognormal(-1.0, 1.2, 20_000)
    exact = np.quantile(x, q, method="inverted_cdf")
    assert quantile(histogram(x, np.zeros(len(x), dtype=int), 1), q)[0] == pytest.approx(exact, rel=GROWTH**0.5 - 1)


def test_histograms_add():
    rng = np.random.default_rng(1)
    x, k = rng.gamma(2.0, size=1_000), rng.integers(0, 3, 1_000)
    parts = histogram(x[:400], k[:400], 3) + histogram(x[400:], k[400:], 3)
    np.testing.assert_array_equal(parts, histogram(x, k, 3))


def test_extremes_and_emptiness():
    counts = histogram(np.array([0.0, 1e9]), np.array([0, 0]), 2)
    assert (counts[0, 0], counts[0, BINS - 1], counts.sum()) == (1, 1, 2)
    assert np.isnan(quantile(counts, 0.5)[1])
