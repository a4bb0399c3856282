"""Sections for arrival processes."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from envs.scenario_section import Name, NonNegative, Positive, Section
from envs.workload.arrivals import GammaArrivals, MmppArrivals
from envs.workload.arrivals_bursts import BurstArrivals, WeibullArrivals
from envs.workload.season import Season


class GammaSection(Section):
    """Renewal arrivals with Gamma gaps."""

    kind: Literal["gamma"] = Field(description="gamma: renewal process with Gamma gaps.")
    rate_per_s: Positive = Field(description="Mean arrivals per second.")
    gap_cv: Positive = Field(description="Coefficient of variation of the gaps; 1 is Poisson.")

    def build(self) -> GammaArrivals:
        """The process as plain numbers."""
        return GammaArrivals(self.rate_per_s, self.gap_cv)


class MmppState(Section):
    """One state of a Markov-modulated Poisson process."""

    rate_per_s: NonNegative = Field(description="Arrivals per second while in the state.")
    dwell_s: Positive = Field(description="Mean seconds in the state before it is left.")
    next_weight: dict[Name, NonNegative] = Field(
        default_factory=dict, description="Relative weights of the states that may follow; left out: all others alike."
    )


class MmppSection(Section):
    """Markov-modulated Poisson arrivals."""

    kind: Literal["mmpp"] = Field(description="mmpp: Poisson arrivals whose rate jumps between states.")
    states: dict[Name, MmppState] = Field(min_length=2, description="States by name.")

    @model_validator(mode="after")
    def _legal(self) -> MmppSection:
        for name, state in self.states.items():
            for follower in state.next_weight:
                if follower == name or follower not in self.states:
                    others = ", ".join(other for other in self.states if other != name)
                    raise ValueError(f"state {name} cannot be followed by {follower}; legal is {others}")
            if state.next_weight and not any(state.next_weight.values()):
                raise ValueError(f"state {name} has no follower; legal is a positive next_weight")
        if not any(state.rate_per_s > 0.0 for state in self.states.values()):
            raise ValueError("has no arrivals; legal is a positive rate_per_s in at least one state")
        return self

    def build(self) -> MmppArrivals:
        """The process as plain numbers."""
        jump = []
        for name, state in self.states.items():
            weights = [
                0.0 if other == name else state.next_weight.get(other, 0.0 if state.next_weight else 1.0)
                for other in self.states
            ]
            jump.append(tuple(weight / sum(weights) for weight in weights))
        states = self.states.values()
        return MmppArrivals(tuple(s.rate_per_s for s in states), tuple(s.dwell_s for s in states), tuple(jump))


class WeibullSection(Section):
    """Renewal arrivals with Weibull gaps."""

    kind: Literal["weibull"] = Field(description="weibull: renewal process with Weibull gaps.")
    rate_per_s: Positive = Field(description="Mean arrivals per second.")
    gap_cv: Annotated[float, Field(ge=0.05, le=50.0)] = Field(description="Coefficient of variation of the gaps.")

    def build(self) -> WeibullArrivals:
        """The process as plain numbers."""
        return WeibullArrivals(self.rate_per_s, self.gap_cv)


class BurstStream(Section):
    """A part of the arrivals whose rate is drawn anew again and again."""

    share: Annotated[float, Field(gt=0.0, le=1.0)] = Field(description="Share of the arrivals.")
    dwell_s: Positive = Field(description="Mean seconds for which it keeps its rate.")
    cv: Positive = Field(description="Coefficient of variation of its rate.")


class BurstSection(Section):
    """Poisson arrivals whose rate varies on several time scales at once."""

    kind: Literal["bursts"] = Field(description="bursts: Poisson with a rate that varies on several time scales.")
    rate_per_s: Positive = Field(description="Mean arrivals per second.")
    streams: Annotated[tuple[BurstStream, ...], Field(max_length=12, strict=False)] = Field(
        description="Streams with varying rates; what their shares leave over is plain Poisson."
    )

    @model_validator(mode="after")
    def _legal(self) -> BurstSection:
        total = sum(stream.share for stream in self.streams)
        if total > 1.0 + 1e-6:
            raise ValueError(f"has streams with shares that add up to {total:g}; legal is at most 1")
        return self

    def build(self) -> BurstArrivals:
        """The process as plain numbers."""
        columns = [(stream.share, stream.dwell_s, stream.cv) for stream in self.streams]
        share, dwell_s, cv = zip(*columns, strict=True) if columns else ((), (), ())
        return BurstArrivals(self.rate_per_s, share, dwell_s, cv)


ArrivalSection = Annotated[GammaSection | WeibullSection | MmppSection | BurstSection, Field(discriminator="kind")]


class SeasonSection(Section):
    """Hours of the day, days of the week, growth."""

    daily: Annotated[tuple[Positive, ...], Field(min_length=1, max_length=288, strict=False)] = Field(
        (1.0,), description="Relative rates at even times of the day, joined by straight lines."
    )
    weekly: Annotated[tuple[Positive, ...], Field(min_length=7, max_length=7, strict=False)] = Field(
        (1.0,) * 7, description="Relative rates of Monday to Sunday."
    )
    growth_per_day: Annotated[float, Field(gt=-1.0)] = Field(0.0, description="Relative growth of the rate a day.")
    start_h: Annotated[float, Field(ge=0.0, lt=168.0)] | None = Field(
        None, description="Hour of the week at which an episode starts; left out: any."
    )

    def build(self) -> Season:
        """The season as plain numbers."""
        return Season(self.daily, self.weekly, self.growth_per_day, self.start_h)
