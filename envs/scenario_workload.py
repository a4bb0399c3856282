"""The workload section of a scenario: who asks what, when, and how hard it is."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from envs.scenario_arrivals import ArrivalSection, SeasonSection
from envs.scenario_fleet import Name, NonNegative, Section, Share
from envs.scenario_lengths import LengthSection, Weight
from envs.scenario_sessions import ClientsSection, JobsSection, PrefixSection, SessionSection


class Task(Section):
    """A type of work."""

    share: Weight = Field(description="Relative share of requests; class_task_share may override it for a class.")
    nobody_can_share: Annotated[float, Field(ge=0.0, lt=1.0)] | None = Field(
        None, description="Share of its prompts that no tier answers well; left out: difficulty.nobody_can_share."
    )
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
    signal_correlation: Annotated[float, Field(gt=0.0, le=1.0)] | None = Field(
        None, description="A public prior per tier is observed, and a signal of difficulty with this correlation."
    )
    signal_auc: Annotated[float, Field(ge=0.5, lt=1.0)] | None = Field(
        None,
        description="A calibrated predictor of P(good) is observed; its area under the ROC curve, mean over tiers.",
    )
    luck: Literal["shared", "independent"] = Field(
        "shared",
        description="shared: a tier fails only where every tier of lower P(good) fails; independent: given P(good).",
    )

    @model_validator(mode="after")
    def _one_signal(self) -> Difficulty:
        if (self.signal_correlation is None) == (self.signal_auc is None):
            raise ValueError("has both or none of signal_correlation and signal_auc; legal is one of the two")
        return self


class WorkloadSection(Section):
    """Requests of an episode as distributions."""

    title: str = Field("", description="One line about the workload.")
    source: str = Field("", description="Where fitted figures come from.")
    arrivals: ArrivalSection = Field(
        description="Arrival process: gamma, weibull, mmpp or bursts; with clients, of each client at its share."
    )
    season: SeasonSection | None = Field(None, description="Hours, days and growth; left out: a steady mean rate.")
    clients: ClientsSection | None = Field(None, description="Who sends; left out: nobody in particular.")
    sessions: dict[Name, SessionSection] = Field(
        default_factory=dict,
        description="Chats and agent runs that arrivals start, by name; the rest are single requests.",
    )
    warm_up_s: NonNegative = Field(
        0.0, description="Seconds before the episode in which sessions that reach into it may begin."
    )
    jobs: JobsSection | None = Field(None, description="Batch jobs beside the arrivals; left out: none.")
    prefixes: PrefixSection | None = Field(None, description="Block hashes of prompts; left out: prompts have none.")
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
