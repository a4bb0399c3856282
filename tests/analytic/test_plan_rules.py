"""Every rule of a plan against pencil and paper: quotas, credits, commitments, limits, SLO windows, lifetime value."""

import dataclasses
import math

import by_hand
import numpy as np
import pytest
from by_hand import API, METERED, ONE, SEATS, SHED, TWO_A, Played, workload

from envs.fleet_env import FleetEnv
from marginroute import contracts
from marginroute import view as v
from marginroute.margin_rule import MarginParameters, assess

USD = 100 * 0.001 + 11 * 0.01  # of the default metered request: 100 prompt tokens, 11 output tokens
ENERGY_USD = 100 * 10e-6 + 11 * 20e-6  # of it at ONE
PERIOD_S = 100.0


def exactly(usd):
    return pytest.approx(usd, rel=1e-9, abs=1e-12)


def env_of(folder, **keys):
    overrides = {key.replace("__", "."): value for key, value in keys.items()}
    return FleetEnv(by_hand.scenario(folder, overrides))


def metered_plan(kind, **more):
    return {"kind": kind, "input_usd_per_mtok": 1000.0, "output_usd_per_mtok": 10000.0, "period_s": PERIOD_S} | more


def played(env, rows, choices, phase=0.0, used=0.0):
    """Requests one second apart; every customer stands at the same point of its period."""
    rows = [{"arrived_at_s": float(i)} | row for i, row in enumerate(rows)]
    episode = workload(env.worlds.plant.scenario, *rows)
    billing = np.tile([phase, used], (4, 1))
    result = Played(env, dataclasses.replace(episode, billing=billing), choices)
    assert sum(result.rewards) == exactly(result.ledger_usd.sum())
    calls = sum(result.count(name) for name in ("served", "shed", "abandoned", "failed", "refused"))
    assert result.count("calls") == calls
    return result


def seats_with(folder, **fair_use):
    quota = {"requests_per_tenant": 2, "period_s": PERIOD_S} | fair_use
    return env_of(folder, plans__plans__seats__fair_use=quota)


def test_beyond_a_fair_use_quota_nothing_is_owed(tmp_path):
    """Two requests of a quota of two, and a third, whose answer is bad and late; the fourth is shed."""
    env = seats_with(tmp_path, beyond="serve")
    rows = [{"class_index": SEATS, "good": [1, 1, 0]}] * 4
    p = played(env, rows, [ONE, ONE, API, SHED])
    assert p.usd("refunds") == p.usd("slo_credits") == p.usd("unserved_credits") == 0.0
    seen = [view.request[[v.STANDING, v.QUOTA_LEFT, v.REQUEST_VALUE_USD]].tolist() for view in p.views]
    assert seen == [[0, 1.0, 0.5], [0, 0.5, 0.5], [1, 0.0, 0.0], [1, 0.0, 0.0]]
    assert p.count("served") == 3 and p.count("shed") == 1


def test_overage_is_charged_per_request(tmp_path):
    env = seats_with(tmp_path, beyond="overage", overage_usd=0.3)
    p = played(env, [{"class_index": SEATS, "good": [0, 0, 0]}] * 3, [ONE] * 3)
    assert p.usd("overage_revenue", SEATS) == exactly(0.3) and p.usd("usage_revenue") == 0.0
    assert p.usd("refunds") == exactly(-(0.5 + 0.5 + 0.3))
    assert p.views[2].request[v.REQUEST_USD] == 0.3 and p.views[2].request[v.REQUEST_VALUE_USD] == 0.0


def test_beyond_a_quota_that_refuses_there_is_no_decision(tmp_path):
    """With half of it used at the start one request is left; the period ends at 50 s and renews it."""
    env = seats_with(tmp_path, beyond="refuse")
    rows = [{"class_index": SEATS}, {"class_index": SEATS}, {"class_index": SEATS, "arrived_at_s": 51.0}]
    p = played(env, rows, [ONE, ONE], phase=0.5, used=0.5)
    assert p.count("refused", SEATS) == 1 and p.count("served") == 2 and p.count("shed") == 0
    assert p.usd("unserved_credits") == 0.0
    assert p.usd("seat_revenue") == exactly(60.0 * by_hand.SEAT_USD_PER_S)


def test_prepaid_credits_are_used_up_and_then_there_is_no_answer(tmp_path):
    """Credits for one and a half answers: the second brings what is left, the third is refused."""
    env = env_of(tmp_path, plans__plans__metered=metered_plan("prepaid", credits_usd_per_tenant=1.5 * USD))
    p = played(env, [{}] * 3, [ONE, ONE])
    assert p.usd("usage_revenue") == exactly(1.5 * USD)
    assert p.count("refused", METERED) == 1
    assert p.views[1].request[v.QUOTA_LEFT] == exactly(0.5 / 1.5)


def test_a_commitment_is_paid_by_time_and_used_up_first(tmp_path):
    """It covers one answer and a half at list price; what goes beyond costs twice as much."""
    plan = metered_plan("commit", committed_usd_per_tenant=1.5 * USD, beyond_factor=2.0)
    env = env_of(tmp_path, plans__plans__metered=plan)
    bad = {"good": [0, 0, 0]}
    p = played(env, [bad, bad, bad], [ONE] * 3)
    assert p.usd("commitment_revenue", METERED) == exactly(1.5 * USD / PERIOD_S * 60.0)
    assert p.usd("overage_revenue", METERED) == exactly(2.0 * 1.5 * USD) and p.usd("usage_revenue") == 0.0
    values_usd = USD + (0.5 * USD + USD) + 2.0 * USD
    assert p.usd("refunds") == exactly(-(0.5 * values_usd + 3 * 0.02))
    first, third = p.views[0].request, p.views[2].request
    listed_usd = 100 * 0.001 + first[v.EXPECTED_OUTPUT_TOKENS] * 0.01
    covered = 1.5 * USD / listed_usd
    assert first[v.REQUEST_VALUE_USD] == exactly(covered * listed_usd)
    assert first[v.INPUT_PRICE_USD] == exactly(0.001 * 2.0 * (1.0 - covered))
    assert third[v.INPUT_PRICE_USD] == exactly(0.002) and third[v.REQUEST_VALUE_USD] == 0.0


def test_a_rate_limit_is_each_customers_own(tmp_path):
    """Six a minute, two at once: of five requests a second apart the first two pass, then one after ten seconds."""
    limits = {"requests_per_minute": 6.0, "burst_requests": 2.0}
    env = env_of(tmp_path, plans__classes__metered__limits=limits, plans__classes__metered__tenants=2)
    rows = [*[{}] * 5, {"tenant_index": 1}, {"arrived_at_s": 11.0}]
    p = played(env, rows, [ONE] * 4)
    assert p.count("refused", METERED) == 3 and p.count("served") == 4
    assert p.usd("usage_revenue") == exactly(4 * USD) and p.usd("unserved_credits") == 0.0


def test_a_prompt_longer_than_the_plan_allows_is_refused_with_its_session(tmp_path):
    env = env_of(tmp_path, plans__classes__metered__limits__prompt_tokens=100)
    second = {"prompt_tokens": 101, "session_index": 1}
    rows = [{}, second, {"session_index": 1, "parent_index": 1, "arrived_at_s": 2.0}]
    p = played(env, rows, [ONE])
    assert p.count("refused") == 1 and p.count("lost_calls") == 1 and p.count("served") == 1


def test_cached_tokens_and_calls_have_prices_of_their_own(tmp_path):
    """The second prompt finds 96 of its 100 tokens in the prefix cache: six blocks of sixteen."""
    plan = {"kind": "usage", "input_usd_per_mtok": 1000.0, "cached_input_usd_per_mtok": 100.0}
    plan |= {"output_usd_per_mtok": 10000.0, "request_usd": 0.05}
    env = env_of(tmp_path, plans__plans__metered=plan, fleet__pools__one__prefix_caching=True)
    episode = workload(env.worlds.plant.scenario, {}, {"arrived_at_s": 1.0})
    hashes = np.tile(np.arange(6, dtype=np.int64), 2)
    episode = dataclasses.replace(episode, prefix_block_tokens=16, prefix_count=[6, 6], prefix_hash=hashes)
    p = Played(env, episode, [ONE, ONE])
    assert p.usd("usage_revenue") == exactly(2 * (USD + 0.05) - 96 * 0.0009)
    second = assess(p.views[1], MarginParameters((0.0, 0.0, 0.0)))
    parts = second.parts(ONE)
    cost_usd = 4 * 10e-6 + p.views[1].request[v.EXPECTED_OUTPUT_TOKENS] * 20e-6
    assert parts["cost"] == exactly(-(cost_usd + 96 * 0.0009))


WINDOW = {"length_s": 10.0, "credits": [{"below": 0.9, "share": 0.1}, {"below": 0.6, "share": 0.5}]}


def windowed(folder):
    slo = {"ttft_s": 0.4, "window": WINDOW}
    return env_of(folder, plans__classes__metered__slo=slo)


def test_a_window_is_credited_when_it_closes(tmp_path):
    """Three windows of ten seconds: two of four met (half the value), three of four (a tenth), all met (nothing)."""
    env = windowed(tmp_path)
    late = [[API, API, ONE, ONE], [API, ONE, ONE, ONE], [ONE, ONE]]
    rows = [{"arrived_at_s": 10.0 * i + j} for i, window in enumerate(late) for j in range(len(window))]
    p = played(env, rows, [choice for window in late for choice in window])
    credits_usd = [0.5 * 4 * USD, 0.1 * 4 * USD, 0.0]
    assert p.usd("slo_credits", METERED) == exactly(-sum(credits_usd))
    per_s = by_hand.SEAT_USD_PER_S - by_hand.GPU_USD_PER_S
    assert p.rewards[3] == exactly(USD - ENERGY_USD - credits_usd[0] + 7.0 * per_s)
    assert p.count("slo_ok", METERED) == 7


def test_the_last_window_closes_with_the_backlog(tmp_path):
    env = windowed(tmp_path)
    p = played(env, [{"arrived_at_s": 58.0}, {"arrived_at_s": 59.9}], [ONE, API])
    assert p.usd("slo_credits") == exactly(-0.5 * 2 * USD)


def test_a_request_without_an_answer_misses_its_window(tmp_path):
    env = windowed(tmp_path)
    p = played(env, [{}, {}, {}], [ONE, ONE, SHED])
    assert p.usd("slo_credits") == exactly(-0.1 * 2 * USD)


def test_the_view_shows_what_one_more_miss_costs(tmp_path):
    """Against the formula of `contracts`, and in the rule's credits by the chance of a miss."""
    env = windowed(tmp_path)
    p = played(env, [{}] * 4, [API, API, ONE, ONE])
    request = p.views[3].request
    seen, gap_s = 3.0, 0.0
    for k, at_s in enumerate((0.7, 1.7, 2.11)):
        before = (0.0, 0.7, 1.7)[k]
        gap_s += ((at_s - before) - gap_s) / (k + 1)
    rate = (2.0 + 20.0 * 0.02) / (seen + 20.0)
    to_come = (10.0 - 3.0) / gap_s
    value_usd = 3 * USD + (to_come + 1.0) * USD
    usd = contracts.window_miss_usd(2.0, 3.0, to_come, rate, value_usd, 0.9, 0.1, 0.6, 0.5)
    assert usd > 0.0 and request[v.MISS_USD] == exactly(usd)
    assert request[v.UNSERVED_CREDIT_USD] == exactly(0.03 + usd)
    a = assess(p.views[3], MarginParameters((0.0, 0.0, 0.0)))
    ratio = (a.latency_s[0, API] / 0.4) ** 4.0
    late = ratio / (1.0 + ratio)
    assert a.parts_usd[1, API] == exactly(a.stay[API] * late * usd)


RETENTION = {
    "lifetime_value_usd": 100.0, "hazard_bad_answer": 0.01, "hazard_missed_slo": 0.002, "hazard_unserved": 0.03,
}  # fmt: skip


@pytest.mark.parametrize("objective", ["margin", "margin_and_lifetime"])
def test_lifetime_value_is_an_account_where_it_is_part_of_the_objective(tmp_path, objective):
    """A bad answer, a late one and none: 1, 0.2 and 3 USD."""
    keys = {"plans.classes.metered.retention": RETENTION}
    env = FleetEnv(by_hand.scenario(tmp_path, keys, objective=objective))
    p = played(env, [{"good": [0, 1, 1]}, {}, {}], [ONE, API, SHED])
    counted = objective == "margin_and_lifetime"
    assert p.usd("lifetime_value", METERED) == exactly(-(1.0 + 0.2 + 3.0) if counted else 0.0)
    shown = p.views[0].request[[v.BAD_ANSWER_USD, v.MISS_USD, v.UNSERVED_CREDIT_USD]]
    assert shown == pytest.approx([1.02, 0.2, 3.03] if counted else [0.02, 0.0, 0.03])


def test_customers_start_somewhere_in_their_period(tmp_path):
    """Drawn by seed alone, the same for every policy, and within the class's range."""
    keys = {"plans.classes.seats.tenants": 500, "plans.classes.seats.used_at_start": [0.5, 1.5]}
    scenario = by_hand.scenario(tmp_path, keys)
    one, same, other = scenario.generate(1), scenario.generate(1), scenario.generate(2)
    assert np.array_equal(one.billing, same.billing) and not np.array_equal(one.billing, other.billing)
    assert one.billing.shape == (502, 2)
    phase, used = one.billing[1:501].T
    assert phase.min() >= 0.0 and phase.max() < 1.0 and abs(phase.mean() - 0.5) < 0.06
    assert used.min() >= 0.5 and used.max() <= 1.5 and abs(used.mean() - 1.0) < 0.06
    assert one.billing[[0, 501], 1].max() <= 1.0


def test_what_is_not_limited_is_not_kept(hand_plant):
    assert hand_plant.config[0]["keeps_accounts"] == 0
    assert math.isinf(hand_plant.terms["window_s"].min())
    assert hand_plant.terms["beyond_factor"].tolist() == [1.0] * 3


def test_two_answers_at_strong_cost_nothing_more(tmp_path):
    """Accounts that are kept and never reached change nothing."""
    plain, kept = (
        FleetEnv(by_hand.scenario(tmp_path)),
        env_of(tmp_path, plans__classes__metered__limits__prompt_tokens=999),
    )
    rows = [{}, {"class_index": SEATS}, {"good": [0, 0, 0]}]
    usd = [played(env, rows, [ONE, TWO_A, API]).ledger_usd for env in (plain, kept)]
    assert np.array_equal(*usd)
