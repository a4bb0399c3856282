"""benchmarks.room: what the bid price would earn if it knew more."""

import numpy as np

from benchmarks import room
from envs.scenario import load_scenario


def test_choices_come_from_the_other_half():
    """Each group has its own best factor; one that is good on a half by luck is not chosen there, but on the other."""
    group, half = np.repeat([0, 1], 4), np.tile([0, 0, 1, 1], 2)
    gains = np.zeros((3, 8))
    gains[1, group == 0], gains[2, group == 1] = 1.0, 2.0
    np.testing.assert_array_equal(room.chosen(gains, group, half), np.where(group == 0, 1.0, 2.0))
    luck = np.zeros((2, 4))
    luck[1] = [5.0, 5.0, -3.0, -3.0]
    np.testing.assert_array_equal(room.chosen(luck, np.zeros(4), np.array([0, 0, 1, 1])), [0.0, 0.0, -3.0, -3.0])


def test_known_p_good_is_calibrated_and_hears_of_drift():
    """In ten-thousand prompts as many answers are good as it says, for every model, broken or not."""
    scenario = load_scenario("shaky", {"drift.medium-breaks.episode_share": 1.0})
    workloads = [scenario.generate(seed, "train") for seed in range(10)]
    known = np.concatenate([room.known_p_good(scenario, x) for x in workloads])
    good = np.concatenate([x.good for x in workloads])
    broken = np.concatenate([x.ability_shift for x in workloads]) < -1.0
    assert broken.any() and not broken.all()
    for told in (broken, ~broken):
        for tier in np.flatnonzero(told.any(axis=0)):
            p, seen = known[told[:, tier], tier], good[told[:, tier], tier]
            assert abs(seen.mean() - p.mean()) < 4.0 * np.sqrt((p * (1.0 - p)).sum()) / len(p)


def test_a_row_is_paired_and_whole(tuned_cache, tiny_plant):
    """Without ranges there is one member; gains are finite."""
    found = room.row(tiny_plant.scenario, 4)
    assert list(found)[:2] == ["scenario", "usd_per_1k"] and len(found) == 8
    assert all(np.isfinite(x) for x in list(found.values())[1:])
    assert found["one_price_pct"] == found["price_by_member_pct"]
