"""Abilities from labelled answers: what a log teaches, however few of its answers are labelled."""

import numpy as np
import pytest

from agents.log_quality import PRIOR_SD, Labels, fit_abilities
from envs.workload.quality import QualityTruth
from marginroute.quality import prior_p_good

TRUE = np.array([[1.2, -0.6], [0.2, 1.4]])


def truth(ability):
    return QualityTruth(
        ability=tuple(map(tuple, ability)),
        slope=(0.7, 0.5),
        prior_ability=(0.3, 0.8),
        nobody_can_share=0.05,
        signal_correlation=0.6,
    )


def answers(n, rng, greedy):
    """Labels of n answers, hard prompts to tier 1 if `greedy`."""
    task, signal = rng.integers(0, 2, n), rng.standard_normal(n)
    tier = (signal > 0.0).astype(int) if greedy else rng.integers(0, 2, n)
    other = rng.random(n) < 0.05
    tier = np.where(other, 1 - tier, tier)
    world = truth(TRUE)
    p = prior_p_good(TRUE.T[task], np.array(world.slope), signal, 0.6, 0.05)[np.arange(n), tier]
    return Labels(tier, task, signal, (rng.random(n) < p).astype(float))


@pytest.mark.parametrize("greedy", [False, True])
def test_finds_the_abilities_whoever_chose(greedy):
    found = fit_abilities(truth(np.full((2, 2), 0.5)), answers(20_000, np.random.default_rng(0), greedy))
    assert (np.abs(found.ability - TRUE) < 4.0 * found.sd + 0.01).all()
    assert found.sd.max() < 0.06 and found.labels.sum() == 20_000


def test_a_tenth_of_the_labels_is_worth_a_tenth_and_says_so():
    labels = answers(20_000, np.random.default_rng(1), False)
    few = Labels(*(getattr(labels, name)[::10] for name in ("tier", "task", "signal", "good")))
    start = truth(np.full((2, 2), 0.5))
    wide, narrow = fit_abilities(start, few), fit_abilities(start, labels)
    ratio = wide.sd / narrow.sd
    assert (np.sqrt(10.0) * 0.75 < ratio).all() and (ratio < np.sqrt(10.0) * 1.25).all()
    assert (np.abs(wide.ability - TRUE) < 4.0 * wide.sd).all()


def test_cells_without_labels_stay():
    none = Labels(*(np.zeros(0, dtype=int),) * 4)
    found = fit_abilities(truth(TRUE), none)
    np.testing.assert_array_equal(found.ability, TRUE)
    assert (found.sd == PRIOR_SD).all() and not found.labels.any()
    one = Labels(np.array([0]), np.array([1]), np.array([0.0]), np.array([1.0]))
    moved = fit_abilities(truth(TRUE), one).ability - TRUE
    assert moved[0, 1] > 0.0 and np.count_nonzero(np.abs(moved) > 0.011) == 1  # the grid's step is 0.01
