"""A gateway and its providers' rate limits: who is legal, what adapters tell, what operator, bundle and metrics say."""

import asyncio
import dataclasses
import json
from types import SimpleNamespace

import pytest
from bundles import Records, small_bundle
from test_http_app import call, decide, make, tell  # noqa: F401 (make is a fixture)
from test_litellm_observer import complete, kwargs_of, logger_of, send

from marginroute import bundle as bundles
from marginroute import card
from marginroute.adapters import metrics
from marginroute.adapters.desk import read_settings
from marginroute.adapters.http import HttpSettings
from marginroute.bundle_files import digest_of
from marginroute.errors import InputError
from marginroute.facts import Facts, Outcome
from marginroute.gateway import Gateway
from marginroute.modes import ModeSettings
from marginroute.operation import open_gateway
from marginroute.rate_limits import RateLimit

THREE = RateLimit(requests_per_minute=30.0, burst_requests=3.0)
API = ("api",)


class Clock:
    now_s = 1000.0

    def __call__(self):
        return self.now_s


def bundle_of(**limits):
    return dataclasses.replace(small_bundle(), rate_limits=limits)


def gateway_of(can=("shed",), bundle=None, **more):
    clock = Clock()
    made = Gateway(bundle or bundle_of(api=THREE), Records(), ModeSettings("live"), can, clock=clock, **more)
    return made, clock


def serve(gateway, id, output_tokens=50, status="completed", **facts):
    """A request that the API gets and answers at once; the decision on it."""
    decision = gateway.decide(Facts(id, 100, **facts)).decision
    if decision.name == "api":
        gateway.sent(id, "api", True)
    answer = Outcome(status, "api" if status == "completed" else "", 0.1, 1.0, 0.1, 1.0, 100, output_tokens)
    gateway.finished(id, answer)
    return decision


def test_a_provider_is_left_out_while_its_limit_is_spent():
    gateway, clock = gateway_of()
    assert [serve(gateway, f"{i}", available=API).name for i in range(5)] == ["api"] * 3 + ["shed"] * 2
    assert serve(gateway, "both").name in ("small/0", "large/0")
    last = [record.legal for record in gateway._records][-2:]
    assert last == [["shed"], ["small/0", "large/0", "shed"]]
    clock.now_s += 2.0
    assert [serve(gateway, f"later {i}", available=API).name for i in range(2)] == ["api", "shed"]
    assert gateway.state.rates.left_out == {2: 4}
    assert {guard for _, _, guard, _ in gateway.decided} == {""}  # a spent limit is not a missing candidate
    assert gateway.decide(Facts("nobody", 100, available=())).decision.guard == "missing"


def test_tokens_of_prompts_and_answers():
    """1,000 tokens, 10 a second: prompts of 100; answers of 50, of none where refused, of unknown length the mean's."""
    gateway, clock = gateway_of(bundle=bundle_of(api=RateLimit(tokens_per_minute=600.0, burst_tokens=1000.0)))
    left = gateway.state.rates._buckets[2].tokens_left
    serve(gateway, "a", available=API)
    assert left(clock.now_s) == 850.0
    serve(gateway, "b", status="failed", available=API)
    assert left(clock.now_s) == 850.0
    serve(gateway, "c", output_tokens=None, available=API)
    mean = float(gateway.state._lengths.tokens[0, 0])
    assert left(clock.now_s) == pytest.approx(750.0 - mean)
    gateway.decide(Facts("d", 100, available=API))
    gateway.sent("d", "api", True)
    gateway.first_token("d")
    gateway.progress("d", 7)
    gateway.finished("d", Outcome("abandoned"))
    assert left(clock.now_s) == pytest.approx(650.0 - mean - 7.0)
    clock.now_s += 1e4
    gateway.decide(Facts("e", 100, available=API))
    gateway.sent("e", "api", True)
    gateway.sent("e", "api", True)  # told twice
    assert left(clock.now_s) == 900.0


def test_who_cannot_shed_lets_the_provider_refuse():
    gateway, _ = gateway_of(can=())
    assert {serve(gateway, f"{i}", available=API).name for i in range(6)} == {"api"}
    assert gateway.state.rates.left_out == {}


def test_a_second_call_goes_to_nobody_whose_limit_is_spent():
    gateway, _ = gateway_of(can=("shed", "hedge"))
    for i in range(3):
        serve(gateway, f"{i}", available=API)
    gateway.decide(Facts("late", 100, available=("small/0",)))
    gateway.sent("late", "small/0", True)
    assert gateway.hedge("late", available=("small/0", "api")).decision.name == "small/0"


def test_a_failed_call_says_until_when():
    gateway, clock = gateway_of()
    gateway.decide(Facts("a", 100, available=API))
    gateway.sent("a", "api", True)
    gateway.attempt_failed("a", retry_after_s=20.0)
    assert gateway.decide(Facts("a", 100, available=API)).decision.name == "shed"
    assert gateway.decide(Facts("b", 100, available=API)).decision.name == "shed"
    clock.now_s += 20.0
    assert gateway.decide(Facts("c", 100, available=API)).decision.name == "api"


def test_a_new_bundle_knows_what_was_used_and_the_operator_has_the_last_word():
    gateway, _ = gateway_of()
    for i in range(3):
        serve(gateway, f"{i}", available=API)
    gateway.swap(bundle_of(api=RateLimit(30.0, 5.0)))
    assert serve(gateway, "after", available=API).name == "shed"
    none, _ = gateway_of(rate_limits={"api": RateLimit()})
    assert {serve(none, f"{i}", available=API).name for i in range(20)} == {"api"}


def test_bundles_with_limits_and_from_before_them(tmp_path):
    limits = {"api": RateLimit(90.0, tokens_per_minute=1e5)}
    bundles.save(bundle_of(**limits), tmp_path / "with")
    assert bundles.load(tmp_path / "with").rate_limits == limits
    assert "requests_per_minute: 90" in card.model_card(tmp_path / "with")
    path = tmp_path / "with" / "manifest.json"
    manifest = json.loads(path.read_text())
    assert manifest["rate_limits"] == {"api": {"requests_per_minute": 90.0, "tokens_per_minute": 1e5}}
    del manifest["rate_limits"]
    manifest["digest"] = digest_of(manifest)
    path.write_text(json.dumps(manifest))
    assert bundles.load(tmp_path / "with").rate_limits == {}


def test_settings(bundle_folder, tmp_path):
    path = tmp_path / "settings.yaml"
    text = f"bundle: {bundle_folder}\nlog: {tmp_path / 'log.jsonl'}\nrate_limits: "
    path.write_text(text + "{api: {requests_per_minute: 30, burst_requests: 3}}\n")
    gateway = open_gateway(read_settings(HttpSettings, str(path), {}))
    assert [serve(gateway, f"{i}", available=API).name for i in range(4)] == ["api"] * 3 + ["shed"]
    gateway.close()
    for wrong, says in (("{gpt: {}}", "'gpt' is no provider"), ("{api: {rpm: 3}}", r"rate_limits\.api\.rpm")):
        path.write_text(text + wrong)
        with pytest.raises(InputError, match=says):
            open_gateway(read_settings(HttpSettings, str(path), {}))


def test_metrics_count_what_was_left_out():
    pytest.importorskip("prometheus_client", reason="pip install prometheus-client")
    gateway, _ = gateway_of()
    for i in range(5):
        serve(gateway, f"{i}", available=API)
    source = SimpleNamespace(gateway=gateway, took=metrics.Histogram(), errors={})
    assert 'marginroute_rate_limited_total{candidate="api"} 2.0' in metrics.exposition(source).decode()


def test_the_sidecar_is_told(make):  # noqa: F811
    app = make(rate_limits={"api": {"requests_per_minute": 6}})
    assert decide(app, prompt_tokens=10, available=["api"])["candidate"] == "api"
    assert tell(app, {"event": "rate_limit", "candidate": "api", "requests_left": 0}) == 1
    assert decide(app, prompt_tokens=10, available=["api"])["candidate"] == "shed"
    assert tell(app, {"event": "rate_limit", "candidate": "small/0", "tokens_left": 0}) == 0  # has none
    other = make()
    id = decide(other, prompt_tokens=10, available=["api"])["id"]
    assert tell(other, {"event": "attempt_failed", "id": id, "retry_after_s": 30}) == 1
    assert decide(other, prompt_tokens=10, available=["api"])["candidate"] == "shed"
    wrong = {"events": [{"event": "rate_limit", "candidate": "api", "retry_after_s": -1}]}
    assert call(other, "POST", "/v1/events", wrong)[0] == 422


BOUGHT = {"model_info": {"id": "3", "marginroute_candidate": "api"}, "litellm_params": {"model": "openai/c"}}


class RateLimitError(Exception):
    """As litellm.RateLimitError is."""

    def __init__(self, category="vendor_rate_limit", **headers):
        self.status_code, self.category = 429, category
        self.litellm_response_headers = {name.replace("_", "-"): x for name, x in headers.items()}


@pytest.fixture
def logger(tmp_path, monkeypatch):
    bundles.save(bundle_of(api=RateLimit(6.0, 30.0)), tmp_path / "bundle")
    monkeypatch.setattr("test_litellm_observer.DEPLOYMENTS", [BOUGHT])
    return logger_of(tmp_path / "bundle", tmp_path, monkeypatch)


def route(logger, id):
    logger.marginroute.route("chat", [BOUGHT], [{"role": "user", "content": "x" * 40}], kwargs_of(id))
    send(logger, id)
    return logger.marginroute.gateway.state.rates.spent(10)


@pytest.mark.parametrize("stream", [False, True])
def test_litellm_tells_what_is_left(logger, stream):
    assert route(logger, "a") == []
    headers = {"x_ratelimit_remaining_requests": 0, "llm_provider-x-ratelimit-remaining-requests": "0"}
    complete(logger, "a", stream=stream, hidden_params={"additional_headers": headers})
    assert logger.marginroute.gateway.state.rates.spent(10) == [2] and logger.marginroute.errors == {}


@pytest.mark.parametrize(
    ("error", "spent"),
    [
        (RateLimitError(retry_after="30"), [2]),
        (RateLimitError(), [2]),
        (RateLimitError("litellm_rate_limit", retry_after="60"), []),  # of LiteLLM's own
        (ValueError(), []),
    ],
)
def test_litellm_tells_of_a_refusal(logger, error, spent):
    route(logger, "a")
    asyncio.run(logger.async_post_call_failure_deployment_hook({"litellm_call_id": "a"}, error, None))
    assert logger.marginroute.gateway.state.rates.spent(10) == spent and logger.marginroute.errors == {}
