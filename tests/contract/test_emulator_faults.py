"""Faults and scaling of a running emulator: what a gateway in front of it gets to see."""

import json
import threading
import time
import urllib.error
import urllib.request

import pytest
from served import FLEET, served

LOAD_S = 3.0
ELASTIC = FLEET.replace("replicas: 2,", f"replicas: 2, max_replicas: 3, load_s: {LOAD_S},")


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    path = tmp_path_factory.mktemp("fleet") / "fleet.yaml"
    path.write_text(ELASTIC)
    with served(path) as (base, _):
        for slowdown in (
            1.0,
            None,
        ):  # the first fault of a kind compiles its kernel, for longer than a fault lasts here
            fault = {"station": "pool-0", "duration_s": 0.001, "slowdown": slowdown}
            assert call(f"{base}/emulate/faults", fault, timeout_s=300)[0] == 200
        healthy_again(base, "pool-0")
        yield base


def call(url, body=None, timeout_s=120):
    """(status, body) of a GET, or of a POST of JSON."""
    data = None if body is None else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data), timeout=timeout_s) as reply:
            return reply.status, reply.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def ask(url, station, tokens, stream=False):
    body = {"prompt": "hi", "max_tokens": tokens, "ignore_eos": True, "stream": stream}
    return call(f"{url}/{station}/v1/completions", body)


def until(condition, within_s=60.0):
    """Waits for a condition, however busy the machine is."""
    end_s = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < end_s
        time.sleep(0.05)


def healthy_again(url, station):
    """Waits until a replica is healthy."""
    until(lambda: call(f"{url}/{station}/health")[0] == 200)


def running(url, station):
    """Requests that a replica has in its batch."""
    page = call(f"{url}/{station}/metrics")[1].decode()
    return sum(float(line.split()[-1]) for line in page.splitlines() if line.startswith("vllm:num_requests_running"))


def test_a_failed_replica_answers_503_and_comes_back(url):
    assert call(f"{url}/pool-0/health")[0] == 200
    replies = {}
    asking = [
        threading.Thread(target=lambda stream=stream: replies.update({stream: ask(url, "pool-0", 8000, stream)}))
        for stream in (False, True)
    ]
    for thread in asking:
        thread.start()
    until(lambda: running(url, "pool-0") == 2)
    assert call(f"{url}/emulate/faults", {"station": "pool-0", "duration_s": 8.0})[0] == 200
    for path in ("health", "metrics", "v1/models"):
        assert call(f"{url}/pool-0/{path}")[0] == 503
    assert ask(url, "pool-0", 2)[0] == 503
    assert ask(url, "pool-1", 2)[0] == 200
    for thread in asking:
        thread.join()
    assert replies[False][0] == 503 and b"failed" in replies[False][1]
    assert replies[True][0] == 200 and b"[DONE]" not in replies[True][1]  # the stream breaks off
    healthy_again(url, "pool-0")
    assert ask(url, "pool-0", 2)[0] == 200


def test_a_slow_replica_is_slow_for_a_while(url):
    def seconds():
        start_s = time.monotonic()
        assert ask(url, "pool-1", 60)[0] == 200
        return time.monotonic() - start_s

    healthy_s = min(seconds() for _ in range(3))
    assert call(f"{url}/emulate/faults", {"station": "pool-1", "duration_s": 8.0, "slowdown": 8.0})[0] == 200
    assert seconds() > 3.0 * healthy_s
    until(lambda: seconds() < 3.0 * healthy_s)


def test_a_provider_that_is_down(url):
    assert call(f"{url}/emulate/faults", {"station": "api", "duration_s": 5.0})[0] == 200
    status, body = ask(url, "api", 2)
    assert status == 503 and b"does not answer" in body
    time.sleep(5.0)
    until(lambda: ask(url, "api", 2)[0] == 200)


def test_a_pool_scales(url):
    assert call(f"{url}/pool-2/health")[0] == ask(url, "pool-2", 2)[0] == 503
    start_s = time.monotonic()
    assert call(f"{url}/emulate/replicas", {"pool": "pool", "replicas": 3})[0] == 200
    healthy_again(url, "pool-2")
    assert time.monotonic() - start_s >= LOAD_S  # it loads its weights first
    assert ask(url, "pool-2", 2)[0] == 200
    assert call(f"{url}/emulate/replicas", {"pool": "pool", "replicas": 2})[0] == 200
    assert [call(f"{url}/pool-{r}/health")[0] for r in range(3)].count(200) == 2


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        ("faults", [], "no JSON object"),
        ("faults", {"station": "pool-9", "duration_s": 1}, "pool-9"),
        ("faults", {"station": "pool-0"}, "duration_s is None"),
        ("faults", {"station": "pool-0", "duration_s": 1, "slowdown": 0.5}, "slowdown is 0.5"),
        ("replicas", {"pool": "p", "replicas": 1}, "'p'"),
        ("replicas", {"pool": "pool", "replicas": "many"}, "'many'"),
    ],
)
def test_what_is_not_legal(url, path, body, words):
    status, reply = call(f"{url}/emulate/{path}", body)
    assert status == 400 and words in reply.decode() and "legal" in reply.decode()
