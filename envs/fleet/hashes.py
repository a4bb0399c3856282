"""Block hashes of requests, from what a trace or a generator knows to what the engine takes.

A hash stands for the content of a block and of everything before it, so requests that begin alike begin with the same
hashes, and no hash occurs twice in one request. Only equality counts. Ragged lists are two arrays: `counts` (M,) and
all hashes, one request after the other, (sum of counts,).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from envs.fleet.allocation import Fleet
from envs.fleet.stretches import dense, write_stretches
from envs.kernels import kernel
from marginroute.errors import InputError

IntArray = npt.NDArray[np.int64]
Ragged = tuple[Any, Any]  # counts (M,), hashes (sum of counts,)
_LARGE = 1 << 60  # from here on hashes are numbered anew, lest their parts overflow


@kernel(allocates=True)
def _repeated(counts, flat):  # noqa: ANN001, ANN202
    """A request and a hash that it has twice, or -1, -1; lists that ascend, as most do, are not sorted."""
    start = 0
    for i in range(counts.size):
        own = flat[start : start + counts[i]]
        start += counts[i]
        ascending = True
        for j in range(1, own.size):
            ascending = ascending and own[j] > own[j - 1]
        if not ascending:
            own = np.sort(own)
            for j in range(1, own.size):
                if own[j] == own[j - 1]:
                    return i, own[j]
    return -1, -1


def _ragged(hashes: Ragged, n_requests: int) -> tuple[IntArray, IntArray]:
    """The two arrays as int64, checked: lengths, 0 or more, no hash twice in one request."""
    counts, flat = (np.ascontiguousarray(part, dtype=np.int64) for part in hashes)
    if counts.shape != (n_requests,) or (counts < 0).any() or flat.shape != (counts.sum(),):
        raise InputError(
            f"block hashes: {counts.size} counts that add up to {counts.sum()} for {n_requests} requests and "
            f"{flat.size} hashes; legal is one count of 0 or more per request and as many hashes as they add up to"
        )
    if flat.size and flat.min() < 0:
        raise InputError(f"block hashes: {flat.min()}; legal is 0 or more")
    i, block_hash = _repeated(counts, flat)
    if i >= 0:
        raise InputError(
            f"block hashes: request {i + 1} has {block_hash} twice; legal is a hash of a block and all before it"
        )
    return counts, flat


def engine_hashes(
    prompt_tokens: npt.ArrayLike,
    output_tokens: npt.ArrayLike,
    hashes: Ragged,
    hash_block_tokens: int,
    block_size_tokens: int,
    known_tokens: npt.ArrayLike | None = None,
) -> tuple[IntArray, IntArray]:
    """Hashes of every block that the engine will fill, from hashes of the prompts' larger blocks.

    A block of `hash_block_tokens` is cut into the engine's. Blocks that the given hashes say nothing about (generated
    tokens, the block in which prompt and output meet, prompts without hashes) get a number of their own, as in vLLM,
    where they take their place in the cache and only their own request can find them again, after a preemption.

    Args:
        prompt_tokens: (M,).
        output_tokens: (M,).
        hashes: Ragged, of the prompts; the last one of a request may stand for a block that is not full.
        hash_block_tokens: Tokens per block of `hashes`.
        block_size_tokens: Tokens per block of the engine.
        known_tokens: (M,) tokens that the hashes speak of, where they go on into the answer; None: the prompts'.

    Returns:
        Ragged: counts (M,) and hashes; the numbers of their own are above all others.

    Raises:
        InputError: The engine's blocks do not divide the others, or the ragged lists are not legal.
    """
    prompt, output = np.asarray(prompt_tokens, dtype=np.int64), np.asarray(output_tokens, dtype=np.int64)
    if hash_block_tokens < 1 or hash_block_tokens % block_size_tokens:
        raise InputError(
            f"block hashes over {hash_block_tokens} tokens; legal is a multiple of the engine's {block_size_tokens}"
        )
    parts = hash_block_tokens // block_size_tokens
    given_counts, given = _ragged(hashes, prompt.size)
    if given.size and given.max() >= _LARGE // parts:
        given = np.unique(given, return_inverse=True)[1]
    counts = (prompt + output - 1) // block_size_tokens
    spoken = prompt if known_tokens is None else np.asarray(known_tokens, dtype=np.int64)
    known = np.minimum(np.minimum(given_counts * parts, spoken // block_size_tokens), counts)
    return counts, _cut(given_counts, given, counts, known, parts, (int(given.max(initial=-1)) + 1) * parts)


@kernel(allocates=True)
def _cut(given_counts, given, counts, known, parts, fresh):  # noqa: ANN001, ANN202
    """The engine's blocks: of each request `known` ones, parts of the given; the rest is numbered from `fresh`."""
    flat = np.empty(counts.sum(), dtype=np.int64)
    at, given_at = 0, 0
    for i in range(counts.size):
        for j in range(known[i]):
            flat[at + j] = given[given_at + j // parts] * parts + j % parts
        for j in range(known[i], counts[i]):
            flat[at + j] = fresh + at + j
        at += counts[i]
        given_at += given_counts[i]
    return flat


def load_hashes(fleet: Fleet, w: int, hashes: Ragged, check: bool = True) -> None:
    """Gives the first requests of world w their block hashes, in the engine's blocks; the others have none.

    Args:
        fleet: The fleet, allocated with `max_hashes`.
        w: World; load it before its requests are submitted.
        hashes: Ragged, of prompts and, where a follow-up may find them, of generated blocks.
        check: False for lists that `engine_hashes` made.

    Raises:
        InputError: The lists are not legal or do not fit.
    """
    counts, flat = _ragged(hashes, len(hashes[0])) if check else hashes
    requests, slots = fleet.requests[w], fleet.slots[w]
    if counts.size > requests.size or flat.size > fleet.max_hashes:
        raise InputError(
            f"block hashes: {flat.size} of {counts.size} requests; "
            f"legal is at most {fleet.max_hashes} of {requests.size}"
        )
    start = slots.size - fleet.max_hashes
    requests["hash_count"] = 0
    requests["hash_count"][: counts.size] = counts
    requests["hash_at"][: counts.size] = start + np.cumsum(counts) - counts
    write_stretches(slots, requests["hash_at"], counts, *dense(flat))
