"""What a workload is drawn from, as plain numbers, and what a trace or a composition dictates instead."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from envs.workload.arrivals import Arrivals
from envs.workload.clients import Client
from envs.workload.durations import SecondsMixture
from envs.workload.intents import IntentSpec, Reuse
from envs.workload.lengths import LengthMixture
from envs.workload.prefixes import PrefixSpec
from envs.workload.quality import QualityTruth
from envs.workload.season import Season
from envs.workload.sessions import SessionKind

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class JobSpec:
    """Batch jobs: many requests handed in at once, due together.

    Attributes:
        class_index: whose.
        per_s: jobs per second.
        requests: of a job.
        spread_s: seconds over which a job's requests are handed in.
        deadline_s: from the job's start; None: the class's own.
    """

    class_index: int
    per_s: float
    requests: LengthMixture
    spread_s: float
    deadline_s: SecondsMixture | None


@dataclass(frozen=True)
class Composition:
    """What a workload has beyond independent requests; empty parts are left out.

    Attributes:
        season: how the rate varies.
        clients: who sends; empty: nobody in particular.
        sessions: kinds; arrivals beyond their shares are single requests.
        warm_up_s: seconds before the episode in which sessions that reach into it may begin.
        jobs: batch work.
        prefixes: None: prompts are not hashed.
    """

    season: Season | None = None
    clients: tuple[Client, ...] = ()
    sessions: tuple[SessionKind, ...] = ()
    warm_up_s: float = 0.0
    jobs: JobSpec | None = None
    prefixes: PrefixSpec | None = None


@dataclass(frozen=True)
class WorkloadSpec:
    """Everything that a workload is drawn from, as plain numbers. K classes, J tasks.

    Attributes:
        arrivals: the arrival process.
        horizon_s: length of an episode.
        requests_per_episode: exact number of requests; None lets the process decide.
        class_share: (K,) shares of requests, adding up to 1.
        task_share: (K, J) shares of tasks within a class; rows add up to 1.
        tenants: (K,) customers per class.
        tenant_exponent: the share of a class's i-th tenant falls like i ** -tenant_exponent.
        prompt_lengths: (J,) distributions of prompt tokens.
        output_lengths: (J,) distributions of output tokens.
        patience_median_s: (K,) median patience before the first token; inf: nobody leaves.
        patience_sigma: (K,) standard deviation of ln patience.
        deadline_s: (K,) inf unless the class is delay-tolerant.
        recurring_share: share of requests drawn from their tenant's recurring prompts.
        recurring_prompts: recurring prompts per tenant.
        recurring_exponent: popularity of the i-th of them falls like i ** -recurring_exponent.
        quality: who answers what well.
        composition: clients, seasons, sessions, jobs and prefixes; None: independent requests.
        intents: who asks the same in other words; None: nobody, `recurring_...` counts.
        reuse: (J,) when an earlier answer is right for another prompt of its intent; with intents.
        judged_share: share of answers of which the gateway will hear whether they were good.
        attempts: A, most answers of a request that verifiers allow; 0: there is no verifier.
    """

    arrivals: Arrivals
    horizon_s: float
    requests_per_episode: int | None
    class_share: tuple[float, ...]
    task_share: tuple[tuple[float, ...], ...]
    tenants: tuple[int, ...]
    tenant_exponent: float
    prompt_lengths: tuple[LengthMixture, ...]
    output_lengths: tuple[LengthMixture, ...]
    patience_median_s: tuple[float, ...]
    patience_sigma: tuple[float, ...]
    deadline_s: tuple[float, ...]
    recurring_share: float
    recurring_prompts: int
    recurring_exponent: float
    quality: QualityTruth
    composition: Composition | None = None
    intents: IntentSpec | None = None
    reuse: tuple[Reuse, ...] = ()
    judged_share: float = 0.0
    attempts: int = 0


@dataclass(frozen=True)
class GivenRequests:
    """What a trace dictates instead of the generator; M rows.

    Attributes:
        arrived_at_s: (M,) f8 ascending, from the start of the window.
        prompt_tokens: (M,) i4.
        output_tokens: (M,) i4.
        class_index: (M,) i4, or None to draw classes.
        prompt_key: (M,) i4, or None where the trace does not tell which prompts recur.
        horizon_s: length of the window.
        task_index, tenant_index: (M,) i4, or None to draw them.
        deadline_s: (M,) f8, nan for the class's own, or None for all.
        family_index, embedding: as in `Workload`, or None where nobody asks the same in other words.
        workflow_index, task_calls: as in `Workload`, or None where no task is paid for.
        tool_key, tool_usd: as in `Workload`, or None where no tool is called.
        prefix_block_tokens, prefix_count, prefix_hash, session_index, parent_index, think_s: as in `Workload`; None
            where the trace has neither hashes nor sessions.
    """

    arrived_at_s: Array
    prompt_tokens: Array
    output_tokens: Array
    class_index: Array | None
    prompt_key: Array | None
    horizon_s: float
    prefix_block_tokens: int = 0
    prefix_count: Array | None = None
    prefix_hash: Array | None = None
    session_index: Array | None = None
    parent_index: Array | None = None
    think_s: Array | None = None
    task_index: Array | None = None
    tenant_index: Array | None = None
    deadline_s: Array | None = None
    family_index: Array | None = None
    embedding: Array | None = None
    workflow_index: Array | None = None
    task_calls: Array | None = None
    tool_key: Array | None = None
    tool_usd: Array | None = None
