"""Seconds: mixtures of lognormals, cut at an upper bound."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class SecondsMixture:
    """A mixture of lognormal durations.

    Attributes:
        weight: (B,) positive; rescaled to add up to 1.
        median_s: (B,) medians.
        sigma: (B,) standard deviations of ln seconds.
        max_s: upper bound.
    """

    weight: tuple[float, ...]
    median_s: tuple[float, ...]
    sigma: tuple[float, ...]
    max_s: float

    def draw(self, rng: np.random.Generator, size: int) -> Array:
        """Durations (size,) f8."""
        edges = np.cumsum(self.weight)
        part = np.minimum(np.searchsorted(edges, rng.random(size) * edges[-1], side="right"), len(edges) - 1)
        seconds = np.array(self.median_s)[part] * np.exp(np.array(self.sigma)[part] * rng.standard_normal(size))
        return np.minimum(seconds, self.max_s)
