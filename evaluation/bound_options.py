"""What a clairvoyant could do with each request of a workload, as flat arrays: value, work, and until when.

A request can be left unserved, answered from the response cache, or answered by a station (pools, then providers) in
one of several ways, one for every set of SLOs that the answer keeps. Keeping more SLOs pays fewer credits and leaves
less time: an option is its value in USD, the least work of its prefill and of its decode (`evaluation.hull`; a
provider's call is one unit of prefill work, of its rate limit), and the last moment for each. Everything is taken in
the operator's favour:

- work may be spread over all of its window, in any order, on any replica of the pool;
- users leave only if no schedule can reach them before their patience ends; deferred requests come back at any time;
- the mean output length that prices an unserved request is the lowest that the gateway's counter could have reached;
- a stored answer is never evicted or outdated (`evaluation.bound_reuse`);
- a prompt's cached blocks are all those that anyone could have left;
- pools run as many replicas as they may and pay for no more than they must; nothing fails or is slow, but where
  failures are due a request may be sent again at any time;
- an API is as fast and as cheap as at the best moment at which the request may be sent;
- what contracts keep beside single requests is taken as `evaluation.bound_terms` says;
- a follow-up of a session may come as early as its user allows, as late as one likes, or not at all.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from envs.workload.drift import least_factor
from envs.workload.faults import OF_PRICE, OF_PROVIDER
from envs.workload.requests import Workload
from envs.worlds import Plant
from evaluation import bound_reuse
from evaluation.bound_terms import relaxed
from evaluation.hull import Hull, pool_hull
from marginroute import latency, pricing
from marginroute import view as v
from marginroute.quality import prior_p_good

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

TOLERANCE_S = 1e-9


@dataclass(frozen=True)
class Options:
    """Ways to answer requests, ordered by request and tier; O options of M requests.

    Attributes:
        request: (O,) request that an option answers.
        station: (O,) pool or provider.
        tier: (O,) model.
        value_usd: (O,) revenue - cost - refund - credits.
        prefill_s, decode_s: (O,) least work; for a provider 1 call and 0.
        from_s: (O,) earliest time of the work.
        prefill_until_s, decode_until_s: (O,) latest, inf: whenever.
        unserved_usd: (M,) value of not answering, at most 0.
        cached_usd: (M, T) value of repeating an answer of each tier from the cache.
        group: (M,) requests that may share a stored answer (same tenant, prompt or meaning); -1: none.
        shared_usd: what no decision changes: seats, GPU-hours and look-ups.
        capacity_s: (S,) engine seconds per second of a pool; calls per second of a provider.
        burst: (S,) calls that a provider takes at once after a quiet time; 0 for pools.
        horizon_s: end of the episode; engines run on, calls do not.
        gpu_usd: GPU-hours, the part of `shared_usd` that contribution margin leaves out; at most 0.
    """

    request: Ints
    station: Ints
    tier: Ints
    value_usd: Floats
    prefill_s: Floats
    decode_s: Floats
    from_s: Floats
    prefill_until_s: Floats
    decode_until_s: Floats
    unserved_usd: Floats
    cached_usd: Floats
    group: Ints
    shared_usd: float
    capacity_s: Floats
    burst: Floats
    horizon_s: float
    gpu_usd: float


def observed_p_good(plant: Plant, workload: Workload) -> Floats:
    """(M, T) P(good answer) given all that a gateway could know of a request: its task and what predicts difficulty.

    What drifts is known, too: no gateway can infer more of it from what it sees.
    """
    quality = plant.scenario.workload_spec.quality
    drifts = workload.ability_shift.shape[1] > 0
    if quality.sees_task and not drifts:
        return np.asarray(workload.p_good_prior)  # the predictor's figure follows from all its signals by Bayes' rule
    ability = np.array(quality.ability).T[workload.task_index]
    return np.asarray(
        prior_p_good(
            ability + workload.ability_shift if drifts else ability,
            np.array(quality.slope),
            workload.difficulty_signal,
            quality.signal_correlation,
            quality.nobody_can(workload.task_index),
            quality.unseen_variance,
        )
    )


def make_options(plant: Plant, workload: Workload, p_good: Floats | None = None) -> Options:
    """Every option of every request.

    Args:
        plant: the scenario's constants.
        workload: the episode.
        p_good: (M, T) probabilities in place of the outcomes; None: the outcomes themselves.
    """
    good = workload.good.astype(np.float64) if p_good is None else p_good
    money = _Money(plant, workload, good)
    group = bound_reuse.groups(plant, workload)
    stored = bound_reuse.best_stored(workload, group, good)
    pools, providers = plant.spec.pools, plant.spec.providers
    columns: list[dict[str, Any]] = []
    for station, (pool, hull) in enumerate(zip(pools, hulls(plant, workload), strict=True)):
        columns += _pool_options(plant, workload, money, station, pool.tier, hull)
    for p, provider in enumerate(providers):
        columns += _provider_options(plant, workload, money, p, provider.tier)
    flat = {name: np.concatenate([column[name] for column in columns]) for name in columns[0]}
    order = np.lexsort((flat["tier"], flat["request"]))
    flat = {name: values[order] for name, values in flat.items()}
    gpu_usd = -_least_gpu_usd_per_s(plant, workload) * workload.horizon_s
    rate = [p.requests_per_minute / 60.0 for p in providers]
    burst = [p.burst_requests or max(1.0, 10.0 * r) for p, r in zip(providers, rate, strict=True)]
    return Options(
        **flat,
        unserved_usd=np.where(workload.parent_index >= 0, 0.0, -money.unserved_usd),
        cached_usd=(
            bound_reuse.cached_usd(plant, workload, stored, p_good is None)
            if bound_reuse.is_near(plant, workload)
            else money.revenue_usd[:, None] - (1.0 - stored) * money.bad_usd[:, None]
        ),
        group=group,
        shared_usd=float((plant.terms["seat_usd_per_s"] + plant.terms["commitment_usd_per_s"]).sum())
        * workload.horizon_s
        + gpu_usd
        - bound_reuse.lookups_usd(plant, workload),
        capacity_s=np.array([float(pool.rows) for pool in pools] + rate),
        burst=np.array([0.0] * len(pools) + burst),
        horizon_s=workload.horizon_s,
        gpu_usd=gpu_usd,
    )


def hulls(plant: Plant, workload: Workload) -> list[Hull]:
    """The floor of every pool, steepest for this workload's mix."""
    prompt, output = workload.prompt_tokens.astype(np.float64), workload.output_tokens.astype(np.float64)
    steps = output - 1.0
    prefill, decode = float(prompt.sum()), float(steps.sum())
    attended = float((steps * prompt + 0.5 * steps * output).sum())
    least = int(prompt.min(initial=1e9))
    return [
        pool_hull(pool, prefill, decode, attended, None if pool.prefix_caching else least) for pool in plant.spec.pools
    ]


def earliest_s(workload: Workload) -> Floats:
    """(M,) arrival; of a follow-up its root's arrival and the pauses between."""
    from_s = workload.arrived_at_s.copy()
    for i in np.flatnonzero(workload.parent_index >= 0):
        from_s[i] = from_s[workload.parent_index[i]] + workload.think_s[i]
    return np.asarray(from_s)


def fails(workload: Workload) -> bool:
    """Whether anything goes down in the episode, so that requests are sent again."""
    return bool(np.isinf(workload.faults["slowdown"]).any())


class _Money:
    """USD of each request by outcome; (M,) or (M, T)."""

    def __init__(self, plant: Plant, workload: Workload, good: Floats) -> None:
        term = relaxed(plant.terms)[workload.class_index]
        prompt, output = workload.prompt_tokens, workload.output_tokens
        self.term = term
        prices = term["input_usd_per_token"], term["output_usd_per_token"]
        self.revenue_usd = term["request_usd"] + pricing.tokens_usd(prompt, output, *prices)
        self.value_usd = self.revenue_usd + term["request_value_usd"]
        self.bad_usd = pricing.refund_usd(self.value_usd, term["refund_share"], term["bad_answer_usd"])
        self.refund_usd = (1.0 - good) * self.bad_usd[:, None]
        least_tokens = least_mean_tokens(plant, workload)[workload.class_index, workload.task_index]
        least_usd = term["request_usd"] + pricing.tokens_usd(prompt, least_tokens, *prices)
        self.unserved_usd = pricing.unserved_credit_usd(
            least_usd + term["request_value_usd"], term["unserved_credit_share"], term["unserved_credit_usd"]
        )
        self.stored_usd = np.zeros(workload.n_requests)
        if plant.config[0]["cache_capacity"] > 0:
            stored = (workload.prompt_key >= 0) & (plant.cache_access["allowed"][workload.class_index] == 1)
            self.stored_usd = stored * float(plant.config[0]["cache_entry_usd"])

    def answered_usd(
        self, plant: Plant, workload: Workload, candidate: int, tier: int, cached: Floats, price_times: Floats | float
    ) -> Floats:
        """(M,) value of an answer by a candidate that keeps every SLO and has `cached` (M,) prompt tokens."""
        static = plant.static_signals[:, candidate]
        cost_usd = static[v.CALL_USD] + pricing.answer_usd(
            workload.prompt_tokens,
            cached,
            workload.output_tokens,
            static[v.INPUT_USD],
            np.minimum(static[v.CACHED_INPUT_USD], static[v.INPUT_USD]),
            static[v.OUTPUT_USD],
        )
        return np.asarray(self.revenue_usd - self.refund_usd[:, tier] - price_times * cost_usd - self.stored_usd)

    def credit_usd(self, kept: tuple[Any, Any, Any]) -> Floats:
        """(M,) credits if the SLOs of TTFT, TPOT and E2E are kept or not (booleans, or arrays of them)."""
        shares = (self.term[f"{slo}_credit_share"] for slo in ("ttft", "tpot", "e2e"))
        missed = sum(np.where(ok, 0.0, share) for ok, share in zip(kept, shares, strict=True))
        return np.asarray(pricing.service_credit_usd(self.value_usd, missed))


def least_mean_tokens(plant: Plant, workload: Workload) -> Floats:
    """(K, J) lowest value that the gateway's running mean of output tokens can take, whatever completes when.

    After n answers the mean is (w prior + sum) / (w + n), w = PRIOR_LENGTHS, until w + n reaches H = RECENT_LENGTHS;
    from then on no answer weighs more than 1 / H, so that the mean is at least that of the H shortest answers or of the
    prior with fewer.
    """
    horizon, weight = int(latency.RECENT_LENGTHS), latency.PRIOR_LENGTHS
    least = plant.output_tokens.astype(np.float64).copy()
    for k, j in np.ndindex(*least.shape):
        mine = (workload.class_index == k) & (workload.task_index == j)
        tokens = np.sort(workload.output_tokens[mine]).astype(np.float64)[:horizon]
        if len(tokens) == 0:
            continue
        early = tokens[: horizon - int(weight)]
        means = (weight * least[k, j] + np.cumsum(early)) / (weight + np.arange(1, len(early) + 1))
        late = [tokens.mean()] if mine.sum() > horizon - weight else []
        least[k, j] = min(least[k, j], *means, *late)
    return least


def _pool_options(
    plant: Plant, workload: Workload, money: _Money, station: int, tier: int, hull: Hull
) -> list[dict[str, Any]]:
    """Options of a pool: one per set of kept SLOs that some schedule could keep."""
    candidate = int(np.flatnonzero(plant.layout.station == station)[0])
    prompt, output = workload.prompt_tokens.astype(np.float64), workload.output_tokens.astype(np.float64)
    caching = plant.spec.pools[station].prefix_caching
    cached = np.minimum(_most_cached_tokens(workload), prompt - 1.0) if caching else np.zeros(len(prompt))
    prefill_s, decode_s = hull.prefill_work_s(prompt, cached), hull.decode_work_s(prompt, output)
    ttft_s, gaps = hull.least_ttft_s(prompt, cached), output - 1.0
    decoding_s = gaps * hull.least_decode_s
    saved = prompt if caching else np.zeros(len(prompt))  # a restart may find all of its own prompt
    value_usd = money.answered_usd(plant, workload, candidate, tier, saved, 1.0)
    columns = []
    for kept in product((True, False), (True, False), (True, False)):
        useful = _has_credit(money, kept)
        first_s = np.minimum(workload.patience_s, np.where(kept[0], money.term["slo_ttft_s"], np.inf))
        last_s = first_s + (money.term["slo_tpot_s"] * gaps if kept[1] else np.inf)
        last_s = np.minimum(last_s, money.term["slo_e2e_s"] if kept[2] else np.inf)
        first_s = np.minimum(first_s, last_s)
        possible = useful & (ttft_s <= first_s + TOLERANCE_S) & (ttft_s + decoding_s <= last_s + TOLERANCE_S)
        if kept[1]:
            possible &= decoding_s <= gaps * money.term["slo_tpot_s"] + TOLERANCE_S
        columns.append(
            _column(
                workload,
                possible & plant.agreed.allowed[workload.class_index, candidate],
                station,
                tier,
                value_usd - money.credit_usd(kept),
                prefill_s,
                decode_s,
                first_s,
                last_s,
            )
        )
    return columns


def _most_cached_tokens(workload: Workload) -> Floats:
    """(M,) prompt tokens that the best of luck could find in a prefix cache: blocks that somebody sent before."""
    block = workload.prefix_block_tokens
    cached = np.zeros(workload.n_requests)
    if block == 0 or len(workload.prefix_hash) == 0:
        return cached
    rows = np.repeat(np.arange(workload.n_requests), workload.prefix_count)
    order = np.lexsort((rows, earliest_s(workload)[rows]))
    _, first, which = np.unique(workload.prefix_hash[order], return_index=True, return_inverse=True)
    sender = rows[order][first][which]
    np.add.at(cached, rows[order], np.where(sender != rows[order], float(block), 0.0))
    cached[workload.parent_index >= 0] = np.inf  # its own conversation, answers included
    return np.minimum(cached, workload.prompt_tokens)


def _least_gpu_usd_per_s(plant: Plant, workload: Workload) -> float:
    """What GPUs cost at least: as many as are paid from the start, or the reserved ones where replicas come and go."""
    if not plant.config[0]["elastic"] and not fails(workload):
        return float(plant.config[0]["gpu_usd_per_s"])
    rows = np.concatenate([np.arange(pool.rows) < pool.reserved_replicas for pool in plant.spec.pools])
    return float(plant.gpu_usd_per_s[rows].sum())


def _provider_options(plant: Plant, workload: Workload, money: _Money, p: int, tier: int) -> list[dict[str, Any]]:
    """Options of a provider: its latency is known; a delay-tolerant request may be sent later."""
    station = len(plant.spec.pools) + p
    candidate = plant.spec.n_replicas + p
    static, sigma = plant.static_signals[:, candidate], plant.sigmas[p]
    noise = workload.provider_noise
    best_ttft_s = static[v.FIXED_TTFT_S] * np.exp(sigma[0] * noise[:, 0])
    best_tpot_s = static[v.FIXED_TPOT_S] * np.exp(sigma[1] * noise[:, 1])
    tolerant = money.term["delay_tolerant"] > 0.0
    follows = workload.parent_index >= 0
    again = follows | fails(workload)
    latest_s = np.where(again, np.inf, np.where(tolerant, workload.deadline_s, 0.0))
    from_s = earliest_s(workload)
    slow, dear = (least_factor(workload.faults, kind, p, from_s, from_s + latest_s) for kind in (OF_PROVIDER, OF_PRICE))
    caching = static[v.PREFIX_CAPACITY_TOKENS] > 0.0
    cached = _most_cached_tokens(workload) if caching else np.zeros(workload.n_requests)
    value_usd = money.answered_usd(plant, workload, candidate, tier, cached, dear)
    columns = []
    settled = again | (tolerant & (workload.arrived_at_s + workload.deadline_s >= workload.horizon_s))
    settled &= p == plant.agreed.last_provider[workload.class_index]
    waits_s = np.where(follows, 0.0, workload.horizon_s - workload.arrived_at_s)
    may = plant.agreed.allowed[workload.class_index, candidate]
    one, none = np.ones(workload.n_requests), np.zeros(workload.n_requests)
    # At the horizon the batch queue is bought out, beside the rate limit and however slow the API is.
    for late, times in ((False, slow), (True, 1.0)) if settled.any() else ((False, slow),):
        ttft_s, tpot_s = best_ttft_s * times, best_tpot_s * times
        answer_s = ttft_s + tpot_s * (workload.output_tokens - 1.0)
        tpot_ok = (tpot_s <= money.term["slo_tpot_s"] + TOLERANCE_S) | (workload.output_tokens == 1)
        for ttft_kept, e2e_kept in product((True, False), repeat=2):
            by_ttft_s = np.where(ttft_kept, money.term["slo_ttft_s"], np.inf) - ttft_s
            by_e2e_s = np.where(e2e_kept, money.term["slo_e2e_s"], np.inf) - answer_s
            within_s = np.minimum(by_ttft_s, by_e2e_s)
            wait_s = np.minimum(np.minimum(latest_s, workload.patience_s - ttft_s), within_s)
            possible = settled & (within_s >= waits_s - TOLERANCE_S) if late else wait_s >= -TOLERANCE_S
            possible &= may & _has_credit(money, (ttft_kept, True, e2e_kept))
            usd = value_usd - money.credit_usd((ttft_kept, tpot_ok, e2e_kept))
            wait_s = np.maximum(wait_s, 0.0)
            columns.append(_column(workload, possible, station, tier, usd, none if late else one, none, wait_s, wait_s))
    return columns


def _has_credit(money: _Money, kept: tuple[bool, bool, bool]) -> NDArray[np.bool_]:
    """(M,) whether an option is worth listing: only an SLO with a credit can be worth missing."""
    useful = np.ones(len(money.value_usd), dtype=np.bool_)
    for ok, slo in zip(kept, ("ttft", "tpot", "e2e"), strict=True):
        if not ok:
            useful &= np.isfinite(money.term[f"slo_{slo}_s"])
    return useful


def _column(
    workload: Workload,
    chosen: NDArray[np.bool_],
    station: int,
    tier: int,
    value_usd: Floats,
    prefill_s: Floats,
    decode_s: Floats,
    first_s: Floats,
    last_s: Floats,
) -> dict[str, Any]:
    """Options of the chosen requests; `first_s` and `last_s` count from arrival."""
    rows = np.flatnonzero(chosen)
    from_s, ever = earliest_s(workload)[rows], workload.parent_index[rows] >= 0
    return {
        "request": rows,
        "station": np.full(len(rows), station),
        "tier": np.full(len(rows), tier),
        "value_usd": value_usd[rows],
        "prefill_s": prefill_s[rows],
        "decode_s": decode_s[rows],
        "from_s": from_s,
        "prefill_until_s": np.where(ever, np.inf, from_s + first_s[rows] + TOLERANCE_S),
        "decode_until_s": np.where(ever, np.inf, from_s + last_s[rows] + TOLERANCE_S),
    }
