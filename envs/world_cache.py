"""The gateway's response cache in the simulated world: what is found for a request, what it is worth, what is kept.

Every answer of a prompt with a key is stored (`store`). A look-up (`find`) returns the answer to the same key, or,
where the cache is semantic, the nearest one to a prompt of the same intent: other intents are never near enough. It
is right if it is similar enough and young enough for this request (`envs.workload.intents`); a wrong one is posted as a
bad answer. Nobody finds an answer of another tenant unless the cache is shared.

Stored answers of an intent form a chain, the latest first; outdated ones are passed over and go when their place is
needed. Shapes: N worlds, M requests, K classes, P prompt keys, F intents, D dimensions of embeddings.
"""

# ruff: noqa: ANN001, ANN201, ANN202 (Numba infers the types of kernels)
from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from envs import world_accounts as contracts
from envs.economics import ledger as books
from envs.fleet.response_cache import append, unlink
from envs.kernels import kernel
from marginroute import response_cache
from marginroute import view as v

ASKED = np.dtype([("needed_similarity", "f8"), ("valid_for_s", "f8")])
"""What reuse means to a request, `(N, M)`; no columns in a world without intents."""

FOUND = np.dtype([("key", "i4"), ("similarity", "f8")])
"""The answer found for the current request, `(N,)`; key -1: none."""

ACCESS = np.dtype([("allowed", "i4"), ("embed_s", "f8"), ("lookup_usd", "f8"), ("embed_usd_per_token", "f8")])
"""Whether and at what cost a class is looked up, `(K,)`."""

p_reuse = kernel(response_cache.p_reuse)


class CacheArrays(NamedTuple):
    """The response caches of all worlds."""

    entries: Any  # (N, P) envs.fleet.response_cache.ENTRY
    points: Any  # (N, P, D) f4 embeddings of the prompts
    asked: Any  # (N, M) ASKED, or no columns
    heads: Any  # (N, F) i4 latest stored answer of an intent, -1: none
    found: Any  # (N,) FOUND
    access: Any  # (K,) ACCESS


@kernel
def embedding_s(cache, load):
    """Seconds that a request waits for its embedding before anything is decided."""
    return cache.access[load.class_index].embed_s if load.prompt_key >= 0 else 0.0


@kernel
def charge(cache, loads, ledger_usd, w, i):
    """Posts what embedding a new request and looking it up cost."""
    load = loads[w, i]
    access = cache.access[load.class_index]
    if load.prompt_key >= 0 and access.allowed == 1:
        cost_usd = access.lookup_usd + load.prompt_tokens * access.embed_usd_per_token
        books.post(ledger_usd, w, books.CACHE, load.class_index, -cost_usd)


@kernel
def _usable(config, terms, entry, load, now_s):
    """Whether a stored answer is fresh, this tenant's to have, and of a model that its class is entitled to."""
    fresh = entry.stored_at_s + config[0].cache_ttl_s >= now_s
    fresh = fresh and terms.models[load.class_index, entry.tier]
    return fresh and (config[0].cache_shared == 1 or entry.tenant_index == load.tenant_index)


@kernel
def find(config, terms, desks, cache, loads, w, i):
    """Looks request `i` up; True if the gateway may answer it from the cache, with `found[w]`."""
    load, found = loads[w, i], cache.found[w]
    found.key, found.similarity = -1, 0.0
    key = load.prompt_key
    if key < 0 or config[0].cache_capacity == 0 or cache.access[load.class_index].allowed == 0:
        return False
    now_s = desks[w].now_s
    if _usable(config, terms, cache.entries[w, key], load, now_s):
        found.key, found.similarity = key, 1.0
        return True
    if config[0].cache_semantic == 0:
        return False
    family = cache.entries[w, key].family
    if family < 0:
        return False
    best = config[0].cache_min_similarity
    other = int(cache.heads[w, family])
    while other >= 0:
        if _usable(config, terms, cache.entries[w, other], load, now_s):
            similarity = 0.0
            for d in range(cache.points.shape[2]):
                similarity += cache.points[w, key, d] * cache.points[w, other, d]
            if similarity >= best:
                best = similarity
                found.key, found.similarity = other, min(similarity, 1.0)
        other = int(cache.entries[w, other].kin_older)
    return found.key >= 0


@kernel
def _right(config, desks, cache, w, i):
    """Whether the answer found is right for request `i`, which nobody knows before."""
    if config[0].cache_semantic == 0:
        return True
    asked, found = cache.asked[w, i], cache.found[w]
    age_s = desks[w].now_s - cache.entries[w, found.key].stored_at_s
    return found.similarity >= asked.needed_similarity and age_s <= asked.valid_for_s


@kernel
def show(config, desks, cache, prior, signals, p_true, w, c, i):
    """Writes what was found for request `i` into the View, and the hidden outcome beside it."""
    found = cache.found[w]
    entry = cache.entries[w, found.key]
    signals[v.P_GOOD_PRIOR, w, c] = prior[w, i, entry.tier]
    if config[0].cache_semantic == 1:
        signals[v.P_GOOD_PRIOR, w, c] *= p_reuse(found.similarity, config[0].cache_half, config[0].cache_width)
    signals[v.SIMILARITY, w, c] = found.similarity
    signals[v.ENTRY_AGE_S, w, c] = desks[w].now_s - entry.stored_at_s
    p_true[w, c] = entry.good if _right(config, desks, cache, w, i) else 0.0


@kernel
def show_nothing(signals, p_true, w, c):
    """Writes into the View that there is no answer."""
    signals[v.P_GOOD_PRIOR, w, c] = signals[v.SIMILARITY, w, c] = signals[v.ENTRY_AGE_S, w, c] = 0.0
    p_true[w, c] = 0.0


@kernel
def _drop(desks, cache, w, key):
    """Takes an answer out of the cache and out of the chain of its intent."""
    unlink(desks, cache.entries, w, key)
    entry = cache.entries[w, key]
    if entry.family < 0:
        return
    if entry.kin_newer >= 0:
        cache.entries[w, entry.kin_newer].kin_older = entry.kin_older
    else:
        cache.heads[w, entry.family] = entry.kin_older
    if entry.kin_older >= 0:
        cache.entries[w, entry.kin_older].kin_newer = entry.kin_newer


@kernel
def store(config, desks, cache, loads, ledger_usd, w, i, tier, good, now_s):
    """Stores an answer under its prompt key, evicting the least recently used one if the cache is full."""
    load, desk = loads[w, i], desks[w]
    key = load.prompt_key
    if cache.access[load.class_index].allowed == 0:
        return
    if cache.entries[w, key].stored_at_s > -np.inf:
        _drop(desks, cache, w, key)
    elif desk.cached >= config[0].cache_capacity:
        _drop(desks, cache, w, desk.lru_head)
    append(desks, cache.entries, w, key, now_s)
    entry = cache.entries[w, key]
    entry.tenant_index, entry.tier, entry.good = load.tenant_index, tier, good
    entry.output_tokens = load.output_tokens
    if entry.family >= 0:
        entry.kin_newer, entry.kin_older = -1, cache.heads[w, entry.family]
        if entry.kin_older >= 0:
            cache.entries[w, entry.kin_older].kin_newer = key
        cache.heads[w, entry.family] = key
    books.post(ledger_usd, w, books.CACHE, load.class_index, -config[0].cache_entry_usd)


@kernel
def serve(config, terms, desks, loads, cache, ledger_usd, counts, w, i):
    """Answers request `i` from the response cache; the entry is the most recently used one now.

    Returns:
        Whether the answer is good, and when it is there.
    """
    load, desk, key = loads[w, i], desks[w], int(cache.found[w].key)
    entry = cache.entries[w, key]
    right = _right(config, desks, cache, w, i)
    stored_at_s = entry.stored_at_s
    unlink(desks, cache.entries, w, key)
    append(desks, cache.entries, w, key, stored_at_s)
    ttft_s = desk.now_s + config[0].cache_lookup_s - load.arrived_at_s
    counts[w, books.CACHE_HITS, load.class_index] += 1
    counts[w, books.WRONG_HITS, load.class_index] += not right
    answered_at_s = load.arrived_at_s + ttft_s
    ttft_s += embedding_s(cache, load)
    contracts.post_answer(
        terms, loads, ledger_usd, counts, w, i, 0, entry.output_tokens, ttft_s, 0.0, ttft_s,
        right and entry.good == 1, books.CACHE, 0.0, desk.now_s,
    )  # fmt: skip
    return right and entry.good == 1, answered_at_s
