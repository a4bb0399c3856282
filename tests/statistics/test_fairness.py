"""Fairness between customers: Jain's index in closed form, and who is counted."""

import dataclasses

import by_hand
import numpy as np
import pytest
from by_hand import ONE, SHED, TWO_A, workload
from episodes import make_results

from envs.worlds import FleetWorlds
from evaluation.fairness import ANSWERED, CALLS, MET, fairness_documents, jain, tenant_counts
from evaluation.results import concatenate


@pytest.mark.parametrize(
    ("shares", "index"), [([1.0] * 5, 1.0), ([0.5, 0.5], 1.0), ([1.0, 0.0, 0.0, 0.0], 0.25), ([1.0, 0.5], 0.9)]
)
def test_jains_index(shares, index):
    assert jain(np.array(shares)) == pytest.approx(index)
    assert jain(0.3 * np.array(shares)) == pytest.approx(index)


def test_customers_of_a_world_are_counted(tmp_path):
    """Customer 0 is answered in time, 1 is shed, 2 gets every answer too late (a slow replica), 3 of another class."""
    slow = {"fleet.faults": [{"pool": "two", "index": 0, "starts_at_s": 0.0, "duration_s": 99.0, "slowdown": 90.0}]}
    scenario = by_hand.scenario(tmp_path, slow)
    rows = [{"arrived_at_s": 0.5 * t + 0.1 * g, "tenant_index": g} for t in range(3) for g in range(3)]
    rows.append({"arrived_at_s": 5.0, "tenant_index": 1, "class_index": 1})
    episode = workload(scenario, *rows)
    episode = dataclasses.replace(episode, faults=scenario.generate(0).faults)
    worlds = FleetWorlds(scenario, 1)
    worlds.load(0, episode)
    for choice in [ONE, SHED, TWO_A] * 3 + [ONE]:
        worlds.step(np.array([choice]))
    counts = tenant_counts(worlds, [episode])
    assert counts.shape == (1, 3, 3, 3)
    assert counts[0, CALLS].tolist() == [[3, 3, 3], [0, 1, 0], [0, 0, 0]]
    assert counts[0, ANSWERED].tolist() == [[3, 0, 3], [0, 1, 0], [0, 0, 0]]
    assert counts[0, MET].tolist() == [[3, 0, 0], [0, 1, 0], [0, 0, 0]]


def _with(counts, **options):
    results = make_results(**options)
    return dataclasses.replace(results, tenant_counts=np.array(counts)[None].repeat(len(results.seeds), axis=0))


def test_the_document_has_the_worst_the_best_and_nobody_with_few_calls():
    calls = [[10, 10, 2], [10, 2, 0], [0, 0, 0]]
    met = [[10, 5, 2], [5, 1, 0], [0, 0, 0]]
    results = _with([calls, calls, met], episodes=4)
    assert fairness_documents(results) == {
        "free": {
            "customers": 2,
            "jain": pytest.approx(0.9),
            "worst_slo_attainment": 0.5,
            "best_slo_attainment": 1.0,
            "worst_served": 1.0,
        }
    }


def test_episodes_with_more_customers_join_those_with_fewer():
    few, many = _with([[[1]] * 3] * 3, episodes=1), _with([[[1, 2]] * 3] * 3, episodes=1)
    joined = concatenate([dataclasses.replace(many, seeds=many.seeds + 1), few])
    assert joined.tenant_counts[:, 0, 0].tolist() == [[1, 0], [1, 2]]
