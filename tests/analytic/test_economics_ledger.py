"""Every account against pencil and paper, on episodes of one to three requests (figures in `by_hand`)."""

import by_hand
import numpy as np
import pytest
from by_hand import API, CACHE, METERED, NIGHT, ONE, SEATS, SHED, TWO_A, Played, workload

from envs.economics import ledger as books
from envs.economics.ledger import ACCOUNTS
from envs.economics.plans import TERMS
from envs.fleet_env import FleetEnv
from marginroute import pricing

EXPECTED_OUTPUT_TOKENS = 113.12108535461  # mean of the lognormal of `by_hand`, median 100, sigma 0.5, cut at 400
REVENUE_USD = 100 * 0.001 + 11 * 0.01  # of the default metered request: 100 prompt tokens, 11 output tokens


def exactly(usd):
    return pytest.approx(usd, rel=1e-9, abs=1e-12)


def accounts(played):
    return {name: played.usd(name) for name in ACCOUNTS}


def test_one_good_answer_in_time(hand_env):
    played = Played(hand_env, workload(hand_env.worlds.plant.scenario, {}), [ONE])
    assert accounts(played) == {
        "usage_revenue": exactly(0.21),
        "seat_revenue": exactly(60.0 * by_hand.SEAT_USD_PER_S),
        "commitment_revenue": 0.0,
        "overage_revenue": 0.0,
        "slo_credits": 0.0,
        "unserved_credits": 0.0,
        "refunds": 0.0,
        "api_spend": 0.0,
        "gpu_hours": exactly(-60.0 * 0.005),
        "energy": exactly(-(100 * 10e-6 + 11 * 20e-6)),
        "cache": 0.0,
        "tools": 0.0,
        "verification": 0.0,
        "task_revenue": 0.0,
        "lifetime_value": 0.0,
    }
    assert played.rewards == [exactly(0.21 + 60.0 * by_hand.SEAT_USD_PER_S - 0.3 - 0.00122)]
    done = {name: played.count(name, METERED) for name in ("first_calls", "served", "good", "slo_ok", "ttft_ok")}
    assert set(done.values()) == {1}
    assert played.count("prompt_tokens") == 100 and played.count("output_tokens") == 11


def test_postings_stand_in_their_column(hand_env):
    scenario = hand_env.worlds.plant.scenario
    rows = [{"class_index": k, "arrived_at_s": float(k)} for k in (METERED, SEATS, NIGHT)]
    played = Played(hand_env, workload(scenario, *rows), [ONE, TWO_A, ONE])
    assert [played.usd("usage_revenue", k) for k in (METERED, SEATS, NIGHT)] == [exactly(0.21), 0.0, exactly(0.105)]
    assert played.usd("energy", SEATS) == exactly(-(100 * 30e-6 + 11 * 40e-6))
    assert played.usd("seat_revenue", SEATS) == exactly(60.0 * by_hand.SEAT_USD_PER_S)
    assert played.usd("gpu_hours", -1) == played.usd("gpu_hours") == exactly(-0.3)
    assert not played.ledger_usd[[a for a, name in enumerate(ACCOUNTS) if name != "gpu_hours"], -1].any()


def test_seats_pay_by_time_and_gpus_cost_by_time(hand_env):
    """Two decisions 10 s apart: the first reward holds 10 s of both, the second the 50 s that are left."""
    rows = [{"class_index": SEATS}, {"class_index": SEATS, "arrived_at_s": 10.0}]
    played = Played(hand_env, workload(hand_env.worlds.plant.scenario, *rows), [ONE, ONE])
    energy_usd = 0.00122
    per_s = by_hand.SEAT_USD_PER_S - 0.005
    assert played.rewards == [exactly(10.0 * per_s - energy_usd), exactly(50.0 * per_s - energy_usd)]


def test_time_before_the_first_request_counts(hand_env):
    played = Played(hand_env, workload(hand_env.worlds.plant.scenario, {"arrived_at_s": 20.0}), [SHED])
    assert played.usd("gpu_hours") == exactly(-0.3)
    assert sum(played.rewards) == exactly(played.ledger_usd.sum())


def test_slo_credits_for_each_missed_promise(hand_env):
    """The API takes 0.5 s and 20 ms per token: metered misses TTFT (20 %) and TPOT (10 %), seats TTFT (30 %)."""
    rows = [{}, {"class_index": SEATS, "arrived_at_s": 1.0}]
    played = Played(hand_env, workload(hand_env.worlds.plant.scenario, *rows), [API, API])
    assert played.usd("slo_credits", METERED) == exactly(-0.3 * REVENUE_USD)
    assert played.usd("slo_credits", SEATS) == exactly(-0.3 * by_hand.SEAT_REQUEST_USD)
    assert played.usd("api_spend") == exactly(-2 * (100 * 50e-6 + 11 * 100e-6))
    assert played.usd("energy") == 0.0
    missed = {name: played.count(name, METERED) for name in ("served", "slo_ok", "ttft_ok", "tpot_ok", "e2e_ok")}
    assert missed == {"served": 1, "slo_ok": 0, "ttft_ok": 0, "tpot_ok": 0, "e2e_ok": 1}


def test_e2e_credit(hand_env):
    """3,001 output tokens at 10 ms take 30.01 s, an iteration more than the promise of 30 s; 2,999 keep it."""
    rows = [{"class_index": NIGHT, "output_tokens": 2999}, {"class_index": NIGHT, "output_tokens": 3001}]
    played = Played(hand_env, workload(hand_env.worlds.plant.scenario, *rows), [ONE, TWO_A])
    assert played.count("e2e_ok", NIGHT) == 1
    assert played.usd("slo_credits", NIGHT) == exactly(-0.5 * (100 * 0.0005 + 3001 * 0.005))


def test_refund_of_a_bad_answer(hand_env):
    bad_on_weak = {"good": [0, 1, 1]}
    rows = [
        bad_on_weak,
        {"class_index": SEATS, "arrived_at_s": 1.0} | bad_on_weak,
        {"arrived_at_s": 2.0} | bad_on_weak,
    ]
    played = Played(hand_env, workload(hand_env.worlds.plant.scenario, *rows), [ONE, ONE, TWO_A])
    assert played.usd("refunds", METERED) == exactly(-(0.5 * REVENUE_USD + 0.02))
    assert played.usd("refunds", SEATS) == exactly(-by_hand.SEAT_REQUEST_USD)
    assert played.count("good") == 1 and played.count("served") == 3
    assert played.usd("usage_revenue", METERED) == exactly(2 * REVENUE_USD)


def test_shed_credit_is_of_the_expected_value(hand_env):
    """The length of an answer that never came is not known: the credit takes the running mean of class and task."""
    rows = [{}, {"class_index": SEATS, "arrived_at_s": 1.0}, {"class_index": NIGHT, "arrived_at_s": 2.0}]
    played = Played(hand_env, workload(hand_env.worlds.plant.scenario, *rows), [SHED, SHED, SHED])
    value_usd = 100 * 0.001 + EXPECTED_OUTPUT_TOKENS * 0.01
    assert played.usd("unserved_credits", METERED) == exactly(-(0.25 * value_usd + 0.03))
    assert played.usd("unserved_credits", SEATS) == exactly(-by_hand.SEAT_REQUEST_USD)
    assert played.usd("unserved_credits", NIGHT) == exactly(-0.25 * value_usd)  # half the price, half of it
    assert played.usd("usage_revenue") == 0.0
    assert played.count("shed") == 3 and played.count("served") == 0


def test_expected_length_follows_the_answers(hand_env):
    """The operator's mean counts for 20 answers: after one of 11 tokens it is the mean of 21."""
    rows = [{}, {"arrived_at_s": 1.0}]
    played = Played(hand_env, workload(hand_env.worlds.plant.scenario, *rows), [ONE, SHED])
    mean_tokens = (20 * EXPECTED_OUTPUT_TOKENS + 11) / 21
    assert played.usd("unserved_credits") == exactly(-(0.25 * (100 * 0.001 + mean_tokens * 0.01) + 0.03))


@pytest.mark.parametrize(
    ("choice", "patience_s", "account", "cost_usd"),
    [
        (API, 0.3, "api_spend", 100 * 50e-6),  # gone before the API's first token: the prompt is on the invoice
        (ONE, 0.005, "energy", 100 * 10e-6),  # gone at the end of the prefill, which was done
    ],
)
def test_abandonment(hand_env, choice, patience_s, account, cost_usd):
    played = Played(hand_env, workload(hand_env.worlds.plant.scenario, {"patience_s": patience_s}), [choice])
    value_usd = 100 * 0.001 + EXPECTED_OUTPUT_TOKENS * 0.01
    assert played.count("abandoned", METERED) == 1 and played.count("served") == 0
    assert played.usd("unserved_credits") == exactly(-(0.25 * value_usd + 0.03))
    assert played.usd(account) == exactly(-cost_usd)
    assert played.usd("usage_revenue") == played.usd("refunds") == played.usd("slo_credits") == 0.0


def test_leaving_the_line_costs_no_energy(hand_env):
    """A replica that serves one at a time: the second user leaves before its prompt was touched."""
    rows = [{"output_tokens": 101}, {"arrived_at_s": 0.005, "patience_s": 0.5}]
    episode = workload(hand_env.worlds.plant.scenario, *rows)
    played = Played(hand_env, episode, [ONE, ONE], in_flight_caps={"one": 1})
    assert played.count("abandoned") == 1
    assert played.usd("energy") == exactly(-(100 * 10e-6 + 101 * 20e-6))


def test_a_refused_call_costs_nothing_but_its_credit(hand_env):
    """20,000 tokens never fit 1,000 blocks of 16: the engine refuses at once."""
    played = Played(hand_env, workload(hand_env.worlds.plant.scenario, {"prompt_tokens": 20_000}), [ONE])
    assert played.count("failed") == 1
    assert played.usd("unserved_credits") < 0.0
    assert played.usd("energy") == 0.0


def test_cache_pays_per_entry_and_earns_in_full(hand_env):
    rows = [{"prompt_key": 0}, {"prompt_key": 0, "arrived_at_s": 1.0}]
    played = Played(hand_env, workload(hand_env.worlds.plant.scenario, *rows), [ONE, CACHE])
    assert played.usd("usage_revenue") == exactly(2 * REVENUE_USD)
    assert played.usd("cache") == exactly(-0.001)
    assert played.usd("energy") == exactly(-0.00122)
    assert played.count("served") == 2 and played.count("slo_ok") == 2


def test_credits_never_exceed_the_value():
    assert pricing.service_credit_usd(2.0, 0.3 + 0.2) == 1.0
    assert pricing.service_credit_usd(2.0, 0.6 + 0.5 + 0.4) == 2.0
    np.testing.assert_allclose(pricing.service_credit_usd(2.0, np.array([0.15, 1.0, 3.0])), [0.3, 2.0, 2.0])


def test_credit_shares_above_one_pay_the_value_once(tmp_path):
    """TTFT and TPOT at 80 % each, both missed: the customer gets back what it paid, not more."""
    slo = {"ttft_s": 0.4, "ttft_credit_share": 0.8, "tpot_s": 0.015, "tpot_credit_share": 0.8}
    env = FleetEnv(by_hand.scenario(tmp_path, {"plans.classes.metered.slo": slo}))
    played = Played(env, workload(env.worlds.plant.scenario, {}), [API])
    assert played.usd("slo_credits") == exactly(-REVENUE_USD)


def test_gpu_hours_formula_is_what_the_ledger_posts(hand_env):
    played = Played(hand_env, workload(hand_env.worlds.plant.scenario, {}), [ONE])
    assert -played.usd("gpu_hours") == exactly(pricing.gpu_usd(1, 3.6, 60.0) + pricing.gpu_usd(4, 3.6, 60.0))


def test_the_limit_itself_keeps_the_promise():
    """An answer exactly at its SLO is in time; the next larger number is not."""
    terms = np.zeros(1, TERMS)
    for name in ("ttft", "tpot", "e2e"):
        terms[f"slo_{name}_s"], terms[f"{name}_credit_share"] = 1.0, 0.1
    for at_s, credit_usd in ((1.0, 0.0), (np.nextafter(1.0, 2.0), -0.3)):
        ledger_usd, counts = np.zeros((1, len(ACCOUNTS), 2)), np.zeros((1, len(books.COUNTS), 1), dtype=np.int64)
        books.post_served(
            ledger_usd, counts, terms, 0, 0, books.USAGE_REVENUE, 0.0, 1.0, True, 5, 7, at_s, at_s, at_s, True,
            books.ENERGY, 0.0,
        )  # fmt: skip
        assert ledger_usd[0, books.SLO_CREDITS, 0] == pytest.approx(credit_usd)
        assert counts[0, books.SLO_OK, 0] == (credit_usd == 0.0)


def test_names_and_indices_of_the_ledger_agree():
    for names in (books.ACCOUNTS, books.COUNTS):
        assert [getattr(books, name.upper()) for name in names] == list(range(len(names)))
