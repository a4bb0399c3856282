"""Every scenario that ships: it loads, holds what a story needs, and plays under each of its conditions."""

import dataclasses

import numpy as np
import pytest

from envs.economics.ledger import ACCOUNTS, COUNTS
from envs.scenario import load_scenario
from envs.scenario_files import CONFIGS
from envs.worlds import FleetWorlds
from marginroute.margin_rule import MarginParameters, MarginRule

NAMES = sorted(path.stem for path in (CONFIGS / "scenarios").glob("*.yaml"))
STORIES = (
    *("everyday_chat", "code_completion", "agent_fleet", "enterprise_slo", "seats_quota"),
    *("semantic_cache", "long_context", "agent_ramp", "everything"),
)
SHORT_S = 12.0


def short(scenario):
    """The scenario with its first seconds only; what would happen later happens then."""
    count = scenario.requests_per_episode
    share = SHORT_S / scenario.horizon_s
    update = {"horizon_s": SHORT_S, "requests_per_episode": None if count is None else max(round(count * share), 1)}
    faults = [event.model_copy(update={"starts_at_s": share * event.starts_at_s}) for event in scenario.fleet.faults]
    update["fleet"] = scenario.fleet.model_copy(update={"faults": faults})
    early = {"starts_at_s": 0.0, "start_spread_s": 0.0}
    update["drift"] = {name: item.model_copy(update=early) for name, item in scenario.drift.items()}
    return scenario.model_copy(update=update)


@pytest.fixture(scope="module", params=NAMES)
def scenario(request):
    return load_scenario(request.param)


def test_a_run_folder_holds_the_same_scenario(scenario, tmp_path):
    """scenario.json, which evaluate.py reads where no scenario is given: content, hash and name."""
    path = tmp_path / "scenario.json"
    path.write_text(scenario.model_dump_json(indent=1, by_alias=True))
    read = load_scenario(path)
    assert read == scenario and read.hash == scenario.hash and read.name == scenario.name


def test_the_suite_has_its_stories():
    assert set(STORIES) <= set(NAMES)


@pytest.mark.parametrize("name", STORIES)
def test_a_story_has_a_training_range_and_conditions(name):
    scenario = load_scenario(name)
    assert scenario.description and len(scenario.ranges) >= 2
    changed = [{key.partition(".")[0] for key in changes} | set(changes) for changes in scenario.conditions.values()]
    assert len(changed) >= 8
    assert sum("fleet.faults" in keys for keys in changed) >= 2  # outages of a replica and of a provider
    drifts = [changes["drift"] for changes in scenario.conditions.values() if "drift" in changes]
    courses = {key for drift in drifts for item in drift.values() for key in item}
    assert {"ability_by", "latency_times", "price_times"} <= courses


def test_it_plays_under_every_condition_and_the_accounts_add_up(scenario):
    for condition in (None, *scenario.conditions):
        world = short(scenario if condition is None else scenario.under(condition))
        worlds = FleetWorlds(world, 1)
        stations = len(worlds.plant.layout.station_names)
        episode = world.generate(0, "heldout")
        worlds.load(0, episode)
        worlds.run(MarginRule("margin", MarginParameters(station_usd_per_s=(0.003,) * stations)))
        assert worlds.done.all() and (worlds.desks["illegal"] == 0).all(), condition
        ledger, counts = worlds.ledger_usd[0], worlds.counts[0]
        assert ledger.shape[0] == len(ACCOUNTS) and np.isfinite(ledger).all()
        assert worlds.desks["margin_usd"][0] == pytest.approx(ledger.sum(), abs=1e-9), condition
        ended = sum(counts[COUNTS.index(name)].sum() for name in ("served", "shed", "abandoned", "failed", "refused"))
        assert ended == counts[COUNTS.index("calls")].sum(), condition
        roots = int((episode.parent_index < 0).sum())
        assert counts[COUNTS.index("first_calls")].sum() <= roots and ended > 0, condition
        revenue = ledger[[ACCOUNTS.index(name) for name in ("usage_revenue", "seat_revenue")]].sum()
        assert revenue > 0.0, condition


def test_drift_of_a_condition_reaches_its_episodes(scenario):
    for name, changes in scenario.conditions.items():
        if "drift" not in changes:
            continue
        world = short(scenario.under(name))
        plain = dataclasses.replace(world.generate(1, "heldout"))
        item = next(iter(world.drift.values()))
        if item.ability_by is not None:
            assert np.abs(plain.ability_shift).max() > 0.1, name
        else:
            assert len(plain.faults) > 0, name
