"""benchmarks.worth: what a decision was worth beside what the advice expected."""

import numpy as np
import pytest

from benchmarks import worth
from marginroute.margin_rule import MarginParameters, MarginRule


def test_slope_and_rows_of_known_differences():
    score = np.array([0.05, 0.1, 0.15, 0.6, 0.8, 3.0, 4.0])
    found = worth.figures(score, 2.0 * score + 1.0)
    assert found["slope"] == pytest.approx(2.0)
    assert found["all"]["swaps"] == 7
    assert found["expected_0_to_0.2"]["worth_usd_per_1k"] == pytest.approx(1.2)
    assert found["expected_0.5_to_1"]["swaps"] == found["expected_2_to_5"]["swaps"] == 2
    low, high = found["expected_0_to_0.2"]["ci95"]
    assert low < 1.2 < high
    assert not {"expected_0.2_to_0.5", "expected_1_to_2"} & set(found)


def test_every_swap_is_of_a_candidate_that_ranks_near_the_choice(tiny_plant):
    stations = len(tiny_plant.layout.station_names)
    advice = MarginRule("expected-margin", MarginParameters(station_usd_per_s=(0.001,) * stations))
    score, usd = worth._swapped(tiny_plant, advice, 7, 5, np.random.default_rng(0))
    assert len(score) == len(usd) == 5
    assert (score >= 0.0).all() and np.isfinite(usd).all() and usd.any()
