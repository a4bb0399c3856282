r"""Speculative decoding: a draft proposes k tokens, the model checks them in one iteration and keeps those accepted.

With every token accepted with probability a, independently, an iteration yields on average

    g = (1 - a^(k + 1)) / (1 - a)   tokens per sequence, from 1 to k + 1

(Leviathan, Kalman, Matias: Fast Inference from Transformers via Speculative Decoding, ICML 2023, equation 1). It costs

    token(n (k + 1) + sum c_i) + decode(n, m) + prefill + k c (token(n) + decode(n, m))   seconds,

where n sequences are checked with k + 1 tokens each and c is the `draft_cost`: one step of the draft over one
iteration of the model that decodes the same sequences (Leviathan's cost coefficient). Checking reads the KV cache once,
as decoding does. While the model is bound by memory, token(n (k + 1)) is hardly more than token(n), and a sequence is
g / (1 + k c) times as fast; at large batches it is k + 1 times as much, and speculation loses. A batch above
`max_batch` decodes without.

Acceptance is not drawn. All decodes of a replica advance by the same number of tokens, floor(g) or ceil(g), whose sum
over j iterations is floor(phase + g j): with `pace` = g in units of 2^-20 and `phase` what is left over from the
iterations before, the first j iterations of a segment yield

    t_j = floor((phase + j pace) / 2^20)   tokens.

These are integers, so that an unchanged batch is skipped over exactly: its j-th iteration (from 0) attends to t_j more
tokens per sequence than the first, hence n iterations take n first + growth sum_{j<n} t_j seconds, and the sum of
floors has a closed form (`floor_sum`, as Euclid's algorithm). A request ends with the iteration that reaches its last
token; what it yields beyond does not count. KV blocks follow the tokens; the k slots that a draft holds for the length
of an iteration are left out (less than a block per sequence while k is below the block size).
"""

# ruff: noqa: ANN001, ANN201 (Numba infers the types of kernels)
from __future__ import annotations

import dataclasses

from envs.kernels import kernel

PACE_BITS = 20
PACE_ONE = 1 << PACE_BITS  # one token per iteration
MOST_DRAFT_TOKENS = 32


@dataclasses.dataclass(frozen=True)
class Speculation:
    """How a pool speculates.

    Attributes:
        draft_tokens: k, tokens proposed in every iteration.
        acceptance: a, probability that a proposed token is accepted.
        draft_cost: c, seconds of a draft step as a share of the model's own iteration with the same decodes.
        max_batch: Decodes up to which an iteration speculates.
    """

    draft_tokens: int
    acceptance: float
    draft_cost: float = 0.0
    max_batch: int = 2**31 - 1

    @property
    def tokens_per_iteration(self) -> float:
        """Tokens of a sequence per iteration, g."""
        return float(sum(self.acceptance**j for j in range(self.draft_tokens + 1)))

    @property
    def pace(self) -> int:
        """The same in units of 2^-20 tokens."""
        return round(self.tokens_per_iteration * PACE_ONE)


@kernel
def floor_sum(n, phase, pace):
    """Sum over j < n of floor((phase + j pace) / 2^20); both are 0 or more."""
    total, modulus = 0, PACE_ONE
    while True:
        total += (n - 1) * n // 2 * (pace // modulus) + n * (phase // modulus)
        pace %= modulus
        phase %= modulus
        last = pace * n + phase
        if last < modulus:
            return total
        n = last // modulus
        phase = last % modulus
        modulus, pace = pace, modulus


@kernel
def open_segment(rep, pace):
    """Starts a segment of iterations that yield `pace` tokens; 0: one each, without speculation."""
    rep.phase = (rep.phase + rep.done * rep.pace) % PACE_ONE
    rep.pace = pace
    rep.done = 0


@kernel
def next_tokens(rep, pace):
    """Tokens that a decode gains in the iteration after those done, at `pace`."""
    if pace == 0:
        return 1
    return ((rep.phase + rep.done * rep.pace) % PACE_ONE + pace) >> PACE_BITS


@kernel
def tokens_between(rep, first, last):
    """Tokens that a decode gains from the first `first` to the first `last` iterations of the segment."""
    if rep.pace == 0:
        return last - first
    return ((rep.phase + last * rep.pace) >> PACE_BITS) - ((rep.phase + first * rep.pace) >> PACE_BITS)


@kernel
def iterations_within(rep, tokens):
    """Most iterations after those done in which a decode gains at most `tokens` tokens."""
    if rep.pace == 0:
        return tokens
    phase = (rep.phase + rep.done * rep.pace) % PACE_ONE
    return ((tokens + 1) * PACE_ONE - 1 - phase) // rep.pace


@kernel
def elapsed_s(extras, rep, iterations):
    """Seconds from the start of the segment to the end of its n-th iteration."""
    if extras is not None and rep.pace > 0:
        return iterations * rep.first_s + rep.growth_s * float(floor_sum(iterations, rep.phase, rep.pace))
    return iterations * rep.first_s + rep.growth_s * (0.5 * iterations * (iterations - 1))
