"""The recipes of docs/extend.md, carried out as they stand there."""

import importlib
import json
import re
from pathlib import Path

import pytest

from agents.baselines import baselines_for
from agents.export import make_bundle
from envs.plant import Plant
from envs.scenario import load_scenario
from marginroute import bundle as bundles

ROOT = Path(__file__).parents[2]


def recipe(name):
    found = re.search(rf"<!-- recipe: {name} -->\n```\w+\n(.*?)```", (ROOT / "docs" / "extend.md").read_text(), re.S)
    assert found, name
    return found[1]


def test_a_new_baseline_is_played_beside_a_tuned_one(tmp_path, monkeypatch, capsys):
    (tmp_path / "my_baseline.py").write_text(recipe("baseline") + "\n\n" + recipe("comparison"))
    monkeypatch.syspath_prepend(tmp_path)
    mine = importlib.import_module("my_baseline")
    assert "Estimate(mean=" in capsys.readouterr().out
    assert mine.results["mine"].first_calls.sum() == mine.results["round-robin"].first_calls.sum() == 400


def test_a_new_workload_is_generated(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(recipe("workload"))
    changes = {"workload": str(path), "drift": {}, "requests_per_episode": None}
    workload = load_scenario("quickstart", changes).generate(0)
    assert workload.n_requests == pytest.approx(4.0 * 240.0, rel=0.15)


def test_a_new_gateway_writes_a_record(tmp_path, monkeypatch):
    scenario = load_scenario("quickstart")
    rules = baselines_for(scenario)
    monkeypatch.chdir(tmp_path)
    bundles.save(
        make_bundle(Plant(scenario), rules["bid-price"], rules["least-in-flight"], {}, {}), Path("bundles/quickstart")
    )
    exec(compile(recipe("gateway"), "docs/extend.md", "exec", dont_inherit=True), {"__name__": "recipe"})
    [record] = map(json.loads, Path("decisions.jsonl").read_text().splitlines())
    assert record["mode"] == "shadow" and record["served_by"] == "small/0" and record["output_tokens"] == 96
