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

Nothing is kept per block. Requests come as lists of *stretches*, hashes that only occur together (stretches.py). A
replica's cache consists of *runs*: blocks side by side in one stretch that one request computed, that the same requests
hold, and that, when nobody does, are neighbours in the idle list, their last block the least recently used. A run is
cut in two when a request takes hold of a part of it, and eviction takes blocks from a run's end. A request notes the
runs that it took or computed; parts that are cut off them later follow through `after`. Both halves of a cut keep the
run's place in its chain, and a lookup reads the chain in order, hence what is found, held and evicted is what it would
be block by block.

The index is a hash map over stretches with one chain per bucket, in order of entry; all of it is in the world's
`slots`, where run p, and bucket p, are cell `block_at` + 2 p and the one behind it. There is one bucket per four
blocks. Buckets of 16 consecutive stretches lie side by side, because stretches are numbered as they first occur.
"""

# ruff: noqa: ANN001, ANN201, ANN202 (Numba infers the types of kernels)
from __future__ import annotations

from envs.kernels import kernel


@kernel
def empty_prefix_cache(pool, rep, slots, w):
    """Takes every block out of the cache of a replica; its totals stay."""
    rep.idle_head = rep.idle_tail = rep.spare_head = -1
    rep.idle_blocks = rep.used_runs = 0
    if pool.prefix_caching:
        for p in range(pool.bucket_mask + 1):
            slots[w, rep.block_at + 2 * p + 1].bucket = -1


@kernel
def _bucket_cell(pool, rep, stretch):
    """Cell with the bucket of a stretch: multiplicative, of all but the last four bits, which stay."""
    group = int(stretch) >> 4
    return rep.block_at + 2 * ((((group * 2654435761) >> 16) << 4 | (int(stretch) & 15)) & pool.bucket_mask) + 1


@kernel
def _find_run(pool, rep, slots, w, stretch, offset):
    """The oldest run with block `offset` of a stretch, or -1, and the block at which an older one takes over."""
    at, limit = rep.block_at, 1 << 31
    p = int(slots[w, _bucket_cell(pool, rep, stretch)].bucket)
    while p >= 0:
        run = slots[w, at + 2 * p]
        if run.stretch == stretch:
            if run.offset > offset:
                limit = min(limit, int(run.offset))
            elif run.offset + run.length > offset:
                break
        p = int(slots[w, at + 2 * p + 1].chain)
    return p, limit


@kernel
def _new_run(rep, slots, w, stretch, offset, length, holders):
    """A run that is in no list yet; returns its number."""
    p = int(rep.spare_head)
    if p < 0:
        p = int(rep.used_runs)
        rep.used_runs += 1
    else:
        rep.spare_head = slots[w, rep.block_at + 2 * p + 1].after
    run = slots[w, rep.block_at + 2 * p]
    run.stretch, run.offset, run.length, run.holders = stretch, offset, length, holders
    return p


@kernel
def _enter(pool, rep, slots, w, stretch, offset, length, previous):
    """Enters blocks that one request has computed, behind equal ones.

    Returns:
        The number of their run: `previous`, if it ends where they begin and can be extended, or a new one.
    """
    at = rep.block_at
    bucket_cell = _bucket_cell(pool, rep, stretch)
    q, last = int(slots[w, bucket_cell].bucket), -1
    newest = -1
    while q >= 0:
        if slots[w, at + 2 * q].stretch == stretch:
            newest = q
        last = q
        q = int(slots[w, at + 2 * q + 1].chain)
    if newest >= 0 and newest == previous:
        run = slots[w, at + 2 * previous]
        if run.holders == 1 and run.offset + run.length == offset:
            run.length += length
            return previous
    p = _new_run(rep, slots, w, stretch, offset, length, 1)
    slots[w, at + 2 * p + 1].chain = -1
    if last < 0:
        slots[w, bucket_cell].bucket = p
    else:
        slots[w, at + 2 * last + 1].chain = p
    return p


@kernel
def _leave(pool, rep, slots, w, p):
    """Takes a run out of the index."""
    at = rep.block_at
    following = slots[w, at + 2 * p + 1].chain
    bucket_cell = _bucket_cell(pool, rep, slots[w, at + 2 * p].stretch)
    q = int(slots[w, bucket_cell].bucket)
    if q == p:
        slots[w, bucket_cell].bucket = following
    else:
        while slots[w, at + 2 * q + 1].chain != p:
            q = int(slots[w, at + 2 * q + 1].chain)
        slots[w, at + 2 * q + 1].chain = following
    slots[w, at + 2 * p + 1].after = rep.spare_head
    rep.spare_head = p


@kernel
def _idle_append(rep, slots, w, p):
    """Most recently used of the idle blocks."""
    links = slots[w, rep.block_at + 2 * p + 1]
    links.before, links.after = rep.idle_tail, -1
    if rep.idle_tail >= 0:
        slots[w, rep.block_at + 2 * rep.idle_tail + 1].after = p
    else:
        rep.idle_head = p
    rep.idle_tail = p
    rep.idle_blocks += slots[w, rep.block_at + 2 * p].length


@kernel
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
    rep.idle_blocks -= slots[w, rep.block_at + 2 * p].length


@kernel
def _cut(rep, slots, w, p, length):
    """Cuts a run behind its first `length` blocks; returns the second half, idle as the first, or held by the same."""
    at = rep.block_at
    run, links = slots[w, at + 2 * p], slots[w, at + 2 * p + 1]
    q = _new_run(rep, slots, w, run.stretch, run.offset + length, run.length - length, run.holders)
    run.length = length
    other = slots[w, at + 2 * q + 1]
    other.chain, links.chain = links.chain, q
    if run.holders > 0:
        other.after, links.after = links.after, q
        return q
    other.before, other.after = links.before, p
    if links.before >= 0:
        slots[w, at + 2 * links.before + 1].after = q
    else:
        rep.idle_head = q
    links.before = q
    return q


@kernel
def _evict_excess(pool, rep, slots, w):
    """Evicts the idle blocks whose place has been taken since the last call."""
    excess = rep.kv_used_blocks + rep.idle_blocks - pool.kv_blocks
    while excess > 0:
        p = int(rep.idle_head)
        run = slots[w, rep.block_at + 2 * p]
        gone = min(excess, int(run.length))
        if gone == run.length:
            _idle_remove(rep, slots, w, p)
            _leave(pool, rep, slots, w, p)
        else:
            run.length -= gone
            rep.idle_blocks -= gone
        rep.evicted_blocks += gone
        excess -= gone


@kernel
def find_prefix(pool, rep, slots, requests, w, i):
    """Looks up the beginning of a waiting request; changes nothing that counts.

    Returns:
        Blocks that can be reused, and how many of them are idle.
    """
    request = requests[w, i]
    _evict_excess(pool, rep, slots, w)
    most = min(int(request.hash_count), (request.target - 1) // pool.block_size_tokens)
    found, idle, noted, k, begin = 0, 0, 0, 0, 0
    while found < most:
        own = slots[w, request.hash_at + k]
        offset = found - begin
        p, limit = _find_run(pool, rep, slots, w, own.stretch, offset)
        if p < 0:
            break
        note = slots[w, request.hash_at + noted]
        note.run = p
        if noted > 0:
            note.first = found
        noted += 1
        run = slots[w, rep.block_at + 2 * p]
        length = min(min(run.offset + run.length, limit) - offset, most - found)
        if run.holders == 0:
            idle += length
        found += length
        if found == own.end:
            begin = found
            k += 1
    request.noted_runs = noted
    return found, idle


@kernel
def _full_blocks(pool, request):
    """Blocks of a request that are full and have a hash."""
    return min(int(request.hash_count), request.computed // pool.block_size_tokens)


@kernel
def index_blocks(pool, rep, slots, requests, w, i):
    """Enters the blocks that a request's prefill fills in the iteration being put together; it has them already."""
    request = requests[w, i]
    _evict_excess(pool, rep, slots, w)
    full = _full_blocks(pool, request)
    j, k, begin = int(request.hashed_blocks), 0, 0
    while j < full:
        own = slots[w, request.hash_at + k]
        if own.end > j:
            end = min(int(own.end), full)
            noted = int(request.noted_runs)
            previous = slots[w, request.hash_at + noted - 1].run if noted > 0 and j > begin else -1
            p = _enter(pool, rep, slots, w, own.stretch, j - begin, end - j, previous)
            if p != previous:
                slots[w, request.hash_at + noted].run = p
                if noted > 0:
                    slots[w, request.hash_at + noted].first = j
                request.noted_runs += 1
            j = end
        begin = int(own.end)
        k += 1
    request.hashed_blocks = full


@kernel
def _note_end(slots, request, w, n, blocks):
    """Behind which block of a request its n-th note ends, where all of them speak of its first `blocks`."""
    return int(slots[w, request.hash_at + n + 1].first) if n + 1 < request.noted_runs else blocks


@kernel
def _take_runs(rep, slots, request, w, found):
    """Takes hold of the runs that `find_prefix` has noted, cut to the `found` blocks that are reused."""
    at, here = rep.block_at, request.hash_at
    j, k, begin = 0, 0, 0
    for n in range(request.noted_runs):
        end = _note_end(slots, request, w, n, found)
        while slots[w, here + k].end <= j:
            begin = int(slots[w, here + k].end)
            k += 1
        p = int(slots[w, here + n].run)
        while slots[w, at + 2 * p].offset + slots[w, at + 2 * p].length <= j - begin:  # cut a moment ago
            p = int(slots[w, at + 2 * p + 1].chain)
        run = slots[w, at + 2 * p]
        if run.offset < j - begin:
            p = _cut(rep, slots, w, p, j - begin - run.offset)
            run = slots[w, at + 2 * p]
        if run.length > end - j:
            _cut(rep, slots, w, p, end - j)
        if run.holders == 0:
            _idle_remove(rep, slots, w, p)
            slots[w, at + 2 * p + 1].after = -1
            rep.kv_used_blocks += run.length
        run.holders += 1
        slots[w, here + n].run = p
        j = end


@kernel
def take_prefix(pool, rep, slots, requests, w, i, found):
    """An admitted request takes hold of the blocks of `find_prefix`; those that its first chunk fills are entered."""
    request = requests[w, i]
    _take_runs(rep, slots, request, w, found)
    request.hashed_blocks = found
    if request.hash_count > 0:
        slots[w, request.hash_at].admission = rep.admissions
    rep.admissions += 1
    rep.reused_tokens += found * pool.block_size_tokens
    if request.restarts == 0:
        request.cached_tokens = found * pool.block_size_tokens
    index_blocks(pool, rep, slots, requests, w, i)


@kernel
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


@kernel
def _held_runs(rep, slots, request, w, blocks):
    """Links all runs of a request, which holds `blocks` blocks through them; returns the last, `before` leads on."""
    at, here = rep.block_at, request.hash_at
    last, j = -1, 0
    for n in range(request.noted_runs):
        end = _note_end(slots, request, w, n, blocks)
        p = int(slots[w, here + n].run)
        while j < end:
            links = slots[w, at + 2 * p + 1]
            links.before = last
            last = p
            j += slots[w, at + 2 * p].length
            p = int(links.after)
    return last


@kernel
def let_go(pool, rep, slots, requests, w, i, held_blocks):
    """A request lets go of its blocks, those with a hash become idle unless somebody else holds them."""
    request = requests[w, i]
    _evict_excess(pool, rep, slots, w)
    rep.kv_used_blocks -= held_blocks - _full_blocks(pool, request)
    index_blocks(pool, rep, slots, requests, w, i)
    p = _held_runs(rep, slots, request, w, int(request.hashed_blocks))
    while p >= 0:
        run = slots[w, rep.block_at + 2 * p]
        preceding = int(slots[w, rep.block_at + 2 * p + 1].before)
        run.holders -= 1
        if run.holders == 0:
            _idle_append(rep, slots, w, p)
            rep.kv_used_blocks -= run.length
        p = preceding
    request.hashed_blocks = request.noted_runs = 0
