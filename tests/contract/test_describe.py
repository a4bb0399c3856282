"""`python -m envs describe`: the table and the page, of traces and scenarios."""

import json

import numpy as np
import pytest

from envs.__main__ import main
from envs.scenario_files import CONFIGS


@pytest.fixture
def chats(tmp_path):
    rng = np.random.default_rng(0)
    path = tmp_path / "chats.jsonl"
    rows = [
        {
            "timestamp": second * 1500,
            "input_length": 1100,
            "output_length": int(rng.integers(5, 50)),
            "hash_ids": [0, 1],
        }
        for second in range(400)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_trace_beside_a_scenario(chats, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    page = tmp_path / "page.html"
    assert main(["describe", str(chats), "--against", "quickstart", "--out", str(page)]) == 0
    out = capsys.readouterr().out
    assert "Fano 60 s" in out and "prompt tokens KS" in out and "chats.jsonl" in out and "quickstart" in out
    hits = next(line for line in out.splitlines() if line.startswith("prefix hits, any size"))
    assert f"{399 * 1024 / (400 * 1100):.1%}" in hits
    assert "rounded arrivals to about 1.5 s" in out
    text = page.read_text()
    assert text.startswith("<!doctype html>") and "Prefix hits within reach" in text and "src=" not in text[:3000]


def test_goals_are_met_by_the_stream_itself_and_missed_by_another(chats, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    found = {}
    for other in (str(chats), "quickstart"):
        assert main(["describe", str(chats), "--against", other]) == 0
        lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("goal:")]
        found[other] = [line[-1] for line in lines]
        assert lines[0][1:5] == ["lengths,", "KS", "<=", "0.07"]
    assert found[str(chats)] == ["met"] * 3  # lengths, dispersion, prefix hits
    assert found["quickstart"][0] == "missed"


def test_a_trace_beside_what_is_fitted_to_it(chats, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    assert main(["describe", str(chats), "--against", "fit", "--draws", "3"]) == 0
    out = capsys.readouterr().out
    assert "fit x 3" in out
    lengths = next(line for line in out.splitlines() if line.startswith("goal: lengths"))
    assert "its halves: 0.0" in lengths and lengths.endswith("met")  # all prompts are as long, outputs of one law


def test_a_recording_of_which_one_half_is_empty_has_no_halves(tmp_path, capsys):
    path = tmp_path / "log.csv"
    times = [*np.linspace(0.0, 10.0, 300), 1000.0]
    path.write_text("arrived_at,prompt_tokens,output_tokens\n" + "".join(f"{at},5,5\n" for at in times))
    assert main(["describe", str(path), "--against", str(path)]) == 0
    out = capsys.readouterr().out
    assert "goal: lengths" in out and "halves" not in out


def test_a_stretch_of_a_trace(chats, capsys):
    assert main(["describe", str(chats), "--from-s", "30", "--to-s", "60"]) == 0
    requests = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("requests"))
    assert requests.split() == ["requests", "20"]


def at_once(tmp_path, rows):
    path = tmp_path / "at_once.csv"
    path.write_text("arrived_at,prompt_tokens,output_tokens\n" + "5,100,20\n" * rows)
    return path


def test_requests_that_arrive_at_once_have_no_rate(tmp_path, chats, capsys):
    for command in ([], ["--against", str(chats)], ["--against", "quickstart", "--draws", "1"]):
        assert main(["describe", str(at_once(tmp_path, 1)), *command]) == 0
        rate = [line.split()[2:] for line in capsys.readouterr().out.splitlines() if line.startswith("rate")]
        assert len(rate) == (1 if command else 0) and all(len(row) == 1 for row in rate)
    assert main(["describe", str(at_once(tmp_path, 60)), "--against", "fit"]) == 2
    assert "arrive at once" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (["--duration-s", "nan"], "--duration-s nan"),
        (["--duration-s", "inf"], "--duration-s inf"),
        (["--duration-s", "-1"], "--duration-s -1"),
        (["--from-s", "-5"], "--from-s -5"),
        (["--from-s", "nan"], "--from-s nan"),
        (["--from-s", "50", "--to-s", "20"], "--to-s 20"),
        (["--to-s", "nan"], "--to-s nan"),
        (["--out", "."], "--out ."),
    ],
)
def test_what_cannot_be_drawn_cut_or_written_is_refused_at_once(chats, capsys, flags, part):
    assert main(["describe", str(chats), *flags]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"error: {part}") and "legal is" in captured.err and not captured.out


def test_empty_and_missing_files_are_called_so(tmp_path, capsys):
    (tmp_path / "empty.csv").touch()
    assert main(["describe", str(tmp_path / "empty.csv")]) == 2
    assert "is empty" in capsys.readouterr().err
    assert main(["describe", str(tmp_path / "gone.csv")]) == 2
    assert "recorded requests" in capsys.readouterr().err


def test_what_is_wrong_is_one_sentence(chats, tmp_path, capsys):
    for words in (
        ["nothing"],
        [str(chats), "--out", str(tmp_path / "no" / "page.html")],
        [str(chats), "--from-s", "9999"],
        [str(chats), "--trace-format", "parquet"],
        [str(chats), "--against", "quickstart", "--draws", "0"],
        ["quickstart", "--against", "fit"],
    ):
        assert main(["describe", *words]) == 2
        error = capsys.readouterr().err
        assert "legal is" in error and "Traceback" not in error


@pytest.mark.parametrize("name", ["coding_agents", str(CONFIGS / "workloads" / "coding_agents.yaml")])
def test_a_trace_beside_a_workload_without_a_scenario(chats, capsys, monkeypatch, name):
    monkeypatch.setenv("COLUMNS", "120")
    assert main(["describe", str(chats), "--against", name]) == 0
    out = capsys.readouterr().out
    assert "coding_agents" in out and "prompt tokens KS" in out
