"""Families of scenarios: ranges that training draws from, and named conditions that are held out.

`ranges` say in which of their values the worlds of a scenario differ (fleet, prices, contracts, load, whatever has a
key); `conditions` are fixed changes under which policies are examined and never trained. A draw is a scenario like any
other, without ranges.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from pydantic import Field, ValidationError, model_validator

from envs import scenario_files
from envs.scenario_section import Section
from marginroute.errors import InputError, suggestion

if TYPE_CHECKING:
    from envs.scenario import Scenario

DRAWS = 12
"""Scenarios drawn per split; the episode of seed s plays draw s modulo it."""
STRESS_SHARE = 0.25
"""Episodes of each stress per episode of the scenario as it is, where both are played."""


class Range(Section):
    """Values that one key takes in the worlds of a family."""

    low: float | None = Field(None, description="Smallest value; with high.")
    high: float | None = Field(None, description="Largest value.")
    log: bool = Field(False, description="Draw the logarithm evenly, for prices and rates.")
    whole: bool = Field(False, description="Round to whole numbers, for counts.")
    choices: Annotated[list[Any], Field(min_length=1)] | None = Field(
        None, description="Values to choose from, in place of low and high."
    )

    @model_validator(mode="after")
    def _one_way(self) -> Range:
        if (self.choices is None) == (self.low is None or self.high is None):
            raise ValueError("has neither choices nor low with high, or both; legal is one of them")
        if self.low is not None and self.high is not None and not self.low <= self.high:
            raise ValueError(f"has low {self.low} above high {self.high}; legal is low <= high")
        if self.log and not (self.low or 0.0) > 0.0:
            raise ValueError(f"has log with low {self.low}; legal is low > 0")
        return self

    def at(self, share: float) -> Any:
        """The value at `share` of the way, 0 up to but not 1."""
        if self.choices is not None:
            return self.choices[int(share * len(self.choices))]
        assert self.low is not None and self.high is not None
        if self.log:
            value = math.exp(math.log(self.low) + share * (math.log(self.high) - math.log(self.low)))
        elif self.whole:
            value = math.floor(self.low + share * (self.high - self.low + 1.0))
        else:
            value = self.low + share * (self.high - self.low)
        return round(value) if self.whole else value


def drawn(scenario: Scenario, shares: np.ndarray[Any, Any]) -> Scenario:
    """The member of a family at `shares` (number of ranges,) of the way along each range.

    Raises:
        InputError: a range names no key, or its values are not legal there or contradict others.
    """
    values = {key: item.at(float(share)) for (key, item), share in zip(scenario.ranges.items(), shares, strict=True)}
    return changed(scenario, values, "ranges")


def without_ranges_of(data: dict[str, Any], keys: Iterable[str]) -> dict[str, Any]:
    """A scenario's data without the ranges of what `keys` set: of a key itself, and of what lies below or above it.

    A range that is itself among the keys (`ranges.KEY`) stays.
    """
    ranges = data.get("ranges")
    if not isinstance(ranges, dict):
        return data
    given = [f"{key}." for key in keys]

    def is_set(key: str) -> bool:
        own = f"{key}."
        if any(other.startswith(f"ranges.{own}") for other in given):
            return False
        return any(own.startswith(other) or other.startswith(own) for other in given)

    return {**data, "ranges": {key: item for key, item in ranges.items() if not is_set(key)}}


def middle(scenario: Scenario) -> Scenario:
    """The member of a family half-way along every range; the scenario itself where nothing has a range."""
    return drawn(scenario, np.full(len(scenario.ranges), 0.5)) if scenario.ranges else scenario


def under(scenario: Scenario, condition: str) -> Scenario:
    """The scenario under one of its conditions.

    Raises:
        InputError: there is no such condition.
    """
    if condition not in scenario.conditions:
        legal = suggestion(condition, scenario.conditions)
        raise InputError(f"condition {condition!r} is not in scenario {scenario.name!r}{legal}")
    return changed(scenario, scenario.conditions[condition], f"conditions.{condition}")


def check_family(scenario: Scenario, conditions: bool = True) -> None:
    """Raises InputError unless both ends of the ranges, and every condition if asked, are legal scenarios.

    A scenario with overrides may have lost what its file's conditions change; `under` looks when one is asked for.
    """
    if scenario.ranges:
        for share in (0.0, 1.0 - 1e-12):
            drawn(scenario, np.full(len(scenario.ranges), share))
    for condition in scenario.conditions if conditions else ():
        under(scenario, condition)


def changed(scenario: Scenario, values: Mapping[str, Any], section: str) -> Scenario:
    """A copy without ranges and conditions in which some keys have other values; `section` names them in errors."""
    from envs import scenario_checks

    data = scenario.model_dump(exclude={"ranges", "conditions"}, by_alias=True)
    try:
        data = scenario_files.apply_overrides(type(scenario), data, values)
        copy = type(scenario).model_validate(data)
    except InputError as error:
        raise InputError(f"scenario {scenario.name!r}, {section}: {str(error).removeprefix('--set ')}") from None
    except ValidationError as error:
        sentence = scenario_files.input_error(error, type(scenario), data, {"": section}, ())
        raise InputError(f"scenario {scenario.name!r}, {sentence}") from None
    for path, sentence in scenario_checks.problems(copy):
        raise InputError(f"scenario {scenario.name!r}, {section}: {path}: {sentence}")
    if copy.trace == scenario.trace:
        copy.__dict__["recorded"] = scenario.recorded  # the file is read once
    return copy


def stressed(scenario: Scenario) -> dict[str, Scenario]:
    """The scenario in trouble of common kinds, none of which is one of its held-out conditions, by a name in words."""
    fifth_s, fleet = scenario.horizon_s / 5.0, scenario.fleet
    stresses: dict[str, dict[str, Any]] = {
        "40 % less load": {"load_scale": 0.6 * scenario.load_scale},
        "40 % more load": {"load_scale": 1.4 * scenario.load_scale},
    }
    if fleet.gateways == 1:
        stresses["four gateways"] = {"fleet.gateways": 4}
    if fleet.pools:
        largest = max(fleet.pools, key=lambda name: fleet.pools[name].replicas * fleet.pools[name].gpus_per_replica)
        outage = {"pool": largest, "index": 0, "starts_at_s": fifth_s, "duration_s": 2.0 * fifth_s}
        known = [event.model_dump(exclude_none=True) for event in fleet.faults]
        stresses[f"a replica of {largest} out"] = {"fleet.faults": [*known, outage]}
    if scenario.drift:
        stresses["no drift"] = {"drift": {}}
    for name in fleet.providers:
        course = {"provider": name, "starts_at_s": fifth_s, "price_times": [1.5], "latency_times": [2.0]}
        stresses[f"{name} dear and slow, no other drift"] = {"drift": {"stress": course}}
    return {name: changed(scenario, values, "stress") for name, values in stresses.items()}
