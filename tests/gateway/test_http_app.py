"""The sidecar's calls without sockets: what they take, what they give, and what the gateway is told."""

import asyncio
import json
from pathlib import Path

import pytest
from bundles import small_bundle

from marginroute import bundle as bundles
from marginroute import view as v
from marginroute.adapters import http_api, schema
from marginroute.adapters.desk import Desk
from marginroute.adapters.http import HttpSettings
from marginroute.adapters.http_app import App
from marginroute.adapters.http_head import Head
from marginroute.errors import InputError


@pytest.fixture
def make(bundle_folder, tmp_path):
    made = []

    def app(token="", folder=bundle_folder, **settings):
        log = str(tmp_path / f"log{len(made)}.jsonl")
        settings = HttpSettings(str(folder), log, **{"mode": "live", **settings})
        made.append(App(Desk(settings, "http"), settings.max_body_bytes, token))
        return made[-1]

    yield app
    for one in made:
        one.desk.close()


def call(app, method, path, body=b"", headers=(), pieces=1):
    """(status, headers, body) of one call whose body comes in pieces."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    step = max(len(data) // pieces, 1)
    parts = [data[at : at + step] for at in range(0, len(data), step)] or [b""]
    left = [{"type": "http.request", "body": p, "more_body": i + 1 < len(parts)} for i, p in enumerate(parts)]
    sent = []

    async def receive():
        return left.pop(0)

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": method, "path": path, "headers": list(headers)}
    asyncio.run(app(scope, receive, send))
    start, end = sent
    return start["status"], dict(start["headers"]), end["body"]


def decide(app, **asked):
    status, _, body = call(app, "POST", "/v1/decide", asked)
    assert status == 200, body
    answer = json.loads(body)
    schema.check(answer, {**http_api.DECISION, "properties": http_api.DECISION["properties"] | REASON})
    return answer


REASON = {"reason_usd": schema.fields({}, closed=False)}


def tell(app, *events):
    status, _, body = call(app, "POST", "/v1/events", {"events": list(events)})
    assert status == 200, body
    return json.loads(body)["known"]


def records(app):
    with open(app.desk.settings.log) as file:
        return [json.loads(line) for line in file]


def test_the_life_of_a_request(make):
    app = make()
    answer = decide(app, id="a", prompt_tokens=120, task="code", streamed=True, explain=True)
    assert answer["acting"] and answer["kind"] == "replica" and answer["reason_usd"]["revenue"] > 0.0
    counters = app.desk.gateway.state.counters
    assert counters()["in_flight"].sum() == 1
    assert tell(app, {"event": "first_token", "id": "a"}, {"event": "progress", "id": "a", "tokens": 30}) == 2
    assert counters()["decoding_tokens"].sum() == 150
    end = {"event": "finished", "id": "a", "status": "completed", "served_by": answer["candidate"]}
    assert tell(app, {**end, "ttft_s": 0.2, "e2e_s": 1.5, "prompt_tokens": 118, "output_tokens": 40}) == 1
    assert tell(app, end) == 0
    (record,) = records(app)
    assert (record["mode"], record["status"], record["served_by"]) == ("live", "completed", answer["candidate"])
    assert (record["ttft_s"], record["e2e_s"], record["output_tokens"]) == (0.2, 1.5, 40)
    assert record["request"]["task_index"] == 1.0 and record["cost_usd"] > 0.0
    assert app.desk.gateway.state.in_flight == 0


def test_an_attempt_that_failed_is_decided_again_elsewhere(make):
    app = make()
    first = decide(app, id="a", prompt_tokens=10)
    assert decide(app, id="a", prompt_tokens=10) == first  # asked twice
    tell(app, {"event": "attempt_failed", "id": "a"})
    second = decide(app, id="a", prompt_tokens=10)
    assert second["attempt"] == 2 and second["candidate"] != first["candidate"]


def test_shadow_mode_says_so_and_counts_what_the_gateway_did(make):
    app = make(mode="shadow")
    assert not decide(app, id="a")["acting"]
    assert app.desk.gateway.state.in_flight == 0
    tell(app, {"event": "sent", "id": "a", "candidate": "small/0"})
    assert app.desk.gateway.state.counters()["in_flight"][0] == 1


def test_nothing_is_sent_that_the_caller_does_not_send(make):
    app = make()
    decide(app, sent=False)
    assert app.desk.gateway.state.in_flight == 0


def test_prompt_tokens_are_estimated_and_the_estimate_learns(make):
    app = make()
    messages = [{"role": "user", "content": [{"type": "text", "text": "x" * 400}]}]
    decide(app, id="a", messages=messages)
    tell(app, {"event": "finished", "id": "a", "status": "completed", "prompt_tokens": 200, "output_tokens": 5})
    decide(app, id="b", prompt="x" * 400)
    tell(app, {"event": "finished", "id": "b", "status": "failed"})
    first, second = (r["request"]["prompt_tokens"] for r in records(app))
    assert first == 100.0 and 100.0 < second <= 200.0
    assert "xxxx" not in Path(app.desk.settings.log).read_text()


def test_lengths_of_prompts_are_not_kept_for_ever(make):
    app = make()
    for i in range(1500):
        app._remember(f"r{i}", 9)
    assert len(app._characters) <= 1001


def test_prefixes_are_recognised(make, tmp_path):
    bundle = small_bundle()
    bundle.static_signals[[v.PREFIX_CAPACITY_TOKENS, v.PREFIX_TTL_S], 0] = 4096.0, v.UNLIMITED
    bundles.save(bundle, tmp_path / "caching")
    app = make(folder=tmp_path / "caching")
    decide(app, id="a", prompt="y" * 2048, available=["small/0"])
    decide(app, id="b", prompt="y" * 2048, available=["small/0"])
    for id in "ab":
        tell(app, {"event": "finished", "id": id, "status": "completed", "served_by": "small/0"})
    cached = [app.desk.gateway.state.view(512, hashes=()).signals[v.CACHED_TOKENS, 0]]
    assert cached == [0.0]
    assert [r["request"]["prompt_tokens"] for r in records(app)] == [512.0, 512.0]


def test_endpoints_available_and_capabilities(make):
    app = make(endpoints={"small/0": "http://10.0.0.1:8000"}, can=("shed", "cache", "defer"))
    assert decide(app)["endpoint"] == "http://10.0.0.1:8000"
    assert decide(app, available=["large/0"])["candidate"] == "large/0"
    assert decide(app, cached_tier="large")["kind"] == "cache"


def test_scraped_metrics_reach_the_view(make):
    app = make()
    told = {"event": "scraped", "candidate": "large/0", "waiting": 3, "running": 2, "kv_usage": 0.5, "ago_s": 1.0}
    assert tell(app, told) == 1
    signals = app.desk.gateway.state.view(10).signals[:, 1]
    assert (signals[v.WAITING], signals[v.RUNNING], signals[v.KV_USAGE]) == (3.0, 2.0, 0.5)
    assert 1.0 <= signals[v.TELEMETRY_AGE_S] < 5.0


def test_a_judgement_of_an_answer_reaches_the_view(make):
    app = make()
    decide(app, id="a", prompt_tokens=100)
    assert tell(app, {"event": "finished", "id": "a", "status": "completed", "served_by": "large/0"}) == 1
    assert tell(app, {"event": "judged", "id": "a", "good": False}) == 1
    assert tell(app, {"event": "judged", "id": "a", "good": False}) == 0  # one answer, one judgement
    assert app.desk.gateway.state.view(10).signals[v.SURPRISE, 1] < 0.0


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("/v1/decide", b"", 400, "no JSON"),
        ("/v1/decide", b'{"id": "a"', 400, "no JSON"),
        ("/v1/decide", b'{"difficulty_signal": NaN}', 400, "no JSON"),
        ("/v1/decide", b'{"difficulty_signal": 1e999}', 422, "out of range"),
        ("/v1/decide", b"[" * 100_000, 400, "no JSON"),
        ("/v1/decide", b"\xff\xfe", 400, "no JSON"),
        ("/v1/decide", [], 422, "legal is object"),
        ("/v1/decide", {"id": ""}, 422, "body.id has 0 characters"),
        ("/v1/decide", {"prompt_tokens": True}, 422, "legal is integer"),
        ("/v1/decide", {"prompt_tokens": -1}, 422, "out of range"),
        ("/v1/decide", {"prompt_tokens": 10**400}, 422, "out of range"),
        ("/v1/decide", {"clas": "premium"}, 422, "body.clas is unknown"),
        ("/v1/decide", {"available": ["huge/7"]}, 422, "available[0] = 'huge/7' is unknown; legal: small/0"),
        ("/v1/decide", {"cached_tier": "huge"}, 422, "'huge' is unknown"),
        ("/v1/decide", {"messages": ["hi"]}, 422, "body.messages[0] is of the wrong type"),
        ("/v1/events", {}, 422, "body.events is missing"),
        ("/v1/events", {"events": [{"event": "sent", "id": "a"}]}, 422, "body.events[0].candidate is missing"),
        ("/v1/events", {"events": [{"event": "born"}]}, 422, "event is missing or unknown; legal: sent"),
        ("/v1/events", {"events": [{}] * 1001}, 422, "1001 items"),
        (
            "/v1/events",
            {"events": [{"event": "finished", "id": "a", "status": "completed", "served_by": "x"}]},
            422,
            "'x'",
        ),
    ],
)
def test_what_is_refused(make, path, body, status, words):
    app = make()
    got, headers, answer = call(app, "POST", path, body)
    assert (got, headers[b"content-type"]) == (status, b"application/json")
    assert words in json.loads(answer)["error"] and app.desk.gateway.pending == 0


def test_events_are_taken_together_or_not_at_all(make):
    app = make()
    decide(app, id="a")
    good = {"event": "finished", "id": "a", "status": "completed"}
    assert call(app, "POST", "/v1/events", {"events": [good, {"event": "sent", "id": "a"}]})[0] == 422
    assert app.desk.gateway.pending == 1


@pytest.mark.parametrize("stated", [True, False])
def test_a_body_beyond_the_limit_is_refused_without_reading_it_all(make, stated):
    app = make(max_body_bytes=1000)
    headers = [(b"content-length", b"100000")] if stated else []
    status, told, _ = call(app, "POST", "/v1/decide", b"x" * 100_000, headers, pieces=100)
    assert status == 413 and told[b"connection"] == b"close"
    assert call(app, "POST", "/v1/decide", {"id": "a"}, pieces=5)[0] == 200


def test_paths_and_methods(make):
    app = make()
    assert call(app, "GET", "/v2/decide")[0] == 404
    status, headers, _ = call(app, "GET", "/v1/decide")
    assert (status, headers[b"allow"]) == (405, b"POST")
    assert call(app, "DELETE", "/health")[0] == 405
    status, headers, body = call(app, "HEAD", "/health")
    assert (status, body) == (200, b"") and int(headers[b"content-length"]) > 0


def test_the_token(make):
    app = make(token="a-token-of-some-length")
    assert call(app, "POST", "/v1/decide", {})[0] == 401
    assert call(app, "GET", "/metrics", headers=[(b"authorization", b"Bearer a-token-of-some-lengtH")])[0] == 401
    for path in ("/health", "/ready", "/openapi.json"):
        assert call(app, "GET", path)[0] == 200
    assert call(app, "POST", "/v1/decide", {}, [(b"authorization", b"Bearer a-token-of-some-length")])[0] == 200


@pytest.mark.parametrize(
    ("shown", "may"),
    [
        (b"Bearer a-token-of-some-length", True),
        (b"bearer a-token-of-some-length", True),
        (b"BEARER  a-token-of-some-length ", True),
        (b"bearer A-token-of-some-length", False),
        (b"Basic a-token-of-some-length", False),
        (b"a-token-of-some-length", False),
        (b"Bearer", False),
        (b"", False),
    ],
)
def test_the_scheme_is_read_in_any_case_on_both_ways_in_and_the_token_is_not(make, shown, may):
    """RFC 9110, 11.1 and 11.4; every path that asks for the token."""
    app = make(token="a-token-of-some-length")
    for path in ("/v1/scale", "/v1/status", "/metrics"):
        assert (call(app, "GET", path, headers=[(b"authorization", shown)])[0] != 401) == may
        assert app.at_once(Head(b"GET", path, 0, shown)) == may
    assert (call(app, "POST", "/v1/decide", {}, [(b"authorization", shown)])[0] == 200) == may
    assert app.at_once(Head(b"POST", "/v1/decide", 2, shown)) == may


def test_stopping_is_told(make):
    app = make()
    assert call(app, "GET", "/ready")[0] == 200
    app.stopping = True
    assert call(app, "GET", "/ready")[0] == 503 and call(app, "GET", "/health")[0] == 200


def test_our_own_mistakes_are_one_sentence(make, monkeypatch):
    app = make()
    monkeypatch.setattr(app.desk.gateway, "decide", lambda facts: 1 / 0)
    status, _, body = call(app, "POST", "/v1/decide", {})
    assert status == 500 and "route as without us" in body.decode() and "Zero" not in body.decode()
    assert app.desk.errors == {"call of /v1/decide": 1}


def test_metrics(make):
    pytest.importorskip("prometheus_client", reason="pip install 'marginroute[http]'")
    app = make()
    choice = decide(app)["candidate"]
    status, headers, body = call(app, "GET", "/metrics")
    text = body.decode()
    assert status == 200 and headers[b"content-type"].startswith(b"text/plain")
    assert f'marginroute_decisions_total{{acting="true",candidate="{choice}",guard="",kind="replica"}} 1.0' in text
    assert f'marginroute_in_flight{{candidate="{choice}"}} 1.0' in text
    assert 'marginroute_decision_seconds_bucket{le="+Inf"} 1.0' in text


def test_the_document_is_plain_openapi(make):
    document = json.loads(call(make(), "GET", "/openapi.json")[2])
    assert document["openapi"] == "3.0.3"
    assert set(document["paths"]) == {
        "/v1/decide", "/v1/events", "/v1/hedge", "/v1/scale", "/v1/status", "/metrics", "/health", "/ready",
        "/openapi.json",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"can": ("fly",)}, "can: 'fly' is nothing that http can do; legal: shed"),
        ({"endpoints": {"x": "y"}}, "endpoints: 'x'"),
    ],
)
def test_bad_settings(make, settings, words):
    with pytest.raises(InputError, match=words):
        make(**settings)
