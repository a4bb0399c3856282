"""The plans section of a scenario: what customers pay, and what they are promised."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from envs.scenario_section import Name, NonNegative, Positive, Section, Share

MONTH_S = 365.25 * 86400 / 12


class TokenPrices(Section):
    """What a plan charges for tokens and calls."""

    input_usd_per_mtok: NonNegative = Field(description="Price to the customer, USD per million prompt tokens.")
    cached_input_usd_per_mtok: NonNegative | None = Field(
        None, description="Price of prompt tokens answered from a prefix cache; left out: that of the others."
    )
    output_usd_per_mtok: NonNegative = Field(description="Price to the customer, USD per million output tokens.")
    request_usd: NonNegative = Field(0.0, description="Price of an answered request besides its tokens.")


class UsagePlan(TokenPrices):
    """Pay per token."""

    kind: Literal["usage"] = Field(description="usage: the customer pays per token.")


class FairUse(Section):
    """Requests that a customer may make in a period, and what happens beyond."""

    requests_per_tenant: Positive = Field(description="Answered requests of one customer in a period.")
    beyond: Literal["serve", "overage", "refuse"] = Field(
        description="serve: answered as best effort, nothing is owed; overage: charged each; refuse: turned away."
    )
    overage_usd: NonNegative = Field(0.0, description="Price of a request beyond the quota, with beyond: overage.")
    period_s: Positive = Field(MONTH_S, description="Seconds after which the quota starts anew.")

    @model_validator(mode="after")
    def _overage_has_a_price(self) -> FairUse:
        if (self.overage_usd > 0.0) != (self.beyond == "overage"):
            raise ValueError("has overage_usd without beyond: overage, or that without a price; legal is both or none")
        return self


class SeatPlan(Section):
    """Pay per seat and month, requests included."""

    kind: Literal["seat"] = Field(description="seat: the customer pays per seat and month.")
    seat_usd_per_month: NonNegative = Field(description="Price of one seat per month.")
    seats: Annotated[int, Field(ge=1)] = Field(description="Seats sold to all customers of the plan together.")
    included_requests_per_month: Positive = Field(
        description="Requests that a seat includes; the seat price over it is the value of one request."
    )
    fair_use: FairUse | None = Field(None, description="Cap on requests; left out: none.")


class PrepaidPlan(TokenPrices):
    """Credits bought in advance, used up at the plan's prices; without credits there is no answer."""

    kind: Literal["prepaid"] = Field(description="prepaid: the customer uses up credits bought before.")
    credits_usd_per_tenant: Positive = Field(description="Credits of one customer at the start of a period.")
    period_s: Positive = Field(MONTH_S, description="Seconds after which the credits are bought anew.")


class CommitPlan(TokenPrices):
    """Committed spend: paid by time, used up at the plan's prices; what goes beyond is charged."""

    kind: Literal["commit"] = Field(description="commit: the customer pays a fixed sum and uses it up.")
    committed_usd_per_tenant: Positive = Field(description="Sum that one customer pays per period, used or not.")
    beyond_factor: Positive = Field(1.0, description="Multiplies the prices of what goes beyond the sum.")
    period_s: Positive = Field(MONTH_S, description="Seconds that the sum is for.")


Plan = Annotated[UsagePlan | SeatPlan | PrepaidPlan | CommitPlan, Field(discriminator="kind")]


class CreditStep(Section):
    """One row of a credit schedule."""

    below: Annotated[float, Field(gt=0.0, le=1.0)] = Field(description="Share of requests below which it applies.")
    share: Annotated[float, Field(gt=0.0, le=1.0)] = Field(description="Share of the window's value that is credited.")


class SloWindow(Section):
    """Credits for a share of requests over a window, in place of credits per request."""

    length_s: Positive = Field(description="Length of a window in seconds.")
    credits: Annotated[list[CreditStep], Field(min_length=1, max_length=2)] = Field(
        description="Schedule, one or two steps: the lower the share of requests that met every SLO, the more."
    )

    @model_validator(mode="after")
    def _falls(self) -> SloWindow:
        if len(self.credits) == 2:
            first, second = self.credits
            if second.below >= first.below or second.share <= first.share:
                raise ValueError("has a second step that is no worse; legal is a lower `below` with a higher `share`")
        return self


class Slo(Section):
    """Service levels of a class, and the share of a request's value credited when one is missed."""

    ttft_s: Positive | None = Field(None, description="Time to first token in seconds; left out: not promised.")
    tpot_s: Positive | None = Field(None, description="Mean time per output token in seconds; left out: not promised.")
    e2e_s: Positive | None = Field(None, description="Time to the last token in seconds; left out: not promised.")
    ttft_credit_share: Share = Field(0.0, description="Share of the value credited when TTFT is missed.")
    tpot_credit_share: Share = Field(0.0, description="Share of the value credited when TPOT is missed.")
    e2e_credit_share: Share = Field(0.0, description="Share of the value credited when E2E is missed.")
    window: SloWindow | None = Field(None, description="Credits by windows; left out: per request.")

    @model_validator(mode="after")
    def _one_way_of_credits(self) -> Slo:
        if self.window is not None:
            if any((self.ttft_credit_share, self.tpot_credit_share, self.e2e_credit_share)):
                raise ValueError("credits both requests and windows; legal is credit shares or a window")
            if (self.ttft_s, self.tpot_s, self.e2e_s) == (None, None, None):
                raise ValueError("has a window but promises nothing; legal is ttft_s, tpot_s or e2e_s with it")
        return self

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


class Limits(Section):
    """What a customer of the class may ask at most; beyond it the gateway answers 429 and owes nothing."""

    requests_per_minute: Positive | None = Field(None, description="Rate limit of one customer; left out: none.")
    burst_requests: Annotated[float, Field(ge=1.0)] | None = Field(
        None, description="Requests that may come at once; left out: ten seconds of the limit, at least 1."
    )
    prompt_tokens: Annotated[int, Field(ge=1)] | None = Field(None, description="Longest prompt; left out: any.")


class Entitlements(Section):
    """What may answer the class; what is left out is not restricted."""

    tiers: list[Name] | None = Field(None, description="Models that the plan allows, or a version is pinned to.")
    stations: list[Name] | None = Field(
        None, description="Pools and providers that may see its data (residency, no third party)."
    )
    cache: bool = Field(True, description="Whether answers may come from the response cache.")


class Retention(Section):
    """How experience moves a customer's lifetime value."""

    lifetime_value_usd: NonNegative = Field(description="Margin still expected from one customer.")
    hazard_bad_answer: Share = Field(0.0, description="Chance that a bad answer makes the customer leave.")
    hazard_missed_slo: Share = Field(0.0, description="The same for an answer that misses an SLO.")
    hazard_unserved: Share = Field(0.0, description="The same for a request without an answer.")


class CustomerClass(Section):
    """Customers on one plan with one set of promises."""

    plan: Name = Field(description="Plan that the class pays by; one of plans.plans.")
    tenants: Annotated[int, Field(ge=1)] = Field(1, description="Customers in the class.")
    priority: Annotated[int, Field(ge=0, le=7)] = Field(
        0, description="0 is served first, 7 last, at pools with scheduling_policy priority."
    )
    slo: Slo = Field(Slo(), description="Promised latencies and their credits.")
    remedies: Remedies = Field(Remedies(), description="Refunds and credits of the class.")
    used_at_start: Annotated[list[NonNegative], Field(min_length=2, max_length=2)] = Field(
        [0.0, 1.0], description="Lowest and highest share of its allowances that a customer has used at the start."
    )
    hedge_after_s: Positive | None = Field(
        None, description="Seconds without a first token after which a call may be sent twice; left out: never."
    )
    limits: Limits = Field(Limits(), description="Rate limit and longest prompt of a customer.")
    entitlements: Entitlements = Field(Entitlements(), description="What may answer the class.")
    retention: Retention | None = Field(None, description="Lifetime value at stake; left out: none.")
    patience: Patience | None = Field(None, description="Patience of users; left out: nobody leaves.")
    delay_tolerant: DelayTolerance | None = Field(None, description="Deadline of work that may wait; left out: none.")


class Workflow(Section):
    """What a customer pays for a task that succeeds, beside what its calls are billed."""

    value_usd: Positive = Field(description="USD per task that succeeds.")
    final_good: bool = Field(True, description="Whether its last answer must be good.")
    good_share: Share = Field(0.0, description="Share of its answers that must be good.")


class PlansSection(Section):
    """Plans, and the customer classes on them."""

    title: str = Field("", description="One line about the plans.")
    plans: dict[Name, Plan] = Field(min_length=1, description="Price plans by name.")
    classes: dict[Name, CustomerClass] = Field(min_length=1, description="Customer classes by name.")
    workflows: dict[Name, Workflow] = Field(
        default_factory=dict, description="Kinds of session, as workload.sessions names them, that pay by task."
    )
