"""One kernel, two executions: compiled and interpreted code give the same numbers, to the last bit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from by_hand import as_sessions

from envs.scenario import load_scenario
from envs.worlds import FleetWorlds

ROOT = Path(__file__).parents[2]


def episode(hedging):
    """Two short worlds of quickstart, one with sessions and prefixes, random legal play: every figure as exact text."""
    caching = {f"fleet.pools.{pool}.prefix_caching": True for pool in ("small", "large")}
    late = {f"plans.classes.{name}.hedge_after_s": 0.05 for name in ("enterprise", "team") if hedging}
    scenario = load_scenario("quickstart", {"horizon_s": 5.0, "requests_per_episode": 24} | caching | late)
    worlds = FleetWorlds(scenario, 2)
    plain, linked = (scenario.generate(seed, "validation") for seed in (3, 4))
    worlds.load_all([plain, as_sessions(linked, 0, 0.3)])
    worlds.set_in_flight_caps(np.full(len(scenario.pool_names), 2))
    rng, views = np.random.default_rng(0), []
    while not worlds.done.all():
        views.append([float(x).hex() for x in (worlds.signals.sum(), worlds.request[:9].sum(), worlds.legal.sum())])
        worlds.step(np.where(worlds.legal, rng.random(worlds.legal.shape), -1.0).argmax(axis=1))
    times = np.array([worlds.fleet.requests[name] for name in ("first_token_at_s", "completed_at_s")])
    return {
        "ledger_usd": [float(x).hex() for x in worlds.ledger_usd.ravel()],
        "counts": worlds.counts.ravel().tolist(),
        "actions": worlds.action_counts.tolist(),
        "times": [float(x).hex() for x in times.ravel()],
        "views": views,
    }


def test_the_interpreter_gives_the_same_numbers():
    script = "import json, test_world_executions as t; print(json.dumps([t.episode(False), t.episode(True)]))"
    paths = os.pathsep.join(str(folder) for folder in (ROOT, Path(__file__).parent, Path(__file__).parents[1]))
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "NUMBA_DISABLE_JIT": "1", "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    interpreted, (compiled, hedged) = json.loads(done.stdout), (episode(False), episode(True))
    assert interpreted == [compiled, hedged]
    assert hedged["counts"] != compiled["counts"] and len(hedged["views"]) > len(compiled["views"])
    assert sum(compiled["actions"][0]) >= 24 and sum(compiled["actions"][1]) >= 12
    assert np.count_nonzero(np.sum(compiled["actions"], axis=0)) >= 4
