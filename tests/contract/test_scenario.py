"""Scenarios: names, compiled arrays, determinism, splits, hash."""

import dataclasses
import json
import math

import numpy as np
import pytest
import yaml

from envs.economics.plans import TERMS
from envs.scenario import SPLIT_CODE, Scenario, load_scenario
from envs.scenario_plans import MONTH_S
from envs.workload.requests import Workload
from marginroute.errors import InputError

SHIPPED = ("quickstart", "azure_conversation")


@pytest.fixture(scope="module", params=SHIPPED)
def scenario(request):
    return load_scenario(request.param)


@pytest.fixture(scope="module")
def quickstart():
    return load_scenario("quickstart")


def test_name_lists_follow_the_files(quickstart):
    assert quickstart.class_names == ("enterprise", "team", "batch")
    assert quickstart.task_names == ("chat", "extraction", "code", "reasoning")
    assert quickstart.tier_names == ("small", "medium", "large", "hosted")
    assert quickstart.pool_names == ("small", "medium", "large")
    assert quickstart.provider_names == ("api",)


def test_workload_shapes_and_types(scenario):
    workload = scenario.generate(3)
    size, tiers = workload.n_requests, len(scenario.tier_names)
    shapes = {name: (size, tiers) for name in ("p_good", "p_good_prior", "good")} | {"provider_noise": (size, 2)}
    shapes |= {"prefix_hash": (workload.prefix_count.sum(),), "embedding": (size, 0), "attempt_luck": (size, 0, 3)}
    shapes |= {"ability_shift": (size, tiers if workload.ability_shift.any() else 0)}
    integers = ("class_index", "task_index", "tenant_index", "prompt_tokens", "output_tokens", "prompt_key")
    kinds = dict.fromkeys(
        (*integers, "prefix_count", "session_index", "parent_index", "workflow_index", "task_calls", "tool_key"), "i4"
    )
    kinds |= {"good": "u1", "judged": "u1", "prefix_hash": "i8", "family_index": "i4", "embedding": "f4"}
    for name in Workload.array_names():
        array = getattr(workload, name)
        assert array.shape == shapes.get(name, (size,)), name
        assert array.dtype == np.dtype(kinds.get(name, "f8")), name
        assert not array.flags.writeable, name
    assert (np.diff(workload.arrived_at_s) >= 0).all()
    assert workload.arrived_at_s[0] >= 0 and workload.arrived_at_s[-1] < workload.horizon_s == scenario.horizon_s
    assert workload.prompt_tokens.min() >= 1 and workload.output_tokens.min() >= 1
    assert workload.n_tiers == tiers
    with pytest.raises(dataclasses.FrozenInstanceError):
        workload.horizon_s = 1.0


def test_hidden_and_visible_fields_part_the_workload():
    hidden = {"output_tokens", "patience_s", "p_good", "good", "provider_noise", "think_s", "tool_key", "tool_usd"}
    hidden |= {"needed_similarity", "valid_for_s", "judged", "task_calls", "attempt_luck", "ability_shift"}
    assert set(Workload.hidden) == hidden
    assert set(Workload.hidden) | set(Workload.visible()) == set(Workload.array_names())
    assert not set(Workload.hidden) & set(Workload.visible())


def test_visible_fields_do_not_depend_on_hidden_truths(quickstart):
    """Other output lengths and patience, same seed: what a gateway sees stays the same to the bit."""
    changed = load_scenario(
        "quickstart",
        {
            "plans.classes.team.patience.median_s": 3.0,
            "workload.tasks.chat.output_tokens.components.0.median_tokens": 900,
            "fleet.tiers.small.quality.prior_ability": quickstart.workload_spec.quality.prior_ability[0],
            "fleet.tiers.small.quality.ability.chat": -1.0,
        },
    )
    one, other = quickstart.generate(5), changed.generate(5)
    for name in Workload.visible():
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)
    for name in ("output_tokens", "patience_s", "p_good", "good"):
        assert not np.array_equal(getattr(one, name), getattr(other, name)), name


def test_same_seed_same_bytes_and_other_seeds_differ(scenario):
    one, same, other = scenario.generate(7), load_scenario(scenario.name).generate(7), scenario.generate(8)
    for name in Workload.array_names():
        assert getattr(one, name).tobytes() == getattr(same, name).tobytes(), name
    assert one.arrived_at_s.tobytes() != other.arrived_at_s.tobytes()


def test_splits_and_seeds_never_share_a_stream(quickstart):
    firsts = {quickstart.generate(seed, split).arrived_at_s.tobytes() for split in SPLIT_CODE for seed in range(40)}
    assert len(firsts) == 3 * 40
    for seed in (-1, 2**32):
        with pytest.raises(InputError, match="seed"):
            quickstart.generate(seed)
    with pytest.raises(InputError, match="legal is train, validation, heldout"):
        quickstart.generate(0, "test")


def test_quickstart_has_exactly_1200_requests(quickstart):
    assert {quickstart.generate(seed).n_requests for seed in range(10)} == {1200}


def test_load_scale_multiplies_arrivals(quickstart):
    heavy = load_scenario("quickstart", {"load_scale": "1.5"})
    assert heavy.generate(0).n_requests == 1800 and heavy.hash != quickstart.hash
    counts = []
    for scale in (1.0, 2.0):
        free = load_scenario("quickstart", {"requests_per_episode": None, "load_scale": scale})
        counts.append(np.mean([free.generate(seed).n_requests for seed in range(40)]))
    assert counts[1] / counts[0] == pytest.approx(2.0, rel=0.05)


def test_quickstart_mix(quickstart):
    workloads = [quickstart.generate(seed) for seed in range(30)]
    batch = np.mean([(w.class_index == 2).mean() for w in workloads])
    keys = [w.prompt_key[w.prompt_key >= 0] for w in workloads]
    repeated = np.mean([(len(k) - len(np.unique(k))) / 1200 for k in keys])
    assert batch == pytest.approx(0.15, abs=0.01)
    assert repeated == pytest.approx(0.12, abs=0.015)


def test_shipped_prior_is_calibrated_overall_but_blind_to_the_task(quickstart):
    """The prior is what an operator knows before anything drifts."""
    steady = quickstart.model_copy(update={"drift": {}})
    workloads = [steady.generate(seed) for seed in range(40)]
    prior = np.concatenate([w.p_good_prior for w in workloads])
    truth = np.concatenate([w.p_good for w in workloads])
    task = np.concatenate([w.task_index for w in workloads])
    np.testing.assert_allclose(prior.mean(axis=0), truth.mean(axis=0), atol=0.02)
    code, large, medium = quickstart.task_names.index("code"), 2, 1
    assert truth[task == code, medium].mean() > truth[task == code, large].mean() + 0.05
    assert prior[task == code, medium].mean() < prior[task == code, large].mean()


def test_terms(quickstart):
    terms = quickstart.terms()
    assert terms.dtype == TERMS and terms.shape == (3,)
    plans = quickstart.plans
    enterprise, team, batch = terms
    price = plans.plans["enterprise"]
    assert enterprise["input_usd_per_token"] == pytest.approx(price.input_usd_per_mtok / 1e6)
    assert enterprise["output_usd_per_token"] == pytest.approx(price.output_usd_per_mtok / 1e6)
    assert enterprise["request_value_usd"] == 0.0 and enterprise["seat_usd_per_s"] == 0.0
    seat = plans.plans["team"]
    assert team["request_value_usd"] == pytest.approx(seat.seat_usd_per_month / seat.included_requests_per_month)
    assert team["seat_usd_per_s"] * MONTH_S == pytest.approx(seat.seats * seat.seat_usd_per_month)
    assert team["input_usd_per_token"] == 0.0
    assert batch["delay_tolerant"] == 1.0 and enterprise["delay_tolerant"] == 0.0
    assert math.isinf(batch["slo_ttft_s"]) and batch["ttft_credit_share"] == 0.0
    assert enterprise["patience_s"] == plans.classes["enterprise"].patience.median_s
    assert math.isinf(batch["patience_s"])


def test_fleet_spec(quickstart):
    spec = quickstart.fleet_spec()
    assert [pool.name for pool in spec.pools] == list(quickstart.pool_names)
    assert spec.n_replicas == sum(pool.replicas for pool in quickstart.fleet.pools.values())
    assert spec.scrape_interval_s == quickstart.fleet.telemetry.scrape_interval_s
    assert [quickstart.tier_names[pool.tier] for pool in spec.pools] == ["small", "medium", "large"]
    assert quickstart.tier_names[spec.providers[0].tier] == "hosted"


def test_list_price_becomes_numbers(quickstart):
    provider = quickstart.fleet.providers["api"]
    assert provider.price_of is None and provider.price_source.startswith("anthropic/claude-haiku-4-5")
    assert (provider.input_usd_per_mtok, provider.output_usd_per_mtok) == (1.0, 5.0)


def test_expected_output_tokens_are_the_means_of_draws(quickstart):
    tokens = np.concatenate([(w := quickstart.generate(seed)).output_tokens[w.prompt_key < 0] for seed in range(60)])
    task = np.concatenate([(w := quickstart.generate(seed)).task_index[w.prompt_key < 0] for seed in range(60)])
    means = [tokens[task == index].mean() for index in range(4)]
    np.testing.assert_allclose(quickstart.expected_output_tokens, means, rtol=0.03)


def test_hash_is_of_the_content(tmp_path, quickstart):
    assert len(quickstart.hash) == 16 and quickstart.hash == load_scenario("quickstart").hash
    assert load_scenario("quickstart", {"fleet.pools.large.replicas": 3}).hash != quickstart.hash
    assert load_scenario("quickstart", {"horizon_s": "240"}).hash == quickstart.hash
    assert quickstart.model_copy(update={"horizon_s": 10.0}).hash != quickstart.hash
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(yaml.safe_dump(quickstart.model_dump(mode="json"), sort_keys=False))
    again = load_scenario(resolved)
    assert again.hash == quickstart.hash
    assert again.generate(2).p_good.tobytes() == quickstart.generate(2).p_good.tobytes()


def test_shares_are_relative(quickstart):
    doubled = load_scenario("quickstart", {"workload.class_share": {"enterprise": 90, "team": 80.0, "batch": 30.0}})
    assert doubled.workload_spec.class_share == pytest.approx(quickstart.workload_spec.class_share)


def test_every_key_is_described():
    def undescribed(schema, path):
        for key, field in schema.get("properties", {}).items():
            if not field.get("description"):
                yield f"{path}.{key}"

    schema = Scenario.model_json_schema()
    missing = list(undescribed(schema, "scenario"))
    for name, part in schema["$defs"].items():
        missing += list(undescribed(part, name))
    assert missing == []
    json.dumps(schema)


def test_a_key_at_its_default_changes_no_hash():
    plain = load_scenario("quickstart")
    spelled_out = load_scenario("quickstart", {"load_scale": 1.0, "fleet.pools.small.block_size_tokens": 16})
    changed = load_scenario("quickstart", {"fleet.pools.small.block_size_tokens": 32})
    assert spelled_out.hash == plain.hash != changed.hash


RANGES = {
    "load_scale": {"low": 0.6, "high": 1.6},
    "fleet.providers.api.output_usd_per_mtok": {"low": 2.0, "high": 8.0, "log": True},
    "fleet.pools.large.gpus_per_replica": {"choices": [4, 8]},
}


def family(ranges=RANGES, conditions=None):
    return load_scenario("quickstart", {"ranges": ranges, "conditions": conditions or {}})


def test_a_family_draws_its_members():
    scenario = family()
    members = scenario.variants
    assert len(members) == 36 and not any(member.ranges for member in members)
    loads = np.array([member.load_scale for member in members])
    prices = np.array([member.fleet.providers["api"].output_usd_per_mtok for member in members])
    assert 0.6 <= loads.min() < 0.8 and 1.4 < loads.max() <= 1.6 and len(set(loads)) == 36
    assert prices.min() >= 2.0 and prices.max() <= 8.0 and np.mean(prices < 4.0) == pytest.approx(0.5, abs=0.25)
    assert {member.fleet.pools["large"].gpus_per_replica for member in members} == {4, 8}
    workload = scenario.generate(14, "validation")
    member = members[workload.variant]
    assert workload.variant == 12 + 14 % 12
    assert workload.n_requests == round(1200 * member.load_scale)
    again = family().generate(14, "validation")
    assert (again.arrived_at_s == workload.arrived_at_s).all() and again.variant == workload.variant


def test_a_condition_changes_what_it_names():
    scenario = family(conditions={"heavy": {"load_scale": 1.5}})
    heavy = scenario.under("heavy")
    assert heavy.load_scale == 1.5 and not heavy.ranges
    assert heavy.generate(0, "heldout").n_requests == 1800
    with pytest.raises(InputError, match=r"condition 'hevy'.* did you mean heavy"):
        scenario.under("hevy")


@pytest.mark.parametrize(
    ("ranges", "parts"),
    [
        ({"load_scal": {"low": 1.0, "high": 2.0}}, ["ranges: load_scal", "did you mean load_scale"]),
        ({"load_scale": {"low": -2.0, "high": -1.0}}, ["ranges", "load_scale", "greater than 0"]),
        ({"load_scale": {"low": 2.0, "high": 1.0}}, ["low 2.0 above high 1.0"]),
        ({"load_scale": {"low": 2.0}}, ["low with high"]),
        ({"fleet.pools.small.kv_blocks": {"low": 2.0, "high": 3.0, "whole": True}}, ["ranges", "largest request"]),
    ],
)
def test_ranges_are_checked_when_the_scenario_is_read(ranges, parts):
    with pytest.raises(InputError) as error:
        family(ranges)
    assert all(part in str(error.value) for part in parts), error.value


def test_conditions_are_checked_when_the_scenario_is_read():
    with pytest.raises(InputError, match=r"conditions\.heavy: load_scal"):
        family(conditions={"heavy": {"load_scal": 1.5}})
