"""The vLLM V1 scheduler once more, naively: one iteration at a time, lists, no shortcuts. The engine must agree."""

from __future__ import annotations

import dataclasses
import math
from collections import deque

from envs.fleet.iteration import batch_seconds
from envs.fleet.state import PoolSpec


@dataclasses.dataclass
class Naive:
    arrived_at_s: float
    prompt: int
    output: int
    patience_until_s: float = math.inf
    computed: int = 0
    generated: int = 0
    blocks: int = 0
    decoding: bool = False
    restarts: int = 0
    first_s: float = math.nan
    end_s: float = math.nan
    status: str = ""

    @property
    def target(self) -> int:
        return self.prompt + self.generated


def _blocks(pool: PoolSpec, tokens: int) -> int:
    return -(-tokens // pool.block_size_tokens)


class NaiveReplica:
    """One engine behind a gateway with a hold queue."""

    def __init__(self, pool: PoolSpec, requests: list[Naive]) -> None:
        self.pool, self.arrivals = pool, deque(requests)
        self.held: deque[Naive] = deque()
        self.waiting: deque[Naive] = deque()
        self.running: list[Naive] = []
        self.free = pool.kv_blocks

    def run(self) -> None:
        now_s = 0.0
        while self.arrivals or self.held or self.waiting or self.running:
            if not (self.held or self.waiting or self.running):
                now_s = max(now_s, self.arrivals[0].arrived_at_s)
            self._arrive(now_s)
            batch = self._schedule(now_s)
            if not batch:
                assert not self.running
                self._release()
                continue
            decodes = [r.computed + 1 for r, _ in batch if r.decoding]
            chunks = [(n, r.computed) for r, n in batch if not r.decoding]
            now_s += batch_seconds(self.pool.profile, decodes, chunks)
            self._finish(batch, now_s)

    def _arrive(self, now_s: float) -> None:
        while self.arrivals and self.arrivals[0].arrived_at_s <= now_s:
            self.held.append(self.arrivals.popleft())
        self._release()

    def _release(self) -> None:
        while self.held and len(self.waiting) + len(self.running) < self.pool.in_flight_cap:
            self.waiting.append(self.held.popleft())

    def _schedule(self, now_s: float) -> list[tuple[Naive, int]]:
        budget, batch, preempted = self.pool.max_num_batched_tokens, [], False
        index = 0
        while index < len(self.running) and budget > 0:
            request = self.running[index]
            chunk = min(request.target - request.computed, budget)
            while (need := _blocks(self.pool, request.computed + chunk) - request.blocks) > self.free:
                victim = self.running.pop()
                self._evict(victim)
                preempted = True
                if victim is request:
                    break
            else:
                self._take(request, need)
                batch.append((request, chunk))
                budget -= chunk
                index += 1
                continue
            break
        while not preempted and self.waiting and len(self.running) < self.pool.max_num_seqs and budget > 0:
            request = self.waiting[0]
            chunk = min(request.target, budget)
            need = _blocks(self.pool, chunk)
            if need > self.free:
                break
            self.waiting.popleft()
            if now_s > request.patience_until_s and math.isnan(request.first_s):
                request.status, request.end_s = "abandoned", now_s
                self._release()
                continue
            self._take(request, need)
            self.running.append(request)
            batch.append((request, chunk))
            budget -= chunk
        return batch

    def _take(self, request: Naive, need: int) -> None:
        request.blocks += need
        self.free -= need

    def _evict(self, request: Naive) -> None:
        self.free += request.blocks
        request.blocks = request.computed = 0
        request.decoding = False
        request.restarts += 1
        self.waiting.appendleft(request)

    def _leave(self, request: Naive, status: str, now_s: float) -> None:
        self.running.remove(request)
        self.free += request.blocks
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
            request.generated += 1
            request.decoding = True
            if request.generated == request.output:
                self._leave(request, "completed", now_s)
        self._release()
