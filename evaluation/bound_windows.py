"""The cheapest bucket of every window in which an option may do its work, compiled: the inner loop of the bounds.

A table of range minima, `usd[k, s, b]`: the lowest price of station s in the 2^k buckets from b. A window is covered by
two such runs, so that four places in the table say what an option's prefill and decode cost at least.
"""

# ruff: noqa: ANN001, ANN201 (Numba infers the types of kernels)
from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from envs.kernels import kernel

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


class Ways(NamedTuple):
    """Options as the kernels take them, O of them, float64; places in the table are int32."""

    value_usd: Any  # (O,)
    prefill_s: Any  # (O,)
    decode_s: Any  # (O,)
    prefill_left: Any  # (O,) place of the run that begins with the window
    prefill_right: Any  # (O,) place of the run that ends with it
    decode_left: Any  # (O,)
    decode_right: Any  # (O,)


def runs(station: Ints, first: Ints, last: Ints, stations: int, buckets: int) -> tuple[Ints, Ints, int]:
    """Places (O,), (O,) of the two runs that cover each window of buckets [first, last], and the levels that it takes.

    Args:
        station: (O,).
        first: (O,).
        last: (O,).
        stations: in the table.
        buckets: of each station in the table.
    """
    level = np.floor(np.log2(last - first + 1)).astype(np.int64)
    row = (level * stations + station) * buckets
    left, right = row + first, row + last - (1 << level) + 1
    return left.astype(np.int32), right.astype(np.int32), int(level.max(initial=0)) + 1


@kernel
def fill_table(prices, usd, at):
    """Fills the table (L, S, B + 1) and where its minima are (flat index of S, B + 1) with prices (S, B).

    The last bucket of every station is free. Of equal prices the earlier bucket counts.
    """
    levels, stations, buckets = usd.shape
    for s in range(stations):
        for b in range(buckets):
            usd[0, s, b] = prices[s, b] if b < buckets - 1 else 0.0
            at[0, s, b] = s * buckets + b
    width = 1
    for level in range(1, levels):
        for s in range(stations):
            for b in range(buckets - 2 * width + 1):
                left_usd, right_usd = usd[level - 1, s, b], usd[level - 1, s, b + width]
                earlier = left_usd <= right_usd
                usd[level, s, b] = left_usd if earlier else right_usd
                at[level, s, b] = at[level - 1, s, b] if earlier else at[level - 1, s, b + width]
        width *= 2


@kernel
def net_values(ways, usd, net_usd):
    """Value of every option less its work at the flat table's prices, (O,)."""
    for k in range(len(net_usd)):
        prefill_usd = min(usd[ways.prefill_left[k]], usd[ways.prefill_right[k]])
        decode_usd = min(usd[ways.decode_left[k]], usd[ways.decode_right[k]])
        net_usd[k] = ways.value_usd[k] - ways.prefill_s[k] * prefill_usd - ways.decode_s[k] * decode_usd


@kernel
def work_done(taken, ways, usd, at, work_s):
    """Adds the work of options (M,), -1 for none, in their cheapest buckets to `work_s`, flat (S, B + 1)."""
    for i in range(len(taken)):
        k = taken[i]
        if k < 0:
            continue
        left, right = ways.prefill_left[k], ways.prefill_right[k]
        work_s[at[left] if usd[left] <= usd[right] else at[right]] += ways.prefill_s[k]
        left, right = ways.decode_left[k], ways.decode_right[k]
        work_s[at[left] if usd[left] <= usd[right] else at[right]] += ways.decode_s[k]


@kernel
def sales(prices, sold, rented_from, rented, rent_usd, burst, slope):
    """What stations sell at prices (S, B) in USD; adds how much of it to `slope` (S, B)."""
    stations, buckets = prices.shape
    total_usd = 0.0
    for s in range(stations):
        before_usd = 0.0
        for b in range(buckets):
            total_usd += prices[s, b] * sold[s, b]
            slope[s, b] += sold[s, b]
            if burst[s] > 0.0 and (b == 0 or prices[s, b] > before_usd):  # it was kept until now
                total_usd += burst[s] * (prices[s, b] - before_usd)
                slope[s, b] += burst[s]
                if b > 0:
                    slope[s, b - 1] -= burst[s]
            before_usd = prices[s, b]
    for r in range(len(rented_from)):
        s = rented_from[r]
        for b in range(buckets):
            if prices[s, b] > rent_usd[r]:
                total_usd += rented[r, b] * (prices[s, b] - rent_usd[r])
                slope[s, b] += rented[r, b]
    return total_usd


@kernel
def downhill(prices, slope, scale, width, momentum, excess_usd, direction):
    """One step of the search, in place: prices (S, B) fall along the slope's means over blocks of `width` buckets.

    Prices of station s move in units of scale[s]; `direction` (S, B) remembers the last steps. The step is as long as
    brings the bound down by `excess_usd` if it were linear. Returns whether there is a way down.
    """
    stations, buckets = prices.shape
    size = 0.0
    for s in range(stations):
        for begin in range(0, buckets, width):
            end = min(begin + width, buckets)
            mean = 0.0
            for b in range(begin, end):
                mean += slope[s, b]
            mean *= scale[s] / (end - begin)
            for b in range(begin, end):
                step = mean + momentum * direction[s, b]
                if prices[s, b] <= 0.0 and step > 0.0:
                    step = 0.0
                direction[s, b] = step
                size += step * step
    if size == 0.0:
        return False
    for s in range(stations):
        for b in range(buckets):
            prices[s, b] = max(prices[s, b] - excess_usd / size * scale[s] * direction[s, b], 0.0)
    return True


@kernel
def undominated(begins, station, good, value_usd, prefill_s, decode_s, prefill_last, decode_last, kept):
    """Whether an option is the only way to some bound, (O,): none of its request and station is better in all.

    Options of request i are begins[i] to begins[i + 1] - 1; all of them may begin their work at the same time.
    """
    for i in range(len(begins) - 1):
        for k in range(begins[i], begins[i + 1]):
            kept[k] = True
            for j in range(begins[i], begins[i + 1]):
                if (
                    j != k
                    and station[j] == station[k]
                    and good[j] >= good[k]
                    and value_usd[j] >= value_usd[k]
                    and prefill_s[j] <= prefill_s[k]
                    and decode_s[j] <= decode_s[k]
                    and (prefill_last[j] >= prefill_last[k] or prefill_s[j] == 0.0)
                    and (decode_last[j] >= decode_last[k] or decode_s[j] == 0.0)
                ):
                    same = (
                        good[j] == good[k]
                        and value_usd[j] == value_usd[k]
                        and prefill_s[j] == prefill_s[k]
                        and decode_s[j] == decode_s[k]
                        and prefill_last[j] == prefill_last[k]
                        and decode_last[j] == decode_last[k]
                    )
                    if j < k or not same:
                        kept[k] = False
                        break
