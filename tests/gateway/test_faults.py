"""What goes wrong around a gateway: nothing is lost, wrong or stuck, and it goes on."""

import asyncio
import json
import os
import threading
import time

import pytest
from bundles import small_bundle

from marginroute import bundle as bundles
from marginroute import view as v
from marginroute.facts import Facts, Outcome
from marginroute.gateway import Gateway
from marginroute.modes import ModeSettings
from marginroute.record_log import AuditLog, RecordLog
from marginroute.rollback import RollbackLimits


class Clock:
    now_s = 1000.0

    def __call__(self):
        return self.now_s


def answer(name, ttft_s=0.1, e2e_s=1.0):
    return Outcome("completed", name, ttft_s, e2e_s, ttft_s, e2e_s, 100, 50)


def gateway_of(tmp_path, log=None, **more):
    return Gateway(small_bundle(), log or RecordLog(tmp_path / "log.jsonl"), ModeSettings("live"), **more)


def choices(gateway, count, ids):
    made = [gateway.decide(Facts(f"{ids}{i}", 100, "premium")).decision.name for i in range(count)]
    for i in range(count):
        gateway.finished(f"{ids}{i}", Outcome("shed"))
    return made


def test_a_dead_endpoint_is_left_and_tried_again(tmp_path):
    """Calls that fail lower what a candidate is expected to earn; the errors fade."""
    clock = Clock()
    gateway = gateway_of(tmp_path, clock=clock)
    (favourite,) = set(choices(gateway, 5, "before"))
    for i in range(12):
        gateway.decide(Facts(f"f{i}", 100, "premium"))
        gateway.sent(f"f{i}", favourite, True)
        gateway.attempt_failed(f"f{i}")
        gateway.finished(f"f{i}", Outcome("failed", e2e_s=0.1))
    assert favourite not in choices(gateway, 20, "after")
    clock.now_s += 120.0
    assert set(choices(gateway, 5, "later")) == {favourite}


def test_a_slow_endpoint_fills_up_and_is_left(tmp_path):
    """Requests that never come back count as in flight until they are written off."""
    clock = Clock()
    gateway = gateway_of(tmp_path, clock=clock, stale_after_s=50.0)
    (favourite,) = set(choices(gateway, 5, "before"))
    for i in range(60):
        gateway.decide(Facts(f"s{i}", 2000, "premium"))
        gateway.sent(f"s{i}", favourite, True)
    assert favourite not in choices(gateway, 20, "after")
    clock.now_s += 60.0
    gateway.decide(Facts("now", 100))
    assert gateway.state.in_flight == 0 and gateway.pending == 1
    assert set(choices(gateway, 5, "later")) == {favourite}


def test_the_wall_clock_jumps(tmp_path, monkeypatch):
    """An hour back and forth: limits, ages, waits and counters go by the clock that never jumps."""
    gateway = gateway_of(tmp_path)
    gateway.state.scraped(0, 1.0, 2.0, 0.5)
    gateway.decide(Facts("a", 100))
    gateway.sent("a", "large/0", True)
    real = time.time
    for jump_s in (3600.0, -3600.0):
        monkeypatch.setattr(time, "time", lambda jump_s=jump_s: real() + jump_s)
        view = gateway.state.view(10)
        assert view.signals[v.TELEMETRY_AGE_S, 0] < 60.0 and view.signals[v.IN_FLIGHT, 1] == 1.0
        assert gateway.decide(Facts(f"b{jump_s}", 10)).decision.guard == ""
        assert gateway.decide(Facts("a", 100)).attempt == 1
        assert 0.0 <= gateway.waited_s("a") < 60.0
        assert gateway.switch.state == "in force"
    gateway.attempt_failed("a")
    retried = gateway.decide(Facts("a", 100))
    assert retried.attempt == 2
    gateway.finished("a", answer("small/0"))
    last = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])
    assert 0.0 <= last["request"]["waited_s"] < 60.0


def test_a_full_disk_stops_no_request(tmp_path):
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full on this system")
    audit = AuditLog("/dev/full")
    gateway = gateway_of(tmp_path, audit)
    for i in range(100):
        verdict = gateway.decide(Facts(str(i), 100))
        gateway.sent(str(i), verdict.decision.name, True)
        assert gateway.finished(str(i), answer(verdict.decision.name))
    assert audit.dropped == 100 and gateway.pending == gateway.state.in_flight == 0


def test_all_telemetry_is_gone(tmp_path):
    """The guard takes every decision, then the bundle stops acting, and comes back with the telemetry."""
    clock, events = Clock(), []
    limits = RollbackLimits(window_s=10.0, min_requests=5, hold_s=20.0, probation_share=1.0)
    gateway = Gateway(
        small_bundle(), RecordLog(tmp_path / "l.jsonl"), ModeSettings("live", rollback=limits), clock=clock,
        on_event=events.append,
    )  # fmt: skip

    def play(seconds, scrape):
        acted = 0
        for _ in range(seconds):
            clock.now_s += 1.0
            for c in (0, 1) if scrape else ():
                gateway.state.scraped(c, 0.0, 0.0, 0.0)
            verdict = gateway.decide(Facts(f"r{clock.now_s}", 100))
            gateway.finished(f"r{clock.now_s}", answer(verdict.decision.name))
            acted += verdict.acting
        return acted

    assert play(30, True) == 30
    play(80, False)
    assert [event["event"] for event in events] == ["rollback"] and "the guard took" in events[0]["reason"]
    assert play(10, False) == 0
    play(40, True)
    assert [event["event"] for event in events][1:3] == ["probation", "in force"]
    assert play(10, True) == 10


def test_ten_thousand_at_once(tmp_path):
    """Ten thousand requests in flight, from eight threads; every one ends, and the counters are at zero."""
    gateway, errors = gateway_of(tmp_path), []

    def client(k):
        try:
            names = {}
            for i in range(1250):
                names[f"{k}-{i}"] = gateway.decide(Facts(f"{k}-{i}", 100)).decision.name
                gateway.sent(f"{k}-{i}", names[f"{k}-{i}"], i % 2 == 0)
            barrier.wait()
            for id, name in names.items():
                gateway.finished(id, answer(name))
        except Exception as error:
            errors.append(error)

    barrier = threading.Barrier(8, action=lambda: full.append((gateway.pending, gateway.state.in_flight)))
    full = []
    threads = [threading.Thread(target=client, args=(k,)) for k in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == [] and full[0][0] == 10_000 and full[0][1] > 0
    assert gateway.pending == gateway.state.in_flight == 0
    for name, counter in gateway.state.counters().items():
        assert abs(counter).max() < 1e-6, name
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 10_000


def test_the_callback_takes_times_from_a_clock_that_jumped_for_unknown(bundle_folder, tmp_path, monkeypatch):
    """LiteLLM's times are those on the wall: an answer across a jump teaches its duration by our own clock, no TTFT."""
    from test_litellm_observer import complete, logger_of, records, route, send

    logger = logger_of(bundle_folder, tmp_path, monkeypatch)
    real = time.time
    route(logger, "a")
    send(logger, "a", stream=True)
    monkeypatch.setattr(time, "time", lambda: real() + 3600.0)
    now_s = time.time()
    complete(logger, "a", startTime=now_s - 3600.0, completionStartTime=now_s, endTime=now_s)
    (record,) = records(logger)
    assert record["ttft_s"] is None and 0.0 <= record["e2e_s"] < 60.0
    recent_s = logger.marginroute.gateway.state.view(1).signals[v.RECENT_TTFT_S]
    assert recent_s.max() < 60.0


def test_a_swap_between_decision_and_sending_loses_nothing(bundle_folder, tmp_path, monkeypatch):
    from test_litellm_observer import complete, logger_of, records, route, send

    logger = logger_of(bundle_folder, tmp_path, monkeypatch)
    gateway = logger.marginroute.gateway
    route(logger, "a")
    gateway.swap(bundles.load(bundle_folder))
    send(logger, "a", 1)
    assert gateway.state.in_flight == 1
    gateway.swap(bundles.load(bundle_folder))
    complete(logger, "a", 1)
    assert records(logger)[0]["served_by"] == "large/0" and gateway.state.in_flight == 0
    asyncio.run(logger.async_post_call_failure_hook({"litellm_call_id": "a"}, ValueError(), None))
    assert len(records(logger)) == 1
