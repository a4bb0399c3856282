"""The sums behind `python -m benchmarks.gateway`: its ledger is the world's, and its requests are the episode's."""

import asyncio
import json
import os
import sys
import time

import pytest

from benchmarks import gateway, gateway_client, gateway_loop, gateway_processes
from benchmarks.gateway_client import body_of
from envs.emulator_requests import estimated_tokens, parse
from marginroute.errors import InputError


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


def test_a_gateway_that_never_answers_ends_the_episode_all_the_same(made, monkeypatch):
    plant, workload = made
    monkeypatch.setattr(gateway_client, "DRAIN_S", 0.0)
    monkeypatch.setattr(gateway_client, "LATE_S", 0.2)
    monkeypatch.setattr(gateway_loop, "WARM_UP_S", 0.2)

    async def swallow(reader, writer):
        await asyncio.Event().wait()

    async def run():
        server = await asyncio.start_server(swallow, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        began_s = time.monotonic()
        seen = await gateway_client.play(url, workload, plant.scenario, 100.0)
        with pytest.raises(InputError, match=r"8 of 8 first requests through ours got no answer in 0\.2 s"):
            await gateway_loop._all({"ours": url}, workload, plant, 100.0, 2)
        server.close()
        return seen, time.monotonic() - began_s

    seen, took_s = asyncio.run(run())
    assert len(seen) == len(workload.arrived_at_s) and took_s < 30.0
    assert any(s.late for s in seen) and not any(s.status for s in seen)


def test_a_process_is_ready_when_all_of_its_workers_are(tmp_path, monkeypatch):
    monkeypatch.setattr(gateway_processes, "START_S", 20.0)
    port = gateway_processes.free_port()
    server = f"import http.server; http.server.HTTPServer(('127.0.0.1', {port}), http.server.SimpleHTTPRequestHandler)"
    code = f"print({gateway_processes.STARTED!r}, flush=True); {server}.serve_forever()"
    started = []
    try:
        for workers in (1, 2):
            folder = tmp_path / str(workers)
            folder.mkdir()
            monkeypatch.setattr(gateway_processes, "START_S", 20.0 if workers == 1 else 1.0)
            url = f"http://127.0.0.1:{port}/"
            started.append(gateway_processes.Process([sys.executable, "-c", code], folder, os.environ, url, workers))
            if workers == 1:
                started[0].wait()
                started[0].stop()
            else:
                with pytest.raises(InputError, match=r"(1 of 2 workers|does not answer)"):
                    started[1].wait()
    finally:
        for process in started:
            process.stop()
