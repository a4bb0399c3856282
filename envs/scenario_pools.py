"""The pools of a fleet, paid by GPU-hour: replicas of an engine, spot machines, speculation, and how they fail."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from envs.scenario_section import Name, NonNegative, Positive, Section, Share


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
