"""Prefix cache of one replica: KV blocks that outlive their request, found by hash, evicted least recently used first.

As in vLLM V1 (vllm/v1/core/block_pool.py and kv_cache_manager.py, 0.24 and later). A full block whose hash the caller
has supplied enters the index when the scheduler hands out the tokens that fill it, so that a request admitted in the
same iteration finds it already. A request that is admitted reuses the longest run of blocks, from its first on, that
the index holds, though never its last token, which has to be computed for the first output. Every block counts the
requests that hold it. When the last one lets go the block becomes *idle*: free, but still in the index. A request lets
go of its last block first, so that beginnings, which more requests share, stay longest. Blocks that are needed are
taken from the free ones without content first, then from the idle list, the least recently used one first; that one
leaves the index. Equal blocks are not merged: two requests that computed the same block hold one each, and the index
gives the older one.

Three numbers describe the blocks of a replica: `kv_used_blocks`, held by at least one request, with or without a hash;
`idle_blocks`; and the rest, free without content. Since only releases and look-ups depend on what has been evicted,
evictions are made up for at those moments (`_evict_excess`) and a decode that needs a block only counts it: with
caching, too, unchanged batches are skipped over in one step.

Generated blocks with a hash enter the index when their request ends or is preempted (vLLM: as they fill up), since a
follow-up turn cannot come earlier. A block without a hash is never found again, not even by its own request after a
preemption; vLLM hashes every full block, and `envs.fleet.hashes.engine_hashes` does so too.

The index is a hash map with one chain per bucket, all in the world's `slots` (block p and bucket p share two cells).
Buckets of 16 consecutive hashes lie side by side, because callers often number blocks in the order in which they come.
"""

# ruff: noqa: ANN001, ANN201, ANN202 (Numba infers the types of kernels)
from __future__ import annotations

from numba import njit


@njit(cache=True, nogil=True)
def empty_prefix_cache(pool, rep, slots, w):
    """Takes every block out of the cache of a replica; its totals stay."""
    rep.idle_head = rep.idle_tail = rep.spare_head = -1
    rep.idle_blocks = 0
    if pool.prefix_caching:
        for p in range(pool.bucket_mask + 1):
            slots[w, rep.block_at + 2 * p].bucket = -1
        for p in range(pool.kv_blocks - 1, -1, -1):
            slots[w, rep.block_at + 2 * p + 1].after = rep.spare_head
            rep.spare_head = p


@njit(cache=True, nogil=True)
def reset_prefix_cache(pool, rep, slots, w):
    """Empties the cache of a replica for a new episode."""
    rep.reused_tokens = rep.evicted_blocks = rep.admissions = 0
    empty_prefix_cache(pool, rep, slots, w)


@njit(cache=True, nogil=True)
def _bucket_cell(pool, rep, block_hash):
    """Cell of the bucket of a hash: multiplicative, within 63 bits, of all but the last four bits, which stay."""
    group = block_hash >> 4
    group = (group ^ (group >> 30)) & 0x7FFFFFFF
    return rep.block_at + 2 * ((((group * 2654435761) >> 16) << 4 | (block_hash & 15)) & pool.bucket_mask)


@njit(cache=True, nogil=True)
def find_block(pool, rep, slots, w, block_hash):
    """The oldest block with a hash in the index of a replica, or -1."""
    p = int(slots[w, _bucket_cell(pool, rep, block_hash)].bucket)
    while p >= 0 and slots[w, rep.block_at + 2 * p].block_hash != block_hash:
        p = int(slots[w, rep.block_at + 2 * p + 1].chain)
    return p


@njit(cache=True, nogil=True)
def _enter(pool, rep, slots, w, block_hash, holders):
    """A new block of the index, behind equal ones; returns its number."""
    p = int(rep.spare_head)
    at = rep.block_at
    rep.spare_head = slots[w, at + 2 * p + 1].after
    slots[w, at + 2 * p].block_hash = block_hash
    slots[w, at + 2 * p].holders = holders
    slots[w, at + 2 * p + 1].chain = -1
    bucket_cell = _bucket_cell(pool, rep, block_hash)
    q = int(slots[w, bucket_cell].bucket)
    if q < 0:
        slots[w, bucket_cell].bucket = p
    else:
        while slots[w, at + 2 * q + 1].chain >= 0:
            q = int(slots[w, at + 2 * q + 1].chain)
        slots[w, at + 2 * q + 1].chain = p
    return p


@njit(cache=True, nogil=True)
def _leave(pool, rep, slots, w, p):
    """Takes a block out of the index."""
    at = rep.block_at
    following = slots[w, at + 2 * p + 1].chain
    bucket_cell = _bucket_cell(pool, rep, slots[w, at + 2 * p].block_hash)
    q = int(slots[w, bucket_cell].bucket)
    if q == p:
        slots[w, bucket_cell].bucket = following
    else:
        while slots[w, at + 2 * q + 1].chain != p:
            q = int(slots[w, at + 2 * q + 1].chain)
        slots[w, at + 2 * q + 1].chain = following
    slots[w, at + 2 * p + 1].after = rep.spare_head
    rep.spare_head = p


@njit(cache=True, nogil=True)
def _idle_append(rep, slots, w, p):
    """Most recently used of the idle blocks."""
    links = slots[w, rep.block_at + 2 * p + 1]
    links.before, links.after = rep.idle_tail, -1
    if rep.idle_tail >= 0:
        slots[w, rep.block_at + 2 * rep.idle_tail + 1].after = p
    else:
        rep.idle_head = p
    rep.idle_tail = p
    rep.idle_blocks += 1


@njit(cache=True, nogil=True)
def _idle_remove(rep, slots, w, p):
    links = slots[w, rep.block_at + 2 * p + 1]
    if links.before >= 0:
        slots[w, rep.block_at + 2 * links.before + 1].after = links.after
    else:
        rep.idle_head = links.after
    if links.after >= 0:
        slots[w, rep.block_at + 2 * links.after + 1].before = links.before
    else:
        rep.idle_tail = links.before
    rep.idle_blocks -= 1


@njit(cache=True, nogil=True)
def _evict_excess(pool, rep, slots, w):
    """Evicts the idle blocks whose place has been taken since the last call."""
    while rep.kv_used_blocks + rep.idle_blocks > pool.kv_blocks:
        p = int(rep.idle_head)
        _idle_remove(rep, slots, w, p)
        _leave(pool, rep, slots, w, p)
        rep.evicted_blocks += 1


@njit(cache=True, nogil=True)
def find_prefix(pool, rep, slots, requests, w, i):
    """Looks up the beginning of a waiting request; changes nothing that counts.

    Returns:
        Blocks that can be reused, and how many of them are idle.
    """
    request = requests[w, i]
    _evict_excess(pool, rep, slots, w)
    most = min(int(request.hash_count), (request.target - 1) // pool.block_size_tokens)
    found, idle = 0, 0
    while found < most:
        own = slots[w, request.hash_at + found]
        p = find_block(pool, rep, slots, w, own.block_hash)
        if p < 0:
            break
        own.block = p
        if slots[w, rep.block_at + 2 * p].holders == 0:
            idle += 1
        found += 1
    return found, idle


@njit(cache=True, nogil=True)
def _full_blocks(pool, request):
    """Blocks of a request that are full and have a hash."""
    return min(int(request.hash_count), request.computed // pool.block_size_tokens)


@njit(cache=True, nogil=True)
def index_blocks(pool, rep, slots, requests, w, i):
    """Enters the blocks that a request's prefill fills in the iteration being put together; it has them already."""
    request = requests[w, i]
    _evict_excess(pool, rep, slots, w)
    full = _full_blocks(pool, request)
    for j in range(request.hashed_blocks, full):
        own = slots[w, request.hash_at + j]
        own.block = _enter(pool, rep, slots, w, own.block_hash, 1)
    request.hashed_blocks = full


@njit(cache=True, nogil=True)
def take_prefix(pool, rep, slots, requests, w, i, found):
    """An admitted request takes hold of the blocks of `find_prefix`; those that its first chunk fills are entered."""
    request = requests[w, i]
    for j in range(found):
        p = int(slots[w, request.hash_at + j].block)
        block = slots[w, rep.block_at + 2 * p]
        if block.holders == 0:
            _idle_remove(rep, slots, w, p)
            rep.kv_used_blocks += 1
        block.holders += 1
    request.hashed_blocks = found
    if request.hash_count > 0:
        slots[w, request.hash_at].admission = rep.admissions
    rep.admissions += 1
    rep.reused_tokens += found * pool.block_size_tokens
    if request.restarts == 0:
        request.cached_tokens = found * pool.block_size_tokens
    index_blocks(pool, rep, slots, requests, w, i)


@njit(cache=True, nogil=True)
def insert_by_admission(slots, requests, w, head, i):
    """Inserts a request into a list through `next`, those admitted first at its head; returns the head.

    Requests without hashes have nothing whose place in the idle list their order decides, and go to the head.
    """
    request = requests[w, i]
    behind, ahead = -1, head
    if request.hash_count > 0:
        admission = slots[w, request.hash_at].admission
        while ahead >= 0 and (
            requests[w, ahead].hash_count == 0 or slots[w, requests[w, ahead].hash_at].admission < admission
        ):
            behind, ahead = ahead, int(requests[w, ahead].next)
    request.next = ahead
    if behind < 0:
        return i
    requests[w, behind].next = i
    return head


@njit(cache=True, nogil=True)
def let_go(pool, rep, slots, requests, w, i, held_blocks):
    """A request lets go of its blocks, those with a hash become idle unless somebody else holds them."""
    request = requests[w, i]
    _evict_excess(pool, rep, slots, w)
    full = _full_blocks(pool, request)
    rep.kv_used_blocks -= held_blocks - full
    for j in range(full - 1, -1, -1):
        own = slots[w, request.hash_at + j]
        if j >= request.hashed_blocks:
            own.block = _enter(pool, rep, slots, w, own.block_hash, 1)
        p = int(own.block)
        block = slots[w, rep.block_at + 2 * p]
        block.holders -= 1
        if block.holders == 0:
            _idle_append(rep, slots, w, p)
            rep.kv_used_blocks -= 1
    request.hashed_blocks = 0
