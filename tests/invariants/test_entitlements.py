"""Entitlements: no policy, whatever it scores, has a request answered outside them, in the world or at a gateway."""

import copy
from dataclasses import replace

import by_hand
import numpy as np
import pytest
from by_hand import API, CACHE, DEFER, METERED, NIGHT, ONE, TWO_A, Played, workload
from gateway.bundles import small_bundle
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from envs.fleet_env import FleetEnv
from envs.fluid_worlds import FluidWorlds
from envs.scenario import Scenario
from envs.worlds import FleetWorlds
from marginroute import bundle as bundles
from marginroute import view as v
from marginroute.errors import InputError
from marginroute.features import feature_spec
from marginroute.margin_rule import CACHE_COLUMN, MarginParameters, MarginRule
from marginroute.policy import Network, ResidualPolicy
from marginroute.response_cache import Hit
from marginroute.rules import FixedTier, Random, RoundRobin
from marginroute.telemetry import GatewayState

TIERS, STATIONS = ("weak", "strong", "hosted"), ("one", "two", "api")
OF_STATION = dict(zip(STATIONS, TIERS, strict=True))


def some(names):
    return st.none() | st.lists(st.sampled_from(names), min_size=1, unique=True)


def served_by(entitled):
    """Stations that may answer, by the two lists."""
    return {
        name
        for name, tier in OF_STATION.items()
        if (entitled["tiers"] is None or tier in entitled["tiers"])
        and (entitled["stations"] is None or name in entitled["stations"])
    }


entitlements = st.fixed_dictionaries({"tiers": some(TIERS), "stations": some(STATIONS), "cache": st.booleans()}).filter(
    served_by
)


@given(st.lists(entitlements, min_size=3, max_size=3), st.integers(0, 2**32 - 1), st.booleans())
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_no_choice_in_a_world_is_carried_out_against_them(entitled, seed, scaled):
    data = copy.deepcopy(by_hand.SCENARIO)
    data["fleet"]["pools"]["two"]["max_replicas"] = 3
    data["fleet"]["response_cache"] |= {"shared": True, "ttl_s": 1000.0}
    data["workload"]["recurring"]["share"] = 0.8
    for customer, rights in zip(data["plans"]["classes"].values(), entitled, strict=True):
        customer["entitlements"] = rights
    worlds = FleetWorlds(Scenario.model_validate({"name": "random", **data}), 1)
    worlds.load(0, worlds.plant.scenario.generate(seed, "train"))
    layout, rng = worlds.plant.layout, np.random.default_rng(seed)
    stations = np.array([*layout.station_names, ""])[layout.station]
    hits = []
    while not worlds.done.all():
        if scaled:
            worlds.set_replicas(rng.integers(1, 4, 2))
        desk, found = worlds.desks[0], worlds.answers.arrays.found[0]
        mine = entitled[worlds.loads["class_index"][0, desk["current"]]]
        legal = worlds.legal[0]
        for c in np.flatnonzero(legal & (layout.kind <= v.PROVIDER)):
            assert stations[c] in served_by(mine)
        if legal[CACHE_COLUMN]:  # a third replica may be there
            tier = worlds.answers.arrays.entries[0, found["key"]]["tier"]
            assert mine["cache"] and layout.tier_names[tier] in {OF_STATION[name] for name in served_by(mine)}
            hits.append(tier)
        worlds.step(np.array([rng.integers(-1, layout.n_candidates + 1)]))
    for load in worlds.loads[0]:
        if load["answered_by"] >= 0:
            assert stations[load["answered_by"]] in served_by(entitled[load["class_index"]])


def test_held_work_is_bought_from_an_entitled_provider_or_not_at_all(tmp_path):
    rows = [{"class_index": NIGHT, "arrived_at_s": 59.0}]
    for rights, bought in (({"tiers": ["hosted", "weak"]}, 1), ({"tiers": ["weak"]}, 0)):
        env = FleetEnv(by_hand.scenario(tmp_path, {"plans.classes.night.entitlements": rights}))
        played = Played(env, workload(env.worlds.plant.scenario, *rows), [DEFER])
        assert played.count("served") == bought and played.count("shed") == 1 - bought


def test_a_stored_answer_of_a_model_outside_them_is_not_found(tmp_path):
    rows = [{"prompt_key": 0}, {"prompt_key": 0, "arrived_at_s": 1.0}]
    keys = {"plans.classes.metered.entitlements.tiers": ["strong"], "fleet.response_cache.shared": True}
    env = FleetEnv(by_hand.scenario(tmp_path, keys))
    seats = [{"class_index": 1} | rows[0], {"class_index": METERED} | rows[1]]
    for first, second in ((ONE, False), (TWO_A, True)):
        played = Played(env, workload(env.worlds.plant.scenario, *seats), [first, TWO_A])
        assert played.views[1].legal[CACHE] == second
        assert not played.views[1].legal[[ONE, API]].any()


def test_the_fluid_surrogate_refuses_what_it_does_not_know(tmp_path):
    scenario = by_hand.scenario(tmp_path, {"plans.classes.metered.entitlements.tiers": ["strong"]})
    with pytest.raises(InputError, match="class metered has entitlements"):
        FluidWorlds(scenario, 1)


def policies(layout, rng):
    """Rules of each family, and a random network on a margin rule."""
    margin = MarginRule("bid-price", MarginParameters(tuple(rng.uniform(0.0, 0.01, len(layout.station_names)))))
    spec = feature_spec(layout)
    f, g, h = spec.n_candidate, spec.n_context, 8
    shapes = [(f, h), (g, h), (h,), (h, h), (h,), (h,), (1,), (2,)]
    network = Network(*(rng.normal(0.0, 5.0, shape).astype(np.float32) for shape in shapes))
    rules = [margin, small_bundle().fallback, Random("random"), RoundRobin("round-robin"), FixedTier("fixed", 0)]
    return [*rules, ResidualPolicy("learned", margin, spec, network)]


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_no_policy_at_a_gateway_picks_outside_them(seed):
    rng = np.random.default_rng(seed)
    base = small_bundle()
    allowed = rng.random((3, 6)) < 0.5
    allowed[:, -2:] = True
    made = replace(base, allowed=allowed)
    state = GatewayState(made, can=("cache", "shed") if rng.random() < 0.5 else ())
    for policy in policies(made.layout, rng):
        k = int(rng.integers(3))
        cached = Hit("", 1.0, 0.0, int(rng.integers(2))) if rng.random() < 0.5 else None
        view = state.view(100, made.layout.class_names[k], cached=cached)
        choice = policy.decide(view).candidate
        assert allowed[k, choice] and view.legal[choice]
        if choice == 3:
            assert cached is not None and allowed[k, :3][made.layout.tier[:3] == cached.tier].any()


def test_a_bundle_carries_them(tmp_path):
    allowed = np.ones((3, 6), dtype=np.bool_)
    allowed[1, :2] = False
    bundles.save(replace(small_bundle(), allowed=allowed), tmp_path / "bundle")
    loaded = bundles.load(tmp_path / "bundle")
    assert np.array_equal(loaded.allowed, allowed)
    assert GatewayState(loaded).view(100, "premium").legal.tolist() == [False, False, True, False, False, False]
