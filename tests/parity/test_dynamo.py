"""The engine beside NVIDIA Dynamo's offline replay on one workload, and the sentence said where Dynamo is missing."""

import os
import subprocess
import sys

import numpy as np
import pytest

from benchmarks import dynamo_case, dynamo_replay

PYTHON = os.environ.get("MARGINROUTE_DYNAMO_PYTHON", sys.executable)


def has_dynamo():
    return subprocess.run([PYTHON, "-c", "import dynamo._core"], capture_output=True, check=False).returncode == 0


def test_requests_share_beginnings_and_trace_has_a_hash_per_started_block(tmp_path):
    requests = dynamo_case.draw_requests(50, 10.0)
    assert (requests.counts == requests.prompt_tokens // 16).all()
    assert len(np.unique(requests.hashes)) < 0.9 * len(requests.hashes)
    dynamo_case.write_trace(tmp_path / "t.jsonl", requests)
    rows = [dynamo_case.json.loads(line) for line in (tmp_path / "t.jsonl").read_text().splitlines()]
    assert [len(row["hash_ids"]) for row in rows] == (-(-requests.prompt_tokens // 16)).tolist()
    assert [row["input_length"] for row in rows] == requests.prompt_tokens.tolist()


def test_without_dynamo_one_sentence_says_how_to_install_it(capsys):
    if has_dynamo() and sys.executable == PYTHON:
        pytest.skip("Dynamo is installed in this interpreter")
    assert dynamo_replay.main(["--quick"]) == 2
    assert "pip install ai-dynamo-runtime" in capsys.readouterr().err
    assert dynamo_replay.main(["--quick", "--dynamo-python", "/no/such/python"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_both_simulate_the_same(tmp_path):
    """Same replica, same reuse, times within a rounding of the iteration in which a prompt completes."""
    if not has_dynamo():
        pytest.skip("needs ai-dynamo-runtime; name its interpreter in MARGINROUTE_DYNAMO_PYTHON")
    requests = dynamo_case.draw_requests(1_000, 2 * dynamo_case.REQUESTS_PER_S)
    trace, profile = tmp_path / "t.jsonl", tmp_path / "p.npz"
    dynamo_case.write_trace(trace, requests)
    dynamo_case.dynamo_profile(profile)
    theirs = dynamo_case.run_dynamo(PYTHON, 2, trace, profile, 1)
    ours = dynamo_case.run_ours(2, requests, 1)
    assert (ours["worker"] == np.array(theirs["worker"])).all()
    assert np.mean(ours["reused_tokens"] == np.array(theirs["reused_tokens"])) > 0.99
    assert np.median(ours["ttft_s"]) == pytest.approx(np.median(theirs["ttft_s"]), rel=0.03)
    assert np.median(ours["e2e_s"]) == pytest.approx(np.median(theirs["e2e_s"]), rel=0.01)
    assert ours["duration_s"] == pytest.approx(theirs["duration_s"], rel=0.005)
