"""The sidecar as a process whose callers wait: for room, over a kill -9, and without seeing what is not theirs."""

import concurrent.futures
import dataclasses
import json
import os
import signal
import threading
import time

import pytest
from bundles import small_bundle
from envoy_process import until
from test_http_server import TOKEN, Server, post, read

pytest.importorskip("uvicorn", reason="pip install 'marginroute[http]'")

from marginroute import bundle as bundles
from marginroute.margin_rule import MarginParameters, MarginRule

HOLD = {"can": ["shed", "hold"], "endpoints": {"small/0": "a:1"}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A replica takes one request at a time."""
    policy = MarginRule("bid-price", MarginParameters(station_usd_per_s=(0.0, 0.0, 0.0), cap_share=0.125))
    made = tmp_path_factory.mktemp("bundles") / "small"
    bundles.save(dataclasses.replace(small_bundle(), policy=policy), made)
    return made


def call(server, path, body):
    """(status, answer); (0, None) if the connection broke."""
    try:
        with server.connect(timeout=20.0) as connection:
            connection.sendall(post(path, body))
            status, data = read(connection)
            return status, json.loads(data) if status else None
    except OSError:
        return 0, None


def decide(server, id, wait_s=0.0):
    return call(server, "/v1/decide", {"id": id, "prompt_tokens": 10, "wait_s": wait_s})


def finish(server, id):
    return call(server, "/v1/events", {"events": [{"event": "finished", "id": id, "status": "completed"}]})


def test_one_after_the_other_over_real_connections(folder, tmp_path):
    """Twenty callers on the line, one at a time at the engine, each finishes and lets the next one in."""
    server = Server(folder, tmp_path / "s", **HOLD).wait()
    busy, peak, lock = 0, 0, threading.Lock()

    def caller(i):
        nonlocal busy, peak
        _, answer = decide(server, f"r{i}", 20.0)
        assert not answer["held"] and answer["candidate"] == "small/0"
        with lock:
            busy, peak = busy + 1, max(peak, busy + 1)
        time.sleep(0.01)
        with lock:
            busy -= 1
        return finish(server, f"r{i}")[1]["known"]

    try:
        with concurrent.futures.ThreadPoolExecutor(20) as pool:
            assert list(pool.map(caller, range(20))) == [1] * 20
        assert peak == 1
    finally:
        assert server.stop() == 0
    records = [json.loads(line) for line in server.log.read_text().splitlines()]
    assert len(records) == 20 and {r["status"] for r in records} == {"completed"}


def test_killed_while_callers_wait(folder, tmp_path):
    """kill -9: callers on the line are told at once, the log holds whole lines only, and they get in afterwards."""
    server = Server(folder, tmp_path / "s", **HOLD).wait()
    assert not decide(server, "first")[1]["held"]
    for i in range(2):
        assert decide(server, f"gone{i}")[1]["held"]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(decide, server, f"w{i}", 20.0) for i in range(4)]
        time.sleep(0.5)
        began_s = time.monotonic()
        finish(server, "first")
        server.stop(signal.SIGKILL)
        answers = [one.result() for one in waiting]
        assert time.monotonic() - began_s < 5.0
        assert [status for status, _ in answers].count(0) >= 3
    for line in server.log.read_text().splitlines():
        assert json.loads(line)["status"] == "completed"
    again = Server(folder, tmp_path / "s", **HOLD)
    try:
        until(lambda: decide(again, "w3")[0], what="the sidecar")
        answer = decide(again, "w3")[1]  # nothing of the dead one's counts against it
        assert not answer["held"] and answer["attempt"] == 1
        assert decide(again, "w4")[1]["held"]
    finally:
        assert again.stop() == 0


def test_nothing_of_one_tenant_is_told_to_another(folder, tmp_path):
    """No answer, error or metric carries another request's tenant, session, id or text; log and socket are private."""
    (tmp_path / "token").write_text(TOKEN)
    limits = [{"of": "tenant", "requests": 1, "per": "day"}]
    server = Server(folder, tmp_path / "s", token_file=str(tmp_path / "token"), limits=limits, **HOLD)
    bearer = f"authorization: Bearer {TOKEN}\r\n".encode()
    secrets = ("acme-corp", "agent-7", "order 66", "req-acme")

    def ask(path, body=None, more=bearer):
        with server.connect() as connection:
            request = b"GET " + path.encode() + b" HTTP/1.1\r\nhost: x\r\n" + more + b"\r\n"
            connection.sendall(request if body is None else post(path, body, more))
            return read(connection)

    server.wait()
    try:
        mine = {"id": "req-acme", "tenant": "acme-corp", "session": "agent-7", "prompt": "order 66"}
        assert ask("/v1/decide", mine)[0] == 200
        others = [
            ask("/v1/decide", {"id": "x", "tenant": "other", "explain": True}),
            ask("/v1/decide", {"id": "y", "tenant": "other", "class": "nonsense"}),
            ask("/v1/decide", {"tenant": 3}),
            ask("/v1/status"),
            ask("/metrics"),
            ask("/openapi.json"),
            ask("/v1/scale"),
        ]
        for status, body in others:
            assert status in (200, 409, 422, 503)
            assert not any(secret in body.decode() for secret in secrets), body
        for path in ("/v1/decide", "/v1/events", "/v1/status", "/metrics", "/v1/scale"):
            assert ask(path, {} if "decide" in path or "events" in path else None, b"")[0] == 401
    finally:
        assert server.stop() == 0
    assert oct(os.stat(server.log).st_mode & 0o777) == "0o600"
    output = server.output.read_text()
    assert TOKEN not in output and not any(secret in output for secret in secrets)
    text = server.log.read_text()
    assert "order 66" not in text and TOKEN not in text
