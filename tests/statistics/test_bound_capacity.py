"""Bounds where replicas come and go: what is paid and rented, by hand; no controller earns more than the bound."""

from dataclasses import replace
from itertools import product

import by_hand
import numpy as np
import pytest

from envs.control_plant import ControlPlant
from envs.control_worlds import EngineControl
from envs.plant import Plant
from envs.scenario import load_scenario
from envs.worlds import FleetWorlds
from evaluation import bound_lp
from evaluation.bound_capacity import capacity_of
from evaluation.bound_dual import DualBound
from evaluation.bound_options import make_options
from evaluation.bounds import bound_episodes
from evaluation.deciders import Deciders
from evaluation.protocol import evaluate_policies
from marginroute.control_rules import standard_rules
from marginroute.margin_rule import MarginParameters, MarginRule

USD_PER_S = 2.0 * 3.6 / 3600.0  # of a replica of pool `two`
CONTROL = {"control.tick_s": 20.0, "fleet.pools.two.max_replicas": 5}
MINUTES = {
    "horizon_s": 60.0,
    "control.tick_s": 20.0,
    "workload.season": None,
    "plans.classes.batch.delay_tolerant.deadline_s": 40.0,
    "fleet.batch_queue.hold_s": 5.0,
    "fleet.pools.main.provision_s": 5.0,
    "fleet.pools.main.load_s": 5.0,
}
HEAVY = {
    **MINUTES,
    "load_scale": 4.0,
    "fleet.pools.main.max_num_seqs": 16,
    "fleet.providers.api.requests_per_minute": 6,
}


def capacity(tmp_path, overrides):
    scenario = by_hand.scenario(tmp_path, overrides)
    return capacity_of(Plant(scenario), scenario.generate(0, "heldout"))


def test_nothing_is_rented_where_nobody_scales(tmp_path):
    found = capacity(tmp_path, {"fleet.pools.two.max_replicas": 5})
    np.testing.assert_allclose(found.paid, [1.0, 2.0, 0.1])
    assert len(found.rented) == 0
    assert found.gpu_usd_per_s == pytest.approx(3.6 / 3600.0 + 2 * USD_PER_S)


@pytest.mark.parametrize(("reserved", "least", "paid"), [(0, 0, 0.0), (0, 1, 1.0), (2, 1, 2.0), (1, 2, 2.0)])
def test_what_a_controller_may_leave_out_is_rented(tmp_path, reserved, least, paid):
    prices = {"reserved_replicas": reserved, "min_replicas": least, "reserved_gpu_usd_per_hour": 1.8}
    found = capacity(tmp_path, CONTROL | {f"fleet.pools.two.{key}": x for key, x in prices.items()})
    np.testing.assert_allclose(found.paid, [1.0, paid, 0.1])
    np.testing.assert_array_equal(found.rented_from, [1])
    np.testing.assert_allclose(found.rented, [5.0 - paid])
    np.testing.assert_allclose(found.rent_usd, [USD_PER_S])
    on_demand = max(least - reserved, 0)
    assert found.gpu_usd_per_s == pytest.approx(0.001 + reserved * USD_PER_S / 2.0 + on_demand * USD_PER_S)
    np.testing.assert_allclose(found.most, [1.0, 5.0, 0.1])


def test_what_fails_or_is_taken_away_need_not_be_paid(tmp_path):
    spot = {"replicas": 1, "gpu_usd_per_hour": 1.2, "mean_time_between_s": 5.0, "mean_absence_s": 5.0}
    found = capacity(tmp_path, {"fleet.pools.two.spot": spot})
    np.testing.assert_allclose(found.paid, [1.0, 1.0, 0.1])
    np.testing.assert_allclose((found.rented, found.rent_usd), ([1.0], [USD_PER_S / 3.0]))
    found = capacity(tmp_path, CONTROL | {"fleet.pools.two.spot": spot, "fleet.pools.two.min_replicas": 2})
    np.testing.assert_allclose(found.paid, [1.0, 0.0, 0.1])
    np.testing.assert_allclose((found.rented, found.rent_usd), ([1.0, 4.0], [USD_PER_S / 3.0, USD_PER_S]))


def rented(options, usd):
    """The options with the pool's replicas all rented at a price."""
    capacity = options.capacity
    pools = np.flatnonzero(capacity.burst == 0.0)
    paid = np.where(capacity.burst == 0.0, 0.0, capacity.paid)
    rent = {"rented_from": pools, "rented": capacity.paid[pools], "rent_usd": np.full(len(pools), usd)}
    return replace(options, capacity=replace(capacity, paid=paid, **rent))


def test_the_linear_program_rents_what_pays():
    """Free rent is owned capacity; a request alone earns its value less the rent of its work before the horizon."""
    overrides = {"horizon_s": 20.0, "requests_per_episode": 60, "fleet.response_cache": None, "load_scale": 2.0}
    plant = Plant(load_scenario("quickstart", overrides))
    options = make_options(plant, plant.scenario.generate(0, "heldout"))
    owned_usd = bound_lp.solve(DualBound(options))
    assert bound_lp.solve(DualBound(rented(options, 0.0))) == pytest.approx(owned_usd, abs=1e-7)
    for usd in (0.0, 1e-4, 1e-3, 1e-2):
        dual = DualBound(rented(options, usd))
        exact_usd = bound_lp.solve(dual)
        contribution_usd = exact_usd - options.gpu_usd
        assert exact_usd - 1e-7 <= dual.search().bound_usd <= exact_usd + 0.02 * contribution_usd
    lone = Plant(load_scenario("quickstart", overrides | {"requests_per_episode": 1, "load_scale": 1.0}))
    options = rented(make_options(lone, lone.scenario.generate(1, "heldout")), 0.01)
    assert len(options.unserved_usd) == 1
    work_s = options.prefill_s * (options.prefill_until_s < options.horizon_s)
    work_s += options.decode_s * (options.decode_until_s < options.horizon_s)
    net_usd = options.value_usd - 0.01 * work_s * (options.station < 3)  # one call is inside the burst
    by_hand_usd = options.shared_usd + max(net_usd.max(), options.unserved_usd[0])
    assert bound_lp.solve(DualBound(options)) == pytest.approx(by_hand_usd, abs=1e-9)
    assert DualBound(options).search().bound_usd == pytest.approx(by_hand_usd, abs=1e-4 * abs(by_hand_usd))


def test_the_search_comes_close_where_replicas_are_rented():
    scenario = load_scenario("day_night", HEAVY | {"horizon_s": 30.0, "fleet.pools.main.reserved_replicas": 1})
    options = make_options(Plant(scenario), scenario.generate(0, "heldout"))
    dual = DualBound(options)
    exact_usd, found_usd = bound_lp.solve(dual), dual.search().bound_usd
    assert exact_usd - 1e-9 <= found_usd <= exact_usd + 0.01 * (exact_usd - options.gpu_usd)
    assert found_usd < dual.evaluate(np.zeros((dual.stations, dual.buckets)))[0] - 0.01 * exact_usd
    longer = DualBound(options, 10.0).search().bound_usd
    assert exact_usd - 1e-9 <= longer  # longer buckets allow more


class Targets:
    """Sets replicas as told, tick by tick; the other levers are those of a rule at rest."""

    name = "targets"

    def __init__(self, rule, targets):
        self.rule, self.layout, self.targets, self.tick = rule, rule.layout, targets, 0

    def anew(self):
        return Targets(self.rule, self.targets)

    def act(self, view):
        action = self.rule.act(view)
        low, high = self.layout.min_replicas, self.layout.max_replicas
        action[:, self.layout.lever_names.index("replicas:main")] = (
            2.0 * (self.targets[self.tick] - low[0]) / (high[0] - low[0]) - 1.0
        )
        self.tick += 1
        return action


@pytest.mark.parametrize("overrides", [MINUTES, HEAVY], ids=["roomy", "tight"])
def test_no_sequence_of_replicas_earns_more(overrides):
    scenario = load_scenario("day_night", overrides | {"fleet.pools.main.max_replicas": 4})
    layout = ControlPlant(scenario).layout
    rule = standard_rules(layout)["predictive-edf"]
    bounds = bound_episodes(scenario, range(2), workers=1)
    best_usd = np.full(2, -np.inf)
    for targets in product((1, 3, 4), repeat=3):
        for router in (None, MarginRule("expected-margin", MarginParameters((0.0, 0.0)))):
            worlds = FleetWorlds(Plant(scenario), 2)
            worlds.load_all([scenario.generate(seed, "heldout") for seed in range(2)])
            control, controller = EngineControl(worlds, layout, router), Targets(rule, targets)
            while not control.done.all():
                control.step(controller.act(control.view()))
            best_usd = np.maximum(best_usd, worlds.ledger_usd.sum(axis=(1, 2)))
    assert (best_usd <= bounds.clairvoyant_usd + 1e-9).all()


@pytest.mark.parametrize("load_scale", [0.5, 1.0, 3.0])
def test_no_controller_earns_more_on_a_stretch_of_day_night(load_scale):
    overrides = {"horizon_s": 1200.0, "load_scale": load_scale, "plans.classes.batch.delay_tolerant.deadline_s": 600.0}
    scenario = load_scenario("day_night", overrides)
    router = MarginRule("bid-price", MarginParameters((0.0, 0.0)))
    rules = standard_rules(ControlPlant(scenario).layout)
    pairs = [Deciders(rule, router) for rule in rules.values()]
    results = evaluate_policies(scenario, {pair.name: pair for pair in pairs}, 2, workers=1)
    bounds = bound_episodes(scenario, range(2), workers=1)
    for result in results.values():
        assert (result.margin_usd <= bounds.clairvoyant_usd + 1e-9).all()
        assert result.margin_usd.sum() <= bounds.same_information_usd.sum()
