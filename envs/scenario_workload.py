"""The workload section of a scenario: who asks what, when, and how hard it is."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, model_validator

from envs.scenario_arrivals import ArrivalSection, SeasonSection
from envs.scenario_lengths import LengthSection, Weight
from envs.scenario_section import Name, NonNegative, Positive, Section, Share
from envs.scenario_sessions import ClientsSection, JobsSection, PrefixSection, SessionSection
from envs.workload.intents import IntentSpec, Reuse
from marginroute.response_cache import PUBLIC_HALF, PUBLIC_WIDTH


class ReuseSection(Section):
    """When the answer to another prompt of the same intent is right (envs/workload/intents.py)."""

    half_similarity: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(
        PUBLIC_HALF, description="Similarity of two prompts at which the answer is as likely right as wrong."
    )
    width: Positive = Field(PUBLIC_WIDTH, description="Width of the logistic curve around it, in similarity.")
    valid_s: Positive | None = Field(
        None, description="Mean seconds until the facts behind an answer change; left out: they stay."
    )

    def build(self) -> Reuse:
        """The figures that are drawn from."""
        return Reuse(self.half_similarity, self.width, math.inf if self.valid_s is None else self.valid_s)


class Task(Section):
    """A type of work."""

    share: Weight = Field(description="Relative share of requests; class_task_share may override it for a class.")
    nobody_can_share: Annotated[float, Field(ge=0.0, lt=1.0)] | None = Field(
        None, description="Share of its prompts that no tier answers well; left out: difficulty.nobody_can_share."
    )
    prompt_tokens: LengthSection | None = Field(None, description="Prompt lengths; left out: the workload's.")
    output_tokens: LengthSection | None = Field(None, description="Output lengths; left out: the workload's.")
    reuse: ReuseSection = Field(ReuseSection(), description="What its answers are good for elsewhere; with intents.")  # type: ignore[call-arg]


class Recurrence(Section):
    """Prompts asked again by the same tenant, which a response cache can answer."""

    share: Share = Field(0.0, description="Share of requests drawn from their tenant's recurring prompts.")
    prompts_per_tenant: Annotated[int, Field(ge=1)] = Field(50, description="Recurring prompts of a tenant.")
    zipf_exponent: NonNegative = Field(1.0, description="Popularity of the i-th falls like i ** -exponent.")


class IntentsSection(Section):
    """Questions asked again in other words, which a semantic response cache can answer (envs/workload/intents.py)."""

    share: Share = Field(description="Share of single requests that have an intent; the others are asked once.")
    per_tenant: Annotated[int, Field(ge=1)] = Field(description="Intents that a tenant has at a time.")
    common: Annotated[int, Field(ge=0)] = Field(0, description="Intents that all tenants have in common.")
    common_share: Share = Field(0.0, description="Share of requests with an intent that have a common one.")
    zipf_exponent: NonNegative = Field(1.0, description="Popularity of the i-th falls like i ** -exponent.")
    turnover_per_h: NonNegative = Field(0.0, description="How often an hour an intent gives way to a new one.")
    exact_share: Share = Field(0.05, description="Share that repeats an earlier prompt of the intent word for word.")
    spread: Positive = Field(
        0.5,
        description="Spread of embeddings in each dimension, in lengths of what is common to the intent; 0.5 with 2 "
        "dimensions and exact_share 0.05 is fitted to AWS's hit ratios (docs/workloads.md).",
    )
    dimensions: Annotated[int, Field(ge=1, le=16)] = Field(2, description="Dimensions in which wordings differ.")

    @model_validator(mode="after")
    def _common_has_both(self) -> IntentsSection:
        if (self.common > 0) != (self.common_share > 0.0):
            raise ValueError("has common without common_share, or that without common; legal is both or none")
        return self

    def build(self) -> IntentSpec:
        """The figures that are drawn from."""
        figures = self.model_dump(exclude={"zipf_exponent", "turnover_per_h"})
        return IntentSpec(exponent=self.zipf_exponent, turnover_per_s=self.turnover_per_h / 3600.0, **figures)


class FeedbackSection(Section):
    """What the gateway hears about its answers (envs/world_feedback.py)."""

    share: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        description="Share of answers that are judged: thumbs, regenerations, failed checks, claimed refunds."
    )
    delay_s: NonNegative = Field(description="Seconds from the end of an answer until its judgement comes in.")


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
    intents: IntentsSection | None = Field(
        None, description="Prompts that come again in other words, in place of recurring; left out: none."
    )
    feedback: FeedbackSection | None = Field(None, description="Judgements that reach the gateway; left out: none.")
    difficulty: Difficulty = Field(description="Difficulty and its observable signal.")
