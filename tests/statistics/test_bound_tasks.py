"""Upper bounds where verifiers turn answers down and tasks pay when they succeed: all choices are played."""

import dataclasses
from itertools import product

import numpy as np
import pytest
from by_hand import scenario, workload

from envs.plant import Plant
from envs.scenario import load_scenario
from envs.worlds import FleetWorlds
from evaluation.bound_dual import DualBound
from evaluation.bound_options import make_options, observed_p_good
from evaluation.bounds import bound_episodes, uncovered
from evaluation.protocol import evaluate_policies
from marginroute.margin_rule import MarginParameters, MarginRule
from marginroute.rules import FixedTier, LeastInFlight, Random

VERIFIER = {"sensitivity": 0.9, "specificity": 0.8, "max_attempts": 2, "verify_s": 0.05, "verify_usd": 0.002}
LENGTHS = {"components": [{"weight": 1.0, "median_tokens": 20, "sigma": 0.1}], "max_tokens": 100}
STEP = {"think_s": {"components": [{"weight": 1.0, "median_s": 1.0, "sigma": 0.01}]}, "new_tokens": LENGTHS}
SESSION = {
    "share": 0.0, "first_tokens": LENGTHS, "output_tokens": LENGTHS, "follow_share": {1: 0.5}, "steps": {"next": STEP},
    "max_prompt_tokens": 500,
}  # fmt: skip
SETTINGS = {
    "plain": ({}, {"good_share": 0.0}),
    "any-last": ({}, {"final_good": False, "good_share": 0.6}),
    "many-good": ({}, {"good_share": 0.9}),
    "verified": ({}, {}),
    "asked-anew": ({"fresh_share": 1.0}, {"good_share": 0.5}),
    "three-answers": ({"max_attempts": 3, "fresh_share": 0.5, "leave_share": 0.3}, {"value_usd": 0.02}),
}
CANDIDATES = np.array([0, 1, 3, 4, 6])  # other replicas and the batch queue bring nothing new


def tiny(folder, setting, calls, seed):
    """A plant and an episode of one task, its last call beside the horizon now and then, and a request of its own."""
    verifier, workflow = SETTINGS[setting]
    overrides = {
        "workload.sessions": {"fix": SESSION},
        "plans.workflows": {"fix": {"value_usd": 0.6} | workflow},
        "requests_per_episode": None,
    }
    if verifier or setting == "verified":
        overrides["fleet.verifiers"] = {"tests": VERIFIER | verifier}
    world = scenario(folder, overrides)
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(calls + 1):
        rows.append(
            {
                "good": rng.integers(0, 2, 3).tolist(),
                "p_good": rng.random(3).tolist(),
                "prompt_tokens": int(rng.integers(50, 300)),
                "session_index": 0 if i < calls else -1,
                "parent_index": i - 1 if 0 < i < calls else -1,
                "think_s": float(rng.choice([0.0, 0.5, 60.0])),
            }
        )
    made = dataclasses.replace(
        workload(world, *rows),
        workflow_index=[0] * calls + [-1],
        task_calls=[calls + int(rng.integers(0, 2))] * calls + [1],
        attempt_luck=np.stack([rng.normal(size=(calls + 1, 3)), *rng.random((2, calls + 1, 3))], axis=-1),
    )
    return Plant(world), made


def every_choice(plant, workload, depth):
    """Greatest margin in USD of all sequences of choices of up to `depth` decisions, one world each."""
    sequences = CANDIDATES[np.array(list(product(range(len(CANDIDATES)), repeat=depth)))]
    worlds = FleetWorlds(plant, len(sequences))
    worlds.load_all([workload] * len(sequences))
    step = 0
    while not worlds.done.all():
        last = sequences[:, step] if step < depth else np.full(len(sequences), CANDIDATES[-1])
        worlds.step(last)
        step += 1
    return worlds.ledger_usd.sum(axis=(1, 2)).max()


@pytest.mark.parametrize("setting", SETTINGS)
def test_no_sequence_of_choices_earns_more(tmp_path, setting):
    tight = 0
    for seed in range(3):
        plant, made = tiny(tmp_path, setting, 1 + seed % 2, seed)
        best_usd = every_choice(plant, made, 4 if plant.verifiers["max_attempts"].any() else made.n_requests)
        bound_usd = DualBound(make_options(plant, made)).search().bound_usd
        assert bound_usd >= best_usd - 1e-9
        tight += bound_usd <= best_usd + 1e-3
    assert tight == 3  # nothing is short here, and nobody is kept waiting beyond the horizon


def test_the_last_answer_decides_what_a_task_pays(tmp_path):
    """All answers good: 0.6. None of the second call: 0.3, if it stays away and the first is the last."""
    plant, made = tiny(tmp_path, "plain", 2, 0)
    made = dataclasses.replace(made, task_calls=np.array([2, 2, 1], dtype=np.int32), think_s=np.zeros(3))
    paid_usd = {}
    for last in (1, 0):
        good = np.ones(made.good.shape, dtype=np.uint8)
        good[1] = last
        pays = DualBound(make_options(plant, dataclasses.replace(made, good=good))).search().bound_usd
        alone = dataclasses.replace(made, good=good, workflow_index=np.full(3, -1, dtype=np.int32))
        alone_usd = DualBound(make_options(plant, alone)).search().bound_usd
        paid_usd[last] = pays - alone_usd
    assert paid_usd[1] == pytest.approx(0.6)
    assert 0.0 < paid_usd[0] <= 0.3 + 1e-9


def test_probabilities_pay_a_task_by_its_last_answer(tmp_path):
    """P(good) of 1 and 0 in place of outcomes is the same as outcomes."""
    plant, made = tiny(tmp_path, "plain", 3, 1)
    known = DualBound(make_options(plant, made)).search().bound_usd
    same = DualBound(make_options(plant, made, made.good.astype(float))).search().bound_usd
    half = DualBound(make_options(plant, made, np.full(made.good.shape, 0.5))).search().bound_usd
    assert same == pytest.approx(known, abs=1e-9)
    sure = DualBound(make_options(plant, made, np.ones(made.good.shape))).search().bound_usd
    assert half < sure


def test_a_verifier_gives_outcomes_away(tmp_path):
    plant, made = tiny(tmp_path, "verified", 2, 3)
    known = make_options(plant, made)
    same = make_options(plant, made, np.full(made.good.shape, 0.5))
    np.testing.assert_array_equal(known.value_usd, same.value_usd)


@pytest.mark.parametrize("load_scale", [1.0, 4.0])
def test_no_policy_earns_more_in_a_busy_world(load_scale):
    think = {"components": [{"weight": 1.0, "median_s": 1.0, "sigma": 0.5}]}
    step = {"think_s": think, "new_tokens": LENGTHS}
    session = SESSION | {"share": 0.4, "follow_share": {1: 0.8}, "steps": {"next": step}}
    overrides = {
        "horizon_s": 20.0, "requests_per_episode": None, "load_scale": load_scale,
        "workload.sessions": {"fix": session},
        "plans.workflows": {"fix": {"value_usd": 0.05, "good_share": 0.5}},
        "fleet.verifiers": {"tests": VERIFIER | {"tasks": ["code"], "fresh_share": 0.3, "leave_share": 0.1}},
    }  # fmt: skip
    world = load_scenario("quickstart", overrides)
    assert uncovered(Plant(world)) == []
    stations = len(world.pool_names) + len(world.provider_names)
    policies = {
        "least-in-flight": LeastInFlight("least-in-flight", use_providers=True),
        "random": Random("random", use_providers=True),
        "expected-margin": MarginRule("expected-margin", MarginParameters((0.0,) * stations)),
        **{f"fixed-{t}": FixedTier(f"fixed-{t}", i) for i, t in enumerate(world.tier_names)},
    }
    results = evaluate_policies(world, policies, 2, workers=1)
    bounds = bound_episodes(world, range(2), workers=1)
    for result in results.values():
        assert (result.margin_usd <= bounds.clairvoyant_usd + 1e-9).all()
        assert result.margin_usd.sum() <= bounds.same_information_usd.sum()
    plant = Plant(world)
    made = world.generate(0, "heldout")
    tasks = make_options(plant, made, observed_p_good(plant, made)).tasks
    assert (tasks.task >= 0).sum() > 10 and (tasks.whole_usd > 0.0).any()


def test_the_slope_is_a_subgradient_with_tasks_too():
    step = {"think_s": {"components": [{"weight": 1.0, "median_s": 1.0, "sigma": 0.5}]}, "new_tokens": LENGTHS}
    session = SESSION | {"share": 0.6, "follow_share": {1: 0.8}, "steps": {"next": step}}
    overrides = {"horizon_s": 40.0, "requests_per_episode": None, "load_scale": 3.0}
    overrides |= {"workload.sessions": {"fix": session}, "plans.workflows": {"fix": {"value_usd": 0.03}}}
    world = load_scenario("quickstart", overrides)
    dual = DualBound(make_options(Plant(world), world.generate(1, "heldout")))
    rng = np.random.default_rng(1)
    for scale in (1e-4, 1e-2, 0.1):
        prices, other = scale * rng.random((2, dual.stations, dual.buckets))
        value, slope = dual.evaluate(prices)
        assert dual.evaluate(other)[0] >= value + float((slope * (other - prices)).sum()) - 1e-9
