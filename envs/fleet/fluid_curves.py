"""How one replica serves at a constant number of requests: the curves that the fluid surrogate runs on.

Closed loops (`fluid_loop`) measure the latencies of every class at rising numbers of requests in flight; throughput
follows by Little's law. Nothing is fitted by hand: profile, scheduler, KV cache and lengths enter through the engine.

The curves' levels are evenly spaced in ln from 1 to `slots`. From the samples of a level come the moments of TTFT, TPOT
and E2E, and the shares of requests that keep their promises if they have waited for a while before they entered the
engine (`kept`).

Shapes: K classes, L levels, A waits, M sample requests.
"""

# ruff: noqa: ANN001, ANN202 (Numba infers the types of kernels)
from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from envs.fleet.allocation import allocate
from envs.fleet.fluid_loop import BLOCKED_SHARE, PER_OCTAVE, Run, Sample, sweep
from envs.fleet.iteration import NO_PREFILLS, decode_bin, decode_seconds, prefill_seconds, token_seconds, with_prefill
from envs.fleet.spec import FleetSpec, PoolSpec
from envs.kernels import kernel
from marginroute.errors import InputError

Array = np.ndarray[Any, Any]

WAITS = 64  # A
WAIT_UNIT_S = 0.05  # waits are spaced evenly in ln(1 + wait / unit)
CURVES = ("ttft_s", "ttft_var", "tpot_s", "tpot_var", "e2e_s", "e2e_var", "model_tpot_s")
(TTFT_S, TTFT_VAR, TPOT_S, TPOT_VAR, E2E_S, E2E_VAR, MODEL_TPOT_S) = range(7)
KEPT = ("ttft_ok", "tpot_ok", "e2e_ok", "slo_ok", "credited", "stays")
(TTFT_OK, TPOT_OK, E2E_OK, SLO_OK, CREDITED, STAYS) = range(6)


@dataclasses.dataclass(frozen=True, eq=False)
class Curves:
    """One replica, calibrated.

    Attributes:
        slots: requests that it serves at once before others wait: sequences, or what its KV cache holds.
        curves: (L, K, 7), columns `CURVES`; variances in s^2; model_tpot_s is what the profile alone predicts for a
            batch of this class.
        kept: (L, A, K, 6), columns `KEPT`: shares of requests that keep the promise and have the patience for it;
            `credited` is the credit as a share of the class's value.
        class_share: (K,) of the sample.
        mean_tokens: (K, 2) prompt and output tokens per request.
        value_usd: (K,) mean value of a request.
        context_tokens: (K,) mean context of a running request.
        kv_tokens: context that the running requests of a replica can have together.
        unfit_share: (K,) requests whose context can never fit.
        top_wait_s: the largest wait in `kept`.
    """

    slots: float
    curves: Array
    kept: Array
    class_share: Array
    mean_tokens: Array
    value_usd: Array
    context_tokens: Array
    kv_tokens: float
    unfit_share: Array
    top_wait_s: float

    @property
    def requests_per_s(self) -> float:
        """Throughput of one full replica under the sample's mix."""
        return self.slots / float(self.class_share @ self.curves[-1, :, E2E_S])


@kernel
def _prefill_extra_s(pool, tables, batch, prompt_tokens):
    """Seconds that the prefill of one prompt adds to the iterations of `batch` decodes."""
    seconds, prefix = 0.0, 0
    while prefix < prompt_tokens:
        chunk = min(prompt_tokens - prefix, max(pool.max_num_batched_tokens - batch, 1))
        seconds += token_seconds(pool, tables, batch + chunk) - (token_seconds(pool, tables, batch) if batch else 0.0)
        seconds += prefill_seconds(pool, tables, with_prefill(NO_PREFILLS, chunk, prefix))
        prefix += chunk
    return seconds


@kernel
def _decode_s(pool, tables, batch, mean_tokens):
    kv_sum = int(batch * mean_tokens)
    bin_index = decode_bin(pool, tables, batch, kv_sum)
    return token_seconds(pool, tables, batch) + decode_seconds(pool, tables, batch, kv_sum, bin_index)


def _moments(run: Run, sample: Sample, mean_output: Array) -> Array:
    """(K, 6) first columns of `CURVES`; mean E2E from the class's mean output, which has no sampling error."""
    out = np.zeros((len(mean_output), 6))
    classes, steps = sample.class_index[run.rows], sample.output_tokens[run.rows] - 1
    for k, output in enumerate(mean_output):
        mine = classes == k
        if not mine.any():
            mine = np.ones_like(mine)
        ttft_s, tpot_s, e2e_s = run.latency_s[mine].T
        token_mean_s = float(steps[mine] @ tpot_s) / max(float(steps[mine].sum()), 1.0)
        mean_e2e_s = ttft_s.mean() + (output - 1.0) * token_mean_s
        out[k] = ttft_s.mean(), ttft_s.var(), tpot_s.mean(), tpot_s.var(), mean_e2e_s, e2e_s.var()
    return out


def promises_kept(run: Run, sample: Sample, waits_s: Array) -> Array:
    """(A, K, 6) shares of `KEPT` after each wait in front of the engine."""
    n_classes = len(sample.slo_s)
    out = np.ones((len(waits_s), n_classes, len(KEPT)))
    for k in range(n_classes):
        rows = run.rows[sample.class_index[run.rows] == k]
        if not rows.size:
            continue
        ttft_s, tpot_s, e2e_s = run.latency_s[sample.class_index[run.rows] == k].T
        value_usd = sample.value_usd[rows]
        waited = waits_s[:, None]
        stays = ttft_s + waited <= sample.patience_s[rows]
        met = np.stack(
            [
                ttft_s + waited <= sample.slo_s[k, 0],
                np.broadcast_to(tpot_s <= sample.slo_s[k, 1], stays.shape),
                e2e_s + waited <= sample.slo_s[k, 2],
            ]
        )
        credit = np.minimum(np.tensordot(sample.credit_share[k], ~met, axes=1), 1.0)
        out[:, k, :SLO_OK] = (met & stays).mean(axis=2).T
        out[:, k, SLO_OK] = (met.all(axis=0) & stays).mean(axis=1)
        out[:, k, CREDITED] = (credit * stays * value_usd).mean(axis=1) / max(value_usd.mean(), 1e-12)
        out[:, k, STAYS] = stays.mean(axis=1)
    return out


def waits(top_wait_s: float) -> Array:
    """(A,) waits of `Curves.kept`."""
    return WAIT_UNIT_S * np.expm1(np.linspace(0.0, math.log1p(top_wait_s / WAIT_UNIT_S), WAITS))


def _contexts(sample: Sample) -> Array:
    """(K,) mean context of a running request of each class: while it decodes, its prompt and half of its answer."""
    contexts = np.ones(len(sample.slo_s))
    for k in range(len(contexts)):
        mine = sample.class_index == k
        prompts, outputs = sample.prompt_tokens[mine], sample.output_tokens[mine]
        if mine.any():
            contexts[k] = outputs @ (prompts + 0.5 * outputs) / outputs.sum()
    return contexts


def _model_tpot_s(pool: PoolSpec, sample: Sample, grid: Array, contexts: Array) -> Array:
    """(L, K, 1) seconds between tokens of a batch of one class, by the profile alone.

    In one second I iterations decode and x requests prefill: I t_decode + x W = 1. Each of n requests gets O - 1 tokens
    from the iterations it stays for, so x = I n / (O - 1), and 1 / I = t_decode(n) + n W / (O - 1).
    """
    fleet = allocate(FleetSpec((dataclasses.replace(pool, replicas=1),)), 1, 1)
    record, out = fleet.pools[0], np.zeros((len(grid), len(sample.slo_s), 1))
    for k in range(out.shape[1]):
        mine = sample.class_index == k
        prompts, outputs = (a[mine] if mine.any() else a for a in (sample.prompt_tokens, sample.output_tokens))
        knots = np.quantile(prompts, (np.arange(16) + 0.5) / 16.0)
        for j, level in enumerate(grid):
            batch = max(round(level), 1)
            extra_s = np.mean([_prefill_extra_s(record, fleet.tables, batch, max(int(x), 1)) for x in knots])
            decode_s = _decode_s(record, fleet.tables, batch, contexts[k])
            out[j, k] = decode_s + level * extra_s / max(outputs.mean() - 1.0, 1.0)
    return out


def _on_grid(levels: Array, values: Array, grid: Array) -> Array:
    """Values measured at ascending `levels`, linear in between and constant outside."""
    flat = values.reshape(len(levels), -1)
    out = np.stack([np.interp(grid, levels, column) for column in flat.T], axis=1)
    return out.reshape(len(grid), *values.shape[1:])


def calibrate(pool: PoolSpec, sample: Sample, requests_per_level: int = 2000) -> Curves:
    """Measures the curves of one replica of `pool`.

    Args:
        pool: the pool; its number of replicas and its in-flight cap do not matter.
        sample: requests in their usual mix.
        requests_per_level: requests of each closed loop, or `TURNS` times the population if that is more.

    Raises:
        InputError: the sample is empty, or nothing in it fits into the KV cache.
    """
    n_classes = len(sample.slo_s)
    capacity_tokens = pool.kv_blocks * pool.block_size_tokens
    unfit = sample.prompt_tokens + sample.output_tokens - 1 > capacity_tokens
    if not len(unfit) or unfit.all():
        raise InputError(f"pool '{pool.name}': sample of {len(unfit)} requests, legal is one or more that fit")
    counts = np.maximum(np.bincount(sample.class_index, minlength=n_classes), 1)

    def mean(of: Array) -> Array:
        return np.bincount(sample.class_index, weights=of, minlength=n_classes) / counts

    tokens = np.stack([mean(sample.prompt_tokens), mean(sample.output_tokens)], axis=1)
    fits = dataclasses.replace(
        sample,
        **{
            name: getattr(sample, name)[~unfit]
            for name in ("class_index", "prompt_tokens", "output_tokens", "patience_s", "value_usd")
        },
    )
    runs = sweep(pool, fits, requests_per_level)
    levels = np.array([run.level for run in runs])
    grid = np.geomspace(1.0, levels[-1], max(math.ceil(PER_OCTAVE * math.log2(levels[-1])), 1) + 1)
    promised = [*sample.slo_s[:, [0, 2]].ravel(), *np.quantile(np.minimum(sample.patience_s, 1e9), [0.999])]
    top_wait_s = 1.2 * max([x for x in promised if x < 1e6], default=60.0)
    moments = _on_grid(levels, np.stack([_moments(run, fits, tokens[:, 1]) for run in runs]), grid)
    kept = np.stack([promises_kept(run, fits, waits(top_wait_s)) for run in runs])
    contexts = _contexts(fits)
    kv_tokens = float(capacity_tokens)
    if runs[-1].blocked_share > BLOCKED_SHARE and levels[-1] < 0.97 * pool.max_num_seqs:
        running = np.bincount(fits.class_index, minlength=n_classes) * moments[-1, :, E2E_S]
        kv_tokens = min(levels[-1] * float(running @ contexts / running.sum()), kv_tokens)
    return Curves(
        slots=float(levels[-1]),
        curves=np.concatenate([moments, _model_tpot_s(pool, fits, grid, contexts)], axis=2),
        kept=_on_grid(levels, kept, grid),
        class_share=np.bincount(sample.class_index, minlength=n_classes) / len(unfit),
        mean_tokens=tokens,
        value_usd=mean(sample.value_usd),
        context_tokens=contexts,
        kv_tokens=kv_tokens,
        unfit_share=mean(unfit),
        top_wait_s=top_wait_s,
    )
