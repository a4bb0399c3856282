"""The endpoint picker behind a real Envoy, in each mode; needs an Envoy binary (see `envoy_process`)."""

import concurrent.futures
import json
import signal
import time

import envoy_process as ep
import pytest
from bundles import TERMS, small_bundle
from upstream import PROMPT_TOKENS, Upstream

pytest.importorskip("envoy.service.ext_proc.v3", reason="pip install 'marginroute[envoy]'")

from marginroute import bundle as bundles
from marginroute.adapters import envoy_messages as em

pytestmark = [pytest.mark.integration, ep.needs_envoy]

WAYS = ("headers", "buffered", "full-duplex")
WORTHLESS = {"x-customer-class": "batch"}


@pytest.fixture(scope="module")
def upstreams():
    made = [Upstream("a"), Upstream("b")]
    yield made
    for upstream in made:
        upstream.close()


@pytest.fixture(scope="module")
def endpoints(upstreams):
    ports = (upstream.server.server_address[1] for upstream in upstreams)
    return {name: f"127.0.0.1:{port}" for name, port in zip(("small/0", "large/0"), ports, strict=True)}


@pytest.fixture(scope="module")
def bundle_folder(tmp_path_factory):
    """A bundle with a class whose requests are worth nothing, and are shed."""
    made = small_bundle()
    made.terms["batch"] = TERMS | {
        "input_usd_per_token": 0.0,
        "output_usd_per_token": 0.0,
        "unserved_credit_share": 0.0,
    }
    folder = tmp_path_factory.mktemp("bundles") / "small"
    bundles.save(made, folder)
    return folder


@pytest.fixture(scope="module")
def start(bundle_folder, endpoints, tmp_path_factory):
    """Starts a picker and an Envoy in front of it."""
    processes = []

    def started(way, change=lambda made: None, **settings):
        there = settings.pop("endpoints", endpoints)
        folder = tmp_path_factory.mktemp("envoy")
        picker = ep.Picker(bundle_folder, folder, there, **settings)
        processes.append(picker)
        envoy = ep.Envoy(way, picker.uds, folder, there, change)
        processes.append(envoy)
        picker.wait()
        envoy.wait()
        return picker, envoy

    yield started
    for process in reversed(processes):
        process.stop()


@pytest.fixture(scope="module", params=WAYS)
def running(start, request):
    """(way, picker, Envoy), shared by the tests of a way; the last of them kills the picker."""
    return request.param, *start(request.param, patient)


def patient(made):
    """Gives the picker two seconds a message, not 0.2: on busy cores Envoy would go on alone, without a record."""
    for one in ep.manager(made)["http_filters"]:
        if "message_timeout" in one["typed_config"]:
            one["typed_config"]["message_timeout"] = "2s"


def allow(made, addresses):
    """Puts a filter before the picker that tells it what it may pick from."""
    kind = "type.googleapis.com/envoy.extensions.filters.http.set_metadata.v3.Config"
    told = {"metadata_namespace": em.SUBSET_NAMESPACE, "value": {em.SUBSET: addresses}}
    filters = ep.manager(made)["http_filters"]
    filters.insert(0, {"name": "subset", "typed_config": {"@type": kind, "metadata": [told]}})


def test_live(running, upstreams):
    """Requests go where the picker says; each leaves one record of what happened."""
    way, picker, envoy = running
    before = [len(u.calls) for u in upstreams]
    sequence = [("hello", False), ("hello long", True), ("hello", True), ("refuse", False), ("fail", False)]
    answers = [ep.chat(envoy.port, message, stream) for message, stream in sequence]
    shed = ep.chat(envoy.port, "hello", headers=WORTHLESS)
    other = {"model": "chat", "messages": [{"content": "no generation"}]}
    status, _, _ = ep.call(envoy.port, "/v1/embeddings", json.dumps(other).encode(), {})
    assert [s for s, _, _ in answers] == [200, 200, 200, 400, 500] and status == 200
    assert shed[0] == 429 and int(shed[2]["retry-after"]) >= 1 and json.loads(shed[1])["error"]["code"] == 429
    *records, refused = picker.records(6)
    assert [r["status"] for r in records] == ["completed"] * 3 + ["abandoned", "failed"]
    assert (refused["choice"], refused["status"]) == ("shed", "shed")
    assert all(r["mode"] == "live" and r["guard"] == "" for r in records)
    for record, (_, text, _) in zip(records[:3], answers, strict=False):
        assert record["served_by"] == record["choice"]
        assert {"small/0": "a ", "large/0": "b "}[record["choice"]] in text
        assert record["e2e_s"] > 0.03
    assert sum(len(u.calls) - b for u, b in zip(upstreams, before, strict=True)) == 6
    tokens = [r["request"]["prompt_tokens"] for r in records[:3]]
    if way == "headers":
        assert tokens[0] > 10.0 and records[1]["output_tokens"] is None
    else:
        assert tokens[0] == 1.0  # five characters
    if way == "full-duplex":
        assert records[0]["output_tokens"] == 8 and records[0]["prompt_tokens"] == PROMPT_TOKENS
        assert 40 <= records[1]["output_tokens"] <= 41  # events: the stream states no usage
        assert records[0]["ttft_s"] is None and 0.03 <= records[1]["ttft_s"] < records[1]["e2e_s"] - 0.1


def test_many_at_once(running):
    """All are answered, each leaves one record, and nothing stays in flight."""
    _, picker, envoy = running
    with concurrent.futures.ThreadPoolExecutor(50) as pool:
        answers = list(pool.map(lambda i: ep.chat(envoy.port, f"hello {i}", stream=i % 2 == 0)[0], range(200)))
    assert answers == [200] * 200
    records = picker.records(200)
    assert {r["status"] for r in records} == {"completed"} and len({r["id"] for r in records}) == 200
    assert {r["served_by"] for r in records} <= {"small/0", "large/0"}


def test_a_client_that_hangs_up_is_recorded(running):
    _, picker, envoy = running
    with pytest.raises(TimeoutError):
        ep.chat(envoy.port, "hello slow", timeout=0.2)
    (record,) = picker.records(1)
    assert record["status"] == "abandoned"


def test_health_services(running):
    grpc = pytest.importorskip("grpc")
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    _, picker, _ = running
    with grpc.insecure_channel(f"unix:{picker.uds}") as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for service in ("", "liveness", "readiness", "envoy.service.ext_proc.v3.ExternalProcessor"):
            answer = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=5.0)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpc.RpcError):
            stub.Check(health_pb2.HealthCheckRequest(service="another"), timeout=5.0)


def test_a_picker_that_hangs_costs_its_time_limit_and_no_more(running):
    way, picker, envoy = running
    if way == "full-duplex":
        pytest.skip("full duplex does not fail open")
    picker.process.send_signal(signal.SIGSTOP)
    try:
        began = time.monotonic()
        assert ep.chat(envoy.port, "hello")[0] == 200
        assert 2.0 <= time.monotonic() - began < 10.0
    finally:
        picker.process.send_signal(signal.SIGCONT)
    ep.until(lambda: ep.chat(envoy.port, "hello", headers=WORTHLESS)[0] == 429, 60.0, "the picker")


def test_a_picker_that_is_killed(running):
    """Header and buffered modes fail open, requests under way included; full duplex cannot. A new picker is used."""
    way, picker, envoy = running
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        under_way = [pool.submit(ep.chat, envoy.port, "hello slow") for _ in range(16)]
        time.sleep(0.3)
        picker.stop(signal.SIGKILL)
        ends = [f.result()[0] for f in under_way]
    without = [ep.chat(envoy.port, "hello")[0] for _ in range(5)]
    if way == "full-duplex":
        assert all(status >= 500 for status in without)
    else:
        assert without == [200] * 5 and ends == [200] * 16
    again = ep.Process(picker.words, picker.output)
    try:
        ep.until(lambda: ep.chat(envoy.port, "hello", headers=WORTHLESS)[0] == 429, 60.0, "the new picker")
    finally:
        again.stop()


def test_observing_adds_nothing_and_sees_everything(start, upstreams):
    picker, envoy = start("observe", mode="shadow")
    answers = [ep.chat(envoy.port, m, s, WORTHLESS) for m, s in (("hello there", False), ("hello long", True))]
    assert [a[0] for a in answers] == [200, 200]
    records = picker.records(2)
    assert [(r["mode"], r["choice"], r["status"]) for r in records] == [("shadow", "shed", "completed")] * 2
    for record, (_, text, _) in zip(records, answers, strict=True):
        assert {"small/0": "a ", "large/0": "b "}[record["served_by"]] in text
    assert records[0]["output_tokens"] == 8
    assert 40 <= records[1]["output_tokens"] <= 41  # events: the stream states no usage
    assert records[0]["request"]["prompt_tokens"] == 3.0 and records[1]["ttft_s"] > 0.0


def test_only_allowed_endpoints(start, endpoints):
    picker, envoy = start("headers", lambda made: allow(made, [endpoints["small/0"], "127.0.0.1:1"]))
    assert [ep.chat(envoy.port, "hello")[0] for _ in range(4)] == [200] * 4
    assert {r["served_by"] for r in picker.records(4)} == {"small/0"}


def test_503_where_no_endpoint_is_allowed(start):
    _, envoy = start("headers", lambda made: allow(made, ["127.0.0.1:1"]))
    status, text, _ = ep.chat(envoy.port, "hello")
    assert status == 503 and "no endpoint" in text


def test_a_retry_goes_to_the_runner_up(start, endpoints):
    """The picked endpoint refuses connections; Envoy goes on to the second one of the list."""
    dead = f"127.0.0.1:{ep.free_port()}"
    there = {"small/0": endpoints["small/0"], "large/0": dead}

    picker, envoy = start("headers", endpoints=there, retry_next=True)
    assert ep.chat(envoy.port, "hello")[0] == 200
    (record,) = picker.records(1)
    assert (record["choice"], record["served_by"], record["status"]) == ("large/0", "small/0", "completed")
