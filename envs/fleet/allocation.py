"""The arrays of a fleet, made from its specification."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt

from envs.fleet.profile import flatten_profile
from envs.fleet.spec import FleetSpec, PoolSpec, check_pool
from envs.fleet.state import (
    POOL,
    PRIORITY_LEVELS,
    PROVIDER,
    REPLICA,
    REQUEST,
    SCHEDULERS,
    SLOT,
    WORLD,
    record_array,
)
from marginroute.errors import InputError

FloatArray = npt.NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class Fleet:
    """The arrays of N worlds with the same fleet; shapes in `state`'s docstring."""

    spec: FleetSpec
    pools: Any
    tables: FloatArray
    worlds: Any
    replicas: Any
    slots: Any
    providers: Any
    requests: Any
    max_hashes: int = 0

    @property
    def arrays(self) -> tuple[Any, ...]:
        """The seven arrays that every kernel takes, in order."""
        return (
            self.pools,
            self.tables,
            self.worlds,
            self.replicas,
            self.slots,
            self.providers,
            self.requests,
        )


def _cached_runs(pool: PoolSpec) -> int:
    """Runs for which a replica's prefix cache has room: each has a block at least."""
    return pool.kv_blocks if pool.prefix_caching else 0


def _buckets(pool: PoolSpec) -> int:
    """Buckets of its hash map: a power of two, about one per four blocks."""
    return 1 << max((pool.kv_blocks - 1).bit_length() - 2, 0) if pool.prefix_caching else 1


def _decode_slots(spec: FleetSpec) -> int:
    """Cells of a replica for the heap of finishing decodes and the histogram of block boundaries."""
    return max(max(pool.max_num_seqs, pool.block_size_tokens) for pool in spec.pools)


def _level_slots(spec: FleetSpec) -> int:
    """Cells of a replica for the levels of its two lines."""
    return 2 * PRIORITY_LEVELS if any(pool.scheduling_policy == "priority" for pool in spec.pools) else 0


def _fill_pool(record: Any, pool: PoolSpec, spec: FleetSpec, tables: list[FloatArray]) -> None:
    check_pool(pool)
    for field in set(POOL.names) & {field.name for field in dataclasses.fields(pool)} - {"scheduler"}:
        record[field] = getattr(pool, field)
    record["scheduler"] = SCHEDULERS[pool.scheduler]
    record["priorities"] = pool.scheduling_policy == "priority"
    record["extras"] = pool.prefix_caching or pool.scheduling_policy == "priority" or pool.speculation is not None
    if pool.speculation is not None:
        record["pace"], record["speculation_max_batch"] = pool.speculation.pace, pool.speculation.max_batch
        record["draft_tokens"], record["draft_cost"] = pool.speculation.draft_tokens, pool.speculation.draft_cost
    record["levels_at"] = _decode_slots(spec)
    # vLLM V1 admits without a watermark
    reserve = 0.0 if pool.scheduler == "vllm-v1" else pool.watermark_share
    record["watermark_blocks"] = int(reserve * pool.kv_blocks)
    record["bucket_mask"] = _buckets(pool) - 1
    record["max_replicas"] = pool.rows
    record["scrape_interval_s"] = spec.scrape_interval_s
    offset = sum(len(table) for table in tables)
    flat, fields = flatten_profile(pool.profile, pool.max_num_seqs, offset)
    for field, value in fields.items():
        record[field] = value
    tables.append(flat)


def _place_replicas(fleet: Fleet, own_slots: int) -> None:
    """Gives every replica its pool and its part of the slots."""
    of_replica = fleet.spec.pool_of_replica
    cells = 2 * np.array([_cached_runs(pool) for pool in fleet.spec.pools])[of_replica]
    fleet.replicas["pool"] = of_replica
    fleet.replicas["slot_at"] = np.arange(len(of_replica)) * own_slots
    fleet.replicas["block_at"] = len(of_replica) * own_slots + np.cumsum(cells) - cells


def allocate(spec: FleetSpec, n_worlds: int, max_requests: int, max_hashes: int = 0) -> Fleet:
    """Arrays of `n_worlds` empty worlds; call `engine.reset_world` on each before use.

    Args:
        spec: The fleet, the same in all worlds.
        n_worlds: N.
        max_requests: M, rows of `requests` in every world.
        max_hashes: Block hashes of all requests of a world together.

    Raises:
        InputError: A pool's numbers cannot be run.
    """
    if not spec.pools:
        raise InputError("fleet: no pool, legal is one or more")
    pools = record_array(len(spec.pools), POOL)
    tables: list[FloatArray] = []
    for record, pool in zip(pools, spec.pools, strict=True):
        _fill_pool(record, pool, spec, tables)
    pools["first_replica"] = np.cumsum(pools["max_replicas"]) - pools["max_replicas"]
    slots = _decode_slots(spec) + _level_slots(spec)
    n_replicas, n_providers = spec.n_replicas, len(spec.providers)
    cells = sum(pool.rows * (slots + 2 * _cached_runs(pool)) for pool in spec.pools)
    fleet = Fleet(
        spec=spec,
        pools=pools,
        tables=np.concatenate(tables),
        worlds=record_array(n_worlds, WORLD),
        replicas=record_array((n_worlds, n_replicas), REPLICA),
        slots=record_array((n_worlds, cells + max_hashes), SLOT),
        providers=record_array((n_worlds, n_providers), PROVIDER),
        requests=record_array((n_worlds, max(max_requests, 1)), REQUEST),
        max_hashes=max_hashes,
    )
    _place_replicas(fleet, slots)
    limit_providers(fleet.providers, spec)
    return fleet


def limit_providers(records: Any, spec: FleetSpec) -> None:
    """Sets rate limits and times to an error in (..., V) records."""
    for v, provider in enumerate(spec.providers):
        limit = provider.rate_limit
        records["requests_per_s"][..., v] = limit.requests_per_s
        records["bucket_size"][..., v] = limit.size_requests
        records["tokens_per_s"][..., v] = limit.tokens_per_s
        records["token_bucket_size"][..., v] = limit.size_tokens
        records["error_after_s"][..., v] = provider.error_after_s
