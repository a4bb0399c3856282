"""Off-policy estimators on logged toys whose truth is known."""

import numpy as np
import pytest

from evaluation.off_policy import Totals
from marginroute.errors import InputError
from marginroute.exploration import mixed

REWARD = np.array([[1.0, 0.2, -0.5], [0.1, 0.9, 0.4]])  # mean USD by context and candidate
LOGGING = np.array([[0.6, 0.3, 0.1], [0.2, 0.2, 0.6]])
TARGET = np.array([[0.1, 0.8, 0.1], [0.0, 1.0, 0.0]])
TRUTH = 1000.0 * (0.7 * REWARD[0] @ TARGET[0] + 0.3 * REWARD[1] @ TARGET[1])
UNBIASED = ("ips", "snips", "dr")


def logged(rng, n, model=REWARD, logging=LOGGING, target=TARGET):
    context = (rng.random(n) < 0.3).astype(int)
    choice = (logging[context].cumsum(axis=1) < rng.random(n)[:, None]).sum(axis=1)
    reward = REWARD[context, choice] + rng.normal(0.0, 0.5, n)
    weight = target[context, choice] / logging[context, choice]
    totals = Totals()
    for part in np.array_split(np.arange(n), 3):
        uncovered = (target * (logging <= 0.0)).sum(axis=1)[context[part]]
        totals.add(weight[part], reward[part], model[context[part]], target[context[part]], choice[part], uncovered)
    return totals


@pytest.mark.parametrize("wrong_model", [0.0, 0.7])
def test_unbiased_with_the_coverage_it_says(wrong_model):
    rng = np.random.default_rng(1)
    runs = [logged(rng, 2_000, REWARD + wrong_model).estimates() for _ in range(400)]
    for name in UNBIASED:
        means = np.array([run[name].mean for run in runs])
        covered = np.mean([run[name].low <= TRUTH <= run[name].high for run in runs])
        assert means.mean() == pytest.approx(TRUTH, abs=4.0 * means.std() / 20.0), name
        assert 0.92 <= covered <= 0.98, (name, covered)
    assert np.mean([run["dm"].mean for run in runs]) == pytest.approx(TRUTH + 1000.0 * wrong_model, rel=0.02)


def test_a_model_lowers_the_variance():
    rng = np.random.default_rng(2)
    runs = [logged(rng, 1_000).estimates() for _ in range(200)]
    assert np.std([run["dr"].mean for run in runs]) < 0.8 * np.std([run["ips"].mean for run in runs])


def test_the_logging_policy_itself_is_its_mean():
    totals = logged(np.random.default_rng(3), 500, target=LOGGING)
    estimates, overlap = totals.estimates(), totals.overlap()
    for name in ("ips", "snips"):
        assert estimates[name].mean == pytest.approx(estimates["logged"].mean)
    assert overlap.effective == pytest.approx(500.0) and overlap.mean_weight == pytest.approx(1.0)
    assert overlap.refusal == "" and overlap.uncovered == 0.0


def test_pieces_add_up():
    rng = np.random.default_rng(4)
    whole, pieces = Totals(), Totals()
    arrays = (rng.random(90), rng.normal(size=90), rng.random((90, 3)), np.full((90, 3), 1 / 3), np.zeros(90, int))
    whole.add(*arrays, np.zeros(90))
    for part in np.array_split(np.arange(90), 7):
        pieces.add(*(array[part] for array in arrays), np.zeros(len(part)))
    assert pieces.estimates()["dr"].mean == pytest.approx(whole.estimates()["dr"].mean)
    assert pieces.estimates()["snips"].high == pytest.approx(whole.estimates()["snips"].high)


def test_one_decision_has_no_interval():
    found = logged(np.random.default_rng(0), 1).to_dict()["usd_per_1k_decisions"]
    assert list(found) == ["logged"] and found["logged"]["low"] is found["logged"]["high"] is None


def test_no_answer_where_the_log_says_little():
    greedy = np.array([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    assert "could not have made" in logged(np.random.default_rng(5), 5_000, logging=greedy).overlap().refusal
    few = logged(np.random.default_rng(6), 60)
    assert "log more" in few.overlap().refusal
    shown = few.to_dict()
    assert list(shown["usd_per_1k_decisions"]) == ["logged"] and shown["refusal"]
    with pytest.raises(InputError, match="no decision with an outcome"):
        Totals().overlap()


def test_mixture_of_choice_and_draw():
    safe = np.array([[True, True, False, False], [False, False, False, False]])
    probability = mixed(safe, np.array([1, 3]), 0.1)
    assert probability == pytest.approx(np.array([[0.05, 0.95, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0]]))
