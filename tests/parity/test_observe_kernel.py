"""The compiled observation of many worlds against the gateway's numpy: every number, with every feature on."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from sizes import SMALL

from envs.plant import Plant
from envs.scenario import load_scenario
from envs.vector_env import ObservedWorlds
from marginroute import features
from marginroute import view as v
from marginroute.margin_rule import DEFER_COLUMN, MarginParameters, MarginRule
from marginroute.quality import FittedQuality

ROOT = Path(__file__).parents[2]
WORLDS = 300


def fitted(layout, rng, **more):
    tiers, tasks = len(layout.tier_names), len(layout.task_names)
    intercept, slope = rng.normal(0.0, 1.0, (tiers, tasks)), rng.uniform(0.5, 1.5, (tiers, tasks))
    return FittedQuality(intercept, slope, rng.normal(0.0, 1.0, tiers), rng.normal(0.0, 1.0, (tasks, 4)), **more)


def rule(layout, which):
    rng = np.random.default_rng(1)
    stations = len(layout.station_names)
    if which == "plain":
        return MarginRule("expected-margin", MarginParameters((0.0,) * stations))
    prices = tuple(rng.uniform(0.0, 0.01, stations))
    floors = [tuple(rng.uniform(0.0, 0.01, len(layout.class_names))) for _ in range(3)] if which == "floors" else []
    quality = fitted(layout, rng, **({"fit_worth": 8.0} if which == "adaptive" else {}))
    return MarginRule(which, MarginParameters(prices, 1.7, 1.3, 0.9, 2.5, 0.95, 0.3, 0.4, *floors), quality)


def scramble(worlds, rng):
    """Signals of everything that a view may hold: idle and crowded, cached and failing, held, deferred, illegal."""
    shape = worlds.legal.shape
    s, q, layout = worlds.signals, worlds.request, worlds.plant.layout
    some = lambda share, values: np.where(rng.random(shape) < share, values, 0.0)  # noqa: E731
    static = s[: v.N_STATIC_SIGNALS].copy()
    s[v.P_GOOD_PRIOR] = np.where(rng.random(shape) < 0.1, rng.choice([0.0, 1.0], shape), rng.random(shape))
    s[v.IN_FLIGHT] = some(0.8, rng.integers(0, 300, shape))
    s[v.IN_FLIGHT_CAP] = np.where(rng.random(shape) < 0.7, rng.integers(1, 60, shape), v.UNLIMITED)
    limits = [rng.random(shape), rng.random(shape) * 1e-4, rng.uniform(0.0, 2.5, shape)]
    s[[v.LIMIT_CALL_S, v.LIMIT_TOKEN_S, v.LIMIT_SPENT]] = np.where(layout.kind == v.PROVIDER, limits, 0.0)
    s[v.DECODING] = some(0.7, rng.integers(0, 200, shape))
    s[v.DECODING_TOKENS] = s[v.DECODING] * rng.integers(1, 4000, shape)
    s[v.RECENT_TTFT_S], s[v.RECENT_TPOT_S] = rng.exponential(1.0, shape), rng.exponential(0.02, shape)
    s[v.KV_USAGE], s[v.RECENT_ERRORS] = rng.random(shape), some(0.3, rng.random(shape))
    s[v.SURPRISE : v.TIER_CONFIDENCE + 1] = np.where(
        rng.random((4, *shape)) < 0.5, rng.normal(0.0, 4.0, (4, *shape)), 0.0
    )
    s[v.CONFIDENCE], s[v.TIER_CONFIDENCE] = some(0.7, rng.uniform(0.0, 0.9, shape)), rng.uniform(0.0, 0.9, shape)
    s[v.SIMILARITY], s[v.ENTRY_AGE_S] = rng.random(shape), some(0.5, rng.exponential(300.0, shape))
    s[v.HELD], s[v.WAITING] = some(0.4, rng.integers(0, 90, shape)), some(0.4, rng.integers(0, 90, shape))
    s[v.PENDING_PREFILL_TOKENS] = some(0.6, rng.integers(0, 60_000, shape))
    s[v.TELEMETRY_AGE_S], s[v.TRIED] = rng.exponential(2.0, shape), some(0.2, 1.0)
    s[v.CALL_USD] = some(0.3, rng.random(shape) * 1e-3)
    s[v.CACHED_INPUT_USD] = static[v.INPUT_USD] * rng.random(shape)
    n = shape[0]
    q[v.PROMPT_TOKENS], q[v.EXPECTED_OUTPUT_TOKENS] = rng.integers(1, 20_000, n), rng.uniform(1.0, 900.0, n)
    s[v.CACHED_TOKENS] = some(0.5, rng.random(shape)) * q[v.PROMPT_TOKENS][:, None]
    q[v.CLASS_INDEX] = rng.integers(0, len(layout.class_names), n)
    q[v.TASK_INDEX] = rng.integers(0, len(layout.task_names), n)
    q[v.DIFFICULTY_SIGNAL], q[v.SEQUENCE] = rng.normal(0.0, 5.0, n), np.arange(n)
    q[v.WAITED_S] = np.where(rng.random(n) < 0.5, 0.0, rng.exponential(10.0, n))
    q[v.DEADLINE_LEFT_S] = np.where(rng.random(n) < 0.5, np.inf, rng.normal(20.0, 30.0, n))
    q[v.ARRIVAL_RATE_PER_S] = rng.exponential(20.0, n)
    q[v.TURNED_DOWN], q[v.VERIFIER_SCORE], q[v.TASK_VALUE_USD] = rng.integers(0, 3, n), rng.random(n), rng.random(n)
    for row, scale in ((v.INPUT_PRICE_USD, 1e-5), (v.OUTPUT_PRICE_USD, 4e-5), (v.REQUEST_VALUE_USD, 0.01)):
        q[row] = np.where(rng.random(n) < 0.3, 0.0, rng.random(n) * scale)
    q[v.CACHED_INPUT_PRICE_USD] = q[v.INPUT_PRICE_USD] * rng.choice([0.1, 1.0], n)
    q[v.REQUEST_USD], q[v.MISS_USD] = (np.where(rng.random(n) < 0.5, 0.0, rng.random(n) * 0.01) for _ in range(2))
    for row in (v.SLO_TTFT_S, v.SLO_TPOT_S, v.SLO_E2E_S, v.PATIENCE_S):
        scale = 0.05 if row == v.SLO_TPOT_S else 5.0
        q[row] = np.where(rng.random(n) < 0.4, np.inf, 1e-3 + scale * rng.random(n))
    for row in (v.REFUND_SHARE, v.TTFT_CREDIT_SHARE, v.TPOT_CREDIT_SHARE, v.E2E_CREDIT_SHARE, v.UNSERVED_CREDIT_SHARE):
        q[row] = rng.random(n)
    q[v.BAD_ANSWER_USD], q[v.UNSERVED_CREDIT_USD] = 0.01 * rng.random(n), 0.01 * rng.random(n)
    worlds.legal[...] = rng.random(shape) < 0.6
    worlds.legal[:, -1] = True


def check(worlds):
    """Observation, and the parts of the assessment that the learning signal is made of."""
    view = worlds.view()
    found, wanted = worlds.observe(), worlds.advice.assess(view)
    np.testing.assert_allclose(found, features.observe(view, wanted, worlds.spec), rtol=1e-6, atol=2e-6)
    for name in ("p_good", "bad_usd", "score_usd", "stay", *(("kept",) if wanted.kept is not None else ())):
        np.testing.assert_allclose(getattr(worlds._seen, name), getattr(wanted, name), rtol=1e-9, atol=1e-15)
    return wanted


@pytest.mark.parametrize("which", ["plain", "fitted", "adaptive", "floors"])
def test_random_views(small_plant, which):
    layout = small_plant.layout
    worlds = ObservedWorlds(small_plant, WORLDS, rule(layout, which), None)
    rng = np.random.default_rng(0)
    for _ in range(5):
        scramble(worlds, rng)
        assessed = check(worlds)
        assert worlds.legal[:, DEFER_COLUMN].any() and (assessed.parts_usd[:3] != 0.0).any(axis=(1, 2)).all()
    assert (assessed.parts_usd[3] != 0.0).any() == (which != "plain")


@pytest.mark.parametrize("which", ["plain", "fitted", "floors"])
def test_along_an_episode(small_plant, which):
    worlds = ObservedWorlds(small_plant, 4, rule(small_plant.layout, which), None)
    worlds.load_all([small_plant.scenario.generate(seed, "train") for seed in range(4)])
    rng = np.random.default_rng(2)
    while not worlds.done.any():
        check(worlds)
        worlds.step(np.where(worlds.legal, rng.random(worlds.legal.shape), -1.0).argmax(axis=1))


def test_every_part_of_a_view_matters(hand_scenario):
    """Nothing is left out: what changes the gateway's observation changes the compiled one, and the other way round."""
    plant = Plant(hand_scenario)
    worlds = ObservedWorlds(plant, 64, rule(plant.layout, "floors"), None)
    worlds.hedges = True  # as if a class hedged: only then is the row of hedge timers looked at
    rng = np.random.default_rng(3)
    scramble(worlds, rng)
    before = worlds.observe()
    used = 0
    for array, rows in ((worlds.signals, range(len(v.SIGNALS))), (worlds.request, range(len(v.REQUEST)))):
        for row in rows:
            if array is worlds.request and row in (v.CLASS_INDEX, v.TASK_INDEX):
                continue
            kept = array[row].copy()
            array[row] = kept * (1.3 if array is worlds.request else 0.7) + 0.01  # no more cached than asked
            check(worlds)
            used += not np.array_equal(worlds.observe(), before)
            array[row] = kept
    assert used >= 40


def test_the_interpreter_agrees_too():
    script = "import test_observe_kernel as t; t.WORLDS = 8; t.test_random_views(t.Plant(t.small()), 'floors')"
    paths = os.pathsep.join(str(folder) for folder in (ROOT, Path(__file__).parent, ROOT / "tests"))
    environment = {**os.environ, "NUMBA_DISABLE_JIT": "1", "PYTHONPATH": paths}
    subprocess.run([sys.executable, "-c", script], env=environment, check=True, timeout=300)


def small():
    """The scenario behind `small_plant`."""
    return load_scenario("quickstart", SMALL)
