"""Fits a compact profile to measured iterations.

The model of `envs/fleet/iteration.py` is linear in the values at its knots, so one regularised least-squares problem on
relative errors finds them all: token(T), decode(n, m), prefill(x, q), and the coefficients of q^2 and sum c x.
Knots are chosen where the table has rows; there are several rows per knot, so that the profile describes the table and
is no copy of it. The stated errors are those of a four-fold cross-validation.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt

from marginroute.errors import InputError

FloatArray = npt.NDArray[np.float64]

SINGLE_COLUMNS = ("prefill_tokens", "prefill_prefix", "decode_batch", "mean_kv", "iter_ms")
BATCH_COLUMNS = (
    "n_prefill_seqs",
    "prefill_tokens",
    "prefill_tokens_sq_sum",
    "prefill_kv_tokens",
    "prefill_kv_x_tokens",
    "decode_batch",
    "decode_kv_tokens",
    "iter_time_s",
)
_WEIGHTS = (0.03, 0.1, 0.3, 1.0, 3.0)  # of the smoothness penalty, chosen by cross-validation
_FAINT = 1e-3  # pull to zero of what the rows do not tell apart, relative to a bend
_FOLDS = 4
TILE_TOKENS = 8  # matrix kernels compute whole tiles of tokens, so time may step up behind a full one
_WINDOWS_TOKENS = (16, 32, 64, 128)  # on either side of a possible step
_SIZES_AT_STEP = 6  # different batch sizes in the window on either side: fewer cannot tell a step from noise
_STEP_SIGMAS = 4.0  # by which the mean errors on the two sides of a step must differ
_STEP_ROUNDS, _STEPS_PER_ROUND = 8, 16
_FEW = 16  # knots along the tokens while steps are looked for
_STEP_WEIGHT = 0.03  # of a step in the smoothness penalty, relative to a bend
_DIGITS = 6


@dataclasses.dataclass(frozen=True)
class Measured:
    """Measured iterations, one per row; all fields (rows,) and in tokens or seconds.

    Attributes:
        prefills: Requests that prefill.
        prefill_tokens: Sum of their chunks c.
        square: Sum of c^2.
        product: Sum of chunk times prefix, c x.
        prefix: Sum of prefixes x.
        batch: Decodes, n.
        kv: Tokens that they attend to, K.
        seconds: Duration of the iteration.
    """

    prefills: FloatArray
    prefill_tokens: FloatArray
    square: FloatArray
    product: FloatArray
    prefix: FloatArray
    batch: FloatArray
    kv: FloatArray
    seconds: FloatArray

    def rows(self, chosen: npt.NDArray[np.int64]) -> Measured:
        """The chosen rows."""
        return Measured(**{field.name: getattr(self, field.name)[chosen] for field in dataclasses.fields(self)})


def measured_from_columns(columns: dict[str, FloatArray], source: str) -> Measured:
    """Reads either public layout of iteration tables.

    One prefill and equal decodes per row (`SINGLE_COLUMNS`, milliseconds), or sums over any batch (`BATCH_COLUMNS`,
    seconds).

    Raises:
        InputError: Columns are missing, there are too few rows, or a value is not finite or negative.
    """
    for required in (BATCH_COLUMNS, SINGLE_COLUMNS):
        if set(required) <= set(columns):
            break
    else:
        raise InputError(
            f"{source}: columns {', '.join(columns)}; legal are {', '.join(SINGLE_COLUMNS)}, "
            f"or {', '.join(BATCH_COLUMNS)}"
        )
    for name in required:
        bad = ~(np.isfinite(columns[name]) & (columns[name] >= 0.0))
        if bad.any():
            row = int(np.argmax(bad))
            raise InputError(f"{source}: {name} = {columns[name][row]} in row {row + 1}, legal is 0 or more")
    if len(columns["decode_batch"]) < 40:
        raise InputError(f"{source}: {len(columns['decode_batch'])} rows, legal is 40 or more")
    if required is SINGLE_COLUMNS:
        chunk, prefix, batch = columns["prefill_tokens"], columns["prefill_prefix"], columns["decode_batch"]
        measured = Measured(
            prefills=(chunk > 0).astype(np.float64),
            prefill_tokens=chunk,
            square=chunk**2,
            product=chunk * prefix,
            prefix=prefix * (chunk > 0),
            batch=batch,
            kv=batch * columns["mean_kv"],
            seconds=columns["iter_ms"] / 1e3,
        )
    else:
        measured = Measured(*(columns[name] for name in BATCH_COLUMNS))
        # the file has prefix and product in this order: n, tokens, squares, prefix, product
        measured = dataclasses.replace(measured, product=measured.prefix, prefix=measured.product)
    if not (measured.seconds > 0.0).all():
        raise InputError(f"{source}: an iteration of 0 seconds in row {int(np.argmin(measured.seconds)) + 1}")
    return measured


@dataclasses.dataclass(frozen=True, eq=False)
class _Axes:
    token: FloatArray
    batch: FloatArray
    mean_kv: FloatArray
    root: FloatArray
    prefix: FloatArray


def _choose_knots(values: FloatArray, most: int, candidates: FloatArray) -> FloatArray:
    """Both ends and the candidates between which at least rows / most values lie, so at most `most` knots."""
    ordered = np.sort(values)
    knots = [float(candidates[candidates <= ordered[0]].max(initial=candidates[0]))]
    enough = len(values) / most
    for candidate in candidates:
        below = np.searchsorted(ordered, candidate, side="right") - np.searchsorted(ordered, knots[-1], side="right")
        if knots[-1] < candidate < ordered[-1] and below >= enough:
            knots.append(float(candidate))
    top = float(candidates[candidates >= ordered[-1]].min(initial=candidates[-1]))
    if len(knots) > 1 and ordered.size - np.searchsorted(ordered, knots[-1]) < enough / 2:
        knots.pop()
    return np.array([*knots, max(top, knots[-1] + candidates[0])])


def _steps(tokens: FloatArray, errors: FloatArray) -> FloatArray:
    """Ends of tiles behind which the errors of a fit jump: the clearest ones, none beside a clearer one."""
    order = np.argsort(tokens, kind="stable")
    at, sums = tokens[order], np.concatenate([[0.0], np.cumsum(errors[order])])
    squares = np.concatenate([[0.0], np.cumsum(errors[order] ** 2)])
    sizes = np.concatenate([[0], np.cumsum(np.diff(at, prepend=-1.0) > 0)])
    edges = np.arange(TILE_TOKENS, at[-1], TILE_TOKENS)
    clearest = np.zeros(len(edges))
    for window in _WINDOWS_TOKENS:
        low, middle, high = (np.searchsorted(at, edges + d, side="right") for d in (-window, 0, window))
        left, right = np.maximum(middle - low, 1), np.maximum(high - middle, 1)
        jump = (sums[high] - sums[middle]) / right - (sums[middle] - sums[low]) / left
        spread = squares[high] - squares[low] - (sums[high] - sums[middle]) ** 2 / right
        spread -= (sums[middle] - sums[low]) ** 2 / left
        deviation = np.sqrt(np.maximum(spread, 1e-12) / np.maximum(left + right - 2, 1) * (1.0 / left + 1.0 / right))
        enough = np.minimum(sizes[middle] - sizes[low], sizes[high] - sizes[middle]) >= _SIZES_AT_STEP
        clearest = np.maximum(clearest, np.where(enough, np.abs(jump) / deviation, 0.0))
    chosen: list[float] = []
    for edge in edges[np.argsort(-clearest, kind="stable")][: np.sum(clearest > _STEP_SIGMAS)]:
        if all(abs(edge - other) > _WINDOWS_TOKENS[0] for other in chosen):
            chosen.append(float(edge))
    return np.array(chosen[:_STEPS_PER_ROUND])


def _with_steps(measured: Measured, axes: _Axes, share: float, weight: float) -> _Axes:
    """Adds pairs of knots where the time jumps, until a fit shows no more of them.

    The fit has few other knots, since many of them hide a step by following it as a steep line.
    """
    tokens = measured.prefill_tokens + measured.batch
    few = dataclasses.replace(axes, token=axes.token[np.unique(np.linspace(0, len(axes.token) - 1, _FEW).astype(int))])
    for _ in range(_STEP_ROUNDS):
        design = _design(measured, few, share)
        solution = _solve(design, measured.seconds, _smoothness(few), weight)
        found = _steps(tokens, design @ solution / measured.seconds - 1.0)
        found = found[~np.isin(found + 1.0, few.token)]
        if not found.size:
            break
        few = dataclasses.replace(few, token=np.unique([*few.token, *found, *(found + 1.0)]))
    return dataclasses.replace(axes, token=np.unique([*axes.token, *few.token]))


def _axes(measured: Measured) -> _Axes:
    tokens = measured.prefill_tokens + measured.batch
    decodes, prefills = measured.batch > 0, measured.prefills > 0
    behind = measured.prefix > 0
    if not (decodes.any() and prefills.any() and behind.any()):
        raise InputError(
            "iteration table: legal is rows with decodes, with prefills, and with prefills behind a prefix"
        )
    doubling = np.unique(np.concatenate([2 ** np.arange(19.0), 3 * 2 ** np.arange(18.0)]))
    fine = np.unique(np.concatenate([doubling, np.arange(16.0, 8193.0, 16.0)]))
    fours = np.unique(np.concatenate([doubling, np.arange(4.0, 1025.0, 4.0)]))
    sixtyfours = np.unique(np.concatenate([64 * doubling, 64 * np.arange(1.0, 33.0)]))
    large = min(1.0 + len(tokens) / 2000, 3.0)  # a table of thousands of rows carries more knots
    return _Axes(
        token=_choose_knots(tokens, min(24 + len(tokens) // 40, 128), fine),
        batch=_choose_knots(measured.batch[decodes], int(12 * large), fours),
        mean_kv=_choose_knots(measured.kv[decodes] / measured.batch[decodes], int(6 * large), sixtyfours),
        root=_choose_knots(np.sqrt(measured.square[prefills]), int(10 * large), fine),
        prefix=np.unique([0.0, *_choose_knots(measured.prefix[behind], int(4 * large), sixtyfours)]),
    )


def _hats(values: FloatArray, knots: FloatArray) -> FloatArray:
    """Weights of piecewise-linear interpolation, (values, knots)."""
    left = np.clip(np.searchsorted(knots, values, side="right") - 1, 0, len(knots) - 2)
    share = (values - knots[left]) / (knots[left + 1] - knots[left])
    weights = np.zeros((len(values), len(knots)))
    rows = np.arange(len(values))
    weights[rows, left] = 1.0 - share
    weights[rows, left + 1] = share
    return weights


def _outer(a: FloatArray, b: FloatArray, scale: FloatArray) -> FloatArray:
    return (a[:, :, None] * b[:, None, :]).reshape(len(a), -1) * scale[:, None]


def _design(measured: Measured, axes: _Axes, share: float) -> FloatArray:
    """(rows, unknowns): token knots, decode knots (n, m), prefill knots (x, q), q^2, sum c x."""
    mean = measured.kv / np.maximum(measured.batch, 1.0)
    several = (measured.prefills > 0) * (1.0 + share * (measured.prefills > 1))
    return np.hstack(
        [
            _hats(measured.prefill_tokens + measured.batch, axes.token),
            _outer(_hats(measured.batch, axes.batch), _hats(mean, axes.mean_kv), 1.0 * (measured.batch > 0)),
            _outer(_hats(measured.prefix, axes.prefix), _hats(np.sqrt(measured.square), axes.root), several),
            np.stack([measured.square, measured.product], axis=1),
        ]
    )


def _bends(knots: FloatArray) -> FloatArray:
    """Rows that measure how far each inner knot's value is from the line between its neighbours, (<= knots - 2, knots).

    At a step (knots one token apart) it is the line on its other side that is continued, and the step itself counts
    little.
    """
    step = np.flatnonzero((np.diff(knots) == 1.0) & (knots[:-1] % TILE_TOKENS == 0.0))
    rows = []
    for i in range(1, len(knots) - 1):
        row = np.zeros(len(knots))
        if i in step or i - 1 in step:
            at = i if i in step else i - 1
            row[at], row[at + 1] = -_STEP_WEIGHT, _STEP_WEIGHT
            if i == at and at + 2 < len(knots):
                slopes = np.zeros(len(knots))
                before, behind = knots[at] - knots[at - 1], knots[at + 2] - knots[at + 1]
                reach = min(before, behind)
                slopes[[at - 1, at]] = -reach / before, reach / before
                slopes[[at + 1, at + 2]] += reach / behind, -reach / behind
                rows.append(slopes)
        else:
            share = (knots[i] - knots[i - 1]) / (knots[i + 1] - knots[i - 1])
            row[i - 1 : i + 2] = share - 1.0, 1.0, -share
        rows.append(row)
    return np.array(rows).reshape(-1, len(knots))


def _smoothness(axes: _Axes) -> FloatArray:
    """Penalty rows over all unknowns: bends of token, of decode and prefill along both axes, and faint zeros."""
    tables = [(axes.batch, axes.mean_kv), (axes.prefix, axes.root)]
    sizes = [len(axes.token)] + [len(a) * len(b) for a, b in tables]
    unknowns = sum(sizes) + 2
    blocks = [(0, _bends(axes.token))]
    for (a, b), start in zip(tables, np.cumsum(sizes[:-1]), strict=True):
        blocks.append((int(start), np.kron(_bends(a), np.eye(len(b)))))
        blocks.append((int(start), np.kron(np.eye(len(a)), _bends(b))))
    rows = [np.pad(block, ((0, 0), (start, unknowns - start - block.shape[1]))) for start, block in blocks]
    zeros = _FAINT * np.eye(unknowns)[len(axes.token) : unknowns - 2]
    return np.vstack([*rows, zeros])


def _solve(design: FloatArray, seconds: FloatArray, smoothness: FloatArray, weight: float) -> FloatArray:
    """Least squares of the relative error plus weighted bends relative to the median iteration."""
    penalty = smoothness * (weight / np.median(seconds) * np.sqrt(len(seconds) / 1000.0))
    system = np.vstack([design / seconds[:, None], penalty])
    norm = np.sqrt((system**2).sum(axis=0))
    norm[norm == 0.0] = 1.0
    system /= norm
    right = system[: len(seconds)].sum(axis=0)  # the target is 1 for every row and 0 for every penalty
    return np.linalg.lstsq(system.T @ system, right, rcond=1e-14)[0] / norm


def _cross_validated(measured: Measured, axes: _Axes, share: float, weight: float) -> FloatArray:
    """Relative errors of rows that the fit had not seen, (rows,)."""
    design, smoothness = _design(measured, axes, share), _smoothness(axes)
    order = np.random.default_rng(0).permutation(len(measured.seconds))
    errors = np.zeros(len(order))
    for fold in range(_FOLDS):
        out = order[fold::_FOLDS]
        kept = np.setdiff1d(order, out)
        solution = _solve(design[kept], measured.seconds[kept], smoothness, weight)
        errors[out] = design[out] @ solution / measured.seconds[out] - 1.0
    return errors


def _continued(prefill: FloatArray, axes: _Axes, measured: Measured) -> FloatArray:
    """What a prefix adds, continued in proportion to the chunk beyond the longest chunk that was seen behind one."""
    longest = np.sqrt(measured.square[measured.prefix > 0].max())
    last = int(np.searchsorted(axes.root, longest, side="right")) - 1
    added = (prefill - prefill[0])[:, last : last + 1] / axes.root[last]
    outside = axes.root > max(longest, axes.root[min(last + 1, len(axes.root) - 1)])
    return np.where(outside, prefill[0] + added * axes.root, prefill)


def _rounded(values: FloatArray) -> Any:
    flat = np.array([float(f"{value:.{_DIGITS}g}") for value in np.ravel(values)])
    return flat.reshape(np.shape(values)).tolist()


def fit_iterations(measured: Measured, facts: dict[str, Any]) -> dict[str, Any]:
    """The content of a profile file.

    Args:
        measured: The iterations.
        facts: Entries to carry along, such as the source.

    Returns:
        What `profile.compact_profile` reads, and `fit`: rows and cross-validated relative errors in per cent.
    """
    plain = _axes(measured)
    shares = (0.0, 0.05, 0.1, 0.15) if (measured.prefills > 1).any() else (0.0,)
    tried = {(plain, share, _WEIGHTS[1]): _cross_validated(measured, plain, share, _WEIGHTS[1]) for share in shares}
    share = min(tried, key=lambda option: float(np.mean(np.abs(tried[option]))))[1]
    for axes in (plain, _with_steps(measured, plain, share, _WEIGHTS[1])):
        tried |= {(axes, share, weight): _cross_validated(measured, axes, share, weight) for weight in _WEIGHTS}
    best = min(tried, key=lambda option: float(np.mean(np.abs(tried[option]))))
    axes, share, weight = best
    errors = np.abs(tried[best])
    solution = _solve(_design(measured, axes, share), measured.seconds, _smoothness(axes), weight)
    sizes = [len(axes.token), len(axes.batch) * len(axes.mean_kv), len(axes.prefix) * len(axes.root)]
    token, decode, prefill, rest = np.split(solution, np.cumsum(sizes))
    prefill = _continued(prefill.reshape(len(axes.prefix), -1), axes, measured)
    quantiles = np.quantile(errors, [0.5, 0.95, 1.0]) * 100.0
    return {
        **facts,
        "fit": {
            "rows": len(measured.seconds),
            "unknowns": int(solution.size),
            "smoothness": weight,
            **{
                f"{name}_error_pct": round(float(q), 2)
                for name, q in zip(("median", "p95", "max"), quantiles, strict=True)
            },
        },
        "token_knots": axes.token.astype(int).tolist(),
        "token_s": _rounded(np.maximum(token, 1e-6)),
        "decode_batch_knots": axes.batch.astype(int).tolist(),
        "decode_mean_kv_knots": axes.mean_kv.astype(int).tolist(),
        "decode_s": _rounded(decode.reshape(len(axes.batch), -1)),
        "prefill_prefix_knots": axes.prefix.astype(int).tolist(),
        "prefill_root_knots": axes.root.astype(int).tolist(),
        "prefill_s": _rounded(prefill),
        "prefill_square_s": _rounded(rest[0]),
        "prefill_product_s": _rounded(rest[1]),
        "multi_prefill_share": share,
    }
