"""Ways in which pools and providers can answer, one for every set of SLOs that is kept: value, work, deadlines."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from envs.plant import Plant
from envs.workload.drift import least_factor
from envs.workload.faults import OF_PRICE, OF_PROVIDER
from envs.workload.requests import Workload
from evaluation.bound_capacity import fails
from evaluation.bound_money import Money
from evaluation.bound_verifiers import Turn
from evaluation.hull import Hull
from marginroute import view as v

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

TOLERANCE_S = 1e-9


def earliest_s(plant: Plant, workload: Workload, least_answer_s: Floats) -> Floats:
    """(M,) arrival; of a follow-up its parent's, the least time of an answer, and the pause, of a tool if kept."""
    from_s, pause_s = workload.arrived_at_s.copy(), workload.think_s
    if plant.config[0]["result_ttl_s"] >= 0.0:
        kept_s = np.minimum(pause_s, float(plant.config[0]["result_lookup_s"]))
        pause_s = np.where(workload.tool_key >= 0, kept_s, pause_s)
    for i in np.flatnonzero(workload.parent_index >= 0):
        parent = workload.parent_index[i]
        from_s[i] = from_s[parent] + least_answer_s[parent] + pause_s[i]
    return np.asarray(from_s)


def least_cost_usd(plant: Plant, workload: Workload, money: Money) -> Floats:
    """(M,) least that an answer of anybody who may give it costs, prompt cached and prices at their lowest."""
    least_usd = np.full(workload.n_requests, np.inf)
    ever, prompt = np.full(workload.n_requests, np.inf), workload.prompt_tokens.astype(np.float64)
    for candidate in range(plant.spec.n_replicas + len(plant.spec.providers)):
        p = candidate - plant.spec.n_replicas
        times: Floats | float = 1.0
        if p >= 0:
            times = least_factor(workload.faults, OF_PRICE, p, workload.arrived_at_s, ever)
        caching = plant.static_signals[v.PREFIX_CAPACITY_TOKENS, candidate] > 0.0
        cost_usd = money.cost_usd(candidate, prompt * caching, times)
        may = plant.agreed.allowed[workload.class_index, candidate]
        least_usd = np.where(may, np.minimum(least_usd, cost_usd), least_usd)
    return np.where(np.isfinite(least_usd), least_usd, 0.0)


class Stations:
    """Makes the options of pools and providers.

    Args:
        plant: the scenario's constants.
        workload: the episode.
        money: what its answers earn and cost.
        hulls: the floor of every pool.
        group: (M,) requests that may share a stored answer; -1: none.

    Attributes:
        from_s: (M,) earliest arrival.
        comes: (M,) whether that is before the horizon.
        most_cached: (M,) prompt tokens that a prefix cache could hold at best.
    """

    def __init__(self, plant: Plant, workload: Workload, money: Money, hulls: list[Hull], group: Ints) -> None:
        self.plant, self.workload, self.money, self.hulls, self.group = plant, workload, money, hulls, group
        self.fails = fails(workload)
        self.from_s = earliest_s(plant, workload, np.where(group >= 0, 0.0, self._least_answer_s()))
        self.comes = self.from_s < workload.horizon_s
        self.most_cached = self._most_cached_tokens()

    def pool(self, station: int, tier: int, turn: Turn) -> list[dict[str, Any]]:
        """Options of a pool: one per set of kept SLOs that some schedule could keep.

        What an answer before this one has left in the prefix cache is charged here: its prefill was work, too.
        """
        plant, workload, money, hull = self.plant, self.workload, self.money, self.hulls[station]
        candidate = int(np.flatnonzero(plant.layout.station == station)[0])
        prompt, output = workload.prompt_tokens.astype(np.float64), workload.output_tokens.astype(np.float64)
        caching = plant.spec.pools[station].prefix_caching
        cached = np.minimum(self.most_cached, prompt - 1.0) if caching else np.zeros(len(prompt))
        prefill_s, decode_s = hull.prefill_work_s(prompt, cached), hull.decode_work_s(prompt, output)
        ttft_s, gaps = hull.least_ttft_s(prompt, cached), output - 1.0
        decoding_s = gaps * hull.least_decode_s
        saved = prompt if caching else np.zeros(len(prompt))  # a restart may find all of its own prompt
        good = turn.good[:, tier]
        value_usd = money.answered_usd(good) - money.cost_usd(candidate, saved, 1.0) - turn.before_usd
        may = turn.rows & self.comes & plant.agreed.allowed[workload.class_index, candidate]
        columns = []
        for kept in product((True, False), (True, False), (True, False)):
            first_s = np.minimum(workload.patience_s, np.where(kept[0], money.term["slo_ttft_s"], np.inf))
            last_s = first_s + (money.term["slo_tpot_s"] * gaps if kept[1] else np.inf)
            last_s = np.minimum(last_s, money.term["slo_e2e_s"] if kept[2] else np.inf)
            first_s = np.minimum(first_s, last_s)
            possible = (ttft_s <= first_s + TOLERANCE_S) & (ttft_s + decoding_s <= last_s + TOLERANCE_S)
            possible &= may & self._has_credit(kept)
            if kept[1]:
                possible &= decoding_s <= gaps * money.term["slo_tpot_s"] + TOLERANCE_S
            usd = value_usd - money.credit_usd(kept)
            columns.append(self._column(possible, station, tier, usd, good, prefill_s, decode_s, first_s, last_s))
        return columns

    def provider(self, p: int, tier: int, turn: Turn) -> list[dict[str, Any]]:
        """Options of a provider: its latency is known; what may be decided again may be sent later."""
        plant, workload, money = self.plant, self.workload, self.money
        station, candidate = len(plant.spec.pools) + p, plant.spec.n_replicas + p
        static = plant.static_signals[:, candidate]
        best_ttft_s, best_tpot_s = self._best_latency_s(p)
        tolerant = money.term["delay_tolerant"] > 0.0
        follows = workload.parent_index >= 0
        again = follows | self.fails
        latest_s = np.where(again | turn.later, np.inf, np.where(tolerant, workload.deadline_s, 0.0))
        until_s = self.from_s + latest_s
        slow, dear = (least_factor(workload.faults, kind, p, self.from_s, until_s) for kind in (OF_PROVIDER, OF_PRICE))
        caching = static[v.PREFIX_CAPACITY_TOKENS] > 0.0
        cached = workload.prompt_tokens.astype(np.float64) if turn.later else self.most_cached
        good = turn.good[:, tier]
        value_usd = money.answered_usd(good) - money.cost_usd(candidate, cached * caching, dear) - turn.before_usd
        columns = []
        settled = again | (tolerant & (workload.arrived_at_s + workload.deadline_s >= workload.horizon_s))
        settled &= (p == plant.agreed.last_provider[workload.class_index]) & (not turn.later)
        waits_s = np.where(follows, 0.0, workload.horizon_s - workload.arrived_at_s)
        may = turn.rows & self.comes & plant.agreed.allowed[workload.class_index, candidate]
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
                possible &= may & self._has_credit((ttft_kept, True, e2e_kept))
                usd = value_usd - money.credit_usd((ttft_kept, tpot_ok, e2e_kept))
                wait_s = np.maximum(wait_s, 0.0)
                work = none if late else one
                columns.append(self._column(possible, station, tier, usd, good, work, none, wait_s, wait_s))
        return columns

    def _best_latency_s(self, p: int) -> tuple[Floats, Floats]:
        """TTFT and TPOT of a provider for each request, (M,), unless it is slow."""
        static, sigma = self.plant.static_signals[:, self.plant.spec.n_replicas + p], self.plant.sigmas[p]
        noise = self.workload.provider_noise
        ttft_s = static[v.FIXED_TTFT_S] * np.exp(sigma[0] * noise[:, 0])
        return ttft_s, static[v.FIXED_TPOT_S] * np.exp(sigma[1] * noise[:, 1])

    def _least_answer_s(self) -> Floats:
        """(M,) shortest time in which any station could answer, its prompt cached."""
        workload = self.workload
        prompt, gaps = workload.prompt_tokens.astype(np.float64), workload.output_tokens - 1.0
        ever, least_s = np.full(workload.n_requests, np.inf), np.full(workload.n_requests, np.inf)
        for pool, hull in zip(self.plant.spec.pools, self.hulls, strict=True):
            cached = prompt - 1.0 if pool.prefix_caching else 0.0
            least_s = np.minimum(least_s, hull.least_ttft_s(prompt, cached) + gaps * hull.least_decode_s)
        for p in range(len(self.plant.spec.providers)):
            ttft_s, tpot_s = self._best_latency_s(p)
            slow = least_factor(workload.faults, OF_PROVIDER, p, workload.arrived_at_s, ever)
            # At the horizon the batch queue is bought out however slow the API is.
            least_s = np.minimum(least_s, np.minimum(slow, 1.0) * (ttft_s + tpot_s * gaps))
        return least_s

    def _most_cached_tokens(self) -> Floats:
        """(M,) prompt tokens that the best of luck could find in a prefix cache: blocks that somebody sent before."""
        workload, block = self.workload, self.workload.prefix_block_tokens
        if block == 0 or len(workload.prefix_hash) == 0:
            return np.zeros(workload.n_requests)
        rows = np.repeat(np.arange(workload.n_requests), workload.prefix_count)
        hashes, which = np.unique(workload.prefix_hash, return_inverse=True)
        turn = np.empty(workload.n_requests, dtype=np.int64)
        turn[np.argsort(self.from_s, kind="stable")] = np.arange(workload.n_requests)
        first = np.full(len(hashes), workload.n_requests)
        np.minimum.at(first, which, turn[rows])
        sent_before = np.where(first[which] < turn[rows], float(block), 0.0)
        cached = np.bincount(rows, sent_before, minlength=workload.n_requests)
        cached[workload.parent_index >= 0] = np.inf  # its own conversation, answers included
        return np.minimum(cached, workload.prompt_tokens)

    def _has_credit(self, kept: tuple[bool, bool, bool]) -> Bools:
        """(M,) whether an option is worth listing: only an SLO with a credit can be worth missing."""
        useful = np.ones(self.workload.n_requests, dtype=np.bool_)
        for ok, slo in zip(kept, ("ttft", "tpot", "e2e"), strict=True):
            if not ok:
                useful &= np.isfinite(self.money.term[f"slo_{slo}_s"])
        return useful

    def _column(
        self,
        chosen: Bools,
        station: int,
        tier: int,
        value_usd: Floats,
        good: Floats,
        prefill_s: Floats,
        decode_s: Floats,
        first_s: Floats,
        last_s: Floats,
    ) -> dict[str, Any]:
        """Options of the chosen requests; `first_s` and `last_s` count from arrival."""
        rows = np.flatnonzero(chosen)
        from_s, ever = self.from_s[rows], self.workload.parent_index[rows] >= 0
        return {
            "request": rows,
            "station": np.full(len(rows), station),
            "tier": np.full(len(rows), tier),
            "value_usd": value_usd[rows],
            "good": good[rows],
            "prefill_s": prefill_s[rows],
            "decode_s": decode_s[rows],
            "from_s": from_s,
            "prefill_until_s": np.where(ever, np.inf, from_s + first_s[rows] + TOLERANCE_S),
            "decode_until_s": np.where(ever, np.inf, from_s + last_s[rows] + TOLERANCE_S),
        }
