"""Planning, explanations and counterfactuals: what changes is what was asked for, and the sums agree."""

import json

import numpy as np
import pytest

import evaluate
from envs.plant import Plant
from envs.scenario import load_scenario
from evaluation import cache
from evaluation.cache import cached_play
from evaluation.contest import Entrants, Play
from evaluation.counterfactual import differences, worth_usd
from evaluation.explain import explain_decision
from evaluation.plan import Row, break_even, settings, vary
from evaluation.plan_show import break_even_lines
from evaluation.protocol import evaluate_policies
from evaluation.results import ARRAYS
from evaluation.statistics import Estimate
from marginroute.errors import InputError
from marginroute.margin_rule import MarginParameters, MarginRule
from marginroute.rules import FixedTier, LeastInFlight

SMALL = {"horizon_s": 15.0, "requests_per_episode": 40}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "CACHE", tmp_path / "results")


@pytest.fixture(scope="module")
def scenario():
    return load_scenario("quickstart", SMALL)


def margin_rule(scenario):
    stations = len(scenario.pool_names) + len(scenario.provider_names)
    return MarginRule("expected-margin", MarginParameters((0.0,) * stations))


def test_a_swap_is_worth_what_two_plays_differ_by(scenario):
    plant, workload = Plant(scenario), scenario.generate(1, "heldout")
    shed = plant.layout.n_candidates - 1
    last = workload.n_requests - 1  # what follows nobody: other policies' luck plays no part

    class ShedsLast(LeastInFlight):
        def decide_batch(self, view):
            choice = super().decide_batch(view)
            return np.where(view.request[8] == last, shed, choice)

    policies = {"all": LeastInFlight("all"), "but-last": ShedsLast("but-last")}
    usd = []
    for policy in policies.values():
        from evaluation.protocol import play

        usd.append(play(plant, policy, policy.name, [workload], [1]).margin_usd[0])
    worth = worth_usd(plant, policies["all"], workload, np.array([last, 0]), np.array([shed, shed]))
    assert worth[0] == pytest.approx(usd[0] - usd[1], abs=1e-12)
    assert worth[1] != 0.0


def test_swapping_for_the_same_choice_is_worth_nothing(scenario):
    plant, workload = Plant(scenario), scenario.generate(0, "heldout")
    rule = margin_rule(scenario)
    found = differences(plant, rule, FixedTier("fixed", 1), workload)
    assert 0 < len(found.decision) <= found.decisions
    assert (found.choice != found.other).all()
    assert worth_usd(plant, rule, workload, found.decision, found.choice) == pytest.approx(0.0, abs=1e-12)


def test_swaps_played_in_several_batches_are_worth_the_same(scenario, monkeypatch):
    plant, workload, rule = Plant(scenario), scenario.generate(0, "heldout"), margin_rule(scenario)
    found = differences(plant, rule, FixedTier("fixed", 1), workload)
    assert len(found.decision) > 7
    together = worth_usd(plant, rule, workload, found.decision, found.other)
    monkeypatch.setattr("evaluation.counterfactual.WORLDS_AT_ONCE", 3)
    np.testing.assert_array_equal(worth_usd(plant, rule, workload, found.decision, found.other), together)
    assert worth_usd(plant, rule, workload, found.decision[:0], found.other[:0]).shape == (0,)


def test_an_explanation_names_the_choice_first_and_agrees_with_the_policy(scenario):
    explanation = explain_decision(scenario, margin_rule(scenario), 7)
    first, *others = explanation.candidates
    assert first.name == explanation.decision.name and first.counterfactual_usd == 0.0 and first.probability == 1.0
    brought = [row.counterfactual_usd for row in others]
    assert brought == sorted(brought, reverse=True) and len(brought) >= 3
    assert first.expected_usd == pytest.approx(explanation.decision.reason_usd["margin"])
    with pytest.raises(InputError, match="--explain 100000 is not legal; legal is 0 to"):
        explain_decision(scenario, margin_rule(scenario), 100_000)


def test_settings_are_all_combinations():
    assert settings(["a=1..3", "b=x,y"])[:3] == [{"a": "1", "b": "x"}, {"a": "1", "b": "y"}, {"a": "2", "b": "x"}]
    for word, sentence in (("a", "KEY=V1"), ("a=3..1", "empty"), ("a=x..3", "whole numbers"), ("a=1..999", "200")):
        with pytest.raises(InputError, match=sentence):
            settings([word])


def test_more_gpus_cost_what_they_cost(scenario):
    policy = FixedTier("hosted", 3)

    def load(setting):
        return load_scenario("quickstart", {**SMALL, **setting})

    entrants = Entrants({}, {"hosted": policy})
    rows = vary(load, entrants, settings(["fleet.pools.large.replicas=1..3"]), Play(3, workers=1))
    assert [row.change_usd_per_hour is None for row in rows] == [True, False, False]
    # The policy leaves own replicas idle unless the rate limit is reached: what changes is mostly their price.
    assert rows[2].change_usd_per_hour.mean == pytest.approx(-2 * 4 * 2.95, rel=0.5)


def test_break_even_is_where_the_line_crosses():
    def row(x, usd):
        return Row({"k": str(x)}, "p", Estimate(usd, usd, usd), None, 0.0, 0.0, 0.0)

    assert break_even([row(1, -2.0), row(3, 2.0), row(5, 6.0), row(7, -2.0)], "k") == {"p": pytest.approx([2.0, 6.5])}
    assert break_even([row(0, 0.0), row(1, 2.0), row(3, 0.0), row(5, 2.0)], "k") == {"p": [0.0, 3.0]}  # it touches zero
    assert break_even_lines([row(1, -2.0), row(3, 2.0)]) == ["p breaks even at k = 2."]
    assert break_even_lines([row(30, -2.0), row(4, -1.0)]) == [
        "p loses all the way from k = 4 to 30: no break-even point in between."
    ]
    assert break_even_lines([row(1, 2.0)]) == break_even_lines([row("a", 1.0), row("b", -1.0)]) == []
    assert break_even([row("a", 1.0), row("b", -1.0)], "k") == break_even([row("inf", 1.0), row(1, -1.0)], "k") == {}


def test_the_cache_returns_what_was_played_and_notices_changes(scenario, monkeypatch):
    policies = {"least": LeastInFlight("least"), "hosted": FixedTier("hosted", 3)}
    played = evaluate_policies(scenario, policies, 20, workers=1)
    first = cached_play(scenario, policies, 20, 0, workers=1)
    calls = []
    monkeypatch.setattr(cache, "evaluate_policies", lambda *a, **k: calls.append(a) or evaluate_policies(*a, **k))
    again = cached_play(scenario, policies, 20, 0, workers=1)
    assert calls == []
    for results in (first, again):
        for name in policies:
            for array in ARRAYS:
                np.testing.assert_array_equal(getattr(results[name], array), getattr(played[name], array))
    cached_play(scenario, {"least": LeastInFlight("least", use_providers=True)}, 16, 0, workers=1)
    cached_play(
        load_scenario("quickstart", {**SMALL, "load_scale": 1.1}), {"least": policies["least"]}, 16, 0, workers=1
    )
    assert len(calls) == 2
    next(iter(cache.CACHE.glob("*.pkl"))).write_bytes(b"torn")
    cached_play(scenario, policies, 20, 0, workers=1)


@pytest.fixture
def two_heuristics(monkeypatch):
    known = {"least-in-flight": LeastInFlight("least-in-flight"), "fixed-hosted": FixedTier("fixed-hosted", 3)}
    monkeypatch.setattr("agents.baselines.baselines_for", lambda scenario, run_dir=None: dict(known))


COMMON = ["quickstart", "--set", "horizon_s=10", "requests_per_episode=30", "--workers", "1"]


def test_the_commands(two_heuristics, tmp_path, capsys):
    plan = [*COMMON, "--episodes", "3", "--vary", "fleet.pools.large.replicas=1..2", "--json", str(tmp_path / "p.json")]
    assert evaluate.main([*plan, "--report", str(tmp_path / "p.html")]) == 0
    document = json.loads((tmp_path / "p.json").read_text())
    assert [row["setting"] for row in document["settings"]] == [{"fleet.pools.large.replicas": x} for x in "12"]
    assert 'id="plan"' in (tmp_path / "p.html").read_text()
    assert evaluate.main([*COMMON, "--episodes", "3", "--explain", "5"]) == 0
    assert "Decision 5 of held-out episode 0" in capsys.readouterr().out
    assert evaluate.main([*COMMON, "--episodes", "2", "--report", str(tmp_path / "card.md")]) == 0
    assert (tmp_path / "card.md").read_text().startswith("# quickstart")


def test_until_ci_stops_when_the_gain_is_known(two_heuristics, tmp_path, capsys):
    target = tmp_path / "r.json"
    assert evaluate.main([*COMMON, "--until-ci", "1000", "--json", str(target)]) == 0
    assert json.loads(target.read_text())["episodes"] == 32
    assert evaluate.main([*COMMON, "--until-ci", "0.0001", "--episodes", "40", "--json", str(target)]) == 0
    assert json.loads(target.read_text())["episodes"] == 40
    assert "after 40 episodes the gain is known to +- " in capsys.readouterr().err
    assert evaluate.main([*COMMON, "--until-ci", "-1"]) == 2
    assert evaluate.main([*COMMON, "--until-ci", "1", "--episodes", "31"]) == 2
    assert "--episodes 31 is too few for --until-ci; legal is 32 or more" in capsys.readouterr().err
    assert evaluate.main([*COMMON, "--until-ci", "1", "--baselines", "fixed-hosted"]) == 2
