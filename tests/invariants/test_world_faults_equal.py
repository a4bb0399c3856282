"""Episodes with faults: the same for every policy and every neighbour, compiled or not."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from envs.economics import ledger as books
from envs.scenario import load_scenario
from envs.workload.requests import Workload
from envs.worlds import FleetWorlds

ROOT = Path(__file__).resolve().parents[2]
SHORT = {"horizon_s": 60.0, "requests_per_episode": 150}
TARGETS = np.array([[1, 3], [3, 1], [2, 2]])


def outcome(worlds, w):
    """Everything that an episode came to."""
    fleet = worlds.fleet
    m = int(worlds.desks["n_requests"][w])
    data = {name: fleet.requests[name][w, :m] for name in ("status", "replica", "first_token_at_s", "completed_at_s")}
    data |= {name: fleet.replicas[name][w] for name in ("state", "busy_s", "iterations", "restarts")}
    data |= {"ledger_usd": worlds.ledger_usd[w], "counts": worlds.counts[w], "powered_s": worlds.own["powered_s"][w]}
    return {name: array.tolist() for name, array in data.items()}


def play(seeds):
    """Random choices (a stream per seed) and a scaling target every 40 decisions."""
    scenario = load_scenario("shaky", SHORT)
    worlds = FleetWorlds(scenario, len(seeds))
    worlds.load_all([scenario.generate(seed, "validation") for seed in seeds])
    rngs, steps = [np.random.default_rng(seed) for seed in seeds], 0
    while not worlds.done.all():
        draws = np.array([rng.random(worlds.legal.shape[1]) for rng in rngs])
        draws[:, -2:] -= 0.9  # defer and shed seldom
        worlds.step(np.where(worlds.legal, draws, -1.0).argmax(axis=1))
        steps += 1
        if steps % 40 == 0:
            worlds.set_replicas(TARGETS[steps // 40 % len(TARGETS)])
    return worlds


def test_the_scenario_below_has_everything():
    counts = play(range(12)).counts.sum(axis=(0, 2))
    assert counts[books.RETRIES] > 20 and counts[books.SERVED] > 300
    kinds = {(row["kind"], bool(np.isinf(row["slowdown"]))) for seed in range(12) for row in faults(seed)}
    assert kinds == {(0, True), (0, False), (1, True), (1, False)}


def faults(seed, **overrides):
    return load_scenario("shaky", SHORT | overrides).generate(seed, "validation").faults


def test_a_world_among_others_is_as_alone():
    together = play([3, 4, 5])
    for w, seed in enumerate((3, 4, 5)):
        alone = play([seed])
        for name, values in outcome(alone, 0).items():
            np.testing.assert_array_equal(outcome(together, w)[name], values, err_msg=name)


def test_compiled_equals_interpreted():
    program = (
        "import json; from tests.invariants import test_world_faults_equal as t; "
        "print(json.dumps(t.outcome(t.play([7]), 0)))"
    )
    environment = {**os.environ, "NUMBA_DISABLE_JIT": "1", "PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    interpreted, compiled = json.loads(run.stdout), outcome(play([7]), 0)
    for name, values in compiled.items():
        np.testing.assert_allclose(interpreted[name], values, rtol=1e-11, atol=1e-12, err_msg=name)


def test_faults_leave_the_requests_as_they_are():
    """The same seed without faults asks the same things: faults have streams of their own."""
    calm = {f"fleet.{place}.faults": None for place in ("pools.small", "pools.medium", "providers.api")}
    with_faults, without = (load_scenario("shaky", SHORT | changes).generate(2, "validation") for changes in ({}, calm))
    assert len(without.faults) == 0 < len(with_faults.faults)
    for name in Workload.array_names():
        np.testing.assert_array_equal(getattr(with_faults, name), getattr(without, name), err_msg=name)


def test_faults_are_those_of_the_seed_and_split():
    scenario = load_scenario("shaky")
    first = scenario.generate(0, "heldout").faults
    np.testing.assert_array_equal(first, scenario.generate(0, "heldout").faults)
    assert not np.array_equal(first, scenario.generate(1, "heldout").faults)
    assert not np.array_equal(first, scenario.generate(0, "train").faults)
    assert not first.flags.writeable


def test_another_replica_leaves_the_faults_of_the_others_as_they_are():
    three, four = faults(5), faults(5, **{"fleet.pools.medium.max_replicas": 4})
    of_small = [rows[(rows["kind"] == 0) & (rows["index"] < 3)] for rows in (three, four)]
    np.testing.assert_array_equal(*of_small)


@pytest.mark.parametrize("condition", ["both-medium-down", "api-down", "small-throttled"])
def test_conditions_add_their_faults(condition):
    scenario = load_scenario("shaky")
    more = scenario.under(condition).generate(1, "heldout").faults
    extra = len(more) - len(scenario.generate(1, "heldout").faults)
    assert extra == {"both-medium-down": 2, "api-down": 1, "small-throttled": 1}[condition]
