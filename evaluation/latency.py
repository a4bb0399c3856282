"""Latency distributions that can be added: histograms over logarithmic bins, a fixed size for any number of requests.

Bin b covers [LOWEST_S * g^b, LOWEST_S * g^(b + 1)) with g = GROWTH, so that a quantile read at a bin's geometric middle
is within sqrt(g) - 1 = 1 % of the exact one.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

METRICS = ("ttft", "tpot", "e2e")
LOWEST_S = 1e-4
HIGHEST_S = 1e4
GROWTH = 1.02
BINS = int(np.ceil(np.log(HIGHEST_S / LOWEST_S) / np.log(GROWTH)))


def histogram(latency_s: NDArray[np.float64], class_index: NDArray[np.integer], classes: int) -> NDArray[np.int64]:
    """Counts by class and bin; latencies outside the range go to the first or last bin.

    Args:
        latency_s: (n,) seconds.
        class_index: (n,) 0..classes - 1.
        classes: K.

    Returns:
        (K, BINS).
    """
    bins = np.floor(np.log(np.maximum(latency_s, LOWEST_S) / LOWEST_S) / np.log(GROWTH))
    flat = class_index.astype(np.int64) * BINS + np.clip(bins, 0, BINS - 1).astype(np.int64)
    return np.bincount(flat, minlength=classes * BINS).reshape(classes, BINS)


def quantile(counts: NDArray[np.int64], q: float) -> NDArray[np.float64]:
    """Quantile of each histogram (..., BINS), in seconds; NaN for an empty one."""
    cumulative = np.cumsum(counts, axis=-1)
    total = cumulative[..., -1:]
    bin_index = (cumulative < np.maximum(q * total, 1)).sum(axis=-1)
    middle_s = LOWEST_S * GROWTH ** (bin_index + 0.5)
    return np.where(total[..., 0] > 0, middle_s, np.nan)
