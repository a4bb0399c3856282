"""Response caches of the worlds: their arrays, sized by what is loaded, and the prompts of an episode put into them."""

from __future__ import annotations

from typing import Any

import numpy as np

from envs.fleet.response_cache import ENTRY
from envs.fleet.state import record_array
from envs.scenario import Scenario
from envs.workload.requests import Workload
from envs.world_cache import ACCESS, ASKED, FOUND, CacheArrays
from marginroute.pricing import PER_MTOK
from marginroute.view import Array


def cache_access(scenario: Scenario) -> Array:
    """(K,) who may be answered from the cache, and what a look-up takes."""
    access = record_array(len(scenario.class_names), ACCESS)
    cache = scenario.fleet.response_cache
    for record, customer in zip(access, scenario.plans.classes.values(), strict=True):
        record["allowed"] = cache is not None and customer.entitlements.cache
        if record["allowed"] and cache is not None and cache.semantic is not None:
            record["embed_s"], record["lookup_usd"] = cache.semantic.embed_s, cache.semantic.lookup_usd
            record["embed_usd_per_token"] = cache.semantic.embed_usd_per_mtok * PER_MTOK
    return access


class CachedAnswers:
    """The response caches of N worlds.

    Args:
        access: (K,) `ACCESS`.
        config: the scenario's `CONFIG` record.
        n_worlds: N.

    Attributes:
        arrays: what the kernels take.
    """

    def __init__(self, access: Array, config: Any, n_worlds: int) -> None:
        self.semantic, self.shared = bool(config["cache_semantic"]), bool(config["cache_shared"])
        found = record_array(n_worlds, FOUND)
        found["key"] = -1
        self.arrays = CacheArrays(
            entries=record_array((n_worlds, 0), ENTRY),
            points=np.zeros((n_worlds, 0, 0), dtype=np.float32),
            asked=record_array((n_worlds, 0), ASKED),
            heads=np.full((n_worlds, 0), -1, dtype=np.int32),
            found=found,
            access=access,
        )

    def wants(self, workload: Workload) -> bool:
        """Whether answers to other words are looked for in an episode."""
        return self.semantic and workload.has_families

    def make_room(self, workload: Workload) -> bool:
        """Grows the arrays for an episode; running ones survive. True if anything changed."""
        old, n, m = self.arrays, len(self.arrays.found), workload.n_requests
        near = self.wants(workload)
        keys = m if near else int(workload.prompt_key.max(initial=-1)) + 1
        wanted = (keys, workload.embedding.shape[1] if near else 0, m if self.semantic else 0, m if near else 0)
        has = (*old.points.shape[1:], old.asked.shape[1], old.heads.shape[1])
        size = tuple(max(pair) for pair in zip(has, wanted, strict=True))
        if size == has:
            return False
        new = CacheArrays(
            entries=record_array((n, size[0]), ENTRY),
            points=np.zeros((n, size[0], size[1]), dtype=np.float32),
            asked=record_array((n, size[2]), ASKED),
            heads=np.full((n, size[3]), -1, dtype=np.int32),
            found=old.found,
            access=old.access,
        )
        new.entries["stored_at_s"], new.entries["family"] = -np.inf, -1
        new.entries[:, : has[0]], new.points[:, : has[0], : has[1]] = old.entries, old.points
        new.asked[:, : has[2]], new.heads[:, : has[3]] = old.asked, old.heads
        self.arrays = new
        return True

    def load(self, w: int, workload: Workload, load: Any) -> Array | float:
        """Empties the cache of world `w` and tells it what the prompts of an episode have in common.

        Args:
            w: world.
            workload: of the episode.
            load: (M,) its `LOAD` records; they get their keys.

        Returns:
            Seconds that each request waits for its embedding, (M,): a world's clock begins behind it.
        """
        cache, m = self.arrays, workload.n_requests
        load["prompt_key"] = workload.prompt_key
        cache.entries["stored_at_s"][w], cache.entries["family"][w] = -np.inf, -1
        cache.heads[w] = -1
        if not self.semantic:
            return 0.0
        asked = cache.asked[w, :m]
        asked["needed_similarity"], asked["valid_for_s"] = workload.needed_similarity, workload.valid_for_s
        embed_s = cache.access["embed_s"][workload.class_index] * (workload.prompt_key >= 0)
        if not workload.has_families:
            return embed_s
        family = workload.family_index
        if not self.shared:  # a prompt or an intent of one tenant is not that of another
            load["prompt_key"] = _apart(workload.prompt_key, workload.tenant_index)
            family = _apart(family, workload.tenant_index)
        rows = np.flatnonzero(load["prompt_key"] >= 0)
        cache.entries["family"][w, load["prompt_key"][rows]] = family[rows]
        cache.points[w, load["prompt_key"][rows], : workload.embedding.shape[1]] = workload.embedding[rows]
        return embed_s


def _apart(number: Array, tenant_index: Array) -> Array:
    """(M,) numbers that differ where the tenants differ, dense from 0; -1 stays."""
    rows = np.flatnonzero(number >= 0)
    out = np.full(len(number), -1, dtype=np.int32)
    pairs = number[rows].astype(np.int64) * (int(tenant_index.max(initial=0)) + 1) + tenant_index[rows]
    _, out[rows] = np.unique(pairs, return_inverse=True)
    return out
