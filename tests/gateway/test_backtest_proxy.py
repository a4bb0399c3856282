"""A log that a real LiteLLM proxy wrote in shadow mode in front of the emulated fleet, replayed in that fleet's world.

Needs a Python that has LiteLLM, see test_litellm_proxy.py.
"""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from proxy import Proxy

from agents.export import make_bundle
from envs.plant import Plant
from envs.scenario import load_scenario
from evaluation.backtest import backtest
from marginroute import bundle as bundles
from marginroute.margin_rule import MarginParameters, MarginRule
from marginroute.rules import LeastInFlight

PYTHON = os.environ.get("MARGINROUTE_LITELLM_PYTHON", "")
ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(not PYTHON, reason="set MARGINROUTE_LITELLM_PYTHON to a Python that has litellm[proxy]"),
]

FLEET = """
title: Two pools
tiers:
  small: {title: Llama-3.1-8B, quality: {slope: 0.7, ability: {chat: 0.8, extraction: 1.5, code: 0.1, reasoning: 0.1}}}
  medium: {title: Qwen3-32B, quality: {slope: 0.7, ability: {chat: 1.1, extraction: 1.6, code: 1.7, reasoning: 0.7}}}
pools:
  small: {tier: small, profile: llama-3.1-8b-l40s, replicas: 1, gpus_per_replica: 1, gpu_usd_per_hour: 1.5,
    kv_blocks: 11968, max_num_seqs: 128, energy_output_usd_per_mtok: 0.008}
  medium: {tier: medium, profile: qwen3-32b-h100-tp2, replicas: 1, gpus_per_replica: 2, gpu_usd_per_hour: 2.95,
    kv_blocks: 17762, max_num_seqs: 128, energy_output_usd_per_mtok: 0.015}
"""
SCENARIO = "fleet: {fleet}\nplans: starter\nworkload: quickstart\nhorizon_s: 60.0\n"
REQUESTS, OVER_S = 44, 11.0


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The scenario, and its log behind the proxy."""
    folder = tmp_path_factory.mktemp("backtest")
    (folder / "fleet.yaml").write_text(FLEET)
    (folder / "scenario.yaml").write_text(SCENARIO.format(fleet=folder / "fleet.yaml"))
    scenario = load_scenario(folder / "scenario.yaml")
    rule = MarginRule("bid-price", MarginParameters(station_usd_per_s=(0.0, 0.0)))
    bundles.save(make_bundle(Plant(scenario), rule, LeastInFlight("least-in-flight"), {}, {}), folder / "bundle")
    command = [sys.executable, "-m", "envs", "emulate", str(folder / "fleet.yaml"), "--port", "0"]
    emulator = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    proxy = None
    try:
        # http://127.0.0.1:PORT/NAME/v1  model MODEL
        lines = [emulator.stdout.readline().split() for _ in range(2)]
        deployments = []
        for url, _, model in lines:
            pool = url.split("/")[-2].rpartition("-")[0]
            deployments.append((pool, model, url, f"{pool}/0"))
        environ = {"MARGINROUTE_BUNDLE": str(folder / "bundle"), "MARGINROUTE_LOG": str(folder / "log.jsonl")}
        proxy = Proxy(PYTHON, folder / "proxy", deployments, environ)
        proxy.wait()
        drive(proxy)
        until = time.monotonic() + 10.0
        while time.monotonic() < until and len((folder / "log.jsonl").read_text().splitlines()) < REQUESTS + 2:
            time.sleep(0.2)
        yield scenario, folder / "log.jsonl"
    finally:
        if proxy is not None:
            proxy.stop()
        emulator.terminate()
        emulator.wait(10)


def drive(proxy):
    """Streams at random times, both pools in turn, lengths told to the emulator.

    Answers are short since LiteLLM breaks off streams of 100 equal chunks, and the emulator says one word only.
    """
    rng = np.random.default_rng(3)
    start_s = np.sort(rng.random(REQUESTS)) * OVER_S
    prompt, output = rng.integers(3000, 9000, REQUESTS), rng.integers(30, 90, REQUESTS)
    for pool in ("small", "medium"):
        proxy.ask(pool, "the first call is slow", stream=True, key="sk-team", max_tokens=20)
    began = time.monotonic()

    def client(i):
        time.sleep(max(start_s[i] - (time.monotonic() - began), 0.0))
        lengths = {"prompt_tokens": int(prompt[i]), "output_tokens": int(output[i])}
        assert proxy.ask(("small", "medium")[i % 2], "hello", stream=True, key="sk-team", emulate=lengths)[0] == 200

    threads = [threading.Thread(target=client, args=(i,)) for i in range(REQUESTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_the_world_predicts_what_the_proxy_logged(world):
    scenario, log = world
    records = [json.loads(line) for line in log.read_text().splitlines()]
    assert len(records) == REQUESTS + 2 and {record["mode"] for record in records} == {"shadow"}
    found = backtest(scenario, log)
    assert set(found["stations"]) == {"small", "medium"}
    for station in found["stations"].values():
        assert station["requests"] > 20 and station["errors"] == {"logged": 0.0, "predicted": 0.0}
        assert abs(station["e2e_s"]["p50"]["error_pct"]) < 25.0  # a busy machine is no quiet one
        assert abs(station["ttft_s"]["p50"]["error_pct"]) < 50.0
