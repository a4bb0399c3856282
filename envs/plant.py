"""A scenario as constant arrays: candidates, costs, contracts."""

from __future__ import annotations

import re
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from envs import scenario_terms
from envs.cached_answers import cache_access
from envs.fleet.iteration import linear_coefficients
from envs.fleet.state import record_array
from envs.scenario import Scenario
from envs.task_books import verifiers, workflows
from envs.world_accounts import CustomerAccounts
from envs.world_state import CONFIG
from envs.world_terms import terms_of
from marginroute import view as v
from marginroute.errors import InputError
from marginroute.prefix_index import PROVIDER_TOKENS
from marginroute.pricing import PER_MTOK
from marginroute.quality import QualityPrior
from marginroute.view import Array, Layout

SHARED = re.compile(
    r"fleet\.(pools\.[^.]+\.(?!gpu|reserved_gpu|energy_|faults|spot\.(gpu|mean))|response_cache\.(semantic|shared)|"
    r"telemetry|gateway|verifiers|providers\.[^.]+\.prompt_cache_ttl_s)|plans\.(workflows|classes\.[^.]+\.entitlements)"
)
"""Keys of a scenario that all worlds of a `FleetWorlds` have in common."""


def check_ranges(scenario: Scenario) -> None:
    """Raises InputError if members of a family differ in what their worlds share."""
    for key in filter(SHARED.match, scenario.ranges):
        raise InputError(
            f"scenario {scenario.name!r}, ranges: {key} would change engines, what is cached or who may answer; legal "
            "are keys of money, contracts, providers, faults, drift and workload"
        )


class Family(NamedTuple):
    """Constants of every member of a family of scenarios, one row each; F members."""

    config: Array  # (F, 1) CONFIG
    terms: Array  # (F, K)
    static_signals: Array  # (F, S_static, C)
    sigmas: Array  # (F, max(V, 1), 2)


class Plant:
    """A scenario as constant arrays: candidates, costs, contracts; shared by all worlds and by the bundle.

    Attributes:
        layout: the candidates.
        config: (1,) `world_state.CONFIG`.
        agreed: contracts and entitlements of the classes.
        terms: (K,) contracts.
        cache_access: (K,) who may be answered from the response cache.
        verifiers: (K, J) who looks at answers.
        workflows: (W,) kinds of task that pay when they succeed.
        shared_luck: whether one luck decides for all models.
        static_signals: (S_static, C) first rows of the View's signals.
        sigmas: (max(V, 1), 2) spread of ln TTFT and ln TPOT of providers.
        hedge_after_s: (K,) without a first token, after which a second call is decided about; inf: never.
        gpu_usd_per_s: (R,) price of each replica while it is paid.
        hazard_usd: (3, K) lifetime value that a bad answer, a missed SLO and no answer cost in expectation.
        priority: (K,) of the classes, where a pool schedules by it.
        slots: (P,) sequence slots of a replica of each pool.
        output_tokens: (K, J) the operator's prior mean of output tokens.
        prior: public prior of P(good) by tier.
    """

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self.spec = scenario.fleet_spec()
        self.layout = self._layout()
        self.agreed = terms_of(scenario, self.layout)
        self.terms = self.agreed.by_class
        self.cache_access = cache_access(scenario)
        self.verifiers, self.workflows = verifiers(scenario), workflows(scenario)
        self.config = self._config()
        self.static_signals = self._static_signals()
        sigmas = [(p.ttft_sigma, p.tpot_sigma) for p in self.spec.providers]
        self.sigmas = np.array(sigmas or [(0.0, 0.0)], dtype=np.float64)
        self.gpu_usd_per_s = self._gpu_usd_per_s()
        self.hazard_usd = scenario_terms.hazard_usd(scenario)
        self.hedge_after_s = np.array([c.hedge_after_s or np.inf for c in scenario.plans.classes.values()])
        self.priority = np.array([customer.priority for customer in scenario.plans.classes.values()], dtype=np.int64)
        self.slots = np.array([float(p.max_num_seqs) for p in self.spec.pools])
        quality = scenario.workload_spec.quality
        self.shared_luck = not quality.independent_luck
        task_nobody = quality.task_nobody_can or (quality.nobody_can_share,) * len(scenario.task_names)
        self.prior = QualityPrior(
            ability=np.array(quality.ability).T if quality.sees_task else np.array(quality.prior_ability),
            slope=np.array(quality.slope),
            signal_correlation=quality.signal_correlation,
            nobody_can_share=np.array(task_nobody) if quality.sees_task else quality.nobody_can_share,
            unseen_variance=quality.unseen_variance if quality.loadings else None,
            shared_luck=self.shared_luck,
        )
        self.output_tokens = np.tile(scenario.expected_output_tokens, (len(scenario.class_names), 1))

    @cached_property
    def members(self) -> tuple[Plant, ...]:
        """A plant for each of the scenario's variants, with the same candidates and engines."""
        if not self.scenario.ranges:
            return (self,)
        return tuple(Plant(variant) for variant in self.scenario.variants)

    @cached_property
    def family(self) -> Family:
        """The members' constants."""
        members = self.members
        config = record_array((len(members), 1), CONFIG)
        terms = record_array((len(members), len(self.terms)), self.terms.dtype)
        for i, member in enumerate(members):
            config[i], terms[i] = member.config, member.terms
        static = np.stack([member.static_signals for member in members])
        return Family(config, terms, static, np.stack([member.sigmas for member in members]))

    def _layout(self) -> Layout:
        names, kind, station, tier = [], [], [], []
        for p, pool in enumerate(self.spec.pools):
            for r in range(pool.rows):
                names.append(f"{pool.name}/{r}")
                kind.append(v.REPLICA)
                station.append(p)
                tier.append(pool.tier)
        for p, provider in enumerate(self.spec.providers):
            names.append(provider.name)
            kind.append(v.PROVIDER)
            station.append(len(self.spec.pools) + p)
            tier.append(provider.tier)
        for other in (v.CACHE, v.DEFER, v.SHED):
            names.append(v.KINDS[other])
            kind.append(other)
            station.append(len(self.spec.pools) + len(self.spec.providers))
            tier.append(-1)
        return Layout(
            names=tuple(names),
            kind=np.array(kind, dtype=np.int64),
            station=np.array(station, dtype=np.int64),
            tier=np.array(tier, dtype=np.int64),
            station_names=(*self.scenario.pool_names, *self.scenario.provider_names),
            tier_names=self.scenario.tier_names,
            class_names=self.scenario.class_names,
            task_names=self.scenario.task_names,
        )

    def _config(self) -> Any:
        fleet = self.scenario.fleet
        config = record_array(1, CONFIG)
        row = config[0]
        row["gpu_usd_per_s"] = sum(p.paid_usd_per_hour for p in fleet.pools.values()) / 3600.0
        row["elastic"] = any(pool.rows > pool.replicas for pool in self.spec.pools)
        row["max_attempts"], row["backoff_s"] = fleet.retries.max_attempts, fleet.retries.backoff_s
        judged = self.scenario.workload.feedback
        row["feedback_delay_s"] = judged.delay_s if judged else -1.0
        row["hold_s"] = fleet.batch_queue.hold_s if fleet.batch_queue else np.inf
        row["result_ttl_s"] = fleet.result_cache.ttl_s if fleet.result_cache else -1.0
        row["result_lookup_s"] = fleet.result_cache.lookup_s if fleet.result_cache else 0.0
        if fleet.response_cache is not None:
            row["cache_capacity"] = fleet.response_cache.capacity_entries
            row["cache_ttl_s"] = fleet.response_cache.ttl_s
            row["cache_lookup_s"] = fleet.response_cache.lookup_s
            row["cache_entry_usd"] = fleet.response_cache.entry_usd
            row["cache_shared"] = fleet.response_cache.shared
            search = fleet.response_cache.semantic
            if search is not None:
                row["cache_semantic"], row["cache_min_similarity"] = 1, search.min_similarity
                row["cache_half"], row["cache_width"] = search.half_similarity, search.width
        row["keeps_accounts"] = CustomerAccounts([self.terms], 0).kept
        row["gateways"] = fleet.gateways
        row["n_replicas"], row["n_providers"] = self.spec.n_replicas, len(self.spec.providers)
        return config

    def _gpu_usd_per_s(self) -> Array:
        rows = [
            pool.gpus_per_replica * pool.replica_usd_per_hour(r)
            for pool, spec in zip(self.scenario.fleet.pools.values(), self.spec.pools, strict=True)
            for r in range(spec.rows)
        ]
        return np.array(rows) / 3600.0

    def _static_signals(self) -> Array:
        fleet = self.scenario.fleet
        static = np.zeros((v.N_STATIC_SIGNALS, self.layout.n_candidates))
        static[[v.TOKEN_BUDGET, v.SLOTS, v.KV_CAPACITY_TOKENS, v.PREFIX_TTL_S]] = v.UNLIMITED
        for c, station in enumerate(self.layout.station):
            if self.layout.kind[c] == v.REPLICA:
                spec = self.spec.pools[station]
                pool = fleet.pools[spec.name]
                coefficients = linear_coefficients(spec.profile, spec.speculation)
                static[[v.BASE_S, v.PREFILL_TOKEN_S, v.DECODE_SEQ_S, v.KV_TOKEN_S], c] = coefficients
                static[v.TOKEN_BUDGET, c] = spec.max_num_batched_tokens
                static[v.SLOTS, c] = spec.max_num_seqs
                static[v.KV_CAPACITY_TOKENS, c] = spec.kv_blocks * spec.block_size_tokens
                if spec.prefix_caching:
                    static[v.PREFIX_CAPACITY_TOKENS, c] = static[v.KV_CAPACITY_TOKENS, c]
                static[v.INPUT_USD, c] = pool.energy_input_usd_per_mtok * PER_MTOK
                static[v.OUTPUT_USD, c] = pool.energy_output_usd_per_mtok * PER_MTOK
            elif self.layout.kind[c] == v.PROVIDER:
                name = self.layout.station_names[station]
                provider = fleet.providers[name]
                static[v.FIXED_TTFT_S, c] = provider.ttft_median_s
                static[v.FIXED_TPOT_S, c] = provider.tpot_median_s
                static[[v.INPUT_USD, v.CACHED_INPUT_USD, v.OUTPUT_USD], c] = provider.usd_per_token()
                limit = self.spec.providers[c - self.spec.n_replicas].rate_limit
                static[[v.LIMIT_CALL_S, v.LIMIT_TOKEN_S], c] = 1.0 / np.array(limit.per_s)
                if provider.cached_input_usd_per_mtok is not None:
                    static[v.PREFIX_CAPACITY_TOKENS, c] = PROVIDER_TOKENS
                    static[v.PREFIX_TTL_S, c] = provider.prompt_cache_ttl_s
            elif self.layout.kind[c] == v.CACHE:
                static[v.FIXED_TTFT_S, c] = self.config[0]["cache_lookup_s"]
        return static
