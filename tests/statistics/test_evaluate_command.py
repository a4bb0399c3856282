"""evaluate.py from outside: help at once, one sentence and exit code 2 for bad input, nothing half-written."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

import evaluate

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
        (["--columns", "arrived_at"], "--columns 'arrived_at' is not legal; legal is KEY=VALUE"),
        (["--json", "/nonexistent/report.json"], "is not a folder that can be written to"),
        (["no_such_scenario"], "no_such_scenario"),
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
    assert evaluate.pairs(["a.b=1", "c=x=y"], "--set") == {"a.b": "1", "c": "x=y"}


def test_every_documented_flag_is_there():
    words = (
        "azure_conversation --policy a b --policy c --baselines bid-price,random --episodes 4 --trace t.csv"
        " --trace-format csv --columns arrived_at=ts --set a=1 b=2 --json r.json --seed 3 --workers 1"
    )
    args = evaluate.parser().parse_args(words.split())
    assert args.policy == ["a", "b", "c"]
    assert args.set == ["a=1", "b=2"]
    assert args.scenario == "azure_conversation"
