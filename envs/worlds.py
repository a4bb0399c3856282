"""N worlds of one scenario in one kernel call: what environments, tuning and evaluation all run on.

`FleetWorlds` owns the arrays that `envs.world` works on, loads workloads into them, and shows the View. It knows
nothing of Gymnasium or Stable-Baselines3; `fleet_env` and `vector_env` are faces of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from envs import rule_kernel, world_elastic
from envs import world as kernel
from envs.cached_answers import CachedAnswers
from envs.economics.ledger import ACCOUNTS, COUNTS
from envs.fleet import engine
from envs.fleet.allocation import allocate, limit_providers
from envs.fleet.hashes import load_hashes
from envs.fleet.state import NO_CAP, record_array
from envs.plant import Plant, check_ranges
from envs.prefixes import GatewayPrefixes, hashes_of
from envs.scenario import Scenario
from envs.task_books import TaskBooks
from envs.workload.faults import CHANGE, changes
from envs.workload.requests import Workload
from envs.world_accounts import CustomerAccounts
from envs.world_gateways import ROWS, instance_of
from envs.world_sessions import load_sessions
from envs.world_state import DESK, LOAD, MEAN, OPEN, OWN
from envs.world_terms import Terms
from marginroute import latency
from marginroute import view as v
from marginroute.margin_rule import MarginRule
from marginroute.policy import Policy
from marginroute.quality import FittedQuality
from marginroute.view import Array, View

AT_ONCE = 200_000  # decisions of all worlds between two looks at signals (Ctrl-C): a second or two


class FleetWorlds:
    """N independent worlds of a scenario.

    Args:
        scenario: what is simulated (or its `Plant`, to share the compiled constants).
        n_worlds: N.
        max_requests: M, rows for requests of one episode; it grows when a larger workload is loaded.
    """

    def __init__(self, scenario: Scenario | Plant, n_worlds: int, max_requests: int = 1) -> None:
        self.plant = scenario if isinstance(scenario, Plant) else Plant(scenario)
        check_ranges(self.plant.scenario)
        self.n_worlds = n_worlds
        layout, terms = self.plant.layout, self.plant.terms
        n, c, k = n_worlds, layout.n_candidates, len(terms)
        stations = self.plant.spec.n_replicas + len(self.plant.spec.providers)
        self.desks = record_array(n, DESK)
        gateways = self.plant.scenario.fleet.gateways
        rows = gateways * n  # of memory, see world_gateways.py
        self.own = record_array((rows, stations), OWN)
        self.own["gpu_usd_per_s"][:, : self.plant.spec.n_replicas] = self.plant.gpu_usd_per_s
        self.changes = record_array((n, 0), CHANGE)
        known = k + len(layout.tier_names) + (ROWS if gateways > 1 else 0)
        self.lengths = record_array((rows, known, len(layout.task_names)), MEAN)
        self._quality: FittedQuality | None = None
        self.ledger_usd = np.zeros((n, len(ACCOUNTS), k + 1))
        self.counts = np.zeros((n, len(COUNTS), k), dtype=np.int64)
        self.action_counts = np.zeros((n, len(v.KINDS)), dtype=np.int64)
        self.signals = np.zeros((len(v.SIGNALS), n, c))
        self.signals[: v.N_STATIC_SIGNALS] = self.plant.static_signals[:, None, :]
        self.signals[[v.IN_FLIGHT_CAP, v.SESSION_IDLE_S]] = v.UNLIMITED
        self.request = np.ones((len(v.REQUEST), n))  # until the first decision: anything that divides
        self.legal = np.zeros((n, c), dtype=np.bool_)
        self.p_true = np.zeros((n, c))
        self.desks["done"] = 1
        self._rows = 0
        self.customers = CustomerAccounts([member.terms for member in self.plant.members], n)
        self.answers = CachedAnswers(self.plant.cache_access, self.plant.config[0], n)
        plant, self.hedges = self.plant, any((x.hedge_after_s < np.inf).any() for x in self.plant.members)
        self.books = TaskBooks(plant.verifiers, plant.workflows, plant.shared_luck, self._lookup_s(), n, self.hedges)
        sends = (int(plant.config[0]["max_attempts"]) + max(self.books.attempts - 1, 0)) * (1 + self.hedges)
        self.prefixes = GatewayPrefixes(self.plant.static_signals, stations, n, sends, gateways)
        self._allocate(max_requests, 0)
        self._caps = self._per_replica(None)

    def _lookup_s(self) -> float:
        """Seconds that a tool's result takes which is kept; inf: none is."""
        config = self.plant.config[0]
        return float(config["result_lookup_s"]) if config["result_ttl_s"] >= 0.0 else np.inf

    def _allocate(self, rows: int, hashes: int) -> None:
        """Makes room for requests and engine block hashes of a world; running episodes survive."""
        n, tiers = self.n_worlds, len(self.plant.layout.tier_names)
        old = self.__dict__.get("fleet")
        if old is None or rows > self._rows or hashes > old.max_hashes:
            rows = max(rows, self._rows)
            fleet = allocate(self.plant.spec, n, rows, max(hashes, old.max_hashes if old else 0))
            loads = record_array((n, rows), LOAD)
            prior, truth = np.zeros((n, rows, tiers)), np.zeros((n, rows, tiers))
            good = np.zeros((n, rows, tiers), dtype=np.uint8)
            if old is not None:
                for name in ("worlds", "replicas", "providers"):
                    getattr(fleet, name)[...] = getattr(old, name)
                fleet.slots[:, : old.slots.shape[1]] = old.slots  # hashes come last
                fleet.requests[:, : self._rows] = old.requests
                for new, kept in ((loads, self.loads), (prior, self.prior), (truth, self.truth), (good, self.good)):
                    new[:, : self._rows] = kept
            self.fleet, self.loads, self.prior, self.truth, self.good = fleet, loads, prior, truth, good
            self._rows = rows
        self.__dict__.pop("_arguments", None)

    @cached_property
    def _arguments(self) -> tuple[Any, ...]:
        plant, family = self.plant, self.plant.family
        return (
            family.config,
            self._terms(),
            family.static_signals,
            family.sigmas,
            plant.layout.kind,
            plant.layout.tier,
            *self.fleet.arrays,
            self.desks,
            self.loads,
            self.prefixes.arrays,
            self.prior,
            self.truth,
            self.good,
            self.own,
            self.answers.arrays,
            self.books.arrays,
            self.lengths,
            self.ledger_usd,
            self.counts,
            self.changes,
            self.action_counts,
            self.signals,
            self.request,
            self.legal,
            self.p_true,
        )

    def _terms(self) -> Terms:
        agreed, customers = self.plant.agreed, self.customers
        last = np.stack([member.agreed.last_provider for member in self.plant.members])
        return Terms(
            self.plant.family.terms, agreed.allowed, agreed.models, last, customers.accounts, customers.windows
        )

    @property
    def arguments(self) -> tuple[Any, ...]:
        """What the kernels of `envs.world` take before a world or choices."""
        return self._arguments

    def load(self, w: int, workload: Workload) -> None:
        """Puts a new episode into world `w` and takes it to its first decision."""
        m, member = workload.n_requests, self.plant.members[workload.variant]
        hashes = self._hashes(workload)
        self._make_room([workload])
        load = self.loads[w, :m]
        for name in ("arrived_at_s", "deadline_s", "patience_s", "difficulty_signal", "class_index", "task_index"):
            load[name] = getattr(workload, name)
        for name in ("tenant_index", "prompt_tokens", "output_tokens"):
            load[name] = getattr(workload, name)
        embed_s = self.answers.load(w, workload, load)
        load["deadline_s"] -= embed_s
        load["ttft_noise"], load["tpot_noise"] = workload.provider_noise.T
        load["judged"] = workload.judged
        load["answered_by"], load["cached_tokens"], load["attempts"], load["outcome"] = -1, 0, 0, OPEN
        gateways = self.plant.scenario.fleet.gateways
        load["gateway"] = w
        if gateways > 1:
            load["gateway"] += self.n_worlds * instance_of(workload, gateways, self.plant.scenario.fleet.gateway_spread)
        if self.hedges:
            self.loads["gateway"][w, m : 2 * m] = load["gateway"]
        self.prefixes.load(w, workload, load)
        self.prior[w, :m], self.truth[w, :m], self.good[w, :m] = workload.p_good_prior, workload.p_good, workload.good
        for requests in (self.fleet.requests[w, :m], self.fleet.requests[w, m : 2 * m])[: 1 + self.hedges]:
            requests["prompt_tokens"], requests["output_tokens"] = workload.prompt_tokens, workload.output_tokens
            requests["priority"] = member.priority[workload.class_index]
            requests["patience_until_s"] = workload.arrived_at_s + workload.patience_s - embed_s
            requests["expected_cached_tokens"] = 0
        load_hashes(self.fleet, w, hashes, check=False)
        self.signals[v.CACHED_TOKENS, w], self.signals[v.SESSION_IDLE_S, w] = 0.0, v.UNLIMITED
        self.signals[v.UNDER_WAY_S, w] = 0.0
        self.request[v.TASK_VALUE_USD, w] = self.request[v.TASK_CALL, w] = 0.0
        desk = self.desks[w : w + 1]
        desk[...] = np.zeros((), dtype=DESK)
        for queue in ("held", "judged", "lru"):
            desk[f"{queue}_head"] = desk[f"{queue}_tail"] = -1
        desk["retry_head"] = desk["current"] = -1
        desk["n_requests"], desk["horizon_s"], desk["variant"] = m, workload.horizon_s, workload.variant
        desk["prefix_block_tokens"] = workload.prefix_block_tokens if self.prefixes.wants(workload) else 0
        self._load_faults(w, workload)
        load_sessions(workload, desk, load)
        self.books.load(w, workload, desk, load)
        self.books.arrays.timers["after_s"][w] = member.hedge_after_s
        desk["window_closes_s"] = self.customers.load(w, workload, load, self._arguments[1].by_class[workload.variant])
        static, stations = member.static_signals, self.own.shape[1]
        self.signals[: v.N_STATIC_SIGNALS, w] = static
        own = self.own[w :: self.n_worlds]
        own[...] = np.zeros((), dtype=OWN)
        own["gpu_usd_per_s"][:, : self.plant.spec.n_replicas] = member.gpu_usd_per_s
        own["recent_ttft_s"] = static[v.FIXED_TTFT_S, :stations]
        own["recent_tpot_s"] = static[v.FIXED_TPOT_S, :stations] + static[v.BASE_S, :stations]
        own["price_times"], own["sent_head"] = 1.0, -1
        k = len(self.plant.terms)
        lengths = self.lengths[w :: self.n_worlds]
        lengths[...] = np.zeros((), dtype=MEAN)
        lengths["value"][:, :k], lengths["weight"][:, :k] = member.output_tokens, latency.PRIOR_LENGTHS
        self._write_expected(lengths)
        for array in (self.ledger_usd, self.counts, self.action_counts):
            array[w] = 0
        limit_providers(self.fleet.providers[w], member.spec)
        engine.reset_world(*self.fleet.arrays, w)
        self.fleet.replicas["in_flight_cap"][w] = self._caps[w]
        choices = np.full(self.n_worlds, kernel.WAIT)
        choices[w] = kernel.BEGIN
        kernel.step(*self._arguments, choices)

    def _hashes(self, workload: Workload) -> tuple[Array, Array]:
        """Block hashes of the rows of `requests`, ragged; twice where a request may have two calls."""
        counts, flat = hashes_of(workload, self.plant.spec)
        return (np.tile(counts, 2), np.tile(flat, 2)) if self.hedges else (counts, flat)

    def _make_room(self, workloads: Sequence[Workload]) -> None:
        """Grows every array that one of these episodes does not fit into."""
        self._allocate(
            max(x.n_requests for x in workloads) * (1 + self.hedges),
            max(len(self._hashes(x)[1]) for x in workloads),
        )
        rooms = (self.prefixes, self.answers, self.books, self.customers)
        if any([room.make_room(x) for x in workloads for room in rooms]):
            self.__dict__.pop("_arguments", None)

    def _load_faults(self, w: int, workload: Workload) -> None:
        """What will fail in world `w`, step by step."""
        rows = changes(workload.faults)
        if len(rows) > self.changes.shape[1]:
            kept, self.changes = self.changes, record_array((self.n_worlds, len(rows)), CHANGE)
            self.changes[:, : kept.shape[1]] = kept
            self.__dict__.pop("_arguments", None)
        self.changes[w, : len(rows)] = rows
        self.desks["n_changes"][w] = len(rows)
        self.desks["elastic"][w] = self.plant.config[0]["elastic"] or len(rows) > 0

    def load_all(self, workloads: Sequence[Workload]) -> None:
        """Puts one episode into every world."""
        self._make_room(workloads)
        for w, workload in enumerate(workloads):
            self.load(w, workload)

    def set_in_flight_caps(self, caps: Array | None) -> None:
        """Sets the in-flight cap of every replica of each pool, (P,) or (N, P); None restores the configured ones."""
        self._caps = self._per_replica(caps)
        kernel.set_in_flight_caps(*self.fleet.arrays, self.desks, self._caps)
        self.signals[v.IN_FLIGHT_CAP, :, : self.plant.spec.n_replicas] = self._caps

    def follow(self, policy: Policy) -> None:
        """Takes over what a policy sets beside its decisions: in-flight caps, and what it expects of answers."""
        self.set_in_flight_caps(policy.in_flight_caps(self.plant.layout, self.plant.slots))
        self.expect(policy.quality)

    def expect(self, fitted: FittedQuality | None) -> None:
        """Sets the P(good) that judged answers are held against; None: the prior."""
        self._quality = fitted
        self._write_expected(self.lengths)

    def _write_expected(self, lengths: Array) -> None:
        """Writes into rows (..., K + T, J) of `lengths` how P(good) is fitted."""
        fitted, k = self._quality, len(self.plant.terms)
        rows = lengths[..., k : k + len(self.plant.layout.tier_names), :]
        rows["intercept"], rows["slope"], rows["length"] = 0.0, 1.0, 0.0
        if fitted is not None:
            rows["intercept"], rows["slope"], rows["length"] = fitted.intercept, fitted.slope, fitted.length[:, None]

    def set_replicas(self, targets: Array | None) -> None:
        """Scales pools towards so many replicas, (P,) or (N, P); None: as many as at the start.

        Targets outside a pool's min_replicas and max_replicas are brought inside. Machines take their time: see
        `envs.fleet.scaling`. The legal mask of the current decision follows at once.
        """
        spec = self.plant.spec
        wanted = np.array([pool.replicas for pool in spec.pools]) if targets is None else np.asarray(targets)
        wanted = np.ascontiguousarray(np.broadcast_to(wanted, (self.n_worlds, len(spec.pools))), dtype=np.int64)
        allowed = self.plant.agreed.allowed
        world_elastic.set_replicas(*self.fleet.arrays, self.desks, self.loads, self.own, allowed, self.legal, wanted)

    def _per_replica(self, caps: Array | None) -> Array:
        """(N, R) caps from (P,) or (N, P) ones, or the configured ones."""
        spec = self.plant.spec
        per_pool = np.array([p.in_flight_cap for p in spec.pools]) if caps is None else np.asarray(caps)
        per_replica = np.clip(per_pool, 1, NO_CAP)[..., spec.pool_of_replica].astype(np.int64)
        return np.ascontiguousarray(np.broadcast_to(per_replica, (self.n_worlds, spec.n_replicas)))

    def view(self) -> View:
        """The View of every world's current decision, over buffers that the next step overwrites."""
        return View(self.plant.layout, self.signals, self.request, self.legal)

    def step(self, choices: Array) -> None:
        """Carries out one choice per world, (N,) int; worlds that are done stay as they are."""
        kernel.step(*self._arguments, np.ascontiguousarray(choices, dtype=np.int64))

    @property
    def done(self) -> Array:
        """(N,) bool: the episode has been settled."""
        return self.desks["done"] == 1

    @property
    def reward_usd(self) -> Array:
        """(N,) change of the ledger by the last step."""
        return self.desks["reward_usd"]

    @property
    def elapsed_s(self) -> Array:
        """(N,) seconds between the last two decisions."""
        return self.desks["elapsed_s"]

    @property
    def utilisation(self) -> Array:
        """(N, P) share of the paid replica-seconds with something to do, once the worlds are done."""
        spec, r = self.plant.spec, self.plant.spec.n_replicas
        pools = np.arange(len(spec.pools))[:, None] == spec.pool_of_replica[None, :]
        mean = (pools / pools.sum(axis=1, keepdims=True)).T
        own = self.own[: self.n_worlds, :r]
        return (own["busy_s"] @ mean) / np.maximum(own["powered_s"] @ mean, 1e-9)

    def run(self, policy: Policy, max_steps: int | None = None) -> None:
        """Lets a policy decide until every world is done (or for `max_steps` decisions)."""
        self.follow(policy)
        if rule_kernel.is_compiled(policy, self):
            self._run_rule(policy, max_steps)
            return
        while not self.done.all() and (max_steps is None or max_steps > 0):
            self.step(policy.decide_batch(self.view()))
            max_steps = None if max_steps is None else max_steps - 1

    def _run_rule(self, rule: MarginRule, max_steps: int | None) -> None:
        arguments = (*self._arguments, *rule_kernel.arguments_of(rule, self), np.zeros(self.n_worlds, dtype=np.int64))
        some = max(AT_ONCE // self.n_worlds, 1)
        while not self.done.all() and (max_steps is None or max_steps > 0):
            rule_kernel.run(*arguments, some if max_steps is None else min(some, max_steps))
            max_steps = None if max_steps is None else max_steps - some
