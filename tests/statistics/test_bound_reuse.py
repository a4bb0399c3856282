"""Bounds with a semantic cache: above every policy, and who may share an answer by hand."""

import dataclasses

import numpy as np
import pytest

from envs.plant import Plant
from envs.scenario import load_scenario
from envs.worlds import FleetWorlds
from evaluation import bound_reuse
from evaluation.bound_dual import DualBound
from evaluation.bound_options import make_options
from marginroute.margin_rule import MarginParameters, MarginRule
from marginroute.rules import LeastInFlight

OVER = {
    "horizon_s": 30.0, "requests_per_episode": 150, "workload.recurring.share": 0.0,
    "workload.intents": {"share": 0.9, "per_tenant": 6, "common": 4, "common_share": 0.4},
    "workload.tasks.code.reuse": {"half_similarity": 0.95, "width": 0.02, "valid_s": 10.0},
    "fleet.response_cache.semantic": {"embed_s": 0.02, "embed_usd_per_mtok": 0.02},
}  # fmt: skip


@pytest.fixture(scope="module", params=[False, True])
def plant(request):
    return Plant(load_scenario("quickstart", OVER | {"fleet.response_cache.shared": request.param}))


def test_no_policy_earns_more_than_the_bound(plant):
    stations = len(plant.layout.station_names)
    rules = [LeastInFlight("a", cache_similarity=x) for x in (0.5, 0.9)]
    rules += [MarginRule("b", MarginParameters((price,) * stations)) for price in (0.0, 0.002)]
    workloads = [plant.scenario.generate(seed, "validation") for seed in range(2)]
    bounds = [DualBound(make_options(plant, workload)).search().bound_usd for workload in workloads]
    for rule in rules:
        worlds = FleetWorlds(plant, len(workloads))
        worlds.load_all(workloads)
        worlds.run(rule)
        assert worlds.action_counts[:, 2].sum() > 5
        assert (worlds.ledger_usd.sum(axis=(1, 2)) <= np.array(bounds) + 1e-9).all()


def test_a_stored_answer_is_worth_what_it_can_be_right_for(plant):
    """Three requests of one intent and tenant at angles of 0, 0.4 and 0.9 rad; the third needs 0.9 and finds 0.88."""
    workload, angle = plant.scenario.generate(0), np.array([0.0, 0.4, 0.9])
    rows = np.flatnonzero((workload.class_index == 0) & (workload.prompt_key >= 0))[:3]
    family, tenant = np.full(workload.n_requests, -1, dtype=np.int32), workload.tenant_index.copy()
    embedding, needed = workload.embedding.copy(), workload.needed_similarity.copy()
    family[rows], tenant[rows] = 0, 0
    embedding[rows] = np.stack([np.cos(angle), np.sin(angle), 0.0 * angle], axis=1)
    needed[rows] = 0.9
    key, output = np.arange(workload.n_requests, dtype=np.int32), workload.output_tokens.copy()
    output[rows] = 10, 20, 30
    workload = dataclasses.replace(
        workload, family_index=family, tenant_index=tenant, embedding=embedding, needed_similarity=needed,
        prompt_key=key, output_tokens=output,
    )  # fmt: skip
    assert set(np.flatnonzero(bound_reuse.groups(plant, workload) == 0)) == set(rows)
    good = np.ones((workload.n_requests, workload.n_tiers))
    usd = bound_reuse.cached_usd(plant, workload, good, known=True)[rows, 0]
    paid = (
        workload.prompt_tokens[rows] * 3e-6
    )  # enterprise: 3 and 12 USD per million; a bad answer refunds all and 0.01
    # quickstart's batch class may come back later, so that the first may be given the answer of the second
    assert usd[0] == pytest.approx(paid[0] + 20 * 12e-6)
    assert usd[1] == pytest.approx(paid[1] + 10 * 12e-6)
    assert usd[2] == pytest.approx(-0.01)
