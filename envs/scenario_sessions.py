"""Sections for requests that belong together: clients, chats and agent runs, batch jobs, shared prefixes."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from envs.scenario_arrivals import ArrivalSection
from envs.scenario_lengths import LengthSection, SecondsSection, Weight
from envs.scenario_section import Name, NonNegative, Positive, Section, Share

FollowShare = dict[Annotated[int, Field(ge=1, strict=False)], Share]  # keys of JSON are words


class ClientSection(Section):
    """One client with figures of its own."""

    share: Weight = Field(description="Relative share of requests among the clients.")
    class_name: Name | None = Field(None, alias="class", description="Its customer class; left out: drawn.")
    active_share: Annotated[float, Field(gt=0.0, le=1.0)] | None = Field(
        None, description="Share of time in which it asks at all; left out: the clients'."
    )
    active_s: Positive | None = Field(None, description="Mean length of an active stretch; left out: the clients'.")
    arrivals: ArrivalSection | None = Field(
        None, description="Its own process; its rate counts for nothing, only its shape; left out: the workload's."
    )
    prompt_tokens: LengthSection | None = Field(None, description="Prompt lengths; left out: the workload's.")
    output_tokens: LengthSection | None = Field(None, description="Output lengths; left out: the workload's.")


class ClientsSection(Section):
    """A mix of clients: few carry most traffic, each active at times only, with lengths of its own."""

    count: Annotated[int, Field(ge=0, le=10_000)] = Field(0, description="Clients that are drawn.")
    zipf_exponent: NonNegative = Field(1.0, description="Share of the i-th drawn client falls like i ** -exponent.")
    active_share: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        1.0, description="Share of time in which a client asks at all."
    )
    active_s: Positive = Field(600.0, description="Mean length of an active stretch.")
    prompt_sigma: NonNegative = Field(0.0, description="Spread between clients of ln of their median prompt.")
    output_sigma: NonNegative = Field(0.0, description="The same of their median output.")
    length_correlation: Annotated[float, Field(ge=-1.0, le=1.0)] = Field(
        0.0, description="Correlation of the two between clients."
    )
    population_seed: Annotated[int, Field(ge=0)] = Field(0, description="Which population; the same in all episodes.")
    own: dict[Name, ClientSection] = Field(default_factory=dict, description="Clients with figures of their own.")
    own_share: Share = Field(1.0, description="Share of requests of those, where others are drawn too.")

    @model_validator(mode="after")
    def _somebody(self) -> ClientsSection:
        if not self.count and not self.own:
            raise ValueError("has nobody; legal is a count of 1 or more, or own clients")
        return self


class ToolSection(Section):
    """A tool or a retrieval whose results have keys, so that they can be kept (fleet.result_cache)."""

    keys: Annotated[int, Field(ge=1)] = Field(description="Different results that a tenant asks for.")
    zipf_exponent: NonNegative = Field(1.0, description="Popularity of the i-th falls like i ** -exponent.")
    usd: NonNegative = Field(0.0, description="USD per call of the tool.")
    shared: bool = Field(False, description="Whether results are the same for all tenants, and may be shared.")


class StepSection(Section):
    """What may come after an answered call: a user, a tool, retrieval, a retry."""

    weight: Weight = Field(1.0, description="Relative frequency.")
    think_s: SecondsSection = Field(description="Seconds from the answer to the next call.")
    new_tokens: LengthSection = Field(description="Tokens added to prompt and answer.")
    output_tokens: LengthSection | None = Field(None, description="Output of the next call; left out: the session's.")
    edit_share: Share = Field(0.0, description="Of such steps that rewrite a part of the conversation.")
    edit_keep: Annotated[float, Field(gt=0.0, le=1.0)] = Field(0.5, description="Mean share that an edit keeps.")
    from_call: Annotated[int, Field(ge=1)] = Field(1, description="First call after which it may come.")
    to_call: Annotated[int, Field(ge=1)] | None = Field(None, description="Last one; left out: any.")
    tool: ToolSection | None = Field(None, description="That think_s waits for; left out: nobody knows its results.")


class SubAgentSection(Section):
    """Agents with contexts of their own that a call may start side by side."""

    share: Share = Field(description="Of calls that start some.")
    agents: LengthSection = Field(description="How many.")
    first_tokens: LengthSection = Field(description="Prompt of their first call.")
    follow_share: FollowShare = Field(min_length=1, description="P(another call) from each call number on.")


class SessionSection(Section):
    """A kind of chat or agent run."""

    share: Share = Field(description="Of the arrivals that start one.")
    task: Name | None = Field(None, description="Kind of work; left out: drawn from the class's mix.")
    first_tokens: LengthSection = Field(description="Prompt of the first call, system prompt included.")
    output_tokens: LengthSection = Field(description="Output of every call.")
    follow_share: FollowShare = Field(
        min_length=1, description="P(another call) from each call number on; what is left gave up or is done."
    )
    steps: dict[Name, StepSection] = Field(min_length=1, description="What may come next.")
    reset_share: Share = Field(0.0, description="Of follow-ups whose context was compacted.")
    reset_tokens: LengthSection | None = Field(None, description="Prompt after that; left out: as the first.")
    max_prompt_tokens: Annotated[int, Field(ge=1)] = Field(128_000, description="A longer context is compacted.")
    answer_kept: Share = Field(1.0, description="Share of an answer that stays in the context (reasoning may not).")
    pace_sigma: NonNegative = Field(0.0, description="Spread between sessions of ln of a factor on waiting times.")
    ttft_s: NonNegative = Field(0.5, description="Nominal; only for the nominal time of follow-ups.")
    tpot_s: NonNegative = Field(0.02, description="Nominal; only for the nominal time of follow-ups.")
    sub_agents: SubAgentSection | None = Field(None, description="Agents that calls start; left out: none.")

    @model_validator(mode="after")
    def _from_the_first_call(self) -> SessionSection:
        for follow in (self.follow_share, self.sub_agents.follow_share if self.sub_agents else {1: 0.0}):
            if 1 not in follow:
                raise ValueError("has a follow_share without call 1; legal is a share from call 1 on")
        spans = [(step.from_call, step.to_call or 10**9) for step in self.steps.values()]
        ends = {1, *(last + 1 for _, last in spans if last < 10**9)}
        if not all(any(first <= call <= last for first, last in spans) for call in ends):
            raise ValueError("has calls after which no step may come; legal is a step for every call")
        return self


class JobsSection(Section):
    """Batch jobs: many requests handed in at once, due together."""

    class_name: Name = Field(alias="class", description="Customer class; its deadline counts from each request.")
    per_hour: Positive = Field(description="Jobs per hour.")
    requests: LengthSection = Field(description="Requests of a job.")
    spread_s: NonNegative = Field(10.0, description="Seconds over which they are handed in.")
    deadline_s: SecondsSection | None = Field(
        None, description="From the job's start, common to its requests; left out: the class's own, each."
    )


class PrefixSection(Section):
    """How prompts begin: what everybody shares, then the tenant's system prompt."""

    block_tokens: Annotated[int, Field(ge=1)] = Field(512, description="Prompt tokens per hash.")
    common_tokens: Annotated[int, Field(ge=0)] = Field(0, description="Beginning of every prompt.")
    system_tokens: LengthSection | None = Field(None, description="System prompt of a tenant; left out: none.")
    population_seed: Annotated[int, Field(ge=0)] = Field(0, description="Of the tenants' system prompts.")
