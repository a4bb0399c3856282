"""Token counts: mixtures of lognormals, rounded and clipped to bounds."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from marginroute.quality import normal_cdf

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class LengthMixture:
    """A mixture of lognormal token counts.

    A draw X of the mixture becomes round(X), clipped to [min_tokens, max_tokens].

    Attributes:
        weight: (B,) positive; rescaled to add up to 1.
        median_tokens: (B,) medians, exp(mu).
        sigma: (B,) standard deviations of ln tokens.
        min_tokens: lower bound, at least 1.
        max_tokens: upper bound.
    """

    weight: tuple[float, ...]
    median_tokens: tuple[float, ...]
    sigma: tuple[float, ...]
    min_tokens: int
    max_tokens: int

    def draw(self, uniform: Array, normal: Array) -> Array:
        """Token counts (M,) i4 from (M,) uniforms that choose components and (M,) standard normals."""
        edges = np.cumsum(self.weight)
        component = np.minimum(np.searchsorted(edges, uniform * edges[-1], side="right"), len(edges) - 1)
        mu = np.log(self.median_tokens)[component]
        tokens = np.exp(mu + np.array(self.sigma)[component] * normal)
        return np.clip(np.rint(tokens), self.min_tokens, self.max_tokens).astype(np.int32)

    def cdf(self, tokens: Array) -> Array:
        """P(count <= tokens) for integer token counts, any shape."""
        tokens = np.asarray(tokens, dtype=np.float64)
        weight = np.array(self.weight) / np.sum(self.weight)
        standard = (np.log(np.maximum(tokens, 0.0) + 0.5)[..., None] - np.log(self.median_tokens)) / self.sigma
        below = normal_cdf(standard) @ weight
        return np.where(tokens < self.min_tokens, 0.0, np.where(tokens >= self.max_tokens, 1.0, below))

    def mean_tokens(self) -> float:
        """Expected count after rounding and clipping."""
        tail = 1.0 - self.cdf(np.arange(self.min_tokens, self.max_tokens))
        return self.min_tokens + math.fsum(tail)
