"""Hashed n-grams against whole-number arithmetic, byte by byte."""

import itertools

import numpy as np
import pytest

from marginroute import prompt

M = 1 << 64
P = 0x9E3779B97F4A7C15


def bucket(hashed, kind, bits):
    mixed = (hashed + kind) * int(prompt._MIX_1) % M
    mixed ^= mixed >> 31
    return (mixed * int(prompt._MIX_2) % M) >> (64 - bits)


def fold(byte):
    return 49 if 48 <= byte <= 57 else byte + 33 if 65 <= byte <= 90 else byte + 1


def by_hand(data, bits):
    """Buckets in any order."""
    step = int(prompt._NEXT)
    words, run = [], []
    for byte in [*data, 32]:
        if byte >= 128 or chr(byte).isalnum() or byte == 95:
            run.append(fold(byte))
        elif run:
            words.append(sum(c * pow(P, i, M) for i, c in enumerate(run)) % M)
            run = []
    found = [bucket(word, 1, bits) for word in words]
    found += [bucket(a * step + b, 2, bits) for a, b in itertools.pairwise(words)]
    for n in (3, 4, 5):
        for start in range(len(data) - n + 1):
            hashed = fold(data[start])
            for byte in data[start + 1 : start + n]:
                hashed = (hashed * step + fold(byte)) % M
            found.append(bucket(hashed, n, bits))
    return sorted(found)


@pytest.mark.parametrize(
    "text", ["", "a", "ab", "a b", "Why is 17*23 = 391?", "  double  blank\n", "naïve Über_fall 中文 x1", "x" * 5000]
)
def test_buckets_are_those_of_whole_numbers(text):
    data, size = prompt.read(text)
    assert size == len(text.encode()) and len(data) == min(size, prompt.MAX_BYTES)
    assert sorted(prompt.buckets(data, 14).tolist()) == by_hand(data.tolist(), 14)


def test_case_and_digits_do_not_matter_and_the_rest_does():
    def of(text):
        return prompt.buckets(prompt.read(text)[0], 20).tolist()

    assert of("Add 12 and 7") == of("add 93 AND 1")
    assert of("add 12 and 7") != of("add 12 or 7") and of("add 12 and 7") != of("add 123 and 7")


def test_surface_counts():
    row = dict(zip(prompt.SURFACE_NAMES, prompt.surface(*prompt.read("Ab 1?\n")), strict=True))
    assert row["ln bytes"] == pytest.approx(np.log(7)) and row["ln upper case"] == pytest.approx(np.log(2))
    assert row["share of question marks"] == row["share of digits"] == row["share of lines"] == pytest.approx(1 / 6)
    assert row["share of symbols"] == 0.0
    assert np.isfinite(prompt.surface(*prompt.read(""))).all()


def test_a_long_text_keeps_its_head_and_tail():
    half = prompt.MAX_BYTES // 2
    data, size = prompt.read("a" * half + "b" * 10_000 + "c" * half)
    assert size == 2 * half + 10_000 and bytes(data) == b"a" * half + b"c" * half
