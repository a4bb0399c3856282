"""`python -m envs emulate`: a real server, OpenAI's formats, vLLM's metrics, and the engine's times."""

import asyncio
import http.client
import json
import math
import re
import signal
import time
import urllib.error
import urllib.request

import numpy as np
import pytest
from served import FLEET, served

from envs.__main__ import main
from envs.emulator_requests import estimated_tokens
from envs.emulator_world import LiveFleet, Station
from envs.endpoint_client import Client
from envs.fleet.profile import constant_profile
from envs.fleet.replay import replay
from envs.fleet.spec import FleetSpec, PoolSpec, ProviderSpec
from envs.simulate import load_fleet

SLOW = 0.5  # of the timing test's server: seconds there are two here, so that the machine's noise counts half


@pytest.fixture(scope="module")
def fleet(tmp_path_factory):
    path = tmp_path_factory.mktemp("fleet") / "fleet.yaml"
    path.write_text(FLEET)
    return path


@pytest.fixture(scope="module")
def url(fleet):
    with served(fleet, "--speed", str(SLOW)) as (base, _):
        yield base


def call(url, body=None, **headers):
    """(status, headers, body) of a GET, or of a POST of JSON."""
    data = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=30) as reply:
            return reply.status, reply.headers, reply.read()
    except urllib.error.HTTPError as error:
        return error.code, error.headers, error.read()


def metrics(url):
    """Samples of a metrics page, buckets left out."""
    page = call(f"{url}/pool-0/metrics")[2].decode()
    return {name: float(value) for name, value in re.findall(r"^(vllm:\w+)\{(?!.*le=).*\} (\S+)$", page, re.MULTILINE)}


def test_paths_models_and_health(url):
    assert json.loads(call(f"{url}/")[2])["paths"] == ["/pool-0/v1", "/pool-1/v1", "/api/v1"]
    assert call(f"{url}/health")[0] == call(f"{url}/pool-1/health")[0] == 200
    model = json.loads(call(f"{url}/pool-0/v1/models")[2])["data"][0]
    assert model["id"] == "m"
    assert model["max_model_len"] == 2000 * 16


def test_answers_in_one_piece(url):
    body = {"messages": [{"role": "user", "content": "x" * 40}], "emulate": {"output_tokens": 5}}
    reply = json.loads(call(f"{url}/pool-0/v1/chat/completions", body)[2])
    assert reply["usage"] == {"prompt_tokens": 14, "completion_tokens": 5, "total_tokens": 19}
    assert reply["choices"][0]["finish_reason"] == "stop"
    assert reply["choices"][0]["message"]["content"].split() == ["lorem"] * 5
    body = {"prompt": [1, 2, 3], "max_tokens": 4, "ignore_eos": True, "model": "m"}
    reply = json.loads(call(f"{url}/pool-0/v1/completions", body)[2])
    assert reply["usage"]["prompt_tokens"] == 3
    assert reply["choices"][0] == {"index": 0, "finish_reason": "length", "text": " lorem" * 4}


def test_streams_one_event_per_token_with_usage(url):
    body = {"messages": [{"role": "user", "content": "hi"}], "stream": True, "stream_options": {"include_usage": True}}
    headers = {"x-emulate-output-tokens": "7", "x-emulate-prompt-tokens": "30"}
    _, kind, raw = call(f"{url}/pool-0/v1/chat/completions", body, **headers)
    assert kind["content-type"] == "text/event-stream"
    events = [line.removeprefix("data: ") for line in raw.decode().split("\n\n") if line]
    assert events.pop() == "[DONE]"
    *parts, usage = map(json.loads, events)
    assert usage["usage"] == {"prompt_tokens": 30, "completion_tokens": 7, "total_tokens": 37}
    texts = [part["choices"][0]["delta"].get("content") for part in parts]
    assert texts == ["", *[" lorem"] * 7, ""]
    assert parts[0]["choices"][0]["delta"]["role"] == "assistant"
    assert parts[-1]["choices"][0]["finish_reason"] == "stop"


def test_refusals(url):
    chat, plain = f"{url}/pool-0/v1/chat/completions", f"{url}/pool-0/v1/completions"
    for body in (b"{", [], {}, {"messages": []}, {"messages": [{}], "max_tokens": 0}, {"messages": [{}], "n": 2}):
        assert call(chat, body)[0] == 400
    assert call(chat, {"messages": [{}], "model": "other"})[0] == 404
    assert call(f"{url}/nobody/v1/completions", {"prompt": "x"})[0] == 404
    status, _, body = call(plain, {"prompt": "x", "emulate": {"prompt_tokens": 31990, "output_tokens": 20}})
    assert status == 400
    assert "maximum context length is 32000" in json.loads(body)["error"]["message"]
    assert call(plain, {"prompt": "x", "emulate": {"output_tokens": -1}})[0] == 400


@pytest.mark.parametrize(
    ("prompt_tokens", "tokens", "after_s"), [(30, 600.0, 3.0), (500, 600.0, 6.5), (30, math.inf, 0.0)]
)
def test_a_refusal_says_when_there_is_room(prompt_tokens, tokens, after_s):
    """A call in a second, 10 tokens in a second, at twice the speed; 50 tokens of debt, as of 2 s, and it is 4 s."""
    api = ProviderSpec("api", requests_per_minute=60.0, tokens_per_minute=tokens, burst_tokens=100.0)
    live = LiveFleet(FleetSpec((PoolSpec("p", constant_profile(1.0)),), (api,)), 2.0, 0, lambda *seen: None)
    row = live.fleet.providers[0, :1]
    row["bucket"], row["bucket_at_s"], row["token_bucket"], row["token_bucket_at_s"] = 0.25, 3.0, -50.0, 2.0
    if math.isinf(tokens):
        row["token_bucket"] = math.inf
    live.fleet.worlds["clock_s"] = 4.0
    assert live.retry_after_s(Station("api", "m", None, 0, 1000), prompt_tokens) == after_s


@pytest.mark.slow  # measures wall-clock latency: needs idle cores
def test_the_provider_has_its_latency_and_its_limit(url):
    body = {"prompt": "x", "max_tokens": 11, "ignore_eos": True}
    began_s = time.perf_counter()
    statuses = [call(f"{url}/api/v1/completions", body)[0] for _ in range(2)]
    took_s = (time.perf_counter() - began_s) * SLOW
    status, headers, _ = call(f"{url}/api/v1/completions", body)
    assert [*statuses, status] == [200, 200, 429]
    assert 1 <= int(headers["retry-after"]) <= 10  # one call in 5 s, at half speed
    assert took_s == pytest.approx(2 * (0.1 + 10 * 0.01), rel=0.2)
    assert call(f"{url}/api/metrics")[0] == 404


async def _loaded(url, lengths):
    """Sends streams one after the other, 20 ms apart; (seconds of sending, answers)."""
    client = Client(f"{url}/pool-0", None, 60.0)
    running = []
    for prompt_tokens, output_tokens in lengths:
        body = {
            "messages": [{"role": "user", "content": "x"}],
            "emulate": {"prompt_tokens": prompt_tokens, "output_tokens": output_tokens},
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        running.append(await client.start(body))
        await asyncio.sleep(0.02)
    return [await one.whole() for one in running]


@pytest.mark.slow  # measures wall-clock token times: needs idle cores
def test_tokens_come_when_the_engine_says(url, fleet):
    """Against the same requests replayed; a loaded machine delays single tokens, hence the median."""
    rng = np.random.default_rng(0)
    lengths = [(int(p), int(o)) for p, o in zip(rng.integers(50, 900, 12), rng.integers(20, 60, 12), strict=True)]
    before = metrics(url)
    answers = asyncio.run(_loaded(url, lengths))
    after = metrics(url)
    sent_s = np.array([answer.sent_s for answer in answers])
    spec = load_fleet(str(fleet))
    one = type(spec)(tuple(type(pool)(**{**vars(pool), "replicas": 1}) for pool in spec.pools))
    done = replay(one, (sent_s - sent_s[0]) * SLOW, *map(np.array, zip(*lengths, strict=True))).requests[0]
    ttft_s = np.array([answer.ttft_s for answer in answers]) * SLOW
    e2e_s = np.array([answer.token_s[-1] - answer.sent_s for answer in answers]) * SLOW
    assert [len(answer.token_s) for answer in answers] == [length for _, length in lengths]
    assert np.median(np.abs(ttft_s - (done["first_token_at_s"] - done["dispatched_at_s"]))) < 0.006
    assert np.median(np.abs(e2e_s / (done["completed_at_s"] - done["dispatched_at_s"]) - 1.0)) < 0.03

    grown = {name: after[name] - before[name] for name in after}
    assert grown["vllm:prompt_tokens_total"] == sum(p for p, _ in lengths)
    assert grown["vllm:generation_tokens_total"] == sum(o for _, o in lengths)
    assert grown["vllm:e2e_request_latency_seconds_count"] == len(lengths)
    assert grown["vllm:e2e_request_latency_seconds_sum"] == pytest.approx(e2e_s.sum() / SLOW, rel=0.05)
    assert grown["vllm:time_to_first_token_seconds_sum"] == pytest.approx(ttft_s.sum() / SLOW, rel=0.2)
    assert grown["vllm:inter_token_latency_seconds_count"] == sum(o - 1 for _, o in lengths)


def test_metrics_while_it_runs_and_a_user_who_hangs_up(url):
    host = http.client.HTTPConnection(url.removeprefix("http://"))
    body = {"prompt": "x", "stream": True, "emulate": {"prompt_tokens": 160, "output_tokens": 60}}
    host.request("POST", "/pool-0/v1/completions", json.dumps(body))
    host.getresponse().read(1)
    during = metrics(url)
    host.sock.close()
    host.close()
    assert during["vllm:num_requests_running"] == 1
    assert during["vllm:num_requests_waiting"] == 0
    assert 10 / 2000 <= during["vllm:kv_cache_usage_perc"] <= 14 / 2000
    page = call(f"{url}/pool-0/metrics")[2].decode()
    assert 'vllm:cache_config_info{block_size="16",engine="0",num_gpu_blocks="2000"} 1.0' in page
    assert 'vllm:time_to_first_token_seconds_bucket{engine="0",model_name="m",le="+Inf"}' in page
    for _ in range(100):
        time.sleep(0.05)
        if metrics(url)["vllm:num_requests_running"] == 0:
            break
    assert metrics(url)["vllm:kv_cache_usage_perc"] == 0.0


def test_an_interruption_ends_it_with_streams_open(fleet):
    with served(fleet) as (url, process):
        host = http.client.HTTPConnection(url.removeprefix("http://"))
        host.request(
            "POST", "/pool-0/v1/completions", json.dumps({"prompt": "x", "max_tokens": 9000, "ignore_eos": True})
        )
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=10) in (0, 130)
        assert "Traceback" not in process.stderr.read()
        host.close()


def test_prompt_estimate():
    assert estimated_tokens({"messages": [{"content": "x" * 41}, {"content": [{"text": "abc"}]}]}, True) == 11 + 8
    assert estimated_tokens({"prompt": "x" * 9}, False) == 3


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--speed", "0"], "--speed"),
        (["--speed", "nan"], "--speed"),
        (["--port", "99999"], "--port"),
        (["--host", "no.such.host.invalid", "--port", "0"], "--host"),
        (["--output-median", "-1"], "--output-median"),
    ],
)
def test_bad_flags_are_refused_in_one_sentence(flags, words, fleet, capsys):
    assert main(["emulate", str(fleet), *flags]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert message.count("\n") == 1
    assert words in message
