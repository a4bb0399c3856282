"""Engine profiles: iteration times of one model on one engine, as data.

A profile is loaded from a few fitted knots (`compact_profile`), from look-up tables in Vidur's layout
(`tables_profile`) or made up for a test (`constant_profile`), and kept dense, so that the kernels only index. What the
numbers mean stands in `envs/fleet/iteration.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from marginroute.errors import InputError

FloatArray = npt.NDArray[np.float64]

BIN_TOKENS = 64  # resolution of the edges of decode bins
_OPEN_END = 1 << 40  # upper edge of the last decode bin, tokens


@dataclasses.dataclass(frozen=True, eq=False)
class Profile:
    """Iteration times of one model on one engine, dense.

    Attributes:
        name: Name, as in configs/fleets/profiles.
        token_s: Seconds by tokens in the batch, (T + 1,); continues with its last slope.
        decode_upper_tokens: Upper edges of the bins of mean decode length, (B,), multiples of 64, the last is open.
        decode_base_s: (n + 1, B), row 0 unused; continues with the slope of its last two rows.
        decode_slope_s: Seconds per token of mean length, (n + 1, B).
        prefill_s: (rows of 64 prefix tokens, q + 1); clamped at its last row and column.
        prefill_square_s: a_sq, seconds per squared chunk token.
        prefill_product_s: a_px, seconds per chunk token times prefix token.
        prefill_prefix_s: a_x, seconds per prefix token.
        multi_prefill_share: Added share of `prefill_s` when several requests prefill in one iteration.
        facts: Source, fit error and the model's KV-cache figures, as in the file.
    """

    name: str
    token_s: FloatArray
    decode_upper_tokens: npt.NDArray[np.int64]
    decode_base_s: FloatArray
    decode_slope_s: FloatArray
    prefill_s: FloatArray
    prefill_square_s: float = 0.0
    prefill_product_s: float = 0.0
    prefill_prefix_s: float = 0.0
    multi_prefill_share: float = 0.0
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def _knots(data: Mapping[str, Any], key: str, profile: str) -> FloatArray:
    try:
        values = np.asarray(data[key], dtype=np.float64)
    except KeyError:
        raise InputError(f"profile '{profile}': '{key}' is missing") from None
    except (TypeError, ValueError):
        raise InputError(f"profile '{profile}': '{key}' holds something that is not a number") from None
    if not np.isfinite(values).all():
        raise InputError(f"profile '{profile}': '{key}' holds a value that is not finite")
    return values


def _check_axis(axis: FloatArray, key: str, profile: str) -> None:
    if axis.ndim != 1 or axis.size < 1 or np.any(np.diff(axis) <= 0) or np.any(axis != np.floor(axis)):
        raise InputError(f"profile '{profile}': '{key}' = {axis.tolist()}, legal is an ascending list of integers")


def _interpolate(at: FloatArray, axis: FloatArray, values: FloatArray) -> FloatArray:
    """Piecewise linear along axis 0 of `values`, continued with the slope of the outer intervals."""
    if axis.size == 1:
        return np.repeat(values[:1], at.size, axis=0)
    left = np.clip(np.searchsorted(axis, at, side="right") - 1, 0, axis.size - 2)
    share = (at - axis[left]) / (axis[left + 1] - axis[left])
    share = share.reshape(-1, *([1] * (values.ndim - 1)))
    return values[left] * (1.0 - share) + values[left + 1] * share


def _prefill_table(name: str, data: Mapping[str, Any]) -> FloatArray:
    """Dense prefill seconds, (rows of 64 prefix tokens, q + 1)."""
    if "prefill_root_knots" not in data:
        return np.zeros((1, 1))
    root_at, prefix_at = _knots(data, "prefill_root_knots", name), np.zeros(1)
    if "prefill_prefix_knots" in data:
        prefix_at = _knots(data, "prefill_prefix_knots", name)
    for key, axis in (("prefill_root_knots", root_at), ("prefill_prefix_knots", prefix_at)):
        _check_axis(axis, key, name)
    values = _knots(data, "prefill_s", name)
    if values.shape != (prefix_at.size, root_at.size) or prefix_at[0] != 0 or np.any(prefix_at % BIN_TOKENS):
        raise InputError(
            f"profile '{name}': 'prefill_s' has shape {values.shape}, legal is {(prefix_at.size, root_at.size)}: a row "
            f"per prefill_prefix_knots (0 first, multiples of {BIN_TOKENS}), one column per prefill_root_knots"
        )
    rows = _interpolate(np.arange(0.0, prefix_at[-1] + 1.0, BIN_TOKENS), prefix_at, values)
    return _interpolate(np.arange(0.0, root_at[-1] + 1.0), root_at, rows.T).T.copy()


def compact_profile(name: str, data: Mapping[str, Any]) -> Profile:
    """Profile from fitted knots.

    Args:
        name: Name for messages.
        data: `token_knots` and `token_s`; `decode_batch_knots` (n), `decode_mean_kv_knots` (m, multiples of 64 but for
            the first) and `decode_s` (n, m); the scalars `prefill_square_s`, `prefill_product_s`, `prefill_prefix_s`
            (default 0); optionally `prefill_prefix_knots` (multiples of 64, from 0), `prefill_root_knots` and
            `prefill_s` (prefix, root), further seconds over (x, q). All other entries are kept as facts.

    Raises:
        InputError: A knot is missing, not finite, or the axes do not ascend or fit.
    """
    token_at, token_s = _knots(data, "token_knots", name), _knots(data, "token_s", name)
    batch_at = _knots(data, "decode_batch_knots", name)
    mean_at = _knots(data, "decode_mean_kv_knots", name)
    decode_s = _knots(data, "decode_s", name)
    for key, axis in (
        ("token_knots", token_at),
        ("decode_batch_knots", batch_at),
        ("decode_mean_kv_knots", mean_at),
    ):
        _check_axis(axis, key, name)
    if token_at.shape != token_s.shape:
        raise InputError(f"profile '{name}': 'token_s' has {token_s.size} values for {token_at.size} token_knots")
    if decode_s.shape != (batch_at.size, mean_at.size) or mean_at.size < 2:
        raise InputError(
            f"profile '{name}': 'decode_s' has shape {decode_s.shape}, legal is one row per batch knot and one column "
            f"per mean_kv knot (2 or more): {(batch_at.size, mean_at.size)}"
        )
    if np.any(mean_at[1:] % BIN_TOKENS):
        raise InputError(f"profile '{name}': 'decode_mean_kv_knots' after the first must be multiples of {BIN_TOKENS}")
    rows = _interpolate(np.arange(0.0, batch_at[-1] + 1.0), batch_at, decode_s)
    slope = np.diff(rows, axis=1) / np.diff(mean_at)
    base = rows[:, :-1] - slope * mean_at[:-1]
    upper = mean_at[1:].astype(np.int64)
    upper[-1] = _OPEN_END
    prefill_s = _prefill_table(name, data)
    used = {"token_knots", "token_s", "decode_batch_knots", "decode_mean_kv_knots", "decode_s"}
    used |= {"prefill_prefix_knots", "prefill_root_knots", "prefill_s"}
    scalars = {
        key: float(_knots({key: data.get(key, 0.0)}, key, name))
        for key in ("prefill_square_s", "prefill_product_s", "prefill_prefix_s", "multi_prefill_share")
    }
    profile = Profile(
        name=name,
        token_s=_interpolate(np.arange(0.0, token_at[-1] + 1.0), token_at, token_s),
        decode_upper_tokens=upper,
        decode_base_s=base,
        decode_slope_s=slope,
        prefill_s=prefill_s,
        facts={key: value for key, value in data.items() if key not in used and key not in scalars},
        **scalars,
    )
    _check_positive(profile)
    return profile


def _check_positive(profile: Profile) -> None:
    """No iteration on the knots may take 0 seconds or less."""
    token_s, prefill_s, decode_s = profile.token_s, profile.prefill_s, profile.decode_base_s
    batches = min(len(decode_s), len(token_s))
    shortest = decode_s + profile.decode_slope_s * np.array([0, *profile.decode_upper_tokens[:-1]])
    columns = min(prefill_s.shape[1], len(token_s))
    totals = {
        "token_s": token_s[1:],
        "decode_s": token_s[1:batches, None] + shortest[1:batches],
        "prefill_s": token_s[1:columns] + prefill_s[:, 1:columns],
    }
    for key, seconds in totals.items():
        if seconds.size and seconds.min() <= 0.0:
            raise InputError(
                f"profile '{profile.name}': '{key}' makes an iteration of {seconds.min():.3g} s, legal is > 0"
            )


def tables_profile(name: str, tables: Mapping[str, Any]) -> Profile:
    """Profile from Vidur's look-up tables `tok`, `kvs`, `dec`, `pre` and the shares `gqa`, `pfo`.

    Raises:
        InputError: A table is missing, has another number of axes, or holds something that is not a finite number.
    """
    missing = [key for key in ("tok", "kvs", "dec", "pre", "gqa", "pfo") if key not in tables]
    if missing:
        raise InputError(f"profile '{name}': table '{missing[0]}' is missing")
    for key, axes in (("tok", 1), ("kvs", 1), ("dec", 2), ("pre", 2), ("gqa", 0), ("pfo", 0)):
        array = np.asarray(tables[key])
        if array.ndim != axes or not array.size or array.dtype.kind not in "fiu" or not np.isfinite(array).all():
            raise InputError(
                f"profile '{name}': table '{key}' of {array.dtype} has shape {array.shape}; "
                f"legal is finite numbers along {axes} axes"
            )
    tokens = np.arange(len(tables["kvs"]))
    eights = np.minimum((tokens + 7) // 8, len(tables["tok"]) - 1)
    decode = np.array(tables["dec"], dtype=np.float64)
    decode[2:] *= 1.0 + float(tables["gqa"])
    upper = np.arange(decode.shape[1], dtype=np.int64) * BIN_TOKENS
    upper[-1] = _OPEN_END
    return Profile(
        name=name,
        token_s=np.asarray(tables["tok"])[eights] + np.asarray(tables["kvs"]),
        decode_upper_tokens=upper,
        decode_base_s=decode,
        decode_slope_s=np.zeros_like(decode),
        prefill_s=np.asarray(tables["pre"], dtype=np.float64),
        multi_prefill_share=float(tables["pfo"]),
    )


def constant_profile(seconds: float, name: str = "constant") -> Profile:
    """Every iteration takes the same time, whatever is in the batch (queues with a known answer)."""
    return Profile(
        name=name,
        token_s=np.full(2, float(seconds)),
        decode_upper_tokens=np.array([_OPEN_END]),
        decode_base_s=np.zeros((2, 1)),
        decode_slope_s=np.zeros((2, 1)),
        prefill_s=np.zeros((1, 1)),
    )


def _rows_to(values: FloatArray, rows: int) -> FloatArray:
    """Cut or continue axis 0 to `rows` rows with the slope of the last two."""
    if len(values) < rows:
        slope = values[-1] - values[-2] if len(values) > 2 else np.zeros_like(values[-1])
        more = values[-1] + slope * np.arange(1, rows - len(values) + 1)[:, None]
        values = np.concatenate([values, np.maximum(more, values[-1])])
    return values[:rows]


def flatten_profile(profile: Profile, max_num_seqs: int, offset: int) -> tuple[FloatArray, dict[str, float]]:
    """The part of `tables` that holds a profile, and the POOL fields that point into it.

    Args:
        profile: The profile.
        max_num_seqs: Largest decode batch.
        offset: Where this part will start in `tables`.
    """
    base = _rows_to(profile.decode_base_s, max_num_seqs + 1)
    slope = _rows_to(profile.decode_slope_s, max_num_seqs + 1)
    upper = profile.decode_upper_tokens
    edges = int(upper[-2]) // BIN_TOKENS + 2 if upper.size > 1 else 1
    bin_of = np.searchsorted(upper, np.arange(edges) * BIN_TOKENS, side="left").astype(np.float64)
    interleaved = np.stack([base, slope], axis=-1)  # (n, B, 2): base and slope side by side
    parts = [profile.token_s, bin_of, upper.astype(np.float64), interleaved.ravel(), profile.prefill_s.ravel()]
    starts = offset + np.cumsum([0, *(part.size for part in parts[:-1])])
    token = profile.token_s
    fields: dict[str, float] = {
        "token_at": int(starts[0]),
        "token_count": token.size,
        "token_tail_s": float(token[-1] - token[-2]) if token.size > 1 else 0.0,
        "bin_at": int(starts[1]),
        "bin_count": edges,
        "upper_at": int(starts[2]),
        "decode_at": int(starts[3]),
        "decode_bins": upper.size,
        "prefill_at": int(starts[4]),
        "prefill_rows": profile.prefill_s.shape[0],
        "prefill_columns": profile.prefill_s.shape[1],
        "prefill_square_s": profile.prefill_square_s,
        "prefill_product_s": profile.prefill_product_s,
        "prefill_prefix_s": profile.prefill_prefix_s,
        "multi_prefill_share": profile.multi_prefill_share,
    }
    return np.concatenate(parts), fields
