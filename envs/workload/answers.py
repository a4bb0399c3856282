"""Block hashes of answers: what a follow-up's prompt tells of the answer before it.

A follow-up that repeats its parent's prompt and is long enough for the answer repeats the answer too, so the blocks of
its prompt behind those of the parent's are the parent's generated ones. An engine with a prefix cache has them.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from envs.workload.requests import Workload

Array = np.ndarray[Any, Any]


def hashes_with_answers(workload: Workload) -> tuple[tuple[Array, Array], Array]:
    """The workload's hashes, numbered from 0, with those of answers that a follow-up repeats.

    Returns:
        Ragged list: counts (M,) and hashes; and the tokens of each request that they speak of, (M,).
    """
    ids, counts, block = workload.prefix_ids, workload.prefix_count, workload.prefix_block_tokens
    known_tokens = workload.prompt_tokens.astype(np.int64)
    rows, full = _repeating(workload)
    if len(rows) == 0:
        return (counts, ids), known_tokens
    starts = np.cumsum(counts) - counts
    parts = [ids[start : start + count] for start, count in zip(starts.tolist(), counts.tolist(), strict=True)]
    for i in rows.tolist():
        p, first = int(workload.parent_index[i]), int(full[i])
        last = int(known_tokens[p] + workload.output_tokens[p]) // block
        parts[p] = np.concatenate([parts[p][:first], ids[starts[i] + first : starts[i] + min(last, counts[i])]])
        known_tokens[p] = max(known_tokens[p], len(parts[p]) * block)
    return (np.array([len(part) for part in parts]), np.concatenate(parts)), known_tokens


def _repeating(workload: Workload) -> tuple[Array, Array]:
    """The first follow-up of each parent whose answer it repeats, rows; and (M,) full blocks of the parent's prompt."""
    ids, counts, parent = workload.prefix_ids, workload.prefix_count, workload.parent_index
    starts = np.cumsum(counts) - counts
    full = np.zeros(workload.n_requests, dtype=np.int64)
    rows = np.flatnonzero((parent >= 0) & (counts > 0))
    p = parent[rows]
    full[rows] = workload.prompt_tokens[p] // workload.prefix_block_tokens if len(rows) else 0
    length = workload.prompt_tokens[p].astype(np.int64) + workload.output_tokens[p]
    able = (workload.prompt_tokens[rows] >= length) & (counts[rows] > full[rows]) & (counts[p] >= full[rows])
    rows, p = rows[able], p[able]
    last = np.maximum(full[rows] - 1, 0)  # the last block of the parent's prompt stands for all before it
    same = (full[rows] == 0) | (ids[starts[rows] + last] == ids[np.minimum(starts[p] + last, len(ids) - 1)])
    rows, p = rows[same], p[same]
    _, first = np.unique(p, return_index=True)
    return rows[first], full
