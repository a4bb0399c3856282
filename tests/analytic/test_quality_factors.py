"""The factor model of quality: draws that never change, a stated AUC that is reached, figures that are found again."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import yaml
from sklearn.metrics import roc_auc_score

from envs.__main__ import main
from envs.scenario import load_scenario
from envs.workload.quality import QualityTruth, draw_quality, predictor_auc, with_auc
from envs.workload.quality_fit import FactorModel, fit_factors, rotated
from marginroute.errors import InputError
from marginroute.quality import QualityPrior, normal_cdf

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = sorted((ROOT / "configs" / "quality").glob("*.yaml"))
DRAWN = ("arrived_at_s", "prompt_tokens", "difficulty_signal", "p_good_prior", "p_good", "good", "provider_noise")
TWO = QualityTruth(
    ability=((0.2, -0.4), (0.9, 0.6), (0.5, 1.4)),
    slope=(0.9, 0.7, 1.2),
    prior_ability=(0.0, 0.7, 0.9),
    nobody_can_share=0.08,
    signal_correlation=0.6,
    loadings=((0.8,), (-0.6,), (0.1,)),
    task_nobody_can=(0.02, 0.14),
    independent_luck=True,
)
SHARE = np.array([0.5, 0.5])


def drawn(truth, n, seed=0):
    """(task, draw, good) of n prompts of two tasks."""
    rng = np.random.default_rng(seed)
    task = (rng.random(n) < SHARE[1]).astype(int)
    draw = draw_quality(truth, rng, task, np.arange(n))
    return task, draw, truth.good(task, draw.p_good, rng.random(n), draw.luck)


@pytest.mark.parametrize(
    ("name", "overrides", "digest"),
    [
        ("quickstart", {"requests_per_episode": 500, "drift": {}}, "f146c225de70f15e"),
        ("azure_conversation", {}, "3077bbad3e26720d"),
    ],
)
def test_draws_of_one_factor_worlds_are_what_they_always_were(name, overrides, digest):
    """To 9 digits, since exp and log differ between machines; digests are of the code before factors."""
    workload = load_scenario(name, overrides).generate(3, "train")
    found = hashlib.sha256()
    for field in DRAWN:
        values = getattr(workload, field)
        found.update((np.round(values, 9) + 0.0 if values.dtype.kind == "f" else values).tobytes())
    assert found.hexdigest()[:16] == digest


def test_one_factor_with_shared_luck_is_the_old_formula():
    truth = QualityTruth(((0.3, 1.0), (1.2, 0.1)), (0.7, 0.5), (0.6, 0.7), 0.05, 0.6)
    task, draw, good = drawn(truth, 4000)
    assert draw.luck is None
    expected = 0.95 * normal_cdf(np.array(truth.ability).T[task] - np.outer(_difficulty(), [0.7, 0.5]))
    np.testing.assert_allclose(draw.p_good, expected, atol=1e-12)
    better = draw.p_good[:, 1] >= draw.p_good[:, 0]
    assert (good[better, 1] >= good[better, 0]).all()


def _difficulty():
    rng = np.random.default_rng(0)
    rng.random(4000)
    return rng.standard_normal((2, 4000))[0]


def test_two_factors_follow_their_formula():
    n = 400_000
    task, draw, good = drawn(TWO, n)
    for j in (0, 1):
        mine = task == j
        spread = np.sqrt(1.0 + np.square(TWO.slope) + TWO.unseen_variance)
        expected = (1.0 - TWO.task_nobody_can[j]) * normal_cdf(np.array(TWO.ability)[:, j] / spread)
        np.testing.assert_allclose(draw.p_good[mine].mean(axis=0), expected, atol=0.004)
        np.testing.assert_allclose(good[mine].mean(axis=0), expected, atol=0.005)
    for tier in range(3):  # outcomes follow P(good)
        part = np.digitize(draw.p_good[:, tier], np.linspace(0.0, 1.0, 11))
        for k in np.unique(part):
            rows = part == k
            if rows.sum() > 2000:
                assert good[rows, tier].mean() == pytest.approx(draw.p_good[rows, tier].mean(), abs=0.03)


def test_the_number_of_right_answers_is_that_of_the_fitted_form():
    model = FactorModel(np.array(TWO.ability), np.c_[TWO.slope, TWO.loadings], np.array(TWO.task_nobody_can))
    accuracy, count = model.accuracy(SHARE)
    _, _, good = drawn(TWO, 400_000, 1)
    np.testing.assert_allclose(good.mean(axis=0), accuracy, atol=0.004)
    np.testing.assert_allclose(np.bincount(good.sum(axis=1)) / len(good), count, atol=0.004)
    assert count.sum() == pytest.approx(1.0)
    _, shared = model.accuracy(SHARE, shared_luck=True)
    assert shared[0] > count[0] + 0.02  # common luck leaves more prompts that no tier answers


def test_a_recurring_prompt_is_the_same_prompt():
    rng = np.random.default_rng(0)
    source = np.array([0, 1, 0, 3, 1])
    draw = draw_quality(TWO, rng, np.zeros(5, dtype=int), source)
    for field in ("signal", "p_good_prior", "p_good", "luck"):
        values = getattr(draw, field)
        np.testing.assert_array_equal(values[[2, 4]], values[[0, 1]])
        assert (values[0] != values[1]).all()


@pytest.mark.parametrize("auc", [0.66, 0.72, 0.78])
def test_the_observed_predictor_has_the_auc_that_was_stated(auc):
    truth = with_auc(TWO, SHARE, auc)
    assert predictor_auc(truth, SHARE).mean() == pytest.approx(auc, abs=1e-6)
    _, draw, good = drawn(truth, 200_000, 2)
    found = [roc_auc_score(good[:, t], draw.p_good_prior[:, t]) for t in range(3)]
    np.testing.assert_allclose(found, predictor_auc(truth, SHARE), atol=0.006)
    for tier in range(3):  # and it is calibrated
        for rows in np.array_split(np.argsort(draw.p_good_prior[:, tier]), 10):
            assert good[rows, tier].mean() == pytest.approx(draw.p_good_prior[rows, tier].mean(), abs=0.015)


def test_the_scenario_reaches_it_too():
    changed = {"workload.difficulty": {"signal_auc": 0.7, "nobody_can_share": 0.03}, "workload.recurring.share": 0.0}
    scenario = load_scenario("quickstart", changed)
    episodes = [scenario.generate(seed) for seed in range(12)]
    prior, good = (np.concatenate([getattr(w, name) for w in episodes]) for name in ("p_good_prior", "good"))
    found = np.mean([roc_auc_score(good[:, t], prior[:, t]) for t in range(good.shape[1])])
    assert found == pytest.approx(0.7, abs=0.012)


def test_an_auc_out_of_reach_says_what_is_in_reach():
    with pytest.raises(InputError, match=r"0\.95 cannot be reached; legal is 0\.\d+ \(task alone\) to 0\.\d+"):
        with_auc(TWO, SHARE, 0.95)
    changed = {"workload.difficulty": {"signal_auc": 0.99}}
    with pytest.raises(InputError, match=r"workload\.difficulty\.signal_auc: 0\.99 cannot be reached"):
        _ = load_scenario("quickstart", changed).workload_spec


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"workload.difficulty": {"nobody_can_share": 0.1}}, "both or none of signal_correlation and signal_auc"),
        ({"workload.difficulty": {"signal_auc": 0.7, "signal_correlation": 0.5}}, "both or none"),
        ({"workload.difficulty.luck": "bad"}, "workload.difficulty.luck"),
        ({"fleet.tiers.medium.quality.loadings": [0.3]}, "has 1 figures; legal is 0, as many as tier small"),
    ],
)
def test_contradictions_are_named(changed, words):
    with pytest.raises(InputError, match=words):
        load_scenario("quickstart", changed)


def test_a_prior_that_knows_tasks_travels_in_a_manifest():
    prior = QualityPrior(
        np.array([[0.1, 0.9], [0.7, 0.2]]), np.array([0.5, 0.6]), 0.8, np.array([0.0, 0.2]), np.ones(2)
    )
    again = QualityPrior.from_dict(prior.to_dict())
    for task in (0, 1):
        np.testing.assert_array_equal(again.p_good(0.3, task), prior.p_good(0.3, task))
    spread = np.sqrt(1.0 + 0.25 * (1.0 - 0.64) + 1.0)
    assert prior.p_good(0.3, 1)[0] == pytest.approx(0.8 * float(normal_cdf((0.7 - 0.5 * 0.8 * 0.3) / spread)))


def outcomes_of(model, n, seed):
    """Outcomes of n items of a fitted form, by conditional independence."""
    rng = np.random.default_rng(seed)
    category = rng.integers(0, len(model.nobody), n)
    x = rng.standard_normal((n, model.loading.shape[1]))
    p = normal_cdf(model.ability.T[category] - x @ model.loading.T)
    able = rng.random(n) >= model.nobody[category]
    return ((rng.random(p.shape) < p) & able[:, None]).astype(float), category


def test_known_figures_are_found_again():
    rng = np.random.default_rng(0)
    truth = rotated(
        FactorModel(
            rng.normal(0.5, 0.6, (8, 2)),
            np.c_[rng.uniform(0.6, 1.4, 8), rng.normal(0.0, 0.8, 8)],
            np.array([0.05, 0.2]),
        )
    )
    good, category = outcomes_of(truth, 12_000, 1)
    good[rng.random(good.shape) < 0.1] = np.nan
    found = fit_factors(good, category, 2)
    np.testing.assert_allclose(found.nobody, truth.nobody, atol=0.025)
    np.testing.assert_allclose(found.ability, truth.ability, atol=0.15)
    ours, theirs = found.loading @ found.loading.T, truth.loading @ truth.loading.T  # does not depend on rotation
    np.testing.assert_allclose(ours, theirs, atol=0.3)
    assert np.corrcoef(ours.ravel(), theirs.ravel())[0, 1] > 0.98
    assert (found.loading[:, 0] > 0.3).all()


def test_rotation_changes_no_prediction():
    rng = np.random.default_rng(3)
    model = FactorModel(rng.normal(0.5, 0.5, (4, 1)), rng.normal(0.3, 0.5, (4, 2)), np.array([0.1]))
    turned = rotated(model)
    np.testing.assert_allclose(turned.loading @ turned.loading.T, model.loading @ model.loading.T, atol=1e-12)
    assert turned.loading[:, 1].mean() == pytest.approx(0.0, abs=1e-12)
    for ours, theirs in zip(turned.accuracy(np.ones(1)), model.accuracy(np.ones(1)), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)  # the grid is not quite round


def test_the_command_writes_sections_that_a_scenario_takes(tmp_path, capsys):
    truth = FactorModel(np.array([[0.2, 0.9], [1.0, 0.4]]), np.array([[0.9], [0.6]]), np.array([0.05, 0.1]))
    good, category = outcomes_of(truth, 1200, 4)
    rows = ["id,kind,m/one,m two", *(f"{i},k{category[i]},{int(a)},{int(b)}" for i, (a, b) in enumerate(good))]
    (tmp_path / "t.csv").write_text("\n".join(rows) + "\n")
    words = ["calibrate", "quality", str(tmp_path / "t.csv"), "--item", "id", "--category", "kind", "--factors", "1"]
    assert main([*words, "--out", str(tmp_path / "q.yaml")]) == 0
    assert "1 factor, independent luck" in capsys.readouterr().out
    document = yaml.safe_load((tmp_path / "q.yaml").read_text())
    assert list(document["tiers"]) == ["m-one", "m-two"] and list(document["tasks"]) == ["k0", "k1"]
    held_out = document["fit"]["held_out"]
    assert held_out["1 factor, independent luck"]["oracle"] == pytest.approx(held_out["observed"]["oracle"], abs=0.06)
    check_scenario(document)


def check_scenario(document):
    """A scenario with these tiers, tasks and difficulty draws outcomes of the stated accuracy."""
    names = list(document["tiers"])
    lengths = {"components": [{"weight": 1.0, "median_tokens": 100.0, "sigma": 0.5}], "max_tokens": 500}
    tasks = {
        n: t | {"prompt_tokens": lengths, "output_tokens": lengths} for n, t in document["tasks"].items() if t["share"]
    }
    base = load_scenario("quickstart")
    pools = {k: p.model_dump(mode="json") | {"tier": names[0]} for k, p in base.fleet.pools.items()}
    providers = {k: p.model_dump(mode="json") | {"tier": names[-1]} for k, p in base.fleet.providers.items()}
    scenario = load_scenario(
        "quickstart",
        {
            "conditions": {},
            "drift": {},
            "fleet.tiers": document["tiers"],
            "fleet.pools": pools,
            "fleet.providers": providers,
            "workload.tasks": tasks,
            "workload.class_task_share": {},
            "workload.recurring.share": 0.0,
            "workload.difficulty": document["difficulty"] | {"signal_auc": 0.75},
            "requests_per_episode": 8000,
        },
    )
    workload = scenario.generate(0)
    assert workload.good.shape[1] == len(names)
    assert (workload.good == 1).any(axis=1).mean() == pytest.approx(
        document["fit"]["held_out"]["observed"]["oracle"], abs=0.06
    )


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_figures_make_a_scenario(path):
    document = yaml.safe_load(path.read_text())
    assert document["title"] and document["source"]
    check_scenario(document)


def test_something_is_shipped():
    assert {path.stem for path in SHIPPED} >= {"bfcl", "dcrouter", "mmlu"}


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--factors", "4"], "--factors 4: legal is 1 to 3"),
        (["--category", "kinds"], "column 'kinds' is missing"),
        (["--models", "one"], "column 'one' is missing"),
        ([], "has 3 items; legal is at least 100"),
    ],
)
def test_bad_tables_are_refused(more, words, tmp_path, capsys):
    (tmp_path / "t.csv").write_text("prompt,a\nx,1\ny,0\nz,1\n")
    assert main(["calibrate", "quality", str(tmp_path / "t.csv"), "--out", str(tmp_path / "q.yaml"), *more]) == 2
    assert words in capsys.readouterr().err and not (tmp_path / "q.yaml").exists()
