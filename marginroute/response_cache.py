"""The response cache of a gateway: answers by prompt, and by nearness of meaning, with the risk of a wrong one.

`p_reuse` is the model of that risk: an answer stored for one prompt is right for another one of similarity s with

    P(right | s) = L((s - half) / width) / L((1 - half) / width),   L(x) = 1 / (1 + exp(-x))

which is 1 for the same prompt. `PUBLIC_HALF` and `PUBLIC_WIDTH` follow from the table of hit ratio h and accuracy a by
threshold that AWS publishes for 63,796 chatbot queries (docs.aws.amazon.com, AmazonElastiCache,
semantic-caching-benchmarks: Titan Text Embeddings V2, SemBenchmarkLmArena; November 2025): hits between two thresholds
are right as often as (h a - h' a') / (h - h') says, over the 92.4 % that the strict thresholds reach: 0.99 at
similarities around 0.925, 0.96 at 0.85, 0.78 at 0.775, 0.04 at 0.625. Kinds of work differ widely from that curve
(vCache, arXiv 2502.03771), which is what a tuned or learned policy has to find out.

`ResponseCache` is the index: cosine similarity over embeddings that the gateway gives, a partition per tenant unless
answers are shared, TTL, and least recently used eviction over all partitions. NumPy alone; a look-up among n answers of
a partition is one product of a matrix (n, D) with a vector.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from marginroute.errors import InputError

Array = np.ndarray[Any, Any]
Number = Any  # a float, or an array of floats

PUBLIC_HALF, PUBLIC_WIDTH = 0.735, 0.035
SHIPPED_SIMILARITY = 0.8
"""Threshold from which gateways answer: GPTCache's default, and LiteLLM's documented `similarity_threshold`."""


def p_reuse(similarity: Number, half: Number = PUBLIC_HALF, width: Number = PUBLIC_WIDTH) -> Number:
    """P(an answer is right for another prompt of this similarity); 1 at similarity 1."""
    return (1.0 + np.exp((half - 1.0) / width)) / (1.0 + np.exp((half - similarity) / width))


def needed_similarity(uniform: Number, half: Number, width: Number) -> Number:
    """The similarity s with `p_reuse(s) = uniform`: drawn from uniform numbers, P(needed <= s) is `p_reuse(s)`."""
    rest = (1.0 + np.exp((half - 1.0) / width)) / np.maximum(uniform, 1e-300) - 1.0
    return half - width * np.log(rest)


@dataclass(frozen=True)
class Hit:
    """The nearest stored answer.

    Attributes:
        key: of the prompt that it answered.
        similarity: cosine with the prompt that is asked, 1 for the same key.
        age_s: since it was stored.
        tier: index of the model that gave it.
        answer: what was stored.
    """

    key: str
    similarity: float
    age_s: float
    tier: int
    answer: Any = None


@dataclass
class _Entry:
    row: int
    tier: int
    answer: Any


@dataclass
class _Partition:
    """Answers of one tenant: row `entries[key].row` of the arrays belongs to `keys[row]`."""

    vectors: Array  # (rows, D)
    stored_at_s: Array  # (rows,)
    keys: list[str] = field(default_factory=list)
    entries: dict[str, _Entry] = field(default_factory=dict)

    def grow(self) -> None:
        """Doubles the rows."""
        self.vectors = np.concatenate([self.vectors, np.empty_like(self.vectors)])
        self.stored_at_s = np.concatenate([self.stored_at_s, np.empty_like(self.stored_at_s)])


class ResponseCache:
    """Stored answers by meaning.

    Not thread-safe: callers that share it between threads hold a lock of their own.

    Args:
        dimensions: D, of the embeddings.
        capacity: answers kept over all partitions; the least recently used goes first.
        ttl_s: seconds after which an answer is gone.
        min_similarity: below it nothing is found.
        shared: True lets tenants find each other's answers.

    Raises:
        InputError: a size that is not positive.
    """

    def __init__(
        self, dimensions: int, capacity: int, ttl_s: float, min_similarity: float = 0.5, shared: bool = False
    ) -> None:
        for name, value in (("dimensions", dimensions), ("capacity", capacity), ("ttl_s", ttl_s)):
            if value <= 0:
                raise InputError(f"response cache: {name} is {value}; legal is more than 0")
        self._dimensions, self._capacity, self._ttl_s = dimensions, capacity, ttl_s
        self._min_similarity, self._shared = min_similarity, shared
        self._partitions: dict[str, _Partition] = {}
        self._used: OrderedDict[tuple[str, str], None] = OrderedDict()  # least recently used first

    def __len__(self) -> int:
        """Answers stored; those that have outlived their time go when their place is needed."""
        return len(self._used)

    def look_up(self, tenant: str, key: str, embedding: Array, now_s: float) -> Hit | None:
        """The nearest answer that this tenant may have, or None; looking does not count as use.

        Args:
            tenant: who asks.
            key: identity of the prompt's words (such as a hash): the same key is similarity 1.
            embedding: (D,) of the prompt, any length but 0.
            now_s: seconds on the clock that `store` is given, too.

        Raises:
            InputError: the embedding has another shape.
        """
        part = self._partitions.get(self._name(tenant))
        vector = self._unit(embedding)
        if part is None:
            return None
        size = len(part.keys)
        similarity = part.vectors[:size] @ vector
        same = part.entries.get(key)
        if same is not None:
            similarity[same.row] = 1.0
        similarity[now_s - part.stored_at_s[:size] > self._ttl_s] = -1.0
        fresh_same = same is not None and similarity[same.row] > 0.0
        row = same.row if same is not None and fresh_same else int(similarity.argmax())
        if similarity[row] < self._min_similarity:
            return None
        found = part.entries[part.keys[row]]
        age_s = now_s - float(part.stored_at_s[row])
        return Hit(part.keys[row], min(float(similarity[row]), 1.0), age_s, found.tier, found.answer)

    def use(self, tenant: str, key: str) -> None:
        """An answer was given out: it becomes the most recently used one."""
        if (self._name(tenant), key) in self._used:
            self._used.move_to_end((self._name(tenant), key))

    def store(self, tenant: str, key: str, embedding: Array, tier: int, now_s: float, answer: Any = None) -> None:
        """Keeps an answer, in place of an older one of the same key; evicts the least recently used if full."""
        name, vector = self._name(tenant), self._unit(embedding)
        if (name, key) in self._used:
            self._forget(name, key)
        elif len(self._used) >= self._capacity:
            self._forget(*next(iter(self._used)))
        if name not in self._partitions:
            self._partitions[name] = _Partition(np.empty((8, self._dimensions), dtype=np.float32), np.empty(8))
        part = self._partitions[name]
        row = len(part.keys)
        if row == len(part.vectors):
            part.grow()
        part.vectors[row], part.stored_at_s[row] = vector, now_s
        part.keys.append(key)
        part.entries[key] = _Entry(row, tier, answer)
        self._used[name, key] = None

    def _name(self, tenant: str) -> str:
        return "" if self._shared else tenant

    def _unit(self, embedding: Array) -> Array:
        vector = np.asarray(embedding, dtype=np.float32)
        length = float(np.linalg.norm(vector)) if vector.shape == (self._dimensions,) else 0.0
        if not length > 0.0:
            raise InputError(
                f"response cache: embedding of shape {vector.shape}; legal is a vector of {self._dimensions} "
                "numbers that is not zero"
            )
        return vector / length

    def _forget(self, name: str, key: str) -> None:
        """Drops an answer; the last row of its partition takes its place."""
        part = self._partitions[name]
        row, last = part.entries.pop(key).row, len(part.keys) - 1
        if row != last:
            part.vectors[row], part.stored_at_s[row] = part.vectors[last], part.stored_at_s[last]
            part.keys[row] = part.keys[last]
            part.entries[part.keys[row]].row = row
        part.keys.pop()
        del self._used[name, key]
        if not part.keys:
            del self._partitions[name]
