"""The third-party APIs of a fleet, paid by token."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from envs.scenario_pools import Faults
from envs.scenario_section import Name, NonNegative, Positive, Section
from marginroute.pricing import PER_MTOK


class Provider(Section):
    """A third-party API, paid by token."""

    tier: Name = Field(description="Tier that the provider serves; one of fleet.tiers.")
    price_of: str | None = Field(
        None, description="Model name whose list price is looked up in genai-prices when the scenario is compiled."
    )
    input_usd_per_mtok: NonNegative | None = Field(None, description="USD per million prompt tokens.")
    output_usd_per_mtok: NonNegative | None = Field(None, description="USD per million output tokens.")
    cached_input_usd_per_mtok: NonNegative | None = Field(
        None,
        description="USD per million prompt tokens that the provider has cached; left out: the list price, if price_of "
        "has one, else no discount.",
    )
    batch_discount: Annotated[float, Field(ge=0.0, lt=1.0)] | None = Field(
        None,
        description="Share off its prices as a batch endpoint, which takes delay-tolerant requests only and whose TTFT "
        "is the turnaround; left out: it answers everybody at once.",
    )
    prompt_cache_ttl_s: Positive = Field(
        300.0, description="Seconds after its last use that the provider forgets a cached prompt."
    )
    price_source: str | None = Field(None, description="Where the prices come from.")
    ttft_median_s: Positive = Field(description="Median time to first token in seconds.")
    ttft_sigma: NonNegative = Field(description="Standard deviation of ln TTFT.")
    tpot_median_s: Positive = Field(description="Median time per output token in seconds.")
    tpot_sigma: NonNegative = Field(description="Standard deviation of ln TPOT.")
    requests_per_minute: Positive = Field(description="Rate limit; a call above it is not a legal candidate.")
    burst_requests: NonNegative = Field(
        0.0, description="Calls that may be sent at once after a quiet time; 0: ten seconds of the limit."
    )
    tokens_per_minute: Positive | None = Field(
        None, description="Rate limit in prompt and output tokens; left out: none."
    )
    burst_tokens: NonNegative = Field(
        0.0, description="Tokens that may be used at once after a quiet time; 0: ten seconds of the limit."
    )
    faults: Faults | None = Field(None, description="Random outages and slow spells; left out: none.")
    error_after_s: NonNegative = Field(
        0.0, description="Seconds until a call sent during an outage fails; 0: at once, with an error status."
    )

    @model_validator(mode="after")
    def _one_price(self) -> Provider:
        literal = (self.input_usd_per_mtok is not None, self.output_usd_per_mtok is not None)
        if self.price_of is not None and any(literal):
            raise ValueError("has both price_of and USD per mtok; legal is one of the two")
        if self.price_of is None and not all(literal):
            raise ValueError("has no price; legal is price_of, or input_usd_per_mtok with output_usd_per_mtok")
        cached, full = self.cached_input_usd_per_mtok, self.input_usd_per_mtok
        if cached is not None and full is not None and cached > full:
            raise ValueError(f"has cached_input_usd_per_mtok {cached}; legal is at most input_usd_per_mtok, {full}")
        return self

    def usd_per_token(self) -> tuple[float, float, float]:
        """What is billed for a prompt token, one that is cached, and an output token."""
        share = 1.0 - (self.batch_discount or 0.0)
        full, output = self.input_usd_per_mtok or 0.0, self.output_usd_per_mtok or 0.0
        cached = full if self.cached_input_usd_per_mtok is None else self.cached_input_usd_per_mtok
        return full * share * PER_MTOK, cached * share * PER_MTOK, output * share * PER_MTOK
