"""What a prompt's text shows at a glance: hashed n-grams and surface counts, by numpy alone.

A text is read as UTF-8 bytes, at most `MAX_BYTES` of them (the middle of a longer one is left out), letters in lower
case and every digit as 0. Hashed are words, pairs of neighbouring words, and runs of 3 to 5 bytes. A word is a run of
letters, digits, underscores and bytes above 127. Hashes are polynomials modulo 2^64: with c_i the bytes and P odd,
C_i = sum_{j < i} c_j P^j gives the hash of the bytes from s to e as (C_e - C_s) P^-s, for all words of a text at once.
The same function makes the rows that a predictor is fitted on, so that nothing can differ at the gateway.
"""

from __future__ import annotations

import math

import numpy as np

from marginroute.view import Array

MAX_BYTES = 2048
_WORD = 1 << 64
_P = 0x9E3779B97F4A7C15
_INVERSE = pow(_P, -1, _WORD)


def _powers(base: int) -> Array:
    powers = [1]
    for _ in range(MAX_BYTES):
        powers.append(powers[-1] * base % _WORD)
    return np.array(powers, dtype=np.uint64)


_POWERS, _INVERSE_POWERS = _powers(_P), _powers(_INVERSE)
# Odd constants of the finalisers of splitmix64 and murmur3: any that mix well would do
_MIX_1, _MIX_2, _NEXT = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB), np.uint64(0xD6E8FEB86659FD93)

_FOLDED = np.arange(256, dtype=np.uint64) + 1  # byte as it is hashed, never 0
_FOLDED[65:91] += 32
_FOLDED[48:58] = 49
_IS_WORD = np.zeros(256, dtype=np.bool_)
_IS_WORD[[95, *range(48, 58), *range(65, 91), *range(97, 123), *range(128, 256)]] = True

CLASSES = (
    "lower case",
    "upper case",
    "digits",
    "other scripts",
    "blanks",
    "lines",
    "symbols",
    "question marks",
    "stops",
)
_CLASS_OF = np.zeros(256, dtype=np.int64)  # 0: anything else
for _k, _bytes in enumerate(
    (
        range(97, 123),
        range(65, 91),
        range(48, 58),
        range(128, 256),
        b" ",
        b"\n",
        b"{}[]();=<>_\\/|#$^*+",
        b"?",
        b".,:;!'\"-",
    ),
    start=1,
):
    _CLASS_OF[list(_bytes)] = _k
SURFACE_NAMES = ("ln bytes", *(f"ln {name}" for name in CLASSES), *(f"share of {name}" for name in CLASSES))


def read(text: str) -> tuple[Array, int]:
    """Bytes (n,) u1 of a text, n <= `MAX_BYTES`, and how many it has in all."""
    data = text.encode("utf-8", "replace")
    size = len(data)
    if size > MAX_BYTES:
        data = data[: MAX_BYTES // 2] + data[-(MAX_BYTES // 2) :]
    return np.frombuffer(data, dtype=np.uint8), size


def buckets(data: Array, bits: int) -> Array:
    """(m,) i8 buckets in [0, 2^bits) of all n-grams of (n,) bytes, one per occurrence."""
    folded = _FOLDED[data]
    found = []
    inside = np.zeros(len(data) + 2, dtype=np.bool_)
    inside[1:-1] = _IS_WORD[data]
    edge = np.flatnonzero(inside[1:] != inside[:-1])
    if len(edge):
        first, end = edge[::2], edge[1::2]
        total = np.zeros(len(data) + 1, dtype=np.uint64)
        np.cumsum(folded * _POWERS[: len(data)], out=total[1:])
        words = (total[end] - total[first]) * _INVERSE_POWERS[first]
        found += [_bucket(words, 1, bits), _bucket(words[:-1] * _NEXT + words[1:], 2, bits)]
    run = folded
    for n in range(2, 6):
        if len(data) < n:
            break
        run = run[:-1] * _NEXT + folded[n - 1 :]
        if n > 2:
            found.append(_bucket(run, n, bits))
    return np.concatenate(found) if found else np.empty(0, dtype=np.int64)


def _bucket(hashed: Array, kind: int, bits: int) -> Array:
    """The top bits of hashes, mixed so that the kinds of n-grams do not share buckets by construction."""
    mixed = (hashed + np.uint64(kind)) * _MIX_1
    mixed ^= mixed >> np.uint64(31)
    mixed *= _MIX_2
    index: Array = (mixed >> np.uint64(64 - bits)).view(np.int64)
    return index


def surface(data: Array, size: int) -> Array:
    """(S,) counts of a text by class of byte, as logarithms and as shares: `SURFACE_NAMES`."""
    counts = np.bincount(_CLASS_OF[data], minlength=len(CLASSES) + 1)[1:]
    return np.concatenate(((math.log1p(size),), np.log1p(counts), counts / max(len(data), 1)))
