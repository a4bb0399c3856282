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
for every batch size and knot of the profile, solved by HiGHS. delta = min(a_sq, a_px / 2) needs no program.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.optimize import linprog

from envs.fleet.profile import flatten_profile
from envs.fleet.state import PREFILL_FIRST, SCHEDULERS, PoolSpec

Floats = NDArray[np.float64]


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

    With T = n + P the rows separate: u_n >= alpha T - token(T) for T >= n, v_n >= gamma K - decode(n, K), and
    u_n + v_n + (beta - alpha) n <= 0. Columns: alpha, beta, gamma, u_0..u_N, v_1..v_N.
    """
    slots, budget = len(decode_s) - 1, len(token_s) - 1
    u, v = 3, 3 + slots  # u + n, v + n
    rows: list[tuple[Floats, Floats, Floats]] = []  # (columns, values) of one row each, and its right-hand side

    def add(columns: list[int], values: list[float], right: float) -> None:
        rows.append((np.array(columns), np.array(values), np.array([right])))

    for n in range(slots + 1):
        add([0, u + n], [float(n), -1.0], float(token_s[n]))
        if n < slots:
            add([0, u + n], [float(n + 1), -1.0], float(mixed_s[n + 1]))
            add([u + n + 1, u + n], [1.0, -1.0], 0.0)
    for tokens in range(slots + 1, budget + 1):
        add([0, u + slots], [float(tokens), -1.0], float(mixed_s[tokens]))
    add([u], [1.0], 0.0)
    for n in range(1, slots + 1):
        for kv, seconds in zip(kv_tokens[n], decode_s[n], strict=True):
            add([2, v + n], [float(kv), -1.0], float(seconds))
        add([u + n, v + n, 1, 0], [1.0, 1.0, float(n), -float(n)], 0.0)
    if least is None:
        add([1, 0], [1.0, -1.0], 0.0)
        add([2], [1.0], 0.0)
    else:
        add([1, 2, 0], [1.0, least + 1.0, -(least + 1.0)], 0.0)
    counts = [len(columns) for columns, _, _ in rows]
    matrix = sparse.csr_matrix(
        (
            np.concatenate([values for _, values, _ in rows]),
            (np.repeat(np.arange(len(rows)), counts), np.concatenate([columns for columns, _, _ in rows])),
        ),
        shape=(len(rows), 4 + 2 * slots),
    )
    objective = np.zeros(4 + 2 * slots)
    objective[:3] = -np.maximum(np.array(weight), 1e-9) / max(sum(weight), 1e-9)
    limits = [(0.0, None)] * 3 + [(None, None)] * (2 * slots + 1)
    solved = linprog(objective, matrix, np.concatenate([right for _, _, right in rows]), bounds=limits, method="highs")
    if not solved.success:  # a profile with iterations of no time at all: no floor but zero
        return 0.0, 0.0, 0.0
    alpha, beta, gamma = np.maximum(solved.x[:3], 0.0) * (1.0 - 1e-7)  # the solver's tolerance
    return float(alpha), float(beta), float(gamma)
