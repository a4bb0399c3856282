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


@pytest.fixture
def new_gateway(tmp_path, monkeypatch):
    """Runs the recipe, changed by the words given; returns its names and the records that it wrote."""
    scenario = load_scenario("quickstart")
    rules = baselines_for(scenario)
    monkeypatch.chdir(tmp_path)
    bundles.save(
        make_bundle(Plant(scenario), rules["bid-price"], rules["least-in-flight"], {}, {}), Path("bundles/quickstart")
    )

    def run(*changes):
        code = recipe("gateway")
        for old, new in changes:
            assert code.count(old) == 1
            code = code.replace(old, new)
        exec(compile(code, "docs/extend.md", "exec", dont_inherit=True), {"__name__": "recipe"})
        return [json.loads(line) for line in Path("decisions.jsonl").read_text().splitlines()]

    return run


def test_a_new_gateway_writes_a_record(new_gateway, capsys):
    [record] = new_gateway()
    assert capsys.readouterr().out == "200\n"
    assert record["mode"] == "shadow" and record["served_by"] == "small/0" and record["output_tokens"] == 96


def test_a_new_gateway_acts_and_tries_again_elsewhere(new_gateway, capsys):
    fails_once = "    if not gone:\n        gone.append(candidate)\n        raise OSError\n    told()"
    live = ('ModeSettings("shadow")', 'ModeSettings("live")')
    first, second = new_gateway(live, ("    told()", fails_once), ("ATTEMPTS = 2", "ATTEMPTS = 2\ngone = []"))
    assert capsys.readouterr().out == "200\n"
    assert (first["status"], second["status"], second["mode"]) == ("", "completed", "live")
    assert second["served_by"] == second["choice"] != first["choice"]


def test_a_new_gateway_refuses_what_is_shed(new_gateway, capsys):
    live = ('ModeSettings("shadow")', 'ModeSettings("live")')
    [record] = new_gateway(live, ('tenant="acme")', 'tenant="acme", available=())'))
    assert capsys.readouterr().out == "429\n"
    assert (record["choice"], record["status"]) == ("shed", "shed")
