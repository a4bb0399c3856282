"""Contracts as numbers: one record per customer class."""

from __future__ import annotations

import numpy as np

TERMS = np.dtype(
    [
        ("input_usd_per_token", "f8"),  # usage plan: price of a prompt token; 0 under a seat plan
        ("output_usd_per_token", "f8"),
        ("seat_usd_per_s", "f8"),  # seat plan: revenue of all seats of the class together, per second
        ("request_value_usd", "f8"),  # seat plan: seat price / included requests; base of refunds and credits
        ("refund_share", "f8"),  # of the value, for a bad answer
        ("bad_answer_usd", "f8"),  # fixed cost of a bad answer
        ("slo_ttft_s", "f8"),  # inf: no such SLO
        ("slo_tpot_s", "f8"),
        ("slo_e2e_s", "f8"),
        ("ttft_credit_share", "f8"),  # of the value, when the SLO is missed
        ("tpot_credit_share", "f8"),
        ("e2e_credit_share", "f8"),
        ("unserved_credit_share", "f8"),  # of the expected value, for a request that gets no answer
        ("unserved_credit_usd", "f8"),
        ("patience_s", "f8"),  # median patience before the first token, as the operator assumes it; inf: no one leaves
        ("delay_tolerant", "f8"),  # 1: may be deferred until its deadline
        ("cached_input_usd_per_token", "f8"),  # price of a prompt token that a prefix cache held
        ("request_usd", "f8"),  # price of an answered request besides its tokens
        # Allowances of one customer in a billing period
        ("period_s", "f8"),  # inf: none
        ("quota_requests", "f8"),  # inf: none
        ("beyond", "f8"),  # index into marginroute.contracts.BEYOND
        ("overage_usd", "f8"),  # price of a request beyond the quota
        ("prepaid_usd", "f8"),  # inf: not prepaid
        ("committed_usd", "f8"),  # 0: no commitment
        ("commitment_usd_per_s", "f8"),  # what all customers of the class pay for it by time
        ("beyond_factor", "f8"),  # multiplies prices beyond the commitment
        ("rate_per_s", "f8"),  # inf: no rate limit
        ("rate_burst", "f8"),  # requests
        ("context_tokens", "f8"),  # longest prompt; inf: any
        # SLO credits by windows
        ("window_s", "f8"),  # inf: credits are per request
        ("window_target", "f8"),
        ("window_share", "f8"),  # of the window's value, when below the target
        ("window_low_target", "f8"),
        ("window_low_share", "f8"),
        # Lifetime value that one bad experience costs in expectation
        ("bad_lifetime_usd", "f8"),
        ("missed_lifetime_usd", "f8"),
        ("unserved_lifetime_usd", "f8"),
    ]
)
"""Terms of a class, `(K,)`; written by `envs.scenario`, read by the ledger and shown in the View."""
