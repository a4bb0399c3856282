"""The vLLM V1 scheduler once more, naively: one iteration at a time, lists, no shortcuts. The engine must agree.

Its KV blocks are objects in a queue, freed and evicted as in vllm/v1/core/block_pool.py (0.24 and later).
"""

from __future__ import annotations

import dataclasses
import math
from collections import deque
from collections.abc import Sequence

from envs.fleet.iteration import batch_seconds
from envs.fleet.spec import PoolSpec


@dataclasses.dataclass(eq=False)
class Block:
    """A KV block with its hash, as vLLM has it."""

    hash: int = -1
    holders: int = 0


class BlockPool:
    """KV blocks of an engine: a queue of the free ones, and those with a hash by hash, oldest first."""

    def __init__(self, n_blocks: int) -> None:
        self.queue: list[Block] = [Block() for _ in range(n_blocks)]
        self.index: dict[int, list[Block]] = {}
        self.evicted = 0

    def find(self, hashes: Sequence[int]) -> list[Block]:
        found = []
        for wanted in hashes:
            if wanted not in self.index:
                break
            found.append(self.index[wanted][0])
        return found

    def take(self, cached: list[Block], new: int) -> list[Block]:
        for block in cached:
            if block.holders == 0:
                self.queue.remove(block)
            block.holders += 1
        blocks = [self.queue.pop(0) for _ in range(new)]
        for block in blocks:
            assert block.holders == 0
            block.holders = 1
            if block.hash >= 0:
                self.index[block.hash].remove(block)
                self.index = {key: value for key, value in self.index.items() if value}
                self.evicted += 1
                block.hash = -1
        return cached + blocks

    def name(self, blocks: list[Block], hashes: Sequence[int]) -> None:
        for block, its in zip(blocks, hashes, strict=False):
            if block.hash < 0:
                block.hash = its
                self.index.setdefault(its, []).append(block)

    def free(self, blocks: list[Block]) -> None:
        for block in reversed(blocks):
            block.holders -= 1
        idle = [block for block in reversed(blocks) if block.holders == 0]
        self.queue[:0] = [block for block in idle if block.hash < 0]
        self.queue += [block for block in idle if block.hash >= 0]


@dataclasses.dataclass(eq=False)
class Naive:
    arrived_at_s: float
    prompt: int
    output: int
    patience_until_s: float = math.inf
    computed: int = 0
    generated: int = 0
    hashes: Sequence[int] = ()
    priority: int = 0
    order: int = 0
    blocks: list[Block] = dataclasses.field(default_factory=list)
    cached_tokens: int = -1
    decoding: bool = False
    restarts: int = 0
    first_s: float = math.nan
    end_s: float = math.nan
    status: str = ""

    @property
    def target(self) -> int:
        return self.prompt + self.generated

    @property
    def rank(self) -> tuple[int, int]:
        """What vLLM's priority scheduling sorts by."""
        return self.priority, self.order


def _blocks(pool: PoolSpec, tokens: int) -> int:
    return -(-tokens // pool.block_size_tokens)


class NaiveReplica:
    """One engine behind a gateway with a hold queue."""

    def __init__(self, pool: PoolSpec, requests: list[Naive], name_generated_at_once: bool = False) -> None:
        self.pool, self.arrivals = pool, deque(requests)
        self.name_generated_at_once = name_generated_at_once  # vLLM; the engine: when their request lets go
        self.held: deque[Naive] = deque()
        self.waiting: deque[Naive] = deque()
        self.running: list[Naive] = []
        self.arrived = 0
        self.speculation = pool.speculation  # of the iteration being put together
        self.left_over = 0  # of a token, in units of 2^-20
        self.kv = BlockPool(pool.kv_blocks)

    def run(self) -> None:
        now_s = 0.0
        while self.arrivals or self.held or self.waiting or self.running:
            if not (self.held or self.waiting or self.running):
                now_s = max(now_s, self.arrivals[0].arrived_at_s)
            self._arrive(now_s)
            self._release()
            batch = self._schedule(now_s)
            if not batch:
                assert not self.running or self.pool.scheduling_policy == "priority"
                self._release()
                continue
            decodes = [r.computed + 1 for r, _ in batch if r.decoding]
            chunks = [(n, r.computed) for r, n in batch if not r.decoding]
            if decodes and self.speculation is not None:
                self.left_over = (self.left_over + self.speculation.pace) % 2**20
            now_s += batch_seconds(self.pool.profile, decodes, chunks, self.speculation)
            self._arrive(math.nextafter(now_s, 0.0))
            self._finish(batch, now_s)

    def _arrive(self, now_s: float) -> None:
        while self.arrivals and self.arrivals[0].arrived_at_s <= now_s:
            self.held.append(self.arrivals.popleft())
            self.held[-1].order = self.arrived = self.arrived + 1
            self._sort(self.held)
            self._release()

    def _release(self) -> None:
        while self.held and len(self.waiting) + len(self.running) < self.pool.in_flight_cap:
            self.waiting.append(self.held.popleft())
        self._sort(self.waiting)

    def _sort(self, line: deque[Naive]) -> None:
        if self.pool.scheduling_policy == "priority":
            line_in_order = sorted(line, key=lambda request: request.rank)
            line.clear()
            line.extend(line_in_order)

    def _speculate(self) -> int:
        """Says whether the next iteration speculates, and returns how many tokens a decode gains in it."""
        decodes = sum(request.decoding for request in self.running)
        self.speculation = self.pool.speculation
        if self.speculation is None or decodes > self.speculation.max_batch:
            self.speculation = None
            return 1
        return (self.left_over + self.speculation.pace) // 2**20

    def _gain(self, request: Naive, tokens: int) -> int:
        """Tokens that a decode gains, of `tokens` that all gain."""
        return tokens

    def _schedule(self, now_s: float) -> list[tuple[Naive, int]]:
        tokens = self._speculate()
        checked = 1 if self.speculation is None else 1 + self.speculation.draft_tokens
        budget, batch, preempted = self.pool.max_num_batched_tokens, [], False
        index = 0
        while index < len(self.running) and budget > 0:
            request = self.running[index]
            chunk = self._gain(request, tokens) if request.decoding else min(request.target - request.computed, budget)
            while (need := _blocks(self.pool, request.computed + chunk) - len(request.blocks)) > len(self.kv.queue):
                victim = self._victim()
                done = [(other, n) for other, n in batch if other is victim]
                if done:
                    batch.remove(done[0])
                    budget += checked if victim.decoding else done[0][1]
                    index -= 1
                self.running.remove(victim)
                self._evict(victim)
                preempted = True
                if victim is request:
                    break
            else:
                request.blocks += self.kv.take([], need)
                if self.name_generated_at_once or not request.decoding:
                    self._name(request, chunk)
                batch.append((request, chunk))
                budget -= checked if request.decoding else chunk
                index += 1
                continue
            break
        while not preempted and self.waiting and len(self.running) < self.pool.max_num_seqs and budget > 0:
            request = self.waiting[0]
            cached = self.kv.find(request.hashes[: (request.target - 1) // self.pool.block_size_tokens])
            prefix = len(cached) * self.pool.block_size_tokens
            chunk = min(request.target - prefix, budget)
            need = _blocks(self.pool, prefix + chunk) - len(cached)
            if need + sum(block.holders == 0 for block in cached) > len(self.kv.queue):
                break
            self.waiting.popleft()
            if now_s > request.patience_until_s and math.isnan(request.first_s):
                request.status, request.end_s = "abandoned", now_s
                self._release()
                continue
            request.blocks = self.kv.take(cached, need)
            request.computed = prefix
            if request.cached_tokens < 0:
                request.cached_tokens = prefix
            self._name(request, chunk)
            self.running.append(request)
            batch.append((request, chunk))
            budget -= chunk
        return batch

    def _name(self, request: Naive, chunk: int) -> None:
        """Full blocks enter the index; `chunk` tokens more than are computed will be at the end of the iteration."""
        full = (request.computed + chunk) // self.pool.block_size_tokens
        self.kv.name(request.blocks[:full], request.hashes[:full])

    def _free(self, request: Naive) -> None:
        self._name(request, 0)
        self.kv.free(request.blocks)
        request.blocks = []

    def _victim(self) -> Naive:
        if self.pool.scheduling_policy == "priority":
            return max(self.running, key=lambda request: request.rank)
        return self.running[-1]

    def _evict(self, request: Naive) -> None:
        self._free(request)
        request.computed = 0
        request.decoding = False
        request.restarts += 1
        self.waiting.appendleft(request)
        self._sort(self.waiting)

    def _leave(self, request: Naive, status: str, now_s: float) -> None:
        self.running.remove(request)
        self._free(request)
        request.status, request.end_s = status, now_s

    def _finish(self, batch: list[tuple[Naive, int]], now_s: float) -> None:
        for request, chunk in batch:
            request.computed += chunk
            if request.computed < request.target:
                continue
            if math.isnan(request.first_s):
                if now_s > request.patience_until_s:
                    self._leave(request, "abandoned", now_s)
                    continue
                request.first_s = now_s
            request.generated += chunk if request.decoding else 1
            request.decoding = True
            if request.generated >= request.output:
                self._leave(request, "completed", now_s)
        self._release()
