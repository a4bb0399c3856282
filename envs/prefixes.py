"""Prefix caches of the worlds: their arrays, sized by what is loaded, and the hashes of an episode put into them.

Two things take the hashes. Engines of pools with `prefix_caching` reuse blocks (`envs.fleet.prefix`); the gateway keeps
its own record of what it has sent where (`envs.prefix_kernel`), which is all that a View knows. A scenario without
prefix caching, or a workload without hashes, costs nothing.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from envs import prefix_kernel
from envs.fleet.hashes import engine_hashes
from envs.fleet.spec import FleetSpec
from envs.fleet.state import record_array
from envs.workload.answers import hashes_with_answers
from envs.workload.requests import Workload
from marginroute import view as v
from marginroute.prefix_index import MAX_BLOCKS
from marginroute.view import Array

_ENGINE_HASHES: WeakKeyDictionary[Workload, tuple[int, tuple[Array, Array]]] = WeakKeyDictionary()


def hashes_of(workload: Workload, spec: FleetSpec) -> tuple[Array, Array]:
    """The workload's hashes in blocks of the caching pools' engines, ragged; none where nobody asks.

    Raises:
        InputError: the engine's blocks do not divide the workload's.
    """
    sizes = [pool.block_size_tokens for pool in spec.pools if pool.prefix_caching]
    if not sizes or len(workload.prefix_hash) == 0:
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    known = _ENGINE_HASHES.get(workload)
    if known is None or known[0] != sizes[0]:
        hashes, spoken = hashes_with_answers(workload)
        tokens = (workload.prompt_tokens, workload.output_tokens)
        known = (sizes[0], engine_hashes(*tokens, hashes, workload.prefix_block_tokens, sizes[0], spoken))
        _ENGINE_HASHES[workload] = known
    return known[1]


class GatewayPrefixes:
    """The gateway's prefix index of N worlds.

    Args:
        static_signals: (S_static, C) constants of the candidates.
        n_stations: replicas and providers.
        n_worlds: N.
        max_sends: most times that one request can be sent somewhere.
        gateways: instances, each with an index of its own.

    Attributes:
        arrays: what the kernels take.
    """

    def __init__(
        self, static_signals: Array, n_stations: int, n_worlds: int, max_sends: int = 1, gateways: int = 1
    ) -> None:
        self._capacity_tokens = static_signals[v.PREFIX_CAPACITY_TOKENS, :n_stations].astype(np.int64)
        self._max_sends = max_sends
        rows = gateways * n_worlds
        marks = record_array((rows, n_stations), prefix_kernel.MARK)
        cached = self._capacity_tokens > 0
        marks["row"] = np.where(cached, np.cumsum(cached) - 1, -1)
        ttl_s = static_signals[v.PREFIX_TTL_S, :n_stations]
        marks["ttl_s"] = np.where(ttl_s < v.UNLIMITED, ttl_s, np.inf)
        marks["head"] = marks["tail"] = -1
        self.any = bool(cached.any())
        self.arrays = prefix_kernel.PrefixArrays(
            ids=np.zeros((n_worlds, 0), dtype=np.int32),
            stamps=np.zeros((rows, int(cached.sum()), 0), dtype=np.int32),
            marks=marks,
            sends=record_array((rows, 0), prefix_kernel.SEND),
            free=np.full(rows, -1, dtype=np.int32),
        )

    def wants(self, workload: Workload) -> bool:
        """Whether the index takes part in an episode."""
        return self.any and len(workload.prefix_hash) > 0

    def make_room(self, workload: Workload) -> bool:
        """Grows the arrays for an episode; running ones survive. True if anything changed."""
        if not self.wants(workload):
            return False
        ids, stamps, sends = (self.arrays.ids, self.arrays.stamps, self.arrays.sends)
        room = (ids.shape[1], stamps.shape[2], sends.shape[1])
        wanted = (len(workload.prefix_ids), int(workload.prefix_ids.max()) + 1, workload.n_requests * self._max_sends)
        size = tuple(max(pair) for pair in zip(room, wanted, strict=True))
        if size == room:
            return False
        new = self.arrays._replace(
            ids=np.zeros((len(ids), size[0]), dtype=np.int32),
            stamps=np.zeros((len(stamps), stamps.shape[1], size[1]), dtype=np.int32),
            sends=record_array((len(sends), size[2]), prefix_kernel.SEND),
        )
        new.ids[:, : room[0]], new.stamps[:, :, : room[1]], new.sends[:, : room[2]] = ids, stamps, sends
        self.arrays = new
        return True

    def load(self, w: int, workload: Workload, load: Any) -> None:
        """Empties the index of world `w` and gives its requests their hashes.

        Args:
            w: world.
            workload: of the episode.
            load: (M,) its `LOAD` records.
        """
        load["prefix_count"] = 0
        if not self.wants(workload):
            return
        block, counts = workload.prefix_block_tokens, workload.prefix_count
        full = np.minimum(counts, workload.prompt_tokens // block)
        load["prefix_count"], load["prefix_at"] = np.minimum(full, MAX_BLOCKS), np.cumsum(counts) - counts
        self.arrays.ids[w, : len(workload.prefix_ids)] = workload.prefix_ids
        for g in range(w, len(self.arrays.marks), len(self.arrays.ids)):
            self.arrays.marks["capacity_blocks"][g] = self._capacity_tokens // block
            prefix_kernel.reset(self.arrays, g)
