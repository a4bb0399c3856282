"""The intervals of a report cover what they say: 93-97 % at nominal 95 %, by simulation over thousands of reports."""

import numpy as np
import pytest

from evaluation.statistics import confidence_sequence, paired_interval, sign_flip_p_value

REPORTS = 4_000
RESAMPLES = 1_999

# Per-episode differences of margin, standardised to mean 0: (E,) each; skewness in the name.
DIFFERENCES = {
    "normal": lambda rng, shape: rng.normal(size=shape),
    "right_1": lambda rng, shape: rng.gamma(4.0, size=shape) - 4.0,
    "left_1.5": lambda rng, shape: 1.78 - rng.gamma(1.78, size=shape),
    "right_2": lambda rng, shape: rng.exponential(size=shape) - 1.0,
    "lognormal_1.75": lambda rng, shape: rng.lognormal(0.0, 0.5, shape) - np.exp(0.125),
}


def coverage(low, high, truth):
    return ((low <= truth) & (truth <= high)).mean()


@pytest.mark.parametrize("episodes", [32, 48])
@pytest.mark.parametrize("shape", DIFFERENCES)
def test_mean_difference(episodes, shape):
    x = 0.3 + DIFFERENCES[shape](np.random.default_rng(5), (REPORTS, episodes))
    _, low, high = paired_interval(x, resamples=RESAMPLES)
    assert 0.93 <= coverage(low, high, 0.3) <= 0.97


@pytest.mark.parametrize("episodes", [32, 48])
def test_ratio_of_sums_with_episodes_of_unequal_length(episodes):
    rng = np.random.default_rng(6)
    usd_per_request = 0.5
    covered = []
    for _ in range(60):
        requests = rng.poisson(rng.gamma(8.0, 50.0, episodes)) + 1.0
        x = requests * (usd_per_request + 0.2 * (rng.gamma(2.0, size=(100, episodes)) - 2.0))
        _, low, high = paired_interval(x, requests, scale=1000.0, resamples=RESAMPLES)
        covered.append(coverage(low, high, 1000.0 * usd_per_request))
    assert 0.93 <= np.mean(covered) <= 0.97


@pytest.mark.parametrize(("episodes", "least"), [(32, 0.91), (48, 0.925)])
def test_rare_large_losses_are_the_known_limit(episodes, least):
    """One episode in seven loses 4 on average: too few of them in a report for the full 95 %."""
    rng = np.random.default_rng(10)
    burst = (rng.random((REPORTS, episodes)) < 0.15) * rng.gamma(2.0, 2.0, (REPORTS, episodes))
    _, low, high = paired_interval(rng.normal(1.0, 1.0, (REPORTS, episodes)) - burst, resamples=RESAMPLES)
    assert coverage(low, high, 1.0 - 0.15 * 4.0) >= least


def test_a_small_sample_falls_back_to_student_and_covers():
    x = np.random.default_rng(7).normal(size=(REPORTS, 5))
    _, low, high = paired_interval(x)
    assert 0.93 <= coverage(low, high, 0.0) <= 0.97


def test_pairing_resolves_what_unpaired_intervals_cannot():
    rng = np.random.default_rng(8)
    day_usd = rng.gamma(4.0, 25.0, 32)
    policy, reference = day_usd + 1.0 + rng.normal(size=32), day_usd + rng.normal(size=32)
    _, paired_low, paired_high = paired_interval(policy - reference)
    _, low, high = paired_interval(policy)
    assert paired_low > 0.0
    assert high - low > 20.0 * (paired_high - paired_low)


def test_sign_flip_rejects_a_true_null_as_often_as_it_says():
    rng = np.random.default_rng(9)
    p_values = np.array([sign_flip_p_value(x, draws=499) for x in rng.standard_t(5, size=(2_000, 32))])
    assert 0.035 <= (p_values <= 0.05).mean() <= 0.065


@pytest.mark.parametrize("shape", DIFFERENCES)
def test_a_confidence_sequence_covers_at_every_look(shape):
    x = 0.3 + DIFFERENCES[shape](np.random.default_rng(11), (600, 256))
    for_ever = np.ones(len(x), dtype=bool)
    for episodes in range(32, 257, 16):  # as `--until-ci` looks
        for i, row in enumerate(x[:, :episodes]):
            interval = confidence_sequence(row)
            for_ever[i] &= interval.low <= 0.3 <= interval.high
    assert for_ever.mean() >= 0.95 - 2.0 * np.sqrt(0.95 * 0.05 / len(x))
