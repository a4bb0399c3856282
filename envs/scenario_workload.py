"""The workload section of a scenario: who asks what, when, and how hard it is."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from envs.scenario_fleet import Name, NonNegative, Positive, Section, Share
from envs.workload.arrivals import GammaArrivals, MmppArrivals
from envs.workload.lengths import LengthMixture

Weight = Annotated[float, Field(gt=0.0)]


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


class Task(Section):
    """A type of work."""

    share: Weight = Field(description="Relative share of requests; class_task_share may override it for a class.")
    prompt_tokens: LengthSection | None = Field(None, description="Prompt lengths; left out: the workload's.")
    output_tokens: LengthSection | None = Field(None, description="Output lengths; left out: the workload's.")


class Recurrence(Section):
    """Prompts asked again by the same tenant, which a response cache can answer."""

    share: Share = Field(0.0, description="Share of requests drawn from their tenant's recurring prompts.")
    prompts_per_tenant: Annotated[int, Field(ge=1)] = Field(50, description="Recurring prompts of a tenant.")
    zipf_exponent: NonNegative = Field(1.0, description="Popularity of the i-th falls like i ** -exponent.")


class Difficulty(Section):
    """What can be known about difficulty before the answer."""

    nobody_can_share: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(
        0.0, description="Share of prompts that no tier answers well."
    )
    signal_correlation: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        description="Correlation of the observable difficulty signal with true difficulty."
    )


class WorkloadSection(Section):
    """Requests of an episode as distributions."""

    title: str = Field("", description="One line about the workload.")
    source: str = Field("", description="Where fitted figures come from.")
    arrivals: Annotated[GammaSection | MmppSection, Field(discriminator="kind")] = Field(
        description="Arrival process: gamma or mmpp."
    )
    class_share: dict[Name, Weight] = Field(min_length=1, description="Relative share of requests of each class.")
    tenant_zipf_exponent: NonNegative = Field(
        1.0, description="Share of a class's i-th tenant falls like i ** -exponent."
    )
    tasks: dict[Name, Task] = Field(min_length=1, description="Task types by name.")
    class_task_share: dict[Name, dict[Name, NonNegative]] = Field(
        default_factory=dict, description="Relative task shares of single classes, in place of tasks' own shares."
    )
    prompt_tokens: LengthSection | None = Field(None, description="Prompt lengths of tasks without their own.")
    output_tokens: LengthSection | None = Field(None, description="Output lengths of tasks without their own.")
    recurring: Recurrence = Field(Recurrence(), description="Prompts that come again.")
    difficulty: Difficulty = Field(description="Difficulty and its observable signal.")
