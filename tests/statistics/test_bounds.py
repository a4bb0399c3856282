"""Upper bounds: never below any policy nor any sequence of choices, and not far above what HiGHS says is lowest."""

from itertools import product

import numpy as np
import pytest

from envs.fleet.iteration import batch_seconds
from envs.plant import Plant
from envs.scenario import load_scenario
from envs.worlds import FleetWorlds
from evaluation import bound_lp
from evaluation.bound_dual import DualBound
from evaluation.bound_money import least_mean_tokens
from evaluation.bound_options import make_options, observed_p_good
from evaluation.bounds import MODELLED, bound_episodes, uncovered
from evaluation.hull import pool_hull
from evaluation.protocol import evaluate_policies
from marginroute.errors import InputError
from marginroute.margin_rule import MarginParameters, MarginRule
from marginroute.rules import FixedTier, LeastInFlight, Random

TINY = {"horizon_s": 5.0, "requests_per_episode": 3}
SMALL = {"horizon_s": 40.0, "requests_per_episode": 200}
TIGHT = {  # one slow seat of each engine and few calls: capacity decides
    **{f"fleet.pools.{pool}.max_num_seqs": 1 for pool in ("small", "medium", "large")},
    "fleet.providers.api.requests_per_minute": 12,
}


def every_choice(plant, workload):
    """Margins in USD of all sequences of choices, one world each."""
    layout = plant.layout
    depth = workload.n_requests + 1  # a deferred request is decided again
    sequences = np.array(list(product(range(layout.n_candidates), repeat=depth)))
    worlds = FleetWorlds(plant, len(sequences))
    worlds.load_all([workload] * len(sequences))
    step = 0
    while not worlds.done.all():
        worlds.step(sequences[:, step] if step < depth else np.full(len(sequences), layout.n_candidates - 1))
        step += 1
    return worlds.ledger_usd.sum(axis=(1, 2))


DRIFTS = {
    "drift": {
        "worse": {"tier": "large", "after_s": [0, 3], "ability_by": [-1.0, 2.0]},
        "slower": {"provider": "api", "after_s": [0, 2, 4], "latency_times": [1, 4, 1], "starts_at_s": 1.0},
        "dearer": {"provider": "api", "price_times": [3.0], "starts_at_s": 2.0},
    }
}


@pytest.mark.parametrize("extra", [{}, TIGHT, DRIFTS], ids=["roomy", "tight", "drifting"])
@pytest.mark.parametrize("seed", range(4))
def test_no_sequence_of_choices_earns_more(seed, extra):
    plant = Plant(load_scenario("quickstart", {**TINY, "fleet.batch_queue.hold_s": 2.0, **extra}))
    workload = plant.scenario.generate(seed, "heldout")
    best_usd = every_choice(plant, workload).max()
    bound_usd = DualBound(make_options(plant, workload)).search().bound_usd
    assert bound_usd >= best_usd - 1e-9
    assert bound_usd - best_usd <= 0.35 * workload.n_requests * 0.01  # a third of a request's typical value each


def test_repeated_prompts_and_deferral_are_enumerated_too():
    overrides = {**TINY, "requests_per_episode": 4, "workload.recurring.share": 1.0}
    overrides |= {"workload.recurring.prompts_per_tenant": 1, "plans.classes.enterprise.tenants": 1}
    plant = Plant(load_scenario("quickstart", {**overrides, "fleet.batch_queue.hold_s": 2.0}))
    repeated = 0
    for seed in range(3):
        workload = plant.scenario.generate(seed, "heldout")
        options = make_options(plant, workload)
        repeated += int((options.group >= 0).sum())
        assert DualBound(options).search().bound_usd >= every_choice(plant, workload).max() - 1e-9
    assert repeated > 0


TOKENS = {"input_usd_per_mtok": 3.0, "output_usd_per_mtok": 12.0}
CONTRACTS = {
    "entitlements": {"plans.classes.enterprise.entitlements": {"tiers": ["medium"], "cache": False}},
    "limits": {"plans.classes.enterprise.limits": {"requests_per_minute": 60.0, "prompt_tokens": 600}},
    "quota": {
        "plans.plans.team.fair_use": {"requests_per_tenant": 1, "beyond": "overage", "overage_usd": 0.03},
        "plans.classes.team.tenants": 1,
    },
    "prepaid": {"plans.plans.enterprise": {"kind": "prepaid", "credits_usd_per_tenant": 0.005, **TOKENS}},
    "commit": {
        "plans.plans.enterprise": {"kind": "commit", "committed_usd_per_tenant": 0.004, "beyond_factor": 2.0, **TOKENS}
    },
    "prices": {
        "plans.plans.enterprise": {"kind": "usage", "cached_input_usd_per_mtok": 0.3, "request_usd": 0.002, **TOKENS}
    },
    "window": {
        "plans.classes.enterprise.slo": {
            "ttft_s": 2.0,
            "window": {"length_s": 2.0, "credits": [{"below": 0.9, "share": 0.5}]},
        }
    },
}


@pytest.mark.parametrize("contract", CONTRACTS)
def test_no_sequence_earns_more_under_any_contract(contract):
    plant = Plant(load_scenario("quickstart", {**TINY, **CONTRACTS[contract]}))
    workload = plant.scenario.generate(1, "heldout")
    bound_usd = DualBound(make_options(plant, workload)).search().bound_usd
    assert bound_usd >= every_choice(plant, workload).max() - 1e-9


def policies(scenario):
    stations = len(scenario.pool_names) + len(scenario.provider_names)
    return {
        "least-in-flight": LeastInFlight("least-in-flight", use_providers=True),
        "random": Random("random", use_providers=True),
        "expected-margin": MarginRule("expected-margin", MarginParameters((0.0,) * stations)),
        **{f"fixed-{t}": FixedTier(f"fixed-{t}", i) for i, t in enumerate(scenario.tier_names)},
    }


def test_speculation_serves_more_and_stays_below():
    overrides = {**SMALL, "load_scale": 2.0, "fleet.pools.medium.speculation": "{draft_tokens: 4, acceptance: 0.8}"}
    scenario = load_scenario("quickstart", overrides)
    plain = bound_episodes(load_scenario("quickstart", {**SMALL, "load_scale": 2.0}), range(2), workers=1)
    bounds = bound_episodes(scenario, range(2), workers=1)
    assert (bounds.clairvoyant_usd >= plain.clairvoyant_usd - 1e-3).all()
    for result in evaluate_policies(scenario, policies(scenario), 2, workers=1).values():
        assert (result.margin_usd <= bounds.clairvoyant_usd).all()


@pytest.mark.parametrize("load_scale", [0.5, 1.0, 3.0])
def test_no_policy_earns_more_in_any_episode(load_scale):
    scenario = load_scenario("quickstart", {**SMALL, "load_scale": load_scale})
    results = evaluate_policies(scenario, policies(scenario), 3, workers=1)
    bounds = bound_episodes(scenario, range(3), workers=1)
    for result in results.values():
        assert (result.margin_usd <= bounds.clairvoyant_usd + 1e-9).all()
        assert result.margin_usd.sum() <= bounds.same_information_usd.sum()


@pytest.mark.parametrize("seed", [0, 3])
def test_nor_where_things_fail_and_are_tried_again(seed):
    scenario = load_scenario("shaky", {"horizon_s": 60.0, "requests_per_episode": 300})
    results = evaluate_policies(scenario, policies(scenario), 2, first_seed=seed, workers=1)
    bounds = bound_episodes(scenario, range(seed, seed + 2), workers=1)
    for result in results.values():
        assert (result.margin_usd <= bounds.clairvoyant_usd + 1e-9).all()


def test_any_prices_give_a_bound_and_the_search_comes_close_to_the_linear_program():
    scenario = load_scenario(
        "quickstart", {**SMALL, "horizon_s": 20.0, "load_scale": 1.0, "fleet.response_cache": None, **TIGHT}
    )
    plant = Plant(scenario)
    dual = DualBound(make_options(plant, scenario.generate(0, "heldout")))
    exact_usd = bound_lp.solve(dual)
    rng = np.random.default_rng(0)
    shape = (dual.stations, dual.buckets)
    for scale in (0.0, 1e-3, 1e-2, 1.0):
        assert dual.evaluate(scale * rng.random(shape))[0] >= exact_usd - 1e-9
    found = dual.search()
    contribution_usd = exact_usd - dual.options.gpu_usd
    assert exact_usd - 1e-9 <= found.bound_usd <= exact_usd + 0.02 * contribution_usd
    assert found.bound_usd < dual.evaluate(np.zeros(shape))[0] - 0.01 * contribution_usd
    assert dual.evaluate(found.prices_usd)[0] == pytest.approx(found.bound_usd)


def test_the_slope_is_a_subgradient():
    scenario = load_scenario("quickstart", {**SMALL, "load_scale": 2.0})
    dual = DualBound(make_options(Plant(scenario), scenario.generate(1, "heldout")))
    rng = np.random.default_rng(1)
    prices, other = 0.02 * rng.random((2, dual.stations, dual.buckets))
    value, slope = dual.evaluate(prices)
    assert dual.evaluate(other)[0] >= value + float((slope * (other - prices)).sum()) - 1e-9


@pytest.mark.parametrize("pool", ["small", "medium", "large"])
def test_the_floor_is_below_every_iteration(pool):
    spec = next(p for p in load_scenario("quickstart").fleet_spec().pools if p.name == pool)
    hull = pool_hull(spec, 5e6, 5e5, 1.5e9, 16)
    rng = np.random.default_rng(2)
    shares = []
    for _ in range(2_000):
        decodes = int(rng.integers(0, spec.max_num_seqs + 1))
        longest = spec.kv_blocks * spec.block_size_tokens // max(decodes, 1)
        mean = int(min(2.0 ** rng.uniform(0.0, 14.0), longest))
        budget, chunks = spec.max_num_batched_tokens - decodes, []
        while budget > 0 and rng.random() < 0.6:
            chunk = int(rng.integers(1, budget + 1))
            chunks.append((chunk, int(rng.integers(0, 16_000)) if rng.random() < 0.3 else 0))
            budget -= chunk
        if decodes == 0 and not chunks:
            continue
        work_s = (
            hull.prefill_token_s * sum(c for c, _ in chunks)
            + hull.decode_token_s * decodes
            + hull.attended_token_s * decodes * mean
            + hull.area_s * sum(c * c + 2 * c * x for c, x in chunks)
        )
        shares.append(work_s / batch_seconds(spec.profile, np.full(decodes, mean), chunks))
    assert max(shares) <= 1.0
    assert max(shares) > 0.97  # and touches some


def test_lowest_mean_of_the_length_counter():
    plant = Plant(load_scenario("quickstart", SMALL))
    workload = plant.scenario.generate(0, "heldout")
    least = least_mean_tokens(plant, workload)
    worlds = FleetWorlds(plant, 1)
    worlds.load_all([workload])
    while not worlds.done.all():
        assert (worlds.lengths["value"][0, : len(least)] >= least - 1e-9).all()
        worlds.step(np.array([3]))
    assert (least < plant.output_tokens).any()


def test_observed_p_good_is_calibrated():
    plant = Plant(load_scenario("quickstart"))
    good, expected = [], []
    for seed in range(6):
        workload = plant.scenario.generate(seed, "train")
        fresh = workload.prompt_key < 0
        good.append(workload.good[fresh])
        expected.append(observed_p_good(plant, workload)[fresh])
    good, expected = np.concatenate(good).astype(float), np.concatenate(expected)
    for low, high in ((0.0, 0.5), (0.5, 0.8), (0.8, 1.0)):
        mine = (expected >= low) & (expected < high)
        assert good[mine].mean() == pytest.approx(expected[mine].mean(), abs=3.0 * 0.5 / np.sqrt(mine.sum()))


def test_processes_change_nothing():
    scenario = load_scenario("quickstart", SMALL)
    one, two = (bound_episodes(scenario, range(2), workers=n) for n in (1, 2))
    np.testing.assert_array_equal(one.clairvoyant_usd, two.clairvoyant_usd)
    np.testing.assert_array_equal(one.same_information_usd, two.same_information_usd)


def test_what_the_bounds_do_not_model_is_refused(monkeypatch):
    scenario = load_scenario("quickstart", SMALL)
    assert uncovered(Plant(scenario)) == []
    hedging = load_scenario("quickstart", SMALL | {"plans.classes.enterprise.hedge_after_s": 1.0})
    assert uncovered(Plant(hedging)) == ["class setting hedge_after_s"]
    monkeypatch.setattr("evaluation.bounds.MODELLED", MODELLED - {"output_usd_per_token"})
    with pytest.raises(InputError, match="no upper bound yet: it uses contract term output_usd_per_token"):
        bound_episodes(scenario, range(1), workers=1)
