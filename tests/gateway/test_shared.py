"""Workers that share counters through a real Redis: sums, leases, limits together, and Redis going away."""

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from bundles import small_bundle

from marginroute import view as v
from marginroute.errors import InputError
from marginroute.facts import Facts, Outcome
from marginroute.gateway import Gateway
from marginroute.limits import limits_from
from marginroute.modes import ModeSettings
from marginroute.rate_limits import RateLimit
from marginroute.shared import SharedCounters, without_secrets

redis = pytest.importorskip("redis", reason="pip install 'marginroute[redis]'")
SERVER = shutil.which("redis-server")
pytestmark = pytest.mark.skipif(not SERVER, reason="no redis-server on this machine (apt install redis-server)")
ANSWER = Outcome("completed", "small/0", 0.1, 1.0, 0.1, 1.0, 100, 120, 0.001)


class Redis:
    def __init__(self, folder):
        self.path = folder / "redis.sock"
        self.start()

    @property
    def url(self):
        return f"unix://{self.path}"

    def start(self):
        words = [SERVER, "--port", "0", "--unixsocket", str(self.path), "--save", "", "--appendonly", "no"]
        self.process = subprocess.Popen(words, stdout=subprocess.DEVNULL)
        client = redis.Redis(unix_socket_path=str(self.path))
        until_s = time.monotonic() + 20.0
        while time.monotonic() < until_s:
            try:
                client.ping()
                return
            except redis.exceptions.ConnectionError:
                time.sleep(0.02)
        raise AssertionError("redis-server did not start")

    def stop(self):
        self.process.kill()
        self.process.wait()
        self.path.unlink(missing_ok=True)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    made = Redis(tmp_path_factory.mktemp("r"))
    yield made
    made.stop()


class Nowhere:
    def write(self, record):
        return True

    def close(self):
        pass


@pytest.fixture
def workers(server, request):
    made = []

    def some(n, can=("shed",), limits=(), caps=None):
        for _ in range(n):
            gateway = Gateway(small_bundle(), Nowhere(), ModeSettings("live"), can, limits=limits_from(list(limits)))
            shared = SharedCounters(gateway, server.url, 0.05, prefix=request.node.name)
            made.append((gateway, shared))
        return made

    yield some
    for gateway, shared in made:
        shared.stop()
        gateway.close()


def exchange(pairs, times=2):
    for _ in range(times):
        for _, shared in pairs:
            shared.exchange()


def send(gateway, id, name="small/0", **facts):
    gateway.decide(Facts(id, 100, **facts))
    return gateway.sent(id, name, True)


def test_every_worker_sees_what_all_have_in_flight(workers):
    pairs = workers(4)
    for w, (gateway, _) in enumerate(pairs):
        for i in range(w):
            send(gateway, f"{w}-{i}", ("small/0", "large/0")[i % 2])
    exchange(pairs)
    for gateway, shared in pairs:
        signals = gateway.state.view(10).signals
        assert signals[v.IN_FLIGHT, :3].tolist() == [4.0, 2.0, 0.0] and shared.workers == 4
        assert signals[v.PENDING_PREFILL_TOKENS, 0] == 400.0
    for i in range(3):
        pairs[3][0].finished(f"3-{i}", ANSWER)
    exchange(pairs)
    assert pairs[0][0].state.view(10).signals[v.IN_FLIGHT, :2].tolist() == [2.0, 1.0]
    assert pairs[0][0].state.in_flight == 0 and pairs[0][0].status()["workers"] == 4


def test_arrivals_add_up(workers):
    pairs = workers(2)
    for gateway, _ in pairs:
        for i in range(5):
            gateway.decide(Facts(str(i), 10))
        gateway.state._arrivals.gap_s = 0.1
    exchange(pairs)
    rate = pairs[0][0].state.view(10).request[v.ARRIVAL_RATE_PER_S]
    assert rate > 15.0


def test_limits_are_counted_together(workers):
    """Six requests a day in all: each of three workers gets two, then none."""
    pairs = workers(3, limits=[{"of": "tenant", "requests": 6, "per": "day"}, {"of": "all", "usd": 5, "per": "day"}])
    exchange(pairs)
    for w, (gateway, _) in enumerate(pairs):
        for i in range(2):
            assert gateway.decide(Facts(f"{w}{i}", 100, tenant="t")).decision.kind != "shed"
            gateway.finished(f"{w}{i}", ANSWER)
    exchange(pairs)
    for w, (gateway, _) in enumerate(pairs):
        assert gateway.decide(Facts(f"x{w}", 100, tenant="t")).decision.guard == "rate-tenant"
        assert gateway.decide(Facts(f"y{w}", 100, tenant="u")).decision.kind != "shed"
    exchange(pairs)
    (spend,) = [n for n in pairs[0][0].limits.used if n.startswith("1:")]
    reserved = sum(p.reserved_usd for gateway, _ in pairs for p in gateway._pending.values())
    assert pairs[0][0].limits.amount(spend) == pytest.approx(6 * 0.001 + reserved)


def test_rate_limits_of_providers_are_used_up_together(workers):
    """Six calls at once, then one a minute: three workers with two each, and nobody gets a seventh."""
    pairs = workers(3)
    for gateway, _ in pairs:
        gateway.swap(dataclasses.replace(small_bundle(), rate_limits={"api": RateLimit(1.0, 6.0)}))
    exchange(pairs)
    for w, (gateway, _) in enumerate(pairs):
        for i in range(2):
            send(gateway, f"{w}{i}", "api")
    assert [gateway.state.rates.spent(1) for gateway, _ in pairs] == [[], [], []]
    exchange(pairs)
    assert [gateway.state.rates.spent(1) for gateway, _ in pairs] == [[2], [2], [2]]


def test_a_cap_holds_over_all_workers(workers):
    """Eight slots, cap 16: the second worker's waits while the first has 16 there; no two wait for each other."""
    pairs = workers(2, can=("shed", "hold"))
    (one, _), (two, _) = pairs
    assert [send(one, f"a{i}") for i in range(18)] == [False] * 16 + [True] * 2
    exchange(pairs)
    assert send(two, "b")
    woken = []
    two.on_line("b", lambda: woken.append("b"))
    one.on_line("a16", lambda: woken.append("a16"))
    assert not woken
    for i in range(2):
        one.finished(f"a{i}", ANSWER)
    assert woken == ["a16"]
    exchange(pairs)
    assert woken == ["a16", "b"]


CHILD = """
import sys, time
sys.path[:0] = {paths!r}
from bundles import small_bundle
from test_shared import Nowhere, SharedCounters, Gateway, ModeSettings, send
gateway = Gateway(small_bundle(), Nowhere(), ModeSettings("live"))
shared = SharedCounters(gateway, {url!r}, 0.05, prefix={prefix!r}).start()
for i in range(7):
    send(gateway, str(i))
print("sent", flush=True)
time.sleep(60)
"""


def test_a_worker_that_is_killed_leaks_nothing(workers, server, request):
    """kill -9: its seven requests count until its lease has run out, and then no more."""
    ((gateway, shared),) = workers(1)
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[2])]
    code = CHILD.format(paths=paths, url=server.url, prefix=request.node.name)
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout.readline() == "sent\n"
        until_s = time.monotonic() + 10.0
        while gateway.state.view(1).signals[v.IN_FLIGHT, 0] != 7.0:
            assert time.monotonic() < until_s
            shared.exchange()
            time.sleep(0.05)
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        shared.exchange()
        assert gateway.state.view(1).signals[v.IN_FLIGHT, 0] == 7.0 and shared.workers == 2
        time.sleep(shared.lease_s + 0.1)
        shared.exchange()
        assert gateway.state.view(1).signals[v.IN_FLIGHT, 0] == 0.0 and shared.workers == 1
        assert list(shared._redis.hgetall(f"{request.node.name}:workers")) == [shared.worker]
    finally:
        child.kill()
        child.wait()


def test_redis_goes_away_and_comes_back(tmp_path, caplog):
    server = Redis(tmp_path)
    limits = limits_from([{"of": "all", "requests": 100, "per": "day"}])
    gateways = [Gateway(small_bundle(), Nowhere(), ModeSettings("live"), limits=limits) for _ in range(2)]
    pairs = [(g, SharedCounters(g, server.url, 0.05)) for g in gateways]
    (one, shared), (two, _) = pairs
    try:
        send(two, "x")
        exchange(pairs)
        assert one.state.view(1).signals[v.IN_FLIGHT, 0] == 1.0
        server.stop()
        shared.start()
        until_s = time.monotonic() + 20.0
        while one.state.view(1).signals[v.IN_FLIGHT, 0] != 0.0:  # after a lease of two seconds
            assert time.monotonic() < until_s
            time.sleep(0.05)
        began_s = time.perf_counter()
        assert one.decide(Facts("during", 100)).decision.kind != "shed"
        assert time.perf_counter() - began_s < 0.5 and shared.failures > 0
        server.start()
        while shared._failing or shared.workers < 2:
            assert time.monotonic() < until_s + 20.0
            pairs[1][1].exchange()
            time.sleep(0.05)
        (name,) = one.limits.used
        shared.exchange()
        assert one.limits.amount(name) == pytest.approx(2.0, abs=1.0)  # nothing is counted twice
        assert "goes on with its own counters" in caplog.text and "shared again" in caplog.text
    finally:
        for gateway, each in pairs:
            each.stop()
            gateway.close()
        server.stop()


def test_deciding_while_counters_are_exchanged(workers):
    """Threads decide, send and finish while exchanges run: in the end nothing is left, here or there."""
    pairs = workers(2)
    for _, shared in pairs:
        shared.start()

    def work(gateway, name):
        for i in range(100):
            send(gateway, f"{name}{i}")
            gateway.finished(f"{name}{i}", ANSWER)

    threads = [threading.Thread(target=work, args=(g, f"{n}-")) for g, _ in pairs for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60.0)
    until_s = time.monotonic() + 10.0
    while any(np.any(g.state.view(1).signals[v.IN_FLIGHT]) for g, _ in pairs):
        assert time.monotonic() < until_s
        time.sleep(0.05)
    assert all(s.failures == 0 for _, s in pairs)


def test_bad_urls_and_no_secrets():
    gateway = Gateway(small_bundle(), Nowhere())
    with pytest.raises(InputError, match="legal is redis://"):
        SharedCounters(gateway, "http://user:hunter2@host/0")
    assert without_secrets("rediss://user:hunter2@host:7000/3") == "rediss://host:7000/3"
    gateway.close()
