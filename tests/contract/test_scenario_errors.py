"""Bad configurations: one sentence with the place, the value and what is legal."""

import textwrap

import pytest
import yaml

from envs.scenario import load_scenario
from envs.scenario_files import CONFIGS
from marginroute.errors import InputError


def message(overrides=None, name="quickstart", **trace):
    with pytest.raises(InputError) as caught:
        load_scenario(name, overrides, **trace)
    text = str(caught.value)
    assert "\n" not in text and "legal is" in text
    return text


@pytest.mark.parametrize(
    ("key", "value", "parts"),
    [
        ("fleet.pools.large.replica", "2", ["--set fleet.pools.large.replica", "did you mean replicas"]),
        ("fleet.pools.larg.replicas", "2", ["unknown key 'larg'", "did you mean large"]),
        ("fleet.pools.large.replicas", "0", ["--set fleet.pools.large.replicas", "0 is not legal", "at least 1"]),
        ("fleet.pools.large.replicas", "1.5", ["1.5 is not legal", "integer"]),
        ("fleet.pools.large.replicas", "yes", ["True is not legal", "integer"]),
        ("fleet.pools.large.max_replicas", "0", ["0 is not legal", "at least 1"]),
        ("fleet.pools.large.min_replicas", "3", ["min_replicas 3", "0 to replicas (1)"]),
        ("fleet.pools.large.reserved_replicas", "2", ["reserved_replicas 2", "0 to 1"]),
        ("fleet.pools.large.paid_from", "arrival", ["'arrival'", "provision"]),
        ("fleet.pools.large.load_s", "-1", ["-1", "at least 0"]),
        ("fleet.pools.large.faults", "{mean_time_between_s: 0}", ["0", "greater than 0"]),
        ("fleet.pools.large.faults", "{slowdown: 0.5}", ["0.5", "at least 1"]),
        ("fleet.faults", "[{starts_at_s: 1, duration_s: 1}]", ["exactly one of pool, provider"]),
        ("fleet.faults", "[{pool: larg, starts_at_s: 1, duration_s: 1}]", ["unknown name 'larg'", "large"]),
        (
            "fleet.faults",
            "[{pool: large, index: 1, starts_at_s: 1, duration_s: 1}]",
            ["fleet.faults.0.index", "0 to 0"],
        ),
        ("fleet.faults", "[{provider: api, index: 1, starts_at_s: 1, duration_s: 1}]", ["no replicas"]),
        ("fleet.faults", "[{pool: large, starts_at_s: 1, duration_s: 0}]", ["duration_s", "greater than 0"]),
        ("fleet.retries.max_attempts", "0", ["0 is not legal", "at least 1"]),
        ("fleet.providers.api.tokens_per_minute", "0", ["0", "greater than 0"]),
        ("fleet.pools.large.gpu_usd_per_hour", "-2", ["-2", "at least 0"]),
        ("fleet.pools.large.gpu_usd_per_hour", ".nan", ["nan", "finite"]),
        ("fleet.pools.large.tier", "larg", ["unknown name 'larg'", "did you mean large"]),
        ("fleet.pools.large.profile", "h100", ["fleet.pools.large.profile", "configs/fleets/profiles"]),
        ("fleet.pools.large.kv_blocks", "100", ["100 blocks hold 1600 tokens", "largest request", "at least 1250"]),
        ("fleet.pools.large.max_num_batched_tokens", "64", ["below max_num_seqs", "at least 128"]),
        ("fleet.pools.large.scheduler", "fifo", ["'fifo'", "vllm-v1"]),
        ("fleet.pools.large.scheduling_policy", "lifo", ["'lifo'", "priority"]),
        ("fleet.pools.large.gpus_per_replica", "2", ["fewer than profile llama-3.1-70b-h100-tp4", "at least 4"]),
        ("fleet.pools.large.speculation", "{draft_tokens: 0, acceptance: 0.7}", ["draft_tokens", "0", "at least 1"]),
        ("fleet.pools.large.speculation", "{draft_tokens: 4, acceptance: 1.7}", ["acceptance", "1.7", "at most 1"]),
        (
            "fleet.pools.large.speculation",
            "{draft_tokens: 16, acceptance: 0.7}",
            ["pools.large.max_num_batched_tokens", "128 speculating sequences", "at least 2176"],
        ),
        ("plans.classes.team.priority", "8", ["8", "at most 7"]),
        ("fleet.providers.api.price_of", "gpt-4.11", ["gpt-4.11", "did you mean gpt-4.1"]),
        ("fleet.providers.api.input_usd_per_mtok", "1", ["both price_of and USD per mtok"]),
        ("fleet.providers.api.price_of", "null", ["has no price"]),
        ("fleet.pools", "{}", ["0 entries", "at least 1"]),
        ("plans.plans.batch.input_usd_per_mtok", "-1", ["-1", "at least 0"]),
        ("plans.plans.batch.kind", "token", ["kind 'token'", "usage"]),
        ("plans.classes.team.plan", "teams", ["unknown name 'teams'", "did you mean team"]),
        ("plans.classes.team.slo.ttft_s", "null", ["credits a missed ttft but promises none"]),
        ("plans.classes.batch.delay_tolerant", "null", ["no class may wait"]),
        ("plans.classes.batch.slo.ttft_s", "1.0", ["below the class's deadline"]),
        ("workload.class_share", "{enterprise: 1, team: 1}", ["no share for class batch"]),
        ("workload.class_share", "{enterprise: 1, team: 1, batch: 1, gold: 1}", ["unknown name 'gold'"]),
        ("workload.class_task_share", "{batch: {coding: 1}}", ["unknown name 'coding'"]),
        ("workload.class_task_share", "{batch: {code: 0}}", ["no positive share"]),
        ("workload.arrivals.kind", "poisson", ["kind 'poisson'", "gamma"]),
        ("workload.arrivals.states.calm.next_weight", "{calm: 1}", ["cannot be followed by calm"]),
        ("workload.tasks.chat.prompt_tokens", "null", ["is missing", "workload.prompt_tokens"]),
        ("workload.tasks.chat.prompt_tokens.components.0.sigma", "wide", ["'wide'", "number"]),
        ("workload.tasks.chat.prompt_tokens.components.9.sigma", "1", ["'9' is no index", "0 to 1"]),
        ("workload.tasks.chat.prompt_tokens.max_tokens", "2", ["has max_tokens 2", "at least min_tokens"]),
        ("workload.difficulty.signal_correlation", "1.2", ["1.2", "at most 1"]),
        ("fleet.tiers.small.quality.ability", "{chat: 1}", ["no figure for extraction, code, reasoning"]),
        ("horizon_s", "0", ["--set horizon_s", "greater than 0"]),
        ("horizon_s", "[1", ["--set horizon_s=[1", "line 1"]),
        ("horizon_s.x", "1", ["'x' lies below 240.0"]),
        ("fleet", "starer", ["fleet 'starer'", "did you mean starter"]),
        ("requests_per_episode", "a lot", ["'a lot'", "integer"]),
        ("colour", "red", ["unknown key 'colour'"]),
    ],
)
def test_bad_override(key, value, parts):
    text = message({key: value})
    for part in parts:
        assert part in text


def test_delay_tolerant_without_a_deadline():
    assert "deadline_s: is missing" in message({"plans.classes.batch.delay_tolerant": "{}"})


def test_more_replicas_than_there_may_be():
    text = message({"fleet.pools.large.replicas": 3, "fleet.pools.large.max_replicas": 2})
    assert "max_replicas 2" in text and "replicas (3) or more" in text


def test_several_problems_give_the_first_and_a_count():
    text = message({"fleet.pools.large.replicas": 0, "fleet.pools.small.replicas": 0})
    assert text.endswith("(and 1 more problem)")


def test_unknown_scenario_and_missing_file(tmp_path):
    assert "did you mean quickstart" in message(name="quickstrat")
    assert "no such file" in message(name=str(tmp_path / "none.yaml"))


def write(tmp_path, text):
    path = tmp_path / "mine.yaml"
    path.write_text(textwrap.dedent(text))
    return str(path)


BASE = "fleet: starter\nplans: starter\nworkload: quickstart\nhorizon_s: 240.0\n"


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (BASE + "horizon_s: 3.0\n", ["mine.yaml, line 5", "key 'horizon_s' twice"]),
        (BASE + "colour: red\n", ["mine.yaml: colour: unknown key"]),
        (BASE + "bad: [1\n", ["mine.yaml, line"]),
        ("- 1\n- 2\n", ["mine.yaml", "mapping"]),
        ("", ["mine.yaml", "None"]),
        ("plans: starter\nworkload: quickstart\nhorizon_s: 1.0\n", ["mine.yaml: fleet: is missing"]),
        (BASE.replace("starter", "starer", 1), ["fleet 'starer'", "did you mean starter"]),
        (BASE.replace("240.0", "'240'"), ["mine.yaml: horizon_s: '240' is not legal", "number"]),
        (BASE.replace("fleet: starter", "fleet: 3"), ["mine.yaml: fleet: 3 is not legal"]),
    ],
)
def test_bad_file(tmp_path, text, parts):
    found = message(name=write(tmp_path, text))
    for part in parts:
        assert part in found


def test_an_error_names_the_file_that_holds_it(tmp_path):
    fleet = yaml.safe_load((CONFIGS / "fleets" / "starter.yaml").read_text())
    fleet["pools"]["large"]["replicas"] = -1
    path = tmp_path / "fleet.yaml"
    path.write_text(yaml.safe_dump(fleet, sort_keys=False))
    text = message({"fleet": str(path)})
    assert text.startswith(f"{path}: pools.large.replicas: -1 is not legal")


def test_numbers_in_exponent_notation_are_numbers(tmp_path):
    scenario = load_scenario(write(tmp_path, BASE.replace("240.0", "2e2")))
    assert scenario.horizon_s == 200.0 and scenario.name == "mine"


def test_overrides_reach_every_kind_of_place():
    scenario = load_scenario(
        "quickstart",
        {
            "fleet.pools.large.replicas": "2",
            "fleet.response_cache": "null",
            "fleet.telemetry.scrape_interval_s": 5.0,
            "workload.tasks.chat.prompt_tokens.components.1.weight": "0.1",
            "plans.classes.team.slo.e2e_s": 30,
            "requests_per_episode": "null",
        },
    )
    assert scenario.fleet.pools["large"].replicas == 2 and scenario.fleet_spec().n_replicas == 4
    assert scenario.fleet.response_cache is None
    assert scenario.workload.tasks["chat"].prompt_tokens.components[1].weight == 0.1
    assert scenario.terms()["slo_e2e_s"][1] == 30.0
    assert len({scenario.generate(seed).n_requests for seed in range(5)}) > 1


def test_override_of_a_section_by_name():
    assert load_scenario("quickstart", {"workload": "azure_conversation"}).generate(0).n_requests == 1200


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        ({"plans.classes.team.entitlements": {"tiers": ["smal"]}}, ["entitlements.tiers", "did you mean small"]),
        ({"plans.classes.team.entitlements": {"stations": ["api"], "tiers": ["small"]}}, ["leave no pool or provider"]),
        (
            {"plans.classes.team.slo.window": {"length_s": 60, "credits": [{"below": 0.9, "share": 0.1}]}},
            ["credits both"],
        ),
        (
            {
                "plans.classes.batch.slo": {
                    "e2e_s": 9.0,
                    "window": {
                        "length_s": 60,
                        "credits": [{"below": 0.9, "share": 0.1}, {"below": 0.95, "share": 0.2}],
                    },
                }
            },
            ["second step that is no worse"],
        ),
        (
            {"plans.plans.team.fair_use": {"requests_per_tenant": 9.0, "beyond": "overage"}},
            ["overage_usd", "both or none"],
        ),
        ({"plans.classes.team.limits.burst_requests": 0.5}, ["burst_requests", "at least 1"]),
    ],
)
def test_contracts_that_cannot_be(overrides, parts):
    with pytest.raises(InputError) as error:
        load_scenario("quickstart", overrides)
    assert all(part in str(error.value) for part in parts), error.value
