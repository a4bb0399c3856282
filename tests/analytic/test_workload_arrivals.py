"""Arrival processes against closed forms: stationary rate, Fano factor, coefficient of variation, exact counts."""

import numpy as np
import pytest

from envs.workload.arrivals import GammaArrivals, MmppArrivals

TWO = MmppArrivals((2.0, 10.0), (30.0, 10.0), ((0.0, 1.0), (1.0, 0.0)))
THREE = MmppArrivals((0.0, 5.0, 20.0), (10.0, 20.0, 5.0), ((0.0, 1.0, 0.0), (0.75, 0.0, 0.25), (0.0, 1.0, 0.0)))


def fano_two_states(process, window_s):
    (r1, r2), (t1, t2) = process.rate_per_s, process.dwell_s
    beta = 1 / t1 + 1 / t2
    share = t1 / (t1 + t2)
    mean = r1 * share + r2 * (1 - share)
    variance = share * (1 - share) * (r1 - r2) ** 2
    return 1 + 2 * variance / (mean * beta) * (1 - (1 - np.exp(-beta * window_s)) / (beta * window_s))


def test_stationary_shares_of_time():
    np.testing.assert_allclose(TWO.stationary(), [0.75, 0.25], atol=1e-12)
    assert TWO.mean_rate_per_s() == pytest.approx(4.0)
    # Jump chain visits: state 1 follows every other visit; 0 and 2 share the rest 3 : 1
    visits = np.array([0.375, 0.5, 0.125]) * np.array([10.0, 20.0, 5.0])
    np.testing.assert_allclose(THREE.stationary(), visits / visits.sum(), atol=1e-12)


@pytest.mark.parametrize("process", [TWO, THREE])
def test_mmpp_reaches_its_stationary_rate(process):
    horizon_s = 40_000.0
    arrived_s = process.draw(np.random.default_rng(1), horizon_s)
    assert len(arrived_s) / horizon_s == pytest.approx(process.mean_rate_per_s(), rel=0.05)


@pytest.mark.parametrize("window_s", [1.0, 10.0, 60.0])
def test_mmpp_fano_factor_equals_the_closed_form(window_s):
    horizon_s = 120_000.0
    arrived_s = TWO.draw(np.random.default_rng(2), horizon_s)
    counts = np.bincount((arrived_s / window_s).astype(int), minlength=int(horizon_s / window_s))
    assert counts.var() / counts.mean() == pytest.approx(fano_two_states(TWO, window_s), rel=0.06)


def test_mmpp_dwells_are_exponential_with_the_stated_means():
    states, edges_s = TWO.path(np.random.default_rng(3), 200_000.0)
    dwell_s = np.diff(edges_s)[:-1]
    for index, mean_s in enumerate(TWO.dwell_s):
        mine_s = dwell_s[states[:-1] == index]
        assert mine_s.mean() == pytest.approx(mean_s, rel=0.05)
        assert mine_s.std() == pytest.approx(mean_s, rel=0.08)


@pytest.mark.parametrize("gap_cv", [0.3, 1.0, 3.0])
def test_gamma_renewal_has_the_stated_rate_and_cv(gap_cv):
    process = GammaArrivals(5.0, gap_cv)
    gaps_s = np.diff(process.draw(np.random.default_rng(4), 30_000.0))
    assert 1 / gaps_s.mean() == pytest.approx(5.0, rel=0.03)
    assert gaps_s.std() / gaps_s.mean() == pytest.approx(gap_cv, rel=0.03)


def test_gamma_with_cv_one_is_poisson():
    counts = np.array([len(GammaArrivals(4.0, 1.0).draw(np.random.default_rng(seed), 5.0)) for seed in range(4000)])
    assert counts.mean() == pytest.approx(20.0, abs=4 * np.sqrt(20 / 4000))
    assert counts.var() / counts.mean() == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize("process", [TWO, THREE, GammaArrivals(5.0, 2.0)])
@pytest.mark.parametrize("count", [1, 7, 1200])
def test_a_fixed_count_is_met_exactly(process, count):
    for seed in range(20):
        arrived_s = process.draw(np.random.default_rng(seed), 240.0, count)
        assert len(arrived_s) == count
        assert (np.diff(arrived_s) >= 0).all()
        assert arrived_s[0] >= 0.0 and arrived_s[-1] < 240.0


def test_a_fixed_count_keeps_the_shape_of_the_bursts():
    states, edges_s = TWO.path(np.random.default_rng(5), 1000.0)
    arrived_s = TWO.draw(np.random.default_rng(5), 1000.0, 40_000)
    dwell_s, counts = np.diff(edges_s), np.histogram(arrived_s, edges_s)[0]
    per_s = [counts[states == index].sum() / dwell_s[states == index].sum() for index in (0, 1)]
    assert per_s[1] / per_s[0] == pytest.approx(5.0, rel=0.05)


def test_a_path_without_arrivals_still_gives_the_fixed_count():
    silent = MmppArrivals((0.0, 1.0), (1e9, 1e-9), ((0.0, 1.0), (1.0, 0.0)))
    assert len(silent.draw(np.random.default_rng(0), 10.0, 5)) == 5
    assert len(silent.draw(np.random.default_rng(0), 10.0)) == 0
