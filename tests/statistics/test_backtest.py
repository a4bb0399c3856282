"""evaluate.py --log LOG: the world's own log is predicted exactly, another fleet's is not, and reports say so."""

import gzip
import json

import pytest

import evaluate
from evaluation import calibration
from evaluation.backtest import backtest
from evaluation.simulated_log import write_log
from marginroute.rules import FixedTier, LeastInFlight

WORLD = ["quickstart", "--set", "horizon_s=60", "requests_per_episode=400"]


@pytest.fixture(autouse=True)
def verdicts(monkeypatch, tmp_path):
    monkeypatch.setattr(calibration, "FOLDER", tmp_path / "verdicts")


@pytest.fixture(scope="module")
def plant():
    from envs.plant import Plant
    from envs.scenario import load_scenario

    return Plant(load_scenario("quickstart", {"horizon_s": 60.0, "requests_per_episode": 400}))


@pytest.fixture(scope="module")
def log(tmp_path_factory, plant):
    path = tmp_path_factory.mktemp("logs") / "log.jsonl"
    write_log(path, plant, LeastInFlight("least-in-flight"), [0], "heldout")
    return path


def test_the_world_predicts_its_own_log(log, plant):
    found = backtest(plant.scenario, log)
    assert found["calibrated"] and found["outside"] == []
    assert found["requests"] + found["skipped"] == len(log.read_text().splitlines())
    assert sum(station["requests"] for station in found["stations"].values()) == found["requests"]
    for station in found["stations"].values():
        for metric in ("ttft_s", "e2e_s", "cost_usd"):
            for quantile in ("p50", "p95"):
                assert abs(station[metric][quantile]["error_pct"]) < 1e-4


def test_provider_latencies_agree_in_distribution(tmp_path, plant):
    write_log(tmp_path / "log.jsonl", plant, FixedTier("fixed-hosted", 3), [0], "heldout")
    api = backtest(plant.scenario, tmp_path / "log.jsonl")["stations"]["api"]
    assert api["requests"] > 50 and abs(api["ttft_s"]["p50"]["error_pct"]) < 20.0
    assert abs(api["cost_usd"]["p95"]["error_pct"]) < 1e-6


def test_a_log_of_another_fleet_heads_every_later_report(log, tmp_path, capsys, monkeypatch):
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    for record in lines:
        if record["ttft_s"] is not None:
            record["ttft_s"], record["e2e_s"] = 1.5 * record["ttft_s"], 1.5 * record["e2e_s"]
    slow = tmp_path / "slow.jsonl"
    slow.write_text("".join(json.dumps(record) + "\n" for record in lines))
    words = [*WORLD, "--log", slow, "--json", tmp_path / "out.json", "--report", tmp_path / "out.html"]
    assert evaluate.main([str(word) for word in words]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("NOT CALIBRATED") and "off (tolerance 10 %)" in shown
    document = json.loads((tmp_path / "out.json").read_text())["backtest"]
    assert not document["calibrated"]
    assert document["stations"]["small"]["ttft_s"]["p50"]["error_pct"] == pytest.approx(-100.0 / 3.0, abs=0.01)
    assert "NOT CALIBRATED" in (tmp_path / "out.html").read_text()

    known = {"least-in-flight": LeastInFlight("least-in-flight")}
    monkeypatch.setattr("evaluation.cache.CACHE", tmp_path / "cache")
    monkeypatch.setattr("agents.baselines.baselines_for", lambda scenario, run_dir=None: dict(known))
    report = ["--episodes", "2", "--workers", "1", "--baselines", "least-in-flight"]
    assert evaluate.main([*WORLD, *report, "--json", str(tmp_path / "r.json"), "--report", str(tmp_path / "r.md")]) == 0
    assert capsys.readouterr().out.startswith("NOT CALIBRATED")
    assert json.loads((tmp_path / "r.json").read_text())["calibration"]["calibrated"] is False
    assert (tmp_path / "r.md").read_text().startswith("**NOT CALIBRATED")
    assert evaluate.main([*WORLD, "load_scale=1.1", *report]) == 0  # another scenario: no verdict
    assert "CALIBRATED" not in capsys.readouterr().out.upper()


def edited(log, tmp_path, change, row=2):
    lines = log.read_text().splitlines()
    index = [i for i, line in enumerate(lines) if '"status":"completed"' in line][row]
    lines[index] = change(lines[index])
    path = tmp_path / "edited.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path, index + 1


def changed(**values):
    return lambda line: json.dumps(json.loads(line) | values)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (changed(served_by="tiny/0"), "was served by 'tiny/0', which the scenario does not have"),
        (changed(e2e_s=None), "has e2e_s = None"),
        (changed(e2e_s=-1.0), "has e2e_s = -1.0"),
        (changed(cost_usd=float("nan")), "has cost_usd = 'NaN'"),
        (changed(schema=2), "has schema 2"),
        (changed(id=None), "has no id"),
        (changed(output_tokens=10**12), "has output_tokens = 1000000000000; legal is a number from 0 to 10000000"),
        (changed(status="ok"), "has status 'ok'"),
        (lambda line: line[:100], "is not a JSON object"),
    ],
)
def test_a_bad_line_is_named(change, sentence, log, tmp_path, capsys):
    path, number = edited(log, tmp_path, change)
    words = [*WORLD, "--log", str(path), "--json", str(tmp_path / "out.json")]
    assert evaluate.main(words) == 2
    captured = capsys.readouterr()
    assert f"edited.jsonl, line {number}: {sentence}" in captured.err and captured.out == ""
    assert not (tmp_path / "out.json").exists() and not calibration.FOLDER.exists()


def test_a_class_without_requests_has_no_shares(log, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    some = [record for record in lines if record["request"]["class_index"] == 0]
    (tmp_path / "some.jsonl").write_text("".join(json.dumps(record) + "\n" for record in some))
    words = [*WORLD, "--log", tmp_path / "some.jsonl", "--json", tmp_path / "out.json"]
    assert evaluate.main([str(word) for word in words]) == 0
    team = json.loads((tmp_path / "out.json").read_text())["earned"]["classes"]["team"]
    assert team["requests"] == team["margin"] == 0 and team["slo"] is None and team["answered"] is None
    assert [line.split()[:4] for line in capsys.readouterr().out.splitlines() if line.startswith("team")] == [
        ["team", "0", "-", "-"]
    ]


def test_too_short_to_judge(log, tmp_path, plant):
    (tmp_path / "short.jsonl").write_text("".join(log.read_text().splitlines(keepends=True)[:12]))
    found = backtest(plant.scenario, tmp_path / "short.jsonl")
    assert not found["calibrated"] and "too short" in found["outside"][0]


def test_a_log_of_failures_is_not_predicted(log, tmp_path, plant):
    """The world fails nothing: it is off by all of it, in every pool with enough requests."""
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    nothing = dict.fromkeys(("ttft_s", "e2e_s", "output_tokens", "good"))
    failed = [{**record, **nothing, "status": "failed"} for record in lines if record["kind"] == "replica"]
    (tmp_path / "failed.jsonl").write_text("".join(json.dumps(record) + "\n" for record in failed))
    found = backtest(plant.scenario, tmp_path / "failed.jsonl")
    assert not found["calibrated"]
    *errors, last = found["outside"]
    assert "too little was answered" in last
    assert errors and all("share of errors is off by -100.0 points" in words for words in errors)


def test_a_compressed_log_is_named(log, tmp_path, capsys):
    (tmp_path / "log.jsonl.gz").write_bytes(gzip.compress(log.read_bytes()))
    assert evaluate.main([*WORLD, "--log", str(tmp_path / "log.jsonl.gz")]) == 2
    assert "log.jsonl.gz: is compressed; legal is plain lines, as gunzip -c writes them" in capsys.readouterr().err


def test_a_log_of_one_moment_says_nothing_by_the_hour(log, tmp_path, capsys):
    (tmp_path / "one.jsonl").write_text(log.read_text().splitlines(keepends=True)[0])
    assert evaluate.main([*WORLD, "--log", str(tmp_path / "one.jsonl")]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "1 request in 0 s" in shown and "the log spans too little time for figures per hour" in shown


def test_failures_of_shadow_mode_have_no_pool(log, tmp_path, plant):
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    failed = [record for record in lines if record["status"] == "completed"][:5]
    for record in failed:
        record |= {"status": "failed", "served_by": "", "mode": "shadow", "ttft_s": None, "output_tokens": None}
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in lines))
    found = backtest(plant.scenario, tmp_path / "log.jsonl")
    assert found["stations"]["unknown"] == {"requests": 5, "errors": {"logged": 1.0}}
