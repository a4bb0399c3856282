"""State of the served fleet: the arrays in which the kernels keep it, field by field.

A *pool* is a set of equal replicas (one engine profile), a *provider* is a third-party API, a *world* is one
independent copy of the fleet with its own requests. Every array is a structured one with scalar fields of fixed
type, so that a kernel compiles once for every fleet and its machine code is cached on disk:

    pools (P,)      constants of a pool and the offsets of its profile in `tables`
    tables (L,)     all profiles, flattened, float64
    worlds (N,)     clock, finished list, heap of provider calls, conservation counters
    replicas (N, R) one engine each, pool-major order; the fields that a gateway may read come first
    slots (N, L)    working memory, cells of 16 bytes: per replica the heap of finishing decodes, the histogram of KV
                    block boundaries and the levels of priority; then, for prefix caching, per replica its runs of
                    blocks, and all requests' stretches of hashes
    providers (N, V)  calls in flight and the token bucket of the rate limit
    requests (N, M) inputs, outcome and the engine's own bookkeeping

Every kernel takes these seven in this order (`allocation.Fleet.arrays`), then the world's index. Arrays are recarrays
where Numba is switched off, so that `record.field` means the same in both executions.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

# REQUEST.status
NOT_SUBMITTED, IN_FLIGHT, COMPLETED, ABANDONED, FAILED, LOST = range(6)
# LOST: ended without an answer by a fault; whoever sent it may reset the row and send it again

# REPLICA.state, see envs/fleet/scaling.py and envs/fleet/faults.py
ACTIVE, DRAINING, STARTING, DOWN, OFF, LEAVING = range(6)

# POOL.scheduler
VLLM_V1, PREFILL_FIRST, SARATHI = range(3)
SCHEDULERS = {"vllm-v1": VLLM_V1, "prefill-first": PREFILL_FIRST, "sarathi": SARATHI}

SCHEDULING_POLICIES = ("fcfs", "priority")
PRIORITY_LEVELS = 8  # REQUEST.priority is 0 (first) to 7

NO_CAP = 2**31 - 1  # in_flight_cap of a replica whose gateway never holds a request back

POOL = np.dtype(
    [
        ("scheduler", "i8"),
        ("max_num_seqs", "i8"),
        ("max_num_batched_tokens", "i8"),
        ("kv_blocks", "i8"),
        ("block_size_tokens", "i8"),
        ("watermark_blocks", "i8"),  # blocks that admission leaves free (prefill-first, sarathi)
        ("vidur_quirks", "i8"),  # 1: reproduce Vidur to the request (see envs/fleet/batching.py)
        ("skip_iterations", "i8"),  # 0: one event per iteration; results are equal, only slower
        ("prefix_caching", "i8"),  # 1: blocks with a hash are kept and found again (see envs/fleet/prefix.py)
        ("bucket_mask", "i8"),  # buckets of the prefix cache's hash map less one; their number is a power of two
        ("scrape_interval_s", "f8"),
        ("in_flight_cap", "i8"),
        # Scaling and failing, see envs/fleet/scaling.py and envs/fleet/faults.py
        ("first_replica", "i8"),
        ("replicas", "i8"),  # active at the start
        ("max_replicas", "i8"),  # rows of `replicas`
        ("min_replicas", "i8"),
        ("reserved_replicas", "i8"),
        ("notice_s", "f8"),  # from the notice that a spot machine is reclaimed until it goes
        ("provision_s", "f8"),
        ("load_s", "f8"),
        ("paid_from_load", "i8"),  # 1: paid from the start of loading, 0: from the start of provisioning
        ("detect_s", "f8"),
        ("connection_errors", "i8"),
        # The profile, see envs/fleet/iteration.py
        ("token_at", "i8"),
        ("token_count", "i8"),
        ("token_tail_s", "f8"),
        ("bin_at", "i8"),
        ("bin_count", "i8"),
        ("upper_at", "i8"),
        ("decode_at", "i8"),
        ("decode_bins", "i8"),
        ("prefill_at", "i8"),
        ("prefill_rows", "i8"),
        ("prefill_columns", "i8"),
        ("prefill_square_s", "f8"),
        ("prefill_product_s", "f8"),
        ("prefill_prefix_s", "f8"),
        ("multi_prefill_share", "f8"),
        ("extras", "i8"),  # 1: anything beyond plain batching, see `extras` in batching.py
        # Priority scheduling, see queues.py
        ("priorities", "i8"),  # 1: who waits is served, and who runs preempted, by REQUEST.priority
        ("levels_at", "i8"),  # where the levels of a replica's two lines begin behind its slot_at
        # Speculation, see speculation.py
        ("pace", "i8"),  # tokens per iteration times 2^20; 0: none
        ("draft_tokens", "i8"),
        ("draft_cost", "f8"),
        ("speculation_max_batch", "i8"),
    ]
)

REPLICA = np.dtype(
    [
        # Read by a router at every decision: one cache line
        ("wake_s", "f8"),  # next instant at which something changes: end of an iteration, or a scrape
        ("in_flight", "i8"),  # sent by the gateway and not ended, held ones included
        ("held", "i8"),  # in the gateway's hold queue, because the engine already has in_flight_cap
        ("pending_prefill_tokens", "i8"),  # prompt tokens in flight without a first token, less those expected cached
        ("decoding", "i8"),  # in flight with a first token
        ("decoding_tokens", "i8"),  # their prompt tokens and the tokens streamed so far
        ("pool", "i8"),
        ("in_flight_cap", "i8"),
        # Seen by the engine alone, published by a scrape
        ("waiting", "i8"),
        ("running", "i8"),
        ("kv_used_blocks", "i8"),  # blocks of the iteration in progress included
        ("scraped_waiting", "i8"),
        ("scraped_running", "i8"),
        ("scraped_kv_usage", "f8"),  # share of kv_blocks
        ("scraped_at_s", "f8"),
        ("busy_s", "f8"),  # closed busy periods; `busy_seconds` adds the open one
        ("busy_from_s", "f8"),  # start of the open busy period, inf when idle
        # Totals of the episode
        ("prefill_tokens_done", "i8"),  # recomputed ones included
        ("decode_tokens_done", "i8"),
        ("iterations", "i8"),
        ("restarts", "i8"),
        ("reused_tokens", "i8"),  # not prefilled because their blocks were cached, after restarts too
        ("evicted_blocks", "i8"),
        ("admissions", "i8"),  # counted with prefix caching only, preempted requests again
        # The segment: iterations of one composition, the j-th takes first_s + j * growth_s
        ("iteration_end_s", "f8"),  # of the iteration in progress, inf when idle
        ("segment_start_s", "f8"),
        ("first_s", "f8"),
        ("growth_s", "f8"),
        ("planned", "i8"),  # iterations until the scheduler must look again
        ("done", "i8"),  # iterations of the segment that have ended
        ("segment_bin", "i8"),
        ("decodes", "i8"),  # 1: the iteration in progress advances the decode batch
        ("changed", "i8"),  # 1: the decode batch is not that of the segment any more
        # Decode batch
        ("batch", "i8"),
        ("kv_sum", "i8"),  # tokens that the decodes attend to in the next iteration
        ("counter", "i8"),  # decode iterations so far, the clock of slots.finish_at
        ("slot_at", "i8"),  # where its part of the world's slots begins
        # Prefix cache
        ("block_at", "i8"),  # where its runs begin in the world's slots, two cells each
        ("idle_blocks", "i8"),  # cached blocks that no request holds: free, the least recently used goes first
        ("used_runs", "i8"),  # runs that have been in use, spare ones included
        # Queues: heads and tails in requests.next, requests.before / after
        ("wait_head", "i4"),
        ("wait_tail", "i4"),
        ("hold_head", "i4"),
        ("hold_tail", "i4"),
        ("prefill_head", "i4"),  # requests that prefill in this iteration
        ("prefill_tail", "i4"),
        ("partial", "i4"),  # the one running request whose prefill is not complete
        ("running_head", "i4"),  # order of admission
        ("running_tail", "i4"),
        ("idle_head", "i4"),  # run with the least recently used idle block, in slots.before / after
        ("idle_tail", "i4"),
        ("spare_head", "i4"),  # runs that have ended, in slots.after
        ("scrape_index", "i8"),
        ("scrape_phase_s", "f8"),
        # Scaling and failing
        ("state", "i8"),
        ("slowdown", "f8"),  # factor on the seconds of iterations
        ("idle_from_s", "f8"),  # when it last had nothing more to do
        ("change_s", "f8"),  # when it is ready, its failure detected or repaired, its machine gone; inf: never
        ("repaired_s", "f8"),  # when the machine of a failed replica works again
        ("absent_until_s", "f8"),  # when there is spot capacity again
        ("paid_from_s", "f8"),  # since when this machine is paid; inf: it is not
        ("paid_s", "f8"),  # closed periods; `paid_seconds` adds the open one
        ("detected", "i8"),  # 1: the gateway knows that the replica is down
        ("stalled_head", "i8"),  # running requests that this iteration leaves out (see batching.py)
        ("pace", "i8"),  # of the segment: tokens per iteration times 2^20; 0: one, without speculation
        ("phase", "i8"),  # part of a token, in the same unit, that was left over when the segment began
    ]
)

_SLOT_FIELDS: tuple[tuple[str, str, int], ...] = (  # name, type, byte: the kinds of cells share their bytes
    # Decodes of a replica, from slot_at
    ("finish_at", "i8", 0),  # heap position p: counter value after which the decode ends
    ("request", "i4", 8),  # heap position p
    ("boundaries", "i4", 12),  # p < block size: decodes that need a new block when counter % block size == p
    # Level p of a replica's line, at the engine and in the hold queue, from slot_at + levels_at
    ("level_tail", "i4", 0),  # last request of the level; -1: none
    # Run p of the prefix cache, cell block_at + 2 p, and the cell behind it (see prefix.py)
    ("stretch", "i4", 0),  # number of the stretch of which it has blocks
    ("offset", "i4", 4),  # its first block, counted in the stretch
    ("length", "i4", 8),  # blocks
    ("holders", "i4", 12),  # requests that hold it; 0: idle
    ("before", "i4", 0),  # cell behind: list of idle runs
    ("after", "i4", 4),  # cell behind: list of idle runs, of spare ones; of a run that is held, what was cut off it
    ("chain", "i4", 8),  # cell behind: next run in the same bucket
    ("bucket", "i4", 12),  # cell behind: first run of bucket p of the hash map; -1: empty
    # Cell hash_at + k of a request: its k-th stretch, and the k-th note of what it holds
    ("end", "i4", 4),  # blocks of the request up to the end of its k-th `stretch`
    ("run", "i4", 8),  # a run that it holds, and all that were cut off it up to the next note's block
    ("first", "i4", 12),  # k > 0: block of the request with which the run begins; it begins with block 0 in note 0
    ("admission", "i4", 12),  # k = 0: requests that were admitted before this one
)

SLOT = np.dtype(
    {
        "names": [name for name, _, _ in _SLOT_FIELDS],
        "formats": [form for _, form, _ in _SLOT_FIELDS],
        "offsets": [byte for _, _, byte in _SLOT_FIELDS],
        "itemsize": 16,
    }
)

PROVIDER = np.dtype(
    [
        ("in_flight", "i8"),
        ("requests_per_s", "f8"),  # rate limit; inf for none
        ("bucket_size", "f8"),
        ("bucket", "f8"),  # requests that may be sent now, as of bucket_at_s
        ("bucket_at_s", "f8"),
        ("calls", "i8"),
        ("tokens_per_s", "f8"),  # rate limit; inf for none
        ("token_bucket_size", "f8"),
        ("token_bucket", "f8"),  # tokens that may be sent or generated, as of token_bucket_at_s; negative is a debt
        ("token_bucket_at_s", "f8"),
        ("down", "i8"),  # 1: every call that is sent now ends with an error
        ("error_after_s", "f8"),  # how long such a call takes to fail
        ("slowdown", "f8"),  # factor on the latency of calls that are sent now
    ]
)

WORLD = np.dtype(
    [
        ("clock_s", "f8"),
        ("first_finished", "i4"),
        ("last_finished", "i4"),
        ("provider_calls", "i8"),  # size of the heap in requests.call_heap
        ("next_call_s", "f8"),  # end of the earliest provider call
        ("submitted", "i8"),
        ("completed", "i8"),
        ("abandoned", "i8"),
        ("failed", "i8"),
        ("lost", "i8"),  # attempts that faults ended
        ("next_change_s", "f8"),  # least change_s of all replicas
        ("draining", "i8"),  # replicas that drain
        ("doomed_calls", "i8"),  # provider calls in flight that will end with an error
    ]
)

REQUEST = np.dtype(
    [
        # Inputs
        ("prompt_tokens", "i4"),
        ("output_tokens", "i4"),  # hidden from every gateway
        ("patience_until_s", "f8"),  # absolute; inf: never leaves
        ("priority", "i4"),  # 0 to 7, lower first, where the pool schedules by priority
        ("hash_at", "i4"),  # where its stretches of block hashes begin in the world's slots
        ("hash_count", "i4"),  # its blocks with a hash, generated ones behind the prompt included; 0: none
        ("expected_cached_tokens", "i4"),  # of the prompt, by the gateway's account; not in pending_prefill_tokens
        # Outcome
        ("status", "i4"),
        ("replica", "i4"),  # or -1 - provider
        ("restarts", "i4"),
        ("dispatched_at_s", "f8"),
        ("first_token_at_s", "f8"),  # nan until then
        ("completed_at_s", "f8"),  # when it ended, whatever the status; nan until then
        ("cached_tokens", "i4"),  # reused from the prefix cache when it was first admitted
        # Bookkeeping
        ("next", "i4"),  # waiting, hold, prefill or finished list
        ("before", "i4"),  # running list
        ("after", "i4"),
        ("target", "i4"),  # tokens to prefill: the prompt, after a restart also what was generated
        ("computed", "i4"),  # tokens in the KV cache; a decode has counter - joined_at more
        ("call_heap", "i4"),  # position p of the world's heap of provider calls holds this request
        ("hashed_blocks", "i4"),  # its first blocks that stand in the index of the prefix cache
        ("noted_runs", "i4"),  # notes of the runs that these are in
        ("joined_at", "i8"),  # counter value at which the request joined the decode batch; -1: not decoding
    ]
)


def record_array(shape: int | tuple[int, ...], dtype: np.dtype) -> Any:
    """Zeros of a structured type whose elements have fields as attributes, compiled or not."""
    array = np.zeros(shape, dtype)
    return array.view(np.recarray) if numba.config.DISABLE_JIT else array
