"""Prompt tokens that candidates probably have cached, from the block hashes that a gateway has sent them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import islice

import numpy as np

from marginroute import view as v
from marginroute.errors import InputError
from marginroute.prefix_index import MAX_BLOCKS, PrefixIndex
from marginroute.view import Array


class CachedPrompts:
    """A prefix index over a bundle's replicas and providers, in tokens. Thread-safe.

    Args:
        static_signals: (S_static, C) of the candidates: sizes of their prefix caches, and how long those last.
        block_tokens: tokens that a block hash of a prompt stands for, about; 0: prompts are not hashed.

    Attributes:
        known: whether block hashes tell anything: prompts are hashed, and some candidate has a prefix cache.

    Raises:
        InputError: a negative number of tokens.
    """

    def __init__(self, static_signals: Array, block_tokens: int) -> None:
        if block_tokens < 0:
            raise InputError(f"prefix_block_tokens = {block_tokens}; legal is 0 (none) or more")
        capacity_tokens, ttl_s = static_signals[[v.PREFIX_CAPACITY_TOKENS, v.PREFIX_TTL_S]]
        self._block_tokens = block_tokens
        self._index: PrefixIndex | None = None
        self.known = block_tokens > 0 and bool(capacity_tokens.any())
        if self.known:
            capacity_blocks = [int(tokens) // block_tokens for tokens in capacity_tokens]
            lives_s = [math.inf if s >= v.UNLIMITED or s <= 0.0 else float(s) for s in ttl_s]
            self._index = PrefixIndex(capacity_blocks, lives_s)

    def tokens(
        self, prompt_tokens: int, hashes: Sequence[int], block_tokens: float | None, now_s: float
    ) -> Array | None:
        """(C,) tokens of a prompt that are cached; the last one is always computed. None: nothing is known.

        Args:
            prompt_tokens: known or estimated.
            hashes: of the prompt's blocks (`prefix_index.block_hashes`).
            block_tokens: tokens per block of this prompt; None: the usual number.
            now_s: of the gateway's clock.
        """
        if self._index is None or not hashes:
            return None
        blocks = self._index.match(islice(hashes, MAX_BLOCKS), now_s)
        each = self._block_tokens if block_tokens is None else block_tokens
        return np.minimum(np.floor(blocks * each), max(prompt_tokens - 1, 0))

    def sent(
        self, candidate: int, prompt_tokens: int, hashes: Sequence[int], block_tokens: float | None, now_s: float
    ) -> int:
        """A prompt leaves for a candidate, which has it cached from now on; tokens that it had before."""
        cached = self.tokens(prompt_tokens, hashes, block_tokens, now_s)
        if cached is None or self._index is None:
            return 0
        self._index.insert(candidate, hashes[:MAX_BLOCKS], now_s)
        return int(cached[candidate])

    def take_over(self, old: CachedPrompts, candidates: Mapping[int, int]) -> None:
        """Goes on where those of an earlier bundle end, if blocks are as long; `candidates` leads to these indices."""
        if self._index and old._index and self._block_tokens == old._block_tokens:
            for theirs, c in candidates.items():
                self._index.insert_all(c, old._index.blocks(theirs))
