"""Heuristic controllers against the formulas of their sources, and against arithmetic on paper."""

import numpy as np
import pytest

from marginroute import control
from marginroute.control import ControlLayout, ControlView, Levels
from marginroute.control_rules import (
    ControlParameters,
    RuleController,
    hpa_replicas,
    keda_replicas,
    paced_per_s,
    required_per_s,
    standard_rules,
)
from marginroute.errors import InputError

HOUR_S = 3600.0
LAYOUT = ControlLayout(
    pool_names=("main",),
    class_names=("live", "batch"),
    provider_names=("api",),
    tick_s=60.0,
    min_replicas=np.array([1.0]),
    max_replicas=np.array([10.0]),
    start_replicas=np.array([2.0]),
    slots=np.array([50.0]),
    lag_s=np.array([300.0]),
    requests_per_s=np.array([2.0]),
    deadline_s=np.array([np.inf, 4.0 * HOUR_S]),
    season_per_s=np.array([[4.0, 1.0], [8.0, 1.0]]),  # at 0 h and 12 h
    allowance=np.array([600.0]),
    refill_per_s=np.array([0.5]),
)


def view(ready=2.0, in_flight=0.0, held=(0.0, 0.0, 0.0, 0.0), time_s=0.0, fresh=True, fast=1.0, slow=1.0, starting=0.0):
    pools = np.array([[[ready, starting, 0.0, 0.0, in_flight, 0.0, ready, 50.0]]])
    holding = np.zeros((1, 2, 4))
    holding[0, 1] = held
    return ControlView(
        layout=LAYOUT,
        time_s=np.array([time_s]),
        fresh=np.array([fresh]),
        pools=pools,
        classes=np.zeros((1, 2, 4)),
        held=holding,
        fast=np.full((1, 2), fast),
        slow=np.full((1, 2), slow),
        allowance=np.array([[600.0]]),
    )


def meant(controller, *views):
    """The levers after the last of some views."""
    return [control.decode(LAYOUT, controller.act(each)) for each in views][-1]


def rule(scaling, release="edf", **parameters):
    return RuleController("r", LAYOUT, scaling, release, ControlParameters(**parameters))


@pytest.mark.parametrize(
    ("ready", "current", "utilisation", "target", "wanted"),
    [
        (50, 50, 0.90, 0.75, 60),  # the example of the Kubernetes documentation
        (50, 50, 0.80, 0.75, 50),  # within 10 % of the target
        (4, 4, 0.20, 0.80, 1),
        (3, 3, 0.50, 0.75, 2),
        (4, 6, 0.90, 0.80, 6),  # the two on their way would turn growth round: nothing happens
        (4, 5, 1.60, 0.80, 8),  # usage of 4 replicas, spread over 5, is 1.28
    ],
)
def test_hpa_is_kubernetes_formula(ready, current, utilisation, target, wanted):
    got = hpa_replicas(np.array(float(ready)), np.array(float(current)), np.array(ready * utilisation), target)
    assert got == wanted


def test_keda_is_the_queue_over_its_target():
    np.testing.assert_array_equal(keda_replicas(np.array([0.0, 5.0, 30.0, 30.1]), 5.0), [0.0, 1.0, 6.0, 7.0])


def test_the_release_rate_that_deadlines_require_is_the_demand_bound():
    """Quarters of 4 h: due after 3 h, 2 h, 1 h and (for the last) a quarter of an hour at the earliest."""
    deadline_s = np.array([np.inf, 4.0 * HOUR_S])
    held = np.zeros((3, 2, 4))
    held[0, 1] = [900.0, 0.0, 0.0, 0.0]  # 900 in 3 h
    held[1, 1] = [900.0, 600.0, 0.0, 0.0]  # 600 in 2 h, all 1,500 in 3 h: the second binds
    held[2, 1] = [0.0, 0.0, 0.0, 90.0]
    expected = [900.0 / (3 * HOUR_S), 1500.0 / (3 * HOUR_S), 90.0 / (0.25 * HOUR_S)]
    np.testing.assert_allclose(required_per_s(held, deadline_s), expected)
    assert (required_per_s(held, np.full(2, np.inf)) == 0.0).all()


def test_a_budget_is_spent_evenly():
    """600 calls left over 1,200 s and 0.5 refilled per second: 1 per second; it lasts exactly that long."""
    rate = paced_per_s(np.array([[600.0]]), np.array([0.5]), 1200.0)
    assert rate[0, 0] == 1.0
    left, t = 600.0, 0.0
    while t < 1200.0:
        left += 0.5 - paced_per_s(np.array([[left]]), np.array([0.5]), 1200.0 - t)[0, 0]
        t += 1.0
    assert left == pytest.approx(0.0, abs=1e-6)


def test_levels_converge_to_the_traffic_over_the_season():
    levels = Levels(LAYOUT, 1)
    levels.reset(slice(None), np.zeros(1))
    np.testing.assert_allclose(levels.fast, 1.0)
    for tick in range(1, 2000):
        time_s = np.array([60.0 * tick])
        levels.update(1.5 * LAYOUT.season(time_s - 30.0) * 60.0, time_s)
        if tick == 10:  # after one time constant the start weighs exp(-1): 1.5 - 0.5 / e
            assert levels.fast[0, 1] == pytest.approx(1.5 - 0.5 * np.exp(-1.0), abs=0.01)
    np.testing.assert_allclose([levels.fast, levels.slow], 1.5, rtol=1e-6)


def test_forecasts_follow_season_level_and_trend():
    season = LAYOUT.season(np.array([0.0, 6.0 * HOUR_S, 12.0 * HOUR_S, 18.0 * HOUR_S]))
    np.testing.assert_allclose(season[:, 0], [4.0, 6.0, 8.0, 6.0])
    seen = view(fast=1.5, slow=1.0)
    np.testing.assert_allclose(seen.forecast_per_s(6.0 * HOUR_S, 0.0)[0], [6.0, 1.0])
    np.testing.assert_allclose(seen.forecast_per_s(6.0 * HOUR_S, 1.0)[0], [9.0, 1.5])
    np.testing.assert_allclose(seen.forecast_per_s(0.0, 2.0)[0], [8.0, 2.0])


def test_predictive_orders_for_the_peak_of_the_lag():
    """Live traffic rises from 4/s by 4/12 h: at 2 per second and replica and a load of 0.8 that is 2.5 replicas now."""
    assert meant(rule("predictive", target=0.8), view()).replicas[0, 0] == 3.0
    assert meant(rule("predictive", target=0.8, slack=0.6), view()).replicas[0, 0] == 2.0
    late = view(time_s=12.0 * HOUR_S)  # the peak: 8 / 1.6
    assert meant(rule("predictive", target=0.8), late).replicas[0, 0] == 5.0
    batch = rule("predictive", release="at-once", target=0.8)
    assert meant(batch, late).replicas[0, 0] == 6.0  # batch work of 1/s is not held: 9 / 1.6
    work = view(time_s=12.0 * HOUR_S, held=(0.0, 0.0, 0.0, 1.8 * 900.0))  # and 1.8/s is required at once
    assert meant(rule("predictive", target=0.8, urgency=1.0), work).replicas[0, 0] == 7.0


def test_the_largest_recommendation_of_the_window_counts():
    controller = rule("predictive", target=0.8, hold_down_s=120.0)
    calm, busy = view(fresh=False), view(fresh=False, fast=3.0, slow=3.0)
    first = view(fresh=True)
    wanted = [meant(controller, each).replicas[0, 0] for each in (first, busy, calm, calm, calm, calm)]
    assert wanted == [3.0, 8.0, 8.0, 8.0, 3.0, 3.0]
    assert meant(controller, busy, first).replicas[0, 0] == 3.0  # a new world has no past


def test_edf_fills_what_is_spare_and_never_less_than_required():
    got = meant(rule("static", release="edf", fill=0.9, urgency=1.0), view(ready=4.0))
    assert got.release_per_s[0] == pytest.approx(0.9 * 8.0 - 4.0, rel=1e-3)
    full = view(ready=2.0, held=(0.0, 0.0, 0.0, 450.0))
    assert meant(rule("static", release="edf", fill=0.9, urgency=1.0), full).release_per_s[0] == pytest.approx(0.5)
    day, night = view(time_s=12.0 * HOUR_S), view(time_s=0.0)  # season: 9 and 5, mean 7
    assert meant(rule("static", release="off-peak", fill=1.0), day).release_per_s[0] == 0.0
    assert meant(rule("static", release="off-peak", fill=1.0), night).release_per_s[0] == LAYOUT.top_per_s


def test_spill_is_what_is_above_the_limit_as_far_as_the_budget_goes():
    busy = view(ready=1.0, time_s=12.0 * HOUR_S)  # 8/s for a replica of 2/s
    free = meant(rule("static", spill_from=1.0, pace_s=60.0), busy)
    assert free.spill_share[0] == pytest.approx([0.75, 0.0], abs=1e-3)
    paced = meant(rule("static", spill_from=1.0, pace_s=1200.0), busy)  # 1 call per second
    assert paced.spill_share[0] == pytest.approx([1.0 / 8.0, 0.0], abs=1e-3)


def test_parameters_may_differ_by_world():
    one, two = view(), view(time_s=12.0 * HOUR_S)
    both = ControlView(
        LAYOUT, *(np.concatenate([getattr(one, f), getattr(two, f)]) for f in (
            "time_s", "fresh", "pools", "classes", "held", "fast", "slow", "allowance"
        ))
    )  # fmt: skip
    controller = rule("predictive", target=np.array([0.8, 0.5]), hold_down_s=np.array([0.0, 600.0]))
    assert controller.act(both).shape == (2, len(LAYOUT.lever_names))
    assert control.decode(LAYOUT, controller.act(both)).replicas[:, 0].tolist() == [3.0, 8.0]


def test_rules_survive_a_round_trip_and_bad_ones_are_named():
    for name, controller in standard_rules(LAYOUT).items():
        again = RuleController.from_dict(controller.to_dict(), ControlLayout.from_dict(LAYOUT.to_dict()))
        assert again.name == name
        np.testing.assert_array_equal(again.act(view()), controller.act(view()))
    with pytest.raises(InputError, match="legal is static, hpa, keda, predictive"):
        rule("vpa")
