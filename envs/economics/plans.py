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
    ]
)
"""Terms of a class, `(K,)`; written by `envs.scenario`, read by the ledger and shown in the View."""
