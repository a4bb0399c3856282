r"""Seconds of one engine iteration as a function of what is in the batch.

A batch is n decodes that attend to K tokens together (mean m = K / n) and prefill chunks c_i behind prefixes x_i
that are in the KV cache already. With T = n + sum c_i tokens in the batch,

    seconds = token(T) + decode(n, m) + prefill(q) + a_sq q^2 + a_px sum c_i x_i + a_x sum x_i,   q^2 = sum c_i^2

* `token` holds the linear layers and everything else that is paid per token or per iteration;
* `decode` is the attention of the decodes. For every n it is piecewise linear in m: over the bin of mean lengths
  (u_{b-1}, u_b] it equals base[n, b] + slope[n, b] m;
* the last four terms are the attention of the prefills: work is sum c_i (x_i + (c_i + 1) / 2).

Two kinds of profile are one formula. A *compact* profile is interpolated from a few fitted knots when loaded: `token`
over T, `decode` bilinear over (n, m). A *tables* profile is Vidur's layout (arXiv 2405.05465): slope 0 and bins of 64
tokens for decodes, a matrix over (prefix rounded up to 64, q) for prefills, whose share `multi_prefill_share` is added
when several prefills meet.

Why an unchanged decode batch can be skipped over exactly: from one iteration to the next K grows by n, so m grows by
one, and inside a bin the j-th iteration takes `first + j * growth` with growth = slope[n, b]. k of them take
k first + growth k (k - 1) / 2.
"""

# ruff: noqa: ANN001, ANN201 (Numba infers the types of kernels)
from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from envs.fleet.profile import Profile, flatten_profile
from envs.fleet.speculation import Speculation
from envs.fleet.state import POOL, record_array
from envs.kernels import kernel


@kernel
def token_seconds(pool, tables, tokens):
    """token(T)."""
    last = pool.token_count - 1
    if tokens <= last:
        return tables[pool.token_at + tokens]
    return tables[pool.token_at + last] + (tokens - last) * pool.token_tail_s


@kernel
def decode_bin(pool, tables, batch, kv_sum):
    """Bin of the mean decode length floor(K / n)."""
    edge = (kv_sum // batch + 63) // 64
    return int(tables[pool.bin_at + min(edge, pool.bin_count - 1)])


@kernel
def bin_iterations(pool, tables, batch, kv_sum, bin_index):
    """Iterations, this one included, whose mean length stays in the bin."""
    return int(tables[pool.upper_at + bin_index]) - kv_sum // batch + 1


@kernel
def decode_growth(pool, tables, batch, bin_index):
    """Seconds by which each iteration of an unchanged decode batch is longer than the one before."""
    return tables[pool.decode_at + 2 * (batch * pool.decode_bins + bin_index) + 1]


@kernel
def decode_seconds(pool, tables, batch, kv_sum, bin_index):
    """decode(n, m) of a batch of one or more."""
    at = pool.decode_at + 2 * (batch * pool.decode_bins + bin_index)
    return tables[at] + tables[at + 1] * (kv_sum / batch)


class Prefills(NamedTuple):
    """Sums over the prefills of one iteration: chunks of c_i tokens behind prefixes of x_i."""

    count: int
    tokens: int  # sum c_i
    squares: float  # q^2 = sum c_i^2
    products: float  # sum c_i x_i
    prefix_tokens: int  # sum x_i
    rounded_tokens: int  # sum of x_i, each rounded up to 64 tokens


NO_PREFILLS = Prefills(0, 0, 0.0, 0.0, 0, 0)


@kernel
def with_prefill(prefills, chunk, prefix):
    """`Prefills` with one more: `chunk` tokens behind a prefix of `prefix` tokens."""
    return Prefills(
        prefills.count + 1,
        prefills.tokens + chunk,
        prefills.squares + float(chunk) * chunk,
        prefills.products + float(chunk) * prefix,
        prefills.prefix_tokens + prefix,
        prefills.rounded_tokens + (prefix + 63) // 64 * 64,
    )


@kernel
def prefill_seconds(pool, tables, prefills):
    """Attention of the `Prefills` of one iteration."""
    if prefills.count == 0:
        return 0.0
    root = min(int(np.rint(math.sqrt(prefills.squares))), pool.prefill_columns - 1)
    row = min(prefills.rounded_tokens // 64, pool.prefill_rows - 1)
    seconds = tables[pool.prefill_at + row * pool.prefill_columns + root]
    if prefills.count > 1:
        seconds *= 1.0 + pool.multi_prefill_share
    seconds += pool.prefill_square_s * prefills.squares
    seconds += pool.prefill_product_s * prefills.products
    return seconds + pool.prefill_prefix_s * float(prefills.prefix_tokens)


@kernel
def draft_seconds(pool, tables, batch, attention_s):
    """Seconds of the draft's steps beside a batch whose decodes attend for `attention_s` (see speculation.py)."""
    return pool.draft_tokens * pool.draft_cost * (token_seconds(pool, tables, batch) + attention_s)


def batch_seconds(
    profile: Profile,
    decodes: Sequence[int] | npt.NDArray[np.int64],
    chunks: Sequence[tuple[int, int]] = (),
    speculation: Speculation | None = None,
) -> float:
    """Seconds of one iteration with the given decode lengths and (chunk, prefix) prefills, from the kernels."""
    return _seconds(*_flattened(profile, max(len(decodes), 1)), decodes, chunks, speculation)


def _flattened(profile: Profile, most: int) -> tuple[Any, Any]:
    """A profile's tables and the pool that points into them, for batches of up to `most` decodes."""
    flat, fields = flatten_profile(profile, most, 0)
    pools = record_array(1, POOL)
    for field, value in fields.items():
        pools[field][0] = value
    return flat, pools[0]


def _seconds(
    flat: Any,
    pool: Any,
    decodes: Sequence[int] | npt.NDArray[np.int64],
    chunks: Sequence[tuple[int, int]],
    speculation: Speculation | None,
) -> float:
    batch, kv_sum = len(decodes), int(np.sum(decodes, dtype=np.int64))
    checked = 1
    if speculation is not None and batch <= speculation.max_batch:
        pool["draft_tokens"], pool["draft_cost"] = speculation.draft_tokens, speculation.draft_cost
        checked = 1 + speculation.draft_tokens
    prefills = NO_PREFILLS
    for chunk, prefix in chunks:
        prefills = with_prefill(prefills, chunk, prefix)
    seconds = token_seconds(pool, flat, batch * checked + prefills.tokens)
    if batch:
        attention_s = decode_seconds(pool, flat, batch, kv_sum, decode_bin(pool, flat, batch, kv_sum))
        seconds += attention_s + (draft_seconds(pool, flat, batch, attention_s) if checked > 1 else 0.0)
    return float(seconds + prefill_seconds(pool, flat, prefills))


@lru_cache(maxsize=64)
def linear_coefficients(profile: Profile, speculation: Speculation | None = None) -> tuple[float, float, float, float]:
    """The best linear description of an iteration, which is what a gateway may know of an engine.

    With speculation it is one of the seconds per token: those of an iteration without prefill, over the tokens that it
    yields, and beside it what the prefill adds.

    Returns:
        base_s, per_prefill_token_s, per_decode_seq_s, per_kv_token_s: least squares of the relative error over batches
        of 1-128 decodes of mean length 128-4096, with and without a prefill chunk of 64-2048 tokens.
    """
    rows, seconds = [], []
    top = min(128, max(len(profile.decode_base_s) - 1, 1))
    flat, pool = _flattened(profile, top)
    for batch in sorted({1, 8, 32, 64, 96, top} & set(range(1, top + 1))):
        for mean in (128, 512, 1024, 2048, 4096):
            for chunk in (0, 64, 256, 512, 1024, 2048):
                rows.append([1.0, chunk, batch, batch * mean])
                chunks = [(chunk, 0)] if chunk else []
                means = np.full(batch, mean)
                whole_s = _seconds(flat, pool, means, chunks, speculation)
                if speculation is not None and batch <= speculation.max_batch:
                    decode_s = _seconds(flat, pool, means, (), speculation)
                    whole_s += decode_s / speculation.tokens_per_iteration - decode_s
                seconds.append(whole_s)
    design, target = np.array(rows), np.array(seconds)
    solution = np.linalg.lstsq(design / target[:, None], np.ones(len(target)), rcond=None)[0]
    return tuple(float(max(value, 0.0)) for value in solution)  # type: ignore[return-value]
