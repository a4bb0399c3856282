"""What a fleet is made of, as plain numbers: pools of equal replicas, and third-party providers."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import numpy.typing as npt

from envs.fleet.profile import Profile
from envs.fleet.speculation import MOST_DRAFT_TOKENS, Speculation
from envs.fleet.state import NO_CAP, SCHEDULERS, SCHEDULING_POLICIES
from marginroute.errors import InputError
from marginroute.rate_limits import RateLimit


@dataclasses.dataclass(frozen=True)
class PoolSpec:
    """Replicas of one engine profile.

    Attributes:
        name: Name of the pool.
        tier: Index of the model in the scenario's list of tiers.
        profile: Seconds per iteration.
        replicas: Number of engines that are active at the start.
        kv_blocks: KV-cache blocks of one engine.
        block_size_tokens: Tokens per block.
        max_num_seqs: Most requests that run at once.
        max_num_batched_tokens: Token budget of one iteration.
        scheduler: A name in `SCHEDULERS`.
        scheduling_policy: fcfs, or priority as in vLLM (vllm-v1 only): who is served first and who is preempted.
        in_flight_cap: Requests that the gateway lets one engine have; the rest is held back.
        watermark_share: Share of the blocks that admission leaves free (prefill-first and sarathi).
        vidur_quirks: Reproduce Vidur's scheduler to the request.
        skip_iterations: Advance unchanged decode batches many iterations at once (equal results, faster).
        prefix_caching: Keep full blocks that have a hash, and reuse them for requests that begin with the same ones.
        speculation: How it speculates; None: not at all.
        max_replicas: Engines that it may be scaled up to; 0: as many as `replicas`.
        min_replicas: Engines that it may be scaled down to.
        reserved_replicas: The first ones, paid all the time, whether they run or not.
        spot_replicas: The last ones, whose machines may be reclaimed.
        notice_s: From the notice that a machine is reclaimed until it goes.
        provision_s: From asking for a machine until it is there.
        load_s: From there until the weights are loaded and requests are taken; also after a repair.
        paid_from_load: A machine is paid once it is there, not from asking for it.
        detect_s: From a failure until the gateway takes the replica for down.
        connection_errors: Requests at a failed engine end at once with an error; otherwise they hang until detected.
    """

    name: str
    profile: Profile
    replicas: int = 1
    tier: int = 0
    kv_blocks: int = 4096
    block_size_tokens: int = 16
    max_num_seqs: int = 128
    max_num_batched_tokens: int = 2048
    scheduler: str = "vllm-v1"
    scheduling_policy: str = "fcfs"
    in_flight_cap: int = NO_CAP
    watermark_share: float = 0.01
    vidur_quirks: bool = False
    skip_iterations: bool = True
    prefix_caching: bool = False
    speculation: Speculation | None = None
    max_replicas: int = 0
    min_replicas: int = 1
    reserved_replicas: int = 0
    spot_replicas: int = 0
    notice_s: float = 0.0
    provision_s: float = 0.0
    load_s: float = 0.0
    paid_from_load: bool = False
    detect_s: float = 0.0
    connection_errors: bool = True

    @property
    def rows(self) -> int:
        """Engines that the pool can have at most: each is a candidate and a row of `replicas`."""
        return self.max_replicas or self.replicas


@dataclasses.dataclass(frozen=True)
class ProviderSpec:
    """A third-party API: lognormal latencies around medians, rate limits per minute.

    A call in an outage ends with an error after `error_after_s`.
    """

    name: str
    tier: int = 0
    ttft_s: float = 0.5
    ttft_sigma: float = 0.0
    tpot_s: float = 0.02
    tpot_sigma: float = 0.0
    requests_per_minute: float = math.inf  # this and the next three: see `marginroute.rate_limits.RateLimit`
    burst_requests: float = 0.0
    tokens_per_minute: float = math.inf
    burst_tokens: float = 0.0
    error_after_s: float = 0.0

    @property
    def rate_limit(self) -> RateLimit:
        """What it lets through."""
        return RateLimit(self.requests_per_minute, self.burst_requests, self.tokens_per_minute, self.burst_tokens)


@dataclasses.dataclass(frozen=True)
class FleetSpec:
    """Plain numbers that describe a fleet; candidates are its replicas (pool-major), then its providers."""

    pools: tuple[PoolSpec, ...]
    providers: tuple[ProviderSpec, ...] = ()
    scrape_interval_s: float = 1.0

    @property
    def n_replicas(self) -> int:
        """Replicas over all pools."""
        return sum(pool.rows for pool in self.pools)

    @property
    def pool_of_replica(self) -> npt.NDArray[np.int64]:
        """Index of the pool of every replica, (R,)."""
        return np.repeat(np.arange(len(self.pools)), [pool.rows for pool in self.pools])


def _check(condition: bool, pool: PoolSpec, field: str, legal: str) -> None:
    if not condition:
        raise InputError(f"pool '{pool.name}': {field} = {getattr(pool, field)!r}, legal is {legal}")


def _check_speculation(pool: PoolSpec, speculation: Speculation) -> None:
    def check(condition: bool, field: str, legal: str) -> None:
        if not condition:
            value = getattr(speculation, field)
            raise InputError(f"pool '{pool.name}': speculation.{field} = {value!r}, legal is {legal}")

    check(1 <= speculation.draft_tokens <= MOST_DRAFT_TOKENS, "draft_tokens", f"1 to {MOST_DRAFT_TOKENS}")
    check(0.0 <= speculation.acceptance <= 1.0, "acceptance", "from 0 to 1")
    check(0.0 <= speculation.draft_cost < math.inf, "draft_cost", "0 or more")
    check(speculation.max_batch >= 1, "max_batch", "1 or more")
    most = min(pool.max_num_seqs, speculation.max_batch) * (1 + speculation.draft_tokens)
    legal = f"{most} or more, so that every running request gets its draft_tokens and one more checked"
    _check(pool.max_num_batched_tokens >= most, pool, "max_num_batched_tokens", legal)
    _check(not pool.vidur_quirks, pool, "vidur_quirks", "false with speculation")


def check_pool(pool: PoolSpec) -> None:
    """Raises InputError unless the engine can run this pool."""
    for field in ("replicas", "kv_blocks", "block_size_tokens", "max_num_seqs", "in_flight_cap"):
        _check(getattr(pool, field) >= 1, pool, field, "1 or more")
    _check(pool.max_replicas in (0, max(pool.max_replicas, pool.replicas)), pool, "max_replicas", "replicas or more")
    _check(0 <= pool.min_replicas <= pool.replicas, pool, "min_replicas", "from 0 to replicas")
    _check(0 <= pool.reserved_replicas <= pool.rows, pool, "reserved_replicas", "from 0 to max_replicas")
    most = pool.rows - pool.reserved_replicas
    _check(0 <= pool.spot_replicas <= most, pool, "spot_replicas", "from 0 to max_replicas less reserved_replicas")
    for field in ("provision_s", "load_s", "detect_s", "notice_s"):
        _check(0.0 <= getattr(pool, field) < math.inf, pool, field, "0 or more")
    _check(pool.max_num_seqs <= 4096, pool, "max_num_seqs", "at most 4096")
    _check(pool.block_size_tokens <= 1024, pool, "block_size_tokens", "at most 1024")
    legal = "max_num_seqs or more, so that every running request gets its token"
    enough = 1 if pool.vidur_quirks else pool.max_num_seqs  # in Vidur decodes may exceed the budget, and stop prefills
    _check(pool.max_num_batched_tokens >= enough, pool, "max_num_batched_tokens", legal)
    _check(pool.scheduler in SCHEDULERS, pool, "scheduler", "one of " + ", ".join(SCHEDULERS))
    policies = SCHEDULING_POLICIES if pool.scheduler == "vllm-v1" else SCHEDULING_POLICIES[:1]
    legal = " or ".join(policies) + f" with scheduler {pool.scheduler}"
    _check(pool.scheduling_policy in policies, pool, "scheduling_policy", legal)
    _check(0.0 <= pool.watermark_share < 1.0, pool, "watermark_share", "from 0 up to, but not, 1")
    if pool.speculation is not None:
        _check_speculation(pool, pool.speculation)
    _check(not (pool.prefix_caching and pool.vidur_quirks), pool, "prefix_caching", "false with vidur_quirks")
