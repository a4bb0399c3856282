"""Fits `marginroute.predictor` on an outcome table: ridge logistic per model on hashed n-grams, then calibration.

Rows of the design matrix are made by the gateway's own code (`marginroute.prompt`). Rare n-grams weigh more: counts are
multiplied by idf_b = ln((1 + N) / (1 + df_b)) + 1, and divided by the square root of the text's number of n-grams. The
strength of the ridge is chosen by cross-validation over prompts; the same predictions, of rows not fitted on, fit the
calibration (see `marginroute.predictor`), which is a two-variable logistic regression per model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from marginroute import prompt
from marginroute.errors import InputError
from marginroute.predictor import QualityPredictor
from marginroute.view import Array

BITS = 16
C_GRID = (0.003, 0.01, 0.03, 0.1)  # inverse ridge strengths tried
FOLDS = 5
SURFACE_SCALE = 0.3  # surface counts are standardised to this deviation, so that the ridge shrinks them more
CALIBRATION_C = 1.0
MIN_OUTCOMES = 5  # of either kind, per model


@dataclass(frozen=True, eq=False)
class Design:
    """Rows of N prompts as a predictor sees them.

    Attributes:
        grams: (N, 2^BITS) counts of n-grams over the square root of their number.
        surface: (N, S).
    """

    grams: sp.csr_matrix
    surface: Array

    def rows(self, index: Array) -> Design:
        """Some of the rows."""
        return Design(self.grams[index], self.surface[index])


@dataclass(frozen=True, eq=False)
class Linear:
    """z = bias + surface @ s + grams @ weight, one column per model; in the units of `Design`."""

    weight: Array
    surface: Array
    bias: Array

    def raw(self, design: Design) -> Array:
        """(N, T)."""
        z: Array = design.grams @ self.weight + design.surface @ self.surface + self.bias
        return z


def design_of(texts: list[str], bits: int = BITS) -> Design:
    """The design matrix of some texts."""
    indices, counts, surface = [], [0], []
    for text in texts:
        data, size = prompt.read(text)
        indices.append(prompt.buckets(data, bits))
        counts.append(len(indices[-1]))
        surface.append(prompt.surface(data, size))
    values = np.repeat(1.0 / np.sqrt(np.maximum(counts[1:], 1)), counts[1:])
    grams = sp.csr_matrix((values, np.concatenate(indices), np.cumsum(counts)), shape=(len(texts), 1 << bits))
    grams.sum_duplicates()
    return Design(grams, np.array(surface))


def fit_linear(design: Design, good: Array, c: float) -> Linear:
    """Ridge logistic regression of (N, T) outcomes, NaN where unknown."""
    mean, deviation = design.surface.mean(axis=0), design.surface.std(axis=0)
    scale = np.where(deviation > 1e-9, SURFACE_SCALE / np.maximum(deviation, 1e-9), 0.0)
    idf = np.log((1.0 + len(good)) / (1.0 + design.grams.getnnz(axis=0))) + 1.0
    rows = sp.hstack([design.grams.multiply(idf), (design.surface - mean) * scale], format="csr")
    coefficients, bias = [], []
    for outcomes in good.T:
        known = ~np.isnan(outcomes)
        if len(np.unique(outcomes[known])) < 2:  # a fold with one outcome only: the pooled rate, no slope
            share = (outcomes[known].sum() + 0.5) / (known.sum() + 1.0)
            coefficients.append(np.zeros(rows.shape[1]))
            bias.append(np.log(share / (1.0 - share)))
            continue
        model = LogisticRegression(C=c, max_iter=1000).fit(rows[known], outcomes[known])
        coefficients.append(model.coef_[0])
        bias.append(model.intercept_[0])
    w = np.array(coefficients).T
    n = design.grams.shape[1]
    surface = w[n:] * scale[:, None]
    return Linear(w[:n] * idf[:, None], surface, np.array(bias) - mean @ surface)


def folds_of(n: int, k: int, seed: int) -> Array:
    """(n,) fold of each prompt; prompts are distinct, so that no text is on both sides."""
    return np.random.default_rng(seed).permutation(n) % k


def cross_validated(design: Design, good: Array, c: float, k: int = FOLDS, seed: int = 0) -> Array:
    """(N, T) z of every prompt by a fit that has not seen it."""
    z, fold = np.empty(good.shape), folds_of(len(good), k, seed)
    for f in range(k):
        inside = np.flatnonzero(fold != f)
        z[fold == f] = fit_linear(design.rows(inside), good[inside], c).raw(design.rows(np.flatnonzero(fold == f)))
    return z


def calibrate(z: Array, good: Array) -> tuple[Array, Array, Array]:
    """(T,) scale, shared and offset of the calibrated logit, from predictions of rows not fitted on."""
    found = []
    for t, outcomes in enumerate(good.T):
        known = ~np.isnan(outcomes)
        rows = np.stack([z[known, t], z[known].mean(axis=1)], axis=1)
        model = LogisticRegression(C=CALIBRATION_C, max_iter=1000).fit(rows, outcomes[known])
        found.append((*model.coef_[0], model.intercept_[0]))
    scale, shared, offset = np.array(found).T
    return scale, shared, offset


def log_loss(logit: Array, good: Array) -> Array:
    """(T,) mean log loss in nats over known outcomes."""
    return np.nanmean(np.logaddexp(0.0, logit) - good * logit, axis=0)


def calibrated(z: Array, scale: Array, shared: Array, offset: Array) -> Array:
    """(N, T) logits as the runtime computes them."""
    logit: Array = scale * z + shared * z.mean(axis=1, keepdims=True) + offset
    return logit


def auc_of(logit: Array, good: Array) -> Array:
    """(T,) area under the ROC curve; NaN where a model has one outcome only."""
    found = []
    for t, outcomes in enumerate(good.T):
        known = ~np.isnan(outcomes)
        both = len(np.unique(outcomes[known])) == 2
        found.append(roc_auc_score(outcomes[known], logit[known, t]) if both else np.nan)
    return np.array(found)


def check(models: tuple[str, ...], good: Array) -> None:
    """Refuses a table from which a model's quality cannot be learned.

    Raises:
        InputError: a model has next to no good, or no bad, outcomes.
    """
    for name, outcomes in zip(models, good.T, strict=True):
        counts = int((outcomes == 0).sum()), int((outcomes == 1).sum())
        if min(counts) < MIN_OUTCOMES:
            raise InputError(
                f"model {name!r} has {counts[1]} good and {counts[0]} bad outcomes; "
                f"legal is at least {MIN_OUTCOMES} of either kind"
            )


def fit_predictor(
    texts: list[str],
    models: tuple[str, ...],
    good: Array,
    seed: int = 0,
    note: Callable[[str], None] = lambda _: None,
) -> QualityPredictor:
    """The predictor of a table; its `auc` is NaN until rows held out have been judged.

    Args:
        texts: (N,) distinct prompts.
        models: (T,) names.
        good: (N, T) 1, 0 or NaN.
        seed: of the folds.
        note: told what is going on.

    Raises:
        InputError: too few outcomes of a model.
    """
    check(models, good)
    design = design_of(texts)
    best: tuple[float, float, Array] | None = None
    for c in C_GRID:
        z = cross_validated(design, good, c, seed=seed)
        loss = float(log_loss(calibrated(z, *calibrate(z, good)), good).mean())
        note(f"ridge C = {c:g}: log loss {loss:.4f} on rows left out")
        if best is None or loss < best[0]:
            best = loss, c, z
    assert best is not None
    _, c, z = best
    linear, calibration = fit_linear(design, good, c), calibrate(z, good)
    mean_logit = calibrated(z, *calibration).mean(axis=1)
    return QualityPredictor(
        models,
        linear.weight,
        linear.surface,
        linear.bias,
        *calibration,
        difficulty=np.array([mean_logit.mean(), mean_logit.std()]),
        auc=np.full(len(models), np.nan),
    )
