"""Worlds of a family: each plays by the constants of its own member, side by side with the others."""

import dataclasses

import numpy as np
import pytest

from envs.plant import Plant
from envs.scenario import load_scenario
from envs.worlds import FleetWorlds
from marginroute import view as v
from marginroute.errors import InputError
from marginroute.margin_rule import MarginParameters, MarginRule

RANGES = {
    "load_scale": {"low": 0.5, "high": 1.5},
    "fleet.providers.api.output_usd_per_mtok": {"low": 2.0, "high": 20.0, "log": True},
    "fleet.providers.api.ttft_median_s": {"low": 0.3, "high": 2.0},
    "fleet.providers.api.requests_per_minute": {"low": 20.0, "high": 200.0},
    "fleet.pools.large.gpu_usd_per_hour": {"low": 1.0, "high": 6.0},
    "plans.classes.enterprise.slo.ttft_s": {"low": 0.3, "high": 3.0},
    "plans.plans.batch.output_usd_per_mtok": {"low": 1.0, "high": 9.0},
    "fleet.batch_queue.hold_s": {"low": 2.0, "high": 8.0},
}
SMALL = {
    "horizon_s": 30.0,
    "requests_per_episode": 100,
    "fleet.providers.api.price_of": None,
    "fleet.providers.api.input_usd_per_mtok": 1.0,
    "fleet.providers.api.output_usd_per_mtok": 5.0,
}


def rule(plant):
    return MarginRule("margin", MarginParameters(station_usd_per_s=(0.01,) * len(plant.layout.station_names)))


def played(plant, workloads):
    worlds = FleetWorlds(plant, len(workloads))
    worlds.load_all(workloads)
    first = worlds.signals.copy()
    worlds.run(rule(plant))
    return worlds, first


def test_a_world_of_a_family_is_its_member():
    scenario = load_scenario("quickstart", {**SMALL, "ranges": RANGES})
    plant, seeds = Plant(scenario), (0, 5, 11)
    together, shown = played(plant, [scenario.generate(seed) for seed in seeds])
    assert len({round(usd, 6) for usd in shown[v.OUTPUT_USD, :, 3] * 1e6}) == 3
    for w, seed in enumerate(seeds):
        member = scenario.variants[scenario.generate(seed).variant]
        alone, seen = played(Plant(member), [dataclasses.replace(scenario.generate(seed), variant=0)])
        np.testing.assert_array_equal(together.ledger_usd[w], alone.ledger_usd[0])
        np.testing.assert_array_equal(together.counts[w], alone.counts[0])
        np.testing.assert_array_equal(shown[:, w], seen[:, 0])
    # and again in other worlds, where another member has played before
    worlds, _ = played(plant, [scenario.generate(seed) for seed in seeds[::-1]])
    np.testing.assert_array_equal(worlds.ledger_usd, together.ledger_usd[::-1])


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("fleet.pools.small.max_num_seqs", {"low": 64, "high": 128, "whole": True}),
        ("fleet.telemetry.scrape_interval_s", {"low": 1.0, "high": 3.0}),
        ("plans.classes.batch.entitlements.cache", {"choices": [True, False]}),
    ],
)
def test_what_worlds_share_has_no_range(key, values):
    scenario = load_scenario("quickstart", {**SMALL, "ranges": {key: values}})
    with pytest.raises(InputError, match=f"{key} would change engines"):
        FleetWorlds(scenario, 1)


@pytest.mark.parametrize("key", ["load_scale", "fleet.providers.api.tokens_per_minute"])
def test_what_is_set_has_no_range_any_more(key):
    plain, given = load_scenario("seats_quota"), load_scenario("seats_quota", {key: 3.0})
    assert set(plain.ranges) - set(given.ranges) == {key}
    stands = {"load_scale": [m.load_scale for m in given.variants]}.get(
        key, [m.fleet.providers["api"].tokens_per_minute for m in given.variants]
    )
    assert set(stands) == {3.0}


def test_a_section_that_is_set_takes_its_ranges_along_and_a_range_may_be_given_with_its_key():
    assert set(load_scenario("seats_quota", {"plans.plans.usage.request_usd": 0.1}).ranges) == set(
        load_scenario("seats_quota").ranges
    )
    whole = {"plans.plans.usage": {"kind": "usage", "input_usd_per_mtok": 3.0, "output_usd_per_mtok": 9.0}}
    assert set(load_scenario("seats_quota", whole).ranges) == {"load_scale", "fleet.providers.api.tokens_per_minute"}
    both = {"load_scale": 2.0, "ranges.load_scale": {"low": 1.0, "high": 4.0}}
    assert load_scenario("seats_quota", both).ranges["load_scale"].high == 4.0
