"""What a request has really earned: the same sum as the ledger's, from what a gateway sees of one request or of many.

    answered:   usage - service credits for missed SLOs - refund for a bad answer - cost
    otherwise:  - credit for an unserved request - cost

Whether an answer was good is rarely known; P(good) stands in.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from marginroute import pricing
from marginroute import view as v
from marginroute.view import Array

Number = Any  # a float, or an array of floats

SLOS = (
    (v.SLO_TTFT_S, v.TTFT_CREDIT_SHARE),
    (v.SLO_TPOT_S, v.TPOT_CREDIT_SHARE),
    (v.SLO_E2E_S, v.E2E_CREDIT_SHARE),
)


def latencies_s(ttft_s: Number, e2e_s: Number, output_tokens: Number) -> tuple[Number, Number, Number]:
    """TTFT, TPOT and E2E in the order of `SLOS`; NaN where the first token was not seen."""
    return ttft_s, (e2e_s - ttft_s) / np.maximum(output_tokens - 1.0, 1.0), e2e_s


def answered_usd(
    request: Array, ttft_s: Number, e2e_s: Number, prompt_tokens: Number, output_tokens: Number, p_good: Number
) -> Number:
    """USD of an answered request before its cost.

    Args:
        request: (Q, ...) request signals of the decision.
        ttft_s: from the arrival; NaN (not streamed) misses nothing.
        e2e_s: the same.
        prompt_tokens: as counted by who answered.
        output_tokens: the same.
        p_good: 1 for a good answer, 0 for a bad one, or the probability.

    Prompt tokens count at the price of those that are not cached.
    """
    prices = request[v.INPUT_PRICE_USD], request[v.OUTPUT_PRICE_USD]
    usage_usd = request[v.REQUEST_USD] + pricing.tokens_usd(prompt_tokens, output_tokens, *prices)
    value_usd = usage_usd + request[v.REQUEST_VALUE_USD]
    seen_s = latencies_s(ttft_s, e2e_s, output_tokens)
    missed = [s > request[slo] for (slo, _), s in zip(SLOS, seen_s, strict=True)]
    share = sum(request[credit] * miss for (_, credit), miss in zip(SLOS, missed, strict=True))
    miss_usd = request[v.MISS_USD] * np.logical_or.reduce(missed)
    refund_usd = (1.0 - p_good) * pricing.refund_usd(value_usd, request[v.REFUND_SHARE], request[v.BAD_ANSWER_USD])
    return usage_usd - pricing.service_credit_usd(value_usd, share) - miss_usd - refund_usd


def unserved_usd(request: Array) -> Number:
    """USD of a request that got no answer, at the lengths that were expected of it; not positive."""
    prices = request[v.INPUT_PRICE_USD], request[v.OUTPUT_PRICE_USD]
    expected_usd = pricing.tokens_usd(request[v.PROMPT_TOKENS], request[v.EXPECTED_OUTPUT_TOKENS], *prices)
    return -pricing.unserved_credit_usd(
        expected_usd + request[v.REQUEST_USD] + request[v.REQUEST_VALUE_USD],
        request[v.UNSERVED_CREDIT_SHARE],
        request[v.UNSERVED_CREDIT_USD],
    )


def slos_met(request: Array, ttft_s: float, e2e_s: float, output_tokens: float) -> bool | None:
    """Whether every SLO of one answered request that could be judged was met; None if none could."""
    judged = None
    for (slo, _), seen_s in zip(SLOS, latencies_s(ttft_s, e2e_s, output_tokens), strict=True):
        limit_s = request.item(slo)
        if math.isfinite(limit_s) and not math.isnan(seen_s):
            judged = (judged is not False) and bool(seen_s <= limit_s)
    return judged
