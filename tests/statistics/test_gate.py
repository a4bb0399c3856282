"""The gate counts windows of one trace by the blocks that they start in."""

import dataclasses

import numpy as np
import pytest

from agents.config import load_training
from envs.scenario import load_scenario
from envs.scenario_family import stressed
from evaluation import gate as gates
from evaluation.gate import paired_by_blocks
from evaluation.protocol import evaluate_policies
from marginroute.rules import LeastInFlight, Random


@pytest.fixture(scope="module")
def traced(tmp_path_factory):
    """One request per second for 600 s: 120 s of validation, 6 episodes of 20 s side by side."""
    path = tmp_path_factory.mktemp("trace") / "trace.csv"
    rows = [f"{second},{100 + second % 50},20" for second in range(601)]
    path.write_text("\n".join(["arrived_at,prompt_tokens,output_tokens", *rows]) + "\n")
    return load_scenario("quickstart", {"horizon_s": 20.0}, path, "csv")


def test_blocks_are_where_windows_start(traced):
    blocks = [traced.block(seed, "validation") for seed in range(200)]
    assert set(blocks) == set(range(6))
    assert traced.block(0, "train") != traced.block(1, "train") or traced.block(2, "train") != traced.block(0, "train")
    assert load_scenario("quickstart").block(0, "validation") == -1


def test_a_block_is_one_observation(traced):
    policies = {"a": LeastInFlight("a"), "b": Random("b", use_providers=True)}
    results = evaluate_policies(traced, policies, 24, split="validation", workers=1)
    ours, theirs = results["a"], results["b"]
    estimate, observations = paired_by_blocks(traced, ours, theirs)
    assert observations == len({traced.block(seed, "validation") for seed in range(24)}) <= 6
    untraced = traced.model_copy(update={"trace": None})
    free, many = paired_by_blocks(untraced, ours, theirs)
    assert many == 24 and free.mean == pytest.approx(estimate.mean)


def test_one_block_allows_no_interval(traced):
    policies = {"a": LeastInFlight("a"), "b": Random("b", use_providers=True)}
    seeds = [seed for seed in range(60) if traced.block(seed, "validation") == 0][:3]
    parts = [evaluate_policies(traced, policies, 1, split="validation", first_seed=s, workers=1) for s in seeds]
    ours, theirs = (
        dataclasses.replace(
            parts[0][name],
            seeds=np.concatenate([part[name].seeds for part in parts]),
            ledger_usd=np.concatenate([part[name].ledger_usd for part in parts]),
            counts=np.concatenate([part[name].counts for part in parts]),
        )
        for name in ("a", "b")
    )
    estimate, observations = paired_by_blocks(traced, ours, theirs)
    assert observations == 1 and np.isnan(estimate.low)


@pytest.mark.parametrize(("loses_under", "learned"), [(None, True), ("40 % more load", False), ("no drift", False)])
def test_a_loss_under_one_stress_is_refused(small_scenario, monkeypatch, loses_under, learned):
    """A policy that earns a cent more per request, but under one stress a cent less; a loss in the noise is none."""
    advice, ours = LeastInFlight("advice"), LeastInFlight("learned")
    lost = stressed(small_scenario)[loses_under].hash if loses_under else ""
    noise = np.random.default_rng(0)

    def play(scenario, policies, episodes, **_):
        found = evaluate_policies(scenario, {"advice": advice}, episodes, split="validation", workers=1)["advice"]
        gain_usd = np.zeros_like(found.ledger_usd)
        gain_usd[:, 0, 0] = (-0.01 if scenario.hash == lost else 0.01) * found.first_calls
        gain_usd[:, 0, 0] *= noise.uniform(0.5, 1.5, len(gain_usd))
        return {"learned": dataclasses.replace(found, ledger_usd=found.ledger_usd + gain_usd), "advice": found}

    monkeypatch.setattr(gates, "evaluate_policies", play)
    monkeypatch.setattr("agents.export.residual_policy", lambda *_: ours)
    config = load_training(None, {"gate_episodes": 16})
    verdict = gates.gate(small_scenario, None, advice, None, config)
    assert verdict["learned"] == learned
    assert set(verdict["stress"]) == set(stressed(small_scenario))
    assert verdict["refused"] == ([] if learned else [verdict["refused"][0]])
    assert learned or verdict["refused"][0].endswith(f"under stress: {loses_under}")
    assert verdict["delta_usd_per_1k"] == pytest.approx(10.0, rel=0.2)
