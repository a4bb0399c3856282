"""The ledger: accounts x classes, the only place where money is added.

`ledger_usd` has shape (N, A, K + 1): N worlds, the accounts below, K customer classes and one last column for what no
single class causes (GPU-hours). Revenue is positive, cost negative; the sum of all postings is the margin. `counts` has
shape (N, len(COUNTS), K). All functions are compiled and take one world `w`; queues and times come in as plain numbers.

Counts are of requests by class unless they say tokens. `calls` have arrived: `first_calls`, which come whatever
happens, and follow-ups of sessions. `lost_calls` never will, since a request before them got no answer. `cache_hits`
were answered from the response cache; `wrong_hits` are those of them whose answer was to another question.
`turned_down` counts answers that failed before a verifier; `tool_calls` and `tool_hits` what was asked of tools, and
what was answered from the cache of their results instead. `refused` were turned away by their contract (429), with
nothing owed. `hedged` were sent a second time while they waited, and `hedges_won` answered by that second call.

*Owed*: whether a request's contract owes anything for it; nothing is paid back for one beyond a fair-use quota.
"""

from __future__ import annotations

import numpy as np

from envs.economics.formulas import refund_usd, service_credit_usd, tokens_usd, unserved_credit_usd
from envs.kernels import kernel

ACCOUNTS = (
    "usage_revenue",
    "seat_revenue",
    "commitment_revenue",
    "overage_revenue",
    "slo_credits",
    "unserved_credits",
    "refunds",
    "api_spend",
    "gpu_hours",
    "energy",
    "cache",
    "task_revenue",
    "verification",
    "tools",
    "lifetime_value",
)
(
    USAGE_REVENUE,
    SEAT_REVENUE,
    COMMITMENT_REVENUE,
    OVERAGE_REVENUE,
    SLO_CREDITS,
    UNSERVED_CREDITS,
    REFUNDS,
    API_SPEND,
    GPU_HOURS,
    ENERGY,
    CACHE,
    TASK_REVENUE,
    VERIFICATION,
    TOOLS,
    LIFETIME_VALUE,
) = range(15)
REVENUE_ACCOUNTS = ("usage_revenue", "seat_revenue", "commitment_revenue", "overage_revenue", "task_revenue")
FIXED_COST_ACCOUNTS = ("gpu_hours",)

COUNTS = (
    "first_calls",
    "served",
    "shed",
    "abandoned",
    "failed",
    "good",
    "slo_ok",
    "ttft_ok",
    "tpot_ok",
    "e2e_ok",
    "deferred",
    "restarts",
    "prompt_tokens",
    "output_tokens",
    "retries",
    "calls",
    "lost_calls",
    "cache_hits",
    "wrong_hits",
    "turned_down",
    "tool_calls",
    "tool_hits",
    "refused",
    "hedged",
    "hedges_won",
)
(
    FIRST_CALLS,
    SERVED,
    SHED,
    ABANDONED,
    FAILED,
    GOOD,
    SLO_OK,
    TTFT_OK,
    TPOT_OK,
    E2E_OK,
    DEFERRED,
    RESTARTS,
    PROMPT_TOKENS,
    OUTPUT_TOKENS,
    RETRIES,
    CALLS,
    LOST_CALLS,
    CACHE_HITS,
    WRONG_HITS,
    TURNED_DOWN,
    TOOL_CALLS,
    TOOL_HITS,
    REFUSED,
    HEDGED,
    HEDGES_WON,
) = range(25)


@kernel
def post(ledger_usd: np.ndarray, w: int, account: int, k: int, usd: float) -> None:
    """Adds one posting."""
    ledger_usd[w, account, k] += usd


@kernel
def post_time(ledger_usd: np.ndarray, terms: np.ndarray, w: int, gpu_usd_per_s: float, elapsed_s: float) -> None:
    """Posts what time alone brings: seats and commitments of every class, and GPUs held, busy or idle."""
    classes = terms.shape[0]
    for k in range(classes):
        post(ledger_usd, w, SEAT_REVENUE, k, terms[k].seat_usd_per_s * elapsed_s)
        post(ledger_usd, w, COMMITMENT_REVENUE, k, terms[k].commitment_usd_per_s * elapsed_s)
    post(ledger_usd, w, GPU_HOURS, classes, -gpu_usd_per_s * elapsed_s)


@kernel
def post_served(
    ledger_usd: np.ndarray,
    counts: np.ndarray,
    terms: np.ndarray,
    w: int,
    k: int,
    revenue_account: int,
    revenue_usd: float,
    value_usd: float,
    owed: bool,
    prompt_tokens: int,
    output_tokens: int,
    ttft_s: float,
    tpot_s: float,
    e2e_s: float,
    good: bool,
    cost_account: int,
    cost_usd: float,
) -> bool:
    """Posts an answered request: revenue, cost of the answer, refund if it was bad, credits for missed SLOs.

    Returns:
        Whether it met every SLO.
    """
    term = terms[k]
    ttft_ok = ttft_s <= term.slo_ttft_s
    tpot_ok = tpot_s <= term.slo_tpot_s
    e2e_ok = e2e_s <= term.slo_e2e_s
    credited_share = (
        (0.0 if ttft_ok else term.ttft_credit_share)
        + (0.0 if tpot_ok else term.tpot_credit_share)
        + (0.0 if e2e_ok else term.e2e_credit_share)
    )
    met = ttft_ok and tpot_ok and e2e_ok
    credit_usd = service_credit_usd(value_usd, credited_share)
    post(ledger_usd, w, revenue_account, k, revenue_usd)
    post(ledger_usd, w, cost_account, k, -cost_usd)
    post(ledger_usd, w, SLO_CREDITS, k, -credit_usd)
    if good:
        counts[w, GOOD, k] += 1
    else:
        if owed:
            post(ledger_usd, w, REFUNDS, k, -refund_usd(value_usd, term.refund_share, term.bad_answer_usd))
        post(ledger_usd, w, LIFETIME_VALUE, k, -term.bad_lifetime_usd)
    if not met:
        post(ledger_usd, w, LIFETIME_VALUE, k, -term.missed_lifetime_usd)
    counts[w, SERVED, k] += 1
    counts[w, TTFT_OK, k] += ttft_ok
    counts[w, TPOT_OK, k] += tpot_ok
    counts[w, E2E_OK, k] += e2e_ok
    counts[w, SLO_OK, k] += met
    counts[w, PROMPT_TOKENS, k] += prompt_tokens
    counts[w, OUTPUT_TOKENS, k] += output_tokens
    return met


@kernel
def post_unserved(
    ledger_usd: np.ndarray,
    counts: np.ndarray,
    terms: np.ndarray,
    w: int,
    k: int,
    count: int,
    value_usd: float,
    owed: bool,
    cost_account: int,
    cost_usd: float,
) -> None:
    """Posts a request without an answer (`count` is SHED, ABANDONED or FAILED): its credit, and what was spent.

    `value_usd` is what an answer of the expected length would have been worth.
    """
    term = terms[k]
    if owed:
        credit_usd = unserved_credit_usd(value_usd, term.unserved_credit_share, term.unserved_credit_usd)
        post(ledger_usd, w, UNSERVED_CREDITS, k, -credit_usd)
    post(ledger_usd, w, LIFETIME_VALUE, k, -term.unserved_lifetime_usd)
    post(ledger_usd, w, cost_account, k, -cost_usd)
    counts[w, count, k] += 1


@kernel
def post_served_amount(
    ledger_usd: np.ndarray,
    counts: np.ndarray,
    terms: np.ndarray,
    w: int,
    k: int,
    answered: float,
    prompt_tokens: float,
    output_tokens: float,
    credited: float,
    p_good: float,
    cost_account: int,
    cost_usd: float,
) -> None:
    """Posts an amount of answered requests at once, in expectation; `counts` is an array of floats.

    Args:
        ledger_usd: (N, A, K + 1).
        counts: (N, len(COUNTS), K) f8; the caller adds which SLOs were kept.
        terms: (K,) contracts.
        w: World.
        k: Class.
        answered: Requests.
        prompt_tokens: Mean per request.
        output_tokens: Mean per request.
        credited: Credited shares of a request's value, summed over the amount.
        p_good: Share of good answers.
        cost_account: Account of what the answers cost.
        cost_usd: That cost.
    """
    if answered <= 0.0:
        return
    term = terms[k]
    revenue_usd = tokens_usd(prompt_tokens, output_tokens, term.input_usd_per_token, term.output_usd_per_token)
    value_usd = revenue_usd + term.request_value_usd
    credit_usd = service_credit_usd(value_usd, credited / answered)
    bad_usd = refund_usd(value_usd, term.refund_share, term.bad_answer_usd)
    post(ledger_usd, w, USAGE_REVENUE, k, answered * revenue_usd)
    post(ledger_usd, w, cost_account, k, -cost_usd)
    post(ledger_usd, w, SLO_CREDITS, k, -answered * credit_usd)
    post(ledger_usd, w, REFUNDS, k, -answered * (1.0 - p_good) * bad_usd)
    counts[w, SERVED, k] += answered
    counts[w, GOOD, k] += answered * p_good
    counts[w, PROMPT_TOKENS, k] += answered * prompt_tokens
    counts[w, OUTPUT_TOKENS, k] += answered * output_tokens


@kernel
def post_unserved_amount(
    ledger_usd: np.ndarray,
    counts: np.ndarray,
    terms: np.ndarray,
    w: int,
    k: int,
    count: int,
    unanswered: float,
    prompt_tokens: float,
    output_tokens: float,
) -> None:
    """Posts an amount of requests without an answer (`count` is SHED, ABANDONED or FAILED) of the given mean tokens."""
    term = terms[k]
    value_usd = (
        tokens_usd(prompt_tokens, output_tokens, term.input_usd_per_token, term.output_usd_per_token)
        + term.request_value_usd
    )
    credit_usd = unserved_credit_usd(value_usd, term.unserved_credit_share, term.unserved_credit_usd)
    post(ledger_usd, w, UNSERVED_CREDITS, k, -unanswered * credit_usd)
    counts[w, count, k] += unanswered
