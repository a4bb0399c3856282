"""What a customer's account says about the next request: allowances, and credits that hang on a window.

Every function is plain scalar arithmetic, so that the gateway calls it as it stands and the simulated world compiles it
(`envs.economics.accounts`): one home for each rule.

*Standing* of a request, looked at when it arrives: within the allowance; beyond it, in a way that the plan chooses;
or refused, in which case the gateway answers 429 and there is nothing to decide.

*Windowed SLO credits*: the share of requests that met every SLO is measured over windows; a window below a target pays
back a share of its value. A single miss then costs what it adds to the chance that the window ends below a target:

    miss_usd = sum over targets of  (step in credit share) * value of the window * P(this miss is the one too many)

With b misses among the n requests decided so far and m more expected, each missing with probability p, the misses still
to come are binomial; one more is the one too many if b and they are together just as many as the target allows,
floor((1 - target) (n + m + 1)).
"""

from __future__ import annotations

import math

from marginroute import view as v
from marginroute.view import Array

WITHIN, BEST_EFFORT, OVERAGE, REFUSED = range(4)
STANDINGS = ("within", "best_effort", "overage", "refused")
SERVE, CHARGE, REFUSE = range(3)
BEYOND = ("serve", "overage", "refuse")
"""What a plan does beyond the allowance: answer without owing anything, charge per request, or refuse."""

RECENT_OUTCOMES = 200.0  # requests over which a class's miss rate, value and pace are averaged
PRIOR_MISS_RATE, PRIOR_OUTCOMES = 0.02, 20.0  # what is assumed of a class beside what was seen


def standing(
    requests_left: float, balance_usd: float, bucket: float, prompt_tokens: float, context_tokens: float, beyond: int
) -> int:
    """How a request stands with its customer's account.

    Args:
        requests_left: requests left of the allowance of the billing period; inf: no quota.
        balance_usd: prepaid credits left; inf: not prepaid.
        bucket: requests that the customer's rate limit lets through now; inf: no limit.
        prompt_tokens: tokens of the prompt.
        context_tokens: longest prompt that the plan allows; inf: any.
        beyond: what happens beyond the quota, index into `BEYOND`.

    Returns:
        Index into `STANDINGS`.
    """
    if bucket < 1.0 or balance_usd <= 0.0 or prompt_tokens > context_tokens:
        return REFUSED
    if requests_left >= 1.0:
        return WITHIN
    if beyond == CHARGE:
        return OVERAGE
    return REFUSED if beyond == REFUSE else BEST_EFFORT


def refilled(bucket: float, size: float, per_s: float, elapsed_s: float) -> float:
    """Requests in a token bucket of `size` after `elapsed_s` at `per_s` requests per second."""
    if math.isinf(per_s):
        return math.inf
    return min(size, bucket + per_s * elapsed_s)


def window_credit_share(
    met: float, total: float, target: float, share: float, low_target: float, low_share: float
) -> float:
    """Share of a window's value that is credited.

    Args:
        met: requests of the window that met every SLO.
        total: requests of the window.
        target: below it the credit is `share`.
        share: of the value.
        low_target: below it, and it is at most `target`, the credit is `low_share`; 0: one step only.
        low_share: of the value, at least `share`.
    """
    if total <= 0.0:
        return 0.0
    attained = met / total
    if attained < low_target:
        return low_share
    return share if attained < target else 0.0


def window_miss_usd(
    missed: float,
    decided: float,
    to_come: float,
    miss_rate: float,
    value_usd: float,
    target: float,
    share: float,
    low_target: float,
    low_share: float,
) -> float:
    """Expected credit that one more miss causes in the window it falls into, see the module's text.

    Args:
        missed: misses among the requests of the window whose outcome is known.
        decided: requests of the window whose outcome is known.
        to_come: further requests expected in the window, not necessarily a whole number.
        miss_rate: share of them expected to miss, above 0 and below 1.
        value_usd: value of the window when it closes, what is known and what is expected.
        target: as in `window_credit_share`.
        share: the same.
        low_target: the same.
        low_share: the same.
    """
    usd = 0.0
    for target_share, step in ((target, share), (low_target, low_share - share)):
        allowed = math.floor((1.0 - target_share) * (decided + to_come + 1.0) + 1e-9)
        more = allowed - missed
        if step > 0.0 and 0.0 <= more <= to_come:
            ways = math.lgamma(to_come + 1.0) - math.lgamma(more + 1.0) - math.lgamma(to_come - more + 1.0)
            usd += step * math.exp(ways + more * math.log(miss_rate) + (to_come - more) * math.log1p(-miss_rate))
    return usd * value_usd


def show_standing(
    q: Array,
    stands: int,
    covered: float,
    beyond_factor: float,
    overage_usd: float,
    bad_lifetime_usd: float,
    unserved_lifetime_usd: float,
) -> None:
    """Turns a request's signals `q` (Q,), at list prices, into what its answer brings as it stands.

    Args:
        q: request signals, changed in place.
        stands: index into `STANDINGS`.
        covered: share of its price that a commitment has paid for: value without further revenue.
        beyond_factor: multiplies the rest of the price.
        overage_usd: price of a request beyond the quota.
        bad_lifetime_usd: what a bad answer costs even where nothing is owed.
        unserved_lifetime_usd: the same for no answer.
    """
    if stands == WITHIN:
        listed_usd = q[v.PROMPT_TOKENS] * q[v.INPUT_PRICE_USD] + q[v.REQUEST_USD]
        listed_usd += q[v.EXPECTED_OUTPUT_TOKENS] * q[v.OUTPUT_PRICE_USD]
        q[v.REQUEST_VALUE_USD] += covered * listed_usd
        factor = (1.0 - covered) * beyond_factor
        q[v.INPUT_PRICE_USD] *= factor
        q[v.CACHED_INPUT_PRICE_USD] *= factor
        q[v.OUTPUT_PRICE_USD] *= factor
        q[v.REQUEST_USD] *= factor
        return
    q[v.INPUT_PRICE_USD] = q[v.CACHED_INPUT_PRICE_USD] = q[v.OUTPUT_PRICE_USD] = q[v.REQUEST_VALUE_USD] = 0.0
    q[v.REQUEST_USD] = overage_usd if stands == OVERAGE else 0.0
    if stands == BEST_EFFORT:
        q[v.BAD_ANSWER_USD], q[v.UNSERVED_CREDIT_USD] = bad_lifetime_usd, unserved_lifetime_usd
