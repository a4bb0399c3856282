"""Sections for token counts and durations: mixtures of lognormals."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from envs.scenario_section import Positive, Section
from envs.workload.durations import SecondsMixture
from envs.workload.lengths import LengthMixture

Weight = Annotated[float, Field(gt=0.0)]


class LengthComponent(Section):
    """One lognormal component."""

    weight: Weight = Field(description="Relative weight of the component.")
    median_tokens: Positive = Field(description="Median of the component, exp(mu).")
    sigma: Positive = Field(description="Standard deviation of ln tokens.")


class LengthSection(Section):
    """A mixture of lognormal token counts, clipped to bounds."""

    components: Annotated[tuple[LengthComponent, ...], Field(min_length=1, max_length=12, strict=False)] = Field(
        description="Components of the mixture."
    )
    min_tokens: Annotated[int, Field(ge=1)] = Field(1, description="Shortest length.")
    max_tokens: Annotated[int, Field(ge=1)] = Field(description="Longest length.")

    @model_validator(mode="after")
    def _ordered(self) -> LengthSection:
        if self.max_tokens < self.min_tokens:
            raise ValueError(f"has max_tokens {self.max_tokens}; legal is at least min_tokens, {self.min_tokens}")
        return self

    def build(self) -> LengthMixture:
        """The mixture as plain numbers."""
        return LengthMixture(
            tuple(part.weight for part in self.components),
            tuple(part.median_tokens for part in self.components),
            tuple(part.sigma for part in self.components),
            self.min_tokens,
            self.max_tokens,
        )


class SecondsComponent(Section):
    """One lognormal component."""

    weight: Weight = Field(1.0, description="Relative weight of the component.")
    median_s: Positive = Field(description="Median of the component, exp(mu).")
    sigma: Positive = Field(description="Standard deviation of ln seconds.")


class SecondsSection(Section):
    """A mixture of lognormal durations, cut at an upper bound."""

    components: Annotated[tuple[SecondsComponent, ...], Field(min_length=1, max_length=12, strict=False)] = Field(
        description="Components of the mixture."
    )
    max_s: Positive = Field(86400.0, description="Longest duration.")

    def build(self) -> SecondsMixture:
        """The mixture as plain numbers."""
        return SecondsMixture(
            tuple(part.weight for part in self.components),
            tuple(part.median_s for part in self.components),
            tuple(part.sigma for part in self.components),
            self.max_s,
        )
