"""evaluate.py in a scenario that nothing was tuned for: rules of thumb by name, and a word about it everywhere."""

import json

import pytest

import evaluate
from agents import baselines
from agents.rules_of_thumb import as_they_come
from envs.plant import Plant
from envs.scenario import load_scenario
from marginroute.margin_rule import MarginRule

SMALL = ["--set", "horizon_s=15", "requests_per_episode=60", "--episodes", "2", "--workers", "1", "--no-cache"]
DAY = [
    "horizon_s=60",
    "control.tick_s=20",
    "plans.classes.batch.delay_tolerant.deadline_s=40",
    "fleet.batch_queue.hold_s=5",
]
WORDS = "No tuned baseline is in this comparison"


@pytest.fixture(autouse=True)
def nothing_tuned(monkeypatch, tmp_path):
    monkeypatch.setattr(baselines, "CACHE", tmp_path / "none")
    monkeypatch.setattr(baselines, "SHIPPED", tmp_path / "none")


def test_rules_of_thumb_are_played_as_they_come(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("evaluation.page_data.SWAPPED", 8)
    files = [tmp_path / name for name in ("out.json", "page.html", "card.md")]
    words = ["quickstart", "--baselines", "least-in-flight,round-robin,matched-cost", *SMALL]
    assert evaluate.main([*words, "--bound", "--json", str(files[0]), "--report", str(files[1])]) == 0
    assert WORDS in capsys.readouterr().out
    document = json.loads(files[0].read_text())
    assert document["tuned"] is False and {"least-in-flight", "round-robin"} <= set(document["policies"])
    margins = [x["margin_usd_per_1k_requests"]["mean"] for x in document["policies"].values()]
    assert document["bounds"]["clairvoyant"] >= max(margins)
    assert WORDS in files[1].read_text() and "best tuned heuristic" not in files[1].read_text()
    assert evaluate.main([*words, "--report", str(files[2])]) == 0
    assert WORDS in files[2].read_text()


@pytest.mark.parametrize(
    ("names", "hint"),
    [
        ("all", ""),
        ("bid-price", ""),
        ("least-in-flight,expected-margin", ""),
        ("shipped", ""),
        ("least-inflight", " did you mean least-in-flight?"),
    ],
)
def test_anything_else_needs_tuning(names, hint, capsys):
    """The whole sentence: what is lacking, how to make it, what can be played without."""
    scenario = load_scenario("quickstart", {"horizon_s": 15, "requests_per_episode": 60})
    rules = ", ".join(as_they_come(Plant(scenario)))
    assert evaluate.main(["quickstart", "--baselines", names, *SMALL]) == 2
    assert capsys.readouterr().err == (
        f"error: no tuned baselines for scenario 'quickstart' (hash {scenario.hash}); tune them with train.py on the"
        f" same scenario, trace and --set values;{hint} untuned, --baselines may name {rules}\n"
    )


def test_every_rule_plays(capsys):
    known = as_they_come(Plant(load_scenario("quickstart")))
    assert not any(isinstance(rule, MarginRule) for rule in known.values())
    assert evaluate.main(["quickstart", "--baselines", ",".join(known), *SMALL]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in known)


def test_the_suite_plays_them_too(monkeypatch, tmp_path):
    folder = tmp_path / "scenarios"
    folder.mkdir()
    (folder / "quickstart.yaml").write_text("")
    monkeypatch.setattr("evaluation.suite.SCENARIOS", folder)
    monkeypatch.setattr("evaluation.page_data.SWAPPED", 8)
    words = ["--suite", "--out", str(tmp_path / "out"), "--baselines", "round-robin,fixed-large", *SMALL]
    assert evaluate.main(words) == 0
    assert json.loads((tmp_path / "out" / "quickstart.json").read_text())["tuned"] is False
    assert WORDS in (tmp_path / "out" / "quickstart.txt").read_text()


def test_controllers_as_they_come(tmp_path, capsys):
    words = ["day_night", "--episodes", "2", "--workers", "1", "--no-cache", "--set", *DAY, "--baselines"]
    target = tmp_path / "out.json"
    assert evaluate.main([*words, "static,predictive-edf", "--bound", "--json", str(target)]) == 0
    assert WORDS in capsys.readouterr().out
    document = json.loads(target.read_text())
    assert set(document["policies"]) == {"plain + static", "plain + predictive-edf"}
    for names in ("all", "static,bid-price"):
        assert evaluate.main([*words, names]) == 2
        error = capsys.readouterr().err
        assert "no tuned baselines for scenario 'day_night'" in error
        assert "; untuned, --baselines may name static, hpa, " in error
