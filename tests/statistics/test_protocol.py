"""The comparison on real worlds: same requests for all, held-out seeds apart, same figures however it is run."""

import numpy as np
import pytest

from envs.scenario import load_scenario
from evaluation import protocol
from evaluation.contest import Play, choose_best
from evaluation.protocol import evaluate_policies, usable_cores
from evaluation.results import ARRAYS
from marginroute.errors import InputError
from marginroute.rules import FixedTier, LeastInFlight, Random

EPISODES = 5


@pytest.fixture(scope="module")
def scenario():
    return load_scenario("quickstart", {"horizon_s": 20.0, "requests_per_episode": 60})


@pytest.fixture(scope="module")
def policies(scenario):
    return {
        "least-in-flight": LeastInFlight("least-in-flight"),
        "random": Random("random"),
        **{f"fixed-{t}": FixedTier(f"fixed-{t}", i) for i, t in enumerate(scenario.tier_names)},
    }


@pytest.fixture(scope="module")
def results(scenario, policies):
    return evaluate_policies(scenario, policies, EPISODES, workers=1)


def assert_equal(one, other):
    for name in one:
        for array in ARRAYS:
            np.testing.assert_array_equal(getattr(one[name], array), getattr(other[name], array), err_msg=array)


def test_every_policy_meets_the_same_requests(scenario, policies, results):
    assert list(results) == list(policies)
    for result in results.values():
        np.testing.assert_array_equal(result.seeds, np.arange(EPISODES))
        for seed in range(EPISODES):
            of_class = scenario.generate(seed, split="heldout").class_index
            np.testing.assert_array_equal(
                result.count("first_calls")[seed], np.bincount(of_class, minlength=len(scenario.class_names))
            )


def test_counts_add_up(results):
    for result in results.values():
        ends = sum(result.count(name) for name in ("served", "shed", "abandoned", "failed"))
        np.testing.assert_array_equal(ends, result.count("first_calls"))
        assert (result.latency_histogram[:, 0].sum(axis=(1, 2)) <= result.count("served").sum(axis=1)).all()
        assert (result.action_counts.sum(axis=1) >= result.first_calls).all()
        assert result.ledger_usd.shape[2] == len(result.class_names) + 1


def test_tier_shares_tell_what_the_policy_did(scenario, results):
    for t, tier in enumerate(scenario.tier_names):
        result = results[f"fixed-{tier}"]
        if tier in {pool.tier for pool in scenario.fleet.pools.values()}:
            assert result.tier_shares[t] == 1.0


def test_processes_and_chunks_change_nothing(scenario, policies, results, monkeypatch):
    few = {name: policies[name] for name in ("least-in-flight", "random")}
    assert_equal(evaluate_policies(scenario, few, EPISODES, workers=2), results)
    monkeypatch.setattr(protocol, "CHUNK_EPISODES", 2)
    assert_equal(evaluate_policies(scenario, few, EPISODES, workers=1), results)
    monkeypatch.setattr(protocol, "PROCESSES_PAY_S", 0.0)
    monkeypatch.setattr(protocol, "usable_cores", lambda: 2)
    assert_equal(evaluate_policies(scenario, few, EPISODES), results)


def test_held_out_episodes_are_not_the_validation_or_training_ones(scenario, policies, results):
    few = {"random": policies["random"]}
    for split in ("train", "validation"):
        other = evaluate_policies(scenario, few, EPISODES, split=split, workers=1)["random"]
        assert not np.isin(other.margin_usd, results["random"].margin_usd).any()


def test_the_best_heuristic_is_chosen_without_a_look_at_held_out_episodes(scenario, policies, monkeypatch):
    splits = []
    generate = type(scenario).generate
    monkeypatch.setattr(
        type(scenario), "generate", lambda self, seed, split: splits.append(split) or generate(self, seed, split)
    )
    validation = evaluate_policies(scenario, policies, EPISODES, split="validation", workers=1)
    play = Play(EPISODES, workers=1, use_cache=False)
    best = choose_best(scenario, policies, play)
    assert set(splits) == {"validation"}
    assert validation[best].margin_usd.sum() == max(r.margin_usd.sum() for r in validation.values())
    assert choose_best(scenario, {"random": policies["random"]}, play) == "random"


def test_first_seed_moves_the_episodes(scenario, policies, results):
    few = {"random": policies["random"]}
    later = evaluate_policies(scenario, few, 2, first_seed=3, workers=1)["random"]
    np.testing.assert_array_equal(later.ledger_usd, results["random"].ledger_usd[3:])


def test_progress_counts_every_episode_of_every_policy(scenario, policies):
    seen = []
    few = {name: policies[name] for name in ("least-in-flight", "random")}
    evaluate_policies(scenario, few, 3, workers=1, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(3, 6), (6, 6)]


class Broken(LeastInFlight):
    def decide_batch(self, view):
        raise InputError("this policy is for another fleet")


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_of_a_policy_is_not_swallowed(scenario, policies, workers):
    mixed = {"random": policies["random"], "broken": Broken("broken")}
    with pytest.raises(InputError, match="another fleet"):
        evaluate_policies(scenario, mixed, 2, workers=workers)


def test_nothing_to_compare_is_an_input_error(scenario):
    with pytest.raises(InputError, match="nothing to compare"):
        evaluate_policies(scenario, {}, 2)


def test_cores_are_those_that_may_be_used():
    assert usable_cores() >= 1
