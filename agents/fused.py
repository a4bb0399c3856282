"""The candidate scorer's forward and backward pass, compiled, in pieces that stay in the processor's cache.

The same function as a few lines of torch (tests/learning/test_fused.py holds its values and gradients to torch's own).
A minibatch is taken a few hundred rows at a time: with 2,048 decisions of 7 candidates every activation is 2 MB, and
passing over such arrays costs several times what the matrix products do. Illegal candidates are left out. Pieces
are so small that OpenBLAS multiplies them on one thread, whatever it is told elsewhere.

For a candidate with features x and advice a, in a state with context y and mean features m of its legal candidates:

    h1 = relu(x W1 + y Wg + b1)      h2 = relu(h1 W2 + b2)      logit = kappa a + (t0 + t1 x_told) h2 . head
    u  = relu(m V1 + y Vg + c1)                                 value = u . v2 + c2
"""

# ruff: noqa: ANN001, ANN201, ANN202 (Numba infers the types of kernels)
from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from envs.kernels import kernel
from marginroute.features import TIER_CONFIDENCE

ILLEGAL_LOGIT = -1e9
ONE_THREAD_PRODUCTS = 2**18  # multiply-adds of a matrix product up to which OpenBLAS starts no threads
PIECE_STATES = 16  # at most; worlds are shared out in such pieces, too, since a product's last bits depend on its rows


class Weights(NamedTuple):
    """Of a scorer of width H with the normaliser folded in; each C-contiguous float32."""

    candidate: Any  # (F, H), W1
    context: Any  # (G, H), Wg
    bias_1: Any  # (H,)
    hidden: Any  # (H, H), W2
    bias_2: Any  # (H,)
    head: Any  # (H,)
    kappa: Any  # (1,)
    trust: Any  # (2,), t0 and t1; not learned
    value_candidate: Any  # (F, H), V1
    value_context: Any  # (G, H), Vg
    value_bias_1: Any  # (H,), c1
    value_head: Any  # (H,), v2
    value_bias_2: Any  # (1,), c2


@kernel(allocates=True)
def _gather(observation, at, n, c, x, y, m, owner):
    """Legal candidates' features, context and mean features of `n` states from `at`; returns the number of rows."""
    k, f, g = 0, x.shape[1], y.shape[1]
    for b in range(n):
        row = observation[at + b]
        legal = 0
        m[b] = np.float32(0.0)
        for i in range(c):
            if row[len(row) - c + i] > 0.5:
                legal += 1
                owner[k] = b
                for j in range(f):
                    x[k, j] = row[i * f + j]
                    m[b, j] += row[i * f + j]
                k += 1
        m[b] *= np.float32(1.0) / np.float32(legal)
        y[b] = row[c * f : c * f + g]
    return k


@kernel(fastmath={"reassoc", "contract"})
def _dot(a, b):
    total = np.float32(0.0)
    for j in range(len(a)):
        total += a[j] * b[j]
    return total


@kernel(allocates=True)
def forward(observation, c, w, x, owner, y, m, h1, h2, u, logits, value):
    """Logits (B, C) and values (B,) of flat observations (B, D).

    Activations go to h1, h2 (rows of legal candidates, H), u (B, H) and m (B, F); x (P, F), owner (P,) and y (p, G)
    hold a piece of at most p states.
    """
    n, width, f, zero = len(observation), len(w.bias_1), x.shape[1], np.float32(0.0)
    base = np.empty((len(y), width), dtype=np.float32)
    begun = 0
    for at in range(0, n, len(y)):
        b = min(len(y), n - at)
        k = _gather(observation, at, b, c, x, y, m[at : at + b], owner)
        h, deep = h1[begun : begun + k], h2[begun : begun + k]
        begun += k
        np.dot(x[:k], w.candidate, h)
        np.dot(y[:b], w.context, base[:b])
        for i in range(k):
            from_state = base[owner[i]]
            for j in range(width):
                h[i, j] = max(h[i, j] + from_state[j] + w.bias_1[j], zero)
        np.dot(h, w.hidden, deep)
        for i in range(k):
            for j in range(width):
                deep[i, j] = max(deep[i, j] + w.bias_2[j], zero)
        i = 0
        for s in range(at, at + b):
            row = observation[s]
            for candidate in range(c):
                logits[s, candidate] = ILLEGAL_LOGIT
                if row[len(row) - c + candidate] > 0.5:
                    trust = w.trust[0] + w.trust[1] * row[candidate * f + TIER_CONFIDENCE]
                    advice = row[len(row) - 2 * c + candidate]
                    logits[s, candidate] = w.kappa[0] * advice + trust * _dot(deep[i], w.head)
                    i += 1
        top = u[at : at + b]
        np.dot(m[at : at + b], w.value_candidate, top)
        np.dot(y[:b], w.value_context, base[:b])
        for s in range(b):
            for j in range(width):
                top[s, j] = max(top[s, j] + base[s, j] + w.value_bias_1[j], zero)
            value[at + s] = _dot(top[s], w.value_head) + w.value_bias_2[0]


@kernel(allocates=True)  # as row.max() does in Numba
def log_softmax(logits, log_probs):
    """Row by row, (B, C)."""
    for b in range(logits.shape[0]):
        top, total = logits[b].max(), np.float32(0.0)
        for i in range(logits.shape[1]):
            total += np.exp(logits[b, i] - top)
        shift = top + np.log(total)
        for i in range(logits.shape[1]):
            log_probs[b, i] = logits[b, i] - shift


@kernel(error_model="numpy")
def choose(log_probs, noise, actions, chosen):
    """Takes in each state the candidate with the largest p / noise, and its log-probability.

    With exponential noise (B, C) that draws a candidate with its probability p: the Gumbel-max trick without its
    logarithms. With noise of ones it is the most probable one.
    """
    for b in range(log_probs.shape[0]):
        best, action = np.float32(-1.0), 0
        for i in range(log_probs.shape[1]):
            odds = np.exp(log_probs[b, i]) / noise[b, i]
            if odds > best:
                best, action = odds, i
        actions[b], chosen[b] = action, log_probs[b, action]


@kernel(allocates=True)
def backward(observation, c, w, x, owner, y, m, h1, h2, u, log_probs, d_log_probs, d_value, found):
    """Adds the derivatives by the weights to `found`, from those by log-probabilities (B, C) and values (B,)."""
    n, width, zero = len(observation), len(w.bias_1), np.float32(0.0)
    d, e = np.empty((len(x), width), dtype=np.float32), np.empty((len(x), width), dtype=np.float32)
    d_logit, by_state = np.empty(len(x), dtype=np.float32), np.empty((len(y), width), dtype=np.float32)
    by_w1, by_wg, by_w2 = np.empty_like(w.candidate), np.empty_like(w.context), np.empty_like(w.hidden)
    ignored = np.empty((len(y), x.shape[1]), dtype=np.float32)
    begun = 0
    for at in range(0, n, len(y)):
        b = min(len(y), n - at)
        k = _gather(observation, at, b, c, x, y, ignored[:b], owner)
        h, deep = h1[begun : begun + k], h2[begun : begun + k]
        begun += k
        i = 0
        for s in range(at, at + b):
            row = observation[s]
            total = d_log_probs[s].sum()
            for candidate in range(c):
                if row[len(row) - c + candidate] > 0.5:
                    d_logit[i] = d_log_probs[s, candidate] - np.exp(log_probs[s, candidate]) * total
                    found.kappa[0] += d_logit[i] * row[len(row) - 2 * c + candidate]
                    d_logit[i] *= w.trust[0] + w.trust[1] * x[i, TIER_CONFIDENCE]
                    i += 1
        for i in range(k):
            for j in range(width):
                d[i, j] = d_logit[i] * w.head[j] if deep[i, j] > zero else zero
                found.head[j] += d_logit[i] * deep[i, j]
                found.bias_2[j] += d[i, j]
        np.dot(h.T, d[:k], by_w2)
        found.hidden[:] += by_w2
        np.dot(d[:k], w.hidden.T, e[:k])
        by_state[:] = zero
        for i in range(k):
            state = by_state[owner[i]]
            for j in range(width):
                e[i, j] = e[i, j] if h[i, j] > zero else zero
                state[j] += e[i, j]
        np.dot(x[:k].T, e[:k], by_w1)
        found.candidate[:] += by_w1
        np.dot(y[:b].T, by_state[:b], by_wg)
        found.context[:] += by_wg
        for s in range(b):
            top, change = u[at + s], d_value[at + s]
            found.value_bias_2[0] += change
            for j in range(width):
                found.bias_1[j] += by_state[s, j]
                found.value_head[j] += change * top[j]
                by_state[s, j] = change * w.value_head[j] if top[j] > zero else zero
                found.value_bias_1[j] += by_state[s, j]
        np.dot(m[at : at + b].T, by_state[:b], by_w1)
        found.value_candidate[:] += by_w1
        np.dot(y[:b].T, by_state[:b], by_wg)
        found.value_context[:] += by_wg


def piece_states(n_candidates: int, width: int, inputs: int) -> int:
    """States of a piece, for a scorer of so many hidden units and features (of a candidate or of the context)."""
    return min(max(ONE_THREAD_PRODUCTS // (max(inputs, width) * width) // n_candidates, 1), PIECE_STATES)


class Memory:
    """Activations of the latest forward pass, kept because making them anew costs as much as filling them."""

    def __init__(self) -> None:
        self.owner: object = None
        self._size = (0, 0)
        self._arrays: tuple[Any, ...] = ()

    def take(self, n: int, c: int, w: Weights) -> tuple[Any, ...]:
        """Room for x, owner, y, m, h1, h2 and u of n states of c candidates."""
        if n > self._size[0] or c != self._size[1]:
            (f, width), g = w.candidate.shape, len(w.context)
            states = piece_states(c, width, max(f, g))
            shapes = ((states * c, f), (states, g), (n, f), (n * c, width), (n * c, width), (n, width))
            x, *rest = (np.empty(shape, dtype=np.float32) for shape in shapes)
            self._arrays, self._size = (x, np.empty(states * c, dtype=np.int64), *rest), (n, c)
        return self._arrays


def arrays_of(weights: tuple[Tensor, ...]) -> Weights:
    """Weights as the kernels take them."""
    return Weights(*(np.ascontiguousarray(weight.detach().numpy()) for weight in weights))


def run(observation: Any, c: int, weights: Weights, memory: Memory) -> tuple[Any, Any]:
    """Logits (B, C) and values (B,)."""
    size = len(observation)
    logits, value = np.empty((size, c), dtype=np.float32), np.empty(size, dtype=np.float32)
    memory.owner = None
    forward(observation, c, weights, *memory.take(size, c, weights), logits, value)
    return logits, value


class FusedScorer(torch.autograd.Function):
    """Log-probabilities (B, C) and values (B,) of observations (B, D); differentiable by the weights only."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, observation: Tensor, n_candidates: int, memory: Memory, *weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See the module."""
        logits, value = run(observation.numpy(), n_candidates, arrays_of(weights), memory)
        log_probs = torch.empty(logits.shape)
        log_softmax(logits, log_probs.numpy())
        ctx.save_for_backward(observation, log_probs, *weights)
        ctx.n_candidates, ctx.memory = n_candidates, memory
        memory.owner = ctx
        return log_probs, torch.from_numpy(value)

    @staticmethod
    def backward(ctx: Any, d_log_probs: Tensor, d_value: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """Derivatives by the weights."""
        observation, log_probs, *weights = ctx.saved_tensors
        arrays, seen, c = arrays_of(tuple(weights)), observation.numpy(), ctx.n_candidates
        if ctx.memory.owner is not ctx:  # another forward pass came in between
            run(seen, c, arrays, ctx.memory)
            ctx.memory.owner = ctx
        found = Weights(*(np.zeros_like(weight) for weight in arrays))
        changes = (np.ascontiguousarray(d.numpy()) for d in (d_log_probs, d_value))
        room = ctx.memory.take(len(seen), c, arrays)
        backward(seen, c, arrays, *room, log_probs.numpy(), *changes, found)
        return None, None, None, *(torch.from_numpy(weight) for weight in found)
