"""The LiteLLM callback without LiteLLM: what it reads from the hooks, and that nothing of ours reaches a request."""

import asyncio
import json
import os
import sys
import types

import pytest
from bundles import small_bundle

from marginroute import bundle as bundles
from marginroute import view as v
from marginroute.adapters import litellm as adapter
from marginroute.adapters.litellm_request import Settings
from marginroute.contracts import STANDINGS
from marginroute.errors import InputError
from marginroute.operation_file import settings_from

DEPLOYMENTS = [
    {"model_info": {"id": "1", "marginroute_candidate": "small/0"}, "litellm_params": {"model": "openai/a"}},
    {"model_info": {"id": "2"}, "litellm_params": {"model": "openai/b"}},
]
MESSAGES = [{"role": "user", "content": [{"type": "text", "text": "x" * 400}, {"type": "image_url"}]}]


@pytest.fixture
def logger(bundle_folder, tmp_path, monkeypatch):
    """The callback over a stand-in for LiteLLM's base class."""
    return logger_of(bundle_folder, tmp_path, monkeypatch)


@pytest.fixture
def caching_logger(tmp_path, monkeypatch):
    """The same with a prefix cache of 1,024 tokens at `small/0`."""
    bundle = small_bundle()
    bundle.static_signals[[v.PREFIX_CAPACITY_TOKENS, v.PREFIX_TTL_S], 0] = 1024.0, v.UNLIMITED
    bundles.save(bundle, tmp_path / "bundle")
    return logger_of(tmp_path / "bundle", tmp_path, monkeypatch)


def logger_of(bundle_folder, tmp_path, monkeypatch):
    package, module = types.ModuleType("litellm.integrations"), types.ModuleType("litellm.integrations.custom_logger")
    module.CustomLogger = type("CustomLogger", (), {})
    monkeypatch.setitem(sys.modules, "litellm", types.ModuleType("litellm"))
    monkeypatch.setitem(sys.modules, "litellm.integrations", package)
    monkeypatch.setitem(sys.modules, "litellm.integrations.custom_logger", module)
    settings = Settings(str(bundle_folder), str(tmp_path / "log.jsonl"), candidates={"openai/b": "large/0"})
    return adapter.callback(adapter.build(settings))


def kwargs_of(id, **more):
    key = {"user_api_key_metadata": {}, "user_api_key_team_metadata": {"customer_class": "batch"}}
    metadata = key | {"requester_metadata": {"task_type": "code", "customer_class": "premium"}}
    return {"litellm_call_id": id, "metadata": metadata, "stream": False} | more


def payload(**more):
    times = {"startTime": 1000.0, "completionStartTime": 1000.2, "endTime": 1001.0}
    return times | {"prompt_tokens": 90, "completion_tokens": 12, "response_cost": 0.0, "stream": True} | more


def route(logger, id, **more):
    return asyncio.run(logger.async_filter_deployments("chat", DEPLOYMENTS, MESSAGES, kwargs_of(id, **more)))


def send(logger, id, deployment=0, **more):
    chosen = DEPLOYMENTS[deployment]
    kwargs = {"litellm_call_id": id, "model_info": chosen["model_info"], "model": chosen["litellm_params"]["model"]}
    asyncio.run(logger.async_pre_call_deployment_hook(kwargs | more, "acompletion"))


def complete(logger, id, deployment=0, **more):
    chosen = DEPLOYMENTS[deployment]
    kwargs = {"litellm_call_id": id, "model": chosen["litellm_params"]["model"]}
    kwargs["standard_logging_object"] = payload(**more)
    kwargs["litellm_params"] = {"model_info": chosen["model_info"]}
    asyncio.run(logger.async_log_success_event(kwargs, None, None, None))


def records(logger):
    logger.marginroute.afterwards.stop()  # each call above had an event loop of its own
    with open(logger.marginroute.settings.log) as file:
        return [json.loads(line) for line in file]


def test_deployments_come_back_untouched(logger):
    before = json.dumps(DEPLOYMENTS)
    assert route(logger, "a") is DEPLOYMENTS
    assert json.dumps(DEPLOYMENTS) == before
    assert logger.marginroute.errors == {}


def test_an_answer_leaves_the_counters_at_once_and_its_record_waits(logger):
    observer = logger.marginroute
    route(logger, "a")
    send(logger, "a")
    complete(logger, "a")
    assert observer.gateway.pending == observer.gateway.state.in_flight == 0
    assert not os.path.getsize(observer.settings.log)
    observer.gateway.close()
    with open(observer.settings.log) as file:
        assert [json.loads(line)["status"] for line in file] == ["completed"]


def test_one_record_with_class_task_and_tokens(logger):
    route(logger, "a")
    send(logger, "a", 1)
    assert logger.marginroute.gateway.state.counters()["in_flight"].tolist() == [0, 1, 0, 0, 0, 0]
    complete(logger, "a", 1)
    complete(logger, "a", 1)
    (record,) = records(logger)
    assert record["request"]["class_index"] == 2.0  # the team's, not the one that the client claims
    assert record["request"]["task_index"] == 1.0
    assert record["request"]["prompt_tokens"] == 100.0
    assert record["legal"] == ["small/0", "large/0", "shed"]
    assert (record["served_by"], record["prompt_tokens"], record["output_tokens"]) == ("large/0", 90, 12)
    assert record["cost_usd"] == pytest.approx(90 * 4e-7 + 12 * 8e-7)
    assert logger.marginroute.gateway.state.in_flight == 0


def test_retries_are_one_request(logger):
    route(logger, "a")
    for deployment in (0, 1):
        route(logger, "a")
        send(logger, "a", deployment)
        failed = logger.async_post_call_failure_deployment_hook({"litellm_call_id": "a"}, ValueError(), None)
        asyncio.run(failed)
    assert logger.marginroute.gateway.state.in_flight == 0
    asyncio.run(logger.async_post_call_failure_hook({"litellm_call_id": "a"}, ValueError(), None))
    (record,) = records(logger)
    assert record["status"] == "failed"
    assert record["request"]["sequence"] == 0.0
    assert route(logger, "b") is DEPLOYMENTS


def test_price_of_the_gateway_wins_and_stored_answers_teach_nothing(logger):
    state = logger.marginroute.gateway.state
    before = state.view(9).signals.copy()
    for id, more in (("a", {"response_cost": 0.25}), ("b", {"cache_hit": True})):
        route(logger, id)
        send(logger, id)
        complete(logger, id, **more)
    priced, stored = records(logger)
    assert priced["cost_usd"] == 0.25
    assert stored["served_by"] == "cache"
    after = state.view(9).signals
    assert (after[:, 1:] == before[:, 1:]).all()


def test_calls_that_are_not_generation_or_not_to_be_logged_are_left_alone(logger):
    route(logger, "a", litellm_logging_obj=types.SimpleNamespace(call_type="aembedding"))
    route(logger, "b", **{"no-log": True})
    assert logger.marginroute.gateway.pending == 0


def test_first_token_is_read_from_the_logging_object(logger):
    import datetime

    logging_obj = types.SimpleNamespace(call_type="acompletion", completion_start_time=None)
    route(logger, "a", litellm_logging_obj=logging_obj, stream=True)
    send(logger, "a", litellm_logging_obj=logging_obj, stream=True)
    route(logger, "b")
    assert logger.marginroute.gateway.state.counters()["decoding"][0] == 0
    logging_obj.completion_start_time = datetime.datetime.now()
    route(logger, "c")
    assert logger.marginroute.gateway.state.counters()["decoding"][0] == 1


@pytest.mark.parametrize("broken", [None, 7, {}, {"metadata": 3, "litellm_call_id": "x"}])
def test_no_exception_of_ours_reaches_a_request(logger, monkeypatch, caplog, broken):
    for _ in range(3):
        route_ = logger.async_filter_deployments("chat", DEPLOYMENTS, MESSAGES, broken)
        assert asyncio.run(route_) is DEPLOYMENTS
        asyncio.run(logger.async_pre_call_deployment_hook(broken, None))
        asyncio.run(logger.async_post_call_failure_deployment_hook(broken, ValueError(), None))
        asyncio.run(logger.async_post_call_failure_hook(broken, ValueError(), None))
        asyncio.run(logger.async_log_success_event(broken, None, None, None))
    assert logger.marginroute.errors["record of an answer"] == 3
    assert sum("record of an answer failed" in r.message for r in caplog.records) == 1


def test_full_disk_is_counted_not_raised(logger, monkeypatch):
    def full(record):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(logger.marginroute.gateway._records, "write", full)
    route(logger, "a")
    send(logger, "a")
    complete(logger, "a")
    logger.marginroute.afterwards.stop()
    assert logger.marginroute.errors == {"record of an answer": 1}
    assert logger.marginroute.gateway.state.in_flight == logger.marginroute.gateway.pending == 0


def test_silent_requests_are_written_off(bundle, tmp_path):
    from marginroute.facts import Facts
    from marginroute.gateway import Gateway
    from marginroute.record_log import RecordLog

    shadow = Gateway(bundle, RecordLog(tmp_path / "log.jsonl"), stale_after_s=-1.0)
    shadow.decide(Facts("a", 10))
    shadow.sent("a", "small/0", streamed=True)
    shadow.decide(Facts("b", 10))
    assert shadow.pending == 1
    assert shadow.state.in_flight == 0
    shadow.close()
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(line["id"], line["status"]) for line in lines] == [("a", ""), ("b", "")]


@pytest.mark.parametrize(
    ("environ", "text", "says"),
    [
        ({}, None, "MARGINROUTE_BUNDLE is not set"),
        ({"MARGINROUTE_BUNDLE": "b"}, None, "MARGINROUTE_LOG is not set"),
        ({}, "bundel: x", "unknown key 'bundel'"),
        ({}, "- 1", "must map settings"),
        ({}, "a: [", "not YAML"),
        ({}, "{bundle: b, log: l, candidates: [1]}", "candidates must map names"),
    ],
)
def test_settings_say_what_is_wrong(tmp_path, environ, text, says):
    if text is not None:
        (tmp_path / "m.yaml").write_text(text)
        environ = environ | {"MARGINROUTE_CONFIG": str(tmp_path / "m.yaml")}
    with pytest.raises(InputError, match=says):
        settings_from(environ, Settings)


def test_settings_from_file_and_environment(tmp_path):
    (tmp_path / "m.yaml").write_text("bundle: b\nlog: l\ndefault_class: batch\ncandidates: {openai/b: large/0}\n")
    environ = {"MARGINROUTE_CONFIG": str(tmp_path / "m.yaml"), "MARGINROUTE_LOG": "other"}
    settings = settings_from(environ, Settings)
    assert (settings.bundle, settings.log, settings.default_class) == ("b", "other", "batch")
    assert settings.candidates == {"openai/b": "large/0"}


def test_unusable_bundle_turns_shadow_off_and_lets_the_proxy_start(logger, monkeypatch, caplog):
    monkeypatch.setenv("MARGINROUTE_BUNDLE", "/nowhere")
    monkeypatch.setenv("MARGINROUTE_LOG", "unused.jsonl")
    callback = adapter._build(shadow=True)
    assert type(callback).__name__ == "CustomLogger"
    assert "it is off" in caplog.text


def test_default_class_must_be_the_bundles(bundle_folder, tmp_path):
    with pytest.raises(InputError, match=r"default_class 'gold'.*standard"):
        adapter.build(Settings(str(bundle_folder), str(tmp_path / "l"), default_class="gold"))


def test_a_conversation_that_goes_on_finds_its_beginning_where_it_was_sent(caching_logger):
    """1,000 characters and tools first: of the second turn, the blocks of 256 bytes that the first one filled."""
    shadow, asked = caching_logger.marginroute.gateway, []
    state_view = shadow.state.view
    shadow.state.view = lambda *args, **options: asked.append(state_view(*args, **options)) or asked[-1]
    turns = [{"role": "user", "content": "a" * 1000}]
    tools = [{"type": "function", "function": {"name": "look"}}]

    def turn(id, messages):
        kwargs = kwargs_of(id, tools=tools)
        asyncio.run(caching_logger.async_filter_deployments("chat", DEPLOYMENTS, messages, kwargs))
        send(caching_logger, id)
        complete(caching_logger, id, stream=False)

    turn("1", turns)
    turn("2", [*turns, {"role": "assistant", "content": "b" * 400}, {"role": "user", "content": "c" * 600}])
    turn("3", [{"role": "user", "content": "d" * 1000}])
    first, second, third = (view.signals[v.CACHED_TOKENS] for view in asked)
    assert not first.any() and not third.any()
    data = json.dumps(tools, sort_keys=True)
    size, prompt_tokens = len(data) + 1 + 2002, asked[1].request[v.PROMPT_TOKENS]
    blocks = (len(data) + 1 + 1000) // 256
    assert second[0] == pytest.approx(blocks * 256 * prompt_tokens / size, abs=1.0) and not second[1:].any()
    assert shadow.state.counters()["pending_prefill_tokens"].tolist() == [0.0] * 6


def test_prompts_are_not_hashed_for_nothing(logger, monkeypatch):
    monkeypatch.setattr("marginroute.adapters.litellm_observer.block_hashes", lambda *_: 1 / 0)
    route(logger, "1")
    assert logger.marginroute.errors == {}


@pytest.mark.parametrize(
    ("told", "standing", "left"),
    [
        ({}, "within", 1.0),
        ({"user_api_key_metadata": {"standing": "overage", "quota_left": 0}}, "overage", 0.0),
        ({"user_api_key_team_metadata": {"standing": "best_effort", "quota_left": "0.25"}}, "best_effort", 0.25),
        ({"user_api_key_spend": 3.0, "user_api_key_max_budget": 4.0}, "within", 0.25),
        (
            {"user_api_key_spend": 3.0, "user_api_key_max_budget": 4.0}
            | {"user_api_key_team_spend": 9.0, "user_api_key_team_max_budget": 10.0},
            "within",
            0.1,
        ),
        ({"user_api_key_spend": 30.0, "user_api_key_max_budget": 4.0}, "within", 0.0),  # a soft budget
        ({"user_api_key_spend": 1.0, "user_api_key_max_budget": None}, "within", 1.0),
        ({"user_api_key_auth_metadata": {"standing": "broke", "quota_left": True}}, "within", 1.0),
    ],
)
def test_a_customers_account_reaches_the_view(logger, told, standing, left):
    metadata = {
        "requester_metadata": {"standing": "refused", "quota_left": 0.5}
    } | told  # a client's word counts nothing
    route(logger, "a", metadata=metadata)
    send(logger, "a", 1)
    complete(logger, "a", 1)
    (record,) = records(logger)
    assert record["request"]["standing"] == STANDINGS.index(standing)
    assert record["request"]["quota_left"] == pytest.approx(left)
    assert logger.marginroute.errors == {}
    assert len(logger.marginroute.warned) == ("broke" in str(told))
