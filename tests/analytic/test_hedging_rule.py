"""The margin rule at a hedge timer: its figures by hand, and that it hedges where that pays."""

import by_hand
import numpy as np
import pytest
from by_hand import API, CACHE, METERED, ONE, SHED, TWO_A, TWO_B, workload

from envs.economics import ledger as books
from envs.vector_env import ObservedWorlds
from envs.worlds import FleetWorlds
from marginroute import features, latency
from marginroute import view as v
from marginroute.margin_rule import MarginParameters, MarginRule, assess
from marginroute.rules import FixedTier, LeastInFlight, RoundRobin

PRICES = (0.01, 0.02, 0.005)
RULE = MarginRule("bid-price", MarginParameters(station_usd_per_s=PRICES, sharpness=3.0, fill_power=0.5))
HEDGING = {"plans.classes.metered.hedge_after_s": 0.2}


def at_the_timer(folder, overrides=None, first=API, **row):
    """Worlds of one request that has waited for 0.2 s."""
    worlds = FleetWorlds(by_hand.scenario(folder, HEDGING | (overrides or {})), 1)
    worlds.load(0, workload(worlds.plant.scenario, row))
    worlds.step(np.array([first]))
    assert worlds.desks["hedging"][0] == 1
    return worlds


def test_the_figures_are_those_of_two_calls(tmp_path):
    """Every part of what a second call at `two` is worth, number by number."""
    view = at_the_timer(tmp_path).view()[0].copy()
    view.signals[v.IN_FLIGHT, [ONE, TWO_A, API]] = 4.0, 6.0, 2.0
    view.signals[v.RECENT_ERRORS, [TWO_A, API]] = 0.1, 0.3
    found = assess(view, RULE.parameters)
    q, s = view.request, view.signals
    (ttft_s, tpot_s), work_s = latency.estimate(view)
    first_s, second_s = max(ttft_s[API], 0.2), ttft_s[TWO_A]
    win = first_s**3 / (first_s**3 + second_s**3)
    p, o = 100.0, q[v.EXPECTED_OUTPUT_TOKENS]

    def missed(estimate_s, limit_s):
        return estimate_s**3 / (estimate_s**3 + limit_s**3) if np.isfinite(limit_s) else 0.0

    late = missed(first_s + 0.2, 0.4) * missed(second_s + 0.2, 0.4)
    slow = win * missed(tpot_s[TWO_A], 0.015) + (1 - win) * missed(tpot_s[API], 0.015)
    leave = missed(first_s + 0.2, 30.0) * missed(second_s + 0.2, 30.0)
    stay = (1 - leave) * (1 - 0.1 * 0.3)
    good = win * s[v.P_GOOD_PRIOR, TWO_A] + (1 - win) * s[v.P_GOOD_PRIOR, API]
    usage = p * 1000e-6 + o * 10000e-6
    cost = p * 50e-6 + p * 30e-6 + win * o * 40e-6 + (1 - win) * o * 100e-6
    credit = stay * usage * min(0.2 * late + 0.1 * slow, 1.0)
    refund = stay * (1 - good) * (0.5 * usage + 0.02)
    unserved = 0.25 * usage + 0.03
    at_two = PRICES[1] * work_s[TWO_A] * (6.0 / 8.0) ** 0.5
    at_api = PRICES[2] * work_s[API] * (2.0 / s[v.SLOTS, API] + s[v.LIMIT_SPENT, API]) ** 0.5
    congestion = at_two + (1 - win) * at_api
    np.testing.assert_allclose(found.parts_usd[:, TWO_A], [cost, credit, refund, congestion], rtol=1e-12)
    assert found.margin_usd[TWO_A] == pytest.approx(stay * (usage + unserved) - unserved - cost - credit - refund)
    assert found.latency_s[0, API] == first_s


def test_batches_and_other_decisions(tmp_path):
    """A batch of views gives what each of them gives; a view without a timer is not touched by one beside it."""
    worlds = FleetWorlds(by_hand.scenario(tmp_path, HEDGING), 3)
    for w in range(3):
        worlds.load(w, workload(worlds.plant.scenario, {}, {"arrived_at_s": 0.1 + 0.2 * w}))
    worlds.step(np.array([API, API, API]))
    batch = worlds.view()
    assert worlds.desks["hedging"].tolist() == [0, 1, 1]
    both = assess(batch, RULE.parameters)
    for w in range(3):
        one = assess(batch[w], RULE.parameters)
        np.testing.assert_allclose(both.score_usd[w], one.score_usd, rtol=1e-12)
    without = batch[0].copy()
    np.testing.assert_array_equal(assess(without, RULE.parameters).score_usd, both.score_usd[0])


@pytest.mark.parametrize(("credit_share", "hedges"), [(0.2, True), (0.0, False)])
def test_it_hedges_where_that_saves_more_than_it_costs(tmp_path, credit_share, hedges):
    """0.2 s of the 0.4 s are over and the API takes 0.5 s: the credit is lost unless another one answers.

    Output costs the same everywhere; without the credit a second prompt is paid for nothing.
    """
    overrides = {f"fleet.pools.{pool}.energy_output_usd_per_mtok": 100.0 for pool in ("one", "two")} | {
        "plans.classes.metered.slo.ttft_credit_share": credit_share,
        "plans.classes.metered.slo.tpot_credit_share": 0.0,
    }
    same = [0.8, 0.8, 0.8]
    worlds = at_the_timer(tmp_path, overrides, p_good_prior=same)
    rule = MarginRule("expected-margin", MarginParameters(station_usd_per_s=(0.0, 0.0, 0.0)))
    choice = int(rule.decide_batch(worlds.view())[0])
    assert (choice != API) == hedges
    decision = rule.decide(worlds.view()[0])
    assert decision.candidate == choice
    cash = [usd for part, usd in decision.reason_usd.items() if part not in ("margin", "congestion")]
    assert sum(cash) == pytest.approx(decision.reason_usd["margin"])


def test_it_hedges_a_patient_user_only_while_the_second_prompt_is_cheap(tmp_path):
    """Nobody is owed anything, and users leave at about 0.45 s: a second prompt is paid if the answer is worth it."""
    overrides = {
        "plans.classes.metered.slo": {},
        "plans.classes.metered.patience.median_s": 0.45,
        "plans.plans.metered.input_usd_per_mtok": 0.0,
    }
    rule = MarginRule("expected-margin", MarginParameters(station_usd_per_s=(0.0, 0.0, 0.0)))
    same, seen = [0.8, 0.8, 0.8], []
    for usd_per_mtok in (10.0, 1e5):
        energy = {f"fleet.pools.{pool}.energy_input_usd_per_mtok": usd_per_mtok for pool in ("one", "two")}
        worlds = at_the_timer(tmp_path, overrides | energy, p_good_prior=same)
        seen.append(int(rule.decide_batch(worlds.view())[0]) != API)
    assert seen == [True, False]


def test_rules_of_thumb_hedge_to_whom_they_would_ask_now(tmp_path):
    """The Tail at Scale's rule: send it again where it would go now; stay if that is where it is."""
    worlds = at_the_timer(tmp_path, first=API)
    assert LeastInFlight("least").decide_batch(worlds.view())[0] == ONE
    assert FixedTier("strong", tier=1).decide_batch(worlds.view())[0] == TWO_A
    assert FixedTier("hosted", tier=2).decide_batch(worlds.view())[0] == API
    assert RoundRobin("turns").decide_batch(worlds.view())[0] in (ONE, TWO_A, TWO_B)


def test_hedging_beats_waiting_in_the_ledger(tmp_path):
    """One replica is a hundred times as slow for a while: the same rule earns more with a timer than without."""
    overrides = {
        "requests_per_episode": 200,
        "fleet.faults": [{"pool": "two", "index": 0, "starts_at_s": 5.0, "duration_s": 20.0, "slowdown": 300.0}],
    }
    earned = []
    for more in ({}, HEDGING):
        world = by_hand.scenario(tmp_path, overrides | more)
        worlds = FleetWorlds(world, 4)
        worlds.load_all([world.generate(seed, "validation") for seed in range(4)])
        worlds.run(MarginRule("expected-margin", MarginParameters(station_usd_per_s=(0.0, 0.0, 0.0))))
        earned.append(worlds.ledger_usd.sum(axis=(1, 2)))
        hedged = worlds.counts[:, books.HEDGED].sum()
        won = worlds.counts[:, books.HEDGES_WON, METERED].sum()
    assert hedged >= won > 0
    assert (earned[1] - earned[0]).mean() > 0.0


def test_the_learner_sees_it(tmp_path):
    """The observation and the learning signal at a timer are the general formulas', and an illegal choice is masked."""
    world = by_hand.scenario(tmp_path, HEDGING)
    worlds = ObservedWorlds(world, 2, RULE, None)
    worlds.load_all([workload(world, {}), workload(world, {}, {"arrived_at_s": 0.1})])
    worlds.observe()
    worlds.step(np.array([API, API]))
    assert worlds.desks["hedging"].tolist() == [1, 0]
    seen, view = worlds.observe(), worlds.view()
    found = RULE.assess(view)
    np.testing.assert_allclose(seen, features.observe(view, found, worlds.spec), rtol=1e-6)
    ttft_s = np.maximum(latency.estimate(view)[0][0][0], view.signals[v.UNDER_WAY_S, 0])
    win = ttft_s[API] ** 3 / (ttft_s[API] ** 3 + ttft_s[TWO_A] ** 3)
    true = win * worlds.p_true[0, TWO_A] + (1 - win) * worlds.p_true[0, API]
    signal = worlds.signal_usd(np.array([TWO_A, ONE]))
    expected = found.score_usd[0, TWO_A] + (true - found.p_good[0, TWO_A]) * found.bad_usd[0, TWO_A]
    assert signal[0] == pytest.approx(expected)
    assert not worlds.legal[0, [CACHE, SHED]].any()
