"""What each request's answers earn and cost in the upper bounds, in the operator's favour."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from envs.plant import Plant
from envs.workload.requests import Workload
from evaluation.bound_terms import relaxed
from marginroute import latency, pricing
from marginroute import view as v

Floats = NDArray[np.float64]


class Money:
    """USD of each request by outcome.

    Args:
        plant: the scenario's constants.
        workload: the episode, of M requests.

    Attributes:
        term: (M,) contract of each request.
        revenue_usd: (M,) of an answer, before refunds and credits.
        value_usd: (M,) that credits and refunds are shares of.
        bad_usd: (M,) lost by a bad answer.
        unserved_usd: (M,) owed at least without an answer, 0 or more.
        stored_usd: (M,) cost of keeping an answer in the response cache.
    """

    def __init__(self, plant: Plant, workload: Workload) -> None:
        self.plant, self.workload = plant, workload
        term = relaxed(plant.terms)[workload.class_index]
        prompt, output = workload.prompt_tokens, workload.output_tokens
        self.term = term
        prices = term["input_usd_per_token"], term["output_usd_per_token"]
        self.revenue_usd = term["request_usd"] + pricing.tokens_usd(prompt, output, *prices)
        self.value_usd = self.revenue_usd + term["request_value_usd"]
        self.bad_usd = pricing.refund_usd(self.value_usd, term["refund_share"], term["bad_answer_usd"])
        least_tokens = least_mean_tokens(plant, workload)[workload.class_index, workload.task_index]
        least_usd = term["request_usd"] + pricing.tokens_usd(prompt, least_tokens, *prices)
        self.unserved_usd = pricing.unserved_credit_usd(
            least_usd + term["request_value_usd"], term["unserved_credit_share"], term["unserved_credit_usd"]
        )
        self.stored_usd = np.zeros(workload.n_requests)
        if plant.config[0]["cache_capacity"] > 0:
            stored = (workload.prompt_key >= 0) & (plant.cache_access["allowed"][workload.class_index] == 1)
            self.stored_usd = stored * float(plant.config[0]["cache_entry_usd"])

    def cost_usd(self, candidate: int, cached: Floats, price_times: Floats | float) -> Floats:
        """(M,) cost of an answer by a candidate that has `cached` (M,) prompt tokens."""
        static = self.plant.static_signals[:, candidate]
        cost_usd = static[v.CALL_USD] + pricing.answer_usd(
            self.workload.prompt_tokens,
            cached,
            self.workload.output_tokens,
            static[v.INPUT_USD],
            np.minimum(static[v.CACHED_INPUT_USD], static[v.INPUT_USD]),
            static[v.OUTPUT_USD],
        )
        return np.asarray(price_times * cost_usd)

    def answered_usd(self, good: Floats) -> Floats:
        """(M,) value of an answer that keeps every SLO, before what it costs; `good` (M,) outcomes or probabilities."""
        return np.asarray(self.revenue_usd - (1.0 - good) * self.bad_usd - self.stored_usd)

    def credit_usd(self, kept: tuple[Any, Any, Any]) -> Floats:
        """(M,) credits if the SLOs of TTFT, TPOT and E2E are kept or not (booleans, or arrays of them)."""
        shares = (self.term[f"{slo}_credit_share"] for slo in ("ttft", "tpot", "e2e"))
        missed = sum(np.where(ok, 0.0, share) for ok, share in zip(kept, shares, strict=True))
        return np.asarray(pricing.service_credit_usd(self.value_usd, missed))


def least_mean_tokens(plant: Plant, workload: Workload) -> Floats:
    """(K, J) lowest value that the gateway's running mean of output tokens can take, whatever completes when.

    After n answers the mean is (w prior + sum) / (w + n), w = PRIOR_LENGTHS, until w + n reaches H = RECENT_LENGTHS;
    from then on no answer weighs more than 1 / H, so that the mean is at least that of the H shortest answers or of the
    prior with fewer. A request that a verifier may turn down can be answered several times.
    """
    horizon, weight = int(latency.RECENT_LENGTHS), latency.PRIOR_LENGTHS
    least = plant.output_tokens.astype(np.float64).copy()
    for k, j in np.ndindex(*least.shape):
        mine = (workload.class_index == k) & (workload.task_index == j)
        answers = np.repeat(workload.output_tokens[mine], max(int(plant.verifiers["max_attempts"][k, j]), 1))
        tokens = np.sort(answers).astype(np.float64)[:horizon]
        if len(tokens) == 0:
            continue
        early = tokens[: horizon - int(weight)]
        means = (weight * least[k, j] + np.cumsum(early)) / (weight + np.arange(1, len(early) + 1))
        late = [tokens.mean()] if len(answers) > horizon - weight else []
        least[k, j] = min(least[k, j], *means, *late)
    return least
