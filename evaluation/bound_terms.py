"""Contracts as an upper bound may take them: what no formula of single requests can tell, in the operator's favour.

| contract | taken for |
| --- | --- |
| rate limit, longest prompt | a request that is not answered owes nothing: it may have been refused |
| fair-use quota | the same; nothing is paid back for an answer, and one beyond the quota may be charged in every case |
| prepaid credits | the same; every answer finds credits for its whole price |
| commitment | paid by time, and every answer is charged as if it went beyond |
| cached input price | no prompt token is cached for the customer |
| credits of SLO windows, lifetime value | none |
"""

from __future__ import annotations

from typing import Any

import numpy as np

from marginroute.contracts import CHARGE

Array = np.ndarray[Any, Any]

SHARES = ("refund_share", "ttft_credit_share", "tpot_credit_share", "e2e_credit_share")
UNSERVED = ("unserved_credit_share", "unserved_credit_usd")


def relaxed(terms: Array) -> Array:
    """(K,) contracts under which each request earns at least what it earns under `terms` (K,), whatever happens."""
    terms = np.array(terms)
    for term in terms:
        quota, factor = term["quota_requests"] < np.inf, float(term["beyond_factor"])
        if quota or any(term[name] < np.inf for name in ("prepaid_usd", "rate_per_s", "context_tokens")):
            for name in UNSERVED:
                term[name] = 0.0
        if quota:
            for name in (*SHARES, "bad_answer_usd"):
                term[name] = 0.0
            term["request_usd"] += term["overage_usd"] * (term["beyond"] == CHARGE)
        if term["committed_usd"] > 0.0:
            for name in ("input_usd_per_token", "cached_input_usd_per_token", "output_usd_per_token", "request_usd"):
                term[name] *= factor
            for name in (*SHARES, *UNSERVED[:1]):  # of a value that may be the list price
                term[name] /= max(factor, 1.0)
        total = sum(term[name] for name in SHARES)
        if total > 1.0 and _value_varies(term):  # or less value would leave more
            for name in SHARES:
                term[name] /= total
    return terms


def _value_varies(term: Any) -> bool:
    cached = term["cached_input_usd_per_token"] < term["input_usd_per_token"]
    return bool(cached or term["prepaid_usd"] < np.inf or term["committed_usd"] > 0.0)
