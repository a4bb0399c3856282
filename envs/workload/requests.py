"""The workload of one episode: what is asked, when, by whom, and the truths that no gateway can see."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar

import numpy as np

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, eq=False)
class Workload:
    """Requests of one episode as immutable arrays, ordered by arrival.

    M requests, T tiers. Requests with the same `prompt_key` are the same prompt: equal lengths, task, quality and
    outcome, whoever asks. Fields named in `hidden` are truths of the future or of the request: the engine and the
    ledger read them, a View never does.

    Attributes:
        arrived_at_s: (M,) f8, ascending, in [0, horizon_s).
        class_index: (M,) i4, customer class.
        task_index: (M,) i4, task type.
        tenant_index: (M,) i4, customer; a tenant belongs to one class.
        prompt_tokens: (M,) i4, at least 1.
        output_tokens: (M,) i4, at least 1. Hidden.
        patience_s: (M,) f8, time to first token that the user tolerates; inf: never leaves. Hidden.
        deadline_s: (M,) f8, relative to arrival; inf unless the class is delay-tolerant.
        prompt_key: (M,) i4, identity of a prompt that may recur, dense from 0; -1: unique.
        difficulty_signal: (M,) f8, standardised predictor of difficulty.
        p_good_prior: (M, T) f8, P(good answer) by the public prior of each tier.
        p_good: (M, T) f8, true P(good answer). Hidden.
        good: (M, T) u1, outcome: one uniform per prompt compared with `p_good`, hence monotone in it. Hidden.
        provider_noise: (M, 2) f8, standard normals behind a provider's TTFT and TPOT. Hidden.
        horizon_s: length of the episode.
    """

    arrived_at_s: Array
    class_index: Array
    task_index: Array
    tenant_index: Array
    prompt_tokens: Array
    output_tokens: Array
    patience_s: Array
    deadline_s: Array
    prompt_key: Array
    difficulty_signal: Array
    p_good_prior: Array
    p_good: Array
    good: Array
    provider_noise: Array
    horizon_s: float

    hidden: ClassVar[tuple[str, ...]] = ("output_tokens", "patience_s", "p_good", "good", "provider_noise")

    def __post_init__(self) -> None:
        for name in self.array_names():
            getattr(self, name).flags.writeable = False

    @classmethod
    def array_names(cls) -> tuple[str, ...]:
        """The fields that are arrays, in order of definition."""
        return tuple(field.name for field in fields(cls) if field.name != "horizon_s")

    @classmethod
    def visible(cls) -> tuple[str, ...]:
        """The arrays that a gateway may see."""
        return tuple(name for name in cls.array_names() if name not in cls.hidden)

    @property
    def n_requests(self) -> int:
        """M."""
        return len(self.arrived_at_s)

    @property
    def n_tiers(self) -> int:
        """T."""
        return int(self.p_good.shape[1])
