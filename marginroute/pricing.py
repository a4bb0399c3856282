"""Money per request: price, cost, refund and service credit.

Every formula is plain arithmetic over scalars or NumPy arrays of any (broadcastable) shape, so that the gateway, the
heuristics and the compiled world (`envs.economics`, which compiles these very functions) use one home.

Symbols: V is the value of an answered request, the base of refunds and credits: what the customer pays for its tokens
plus, under a seat plan, the seat price spread over the included requests.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Number = Any  # a float, or an array of floats

PER_MTOK = 1e-6  # prices are quoted per million tokens, and computed with per token


def tokens_usd(
    prompt_tokens: Number, output_tokens: Number, input_usd_per_token: Number, output_usd_per_token: Number
) -> Number:
    """USD for the tokens of one call at the given prices: a customer's bill or a provider's invoice."""
    return prompt_tokens * input_usd_per_token + output_tokens * output_usd_per_token


def answer_usd(
    prompt_tokens: Number,
    cached_tokens: Number,
    output_tokens: Number,
    input_usd_per_token: Number,
    cached_input_usd_per_token: Number,
    output_usd_per_token: Number,
) -> Number:
    """USD that an answer costs the operator, `cached_tokens` of whose prompt come at the price of cached ones.

    A provider bills its cached input price; an own replica saves the energy of their prefill (price 0).
    """
    new_usd = (prompt_tokens - cached_tokens) * input_usd_per_token + output_tokens * output_usd_per_token
    return new_usd + cached_tokens * cached_input_usd_per_token


def refund_usd(value_usd: Number, refund_share: Number, bad_answer_usd: Number) -> Number:
    """USD paid back for one bad answer: a share of its value plus a fixed cost of handling it."""
    return refund_share * value_usd + bad_answer_usd


def service_credit_usd(value_usd: Number, credited_share: Number) -> Number:
    """USD credited for missed SLOs of one answered request; never more than its value.

    Args:
        value_usd: V.
        credited_share: sum of the credit shares of the SLOs that were missed, or of share times probability.
    """
    return value_usd * np.minimum(credited_share, 1.0)


def unserved_credit_usd(value_usd: Number, unserved_share: Number, unserved_usd: Number) -> Number:
    """USD credited for a request that got no answer (shed, abandoned or failed)."""
    return unserved_share * value_usd + unserved_usd


def gpu_usd(gpus: Number, usd_per_gpu_hour: Number, elapsed_s: Number) -> Number:
    """USD for `gpus` GPUs held for `elapsed_s` seconds, busy or idle."""
    return gpus * usd_per_gpu_hour * elapsed_s / 3600.0
