"""evaluate.py --condition and --suite: a table each, a summary of all, and files whole or not at all."""

import json

import numpy as np
import pytest
from episodes import make_results

import evaluate
from evaluation.contest import Contest
from evaluation.report import build_report
from evaluation.summary import pooled_pct, pooled_words, summarise, summary_document
from marginroute.rules import FixedTier, LeastInFlight

SMALL = ["--set", "horizon_s=15", "requests_per_episode=60", "--episodes", "3", "--workers", "1"]


@pytest.fixture(autouse=True)
def heuristics(monkeypatch, tmp_path):
    known = {"least-in-flight": LeastInFlight("least-in-flight"), "shipped": FixedTier("shipped", 1)}
    monkeypatch.setattr("evaluation.cache.CACHE", tmp_path / "cache")
    monkeypatch.setattr("evaluation.calibration.FOLDER", tmp_path / "verdicts")
    monkeypatch.setattr("agents.baselines.baselines_for", lambda scenario, run_dir=None: dict(known))


@pytest.fixture
def family(tmp_path):
    """quickstart with three conditions."""
    text = "\n".join(
        (
            "fleet: starter",
            "plans: starter",
            "workload: quickstart",
            "horizon_s: 15.0",
            "requests_per_episode: 60",
            "conditions:",
            "  rush: {load_scale: 2.0}",
            "  looks: {fleet.verifiers: {all: {sensitivity: 0.9, specificity: 0.9}}}",
            "  no-api: {fleet.faults: [{provider: api, starts_at_s: 0, duration_s: 15}]}",
        )
    )
    (tmp_path / "family.yaml").write_text(text)
    return tmp_path / "family.yaml"


def test_a_table_per_condition_and_a_summary(family, tmp_path, capsys, monkeypatch):
    def uncovered(plant):
        return ["verifiers"] if plant.verifiers["max_attempts"].any() else []

    monkeypatch.setattr("evaluation.bounds.uncovered", uncovered)
    words = [
        family,
        "--condition",
        "all",
        "--episodes",
        "3",
        "--workers",
        "1",
        "--baselines",
        "least-in-flight,shipped",
        "--bound",
    ]
    words += ["--json", tmp_path / "c.json", "--report", tmp_path / "c.html"]
    assert evaluate.main([str(word) for word in words]) == 0
    shown, errors = capsys.readouterr()
    assert errors.count("no bounds: ") == 1 and "verifiers" in errors
    for words in ("family, as it is:", "family, rush:", "family, no-api:", "under held-out conditions", "Pooled gain"):
        assert words in shown
    document = json.loads((tmp_path / "c.json").read_text())
    assert list(document["conditions"]) == ["as it is", "rush", "looks", "no-api"]
    assert document["conditions"]["no-api"]["policies"]["shipped"]["actions"]["provider"] == 0.0
    bounds = {name: x["bounds"]["clairvoyant"] for name, x in document["conditions"].items()}
    best = document["conditions"]["as it is"]["policies"]["least-in-flight"]["margin_usd_per_1k_requests"]["mean"]
    assert bounds["as it is"] > best
    assert bounds["no-api"] is not None and bounds["looks"] is None
    calls = [x["policies"]["shipped"]["by_class"] for x in document["conditions"].values()]
    assert calls[0] != calls[1]
    rows = document["summary"]["rows"]
    assert all(row["p_holm"] >= row["p_value"] for row in rows.values())
    page = (tmp_path / "c.html").read_text()
    assert 'id="summary"' in page and "rush: all policies" in page


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ["shaky", "--condition", "api-dwn"],
            "not in scenario 'shaky'; did you mean api-down? legal is all, ",
        ),
        (["--suite", "--json", "x.json"], "--json x.json does not go with --suite"),
        (["shaky", "--suite"], "SCENARIO shaky does not go with --suite"),
        (["--out", "x"], "--out x needs --suite"),
        (["--suite", "--explain", "0"], "--explain and --suite exclude each other"),
    ],
)
def test_bad_flags(words, sentence, capsys):
    assert evaluate.main(words) == 2
    assert sentence in capsys.readouterr().err


def test_a_scenario_without_conditions_has_none_to_play(family, capsys):
    family.write_text(family.read_text().partition("conditions:")[0])
    assert evaluate.main([str(family), "--condition", "rain"]) == 2
    assert "has no conditions" in capsys.readouterr().err


def test_the_suite_writes_three_files_per_scenario(monkeypatch, tmp_path, capsys):
    folder = tmp_path / "scenarios"
    folder.mkdir()
    for name in ("quickstart", "unknown"):
        (folder / f"{name}.yaml").write_text("")  # names only: they are looked up where scenarios are
    monkeypatch.setattr("evaluation.suite.SCENARIOS", folder)
    monkeypatch.setattr("evaluation.page_data.SWAPPED", 8)
    out = tmp_path / "reports"
    words = ["--suite", "--out", str(out), "--runs", str(tmp_path / "none"), *SMALL]
    assert evaluate.main(words) == 0
    names = {path.name for path in out.iterdir()}
    assert names == {"quickstart.txt", "quickstart.json", "quickstart.html", "suite.json", "suite.html"}
    suite = json.loads((out / "suite.json").read_text())
    assert suite["scenarios"] == ["quickstart"] and list(suite["left_out"]) == ["unknown"]
    single = json.loads((out / "quickstart.json").read_text())
    row = suite["summary"]["rows"]["quickstart"]
    assert row["margin_usd_per_1k_requests"] == single["policies"][row["policy"]]["margin_usd_per_1k_requests"]
    assert "Accounts" in (out / "quickstart.txt").read_text()
    captured = capsys.readouterr()
    assert "unknown is left out" in captured.out and "scenario 2 of 2: unknown, about" in captured.err


def test_the_suite_writes_the_page_first(monkeypatch, tmp_path):
    """It takes longest: an interruption in it leaves no table and no figures beside a page of an earlier suite."""
    folder = tmp_path / "scenarios"
    folder.mkdir()
    for name in ("quickstart", "enterprise_slo"):
        (folder / f"{name}.yaml").write_text("")
    monkeypatch.setattr("evaluation.suite.SCENARIOS", folder)
    written = []

    def interrupted(path, *_):
        written.append(path.name)
        if path.name == "quickstart.html":
            raise KeyboardInterrupt

    for writer in ("write_report", "write_json", "write_whole"):
        monkeypatch.setattr(f"evaluation.suite.{writer}", interrupted)
    words = ["--suite", "--out", str(tmp_path / "out"), "--runs", str(tmp_path / "none"), *SMALL]
    assert evaluate.main(words) == 130
    assert written == ["enterprise_slo.html", "enterprise_slo.json", "enterprise_slo.txt", "quickstart.html"]


def contests(edges_usd, noise=0.0):
    found, rng = {}, np.random.default_rng(1)
    for name, edge in edges_usd.items():
        results = {"ppo": make_results("ppo", edge), "best": make_results("best")}
        results["ppo"].ledger_usd[:, 0, 0] += noise * rng.normal(size=len(results["ppo"].seeds))
        report = build_report(name, results, "best")
        found[name] = (report, Contest("best", ("best",), {}, results))
    return found


def test_summary_pools_and_adjusts():
    rows = summarise(contests({"a": 0.3, "b": 0.3, "c": 0.0}, noise=0.05))
    assert [row.policy for row in rows] == ["ppo"] * 3 and [row.reference for row in rows] == ["best"] * 3
    assert rows[0].p_holm == pytest.approx(3.0 * rows[0].p_value) and rows[2].p_holm > 0.05
    pooled = pooled_pct(rows)
    assert pooled.low < pooled.mean < pooled.high
    assert min(rows[2].pct, rows[0].pct) < pooled.mean < max(rows[0].pct, rows[1].pct) * 1.05


def test_pooled_gain_of_single_episodes_has_no_interval():
    results = {name: make_results(name, edge, 1) for name, edge in (("ppo", 0.3), ("best", 0.0))}
    rows = summarise({"a": (build_report("a", results, "best"), Contest("best", ("best",), {}, results))})
    assert pooled_pct(rows).mean == rows[0].pct and pooled_words(rows).endswith(f": {rows[0].pct:+.2f}.")
    assert summary_document(rows)["pooled_gain_pct"]["ci95"] is None


def test_pooled_interval_covers():
    """Gains of 2 % in each of three scenarios with noise: the interval holds the truth about as often as it says."""
    rng, hits = np.random.default_rng(2), 0
    rows = summarise(contests({"a": 0.3, "b": 0.3, "c": 0.3}))
    for _ in range(200):
        for row in rows:
            row.gains_pct[:] = 2.0 + rng.normal(0.0, 1.0, len(row.gains_pct))
        pooled = pooled_pct(rows)
        hits += pooled.low <= 2.0 <= pooled.high
    assert 0.88 <= hits / 200 <= 0.99
