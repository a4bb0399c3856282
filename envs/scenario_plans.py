"""The plans section of a scenario: what customers pay, and what they are promised."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from envs.scenario_fleet import Name, NonNegative, Positive, Section, Share

MONTH_S = 365.25 * 86400 / 12


class UsagePlan(Section):
    """Pay per token."""

    kind: Literal["usage"] = Field(description="usage: the customer pays per token.")
    input_usd_per_mtok: NonNegative = Field(description="Price to the customer, USD per million prompt tokens.")
    output_usd_per_mtok: NonNegative = Field(description="Price to the customer, USD per million output tokens.")


class SeatPlan(Section):
    """Pay per seat and month, requests included."""

    kind: Literal["seat"] = Field(description="seat: the customer pays per seat and month.")
    seat_usd_per_month: NonNegative = Field(description="Price of one seat per month.")
    seats: Annotated[int, Field(ge=1)] = Field(description="Seats sold to all customers of the plan together.")
    included_requests_per_month: Positive = Field(
        description="Requests that a seat includes; the seat price over it is the value of one request."
    )


Plan = Annotated[UsagePlan | SeatPlan, Field(discriminator="kind")]


class Slo(Section):
    """Service levels of a class, and the share of a request's value credited when one is missed."""

    ttft_s: Positive | None = Field(None, description="Time to first token in seconds; left out: not promised.")
    tpot_s: Positive | None = Field(None, description="Mean time per output token in seconds; left out: not promised.")
    e2e_s: Positive | None = Field(None, description="Time to the last token in seconds; left out: not promised.")
    ttft_credit_share: Share = Field(0.0, description="Share of the value credited when TTFT is missed.")
    tpot_credit_share: Share = Field(0.0, description="Share of the value credited when TPOT is missed.")
    e2e_credit_share: Share = Field(0.0, description="Share of the value credited when E2E is missed.")

    @model_validator(mode="after")
    def _credits_have_targets(self) -> Slo:
        for name in ("ttft", "tpot", "e2e"):
            if getattr(self, f"{name}_credit_share") > 0.0 and getattr(self, f"{name}_s") is None:
                raise ValueError(f"credits a missed {name} but promises none; legal is {name}_s with the credit share")
        return self


class Remedies(Section):
    """What a bad answer or no answer costs."""

    refund_share: Share = Field(0.0, description="Share of the value refunded for a bad answer.")
    bad_answer_usd: NonNegative = Field(0.0, description="USD that a bad answer costs besides the refund.")
    unserved_credit_share: Share = Field(0.0, description="Share of the value credited when there is no answer.")
    unserved_credit_usd: NonNegative = Field(0.0, description="USD that no answer costs besides the credit.")


class Patience(Section):
    """How long users wait for the first token before they leave."""

    median_s: Positive = Field(description="Median of the lognormal patience in seconds.")
    sigma: NonNegative = Field(description="Standard deviation of ln patience.")


class DelayTolerance(Section):
    """Work that may wait."""

    deadline_s: Positive = Field(description="Seconds after arrival until which the request may be deferred.")


class CustomerClass(Section):
    """Customers on one plan with one set of promises."""

    plan: Name = Field(description="Plan that the class pays by; one of plans.plans.")
    tenants: Annotated[int, Field(ge=1)] = Field(1, description="Customers in the class.")
    slo: Slo = Field(Slo(), description="Promised latencies and their credits.")
    remedies: Remedies = Field(Remedies(), description="Refunds and credits of the class.")
    patience: Patience | None = Field(None, description="Patience of users; left out: nobody leaves.")
    delay_tolerant: DelayTolerance | None = Field(None, description="Deadline of work that may wait; left out: none.")


class PlansSection(Section):
    """Plans, and the customer classes on them."""

    title: str = Field("", description="One line about the plans.")
    plans: dict[Name, Plan] = Field(min_length=1, description="Price plans by name.")
    classes: dict[Name, CustomerClass] = Field(min_length=1, description="Customer classes by name.")
