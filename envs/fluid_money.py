"""The money of a control tick: joins the fluid surrogate's amounts with the ledger, as `envs.world` does with requests.

Shapes: N worlds, P pools, K classes, V providers, F members of a family of scenarios, whose money may differ.
"""

# ruff: noqa: ANN001, ANN201, ANN202 (Numba infers the types of kernels)
from __future__ import annotations

import numpy as np

from envs.economics import ledger as books
from envs.economics.formulas import tokens_usd
from envs.fleet.fluid_tick import tick
from envs.kernels import kernel

PRICE = np.dtype(
    [
        ("energy_input_usd", "f8"),  # per token
        ("energy_output_usd", "f8"),
        ("replica_usd_per_s", "f8"),
        ("reserved_usd_per_s", "f8"),  # of a reserved replica
        ("reserved_replicas", "f8"),  # paid whether they are held or not
        ("on_demand_replicas", "f8"),  # most that are paid on demand
        ("spot_usd_per_s", "f8"),  # of a spot replica
    ]
)
"""Cost of a pool, `(F, P)`."""

ANSWER = np.dtype(
    [
        ("prompt_tokens", "f8"),  # mean per request
        ("output_tokens", "f8"),
        ("p_good", "f8"),  # share of good answers of the station's tier
        ("cost_usd", "f8"),  # a provider's invoice per request
        *[(name, "f8") for name in ("ttft_ok", "tpot_ok", "e2e_ok", "slo_ok", "credited")],  # a provider's, per request
    ]
)
"""What a class gets at a pool or provider, `(F, P + V, K)`."""


@kernel
def _count_promises(counts, w, k, ttft_ok, tpot_ok, e2e_ok, slo_ok):
    counts[w, books.TTFT_OK, k] += ttft_ok
    counts[w, books.TPOT_OK, k] += tpot_ok
    counts[w, books.E2E_OK, k] += e2e_ok
    counts[w, books.SLO_OK, k] += slo_ok


@kernel
def _post_pool(terms, prices, answers, stations, flows, ledger_usd, counts, w, p, tick_s):
    price, station = prices[p], stations[w, p]
    paid = price.reserved_usd_per_s * price.reserved_replicas
    more = max(station.paid_replicas - price.reserved_replicas, 0.0)
    on_demand = min(more, price.on_demand_replicas)
    paid += price.replica_usd_per_s * on_demand + price.spot_usd_per_s * (more - on_demand)
    books.post(ledger_usd, w, books.GPU_HOURS, terms.shape[0], -paid * tick_s)
    for k in range(terms.shape[0]):
        flow, answer = flows[w, p, k], answers[p, k]
        counts[w, books.FIRST_CALLS, k] += flow.arrived
        counts[w, books.CALLS, k] += flow.arrived
        counts[w, books.DEFERRED, k] += flow.deferred
        energy_usd = flow.served * tokens_usd(
            answer.prompt_tokens, answer.output_tokens, price.energy_input_usd, price.energy_output_usd
        )
        books.post_served_amount(
            ledger_usd, counts, terms, w, k, flow.served, answer.prompt_tokens, answer.output_tokens,
            flow.served_credited, answer.p_good, books.ENERGY, energy_usd,
        )  # fmt: skip
        _count_promises(counts, w, k, flow.served_ttft_ok, flow.served_tpot_ok, flow.served_e2e_ok, flow.served_slo_ok)
        for count, amount in ((books.SHED, flow.shed), (books.ABANDONED, flow.abandoned), (books.FAILED, flow.failed)):
            books.post_unserved_amount(
                ledger_usd, counts, terms, w, k, count, amount, answer.prompt_tokens, answer.output_tokens
            )


@kernel
def _post_provider(terms, answers, row, spills, ledger_usd, counts, w, v):
    for k in range(terms.shape[0]):
        answer, calls = answers[row, k], spills[w, v, k]
        books.post_served_amount(
            ledger_usd, counts, terms, w, k, calls, answer.prompt_tokens, answer.output_tokens,
            calls * answer.credited, answer.p_good, books.API_SPEND, calls * answer.cost_usd,
        )  # fmt: skip
        _count_promises(
            counts, w, k, calls * answer.ttft_ok, calls * answer.tpot_ok, calls * answer.e2e_ok, calls * answer.slo_ok
        )


@kernel
def step(
    pools, classes, curves, kept, deadline_s, providers, stations, orders, flows, held, clocks_s, spills,
    all_terms, all_prices, all_answers, variant, ledger_usd, counts, margins_usd, rewards_usd, arrivals, pool_levers,
    class_levers, tick_s, running,
):  # fmt: skip
    """Advances `running` (N,) worlds by one tick and posts it; `rewards_usd` (N,) is the change of the ledger."""
    for w in range(flows.shape[0]):
        if not running[w]:
            continue
        terms, prices, answers = all_terms[variant[w]], all_prices[variant[w]], all_answers[variant[w]]
        tick(
            pools, classes, curves, kept, deadline_s, providers, stations, orders, flows, held, clocks_s, spills,
            w, arrivals, pool_levers, class_levers, tick_s,
        )  # fmt: skip
        books.post_time(ledger_usd, terms, w, 0.0, tick_s)
        for p in range(flows.shape[1]):
            _post_pool(terms, prices, answers, stations, flows, ledger_usd, counts, w, p, tick_s)
        for v in range(spills.shape[1]):
            _post_provider(terms, answers, flows.shape[1] + v, spills, ledger_usd, counts, w, v)
        total = 0.0
        for account in range(ledger_usd.shape[1]):
            for k in range(ledger_usd.shape[2]):
                total += ledger_usd[w, account, k]
        rewards_usd[w] = total - margins_usd[w]
        margins_usd[w] = total


@kernel
def settle(
    pools, classes, curves, kept, deadline_s, providers, stations, orders, flows, held, clocks_s, spills,
    all_terms, all_prices, all_answers, variant, ledger_usd, counts, margins_usd, rewards_usd, all_last_provider, w,
):  # fmt: skip
    """Ends world w at its horizon as the engine does: what is in the fleet is served, what is held is bought.

    Held work is bought from provider `all_last_provider` (F, K), or goes unserved without one (-1); those whose users
    would have left leave; `rewards_usd` is the change of the ledger.
    """
    m = variant[w]
    terms, prices, answers, last_provider = all_terms[m], all_prices[m], all_answers[m], all_last_provider[m]
    for p in range(flows.shape[1]):
        for k in range(flows.shape[2]):
            flow, answer = flows[w, p, k], answers[p, k]
            amount = flow.waiting + flow.running
            energy_usd = amount * tokens_usd(
                answer.prompt_tokens, answer.output_tokens, prices[p].energy_input_usd, prices[p].energy_output_usd
            )
            books.post_served_amount(
                ledger_usd, counts, terms, w, k, amount, answer.prompt_tokens, answer.output_tokens, flow.credited,
                answer.p_good, books.ENERGY, energy_usd,
            )  # fmt: skip
            _count_promises(counts, w, k, flow.ttft_ok, flow.tpot_ok, flow.e2e_ok, flow.slo_ok)
            books.post_unserved_amount(
                ledger_usd, counts, terms, w, k, books.ABANDONED, flow.leaving, answer.prompt_tokens,
                answer.output_tokens,
            )  # fmt: skip
            left = held[w, p, k].sum()
            if last_provider[k] < 0:
                books.post_unserved_amount(
                    ledger_usd, counts, terms, w, k, books.SHED, left, answer.prompt_tokens, answer.output_tokens
                )
            else:
                bought = answers[flows.shape[1] + last_provider[k], k]
                books.post_served_amount(
                    ledger_usd, counts, terms, w, k, left, bought.prompt_tokens, bought.output_tokens, 0.0,
                    bought.p_good, books.API_SPEND, left * bought.cost_usd,
                )  # fmt: skip
                _count_promises(counts, w, k, left, left, left, left)
            flow.waiting = flow.running = flow.leaving = 0.0
            flow.ttft_ok = flow.tpot_ok = flow.e2e_ok = flow.slo_ok = flow.credited = 0.0
            held[w, p, k] = 0.0
    total = 0.0
    for account in range(ledger_usd.shape[1]):
        for k in range(ledger_usd.shape[2]):
            total += ledger_usd[w, account, k]
    rewards_usd[w] = total - margins_usd[w]
    margins_usd[w] = total
