"""The risk of stored answers: the curve, its inverse, and AWS's published table that its figures come from."""

import numpy as np
import pytest

from marginroute.response_cache import PUBLIC_HALF, PUBLIC_WIDTH, needed_similarity, p_reuse

# docs.aws.amazon.com, AmazonElastiCache, semantic-caching-benchmarks: threshold, cache hit ratio, accuracy of the hits
AWS = np.array(
    [(0.99, 0.235, 0.921), (0.95, 0.560, 0.926), (0.90, 0.745, 0.923), (0.80, 0.876, 0.918), (0.75, 0.903, 0.912),
     (0.50, 0.943, 0.875)]
)  # fmt: skip


def test_the_same_prompt_is_always_right_and_the_curve_rises():
    similarity = np.linspace(0.0, 1.0, 101)
    p = p_reuse(similarity, 0.8, 0.05)
    assert p[-1] == 1.0 and (np.diff(p) > 0.0).all() and p[0] < 1e-6
    assert p_reuse(0.8, 0.8, 0.05) == pytest.approx(0.5 * (1.0 + np.exp(-4.0)))


def test_needed_similarity_is_the_inverse():
    uniform = np.linspace(0.001, 1.0, 500)
    needed = needed_similarity(uniform, 0.9, 0.02)
    np.testing.assert_allclose(p_reuse(needed, 0.9, 0.02), uniform, rtol=1e-9)
    assert needed.max() == pytest.approx(1.0)


def test_the_public_curve_gives_the_published_accuracies():
    """Hits between two thresholds are right as often as the table's rows differ, over what the strict ones reach."""
    _, hits, accuracy = AWS.T
    between = np.diff(hits * accuracy) / np.diff(hits) / 0.924
    middle = 0.5 * (AWS[1:, 0] + AWS[:-1, 0])
    np.testing.assert_allclose(p_reuse(middle, PUBLIC_HALF, PUBLIC_WIDTH)[1:], between[1:], atol=0.03)
    np.testing.assert_allclose(between[1:], [0.99, 0.96, 0.78, 0.04], atol=0.01)  # as the module says
