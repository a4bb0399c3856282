"""`python -m envs simulate` and `calibrate`: files in, whole files out, one sentence for bad input."""

import csv
import gzip

import numpy as np
import pytest
import yaml

from envs.__main__ import main
from envs.fleet.profile import compact_profile

REQUESTS = "arrived_at,prompt_tokens,output_tokens\n0.5,100,20\n0.6,3000,1\n0.6,50,400\n"


@pytest.fixture
def requests(tmp_path):
    path = tmp_path / "requests.csv"
    path.write_text(REQUESTS)
    return path


def _simulate(requests, out, *more, fleet="starter"):
    return main(["simulate", fleet, "--requests", str(requests), "--out", str(out), *more])


def test_simulate_writes_a_row_per_request(requests, tmp_path):
    out = tmp_path / "out.csv"
    assert _simulate(requests, out) == 0
    rows = list(csv.DictReader(out.open()))
    assert [row["prompt_tokens"] for row in rows] == ["100", "3000", "50"]
    for row in rows:
        ttft_s, tpot_s, e2e_s = (float(row[name]) for name in ("ttft_s", "tpot_s", "e2e_s"))
        assert e2e_s == pytest.approx(ttft_s + tpot_s * (int(row["output_tokens"]) - 1))
        assert 0.0 < ttft_s <= e2e_s
    assert sorted(tmp_path.iterdir()) == [out, requests]


def test_simulate_is_reproducible_and_serves_the_pool_asked_for(requests, tmp_path):
    texts = []
    for name, more in (("a", ()), ("b", ()), ("c", ("--pool", "large"))):
        assert _simulate(requests, tmp_path / name, *more) == 0
        texts.append((tmp_path / name).read_text())
    assert texts[0] == texts[1] != texts[2]


def test_simulate_reads_gzip_and_leaves_cells_of_what_cannot_fit_empty(tmp_path):
    path = tmp_path / "requests.csv.gz"
    path.write_bytes(gzip.compress(b"output_tokens,arrived_at,prompt_tokens\n5,0,9000000\n5,0,10\n"))
    assert _simulate(path, tmp_path / "out.csv") == 0
    rows = list(csv.DictReader((tmp_path / "out.csv").open()))
    assert rows[0]["ttft_s"] == rows[0]["e2e_s"] == ""
    assert float(rows[1]["ttft_s"]) > 0.0


HASHED = "arrived_at,prompt_tokens,output_tokens,hash_ids\n0,1500,20,4 5 6\n9,1500,20,4 5 7\n9,40,2,\n"
LINES = (
    '{"timestamp": 0, "input_length": 1500, "output_length": 20, "hash_ids": [4, 5, 6]}\n'
    '{"timestamp": 9000, "input_length": 1500, "output_length": 20, "hash_ids": [4, 5, 7]}\n\n'
    '{"timestamp": 9000, "input_length": 40, "output_length": 2, "hash_ids": []}\n'
)


def test_simulate_reuses_prefixes_where_the_requests_have_hashes(tmp_path, capsys):
    texts = {}
    for name, text, more in (
        ("r.csv", HASHED, ()),
        ("r.jsonl", LINES, ()),
        ("plain.csv", HASHED, ("--no-prefix-caching",)),
        ("small.csv", HASHED, ("--hash-block-tokens", "16")),
    ):
        (tmp_path / name).write_text(text)
        assert _simulate(tmp_path / name, tmp_path / "out", *more) == 0
        texts[name] = (tmp_path / "out").read_text()
        assert ("cached" in capsys.readouterr().err) == (name != "plain.csv")
    rows = {name: list(csv.DictReader(text.splitlines())) for name, text in texts.items()}
    assert texts["r.csv"] == texts["r.jsonl"]
    assert [row["cached_tokens"] for row in rows["r.csv"]] == ["0", "1024", "0"]
    assert [row["cached_tokens"] for row in rows["plain.csv"]] == ["0", "0", "0"]
    assert [row["cached_tokens"] for row in rows["small.csv"]] == ["0", "32", "0"]
    ttft_s = [float(rows[name][1]["ttft_s"]) for name in ("r.csv", "small.csv", "plain.csv")]
    assert ttft_s == sorted(ttft_s) and ttft_s[0] < ttft_s[2]


@pytest.mark.parametrize(
    ("name", "text", "more", "words"),
    [
        ("r.csv", HASHED.replace("4 5 7", "4 x 7"), (), "request 2: hash_ids has 'x'"),
        ("r.csv", HASHED.replace("4 5 7", "4 -5 7"), (), "request 2: hash_ids has '-5'"),
        ("r.csv", HASHED.replace("4 5 7", "4 5 4"), (), "request 2 has 4 twice"),
        ("r.csv", HASHED, ("--hash-block-tokens", "24"), "multiple of the engine's 16"),
        ("r.jsonl", LINES.replace("[4, 5, 7]", "[4, 5, 7.5]"), (), "request 2: hash_ids has 7.5"),
        ("r.jsonl", LINES.replace("[4, 5, 7]", "7"), (), "line 2"),
        ("r.jsonl", LINES.replace('"timestamp": 9000', '"time": 9'), (), "line 2"),
        ("r.jsonl", LINES.replace("9000", "NaN"), (), "line 2"),
        ("r.jsonl", "[1]\n", (), "line 1"),
        ("r.jsonl", "{\n", (), "line 1"),
        ("r.jsonl", "\n", (), "no rows"),
        ("r.jsonl.gz", LINES, (), "not a gzip file"),
    ],
)
def test_simulate_refuses_bad_hashes(name, text, more, words, tmp_path, capsys):
    (tmp_path / name).write_text(text)
    assert _simulate(tmp_path / name, tmp_path / "out", *more) == 2
    message = capsys.readouterr().err
    assert words in message
    assert message.startswith("error: ") and message.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "columns are none"),
        ("arrived_at,prompt_tokens\n1,2\n", "output_tokens"),
        ("arrived_at,prompt_tokens,output_tokens\n", "no rows"),
        ("arrived_at,prompt_tokens,output_tokens\n1,2\n", "line 2: 2 cells"),
        ("arrived_at,prompt_tokens,output_tokens\n1,x,2\n", "line 2: prompt_tokens = 'x'"),
        ("arrived_at,prompt_tokens,output_tokens\n1,nan,2\n", "finite"),
        ("arrived_at,prompt_tokens,output_tokens\n1,2.5,2\n", "whole number"),
        ("arrived_at,prompt_tokens,output_tokens\n1,0,2\n", "from 1 to"),
        ("arrived_at,prompt_tokens,output_tokens\n-1,2,2\n", "0 or later"),
        ("arrived_at,prompt_tokens,output_tokens\n2,2,2\n1,2,2\n", "ascending"),
    ],
)
def test_simulate_refuses_bad_requests_and_writes_nothing(text, words, tmp_path, capsys):
    path, out = tmp_path / "requests.csv", tmp_path / "out.csv"
    path.write_text(text)
    assert _simulate(path, out) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert message.count("\n") == 1
    assert words in message
    assert not out.exists()


def test_simulate_names_what_is_missing(requests, tmp_path, capsys):
    assert _simulate(requests, tmp_path / "out.csv", fleet="startr") == 2
    assert "starter" in capsys.readouterr().err
    assert _simulate(requests, tmp_path / "out.csv", "--pool", "huge") == 2
    assert "small" in capsys.readouterr().err
    assert _simulate(tmp_path / "none.csv", tmp_path / "out.csv") == 2
    assert "none.csv" in capsys.readouterr().err
    assert _simulate(requests, tmp_path / "no" / "out.csv") == 2
    assert "out.csv" in capsys.readouterr().err


def _table(path):
    rng = np.random.default_rng(0)
    lines = ["kind,prefill_tokens,prefill_prefix,decode_batch,mean_kv,iter_ms"]
    for _ in range(300):
        chunk, prefix = int(rng.integers(1, 2000)), int(rng.integers(0, 3000))
        batch, mean = int(rng.integers(1, 65)), int(rng.integers(64, 4096))
        milliseconds = 10 + 0.02 * (chunk + batch) + 1e-4 * batch * mean + 3e-5 * chunk * (chunk / 2 + prefix)
        lines.append(f"mixed,{chunk},{prefix},{batch},{mean},{milliseconds}")
    path.write_text("\n".join(lines) + "\n")


def test_calibrate_writes_a_profile_that_loads(tmp_path, capsys):
    table, out = tmp_path / "table.csv", tmp_path / "profile.yaml"
    _table(table)
    cache = ["--kv-bytes-per-token", "131072", "--weights-gb", "16.1", "--gpu-memory-gb", "80", "--gpus", "1"]
    assert main(["calibrate", "iterations", str(table), "--out", str(out), "--title", "Engine", *cache]) == 0
    assert "median" in capsys.readouterr().err
    data = yaml.safe_load(out.read_text())
    assert data["title"] == "Engine"
    assert data["kv_cache"]["blocks"] == int((0.9 * 80 - 16.1 - 2.0) * 1e9 / (131072 * 16))
    assert compact_profile("p", data).token_s[100] > 0.0


def test_calibrate_refuses_half_a_memory_and_models_that_do_not_fit(tmp_path, capsys):
    table, out = tmp_path / "table.csv", tmp_path / "profile.yaml"
    _table(table)
    common = ["calibrate", "iterations", str(table), "--out", str(out), "--gpus", "1"]
    assert main(common) == 2
    assert "--weights-gb" in capsys.readouterr().err
    more = ["--kv-bytes-per-token", "131072", "--weights-gb", "141", "--gpu-memory-gb", "80"]
    assert main([*common, *more]) == 2
    assert "fits" in capsys.readouterr().err
    assert not out.exists()
