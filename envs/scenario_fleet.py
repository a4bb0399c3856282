"""The fleet section of a scenario: models, replicas, third-party providers, response cache, telemetry."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from marginroute.pricing import PER_MTOK
from marginroute.response_cache import PUBLIC_HALF, PUBLIC_WIDTH

Positive = Annotated[float, Field(gt=0.0)]
NonNegative = Annotated[float, Field(ge=0.0)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Chance = Annotated[float, Field(gt=0.0, lt=1.0)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]

Names = Annotated[list[Name], Field(min_length=1)]


class Section(BaseModel):
    """Base of every configuration section: immutable, no unknown keys, no silent conversion, no NaN."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


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


class Faults(Section):
    """Random faults of a replica or provider: exponential times of service and of repair."""

    mean_time_between_s: Positive | None = Field(
        None, description="Mean seconds of service between two failures; left out: it never goes down."
    )
    mean_repair_s: Positive = Field(600.0, description="Mean seconds that a failure lasts.")
    slow_mean_time_between_s: Positive | None = Field(
        None, description="Mean seconds between two slow spells; left out: it never slows down."
    )
    slow_mean_s: Positive = Field(300.0, description="Mean seconds that a slow spell lasts.")
    slowdown: Annotated[float, Field(ge=1.0)] = Field(
        2.0, description="Factor on iteration times (provider: on TTFT and TPOT) during a slow spell."
    )


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


class Spot(Section):
    """Replicas on spot machines: cheap, and taken away when somebody else pays more."""

    replicas: Annotated[int, Field(ge=1)] = Field(description="How many: the last ones of the pool.")
    gpu_usd_per_hour: NonNegative = Field(description="USD per GPU and hour while a machine is held.")
    mean_time_between_s: Positive | None = Field(
        None, description="Mean seconds until a machine is reclaimed; left out: it never is."
    )
    mean_absence_s: Positive = Field(900.0, description="Mean seconds from the notice until there is capacity again.")
    notice_s: NonNegative = Field(
        30.0,
        description="Seconds from the notice until the machine goes; 30 is what Google and Azure give, 120 AWS.",
    )


class Retries(Section):
    """What the gateway does with a request whose attempt ended with an error."""

    max_attempts: Annotated[int, Field(ge=1)] = Field(
        3, description="Attempts per request, the first included; after the last one the request has failed."
    )
    backoff_s: NonNegative = Field(0.0, description="Seconds between an error and the next decision.")


class SpeculativeDecoding(Section):
    """A draft proposes tokens, the engine checks them in one iteration (envs/fleet/speculation.py)."""

    draft_tokens: Annotated[int, Field(ge=1, le=32)] = Field(description="Tokens proposed per iteration and sequence.")
    acceptance: Share = Field(description="Probability that a proposed token is accepted.")
    draft_cost: NonNegative = Field(
        0.0,
        description="Seconds of one step of the draft over those of the model's own iteration with the same decodes.",
    )
    max_batch: Annotated[int, Field(ge=1)] | None = Field(
        None, description="Decodes above which an iteration does not speculate; left out: it always does."
    )


class Pool(Section):
    """Replicas of one engine profile, paid by GPU-hour."""

    tier: Name = Field(description="Tier that the pool serves; one of fleet.tiers.")
    profile: str = Field(description="Engine profile: a name in configs/fleets/profiles, or a YAML file.")
    replicas: Annotated[int, Field(ge=1)] = Field(
        description="Engine instances behind the gateway when an episode starts."
    )
    max_replicas: Annotated[int, Field(ge=1)] | None = Field(
        None, description="Most instances that it may be scaled up to; left out: replicas."
    )
    min_replicas: Annotated[int, Field(ge=0)] = Field(1, description="Fewest that it may be scaled down to.")
    reserved_replicas: Annotated[int, Field(ge=0)] = Field(
        0, description="Instances that are paid all the time, whether they run or not."
    )
    reserved_gpu_usd_per_hour: NonNegative | None = Field(
        None, description="USD per GPU and hour of reserved instances; left out: gpu_usd_per_hour."
    )
    spot: Spot | None = Field(None, description="Spot machines among them; left out: none.")
    provision_s: NonNegative = Field(0.0, description="Seconds from asking for a machine until it is there.")
    load_s: NonNegative = Field(
        0.0, description="Seconds from there until weights are loaded and requests taken; also after a repair."
    )
    paid_from: Literal["provision", "load"] = Field(
        "provision", description="Whether a machine is paid from asking for it, or from its arrival."
    )
    faults: Faults | None = Field(None, description="Random failures and slow spells of each replica; left out: none.")
    detect_s: NonNegative = Field(
        30.0,
        description="Seconds from a failure until the gateway takes a replica for down; 30 are three health checks of "
        "10 s, Kubernetes' default.",
    )
    connection_errors: bool = Field(
        True,
        description="Requests at an engine that fails end at once with an error; false: they hang until detected.",
    )
    gpus_per_replica: Annotated[int, Field(ge=1)] = Field(description="GPUs that one replica holds.")
    gpu_usd_per_hour: NonNegative = Field(description="USD per GPU and hour, paid busy or idle.")
    energy_input_usd_per_mtok: NonNegative = Field(0.0, description="USD of energy per million prompt tokens.")
    energy_output_usd_per_mtok: NonNegative = Field(0.0, description="USD of energy per million output tokens.")
    kv_blocks: Annotated[int, Field(ge=1)] = Field(description="KV cache blocks of one replica.")
    block_size_tokens: Annotated[int, Field(ge=1, le=1024)] = Field(16, description="Tokens per KV cache block.")
    max_num_seqs: Annotated[int, Field(ge=1, le=4096)] = Field(
        256, description="Sequences that a replica runs at once."
    )
    max_num_batched_tokens: Annotated[int, Field(ge=1)] = Field(
        2048, description="Token budget of one iteration (prefill chunks plus decode)."
    )
    scheduler: Literal["vllm-v1", "prefill-first", "sarathi"] = Field(
        "vllm-v1", description="Batching order: vllm-v1, prefill-first or sarathi."
    )
    scheduling_policy: Literal["fcfs", "priority"] = Field(
        "fcfs",
        description="Who is served first and who is preempted: fcfs, or priority (of the classes, vllm-v1 only).",
    )
    speculation: SpeculativeDecoding | None = Field(None, description="Speculative decoding; left out: none.")
    watermark_share: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(
        0.01, description="Share of KV blocks that admission leaves free (prefill-first and sarathi)."
    )
    prefix_caching: bool = Field(
        False, description="Keep KV blocks of prompts, and reuse them for requests that begin alike."
    )
    in_flight_cap: Annotated[int, Field(ge=1)] | None = Field(
        None, description="Requests that the gateway keeps at one replica, more wait in its hold queue; left out: any."
    )

    @model_validator(mode="after")
    def _counts_fit(self) -> Pool:
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise ValueError(f"has max_replicas {self.max_replicas}; legal is replicas ({self.replicas}) or more")
        if self.min_replicas > self.replicas:
            raise ValueError(f"has min_replicas {self.min_replicas}; legal is 0 to replicas ({self.replicas})")
        if self.reserved_replicas > self.rows:
            raise ValueError(f"has reserved_replicas {self.reserved_replicas}; legal is 0 to {self.rows}")
        most = self.rows - self.reserved_replicas
        if self.spot is not None and self.spot.replicas > most:
            raise ValueError(f"has {self.spot.replicas} spot.replicas; legal is 1 to {most}, what is not reserved")
        return self

    @property
    def rows(self) -> int:
        """Instances that it can have at most: each one is a candidate."""
        return self.max_replicas or self.replicas

    @property
    def reserved_usd_per_hour(self) -> float:
        """USD per GPU and hour of a reserved instance."""
        own = self.reserved_gpu_usd_per_hour
        return self.gpu_usd_per_hour if own is None else own

    @property
    def paid_usd_per_hour(self) -> float:
        """USD per hour while as many replicas run as at the start."""
        reserved, on_demand, spot = self.paid_replicas
        usd = reserved * self.reserved_usd_per_hour + on_demand * self.gpu_usd_per_hour
        return self.gpus_per_replica * (usd + (spot * self.spot.gpu_usd_per_hour if self.spot else 0.0))

    @property
    def first_spot(self) -> int:
        """Replicas from this one on run on spot machines."""
        return self.rows - (self.spot.replicas if self.spot else 0)

    @property
    def paid_replicas(self) -> tuple[int, int, int]:
        """Replicas that are paid as reserved, on demand and spot while as many run as at the start."""
        spot = max(self.replicas - self.first_spot, 0)
        return self.reserved_replicas, max(self.replicas - spot - self.reserved_replicas, 0), spot

    def replica_usd_per_hour(self, r: int) -> float:
        """USD per GPU and hour of replica `r` of the pool."""
        if self.spot is not None and r >= self.first_spot:
            return self.spot.gpu_usd_per_hour
        return self.reserved_usd_per_hour if r < self.reserved_replicas else self.gpu_usd_per_hour


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


class ResultCache(Section):
    """Cache of results of tools and retrieval, by key: a hit skips the wait and the cost of a call."""

    ttl_s: Positive = Field(description="Seconds after which a result is stale.")
    lookup_s: Annotated[float, Field(ge=0.001)] = Field(0.001, description="Seconds that a result from it takes.")


class SemanticSearch(Section):
    """Look-ups by nearness of meaning: every prompt is embedded before it is decided on."""

    min_similarity: Share = Field(0.5, description="Cosine similarity below which nothing is found.")
    embed_s: NonNegative = Field(description="Seconds that embedding and search add to every request looked up.")
    embed_usd_per_mtok: NonNegative = Field(0.0, description="USD of embedding a million prompt tokens.")
    lookup_usd: NonNegative = Field(0.0, description="USD of a search.")
    half_similarity: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(
        PUBLIC_HALF, description="What the operator assumes: similarity at which an answer is as likely right as wrong."
    )
    width: Positive = Field(PUBLIC_WIDTH, description="What the operator assumes: width of the curve around it.")


class ResponseCache(Section):
    """Cache of answers, kept by the gateway: for the same prompt, or also for prompts that mean the same."""

    capacity_entries: Annotated[int, Field(ge=1)] = Field(description="Answers kept; the oldest use leaves first.")
    ttl_s: Positive = Field(description="Seconds after which a stored answer is stale.")
    lookup_s: NonNegative = Field(description="Seconds that an answer from the cache takes.")
    entry_usd: NonNegative = Field(0.0, description="USD per answer stored.")
    shared: bool = Field(False, description="Whether tenants may get each other's answers.")
    semantic: SemanticSearch | None = Field(
        None, description="Look-ups by nearness of meaning; left out: the same prompt only."
    )


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
