"""Drift of the requests: their recent distribution against that of training, by PSI and KS.

A bundle carries histograms of the context features that describe a request (class, task, lengths, value, difficulty);
those of load and time are left out, since they move with the hour. Of each feature with bins b, training shares p_b and
recent shares q_b (n requests):

    PSI = sum_b (q_b - p_b) ln(q_b / p_b), less its expectation without drift, (B - 1) (1 / n + 1 / m)
    KS  = max_b |sum_{i<=b} (q_i - p_i)|

PSI above 0.25 is what credit scoring calls a major shift (Siddiqi, Credit Risk Scorecards, 2006; its bias: Yurdakul,
Statistical Properties of Population Stability Index, 2018). One feature beyond a limit is drift.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np

from marginroute.features import FeatureSpec
from marginroute.view import Array

PSI_LIMIT, KS_LIMIT = 0.25, 0.3
BINS = 10
WINDOW = 512  # requests that are looked back on
FEWEST = 256
EVERY_S = 0.5
JUDGE_EVERY = 32
FLOOR = 1e-3  # share of a bin that nobody is in
OF_REQUEST = ("difficulty_signal", "prompt_tokens", "expected_output_tokens", "value_usd")
ONE_HOT = ("class_", "task_")


@dataclass(frozen=True, eq=False)
class Histograms:
    """What training has seen of some context features.

    Attributes:
        names: (M,) of features.
        columns: (M,) their places in the context.
        edges: (M, BINS - 1) between bins, ascending; inf: no such bin.
        shares: (M, BINS) of the training requests.
        samples: requests that were looked at.
    """

    names: tuple[str, ...]
    columns: Array
    edges: Array
    shares: Array
    samples: int

    def bins(self, context: Array) -> Array:
        """(..., M) bin of each feature of contexts (..., G)."""
        x = context[..., self.columns]
        return (x[..., None] > self.edges).sum(axis=-1)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for a bundle's manifest."""
        edges = [[float(x) for x in row if np.isfinite(x)] for row in self.edges]
        return {
            "samples": self.samples,
            "features": [
                {"name": name, "edges": edge, "shares": [round(float(x), 6) for x in row[: len(edge) + 1]]}
                for name, edge, row in zip(self.names, edges, self.shares, strict=True)
            ],
        }

    @staticmethod
    def from_dict(data: dict[str, Any], spec: FeatureSpec) -> Histograms:
        """The inverse of `to_dict`."""
        rows, place = data["features"], {f.name: i for i, f in enumerate(spec.context)}
        edges, shares = np.full((len(rows), BINS - 1), np.inf), np.zeros((len(rows), BINS))
        for i, row in enumerate(rows):
            edges[i, : len(row["edges"])] = row["edges"]
            shares[i, : len(row["shares"])] = row["shares"]
        names = tuple(row["name"] for row in rows)
        return Histograms(names, np.array([place[n] for n in names], dtype=np.int64), edges, shares, data["samples"])


def histograms_of(context: Array, spec: FeatureSpec) -> Histograms:
    """Histograms of contexts (B, G) by deciles; a value that fills several of them has one bin."""
    names = [f.name for f in spec.context if f.name in OF_REQUEST or f.name.startswith(ONE_HOT)]
    place = {f.name: i for i, f in enumerate(spec.context)}
    columns = np.array([place[name] for name in names], dtype=np.int64)
    edges = np.full((len(names), BINS - 1), np.inf)
    for i, column in enumerate(columns):
        x = context[:, column].astype(np.float64)
        cuts = np.unique(np.quantile(x, np.arange(1, BINS) / BINS))
        if names[i].startswith(ONE_HOT):
            cuts = np.array([0.5])
        cuts = cuts[cuts < x.max()] if not names[i].startswith(ONE_HOT) else cuts
        edges[i, : len(cuts)] = cuts
    made = Histograms(tuple(names), columns, edges, np.zeros((len(names), BINS)), len(context))
    found = made.bins(context)
    shares = np.stack([np.bincount(found[:, i], minlength=BINS) for i in range(len(names))]) / len(context)
    return Histograms(made.names, columns, edges, shares, len(context))


def psi(recent: Array, training: Array, n: float, m: float) -> Array:
    """Population stability index (...) of shares (..., BINS), less its bias; bins that neither has do not count."""
    there = (recent > 0.0) | (training > 0.0)
    q, p = np.maximum(recent, FLOOR), np.maximum(training, FLOOR)
    bias = (there.sum(axis=-1) - 1.0) * (1.0 / n + 1.0 / m)
    raw = np.where(there, (q - p) * np.log(q / p), 0.0).sum(axis=-1)
    return np.asarray(np.maximum(raw - bias, 0.0))


def ks(recent: Array, training: Array) -> Array:
    """Largest distance (...) of the two distributions at the bins' edges."""
    return np.asarray(np.abs(np.cumsum(recent - training, axis=-1)).max(axis=-1))


class DriftMonitor:
    """Judges the last `WINDOW` requests; not thread-safe (its gateway's lock is held).

    Args:
        histograms: of training.
        blind: features that this gateway cannot see, which say nothing here.

    Attributes:
        every_s: seconds between two requests that are looked at, at least: a look costs as much as a decision.
        drifted: whether a feature is beyond a limit; `worst`: its name; `psi`, `ks`: (M,) as last judged.
    """

    def __init__(self, histograms: Histograms, blind: Collection[str] = ()) -> None:
        self._of = histograms
        self._seen = np.array([name not in blind for name in histograms.names])
        self._rows = np.arange(len(histograms.names))
        self._ring = np.zeros((WINDOW, len(histograms.names)), dtype=np.int64)
        self._counts = np.zeros_like(histograms.shares)
        self._n, self._due_s = 0, -np.inf
        self.every_s = EVERY_S
        self.drifted, self.worst = False, ""
        self.psi, self.ks = np.zeros(len(self._rows)), np.zeros(len(self._rows))

    def wants(self, now_s: float) -> bool:
        """Whether a request at this time is to be looked at."""
        if now_s < self._due_s:
            return False
        self._due_s = now_s + self.every_s
        return True

    def saw(self, context: Array) -> None:
        """A request with context features (G,)."""
        bins = self._of.bins(context)
        at = self._n % WINDOW
        if self._n >= WINDOW:
            self._counts[self._rows, self._ring[at]] -= 1.0
        self._ring[at] = bins
        self._counts[self._rows, bins] += 1.0
        self._n += 1
        if self._n >= FEWEST and self._n % JUDGE_EVERY == 0:
            self._judge()

    def values(self) -> dict[str, tuple[float, float]]:
        """PSI and KS by feature."""
        return {n: (float(p), float(k)) for n, p, k in zip(self._of.names, self.psi, self.ks, strict=True)}

    def _judge(self) -> None:
        n = float(min(self._n, WINDOW))
        recent = self._counts / n
        self.psi = np.where(self._seen, psi(recent, self._of.shares, n, self._of.samples), 0.0)
        self.ks = np.where(self._seen, ks(recent, self._of.shares), 0.0)
        worst = int(np.maximum(self.psi / PSI_LIMIT, self.ks / KS_LIMIT).argmax()) if len(self._rows) else 0
        self.drifted = bool(len(self._rows) and (self.psi[worst] > PSI_LIMIT or self.ks[worst] > KS_LIMIT))
        self.worst = self._of.names[worst] if self.drifted else ""
