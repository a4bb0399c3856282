"""What passes between an adapter and the gateway: facts of a request, the verdict on it, and what became of it."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from marginroute.decision import Decision


@dataclass(frozen=True, slots=True)
class Trial:
    """Answers to a request that a verifier has turned down; the last one is in hand and may be delivered.

    Attributes:
        tiers: who gave them, in order.
        score: of the last, from 0 to 1 (`marginroute.verification`).
        waited_s: since the request arrived.
        age_s: since the last was looked at.
        fresh_share: of questions put to the same model again, whose answer is drawn anew.
    """

    tiers: tuple[str, ...]
    score: float
    waited_s: float = 0.0
    age_s: float = 0.0
    fresh_share: float = 0.0


@dataclass(slots=True)
class Facts:
    """What an adapter knows of a request.

    Attributes:
        id: of the request, the same for every attempt.
        prompt_tokens: known or estimated.
        class_name: customer class; None: the first of the bundle.
        task_name: task type; None: the first of the bundle.
        tenant: who pays; empty: unknown.
        session: conversation or agent run; empty: unknown.
        available: candidates that may serve it now; None: all.
        cached_tier: tier of the stored answer, if the gateway has one for this request.
        similarity: of this prompt and the one that the stored answer was given to; 1: the same words.
        entry_age_s: since the stored answer was given.
        difficulty_signal: standardised predictor of difficulty.
        deadline_left_s: seconds until its deadline.
        standing: with its customer's account, one of `contracts.STANDINGS`, where a billing system says.
        quota_left: share of its customer's allowance that is left.
        hashes: of the prompt's blocks (`prefix_index.block_hashes`).
        block_tokens: tokens per block of this prompt; None: the usual number.
        traceparent: W3C trace context of the caller, for spans; empty: none.
        prompt: text for the bundle's quality predictor, if it has one; it is not kept.
        trial: what a verifier has turned down, for a request that is decided again under a new id; None: nothing.
    """

    id: str
    prompt_tokens: int
    class_name: str | None = None
    task_name: str | None = None
    tenant: str = ""
    session: str = ""
    available: Collection[str] | None = None
    cached_tier: str | None = None
    similarity: float = 1.0
    entry_age_s: float = 0.0
    difficulty_signal: float = 0.0
    deadline_left_s: float = math.inf
    standing: str = "within"
    quota_left: float = 1.0
    hashes: Sequence[int] = ()
    block_tokens: float | None = None
    prompt: str | None = None
    traceparent: str = ""
    trial: Trial | None = None


@dataclass(frozen=True, slots=True)
class Verdict:
    """A decision, and whether to carry it out.

    Attributes:
        decision: what the bundle would do.
        acting: True: do it; False: route as without us.
        attempt: 1 for the first decision of a request.
        retry_after_s: for a shed request, when the shortest queue will have been worked off, about.
        held: wait for the request's turn, then ask again.
    """

    decision: Decision
    acting: bool
    attempt: int = 1
    retry_after_s: float = 0.0
    held: bool = False


@dataclass(frozen=True)
class Outcome:
    """What really happened to a request; None where unknown.

    Attributes:
        status: `completed`, `failed`, `abandoned` or `shed`.
        served_by: candidate that answered, empty if none did or it is not one of the bundle's.
        ttft_s: from the request's arrival to its first token.
        e2e_s: from the request's arrival to its last token.
        attempt_ttft_s: the same from the start of the attempt that answered.
        attempt_e2e_s: the same.
        prompt_tokens: as counted by who answered.
        output_tokens: the same.
        cost_usd: what the answer cost the operator; None: by the bundle's figures for the candidate.
    """

    status: str
    served_by: str = ""
    ttft_s: float | None = None
    e2e_s: float | None = None
    attempt_ttft_s: float | None = None
    attempt_e2e_s: float | None = None
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    cost_usd: float | None = None
