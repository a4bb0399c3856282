"""The least engine time that tokens take: a linear floor under every iteration that a pool's profile allows.

An iteration with P prefill tokens in chunks c_i behind prefixes x_i, and n decodes that attend K tokens, takes at
least

    alpha P + beta n + gamma K + delta sum(c_i^2 + 2 c_i x_i)  seconds.

Summed over the iterations of a replica, the left-hand side of "work <= time" then depends on the requests alone: a
prompt of p tokens of which x are cached has P = p - x and sum(c^2 + 2 c x) = p^2 - x^2 however it is chunked, an
answer of o tokens has o - 1 decode tokens that attend (o - 1) p + o (o - 1) / 2 tokens. Batching, chunking and
preemption change the iterations, not these sums (a preemption adds to them), so no schedule serves more work than
time: the capacity row of the upper bound.

The floor is the one that charges most for a given mix of work: a linear program over alpha, beta, gamma >= 0 with a row
for every batch size and knot of the profile, solved by HiGHS under those rows that it turns out to need.
delta = min(a_sq, a_px / 2) needs no program.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linprog

from envs.fleet.profile import flatten_profile
from envs.fleet.spec import PoolSpec
from envs.fleet.state import PREFILL_FIRST, SCHEDULERS

Floats = NDArray[np.float64]

TOLERANCE, MOST_ROUNDS = 1e-6, 40
"""Of the search for a floor: share of an iteration by which it may be too high, before it is lowered by as much."""


@dataclass(frozen=True)
class Hull:
    """The floor of a pool.

    Attributes:
        prefill_token_s: alpha, per prompt token computed.
        decode_token_s: beta, per decode token.
        attended_token_s: gamma, per token that a decode attends.
        area_s: delta, per square token of prefill attention.
        least_prefill_token_s: shortest time per prompt token in any iteration.
        least_prefill_s: shortest iteration with a prompt token in it.
        least_decode_s: shortest iteration with a decode in it, per token that it yields to a request.
        most_tokens: that an iteration yields to a request; more than 1 with speculation, which costs no less than the
            same iteration without.
    """

    prefill_token_s: float
    decode_token_s: float
    attended_token_s: float
    area_s: float
    least_prefill_token_s: float
    least_prefill_s: float
    least_decode_s: float
    most_tokens: int = 1

    def prefill_work_s(self, prompt_tokens: Floats, cached_tokens: Floats | float = 0.0) -> Floats:
        """Least engine seconds of a prefill, (...,)."""
        area = prompt_tokens**2 - np.square(cached_tokens)
        return np.asarray(self.prefill_token_s * (prompt_tokens - cached_tokens) + self.area_s * area)

    def decode_work_s(self, prompt_tokens: Floats, output_tokens: Floats) -> Floats:
        """Least engine seconds of all decode tokens after the first, (...,)."""
        steps = output_tokens - 1.0
        attended = steps * (prompt_tokens + 0.5 * output_tokens - (self.most_tokens - 1.0))
        work_s = self.decode_token_s * steps + self.attended_token_s * np.maximum(attended, 0.0)
        return np.asarray(work_s / self.most_tokens)

    def least_ttft_s(self, prompt_tokens: Floats, cached_tokens: Floats | float = 0.0) -> Floats:
        """Shortest time from dispatch to the first token, on an idle replica."""
        return np.maximum(self.least_prefill_s, self.least_prefill_token_s * (prompt_tokens - cached_tokens))


def pool_hull(
    pool: PoolSpec, prefill_tokens: float, decode_tokens: float, attended_tokens: float, least: int | None
) -> Hull:
    """The floor that charges most for the given totals of work.

    Args:
        pool: its profile and limits.
        prefill_tokens: total of the workload, a weight of the search.
        decode_tokens: the same.
        attended_tokens: the same.
        least: shortest prompt of the workload. A preempted request computes at least `least + 1` tokens again and gets
            one output token by it; the floor charges that prefill no less than the decode it stands for. None: it may
            find all but one of them cached, so that no more than alpha is charged for a decode token.
    """
    flat, at = flatten_profile(pool.profile, pool.max_num_seqs, 0)
    slots, budget = pool.max_num_seqs, max(pool.max_num_batched_tokens, pool.max_num_seqs)
    if SCHEDULERS.get(pool.scheduler) == PREFILL_FIRST:
        budget = max(budget, pool.kv_blocks * pool.block_size_tokens)  # a longer prompt runs alone
    most_tokens = 1
    if pool.speculation is not None:
        most_tokens = math.ceil(pool.speculation.tokens_per_iteration)
        budget = max(budget, slots * (1 + pool.speculation.draft_tokens))
    delta = min(at["prefill_square_s"], 0.5 * at["prefill_product_s"])
    token_s = _token_seconds(flat, at, budget)
    mixed_s = token_s + _least_attention_s(flat, at, budget, at["prefill_square_s"] - delta)
    kv_tokens, least_decode_s = _decode_vertices(flat, at, slots, pool.kv_blocks * pool.block_size_tokens)
    alpha, beta, gamma = _steepest_floor(
        token_s, mixed_s, kv_tokens, least_decode_s, (prefill_tokens, decode_tokens, attended_tokens), least
    )
    tokens = np.arange(1, budget + 1)
    alone_s = [token_s[n] + least_decode_s[n].min() for n in range(1, slots + 1)]
    return Hull(
        alpha,
        beta,
        gamma,
        delta,
        least_prefill_token_s=max(float((mixed_s[1:] / tokens).min()), 0.0),
        least_prefill_s=max(float(mixed_s[1:].min()), 0.0),
        least_decode_s=max(float(min(alone_s)), 0.0) / most_tokens,
        most_tokens=most_tokens,
    )


def _token_seconds(flat: Floats, at: dict[str, float], budget: int) -> Floats:
    """(budget + 1,) token(T), continued with its last slope."""
    start, count = int(at["token_at"]), int(at["token_count"])
    beyond = np.maximum(np.arange(budget + 1) - (count - 1), 0)
    index = np.minimum(np.arange(budget + 1), count - 1)
    return np.asarray(flat[start + index] + beyond * at["token_tail_s"])


def _least_attention_s(flat: Floats, at: dict[str, float], budget: int, square_s: float) -> Floats:
    """(budget + 1,) least of table(prefix, q) + square_s q^2 over q up to P and any prefix; never above 0 at P = 0."""
    rows, columns = int(at["prefill_rows"]), int(at["prefill_columns"])
    table = flat[int(at["prefill_at"]) :][: rows * columns].reshape(rows, columns).min(axis=0)
    table = np.minimum(table, table * (1.0 + at["multi_prefill_share"]))
    roots = np.arange(budget + 1)
    seconds = table[np.minimum(roots, columns - 1)] + square_s * np.maximum(roots - 0.5, 0.0) ** 2
    return np.minimum.accumulate(seconds)


def _decode_vertices(flat: Floats, at: dict[str, float], slots: int, capacity: int) -> tuple[Floats, Floats]:
    """K and decode(n, K / n) at both ends of every bin of the mean length, (slots + 1, 2 B) each; row 0 is unused."""
    bins = int(at["decode_bins"])
    table = flat[int(at["decode_at"]) :][: 2 * (slots + 1) * bins].reshape(slots + 1, bins, 2)
    upper = flat[int(at["upper_at"]) :][:bins]
    n = np.arange(slots + 1.0)[:, None]
    longest = (capacity + n) / np.maximum(n, 1.0)  # blocks hold all but the token in the making
    low = np.minimum(np.concatenate([[1.0], upper[:-1]]), longest)
    high = np.minimum(upper + 1.0, longest)
    mean = np.concatenate([low, high], axis=1)
    base, slope = np.tile(table[..., 0], 2), np.tile(table[..., 1], 2)
    return mean * n, base + slope * mean


def _steepest_floor(
    token_s: Floats,
    mixed_s: Floats,
    kv_tokens: Floats,
    decode_s: Floats,
    weight: tuple[float, float, float],
    least: int | None,
) -> tuple[float, float, float]:
    """Maximises the weighted sum of (alpha, beta, gamma) under every batch.

    There are too many batches to list them. The program is solved under a few, then those that its floor overcharges
    most join them, until there are none; the floor is lowered by what is left.
    """
    slots, tokens = len(decode_s) - 1, np.arange(1.0, len(token_s))
    alone = [int((mixed_s[1:] / tokens).argmin()) + 1]  # a batch of prompts
    found = [np.array([[alone[0], 0.0, 0.0]])], [mixed_s[alone]]
    for n in {1, slots}:
        found[0].append(np.stack([np.zeros(len(kv_tokens[n])), np.full(len(kv_tokens[n]), float(n)), kv_tokens[n]], 1))
        found[1].append(token_s[n] + decode_s[n])
    always = np.array([[-1.0, 1.0, 0.0], [0.0, 0.0, 1.0]] if least is None else [[-1.0 - least, 1.0, 1.0 + least]])
    for _ in range(MOST_ROUNDS):
        batches, seconds = np.concatenate(found[0]), np.concatenate(found[1])
        if seconds.min() <= 0.0:  # a profile with iterations of no time at all
            return 0.0, 0.0, 0.0
        floor = _best_floor(batches, seconds, always, np.maximum(weight, 1e-9))
        batches, seconds = _fullest(token_s, mixed_s, kv_tokens, decode_s, floor)
        over = batches @ floor > seconds
        excess = float((batches[over] @ floor / np.maximum(seconds[over], 1e-300)).max(initial=1.0)) - 1.0
        if excess <= TOLERANCE:
            break
        found[0].append(batches[over])
        found[1].append(seconds[over])
    alpha, beta, gamma = floor / (1.0 + excess)
    gamma = min(gamma, alpha) if least is not None else 0.0
    return alpha, min(beta, alpha if least is None else (least + 1.0) * (alpha - gamma)), gamma


def _best_floor(batches: Floats, seconds: Floats, always: Floats, weight: Floats) -> Floats:
    """(3,) floor of the greatest weighted sum under batches (R, 3) of (R,) seconds, and `always` (A, 3) <= 0."""
    shares = batches / seconds[:, None]
    unit = 1.0 / shares.max(axis=0)  # the most that each could be alone
    more = always * unit / np.abs(always * unit).max(axis=1, keepdims=True)
    limits = np.concatenate([np.ones(len(shares)), np.zeros(len(more))])
    gain = weight * unit
    solved = linprog(-gain / gain.max(), np.concatenate([shares * unit, more]), limits, method="highs")
    if not solved.success:
        raise RuntimeError(f"HiGHS did not find a pool's floor: {solved.message}")
    return np.asarray(np.maximum(solved.x, 0.0) * unit)


def _fullest(
    token_s: Floats, mixed_s: Floats, kv_tokens: Floats, decode_s: Floats, floor: Floats
) -> tuple[Floats, Floats]:
    """For every number of decodes the batch that a floor overcharges most, (N + 1, 3), and its seconds, (N + 1,).

    With T = n + P tokens the prompts and the attention of a batch are chosen apart: alpha T - token(T) and
    gamma K - decode(n, K) are to be greatest.
    """
    alpha, _, gamma = floor
    budget, n = len(token_s) - 1, np.arange(len(decode_s))
    gain_s = alpha * np.arange(budget + 1) - mixed_s
    after = np.maximum.accumulate(gain_s[::-1])[::-1]  # greatest from T on
    next_n = np.minimum(n + 1, budget)
    mixed = n + 1 <= budget
    mixed &= (n == 0) | (after[next_n] > alpha * n - token_s[n])
    tokens = np.where(mixed, np.searchsorted(-after, -after[next_n], side="right") - 1, n)
    vertex = (gamma * kv_tokens - decode_s).argmax(axis=1)
    kv = np.where(n > 0, kv_tokens[n, vertex], 0.0)
    seconds = np.where(mixed, mixed_s[tokens], token_s[n]) + np.where(n > 0, decode_s[n, vertex], 0.0)
    return np.stack([tokens - n, n, kv], axis=1).astype(np.float64), seconds
