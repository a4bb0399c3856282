"""The bundle routes in a real LiteLLM proxy: it is obeyed, retries avoid what failed, it sheds, swaps and rolls back.

Needs a Python that has LiteLLM, as test_litellm_proxy.py says.
"""

import dataclasses
import json
import math
import os
import threading
import time

import pytest
from bundles import TERMS, small_bundle
from proxy import Proxy
from upstream import Upstream

from marginroute import bundle as bundles
from marginroute.margin_rule import MarginParameters, MarginRule

PYTHON = os.environ.get("MARGINROUTE_LITELLM_PYTHON", "")
pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(
        not PYTHON, reason="set MARGINROUTE_LITELLM_PYTHON to a Python that has litellm[proxy] (see test_litellm_proxy)"
    ),
]

# Nothing earns: whoever answers pays
WORTHLESS = TERMS | dict.fromkeys(("input_usd_per_token", "output_usd_per_token", "unserved_credit_share"), 0.0)
SETTINGS = """
bundle: {bundle}
log: {log}
mode: live
use_cache: true
reload_s: 0.2
priority: {{premium: 1}}
rate_limits: {{api: {{requests_per_minute: 30, burst_requests: 50}}}}
rollback: {{error_rate: 0.5, min_requests: 10, window_s: 2.0, slo_attainment: null, margin_loss: null}}
"""


def bundle_preferring(station):
    """The small bundle under a rule that finds every other station's work too dear; batch requests are worthless."""
    prices = tuple(0.0 if s == station else 0.01 for s in range(3))
    bundle = small_bundle()
    rule = MarginRule(f"prefers-{bundle.layout.station_names[station]}", MarginParameters(prices, fill_power=0.0))
    return dataclasses.replace(bundle, policy=rule, terms=bundle.terms | {"batch": WORTHLESS})


class Live:
    """The proxy, its upstreams, and what its log says."""

    def __init__(self, folder):
        self.bundle, self.log = folder / "bundle", folder / "records.jsonl"
        bundles.save(bundle_preferring(1), self.bundle)
        (folder / "settings.yaml").write_text(SETTINGS.format(bundle=self.bundle, log=self.log))
        self.upstreams = {name: Upstream(name) for name in ("a", "b", "c")}
        urls = {name: upstream.url for name, upstream in self.upstreams.items()}
        deployments = [
            ("chat", "a", urls["a"], "small/0"),
            ("chat", "b", urls["b"], "large/0"),
            ("only-a", "a", urls["a"], "small/0"),
            ("dead", "dead", "http://127.0.0.1:9/v1", "large/0"),
            ("dead", "a", urls["a"], "small/0"),
            ("bought", "c", urls["c"], "api"),
        ]
        environ = {"MARGINROUTE_CONFIG": str(folder / "settings.yaml")}
        cache = ", cache: true, cache_params: {type: local}"
        self.proxy = Proxy(PYTHON, folder / "proxy", deployments, environ, "router", cache)
        self.seen = 0

    def calls(self):
        return {name: len(upstream.calls) for name, upstream in self.upstreams.items()}

    def records(self, count):
        """The next `count` records, once they are there."""
        until, found = time.monotonic() + 10.0, []
        while len(found) < count and time.monotonic() < until:
            found = self.log.read_text().splitlines()[self.seen :] if self.log.exists() else []
            time.sleep(0.05)
        self.seen += len(found)
        assert len(found) == count
        return [json.loads(line) for line in found]

    def events(self):
        path = self.log.with_suffix(".events.jsonl")
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def wait_for_event(self, name):
        until = time.monotonic() + 15.0
        while time.monotonic() < until:
            if name in [event["event"] for event in self.events()]:
                return
            time.sleep(0.1)
        raise AssertionError(f"no event {name!r}: {self.events()}\n{self.proxy.text()[-2000:]}")

    def close(self):
        self.proxy.stop()
        for upstream in self.upstreams.values():
            upstream.close()


@pytest.fixture(scope="module")
def live(tmp_path_factory):
    live = Live(tmp_path_factory.mktemp("live"))
    try:
        live.proxy.wait()
        yield live
    finally:
        live.close()


def test_every_request_goes_where_the_bundle_says(live):
    answers = [live.proxy.ask("chat", f"obey {i}", stream=i % 2 == 0) for i in range(20)]
    assert answers == [(200, "b " * 8)] * 20
    records = live.records(20)
    assert {(r["choice"], r["served_by"], r["mode"], r["status"]) for r in records} == {
        ("large/0", "large/0", "live", "completed")
    }
    assert live.calls()["a"] == 0


def test_a_retry_goes_elsewhere(live):
    assert live.proxy.ask("chat", "again fail:b") == (200, "a " * 8)
    first, second = live.records(2)
    assert (first["choice"], first["status"]) == ("large/0", "")
    assert (second["choice"], second["served_by"], second["status"]) == ("small/0", "small/0", "completed")
    assert first["id"] == second["id"] and second["request"]["waited_s"] > 0.0


def test_a_dead_endpoint_costs_one_attempt(live):
    assert live.proxy.ask("dead", "anyone there") == (200, "a " * 8)
    first, second = live.records(2)
    assert (first["choice"], second["served_by"]) == ("large/0", "small/0")


@pytest.mark.parametrize("stream", [False, True])
def test_an_api_that_says_that_nothing_is_left_is_left_alone(live, stream):
    """Its limit refills in 2 s."""
    api = live.upstreams["c"]
    time.sleep(2.2)  # also after the one before
    api.headers = {"x-ratelimit-remaining-requests": "0"}
    assert live.proxy.ask("bought", "the last one", stream) == (200, "c " * 8)
    live.records(1)
    api.headers, before = {}, len(api.calls)
    assert live.proxy.ask("bought", "too early", stream, num_retries=0)[0] == 429
    assert len(api.calls) == before and live.records(1)[0]["status"] == "shed"


def test_an_api_that_refuses_is_left_alone_until_the_time_it_names(live):
    api = live.upstreams["c"]
    time.sleep(2.2)
    assert live.proxy.ask("bought", "now limit", num_retries=0)[0] == 429
    before, started = len(api.calls), time.monotonic()
    assert live.records(1)[0]["status"] == "failed"
    assert live.proxy.ask("bought", "too early", num_retries=0)[0] == 429
    assert time.monotonic() - started < 2.0 and len(api.calls) == before
    time.sleep(2.2)
    assert live.proxy.ask("bought", "now") == (200, "c " * 8)
    live.records(2)


def test_a_request_that_only_costs_is_shed_at_once(live):
    before, started = live.calls(), time.monotonic()
    status, retry_after = live.proxy.ask("chat", "for nothing", key="sk-batch", num_retries=2)
    assert status == 429 and 1 <= int(retry_after) <= 60
    assert time.monotonic() - started < 1.0  # neither retried nor waited
    assert live.calls() == before
    (record,) = live.records(1)
    assert (record["kind"], record["status"], record["served_by"]) == ("shed", "shed", "")
    assert record["reason_usd"]["margin"] == 0.0


def test_a_stored_answer_is_a_candidate(live):
    assert live.proxy.ask("chat", "what is stored") == (200, "b " * 8)
    before = live.calls()
    assert live.proxy.ask("chat", "what is stored") == (200, "b " * 8)
    first, second = live.records(2)
    assert "cache" not in first["legal"] and "cache" in second["legal"]
    assert (second["kind"], second["served_by"]) == ("cache", "cache")
    assert live.calls() == before


def test_a_session_is_one_request_at_a_time(live):
    for i in range(3):
        live.proxy.ask("chat", f"turn {i}", litellm_session_id="one")
    assert [r["served_by"] for r in live.records(3)] == ["large/0"] * 3


def test_a_bundle_is_swapped_while_requests_fly(live):
    """No request is lost or answered twice, and the new bundle's choices are obeyed from then on."""
    answers, stop = [], threading.Event()

    def client(k):
        i = 0
        while not stop.is_set():
            answers.append(live.proxy.ask("chat", f"fly {k} {i}", stream=k % 2 == 0))
            i += 1

    threads = [threading.Thread(target=client, args=(k,)) for k in range(3)]
    for thread in threads:
        thread.start()
    time.sleep(0.5)
    bundles.save(bundle_preferring(0), live.bundle)
    live.wait_for_event("bundle")
    time.sleep(0.5)
    stop.set()
    for thread in threads:
        thread.join()
    assert {status for status, _ in answers} == {200}
    records = live.records(len(answers))
    assert len({r["bundle"] for r in records}) == 2 and len({r["id"] for r in records}) == len(answers)
    assert {(r["policy"], r["served_by"]) for r in records} == {
        ("prefers-large", "large/0"), ("prefers-small", "small/0"),
    }  # fmt: skip
    assert all(r["choice"] == r["served_by"] for r in records)


def test_a_bad_bundle_changes_nothing(live):
    manifest = live.bundle / "manifest.json"
    manifest.write_text(manifest.read_text().replace("prefers-small", "tampered"))
    live.wait_for_event("refused")
    assert live.proxy.ask("chat", "still small") == (200, "a " * 8)
    assert live.records(1)[0]["policy"] == "prefers-small"
    assert live.proxy.text().count("is refused") == 1


def test_it_rolls_back_by_itself_and_the_proxy_goes_on(live):
    for i in range(30):
        live.proxy.ask("only-a", f"fail {i}", num_retries=0)
        if "rollback" in [event["event"] for event in live.events()]:
            break
    live.wait_for_event("rollback")
    assert "of the requests acted on failed" in live.events()[-1]["reason"]
    live.seen += len(live.log.read_text().splitlines()[live.seen :])
    answers = [live.proxy.ask("chat", f"after {i}") for i in range(12)]
    assert {status for status, _ in answers} == {200}
    assert {text for _, text in answers} == {"a " * 8, "b " * 8}  # LiteLLM's own shuffle: the same 12 times 1 in 2,048
    assert {r["mode"] for r in live.records(12)} == {"shadow"}


def test_nothing_is_left_behind(live):
    probe = live.proxy.probe()
    assert probe == {"in_flight": 0, "pending": 0, "errors": {}, "calls": 0, "awaited": 0, "state": "rolled back"}
    for line in live.log.read_text().splitlines():
        record = json.loads(line)
        assert all(math.isfinite(usd) for usd in record["reason_usd"].values())
        assert "obey" not in line and "sk-" not in line
