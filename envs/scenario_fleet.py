"""The fleet section of a scenario: models, pools, third-party providers, caches, verifiers, faults, telemetry."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from envs.scenario_caches import ResponseCache, ResultCache
from envs.scenario_pools import Pool
from envs.scenario_providers import Provider
from envs.scenario_section import Chance, Name, Names, NonNegative, Positive, Section, Share


class TierQuality(Section):
    """P(good answer) = (1 - nobody_can_share) * Phi(ability[task] - slope * difficulty - loadings . factors)."""

    ability: dict[Name, float] = Field(
        description="Probit of P(good answer) at average difficulty, one figure per task of the workload."
    )
    slope: NonNegative = Field(description="Fall of that probit per standard deviation of difficulty.")
    loadings: Annotated[tuple[float, ...], Field(max_length=4, strict=False)] = Field(
        (), description="Fall of that probit per standard deviation of further factors; as many for every tier."
    )
    prior_ability: float | None = Field(
        None,
        description="The one figure that the public prior knows; left out: the ability averaged over the tasks.",
    )


class Tier(Section):
    """A model that answers, wherever it runs."""

    title: str = Field(description="Display name of the model.")
    quality: TierQuality = Field(description="How well the model answers each task.")


class FaultEvent(Section):
    """A fault that happens in every episode at a given time."""

    pool: Name | None = Field(None, description="Pool of the replica that it hits.")
    provider: Name | None = Field(None, description="Provider that it hits.")
    index: Annotated[int, Field(ge=0)] = Field(0, description="Which replica of the pool, from 0.")
    starts_at_s: NonNegative = Field(description="Seconds into the episode.")
    duration_s: Positive = Field(description="Seconds until the machine or provider works again.")
    slowdown: Annotated[float, Field(ge=1.0)] | None = Field(
        None, description="Factor on its latency meanwhile; left out: it is down."
    )
    reclaimed: bool = Field(
        False, description="The machine of a spot replica is reclaimed: notice now, and none to be had meanwhile."
    )

    @model_validator(mode="after")
    def _one_target(self) -> FaultEvent:
        if (self.pool is None) == (self.provider is None):
            raise ValueError("hits neither or both of a pool and a provider; legal is exactly one of pool, provider")
        if self.reclaimed and (self.pool is None or self.slowdown is not None):
            raise ValueError("is reclaimed with provider or slowdown; legal is a pool alone")
        return self


class Retries(Section):
    """What the gateway does with a request whose attempt ended with an error."""

    max_attempts: Annotated[int, Field(ge=1)] = Field(
        3, description="Attempts per request, the first included; after the last one the request has failed."
    )
    backoff_s: NonNegative = Field(0.0, description="Seconds between an error and the next decision.")


class Telemetry(Section):
    """How fresh the engines' metrics are."""

    scrape_interval_s: Positive = Field(description="Seconds between two scrapes of a replica's metrics.")


class BatchQueue(Section):
    """Holding place of deferred delay-tolerant requests."""

    hold_s: Positive = Field(description="Seconds after which a deferred request is decided again.")


class Verifier(Section):
    """Looks at answers before they count: unit tests, a schema check, a judge model (marginroute/verification.py)."""

    tasks: Names | None = Field(None, description="Task types that it looks at; left out: all.")
    classes: Names | None = Field(None, description="Customer classes that it looks at; left out: all.")
    sensitivity: Chance = Field(description="P(a good answer passes).")
    specificity: Chance = Field(description="P(a bad answer fails).")
    max_attempts: Annotated[int, Field(ge=2, le=8)] = Field(
        3, description="Answers that a request may be given; the last one is delivered without a look."
    )
    verify_s: Annotated[float, Field(ge=0.001)] = Field(0.001, description="Seconds that a look takes.")
    verify_usd: NonNegative = Field(0.0, description="USD per look.")
    verify_usd_per_mtok: NonNegative = Field(0.0, description="USD per million tokens looked at, prompt and answer.")
    leave_share: Share = Field(0.0, description="Share of users who leave after an answer that failed.")
    fresh_share: Share = Field(
        0.0, description="Share of repeated questions to the same model whose answer is drawn anew."
    )

    @model_validator(mode="after")
    def _tells_something(self) -> Verifier:
        if self.sensitivity + self.specificity < 1.0:
            raise ValueError(
                f"has sensitivity {self.sensitivity:g} and specificity {self.specificity:g}, worse than chance; "
                "legal is 1 or more together"
            )
        return self


class FleetSection(Section):
    """What can answer a request, and what it costs."""

    title: str = Field("", description="One line about the fleet.")
    tiers: dict[Name, Tier] = Field(min_length=1, description="Models by name, cheapest first by convention.")
    pools: dict[Name, Pool] = Field(min_length=1, description="Self-hosted replicas by pool name.")
    providers: dict[Name, Provider] = Field(default_factory=dict, description="Third-party APIs by name.")
    response_cache: ResponseCache | None = Field(None, description="Response cache; left out: none.")
    result_cache: ResultCache | None = Field(None, description="Results of tools; left out: tools are called.")
    gateways: Annotated[int, Field(ge=1, le=16)] = Field(
        1, description="Gateway instances before the fleet; each knows what it has sent itself, and metrics."
    )
    gateway_spread: Literal["request", "session"] = Field(
        "request", description="What stays at one instance: each request, or all calls of a session."
    )
    telemetry: Telemetry = Field(Telemetry(scrape_interval_s=1.0), description="Freshness of engine metrics.")
    batch_queue: BatchQueue | None = Field(None, description="Batch queue; left out: nothing can be deferred.")
    verifiers: dict[Name, Verifier] = Field(
        default_factory=dict, description="Who looks at answers, by name; at most one for each task of each class."
    )
    faults: list[FaultEvent] = Field(
        default_factory=list, description="Faults that happen in every episode, beside the random ones."
    )
    retries: Retries = Field(Retries(), description="What happens to requests that a fault ended.")  # type: ignore[call-arg]
    profiles: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="Engine profiles by name, filled in from configs/fleets/profiles."
    )
