"""Lengths, quality, patience and recurrences against what their parameters say."""

import math
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pytest

from envs.workload.arrivals import GammaArrivals, MmppArrivals
from envs.workload.fit_arrivals import fit_mmpp
from envs.workload.fit_lengths import fit_lengths
from envs.workload.generator import generate
from envs.workload.lengths import LengthMixture
from envs.workload.quality import QualityTruth, mean_ability
from envs.workload.spec import WorkloadSpec
from marginroute.quality import normal_cdf, prior_p_good

MIXTURE = LengthMixture((3.0, 1.0), (100.0, 2000.0), (0.8, 0.1), 10, 2500)
TRUTH = QualityTruth(
    ability=((0.9, -0.4), (1.6, 1.2)),
    slope=(0.8, 0.6),
    prior_ability=(0.3, 1.4),
    nobody_can_share=0.05,
    signal_correlation=0.6,
)


def spec(**changes):
    given = {
        "arrivals": GammaArrivals(10.0, 1.0),
        "horizon_s": 1000.0,
        "requests_per_episode": 40_000,
        "class_share": (0.5, 0.3, 0.2),
        "task_share": ((0.8, 0.2), (0.5, 0.5), (0.0, 1.0)),
        "tenants": (4, 2, 1),
        "tenant_exponent": 1.0,
        "prompt_lengths": (MIXTURE, LengthMixture((1.0,), (500.0,), (0.3,), 1, 10_000)),
        "output_lengths": (LengthMixture((1.0,), (50.0,), (0.5,), 1, 1000),) * 2,
        "patience_median_s": (10.0, math.inf, 20.0),
        "patience_sigma": (0.5, 0.0, 1.0),
        "deadline_s": (math.inf, math.inf, 60.0),
        "recurring_share": 0.3,
        "recurring_prompts": 20,
        "recurring_exponent": 1.0,
        "quality": TRUTH,
    }
    return WorkloadSpec(**{**given, **changes})


@pytest.fixture(scope="module")
def workload():
    return generate(spec(), np.random.default_rng(0))


def test_normal_cdf_against_the_error_function():
    x = np.linspace(-12.0, 12.0, 4001)
    exact = np.array([0.5 * math.erfc(-value / math.sqrt(2.0)) for value in x])
    np.testing.assert_allclose(normal_cdf(x), exact, rtol=0.0, atol=1e-15)
    assert normal_cdf(0.0) == 0.5


def test_mixture_quantiles():
    rng = np.random.default_rng(1)
    tokens = MIXTURE.draw(rng.random(200_000), rng.standard_normal(200_000))
    for level in (0.05, 0.25, 0.5, 0.7, 0.9):
        at = np.quantile(tokens, level)
        assert MIXTURE.cdf(at) == pytest.approx(level, abs=0.01)
    assert tokens.mean() == pytest.approx(MIXTURE.mean_tokens(), rel=0.01)
    assert tokens.min() == 10 and tokens.max() <= 2500


def test_mean_of_one_narrow_component_is_its_median():
    narrow = LengthMixture((1.0,), (300.0,), (1e-6,), 1, 1000)
    assert narrow.mean_tokens() == pytest.approx(300.0)
    assert narrow.cdf(299) == pytest.approx(0.0, abs=1e-12)
    assert narrow.cdf(300) == pytest.approx(1.0)


def test_shares_of_classes_tasks_and_tenants(workload):
    share = np.bincount(workload.class_index, minlength=3) / workload.n_requests
    np.testing.assert_allclose(share, (0.5, 0.3, 0.2), atol=0.01)
    unique = workload.prompt_key < 0
    assert workload.task_index[(workload.class_index == 0) & unique].mean() == pytest.approx(0.2, abs=0.015)
    assert workload.task_index[workload.class_index == 2].min() == 1
    first = np.bincount(workload.tenant_index[workload.class_index == 0], minlength=4)
    harmonic = 1 / np.arange(1, 5)
    np.testing.assert_allclose(first / first.sum(), harmonic / harmonic.sum(), atol=0.015)
    assert set(workload.tenant_index[workload.class_index == 1]) == {4, 5}
    assert set(workload.tenant_index[workload.class_index == 2]) == {6}


def test_patience_and_deadlines(workload):
    first = workload.patience_s[workload.class_index == 0]
    assert np.median(first) == pytest.approx(10.0, rel=0.03)
    assert np.log(first).std() == pytest.approx(0.5, rel=0.03)
    assert np.isinf(workload.patience_s[workload.class_index == 1]).all()
    assert (workload.deadline_s[workload.class_index == 2] == 60.0).all()
    assert np.isinf(workload.deadline_s[workload.class_index < 2]).all()


def test_equal_prompts_are_equal_in_everything_that_a_prompt_decides(workload):
    keys = workload.prompt_key
    assert set(keys[keys >= 0]) == set(range(keys.max() + 1))
    assert (keys >= 0).mean() == pytest.approx(0.3, abs=0.01)
    for name in ("tenant_index", "class_index", "task_index", "prompt_tokens", "output_tokens", "difficulty_signal"):
        values = getattr(workload, name)
        for key in range(0, keys.max() + 1, 7):
            assert len(np.unique(values[keys == key])) == 1, name
    for name in ("p_good", "good", "p_good_prior"):
        values = getattr(workload, name)[keys == 0]
        assert (values == values[0]).all(), name
    patient = workload.patience_s[keys == np.bincount(keys[(keys >= 0) & (workload.class_index == 0)]).argmax()]
    assert len(np.unique(patient)) == len(patient) > 1


def test_p_good_is_the_probit_formula():
    task, difficulty = np.array([0, 1, 1]), np.array([0.0, 1.0, -2.0])
    phi = NormalDist().cdf
    expected = [[phi(0.9), phi(1.6)], [phi(-0.4 - 0.8), phi(1.2 - 0.6)], [phi(-0.4 + 1.6), phi(1.2 + 1.2)]]
    np.testing.assert_allclose(TRUTH.p_good(task, difficulty), 0.95 * np.array(expected), atol=1e-12)


def test_outcomes_follow_p_good_and_are_monotone_in_it(workload):
    for tier in range(2):
        bins = np.digitize(workload.p_good[:, tier], np.linspace(0, 1, 11))
        for index in np.unique(bins):
            mine = (bins == index) & (workload.prompt_key < 0)
            if mine.sum() > 500:
                assert workload.good[mine, tier].mean() == pytest.approx(workload.p_good[mine, tier].mean(), abs=0.04)
    better = workload.p_good[:, 1] >= workload.p_good[:, 0]
    assert (workload.good[better, 1] >= workload.good[better, 0]).all()


def test_signal_has_the_stated_correlation():
    rng = np.random.default_rng(2)
    difficulty, noise = rng.standard_normal((2, 100_000))
    signal = TRUTH.signal(difficulty, noise)
    assert np.corrcoef(signal, difficulty)[0, 1] == pytest.approx(0.6, abs=0.01)
    assert signal.std() == pytest.approx(1.0, abs=0.01)


def test_prior_is_the_truth_averaged_over_what_it_cannot_see():
    """With one task, the prior at a signal equals the mean true probability of requests with that signal."""
    rng = np.random.default_rng(3)
    one = QualityTruth(((0.5,),), (0.8,), (0.5,), 0.05, 0.6)
    for signal in (-1.5, 0.0, 2.0):
        difficulty = 0.6 * signal + math.sqrt(1 - 0.36) * rng.standard_normal(400_000)
        mean = one.p_good(np.zeros(len(difficulty), dtype=int), difficulty).mean()
        prior = prior_p_good(np.array([0.5]), np.array([0.8]), np.array(signal), 0.6, 0.05)
        assert prior[0] == pytest.approx(mean, abs=0.002)


def test_prior_shapes_and_one_formula_for_any_batch():
    signal = np.random.default_rng(4).standard_normal((5, 7))
    ability, slope = np.array([0.1, 0.2, 0.3]), np.array([0.5, 0.6, 0.7])
    batch = prior_p_good(ability, slope, signal, 0.5, 0.1)
    assert batch.shape == (5, 7, 3)
    np.testing.assert_array_equal(batch[2, 3], prior_p_good(ability, slope, signal[2, 3], 0.5, 0.1))
    assert (np.diff(prior_p_good(ability, 0.5, 0.0, 0.5, 0.1)) > 0).all()


def test_mean_ability_answers_as_many_as_the_tasks_do():
    share, ability, slope = np.array([0.5, 0.5]), np.array([1.5, -1.0]), 0.7
    spread = math.sqrt(1 + slope**2)
    wanted = share @ normal_cdf(ability / spread)
    assert normal_cdf(mean_ability(ability, slope, share) / spread) == pytest.approx(wanted, abs=1e-9)
    assert mean_ability(np.array([0.4, 0.4]), slope, share) == pytest.approx(0.4, abs=1e-9)


def ks_distance(tokens, mixture):
    """Kolmogorov-Smirnov distance of integer counts from a mixture, largest gap just at or just below a count."""
    values, counts = np.unique(tokens, return_counts=True)
    empirical = np.cumsum(counts) / counts.sum()
    before = np.append(0.0, empirical[:-1])
    return float(max(np.abs(mixture.cdf(values) - empirical).max(), np.abs(mixture.cdf(values - 1) - before).max()))


def test_fit_recovers_a_known_mixture():
    rng = np.random.default_rng(5)
    tokens = MIXTURE.draw(rng.random(20_000), rng.standard_normal(20_000))
    fitted = fit_lengths(tokens, 2)
    assert ks_distance(tokens, fitted) < 0.02
    assert fitted.median_tokens[1] == pytest.approx(2000, rel=0.02)
    assert fitted.weight[0] == pytest.approx(0.75, abs=0.02)


def test_fit_recovers_a_known_mmpp():
    process = MmppArrivals((2.0, 12.0), (60.0, 20.0), ((0.0, 1.0), (1.0, 0.0)))
    arrived_s = process.draw(np.random.default_rng(6), 8000.0)
    found = fit_mmpp(arrived_s, 2, steps=40)
    np.testing.assert_allclose(found.rate_per_s, (2.0, 12.0), rtol=0.05)
    np.testing.assert_allclose(found.dwell_s, (60.0, 20.0), rtol=0.3)
    np.testing.assert_allclose(found.jump, [[0, 1], [1, 0]])
    assert found.mean_rate_per_s() == pytest.approx(len(arrived_s) / 8000.0, rel=0.01)


SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "traces"


@pytest.mark.skipif(not SHARED.is_dir(), reason="the development traces are not beside the checkout")
@pytest.mark.parametrize("kind", ["prompt_tokens", "output_tokens"])
def test_azure_generator_is_within_0_07_of_the_real_trace(kind):
    from envs.scenario_files import CONFIGS, read_yaml
    from envs.scenario_workload import WorkloadSection
    from envs.workload.traces import read_trace

    workload = WorkloadSection.model_validate(read_yaml(CONFIGS / "workloads" / "azure_conversation.yaml"))
    trace = read_trace(SHARED / "AzureLLMInferenceTrace_conv.csv.gz", "azure-llm")
    assert ks_distance(getattr(trace, kind), getattr(workload, kind).build()) <= 0.07
    rate_per_s = workload.arrivals.build().mean_rate_per_s()
    assert rate_per_s == pytest.approx(trace.n_requests / trace.span_s, rel=0.02)
