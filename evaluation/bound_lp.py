"""The same bound as one linear program, solved by HiGHS: exact, for small episodes; it checks the search for prices.

Columns: the share of each option that is taken, its work in every bucket of its window, and what is rented in every
bucket. Rows: a request is answered at most once, an option's work is done inside its window, a station sells no more
than it has. Requests that may share a
stored answer are left to the dual, which takes them by dynamic programming.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.optimize import linprog

from evaluation.bound_dual import DualBound
from marginroute.errors import InputError

Ints = NDArray[np.int64]


def solve(dual: DualBound) -> float:
    """Upper bound of the margin in USD at the best prices.

    Raises:
        InputError: the workload has requests that share answers, or tasks.
    """
    o = dual.options
    if (o.group >= 0).any() or (o.tasks.task >= 0).any():
        raise InputError(
            "the linear program takes each request alone; legal is a scenario without response cache and workflows"
        )
    options, requests = len(o.request), len(o.unserved_usd)
    kinds = [(o.prefill_s, dual.prefill_last), (o.decode_s, dual.decode_last)]
    work = [_allocation(work_s, dual.first, last) for work_s, last in kinds]
    owners = np.concatenate([owner + k * options for k, (owner, _) in enumerate(work)])
    cells = np.concatenate([o.station[owner] * (dual.buckets + 1) + bucket for owner, bucket in work])
    carried = np.flatnonzero(o.capacity.burst > 0.0)
    levels = len(carried) * dual.buckets
    rents = options + len(owners)
    columns = rents + dual.rented.size + levels

    answered = sparse.csr_matrix((np.ones(options), (o.request, np.arange(options))), shape=(requests, columns))
    asked_s = np.concatenate([o.prefill_s, o.decode_s])
    at = options + np.arange(len(owners))
    rented = sparse.csr_matrix(  # adds to what its pool sells
        (
            -np.ones(dual.rented.size),
            (
                (o.capacity.rented_from[:, None] * dual.buckets + np.arange(dual.buckets)).ravel(),
                rents + np.arange(dual.rented.size),
            ),
        ),
        shape=(dual.stations * dual.buckets, columns),
    )
    done = sparse.csr_matrix(
        (
            np.concatenate([asked_s, -np.ones(len(owners))]),
            (
                np.concatenate([np.arange(2 * options), owners]),
                np.concatenate([np.tile(np.arange(options), 2), at]),
            ),
        ),
        shape=(2 * options, columns),
    )
    capacity, limits = _capacity(dual, cells, at, columns, carried)
    upper = [(0.0, 1.0)] * options + [(0.0, None)] * len(owners)
    upper += [(0.0, float(most)) for most in dual.rented.ravel()]
    for s in carried:
        upper += [(0.0, float(o.capacity.burst[s]))] * dual.buckets
    gain_usd = np.zeros(columns)
    gain_usd[:options] = o.value_usd - o.unserved_usd[o.request]
    gain_usd[rents : rents + dual.rented.size] = -np.repeat(o.capacity.rent_usd, dual.buckets)
    solved = linprog(
        -gain_usd,
        A_ub=sparse.vstack([answered, done, capacity + rented]),
        b_ub=np.concatenate([np.ones(requests), np.zeros(2 * options), limits]),
        bounds=upper,
        method="highs",
    )
    if not solved.success:
        raise RuntimeError(f"HiGHS did not solve the bound: {solved.message}")
    return float(o.shared_usd + o.unserved_usd.sum() - solved.fun)


def _allocation(work_s: NDArray[np.float64], first: Ints, last: Ints) -> tuple[Ints, Ints]:
    """Option and bucket of every cell in which an option may do its work."""
    lengths = np.where(work_s > 0.0, last - first + 1, 0)
    owner = np.repeat(np.arange(len(work_s)), lengths)
    start = np.repeat(np.cumsum(lengths) - lengths, lengths)
    return owner, first[owner] + np.arange(len(owner)) - start


def _capacity(
    dual: DualBound, cells: Ints, at: Ints, columns: int, carried: Ints
) -> tuple[sparse.csr_matrix, NDArray[np.float64]]:
    """Rows of what every limited station sells per bucket; a token bucket carries `level` from one to the next."""
    o, buckets = dual.options, dual.buckets
    station, bucket = cells // (buckets + 1), cells % (buckets + 1)
    sold = (bucket < buckets) & dual.limited[station]
    rows, columns_of, values = [station[sold] * buckets + bucket[sold]], [at[sold]], [np.ones(int(sold.sum()))]
    limits = dual.sold.copy()
    first_level = columns - len(carried) * buckets
    for c, s in enumerate(carried):
        level = first_level + c * buckets + np.arange(buckets)  # left over at the end of a bucket
        rows += [s * buckets + np.arange(buckets), s * buckets + np.arange(1, buckets)]
        columns_of += [level, level[:-1]]
        values += [np.ones(buckets), -np.ones(buckets - 1)]
        limits[s, 0] += o.capacity.burst[s]
    limits[~dual.limited] = np.inf
    matrix = sparse.csr_matrix(
        (np.concatenate(values), (np.concatenate(rows), np.concatenate(columns_of))), shape=(limits.size, columns)
    )
    return matrix, limits.ravel()
