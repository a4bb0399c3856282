"""Metrics pages of three engines, and the scraper that fetches them."""

import math
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from hypothesis import given
from hypothesis import strategies as st

from marginroute import view as v
from marginroute.errors import InputError
from marginroute.facts import Facts
from marginroute.gateway import Gateway
from marginroute.metric_pages import MOST_PAGE_BYTES, EngineLoad, engine_load
from marginroute.modes import ModeSettings
from marginroute.operation import OperationSettings, open_gateway
from marginroute.record_log import RecordLog
from marginroute.scrape import Scraper

VLLM = """# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="m, {odd} name"} 7.0
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{engine="0",model_name="m"} 3.0
vllm:num_requests_waiting_by_reason{engine="0",model_name="m",reason="capacity"} 900.0
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.25
vllm:prefix_cache_queries_total{engine="0",model_name="m"} 1.2e+03
vllm:prefix_cache_hits_total{engine="0",model_name="m"} 400.0
vllm:num_preemptions_total{engine="0",model_name="m"} 2.0
vllm:time_to_first_token_seconds_bucket{engine="0",le="0.1",model_name="m"} 88.0
"""
OLD_VLLM = VLLM.replace("kv_cache_usage_perc", "gpu_cache_usage_perc")
SGLANG = """# TYPE sglang:num_running_reqs gauge
sglang:num_running_reqs{model_name="m"} 162.0
sglang:num_queue_reqs{model_name="m"} 2826.0
sglang:token_usage{model_name="m"} 0.28
sglang:num_used_tokens{model_name="m"} 123859.0
sglang:prompt_tokens_total{model_name="m"} 8.128902e+06
sglang:cached_tokens_total{model_name="m"} 61104.0
"""
TRTLLM = """# TYPE trtllm_num_requests_running gauge
trtllm_num_requests_running{model_name="m",engine_type="trtllm"} 4.0
trtllm_num_requests_waiting{model_name="m",engine_type="trtllm"} 1.0
trtllm_kv_cache_utilization{model_name="m",engine_type="trtllm"} 0.5
trtllm_kv_cache_tokens_per_block{model_name="m",engine_type="trtllm"} 32.0
"""


@pytest.mark.parametrize(
    ("page", "load"),
    [
        (VLLM, EngineLoad(3.0, 7.0, 0.25)),
        (OLD_VLLM, EngineLoad(3.0, 7.0, 0.25)),
        (SGLANG, EngineLoad(2826.0, 162.0, 0.28)),
        (TRTLLM, EngineLoad(1.0, 4.0, 0.5)),
    ],
)
def test_the_load_of_each_engine(page, load):
    assert engine_load(page.encode()) == load


def test_several_engines_of_a_server_add_up():
    second = VLLM.replace('engine="0"', 'engine="1"').replace(" 0.25\n", " 0.75\n").replace(" 3.0\n", " 5.0\n")
    assert engine_load((VLLM + second).encode()) == EngineLoad(8.0, 14.0, 0.5)


def test_a_line_without_labels_and_with_a_timestamp():
    page = b"sglang:num_queue_reqs 1\nsglang:num_running_reqs 2 1700000000000\nsglang:token_usage 1.01\n"
    assert engine_load(page) == EngineLoad(1.0, 2.0, 1.0)


@pytest.mark.parametrize(
    ("page", "says"),
    [
        (b"", "has none of vllm:num_requests_waiting"),
        (VLLM.replace("vllm:kv_cache", "vllm:other").encode(), "has none of vllm:kv_cache_usage_perc"),
        (VLLM.replace(" 7.0", " NaN").encode(), "vllm:num_requests_running = 'NaN'; legal is a number"),
        (VLLM.replace(" 7.0", " many").encode(), "= 'many'"),
        (VLLM.replace(" 3.0", " -1").encode(), "= '-1'"),
        (b"x" * (MOST_PAGE_BYTES + 1), "legal is 8388608 at most"),
    ],
)
def test_other_pages_are_refused(page, says):
    with pytest.raises(InputError, match=says):
        engine_load(page)


@given(st.binary(max_size=300), st.integers(0, len(VLLM)))
def test_no_page_raises_anything_else(noise, at):
    page = VLLM.encode()
    for text in (noise, page[:at] + noise + page[at:]):
        try:
            load = engine_load(text)
        except InputError:
            continue
        assert 0.0 <= load.kv_usage <= 1.0 and math.isfinite(load.waiting) and load.running >= 0.0


class Engine:
    """Serves a metrics page; `answer` may be changed to a status, to `hang`, `cut` or `chunked`."""

    def __init__(self, page=VLLM):
        self.page, self.answer, self.asked, self.connections = page, 200, 0, set()
        engine = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def do_GET(self):
                engine.asked += 1
                engine.connections.add(self.client_address)
                data = engine.page.encode()
                if engine.answer == "hang":
                    time.sleep(1.0)
                if engine.answer == "chunked":
                    self.send_response(200)
                    self.send_header("Transfer-Encoding", "chunked")
                    self.end_headers()
                    for part in (data[:100], data[100:]):
                        self.wfile.write(b"%x\r\n%s\r\n" % (len(part), part))
                        self.wfile.flush()
                        time.sleep(0.01)
                    self.wfile.write(b"0\r\n\r\n")
                    return
                self.send_response(engine.answer if isinstance(engine.answer, int) else 200)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data[: 10 if engine.answer == "cut" else None])
                self.close_connection = engine.answer == "cut"

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.server.handle_error = lambda *_: None  # the scraper hung up
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server.server_address[1]}/metrics"

    def close(self):
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def engine():
    engine = Engine()
    yield engine
    engine.close()


@pytest.fixture
def gateway(bundle, tmp_path):
    gateway = Gateway(bundle, RecordLog(tmp_path / "log.jsonl"), ModeSettings("live"))
    yield gateway
    gateway.close()


def wait_for(condition):
    until = time.monotonic() + 10.0
    while not condition() and time.monotonic() < until:
        time.sleep(0.01)
    assert condition()


def signals(gateway, *rows):
    return gateway.state.view(10).signals[list(rows)]


@pytest.mark.parametrize(("answer", "longer"), [(200, 0), ("chunked", 0), (200, 300_000), ("chunked", 300_000)])
def test_a_page_becomes_a_view_with_its_age(gateway, engine, answer, longer):
    engine.answer, engine.page = answer, "# so far nothing\n" * (longer // 17) + VLLM
    scraper = Scraper(gateway, {"small/0": engine.url}, every_s=0.2)
    gateway.keep(scraper.start())
    wait_for(lambda: scraper.scrapes >= 3)
    waiting, running, kv_usage, age_s = signals(gateway, v.WAITING, v.RUNNING, v.KV_USAGE, v.TELEMETRY_AGE_S)
    assert (waiting[0], running[0], kv_usage[0]) == (3.0, 7.0, 0.25)
    assert 0.0 < age_s[0] < 5.0 and not age_s[1:].any()
    assert len(engine.connections) <= 1 + scraper.failures  # one, as long as no answer is late
    scraper.stop()
    asked = engine.asked
    time.sleep(0.4)
    assert engine.asked == asked


@pytest.mark.parametrize(("answer", "says"), [(503, "status 503"), ("hang", "in time"), ("cut", "closed")])
def test_an_outage_lets_the_age_grow_until_the_guard_leaves_it_out(gateway, engine, caplog, answer, says):
    scraper = Scraper(gateway, {"small/0": engine.url}, every_s=0.05, timeout_s=0.04)
    gateway.keep(scraper.start())
    wait_for(lambda: scraper.scrapes >= 2)
    engine.answer = answer
    wait_for(lambda: scraper.failures >= 3)
    assert says in scraper.failing["small/0"].lower()
    assert sum("fails" in record.message for record in caplog.records) == 1
    assert signals(gateway, v.WAITING)[0, 0] == 3.0  # what was known stays
    gateway.state._clock = lambda: time.monotonic() + 61.0
    assert gateway.decide(Facts("a", 10)).decision.left_out == ("small/0",)
    assert gateway.decide(Facts("alone", 10, available=["small/0"])).decision.guard == "stale"
    gateway.state._clock = time.monotonic
    engine.answer = 200
    wait_for(lambda: not scraper.failing)
    assert "is back" in caplog.text
    found = gateway.decide(Facts("b", 10)).decision
    assert (found.guard, found.left_out) == ("", ())


def test_one_slow_engine_holds_up_no_other(gateway, engine):
    slow = Engine()
    slow.answer = "hang"
    try:
        scraper = Scraper(gateway, {"small/0": engine.url, "large/0": slow.url}, every_s=0.05)
        gateway.keep(scraper.start())
        wait_for(lambda: scraper.scrapes >= 10)
        assert set(scraper.failing) == {"large/0"}
    finally:
        slow.close()


def test_a_page_that_was_never_seen_is_not_fresh(gateway):
    scraper = Scraper(gateway, {"small/0": "http://127.0.0.1:9/metrics"}, every_s=0.05)
    gateway.keep(scraper.start())
    wait_for(lambda: signals(gateway, v.TELEMETRY_AGE_S)[0, 0] > 0.2)
    assert scraper.failing


def test_settings_start_it_and_closing_ends_it(bundle_folder, engine, tmp_path):
    telemetry = {"small/0": engine.url}
    settings = OperationSettings(str(bundle_folder), str(tmp_path / "l.jsonl"), telemetry=telemetry, telemetry_s=0.05)
    gateway = open_gateway(settings)
    wait_for(lambda: gateway.state.view(1).signals[v.RUNNING, 0] == 7.0)
    gateway.close()
    asked = engine.asked
    time.sleep(0.15)
    assert engine.asked == asked


@pytest.mark.parametrize(
    ("urls", "options", "says"),
    [
        ({"api": "http://x/metrics"}, {}, "telemetry of 'api': no replica of the bundle; legal: small/0, large/0"),
        ({"small/0": "ftp://x"}, {}, "telemetry of small/0 = 'ftp://x'; legal is a URL"),
        ({"small/0": "http://user:secret@x/"}, {}, "legal is a URL"),
        ({"small/0": "http://x/\r\nHost: y"}, {}, "legal is a URL"),
        ({"small/0": "http://x:99999/"}, {}, "legal is a URL"),
        ({}, {"every_s": 0.0}, "telemetry_s 0.0"),
    ],
)
def test_bad_settings(gateway, urls, options, says):
    with pytest.raises(InputError, match=says):
        Scraper(gateway, urls, **options)
