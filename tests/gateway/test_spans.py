"""Spans as a collector receives them, and metrics of adapters that have no HTTP server of their own."""

import json
import threading
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from bundles import Records, small_bundle

from marginroute.adapters.metrics import Histogram
from marginroute.adapters.metrics_server import MetricsServer
from marginroute.errors import InputError
from marginroute.facts import Facts, Outcome
from marginroute.gateway import Gateway
from marginroute.modes import ModeSettings
from marginroute.spans import TracedRecords

SECRET = "the launch code is 4711"
TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


@pytest.fixture
def collector(monkeypatch):
    """An OTLP receiver: (bodies)."""
    bodies = []

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_POST(self):
            bodies.append((self.path, self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{server.server_address[1]}")
    yield bodies
    server.shutdown()
    server.server_close()


def attributes(what):
    return {a["key"]: next(iter(a["value"].values())) for a in what["attributes"]}


def test_a_span_per_decision_as_a_collector_gets_it(collector):
    pytest.importorskip("opentelemetry.exporter.otlp.json.http", reason="pip install 'marginroute[otel]'")
    kept = Records()
    gateway = Gateway(small_bundle(), TracedRecords(kept), ModeSettings("live"))
    gateway.decide(Facts("r1", 100, prompt=SECRET, traceparent=f"00-{TRACE}-{PARENT}-01"))
    gateway.sent("r1", "small/0", True)
    gateway.attempt_failed("r1")
    gateway.decide(Facts("r1", 100, prompt=SECRET))
    gateway.finished("r1", Outcome("completed", "large/0", 0.5, 2.0, 0.5, 2.0, 101, 120))
    gateway.decide(Facts("r2", 100, traceparent="nonsense"))
    gateway.finished("r2", Outcome("failed", e2e_s=0.1))
    gateway.close()
    assert len(kept) == 3 and {path for path, _ in collector} == {"/v1/traces"}
    assert all(SECRET.encode() not in body for _, body in collector)
    spans, service = [], ""
    for _, body in collector:
        for resource in json.loads(body)["resourceSpans"]:
            service = attributes(resource["resource"])["service.name"]
            spans += [span for scope in resource["scopeSpans"] for span in scope["spans"]]
    assert service == "marginroute" and len(spans) == 3
    told = [attributes(span) for span in spans]
    first, second, other = spans
    assert first["traceId"] == second["traceId"] == TRACE and second["parentSpanId"] == PARENT
    assert other["traceId"] != TRACE and other["status"]["code"] == 2
    answered = told[1]
    assert answered["gen_ai.operation.name"] == "chat" and int(answered["gen_ai.usage.output_tokens"]) == 120
    assert answered["marginroute.served_by"] == "large/0" and answered["marginroute.reason_usd.margin"] != 0.0
    assert second["name"] == f"route {kept[1].choice}"
    waited_s = kept[1].request["waited_s"]
    lasted_ns = int(second["endTimeUnixNano"]) - int(second["startTimeUnixNano"])
    assert lasted_ns / 1e9 == pytest.approx(2.0 - waited_s, abs=1e-3)


class Source:
    def __init__(self, gateway):
        self.gateway, self.took, self.errors = gateway, Histogram(), {"a hook": 2}


def test_metrics_of_an_adapter_without_a_server():
    pytest.importorskip("prometheus_client", reason="pip install prometheus-client")
    gateway = Gateway(small_bundle(), Records(), ModeSettings("live"))
    chosen = gateway.decide(Facts("a", 100)).decision.name
    gateway.decide(Facts("b", 100, available=()))
    first = MetricsServer(Source(gateway), "127.0.0.1:0").start()
    second = MetricsServer(Source(gateway), f"127.0.0.1:{first.port}").start()  # another worker
    try:
        assert second.port > first.port
        for server in (first, second):
            base = f"http://127.0.0.1:{server.port}"
            text = urllib.request.urlopen(f"{base}/metrics", timeout=5).read().decode()
            assert f'marginroute_decisions_total{{acting="true",candidate="{chosen}",guard=""' in text
            assert 'marginroute_guard_total{guard="missing"} 1.0' in text
            assert 'marginroute_errors_total{place="a hook"} 2.0' in text
            assert json.load(urllib.request.urlopen(f"{base}/v1/status", timeout=5))["decisions"] == 2
            for path, status in (("/v1/scale", 409), ("/etc/passwd", 404)):
                with pytest.raises(urllib.error.HTTPError) as refused:
                    urllib.request.urlopen(base + path, timeout=5)
                assert refused.value.code == status
    finally:
        first.stop()
        second.stop()
        gateway.close()


@pytest.mark.parametrize("address", ["0.0.0.0:9464", "10.0.0.1:9464", "nowhere", "127.0.0.1:x", "127.0.0.1:99999"])
def test_metrics_only_on_loopback(address):
    with pytest.raises(InputError, match="legal is"):
        MetricsServer(Source(None), address)
