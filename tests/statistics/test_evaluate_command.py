"""evaluate.py from outside: help at once, one sentence and exit code 2 for bad input, nothing half-written."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import evaluate
from evaluation import arguments

ROOT = Path(__file__).parents[2]


def run(*words, cwd=ROOT):
    return subprocess.run(
        [sys.executable, str(ROOT / "evaluate.py"), *map(str, words)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_help_is_fast_and_imports_nothing_heavy():
    run("--help")
    started_s = time.perf_counter()
    finished = run("--help")
    assert time.perf_counter() - started_s < 0.5
    assert finished.returncode == 0
    assert "--baselines" in finished.stdout
    code = "import sys, evaluate; print([m for m in ('numpy', 'torch', 'numba', 'rich') if m in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert loaded.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--episodes", "0"], "--episodes 0 is not legal; legal is 1 or more"),
        (["--seed", "-1"], "--seed -1 is not legal; legal is 0 or more"),
        (["--workers", "0"], "--workers 0 is not legal; legal is 1 or more"),
        (["--set", "horizon_s"], "--set 'horizon_s' is not legal; legal is KEY=VALUE"),
        (["--trace-format", "csv"], "--trace-format 'csv' needs --trace FILE"),
        (["--trace", "t.csv", "--columns", "arrived_at"], "--columns 'arrived_at' is not legal; legal is KEY=VALUE"),
        (["--json", "/nonexistent/report.json"], "is not a folder that can be written to"),
        (["quickstrat"], "scenario 'quickstrat': not in configs/scenarios; did you mean quickstart? legal is "),
        (["--log", "l.jsonl", "--bound"], "--bound does nothing with --log; legal is to leave it out"),
        (["--log", "l.jsonl", "--policy", "a", "--set", "b=1"], "--set does nothing with --log and --policy"),
        (["--log", "l.jsonl", "--report", "card.md"], "--report card.md does not go with --log; legal is a page"),
        (["--explain", "0", "--json", "r.json"], "--json does nothing with --explain"),
        (["--vary", "load_scale=1,2", "--until-ci", "1"], "--until-ci does nothing with --vary"),
    ],
)
def test_bad_input_is_one_sentence(words, sentence, capsys):
    assert evaluate.main(words) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert sentence in captured.err
    assert captured.out == ""


def test_pairs_keep_equal_signs_in_values():
    assert arguments.pairs(["a.b=1", "c=x=y"], "--set") == {"a.b": "1", "c": "x=y"}


def test_every_documented_flag_is_there():
    words = (
        "azure_conversation --policy a b --policy c --baselines bid-price,random --episodes 4 --trace t.csv"
        " --trace-format csv --columns arrived_at=ts --set a=1 b=2 --json r.json --seed 3 --workers 1"
    )
    args = evaluate.parser().parse_args(words.split())
    assert args.policy == ["a", "b", "c"]
    assert args.set == ["a=1", "b=2"]
    assert args.scenario == "azure_conversation"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ["--baselines", "fixed-smal"],
            "--baselines 'fixed-smal' is not known; did you mean fixed-small? legal is all",
        ),
        (
            ["--baselines", "all,random"],
            "--baselines 'all,random' names others beside all; legal is all alone",
        ),
        (
            ["--condition", "burts"],
            "--condition 'burts' is not in scenario 'quickstart'; did you mean burst? legal is",
        ),
        (
            ["--vary", "load_scal=1"],
            "--vary load_scal: unknown key 'load_scal'; did you mean load_scale? legal is",
        ),
        (["--vary", "load_scale=1,-1"], "--vary load_scale: -1 is not legal; legal is greater than 0"),
        (["--vary", "load_scale=1,,2"], "--vary 'load_scale=1,,2' has an empty value; legal is KEY=V1,V2"),
        (
            ["--vary", "load_scale=1", "load_scale=2"],
            "--vary load_scale stands twice; legal is all its values",
        ),
    ],
)
def test_a_name_that_is_nearly_right(two_heuristics, words, sentence, capsys):
    """Said before anything is played."""
    assert evaluate.main(["quickstart", *words]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"error: {sentence}") and captured.err.count("\n") == 1
    assert captured.out == ""


@pytest.fixture
def two_heuristics(monkeypatch, tmp_path_factory):
    """Untuned heuristics in place of the tuned ones, and a run folder's policy."""
    from marginroute.rules import FixedTier, LeastInFlight

    known = {"least-in-flight": LeastInFlight("least-in-flight"), "fixed-small": FixedTier("fixed-small", 0)}
    monkeypatch.setattr("evaluation.cache.CACHE", tmp_path_factory.mktemp("cache"))
    monkeypatch.setattr("agents.baselines.baselines_for", lambda scenario, run_dir=None: dict(known))
    ppo = LeastInFlight("ppo", use_providers=True)
    monkeypatch.setattr("evaluation.contest.load_policies", lambda runs, scenario: {"ppo": ppo} if runs else {})


SMALL = ["quickstart", "--set", "horizon_s=10", "requests_per_episode=30", "--episodes", "3", "--workers", "1"]


def test_the_whole_comparison(two_heuristics, tmp_path, capsys):
    target = tmp_path / "report.json"
    assert evaluate.main([*SMALL, "--policy", "runs/any", "--json", str(target)]) == 0
    document = json.loads(target.read_text())
    assert document["schema"] == 1
    assert document["scenario"] == "quickstart"
    assert document["episodes"] == 3
    assert set(document["policies"]) == {"ppo", "least-in-flight", "fixed-small", "shuffled-mix", "matched-cost"}
    best = document["best_heuristic"]
    assert best in ("least-in-flight", "fixed-small")
    assert set(document["paired"]) == set(document["policies"]) - {best}
    shown = capsys.readouterr()
    assert f"{best} *" in shown.out
    assert "held-out episodes: 9/9" in shown.err
    assert os.listdir(tmp_path) == ["report.json"]


def test_same_command_same_figures(two_heuristics, tmp_path, capsys):
    for name in ("a.json", "b.json"):
        assert evaluate.main([*SMALL, "--json", str(tmp_path / name)]) == 0
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


def test_named_baselines_only(two_heuristics, capsys):
    assert evaluate.main([*SMALL, "--baselines", "fixed-small"]) == 0
    shown = capsys.readouterr().out
    assert "fixed-small *" in shown
    assert "least-in-flight" not in shown
    assert "shuffled-mix" not in shown


def test_baselines_none_needs_a_policy(two_heuristics, capsys):
    assert evaluate.main([*SMALL, "--baselines", "none", "--policy", "runs/any"]) == 0
    assert evaluate.main([*SMALL, "--baselines", "none"]) == 2
    assert "nothing to compare" in capsys.readouterr().err


def test_an_unknown_baseline_is_named(two_heuristics, capsys):
    assert evaluate.main([*SMALL, "--baselines", "fixed-small,clever"]) == 2
    error = capsys.readouterr().err
    assert "'clever'" in error
    assert "fixed-small" in error


def test_nothing_is_written_when_the_work_fails(two_heuristics, tmp_path, monkeypatch, capsys):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("evaluation.protocol.play", interrupt)
    assert evaluate.main([*SMALL, "--json", str(tmp_path / "report.json")]) == 130
    assert os.listdir(tmp_path) == []
