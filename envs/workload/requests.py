"""The workload of one episode: what is asked, when, by whom, and the truths that no gateway can see."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from functools import cache, cached_property, lru_cache
from typing import Any, ClassVar

import numpy as np

from envs.workload.faults import no_faults
from marginroute.errors import InputError

Array = np.ndarray[Any, Any]

_IN_ORDER = "not before an earlier request without parent"


@dataclass(frozen=True, eq=False)
class Workload:
    """Requests of one episode as immutable arrays, ordered by arrival.

    *Sessions*: a request may follow another one (`parent_index`): it arrives when its user or agent is ready, think_s
    after its parent was answered, and never if the parent was not. A parent has a smaller index than its followers;
    requests without a parent (roots) are in order of arrival.

    *Prefixes*: prompts that begin alike begin with the same block hashes; a hash stands for its block of
    `prefix_block_tokens` tokens and all before it, so equal hashes have equal ones before them. The hashes of a request
    are those of its prompt, from the first block on; the last may stand for a block that is not full. A follow-up whose
    prompt is its parent's hashes and more, and long enough, is taken to repeat the parent's answer.

    M requests, T tiers. Requests with the same `prompt_key` are the same prompt: equal lengths, task, quality and
    outcome, whoever asks, but for what drifts in between. Fields named in `hidden` are truths of the future or of the
    request: the engine and the ledger read them, a View never does.

    Attributes:
        arrived_at_s: (M,) f8, in [0, horizon_s), ascending over roots; of a follow-up only a nominal time.
        class_index: (M,) i4, customer class.
        task_index: (M,) i4, task type.
        tenant_index: (M,) i4, customer; a tenant belongs to one class.
        prompt_tokens: (M,) i4, at least 1.
        output_tokens: (M,) i4, at least 1. Hidden.
        patience_s: (M,) f8, time to first token that the user tolerates; inf: never leaves. Hidden.
        deadline_s: (M,) f8, relative to arrival; inf unless the class is delay-tolerant.
        prompt_key: (M,) i4, identity of a prompt that may recur, dense from 0; -1: unique.
        difficulty_signal: (M,) f8, standardised predictor of difficulty.
        p_good_prior: (M, T) f8, observable P(good answer) of each tier, by a public prior or by a predictor.
        p_good: (M, T) f8, true P(good answer). Hidden.
        good: (M, T) u1, outcome; with shared luck monotone in `p_good`. Hidden.
        provider_noise: (M, 2) f8, standard normals behind a provider's TTFT and TPOT. Hidden.
        horizon_s: length of the episode.
        prefix_block_tokens: tokens per block hash; 0: nobody hashes prompts.
        variant: which member of a family of scenarios the episode plays in; 0 where there is only one.
        prefix_count: (M,) i4, block hashes of each request, at most its prompt's blocks; default none.
        prefix_hash: (sum of prefix_count,) i8, 0 or more, one request after the other.
        session_index: (M,) i4, conversation or task that a request belongs to; -1: none. Default -1.
        parent_index: (M,) i4, request that this one follows, an earlier row; -1: none. Default -1.
        think_s: (M,) f8, seconds between the parent's end and this arrival, 0 or more. Default 0. Hidden.
        family_index: (M,) i4, prompts that mean the same, dense from 0; -1: asked once. Default -1.
        embedding: (M, D) f4, unit vectors of prompts with a family, equal for equal keys. Default none, D = 0.
        needed_similarity: (M,) f8, that an answer to another prompt must have to be right. Default 0. Hidden.
        valid_for_s: (M,) f8, age of a stored answer up to which it is right. Default inf. Hidden.
        judged: (M,) u1, 1: the gateway will hear whether the answer was good. Default 0. Hidden.
        workflow_index: (M,) i4, kind of task that pays when it succeeds and that a request is a call of; -1: none.
            Default -1.
        task_calls: (M,) i4, calls of its whole task, those outside the episode included. Default 1. Hidden.
        tool_key: (M,) i4, result that the tool before a follow-up is asked for, dense from 0; -1: none. Default -1.
            Hidden.
        tool_usd: (M,) f8, what that costs. Default 0. Hidden.
        attempt_luck: (M, A, 3) f8, for each answer of a request that a verifier may look at: a standard normal number
            behind its score, a uniform one behind an answer that is drawn anew, one behind the user's leaving. Default
            none, A = 0. Hidden.
        ability_shift: (M, T) f8, what drifts add to abilities in probits. Default none, (M, 0). Hidden.
        faults: (F,) `faults.FAULT`, what fails when, ordered by start. Hidden.
        billing: (G, 2) f8, by customer: share of its billing period that has passed at the start, and share of its
            allowances that is used; none: 0 of both. A View shows what is left.
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
    prefix_block_tokens: int = 0
    variant: int = 0
    prefix_count: Array = None  # type: ignore[assignment]
    prefix_hash: Array = None  # type: ignore[assignment]
    session_index: Array = None  # type: ignore[assignment]
    parent_index: Array = None  # type: ignore[assignment]
    think_s: Array = None  # type: ignore[assignment]
    family_index: Array = None  # type: ignore[assignment]
    embedding: Array = None  # type: ignore[assignment]
    needed_similarity: Array = None  # type: ignore[assignment]
    valid_for_s: Array = None  # type: ignore[assignment]
    judged: Array = None  # type: ignore[assignment]
    workflow_index: Array = None  # type: ignore[assignment]
    task_calls: Array = None  # type: ignore[assignment]
    tool_key: Array = None  # type: ignore[assignment]
    tool_usd: Array = None  # type: ignore[assignment]
    attempt_luck: Array = None  # type: ignore[assignment]
    ability_shift: Array = None  # type: ignore[assignment]
    faults: Array = field(default_factory=no_faults)
    billing: Array = field(default_factory=lambda: np.zeros((0, 2)))

    hidden: ClassVar[tuple[str, ...]] = (
        *("output_tokens", "patience_s", "p_good", "good", "provider_noise", "think_s"),
        *("needed_similarity", "valid_for_s", "judged", "task_calls", "attempt_luck", "ability_shift"),
        *("tool_key", "tool_usd"),
    )
    scalars: ClassVar[tuple[str, ...]] = ("horizon_s", "prefix_block_tokens", "variant")
    beside: ClassVar[tuple[str, ...]] = ("faults", "billing")

    def __post_init__(self) -> None:
        m = self.n_requests
        for name, fill, size, kind in (
            ("prefix_count", 0, m, np.int32),
            ("prefix_hash", 0, 0, np.int64),
            ("session_index", -1, m, np.int32),
            ("parent_index", -1, m, np.int32),
            ("think_s", 0.0, m, np.float64),
            ("family_index", -1, m, np.int32),
            ("embedding", 0, (m, 0), np.float32),
            ("needed_similarity", 0.0, m, np.float64),
            ("valid_for_s", np.inf, m, np.float64),
            ("judged", 0, m, np.uint8),
            ("workflow_index", -1, m, np.int32),
            ("task_calls", 1, m, np.int32),
            ("tool_key", -1, m, np.int32),
            ("tool_usd", 0.0, m, np.float64),
            ("attempt_luck", 0, (m, 0, 3), np.float64),
            ("ability_shift", 0, (m, 0), np.float64),
        ):
            given = getattr(self, name)
            array = _filled(size, fill, kind) if given is None else np.ascontiguousarray(given, kind)
            object.__setattr__(self, name, array)
        _check_sessions(self)
        _check_prefixes(self)
        for name in (*self.array_names(), *self.beside):
            getattr(self, name).flags.writeable = False

    @classmethod
    @cache
    def array_names(cls) -> tuple[str, ...]:
        """The fields that are arrays, in order of definition; not those `beside` requests."""
        return tuple(item.name for item in fields(cls) if item.name not in (*cls.scalars, *cls.beside))

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

    @cached_property
    def prefix_ids(self) -> Array:
        """(sum of prefix_count,) i4, the hashes numbered from 0 in order of first appearance.

        Raises:
            InputError: equal hashes with different ones before them: they do not stand for all before.
        """
        _, first, number = np.unique(self.prefix_hash, return_index=True, return_inverse=True)
        rank = np.empty(len(first), dtype=np.int32)
        rank[np.argsort(first)] = np.arange(len(first), dtype=np.int32)
        before = np.roll(self.prefix_hash, 1)
        starts = np.cumsum(self.prefix_count) - self.prefix_count
        before[starts[self.prefix_count > 0]] = -1
        wrong = before != before[first[number]]
        if wrong.any():
            at = int(np.argmax(wrong))
            row = int(np.searchsorted(starts, at, side="right")) - 1
            raise InputError(
                f"workload: prefix_hash {self.prefix_hash[at]} of request {row} stands elsewhere behind other blocks; "
                "legal is a hash of a block and all before it"
            )
        return rank[number]

    @property
    def has_families(self) -> bool:
        """Whether prompts may mean the same in other words."""
        return self.embedding.shape[1] > 0

    @property
    def has_sessions(self) -> bool:
        """Whether any request follows another one."""
        return bool((self.parent_index >= 0).any())


@lru_cache(maxsize=64)
def _filled(size: int | tuple[int, ...], fill: float, kind: type) -> Array:
    """What stands for an array that was not given; nobody writes to it, so that workloads share it."""
    array = np.full(size, fill, kind)
    array.flags.writeable = False
    return array


def _refuse(wrong: Array, name: str, values: Array, legal: str) -> None:
    """Raises InputError for the first request that is marked as wrong."""
    if wrong.any():
        row = int(np.argmax(wrong))
        raise InputError(f"workload: {name} of request {row} is {values[row]}; legal is {legal}")


def _check_sessions(workload: Workload) -> None:
    """Raises InputError unless every follow-up comes after its parent and everybody's times make sense."""
    m, parent, think_s = workload.n_requests, workload.parent_index, workload.think_s
    for name in ("session_index", "parent_index", "think_s"):
        if len(getattr(workload, name)) != m:
            raise InputError(f"workload: {len(getattr(workload, name))} {name}; legal is one per request, {m}")
    _refuse(~((think_s >= 0.0) & (think_s < np.inf)), "think_s", think_s, "0 or more seconds")
    if (parent == -1).all():
        early = np.zeros(m, dtype=np.bool_)
        np.less(workload.arrived_at_s[1:], workload.arrived_at_s[:-1], out=early[1:])
        _refuse(early, "arrived_at_s", workload.arrived_at_s, _IN_ORDER)
        return
    _refuse((parent < -1) | (parent >= np.arange(m)), "parent_index", parent, "an earlier request, or -1")
    roots = np.flatnonzero(parent < 0)
    early = np.zeros(m, dtype=np.bool_)
    early[roots[1:]] = np.diff(workload.arrived_at_s[roots]) < 0.0
    _refuse(early, "arrived_at_s", workload.arrived_at_s, _IN_ORDER)
    followers = np.flatnonzero(parent >= 0)
    strange = np.zeros(m, dtype=np.bool_)
    strange[followers] = workload.session_index[followers] != workload.session_index[parent[followers]]
    _refuse(strange, "session_index", workload.session_index, "that of its parent")


def _check_prefixes(workload: Workload) -> None:
    """Raises InputError unless the ragged list of hashes is one."""
    block, count, m = workload.prefix_block_tokens, workload.prefix_count, workload.n_requests
    if block < 0:
        raise InputError(f"workload: prefix_block_tokens is {block}; legal is 0 (no hashes) or more")
    if len(count) != m or int(count.sum()) != len(workload.prefix_hash):
        raise InputError(
            f"workload: {len(count)} prefix_count that add up to {count.sum()}, and {len(workload.prefix_hash)} "
            f"prefix_hash; legal is one count per request, {m}, and as many hashes as they add up to"
        )
    most = -(-workload.prompt_tokens // block) if block else np.zeros(m, dtype=np.int32)
    _refuse((count < 0) | (count > most), "prefix_count", count, "0 to the blocks of its prompt")
    if (workload.prefix_hash < 0).any():
        raise InputError(f"workload: prefix_hash {workload.prefix_hash.min()}; legal is 0 or more")
