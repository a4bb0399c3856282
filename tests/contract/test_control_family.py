"""Controllers in a family of scenarios: every member has its own money, and a controller sees its prices."""

import numpy as np
import pytest

from envs.control_env import make_worlds
from envs.control_lookahead import Lookahead
from envs.control_plant import ControlPlant, Traffic, prices_usd, traffic_of
from envs.control_worlds import FluidControl
from envs.fluid_worlds import FluidWorlds
from envs.scenario import load_scenario
from marginroute.control import ControlLayout, observation_names, observe
from marginroute.control_rules import standard_rules
from marginroute.errors import InputError

RANGES = {
    "horizon_s": 3600.0,
    "ranges": {
        "load_scale": {"low": 0.7, "high": 1.3},
        "fleet.pools.main.gpu_usd_per_hour": {"low": 2.0, "high": 4.0},
        "plans.plans.batch.input_usd_per_mtok": {"low": 0.2, "high": 0.4},
    },
}


@pytest.fixture(scope="module")
def plant():
    return ControlPlant(load_scenario("day_night", RANGES))


def levers(layout):
    """Levers at which replicas, held work and providers all have their part."""
    action = np.zeros((1, len(layout.lever_names)))
    action[0, layout.lever_names.index("spill:team")] = -0.8
    return action


def margin_usd(worlds, traffic):
    worlds.load(0, traffic)
    while not worlds.done.all():
        worlds.step(levers(worlds.layout))
    return worlds.ledger_usd[0].copy()


def test_a_member_earns_what_it_earns_alone(plant):
    scenario, family = plant.plant.scenario, FluidControl(plant, 1)
    for seed in (0, 5):
        traffic = traffic_of(scenario, seed, "train", plant.tick_s)
        assert traffic.variant == seed
        member = scenario.variants[seed]
        alone = FluidControl(ControlPlant(member), 1)
        alone.worlds.fluid = FluidWorlds(plant.plant, 1, plant.sample).fluid  # curves are the family's,
        alone.worlds.answers[:] = family.worlds.answers[seed]  # and so are lengths
        ours, theirs = margin_usd(family, traffic), margin_usd(alone, Traffic(traffic.arrivals))
        np.testing.assert_allclose(ours, theirs, rtol=1e-12)


def test_an_hour_of_gpus_costs_what_the_member_pays(plant):
    """Three replicas of two GPUs all the time: reserved ones at 2.10, the third at the member's price."""
    from envs.economics.ledger import ACCOUNTS

    family = FluidControl(plant, 1)
    traffic = traffic_of(plant.plant.scenario, 3, "train", plant.tick_s)
    family.load(0, traffic)
    rule = standard_rules(plant.layout)["static"].with_parameters(replicas=3.0 / 8.0)
    while not family.done.all():
        family.step(rule.act(family.view()))
    price = plant.plant.scenario.variants[3].fleet.pools["main"].gpu_usd_per_hour
    paid = family.ledger_usd[0, ACCOUNTS.index("gpu_hours")].sum()
    assert paid == pytest.approx(-2.0 * (2 * 2.10 + price), rel=1e-9)


def test_both_clocks_tell_the_prices_of_the_member(plant):
    layout = plant.layout
    assert layout.price_names == ("gpu:main", "call:batch")
    assert observation_names(layout)[-2:] == ("price:gpu:main", "price:call:batch")
    seen = []
    for clock in ("fluid", "engine"):
        worlds = make_worlds(plant, 2, clock)
        for w, seed in enumerate((4, 7)):
            worlds.load_seed(w, seed, "validation")
        seen.append(observe(worlds.view())[:, -2:])
    np.testing.assert_allclose(seen[0], seen[1], rtol=1e-6)
    members = [plant.plant.scenario.variants[12 + seed] for seed in (4, 7)]
    gpu = [np.log(member.fleet.pools["main"].gpu_usd_per_hour / 2.95) for member in members]
    np.testing.assert_allclose(seen[0][:, 0], gpu, rtol=1e-5)
    batch = [0.5 * np.log(member.plans.plans["batch"].input_usd_per_mtok / 0.30) for member in members]
    np.testing.assert_allclose(seen[0][:, 1], batch, rtol=1e-4)


def test_a_scenario_without_ranges_tells_no_prices():
    layout = ControlPlant(load_scenario("day_night", {"horizon_s": 3600.0, "ranges": {}})).layout
    assert layout.price_names == () and not any(name.startswith("price:") for name in observation_names(layout))


def test_without_a_word_of_prices_they_are_the_usual_ones(plant):
    worlds = make_worlds(plant, 1, "fluid")
    worlds.load_seed(0, 0, "train")
    view = worlds.view()
    object.__setattr__(view, "prices_usd", None)
    assert (observe(view)[:, -2:] == 0.0).all()


def test_the_layout_goes_through_a_bundle(plant):
    again = ControlLayout.from_dict(plant.layout.to_dict())
    assert again.price_names == plant.layout.price_names
    np.testing.assert_array_equal(again.usual_usd, plant.layout.usual_usd)


def test_looking_ahead_takes_the_member_of_these_prices(plant):
    worlds, ahead = FluidControl(plant, 2), Lookahead(plant, 2)
    for w, seed in enumerate((9, 2)):
        worlds.load_seed(w, seed, "train")
    ahead.begin(worlds.view(), worlds.arrivals)
    assert ahead.worlds.variant.tolist() == [9, 2]
    np.testing.assert_array_equal(ahead.view().prices_usd, worlds.view().prices_usd)


def test_ranges_of_what_is_measured_once_are_refused():
    ranges = {"plans.classes.enterprise.slo.ttft_s": {"low": 1.0, "high": 3.0}}
    scenario = load_scenario("day_night", {"horizon_s": 3600.0, "ranges": ranges})
    with pytest.raises(InputError, match=r"slo\.ttft_s would change what the fluid surrogate measures once; legal"):
        FluidControl(ControlPlant(scenario), 1)


def test_prices_of_seats_and_of_what_is_free():
    free = {"plans.plans.batch": {"kind": "usage", "input_usd_per_mtok": 0.0, "output_usd_per_mtok": 0.0}}
    plant = ControlPlant(load_scenario("day_night", {"ranges": {}} | free)).plant
    usd = prices_usd(plant)
    assert usd["call:team"] == pytest.approx(plant.terms["request_value_usd"][1]) and usd["call:team"] > 0.0
    assert usd["call:batch"] == 1e-12
