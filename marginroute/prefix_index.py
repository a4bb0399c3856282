"""The gateway's own record of where prompts have gone: which candidate probably still caches how much of a prompt.

A prompt is a list of block hashes; a hash stands for a block of tokens and everything before it (`block_hashes`), so
the longest run of known hashes from the first one on is what an engine could reuse. Per candidate the index keeps the
blocks sent there, at most as many as the engine's cache holds, and forgets the least recently used one, the end of a
prompt before its beginning, as vLLM does. It is an estimate: an engine also needs room for running requests and
generated tokens, and so keeps less; what it reuses is at most what an index of its size says, for requests sent one
after the other. Where a time to live is given (a provider's prompt cache), a block is forgotten that long after it was
last sent.

One dictionary from hash to the set of its candidates (bits of an integer) answers for all candidates in one pass over
the prompt. The simulated gateway and the real one use this class; it may be shared by threads.
"""

from __future__ import annotations

import hashlib
import math
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np

from marginroute.errors import InputError

Array = np.ndarray[Any, Any]

MAX_BLOCKS = 4096  # blocks of a prompt that are looked up and remembered; what a longer prompt goes on with is ignored
PROVIDER_TOKENS = 1 << 22  # prompt tokens remembered per provider, whose own capacity nobody knows


def block_hashes(tokens: Sequence[int] | bytes, block_size: int) -> list[int]:
    """Hashes of the full blocks of a prompt, each of its block and all before it.

    Args:
        tokens: token ids, or the prompt's UTF-8 bytes where the gateway does not tokenise.
        block_size: tokens (or bytes) per block, 1 or more.

    Returns:
        One integer from 0 to 2**63 - 1 per full block; equal prompts have equal ones in every process.
    """
    if block_size < 1:
        raise InputError(f"block_size = {block_size}; legal is 1 or more")
    data = tokens if isinstance(tokens, bytes) else np.asarray(tokens, dtype="<i8").tobytes()
    width = block_size * (1 if isinstance(tokens, bytes) else 8)
    return list(_chain(data[at : at + width] for at in range(0, len(data) - width + 1, width)))


def _chain(blocks: Iterable[bytes]) -> Iterator[int]:
    digest = b""
    for block in blocks:
        digest = hashlib.blake2b(digest + block, digest_size=8).digest()
        yield int.from_bytes(digest, "little") >> 1


class PrefixIndex:
    """Block hashes that a gateway has sent to each candidate, bounded per candidate, least recently used out first."""

    def __init__(self, capacity_blocks: Sequence[int], ttl_s: Sequence[float] | None = None) -> None:
        """An empty index.

        Args:
            capacity_blocks: (C,) most blocks to remember per candidate, such as the blocks of its KV cache; 0: none.
            ttl_s: (C,) seconds after its last use that a block is gone, inf for never; None: never anywhere.

        Raises:
            InputError: a capacity is negative, or a time to live is not positive.
        """
        for c, capacity in enumerate(capacity_blocks):
            if capacity < 0:
                raise InputError(f"capacity_blocks[{c}] = {capacity}; legal is 0 or more")
        lives_s = [math.inf] * len(capacity_blocks) if ttl_s is None else list(ttl_s)
        for c, life_s in enumerate(lives_s):
            if not life_s > 0.0:
                raise InputError(f"ttl_s[{c}] = {life_s}; legal is more than 0")
        self._mortal = [(c, life_s) for c, life_s in enumerate(lives_s) if life_s < math.inf]
        self._capacity = tuple(int(capacity) for capacity in capacity_blocks)
        self._recent: tuple[OrderedDict[int, float], ...] = tuple(OrderedDict() for _ in self._capacity)
        self._holders: dict[int, int] = {}  # hash -> bit c: candidate c has it
        self._everyone = (1 << len(self._capacity)) - 1
        self._lock = threading.Lock()

    @property
    def n_candidates(self) -> int:
        """C."""
        return len(self._capacity)

    def size(self, candidate: int) -> int:
        """Blocks remembered for a candidate, those that nobody has missed since they expired included."""
        return len(self._recent[candidate])

    def match(self, hashes: Iterable[int], now_s: float = 0.0) -> Array:
        """Blocks from the first one on that each candidate has been sent, (C,) int64; takes one pass over the prompt.

        Looking does not count as use: a request may go elsewhere. Times must not fall from call to call.
        """
        length = np.zeros(self.n_candidates, dtype=np.int64)
        alive, n = self._everyone, 0
        with self._lock:
            self._expire(now_s)
            for block in hashes:
                remaining = alive & self._holders.get(block, 0)
                if remaining != alive:
                    for c in _bits(alive & ~remaining):
                        length[c] = n
                    alive = remaining
                    if not alive:
                        return length
                n += 1
        for c in _bits(alive):
            length[c] = n
        return length

    def insert(self, candidate: int, hashes: Sequence[int], now_s: float = 0.0) -> None:
        """Notes that a prompt was sent to a candidate; its first block becomes the most recently used one.

        Only its first blocks are kept of a prompt that is longer than the candidate's capacity.
        """
        recent, bit, capacity = self._recent[candidate], 1 << candidate, self._capacity[candidate]
        with self._lock:
            for block in reversed(hashes[:capacity]):
                if block in recent:
                    recent.move_to_end(block)
                else:
                    self._holders[block] = self._holders.get(block, 0) | bit
                recent[block] = now_s
            for block in list(islice(recent, max(len(recent) - capacity, 0))):
                del recent[block]
                self._drop(block, bit)

    def blocks(self, candidate: int) -> list[tuple[int, float]]:
        """(hash, last use) of what is remembered for a candidate, least recently used first."""
        with self._lock:
            return list(self._recent[candidate].items())

    def insert_all(self, candidate: int, blocks: Sequence[tuple[int, float]]) -> None:
        """Takes over what another index remembered, in its order."""
        recent, bit, capacity = self._recent[candidate], 1 << candidate, self._capacity[candidate]
        with self._lock:
            for block, used_at_s in blocks[max(len(blocks) - capacity, 0) :]:
                self._holders[block] = self._holders.get(block, 0) | bit
                recent[block] = used_at_s

    def _expire(self, now_s: float) -> None:
        for c, life_s in self._mortal:
            recent = self._recent[c]
            while recent:
                block, used_at_s = next(iter(recent.items()))
                if used_at_s + life_s >= now_s:
                    break
                del recent[block]
                self._drop(block, 1 << c)

    def _drop(self, block: int, bit: int) -> None:
        holders = self._holders[block] & ~bit
        if holders:
            self._holders[block] = holders
        else:
            del self._holders[block]


def _bits(mask: int) -> Iterator[int]:
    """Positions of the bits that are set."""
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low
