"""Shadow mode in a real LiteLLM proxy: nothing changes, and every request leaves one complete record.

Needs a Python that has LiteLLM:

    python -m venv LITELLM && LITELLM/bin/pip install 'litellm[proxy]==1.106.2' numpy
    MARGINROUTE_LITELLM_PYTHON=LITELLM/bin/python pytest tests/gateway -m integration
"""

import json
import math
import os
import threading
import time
from pathlib import Path

import pytest
from proxy import Proxy
from upstream import GAP_S, PROMPT_TOKENS, TTFT_S, Upstream

PYTHON = os.environ.get("MARGINROUTE_LITELLM_PYTHON", "")
pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(
        not PYTHON, reason="set MARGINROUTE_LITELLM_PYTHON to a Python that has litellm[proxy] (see this file's head)"
    ),
]

CASH = ("revenue", "refunds", "service_credits", "unserved_credits", "cost")
SHUFFLED = 40
SEQUENCE = [  # group, message, stream
    ("only-a", "hello", False),
    ("only-b", "hello", False),
    ("only-a", "hello", True),
    ("only-b", "hello long", True),
    ("chat", "fail:a", False),  # LiteLLM may retry on the other one
    ("only-a", "fail", False),
    ("only-b", "fail", True),
    ("only-a", "refuse", False),
    ("only-b", "break", True),
    ("only-a", "after all", False),
]


@pytest.fixture(scope="module")
def runs(bundle_folder, tmp_path_factory):
    """The same requests through a proxy with and one without the callback."""
    folder = tmp_path_factory.mktemp("litellm")
    log = folder / "records.jsonl"
    ours = {"MARGINROUTE_BUNDLE": str(bundle_folder), "MARGINROUTE_LOG": str(log)}
    results = {}
    upstreams = {name: [Upstream("a"), Upstream("b")] for name in ("with", "without")}
    proxies = {}
    try:
        for name, (a, b) in upstreams.items():
            deployments = [
                ("chat", "a", a.url, "small/0"),
                ("chat", "b", b.url, "large/0"),
                ("only-a", "a", a.url, "small/0"),
                ("only-b", "b", b.url, "large/0"),
            ]
            proxies[name] = Proxy(PYTHON, folder / name, deployments, ours if name == "with" else None)
        for proxy in proxies.values():
            proxy.wait()
        threads = [
            threading.Thread(target=lambda n=name: results.update({n: drive(proxies[n], upstreams[n])}))
            for name in proxies
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        proxies["with"].hang_up("only-a", "hello long")
        records = wait_for_records(log, len(SEQUENCE) + SHUFFLED + 1)
        probe = proxies["with"].probe()
        yield {"results": results, "records": records, "probe": probe, "output": proxies["with"].text(), "log": log}
    finally:
        for proxy in proxies.values():
            proxy.stop()
        for pair in upstreams.values():
            for upstream in pair:
                upstream.close()


def drive(proxy, upstreams):
    """Answers in sequence; then a shuffled group asked by four clients at once, and who served it."""
    answers = [proxy.ask(group, message, stream) for group, message, stream in SEQUENCE]
    before = [len(upstream.calls) for upstream in upstreams]

    def client(i):
        for j in range(SHUFFLED // 4):
            answers_shuffled.append(proxy.ask("chat", f"hello {i} {j}", stream=j % 2 == 0, key=f"sk-{KEYS[i]}"))

    answers_shuffled = []
    threads = [threading.Thread(target=client, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    shares = [len(upstream.calls) - b for upstream, b in zip(upstreams, before, strict=True)]
    return {"answers": answers, "shuffled": answers_shuffled, "shares": shares}


KEYS = ("standard", "premium", "batch", "unheard-of")


def wait_for_records(log, count):
    until = time.monotonic() + 30.0
    while time.monotonic() < until and (not log.exists() or len(log.read_text().splitlines()) < count):
        time.sleep(0.1)
    time.sleep(0.5)  # any that are one too many
    return [json.loads(line) for line in log.read_text().splitlines()]


def test_shadow_changes_nothing(runs):
    with_, without = runs["results"]["with"], runs["results"]["without"]
    retried = [i for i, (_, message, _) in enumerate(SEQUENCE) if message == "fail:a"]
    for i, (seen, expected) in enumerate(zip(with_["answers"], without["answers"], strict=True)):
        if i not in retried:
            assert seen == expected, SEQUENCE[i]
    assert with_["answers"][0] == (200, "a " * 8)
    assert with_["answers"][3] == (200, "b " * 40)
    assert [status for status, _ in with_["answers"][5:8]] == [500, 500, 400]
    for result in (with_, without):
        assert sum(result["shares"]) == SHUFFLED
        assert all(status == 200 for status, _ in result["shuffled"])
        # fair coin, 40 throws: outside 7..33 once in 100,000
        assert 7 <= result["shares"][0] <= 33


def test_one_record_per_request(runs):
    records = runs["records"]
    assert len(records) == len(SEQUENCE) + SHUFFLED + 1  # and the client that hung up
    assert len({record["id"] for record in records}) == len(records)
    assert all(record["schema"] == 1 and record["mode"] == "shadow" for record in records)
    assert {record["policy"] for record in records} == {"bid-price"}
    assert all(len(record["bundle"]) == 12 for record in records)


def test_what_really_happened(runs):
    shares = runs["results"]["with"]["shares"]
    sequence, shuffled = split(runs["records"])
    assert [r["status"] for r in sequence][:4] == ["completed"] * 4
    assert [r["served_by"] for r in sequence][:4] == ["small/0", "large/0", "small/0", "large/0"]
    assert [r["status"] for r in sequence][5:8] == ["failed"] * 3
    assert [r["served_by"] for r in sequence][5:8] == [""] * 3
    assert sequence[8]["status"] in ("completed", "failed")  # a broken stream: LiteLLM's view of it
    assert sum(r["served_by"] == "small/0" for r in shuffled) == shares[0]
    for record in shuffled:
        assert record["status"] == "completed"
        assert record["prompt_tokens"] == PROMPT_TOKENS
        assert record["output_tokens"] == 8
        assert record["e2e_s"] > TTFT_S
        assert record["cost_usd"] > 0.0


def test_ttft_of_streams(runs):
    sequence, _ = split(runs["records"])
    assert sequence[0]["ttft_s"] is None
    long = sequence[3]
    assert TTFT_S <= long["ttft_s"] < long["e2e_s"] - 30 * GAP_S
    streamed = [r for r in runs["records"] if r["ttft_s"] is not None and r["status"] == "completed"]
    assert len(streamed) >= 2 + SHUFFLED // 2


def test_reasons_are_cash_that_adds_up(runs):
    for record in runs["records"]:
        reason = record["reason_usd"]
        assert record["choice"] in record["legal"]
        assert record["guard"] == ""
        assert all(math.isfinite(usd) for usd in reason.values())
        assert sum(reason[part] for part in CASH) == pytest.approx(reason["margin"], abs=1e-8)
        assert record["runner_up_usd"] >= 0.0


def test_class_and_legal_candidates(runs):
    sequence, shuffled = split(runs["records"])
    assert sequence[0]["legal"] == ["small/0", "shed"]
    assert shuffled[0]["legal"] == ["small/0", "large/0", "shed"]
    classes = [int(r["request"]["class_index"]) for r in shuffled]
    assert classes.count(0) == SHUFFLED // 2  # standard, and the key whose class the bundle does not know
    assert classes.count(1) == classes.count(2) == SHUFFLED // 4
    assert runs["output"].count("'unheard-of' is not in the bundle") == 1
    # the estimate from characters moves towards the usage that upstreams report
    assert sequence[0]["request"]["prompt_tokens"] == 1.0
    assert PROMPT_TOKENS / 2 < shuffled[-1]["request"]["prompt_tokens"] < PROMPT_TOKENS * 2


def test_nothing_stays_in_flight_and_nothing_failed(runs):
    probe = {"in_flight": 0, "pending": 0, "errors": {}, "calls": 0, "awaited": 0, "state": "in force"}
    assert runs["probe"] == probe
    assert "Traceback" not in "".join(line for line in runs["output"].splitlines() if "marginroute" in line)
    assert "marginroute: shadow mode, bid-price" in runs["output"]


def test_no_prompt_in_the_log(runs):
    text = Path(runs["log"]).read_text()
    assert "hello" not in text
    assert "sk-" not in text


def split(records):
    """Records of the sequence in order, and of the shuffled group, in order of decision."""
    records = sorted(records, key=lambda record: record["decided_at_s"])
    return records[: len(SEQUENCE)], records[len(SEQUENCE) : -1]
