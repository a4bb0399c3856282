"""The sums behind `python -m benchmarks.gateway`: its ledger is the world's, and its requests are the episode's."""

import json

import pytest

from benchmarks import gateway, gateway_loop
from benchmarks.gateway_client import body_of
from envs.emulator_requests import estimated_tokens, parse


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    plant = gateway_loop.plant_of(tmp_path_factory.mktemp("loop"), 10.0)
    return plant, plant.scenario.generate(1, "heldout")


def test_the_sum_over_requests_is_the_worlds_ledger(made):
    plant, workload = made
    row = gateway_loop.predicted(plant, workload, gateway_loop.bundle_of(plant))
    assert row["answered"] == row["requests"] == len(workload.arrived_at_s)
    assert row["margin_usd_per_1k"] == pytest.approx(row["of_its_own_ledger_usd_per_1k"], rel=1e-9)
    assert sum(row["shares"].values()) == pytest.approx(1.0)


def test_a_request_without_an_answer_costs_its_credit(made):
    plant, workload = made
    ledger = gateway_loop.Ledger(plant, workload)
    i = int((workload.class_index == plant.layout.class_names.index("enterprise")).argmax())
    terms = plant.terms[workload.class_index[i]]
    usage_usd = workload.prompt_tokens[i] * terms["input_usd_per_token"]
    usage_usd += plant.output_tokens[0, workload.task_index[i]] * terms["output_usd_per_token"]
    lost_usd = terms["unserved_credit_share"] * usage_usd + terms["unserved_credit_usd"]
    assert ledger.request_usd(i, None, None, None) == pytest.approx(-lost_usd)
    assert ledger.request_usd(i, 2, 0.1, 1.0) > -lost_usd


def test_bodies_hold_what_the_emulator_needs_and_about_as_many_characters(made):
    _, workload = made
    for i in range(20):
        body = body_of(workload, i, "chat")
        asked = parse(body, {}, True, "chat")
        assert (asked.prompt_tokens, asked.output_tokens) == (workload.prompt_tokens[i], workload.output_tokens[i])
        assert estimated_tokens(json.loads(body), True) == pytest.approx(workload.prompt_tokens[i], abs=10)


def test_the_command_refuses_what_it_cannot_do(monkeypatch, capsys):
    monkeypatch.delenv("MARGINROUTE_LITELLM_PYTHON", raising=False)
    assert gateway.main(["--only", "loop"]) == 2
    assert "MARGINROUTE_LITELLM_PYTHON is not set" in capsys.readouterr().err
    monkeypatch.setenv("MARGINROUTE_LITELLM_PYTHON", "python")
    assert gateway.main(["--only", "loop", "--strategies", "best"]) == 2
    assert "--strategies 'best'; legal: simple-shuffle" in capsys.readouterr().err
    assert gateway.main(["--speed", "0"]) == 2
