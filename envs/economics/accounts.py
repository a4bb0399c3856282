"""Customers' accounts: quotas, prepaid credits, commitments, rate limits, and windows of SLO attainment.

Kept per world, updated by the kernels below; the rules themselves are `marginroute.contracts`. Customers (tenants) are
numbered over all classes. Records, beside the contract of their class (`TERMS`):

    accounts (N, G)   what is left of each customer's allowances
    windows (N, K)    the open window of each class, and running means of what is usual there

A billing period renews quota, credits and commitment. It is longer than an episode as a rule, so an episode begins
somewhere in it, with as much used as its workload says.
"""

# ruff: noqa: ANN001, ANN201, ANN202 (Numba infers the types of kernels)
from __future__ import annotations

import math

import numpy as np

from envs.economics.formulas import running_mean, tokens_usd
from envs.kernels import kernel
from marginroute import contracts
from marginroute import view as v
from marginroute.contracts import PRIOR_MISS_RATE, PRIOR_OUTCOMES, RECENT_OUTCOMES

ACCOUNT = np.dtype(
    [
        ("requests_left", "f8"),  # of the quota; inf: none
        ("balance_usd", "f8"),  # prepaid credits; inf: not prepaid
        ("committed_left_usd", "f8"),  # paid for by the commitment and not yet used
        ("bucket", "f8"),  # of the rate limit, as of bucket_at_s
        ("bucket_at_s", "f8"),
        ("renews_at_s", "f8"),  # start of the next billing period; inf: never within reach
    ]
)
"""One customer, `(N, G)`."""

WINDOW = np.dtype(
    [
        ("closes_at_s", "f8"),  # inf: the class has no windows
        ("decided", "f8"),  # requests of the window with a known outcome
        ("missed", "f8"),  # those that missed an SLO or got no answer
        ("value_usd", "f8"),  # of those that were answered
        ("miss_rate", "f8"),  # running mean over requests
        ("mean_value_usd", "f8"),  # running mean over answered requests
        ("gap_s", "f8"),  # running mean time between two outcomes
        ("last_at_s", "f8"),
        ("outcomes", "f8"),  # weight of the running means
    ]
)
"""The open SLO window of a class, `(N, K)`."""

standing = kernel(contracts.standing, inline="always")
refilled = kernel(contracts.refilled, inline="always")
show_standing = kernel(contracts.show_standing)
window_credit_share = kernel(contracts.window_credit_share)
window_miss_usd = kernel(contracts.window_miss_usd)


@kernel
def open_accounts(terms, accounts, windows, tenant_class, phase, used, w):
    """Starts an episode: `phase` (G,) of the billing period has passed, `used` (G,) of every allowance is used up."""
    for g in range(tenant_class.shape[0]):
        term, account = terms[tenant_class[g]], accounts[w, g]
        _renew(term, account)
        left = max(1.0 - used[g], 0.0)
        account.requests_left *= left
        account.balance_usd *= left
        account.committed_left_usd *= left
        account.renews_at_s = term.period_s * (1.0 - phase[g]) if term.period_s < math.inf else math.inf
        account.bucket, account.bucket_at_s = term.rate_burst, 0.0
    for k in range(terms.shape[0]):
        window = windows[w, k]
        window.closes_at_s = terms[k].window_s
        window.decided = window.missed = window.value_usd = 0.0
        window.miss_rate, window.mean_value_usd, window.gap_s = 0.0, 0.0, 1.0
        window.last_at_s = window.outcomes = 0.0


@kernel
def _renew(term, account):
    account.requests_left = term.quota_requests
    account.balance_usd = term.prepaid_usd
    account.committed_left_usd = term.committed_usd


@kernel
def arrive(terms, accounts, w, k, g, prompt_tokens, now_s):
    """A request comes in: renews what is due, takes from the rate limit, and says how it stands (`STANDINGS`)."""
    term, account = terms[k], accounts[w, g]
    while now_s >= account.renews_at_s:
        _renew(term, account)
        account.renews_at_s += term.period_s
    account.bucket = refilled(account.bucket, term.rate_burst, term.rate_per_s, now_s - account.bucket_at_s)
    account.bucket_at_s = now_s
    stands = standing(
        account.requests_left, account.balance_usd, account.bucket, prompt_tokens, term.context_tokens, int(term.beyond)
    )
    if stands != contracts.REFUSED:
        account.bucket -= 1.0
    return stands


@kernel
def bill(terms, accounts, w, k, g, stands, prompt_tokens, cached_tokens, output_tokens):
    """Charges a customer for an answered request.

    Returns:
        Revenue that it brings now, and its value, the base of refunds and credits; both USD.
    """
    term, account = terms[k], accounts[w, g]
    listed_usd = tokens_usd(prompt_tokens, output_tokens, term.input_usd_per_token, term.output_usd_per_token)
    listed_usd += term.request_usd - cached_tokens * (term.input_usd_per_token - term.cached_input_usd_per_token)
    if term.quota_requests < math.inf:
        if stands == contracts.BEST_EFFORT:
            return 0.0, 0.0
        if stands == contracts.OVERAGE:
            return term.overage_usd, term.overage_usd
        account.requests_left -= 1.0
    if term.prepaid_usd < math.inf:
        listed_usd = min(listed_usd, max(account.balance_usd, 0.0))
        account.balance_usd -= listed_usd
    if term.committed_usd > 0.0:
        covered_usd = min(listed_usd, account.committed_left_usd)
        account.committed_left_usd -= covered_usd
        revenue_usd = (listed_usd - covered_usd) * term.beyond_factor
        return revenue_usd, covered_usd + revenue_usd
    return listed_usd, listed_usd + term.request_value_usd


@kernel
def expected_value_usd(terms, k, stands, prompt_tokens, output_tokens):
    """USD that an answer of the expected length would have been worth."""
    term = terms[k]
    if stands == contracts.BEST_EFFORT:
        return 0.0
    if stands == contracts.OVERAGE:
        return term.overage_usd
    listed_usd = tokens_usd(prompt_tokens, output_tokens, term.input_usd_per_token, term.output_usd_per_token)
    return listed_usd + term.request_usd + term.request_value_usd


@kernel
def quota_left(term, account):
    """Share of the allowance that a customer has left; 1: it has none that could end."""
    left = 1.0
    if term.quota_requests < math.inf:
        left = account.requests_left / term.quota_requests
    elif term.prepaid_usd < math.inf:
        left = account.balance_usd / term.prepaid_usd
    elif term.committed_usd > 0.0:
        left = account.committed_left_usd / term.committed_usd
    return max(left, 0.0)


@kernel
def show(terms, accounts, request_view, w, k, g, stands):
    """Turns the request's signals `request_view` (Q, N) of world w into what its answer brings as it stands."""
    term, account = terms[k], accounts[w, g]
    request_view[v.QUOTA_LEFT, w] = quota_left(term, account)
    if stands == contracts.WITHIN and term.committed_usd == 0.0:
        return
    q = request_view[:, w]
    listed_usd = q[v.REQUEST_USD] + tokens_usd(
        q[v.PROMPT_TOKENS], q[v.EXPECTED_OUTPUT_TOKENS], q[v.INPUT_PRICE_USD], q[v.OUTPUT_PRICE_USD]
    )
    covered = min(account.committed_left_usd / max(listed_usd, 1e-12), 1.0)
    show_standing(
        q, stands, covered, term.beyond_factor, term.overage_usd, term.bad_lifetime_usd, term.unserved_lifetime_usd
    )


@kernel
def note_outcome(terms, windows, w, k, met, value_usd, now_s):
    """Books the outcome of a request into the open window of its class; `value_usd` is 0 if it got no answer."""
    if terms[k].window_s == math.inf:
        return
    window = windows[w, k]
    window.decided += 1.0
    window.missed += 0.0 if met else 1.0
    window.value_usd += value_usd
    weight = window.outcomes
    window.miss_rate, after = running_mean(window.miss_rate, weight, 0.0 if met else 1.0, RECENT_OUTCOMES)
    window.mean_value_usd, after = running_mean(window.mean_value_usd, weight, value_usd, RECENT_OUTCOMES)
    window.gap_s, after = running_mean(window.gap_s, weight, max(now_s - window.last_at_s, 0.0), RECENT_OUTCOMES)
    window.outcomes, window.last_at_s = after, now_s


@kernel
def close_window(terms, windows, w, k, now_s):
    """Closes the window of a class if its end has come; returns the credit in USD that it owes."""
    window, term = windows[w, k], terms[k]
    if now_s < window.closes_at_s or term.window_s == math.inf:
        return 0.0
    share = window_credit_share(
        window.decided - window.missed, window.decided, term.window_target, term.window_share, term.window_low_target,
        term.window_low_share,
    )  # fmt: skip
    credit_usd = share * window.value_usd
    window.decided = window.missed = window.value_usd = 0.0
    while window.closes_at_s <= now_s < math.inf:
        window.closes_at_s += term.window_s
    return credit_usd


@kernel
def miss_usd(terms, windows, w, k, now_s):
    """Expected credit that one more miss causes in the open window of a class."""
    window, term = windows[w, k], terms[k]
    if term.window_s == math.inf:
        return 0.0
    to_come = max(window.closes_at_s - now_s, 0.0) / max(window.gap_s, 1e-6)
    value_usd = window.value_usd + (to_come + 1.0) * window.mean_value_usd
    seen = window.outcomes
    miss_rate = (seen * window.miss_rate + PRIOR_OUTCOMES * PRIOR_MISS_RATE) / (seen + PRIOR_OUTCOMES)
    return window_miss_usd(
        window.missed, window.decided, to_come, miss_rate, value_usd, term.window_target, term.window_share,
        term.window_low_target, term.window_low_share,
    )  # fmt: skip
