"""The endpoint picker without Envoy: what it answers to ext_proc messages, and what the gateway is told."""

import json

import pytest
from bundles import TERMS, small_bundle

pytest.importorskip("envoy.service.ext_proc.v3", reason="pip install 'marginroute[envoy]'")

from envoy.service.accesslog.v3 import als_pb2
from envoy.service.ext_proc.v3 import external_processor_pb2 as protos

from marginroute import bundle as bundles
from marginroute.adapters import envoy_access_log
from marginroute.adapters import envoy_messages as em
from marginroute.adapters.desk import Desk
from marginroute.adapters.envoy import EnvoySettings, Picker, configuration
from marginroute.adapters.envoy_exchange import Exchange
from marginroute.adapters.listen import Listen
from marginroute.errors import InputError

ENDPOINTS = {"small/0": "10.0.0.1:80", "large/0": "10.0.0.2:80"}
CALL = {"model": "chat", "messages": [{"role": "user", "content": "How are you? " * 10}]}
NAMES = {address: name for name, address in ENDPOINTS.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A bundle with a class whose requests are worth nothing."""
    made = small_bundle()
    made.terms["batch"] = TERMS | {
        "input_usd_per_token": 0.0,
        "output_usd_per_token": 0.0,
        "unserved_credit_share": 0.0,
    }
    path = tmp_path_factory.mktemp("bundle") / "small"
    bundles.save(made, path)
    return path


@pytest.fixture
def make(folder, tmp_path):
    made = []

    def picker(**settings):
        log = str(tmp_path / f"log{len(made)}.jsonl")
        values = {"mode": "live", "endpoints": ENDPOINTS, **settings}
        made.append(Picker(Desk(EnvoySettings(str(folder), log, **values), "envoy-buffered")))
        return made[-1]

    yield picker
    for one in made:
        one.desk.close()


def request(mode=em.NONE, end=False, response_mode=em.NONE, observed=False, allowed=None, **headers):
    message = protos.ProcessingRequest()
    told = {
        ":path": "/v1/chat/completions",
        ":method": "POST",
        "x-request-id": "r1",
        "content-length": "400",
        **headers,
    }
    for name, value in told.items():
        header = message.request_headers.headers.headers.add()
        header.key, header.raw_value = name.replace("_", "-"), value.encode()
    message.request_headers.end_of_stream = end
    message.protocol_config.request_body_mode = mode
    message.protocol_config.response_body_mode = response_mode
    message.observability_mode = observed
    if allowed is not None:
        message.metadata_context.filter_metadata[em.SUBSET_NAMESPACE][em.SUBSET] = allowed
    return message


def body(data, end=True, observed=False):
    message = protos.ProcessingRequest(observability_mode=observed)
    message.request_body.body, message.request_body.end_of_stream = data, end
    return message


def response(status="200", end=False, served="", kind="application/json", headers=(), **more):
    message = protos.ProcessingRequest(**more)
    for name, value in {":status": status, "content-type": kind, **dict(headers)}.items():
        header = message.response_headers.headers.headers.add()
        header.key, header.raw_value = name, value.encode()
    message.response_headers.end_of_stream = end
    if served:
        message.metadata_context.filter_metadata[em.NAMESPACE][em.SERVED] = served
    return message


def piece(data, end=False):
    message = protos.ProcessingRequest()
    message.response_body.body, message.response_body.end_of_stream = data, end
    return message


def play(exchange, *messages):
    answers = []
    for message in messages:
        answers.append(exchange.on(message))
        exchange.settle()
    return answers


def records(picker):
    with open(picker.settings.log) as file:
        return [json.loads(line) for line in file]


def picked(answer, part="request_headers"):
    """The endpoint that an answer names, the same in header and metadata."""
    (header,) = getattr(answer, part).response.header_mutation.set_headers
    in_metadata = answer.dynamic_metadata[em.NAMESPACE][em.DESTINATION]
    assert header.header.key == em.DESTINATION and header.header.raw_value.decode() == in_metadata
    return in_metadata


def test_headers_alone(make):
    picker = make()
    exchange = Exchange(picker)
    ((answer,),) = play(exchange, request())
    assert picked(answer) in NAMES
    assert picker.gateway.state.in_flight == 1
    (ack,) = play(exchange, response(end=True, served="10.0.0.2:80"))[0]
    assert ack.WhichOneof("response") == "response_headers"
    (record,) = records(picker)
    assert (record["mode"], record["status"], record["served_by"]) == ("live", "completed", "large/0")
    assert record["request"]["prompt_tokens"] == 80.0  # a fifth of the content length
    assert picker.gateway.state.in_flight == 0 and not picker.live


@pytest.mark.parametrize(
    ("status", "headers"), [("429", {"retry-after": "30"}), ("200", {"x-ratelimit-remaining-requests": "0"})]
)
def test_a_provider_says_that_its_limit_is_spent(make, status, headers):
    picker = make(endpoints={"api": "cluster:api"}, rate_limits={"api": {"requests_per_minute": 6}})
    said = response(status, served="cluster:api", headers=headers, end=True)
    first, _ = play(Exchange(picker), request(end=True), said)
    assert not first[0].HasField("immediate_response")
    (refused,) = play(Exchange(picker), request(end=True))
    assert refused[0].immediate_response.status.code == 429


@pytest.mark.parametrize("mode", [em.BUFFERED, em.BUFFERED_PARTIAL])
def test_a_buffered_body_is_read(make, mode):
    picker, data = make(), json.dumps(CALL).encode()
    first, second = play(Exchange(picker), request(mode), body(data))
    assert first[0] == picker.messages.go_on["request_headers"]
    assert picked(second[0], "request_body") in NAMES
    assert not second[0].request_body.response.HasField("body_mutation")
    assert picker.live["r1"].length == len(CALL["messages"][0]["content"])


def test_full_duplex_holds_the_body_and_passes_all_of_it_on(make):
    picker = make()
    data = json.dumps({**CALL, "padding": "x" * 200_000}).encode()
    pieces = [data[at : at + 50_000] for at in range(0, len(data), 50_000)]
    exchange = Exchange(picker)
    answers = play(exchange, request(em.FULL_DUPLEX), *(body(x, x is pieces[-1]) for x in pieces))
    assert [len(a) for a in answers[:-1]] == [0] * len(pieces)
    first, *rest = answers[-1]
    assert picked(first) in NAMES
    streamed = [r.request_body.response.body_mutation.streamed_response for r in rest]
    assert b"".join(s.body for s in streamed) == data
    assert [s.end_of_stream for s in streamed] == [False] * (len(streamed) - 1) + [True]
    assert max(len(s.body) for s in streamed) <= em.CHUNK_BYTES


def test_full_duplex_does_not_hold_more_than_the_limit(make):
    picker = make(max_body_bytes=1000)
    exchange = Exchange(picker)
    answers = play(exchange, request(em.FULL_DUPLEX), *(body(b"x" * 600, end=i == 3) for i in range(4)))
    assert [len(a) for a in answers] == [0, 0, 2, 1, 1]
    assert picked(answers[2][0]) in NAMES and len(exchange._body) == 0
    last = answers[-1][0].request_body.response.body_mutation.streamed_response
    assert (last.body, last.end_of_stream) == (b"x" * 600, True)


@pytest.mark.parametrize("part", ["request_headers", "request_body"])
def test_the_model_is_renamed_where_the_body_is_shown(make, part):
    picker = make(models={"small": "llama-8b", "large/0": "llama-70b"})
    data = json.dumps(CALL).encode()
    if part == "request_body":
        answer = play(Exchange(picker), request(em.BUFFERED), body(data))[-1][0]
        new = answer.request_body.response.body_mutation.body
    else:
        answer, *rest = play(Exchange(picker), request(em.FULL_DUPLEX), body(data))[-1]
        assert not answer.request_headers.response.HasField("body_mutation")
        new = b"".join(r.request_body.response.body_mutation.streamed_response.body for r in rest)
    model = {"small/0": "llama-8b", "large/0": "llama-70b"}[NAMES[picked(answer, part)]]
    assert json.loads(new) == {**CALL, "model": model}


def test_a_stream_tells_first_token_and_usage(make):
    picker = make()
    exchange = Exchange(picker)
    play(exchange, request(response_mode=em.STREAMED), response(served="10.0.0.1:80", kind="text/event-stream"))
    counters = picker.gateway.state.counters()
    assert counters["decoding"].sum() == 0
    play(exchange, *(piece(b'data: {"delta": "a"}\n\n') for _ in range(20)))
    counters = picker.gateway.state.counters()
    assert counters["decoding"][0] == 1 and counters["decoding_tokens"][0] >= 16
    play(exchange, piece(b'data: {"usage": {"prompt_tokens": 31, "completion_tokens": 20}}\n\ndata: [DONE]\n\n', True))
    (record,) = records(picker)
    assert (record["prompt_tokens"], record["output_tokens"], record["served_by"]) == (31, 20, "small/0")
    assert 0.0 <= record["ttft_s"] <= record["e2e_s"]
    assert picker.per_byte.value == pytest.approx((0.2 + 31 / 400) / 2)


def test_a_stream_without_usage_counts_its_events(make):
    picker = make()
    seam = [b"data: x\n\nda", b"ta: y\n\n", b"data: [DONE]\n\n"]
    messages = [*(piece(x) for x in seam), piece(b"", True)]
    headers = response(served="10.0.0.1:80", kind="text/event-stream")
    play(Exchange(picker), request(response_mode=em.STREAMED), headers, *messages)
    assert records(picker)[0]["output_tokens"] == 2


def test_full_duplex_answers_pass_unchanged(make):
    picker, data = make(), b"z" * 130_000
    exchange = Exchange(picker)
    mode = request(em.FULL_DUPLEX, response_mode=em.FULL_DUPLEX)
    answers = play(exchange, mode, body(b"{}"), response(), piece(data), piece(b"", True))
    pieces = [a.response_body.response.body_mutation.streamed_response for a in (*answers[-2], *answers[-1])]
    assert b"".join(p.body for p in pieces) == data
    assert [p.end_of_stream for p in pieces] == [False, False, False, True]


@pytest.mark.parametrize("allowed", [["10.0.0.2:80", "10.0.0.9:80"], "10.0.0.2:80 , 10.0.0.9:80"])
def test_only_the_allowed_endpoints_are_picked(make, allowed):
    picker = make()
    ((answer,),) = play(Exchange(picker), request(allowed=allowed))
    assert picked(answer) == "10.0.0.2:80"


@pytest.mark.parametrize("allowed", [[], ["10.0.0.9:80"], ""])
def test_503_where_none_is_allowed(make, allowed):
    picker = make()
    ((answer,),) = play(Exchange(picker), request(allowed=allowed))
    assert answer.immediate_response.status.code == 503
    assert records(picker)[0]["status"] == "shed" and picker.gateway.state.in_flight == 0


def test_429_where_the_bundle_sheds(make):
    picker = make()
    ((answer,),) = play(Exchange(picker), request(x_customer_class="batch"))
    refusal = answer.immediate_response
    assert refusal.status.code == 429
    told = {h.header.key: h.header.raw_value.decode() for h in refusal.headers.set_headers}
    assert int(told["retry-after"]) >= 1
    assert json.loads(refusal.body)["error"]["code"] == 429
    (record,) = records(picker)
    assert (record["choice"], record["status"]) == ("shed", "shed")


def test_shadow_mode_changes_nothing_and_sees_who_served(make):
    picker = make(mode="shadow")
    messages = [request(x_customer_class="batch"), response(served="10.0.0.1:80")]
    exchange = Exchange(picker)
    answers = play(exchange, *messages)
    assert [a for (a,) in answers] == [picker.messages.go_on[p] for p in ("request_headers", "response_headers")]
    assert picker.gateway.state.counters()["in_flight"][0] == 1
    exchange.closed()
    picker.sweep(1e12)
    (record,) = records(picker)
    assert (record["mode"], record["choice"], record["served_by"]) == ("shadow", "shed", "small/0")


def test_observing_answers_nothing_and_reads_the_body(make):
    picker = make(mode="shadow")
    data = json.dumps(CALL).encode()
    messages = [request(em.STREAMED, observed=True), body(data[:40], False, True), body(data[40:], True, True)]
    exchange = Exchange(picker)
    assert play(exchange, *messages) == [[], [], []]
    assert exchange.read and exchange.verdict is not None


def test_observing_headers_alone(make):
    picker = make(mode="shadow")
    exchange = Exchange(picker)
    play(exchange, request(observed=True), response(served="10.0.0.1:80", observability_mode=True))
    assert exchange.verdict is not None and picker.gateway.state.counters()["in_flight"][0] == 1


def test_observing_in_live_mode_decides_nothing(make):
    picker = make()
    exchange = Exchange(picker)
    assert play(exchange, request(observed=True), response(observability_mode=True)) == [[], []]
    assert exchange.verdict is None and not picker.live


@pytest.mark.parametrize("path", ["/v1/models", "/v1/embeddings", "/metrics", "/"])
def test_other_calls_pass(make, path):
    picker = make()
    exchange = Exchange(picker)
    message = request(**{":path": path})
    assert play(exchange, message) == [[picker.messages.go_on["request_headers"]]]
    play(exchange, response(end=True))
    exchange.closed()
    assert picker.gateway.pending == 0 and not picker.live


def test_a_retry_elsewhere_moves_what_is_in_flight(make):
    picker = make(retry_next=True)
    ((answer,),) = play(exchange := Exchange(picker), request())
    first, second = picked(answer).split(",")
    assert {first, second} == set(NAMES)
    play(exchange, response(served=second))
    in_flight = picker.gateway.state.counters()["in_flight"]
    index = list(ENDPOINTS).index(NAMES[second])
    assert in_flight[index] == 1 and in_flight.sum() == 1


@pytest.mark.parametrize(("code", "status"), [("500", "failed"), ("429", "failed"), ("400", "abandoned")])
def test_what_codes_say(make, code, status):
    picker = make()
    play(Exchange(picker), request(), response(code, end=True))
    (record,) = records(picker)
    assert (record["status"], record["served_by"]) == (status, "")


def test_a_client_that_hangs_up_leaves_nothing(make):
    picker = make()
    exchange = Exchange(picker)
    play(exchange, request(response_mode=em.STREAMED), response())
    exchange.closed()
    assert [r["status"] for r in records(picker)] == ["abandoned"]
    assert picker.gateway.state.in_flight == 0 and not picker.live


def test_the_end_is_assumed_where_nothing_reports_it(make):
    picker = make(assumed_answer_s=5.0)
    exchange = Exchange(picker)
    play(exchange, request(), response(served="10.0.0.1:80"))
    exchange.closed()
    assert picker.gateway.state.in_flight == 1
    picker.sweep(1e12)
    assert picker.gateway.state.in_flight == 0 and records(picker)[0]["status"] == "completed"


def entry(id, code=200, address="10.0.0.2", seconds=1.5, hung_up=False):
    message = als_pb2.StreamAccessLogsMessage()
    one = message.http_logs.log_entry.add()
    one.request.request_id, one.response.response_code.value = id, code
    one.common_properties.duration.FromMilliseconds(int(1000 * seconds))
    one.common_properties.response_flags.downstream_connection_termination = hung_up
    if address:
        one.common_properties.upstream_remote_address.socket_address.address = address
        one.common_properties.upstream_remote_address.socket_address.port_value = 80
    return message


@pytest.mark.parametrize(
    ("said", "status", "served"),
    [
        ({}, "completed", "large/0"),
        ({"code": 503, "address": ""}, "failed", ""),
        ({"hung_up": True, "code": 0}, "abandoned", ""),
    ],
)
def test_the_access_log_ends_requests(make, said, status, served):
    picker = make()
    picker.access_logs = 1
    exchange = Exchange(picker)
    play(exchange, request())
    exchange.closed()
    assert picker.gateway.state.in_flight == 1
    assert envoy_access_log.take(picker, entry("somebody else's")) == 0
    assert envoy_access_log.take(picker, entry("r1", **said)) == 1
    assert envoy_access_log.take(picker, entry("r1", **said)) == 0
    (record,) = records(picker)
    assert (record["status"], record["served_by"], record["e2e_s"]) == (status, served, 1.5)
    assert picker.gateway.state.in_flight == 0


def test_an_id_that_a_client_repeats_is_another_request(make):
    picker = make()
    for _ in range(3):
        play(Exchange(picker), request())
    assert len(picker.live) == picker.gateway.pending == 3
    play(Exchange(picker), request(x_request_id="x" * 5000))
    assert max(map(len, picker.live)) < 130


def test_our_own_mistakes_let_the_request_through(make, monkeypatch):
    picker = make()
    monkeypatch.setattr(picker.gateway, "decide", lambda facts: 1 / 0)
    first, second = play(Exchange(picker), request(em.FULL_DUPLEX), body(b"abc"))[-1]
    assert first == picker.messages.go_on["request_headers"]
    assert second.request_body.response.body_mutation.streamed_response.body == b"abc"
    assert picker.desk.errors == {"a decision": 1}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"endpoints": {}}, "endpoints is empty"),
        ({"endpoints": {"huge/0": "10.0.0.1:80"}}, "'huge/0' is unknown; legal: small/0, large/0, api"),
        ({"models": {"huge": "x"}}, "'huge' is no candidate or tier"),
        ({"mode": "alive"}, "'alive'; legal: shadow"),
        ({"default_class": "vip"}, "'vip' is unknown"),
        ({"rollback": {"error": 1}}, "rollback.error is unknown"),
    ],
)
def test_bad_settings_give_one_sentence(make, settings, words):
    with pytest.raises(InputError, match=words) as caught:
        make(**settings)
    assert "\n" not in str(caught.value)


def test_a_provider_is_reached_by_its_cluster(make):
    picker = make(endpoints={"api": "cluster:hosted"})
    ((answer,),) = play(Exchange(picker), request())
    (header,) = answer.request_headers.response.header_mutation.set_headers
    assert (header.header.key, header.header.raw_value) == (em.CLUSTER_HEADER, b"hosted")
    assert answer.request_headers.response.clear_route_cache and em.NAMESPACE not in answer.dynamic_metadata


@pytest.mark.parametrize(
    ("told", "standing", "left"),
    [
        ({}, 0, 1.0),
        ({"x_customer_standing": "best_effort", "x_quota_left": "0"}, 1, 0.0),
        ({"x_customer_standing": "overage", "x_quota_left": "0.5"}, 2, 0.5),
        ({"x_customer_standing": "broke", "x_quota_left": "nan"}, 0, 1.0),
        ({"x_customer_standing": "refused"}, 3, 1.0),
    ],
)
def test_a_customers_account_reaches_the_view(make, told, standing, left):
    picker = make()
    play(Exchange(picker), request(end=True, **told), response(end=True, served="10.0.0.1:80"))
    (record,) = records(picker)
    assert [record["request"][name] for name in ("standing", "quota_left")] == [standing, left]
    assert (record["legal"] == ["shed"]) == (standing == 3)
    assert picker.desk.errors == {}


def test_clients_cannot_say_how_they_stand(make):
    made = configuration("headers", make().settings, Listen("127.0.0.1", 9002), 8080)
    for header in ("x-customer-standing", "x-quota-left", "x-customer-class", "x-tenant-id"):
        assert f"remove: {header}" in made
