"""Model-predictive control: what it believes, a world in which waiting is known to be best, and that it never harms."""

from dataclasses import replace

import numpy as np
import pytest

from envs import control_mpc
from envs.control_lookahead import Futures, Lookahead
from envs.control_mpc import Believed, MpcController, MpcSettings, Plan, plans
from envs.control_plant import ControlPlant, Traffic, traffic_of
from envs.control_stocks import StockPrices
from envs.control_worlds import FluidControl
from envs.scenario import load_scenario
from evaluation.contest import enter
from marginroute.control import DAY_S
from marginroute.control_policy import described
from marginroute.control_rules import standard_rules
from marginroute.errors import InputError

HOUR = {"horizon_s": 3600.0, "plans.classes.batch.delay_tolerant.deadline_s": 1800.0}
TO_THE_END = MpcSettings(horizon_s=3600.0, every_s=360.0, lasting_s=(360.0, 1200.0), futures=1, sure=0.0)
FLUID = ("stations", "orders", "flows", "held", "clocks_s", "spills")


@pytest.fixture(scope="module")
def plant():
    return ControlPlant(load_scenario("day_night", HOUR))


class Truth(Believed):
    """Knows how the worlds stand, and the one future that comes."""

    def __init__(self, plant, worlds):
        self.plant, self.worlds, self._lookaheads = plant, worlds, {}

    def arrivals(self, view, w):
        return self.worlds.arrivals[None, w, self.worlds.tick[w] :]

    def begin(self, view, w, arrivals):
        ahead, rows = super().begin(view, w, arrivals), np.full(len(arrivals), w)
        for name in FLUID:
            getattr(ahead.worlds.fluid, name)[:] = getattr(self.worlds.worlds.fluid, name)[rows]
        ahead._levels._seen = self.worlds._levels._seen[:, rows].copy()
        ahead._levels._expected = self.worlds._levels._expected[:, rows].copy()
        return ahead

    def value_usd(self, worlds):
        assert worlds.done.all()
        return worlds.ledger_usd.sum(axis=(1, 2))


def play(plant, controller, arrivals, knows=None):
    """(N,) margins of a controller, and its actions (T, N, A)."""
    worlds = FluidControl(plant, len(arrivals))
    for w, traffic in enumerate(arrivals):
        worlds.load(w, traffic)
    if isinstance(controller, MpcController):
        controller._believed = knows or Truth(plant, worlds)
    actions = []
    while not worlds.done.all():
        actions.append(controller.act(worlds.view()))
        worlds.step(actions[-1])
    return worlds.ledger_usd.sum(axis=(1, 2)), np.array(actions)


@pytest.mark.parametrize("name", ["static", "hpa-edf", "predictive-edf"])
def test_with_the_right_state_and_future_it_never_does_worse_than_its_rule(plant, name):
    arrivals = [traffic_of(plant.plant.scenario, seed, "validation", plant.tick_s) for seed in range(3)]
    rule = standard_rules(plant.layout)[name]
    usd, _ = play(plant, rule.anew(), arrivals)
    planned_usd, actions = play(plant, MpcController(plant.plant.scenario, rule.anew(), TO_THE_END), arrivals)
    assert (planned_usd >= usd - 1e-9).all() and planned_usd.sum() > usd.sum() + 1.0
    assert np.isfinite(actions).all() and np.abs(actions).max() <= 1.0


def test_a_plan_that_is_the_rule_s_leaves_its_action_as_it_is(plant, monkeypatch):
    arrivals = [traffic_of(plant.plant.scenario, seed, "validation", plant.tick_s) for seed in range(2)]
    rule = standard_rules(plant.layout)["predictive-edf"]
    still = Plan("nothing", np.zeros(len(plant.layout.mask)), 720.0)
    monkeypatch.setattr(control_mpc, "plans", lambda *_: [still])
    controller = MpcController(plant.plant.scenario, rule.anew(), replace(TO_THE_END, sure=1.0))
    np.testing.assert_array_equal(play(plant, controller, arrivals)[1], play(plant, rule.anew(), arrivals)[1])
    assert set(controller.taken) == {"rule"}


def test_it_waits_where_waiting_is_best():
    """One replica that live requests overfill for 20 minutes, then nobody: held work is served best after them."""
    one = {f"fleet.pools.main.{key}": 1 for key in ("max_replicas", "replicas", "reserved_replicas")}
    scenario = load_scenario("day_night", HOUR | one)
    plant = ControlPlant(scenario)
    arrivals = np.zeros((plant.ticks, 3))
    arrivals[:10, :2] = 0.5 * plant.layout.requests_per_s[0] * plant.tick_s
    arrivals[:5, 2] = 20.0
    rule = standard_rules(plant.layout)["static"]
    controller = MpcController(scenario, rule.anew(), TO_THE_END)
    usd, actions = play(plant, controller, [Traffic(arrivals)])
    release = plant.layout.lever_names.index("release")
    assert (actions[:9, 0, release] < -0.9).all(), "the rule alone releases at once"
    assert usd > play(plant, rule.anew(), [Traffic(arrivals)])[0]


def test_lookahead_stands_where_the_view_says(plant):
    rule = standard_rules(plant.layout)["predictive-edf"]
    worlds, ahead = FluidControl(plant, 2), Lookahead(plant, 2)
    for w in range(2):
        worlds.load_seed(w, w, "validation")
    for tick in range(20):
        view = worlds.view()
        coming = worlds.arrivals[:, tick:]
        ahead.begin(view, coming)
        ours = ahead.view()
        for name in ("time_s", "pools", "classes", "held", "fast", "slow", "allowance"):
            np.testing.assert_allclose(getattr(ours, name), getattr(view, name), rtol=1e-9, atol=1e-9)
        worlds.step(rule.act(view))
    ahead.begin(worlds.view(), worlds.arrivals[:, 20:])
    again, earned = rule.of_worlds(np.arange(2)), np.zeros((2, 2))
    while not worlds.done.all():
        worlds.step(rule.act(worlds.view()))
        ahead.step(again.act(ahead.view()))
        earned += worlds.rewards_usd, ahead.rewards_usd
    np.testing.assert_allclose(earned[1], earned[0], rtol=0.01)


def test_futures_go_on_from_the_level_that_was_seen(plant):
    layout = plant.layout
    level = np.array([0.8, 1.0, 1.3])
    relative = np.tile(level[:, None, None], (1, plant.ticks, len(layout.class_names)))
    futures = Futures(layout, relative, np.tile(level[:, None, None], (1, plant.ticks, 2)))
    worlds = FluidControl(plant, 1)
    worlds.load_seed(0, 0, "validation")
    view = worlds.view()
    view = replace(view, fast=np.full_like(view.fast, 1.25), slow=np.full_like(view.slow, 1.25))
    [drawn] = futures.draw(view, 0, 1, 5)
    times_s = view.time_s[0] + (np.arange(5) + 0.5) * layout.tick_s
    np.testing.assert_allclose(drawn, 1.3 * layout.season(times_s) * layout.tick_s)
    assert futures.draw(view, 0, 3, 5).shape == (3, 5, 3)


def test_prices_are_joined_by_straight_lines(plant):
    worlds = FluidControl(plant, 1)
    worlds.load_seed(0, 0, "validation")
    view = worlds.view()
    held = np.zeros_like(view.held)
    held[0, 2, 1] = 10.0
    usd = np.zeros((2, held[0].size + 1))
    usd[:, 2 * held.shape[2] + 1] = 0.1, 0.3
    noon_s = replace(view, held=held, time_s=np.array([0.25 * DAY_S]), allowance=np.zeros_like(view.allowance))
    assert StockPrices(usd).value_usd(noon_s) == pytest.approx(10.0 * 0.2)


def test_plans_move_what_the_scenario_has(plant):
    found = plans(plant.layout, MpcSettings())
    assert {"replicas:main -1", "replicas:main +1", "release none", "release +", "cap:main -", "spill +"} <= {
        plan.name for plan in found
    }
    assert all(not plan.shift[~plant.layout.mask].any() for plan in found)
    some = plans(plant.layout, MpcSettings(lasting_s=(60.0,), levers=("replicas",)))
    assert [plan.name for plan in some] == ["replicas:main -1", "replicas:main +1"]


def test_no_bundle_holds_it(plant):
    controller = MpcController(plant.plant.scenario, standard_rules(plant.layout)["static"])
    with pytest.raises(
        InputError, match="'mpc' needs the simulator for every decision; legal in a bundle is a tuned rule"
    ):
        described(controller)


def test_it_is_a_baseline_by_name():
    entrants = enter(load_scenario("day_night"), [], "predictive-edf,mpc")
    assert set(entrants.all) == {"bid-price-fitted + predictive-edf", "bid-price-fitted + mpc"}
    with pytest.raises(InputError, match=r"'mcp' is no controller; did you mean mpc\? legal is all, none, .*, mpc"):
        enter(load_scenario("day_night"), [], "mcp")
