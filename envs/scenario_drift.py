"""The drift section of a scenario: what changes inside an episode without notice, and its law as plain numbers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

from pydantic import Field, model_validator

from envs.scenario_section import Name, NonNegative, Positive, Section
from envs.workload.drift import DriftLaw

if TYPE_CHECKING:
    from envs.scenario import Scenario


class DriftSection(Section):
    """One course of change; values stand beside the knots `after_s`, with straight lines between them."""

    after_s: Annotated[list[NonNegative], Field(min_length=1)] = Field(
        [0.0], description="Knots in seconds since it began, ascending; the last value holds from the last one on."
    )
    starts_at_s: NonNegative = Field(0.0, description="Earliest second of an episode at which it begins.")
    start_spread_s: NonNegative = Field(0.0, description="It begins up to so much later, evenly.")
    episode_share: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        1.0, description="Share of episodes in which it happens."
    )
    tier: Name | None = Field(None, description="Tier whose ability changes.")
    tasks: Annotated[list[Name], Field(min_length=1)] | None = Field(
        None, description="Tasks for which it does; left out: all."
    )
    ability_by: list[float] | None = Field(None, description="Probits of P(good answer) that are added.")
    provider: Name | None = Field(None, description="Provider whose latency or price changes.")
    latency_times: list[Annotated[float, Field(ge=1.0)]] | None = Field(
        None, description="Factors on its TTFT and TPOT, 1 or more."
    )
    price_times: list[Positive] | None = Field(
        None, description="Factors on what it bills; the gateway's price table stays as it was."
    )

    @model_validator(mode="after")
    def _whole(self) -> DriftSection:
        if any(b <= a for a, b in zip(self.after_s, self.after_s[1:], strict=False)):
            raise ValueError(f"has after_s {self.after_s}; legal is ascending")
        courses = {name: getattr(self, name) for name in ("ability_by", "latency_times", "price_times")}
        given = {name: course for name, course in courses.items() if course is not None}
        if not given:
            raise ValueError("changes nothing; legal is ability_by, latency_times or price_times")
        for name, course in given.items():
            if len(course) != len(self.after_s):
                raise ValueError(f"has {len(course)} {name}; legal is one per knot of after_s, {len(self.after_s)}")
        if (self.tier is None) != (self.ability_by is None):
            raise ValueError("has a tier without ability_by, or that without a tier; legal is both or none")
        billed = self.latency_times is not None or self.price_times is not None
        if billed != (self.provider is not None):
            raise ValueError(
                "has a provider without latency_times and price_times, or those without one; legal is both or none"
            )
        if self.tasks is not None and self.tier is None:
            raise ValueError("has tasks without a tier; legal is both, or no tasks")
        return self


def drift_laws(scenario: Scenario) -> tuple[DriftLaw, ...]:
    """What may drift in an episode, in order of the scenario."""
    return tuple(
        DriftLaw(
            after_s=tuple(item.after_s),
            starts_at_s=item.starts_at_s,
            start_spread_s=item.start_spread_s,
            episode_share=item.episode_share,
            tier=-1 if item.tier is None else scenario.tier_names.index(item.tier),
            tasks=tuple(item.tasks is None or task in item.tasks for task in scenario.task_names),
            ability_by=tuple(item.ability_by or ()),
            provider=-1 if item.provider is None else scenario.provider_names.index(item.provider),
            latency_times=tuple(item.latency_times or ()),
            price_times=tuple(item.price_times or ()),
        )
        for item in scenario.drift.values()
    )


def named(scenario: Scenario) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """Key path, name and legal names of everything that a drift refers to."""
    for key, item in scenario.drift.items():
        path = f"drift.{key}"
        if item.tier is not None:
            yield f"{path}.tier", item.tier, tuple(scenario.fleet.tiers)
        for task in item.tasks or ():
            yield f"{path}.tasks", task, tuple(scenario.workload.tasks)
        if item.provider is not None:
            yield f"{path}.provider", item.provider, tuple(scenario.fleet.providers)
