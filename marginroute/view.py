"""The View: everything a gateway can know at the moment of a decision, and nothing else.

A view holds one decision, or one decision for each of many worlds: `...` below stands for no leading axis or (N,).
Signals are stored signal-major, so that `view.signals[IN_FLIGHT]` is one contiguous array of shape (..., C) and every
formula in `latency`, `heuristics` and `features` runs unchanged on one decision and on thousands.

Candidates have a fixed order: replicas (pool by pool), third-party providers, then the cached answer, *defer* (hold in
the batch queue) and *shed*. Own counters (in flight, prefilling, decoding, recent latencies) are fresh: the gateway
counts them itself, and adds what an engine had beyond them at its last scrape (`latency.beyond`). Scraped signals are
as old as `TELEMETRY_AGE_S` says.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

UNLIMITED = 1e9  # of whatever is not limited, in signals that are divided by or compared

KINDS = ("replica", "provider", "cache", "defer", "shed")
REPLICA, PROVIDER, CACHE, DEFER, SHED = range(5)

# Signals of a candidate, name and unit. Static ones come from the configuration, the others change with every event.
SIGNALS = (
    ("fixed_ttft_s", "s, median TTFT that does not depend on load (provider, cache look-up)"),
    ("fixed_tpot_s", "s per token, the same"),
    ("base_s", "s per iteration, engine profile"),
    ("prefill_token_s", "s per prefill token in an iteration"),
    ("decode_seq_s", "s per decoding sequence in an iteration"),
    ("kv_token_s", "s per KV token attended in an iteration"),
    ("token_budget", "tokens per iteration"),
    ("slots", "sequences that may run at once"),
    ("kv_capacity_tokens", "tokens that fit the KV cache"),
    ("input_usd", "USD per prompt token that the operator pays (API price, energy)"),
    ("output_usd", "USD per output token that the operator pays"),
    ("call_usd", "USD per call that the operator pays"),
    ("cached_input_usd", "USD per prompt token that the candidate has cached"),
    ("prefix_capacity_tokens", "prompt tokens that the gateway remembers to have sent there; 0: no prefix cache"),
    ("prefix_ttl_s", "s after its last use that a cached prefix is gone"),
    ("limit_call_s", "s in which the provider's rate limit regains a call; 0: calls are not limited"),
    ("limit_token_s", "s in which it regains a token; 0: tokens are not limited"),
    ("p_good_prior", "P(good answer) by the public prior of the tier"),
    ("session_idle_s", "s since a call of this session was last sent there; unlimited elsewhere"),
    ("in_flight", "requests sent there and not completed, held ones included"),
    ("in_flight_cap", "requests that may be at the engine at once; more wait in the gateway"),
    ("limit_spent", "share of the provider's rate limit, of calls or of tokens, that is spent; above 1: in debt"),
    ("decoding", "requests in flight that are streaming"),
    ("decoding_tokens", "prompt and streamed tokens of those"),
    ("recent_ttft_s", "s, moving mean of TTFT of answers completed there"),
    ("recent_tpot_s", "s, moving mean of TPOT of answers completed there"),
    ("running", "scraped: requests running in the engine"),
    ("kv_usage", "scraped: share of KV blocks in use"),
    ("cached_tokens", "of this prompt, expected to be cached there from what the gateway has sent"),
    (
        "surprise",
        "answers of its model to the task judged good lately less those expected to be, per root of their number",
    ),
    ("confidence", "n / (n + 10) of those n answers, about the last forty at most"),
    ("tier_surprise", "the same surprise over all tasks"),
    ("tier_confidence", "the same confidence over all tasks"),
    ("recent_errors", "share of recent calls there that failed; fades with time"),
    ("similarity", "of this prompt and the one that the stored answer was given to; 1: the same words"),
    ("entry_age_s", "s since the stored answer was given"),
    ("held", "requests waiting in the gateway's hold queue"),
    ("pending_prefill_tokens", "prompt tokens in flight without a first token yet, less those expected to be cached"),
    ("waiting", "scraped: requests waiting in the engine"),
    ("telemetry_age_s", "s since the last scrape"),
    ("tried", "1: its model has given this request an answer that was turned down, or the request is under way there"),
    ("under_way_s", "s since the request was sent there, at a hedge timer: choosing it means to wait; 0: it was not"),
)
SIGNAL_NAMES = tuple(name for name, _ in SIGNALS)
(
    FIXED_TTFT_S,
    FIXED_TPOT_S,
    BASE_S,
    PREFILL_TOKEN_S,
    DECODE_SEQ_S,
    KV_TOKEN_S,
    TOKEN_BUDGET,
    SLOTS,
    KV_CAPACITY_TOKENS,
    INPUT_USD,
    OUTPUT_USD,
    CALL_USD,
    CACHED_INPUT_USD,
    PREFIX_CAPACITY_TOKENS,
    PREFIX_TTL_S,
    LIMIT_CALL_S,
    LIMIT_TOKEN_S,
    P_GOOD_PRIOR,
    SESSION_IDLE_S,
    IN_FLIGHT,
    IN_FLIGHT_CAP,
    LIMIT_SPENT,
    DECODING,
    DECODING_TOKENS,
    RECENT_TTFT_S,
    RECENT_TPOT_S,
    RUNNING,
    KV_USAGE,
    CACHED_TOKENS,
    SURPRISE,
    CONFIDENCE,
    TIER_SURPRISE,
    TIER_CONFIDENCE,
    RECENT_ERRORS,
    SIMILARITY,
    ENTRY_AGE_S,
    HELD,
    PENDING_PREFILL_TOKENS,
    WAITING,
    TELEMETRY_AGE_S,
    TRIED,
    UNDER_WAY_S,
) = range(len(SIGNALS))
N_STATIC_SIGNALS = P_GOOD_PRIOR

# What the gateway sees of the request itself, its contract, and its own recent traffic.
REQUEST = (
    ("prompt_tokens", "tokens"),
    ("expected_output_tokens", "tokens, running mean of the class and task"),
    ("class_index", "index of the customer class"),
    ("task_index", "index of the task type"),
    ("difficulty_signal", "standardised predictor of difficulty"),
    ("waited_s", "s since arrival (a held job is decided again)"),
    ("deadline_left_s", "s until the deadline; inf: none"),
    ("arrival_rate_per_s", "requests/s, moving mean"),
    ("sequence", "number of decisions before this one"),
    ("turned_down", "answers to this request that a verifier has turned down; the last one is in hand"),
    ("verifier_score", "of the answer in hand; 0: there is none"),
    ("task_value_usd", "USD that the task pays which this call belongs to; 0: none"),
    ("task_call", "number of calls of the task that have been answered"),
    ("input_usd_per_token", "USD, price to the customer"),
    ("output_usd_per_token", "USD, price to the customer"),
    ("request_value_usd", "USD, value beside the prices: seat price per included request, what a commitment has paid"),
    ("refund_share", "of the value, for a bad answer"),
    ("bad_answer_usd", "USD per bad answer, what it may lose of the task included"),
    ("slo_ttft_s", "s; inf: none"),
    ("slo_tpot_s", "s; inf: none"),
    ("slo_e2e_s", "s; inf: none"),
    ("patience_s", "s, median time to first token that users of the class tolerate; inf: any"),
    ("ttft_credit_share", "of the value, when missed"),
    ("tpot_credit_share", "of the value, when missed"),
    ("e2e_credit_share", "of the value, when missed"),
    ("unserved_credit_share", "of the value, when not answered"),
    ("unserved_credit_usd", "USD, when not answered, with the task's value and what it adds to an SLO window's credit"),
    ("cached_input_usd_per_token", "USD, price to the customer of a prompt token that is cached"),
    ("request_usd", "USD, price to the customer besides tokens"),
    ("miss_usd", "USD that an answer costs, in expectation, that misses any SLO, besides credits per request"),
    ("standing", "index into contracts.STANDINGS: within the allowance, best effort beyond it, overage, refused"),
    ("quota_left", "share of the allowance of the billing period that its customer has left; 1: none is kept"),
)
REQUEST_NAMES = tuple(name for name, _ in REQUEST)
(
    PROMPT_TOKENS,
    EXPECTED_OUTPUT_TOKENS,
    CLASS_INDEX,
    TASK_INDEX,
    DIFFICULTY_SIGNAL,
    WAITED_S,
    DEADLINE_LEFT_S,
    ARRIVAL_RATE_PER_S,
    SEQUENCE,
    TURNED_DOWN,
    VERIFIER_SCORE,
    TASK_VALUE_USD,
    TASK_CALL,
    INPUT_PRICE_USD,
    OUTPUT_PRICE_USD,
    REQUEST_VALUE_USD,
    REFUND_SHARE,
    BAD_ANSWER_USD,
    SLO_TTFT_S,
    SLO_TPOT_S,
    SLO_E2E_S,
    PATIENCE_S,
    TTFT_CREDIT_SHARE,
    TPOT_CREDIT_SHARE,
    E2E_CREDIT_SHARE,
    UNSERVED_CREDIT_SHARE,
    UNSERVED_CREDIT_USD,
    CACHED_INPUT_PRICE_USD,
    REQUEST_USD,
    MISS_USD,
    STANDING,
    QUOTA_LEFT,
) = range(len(REQUEST))


@dataclass(frozen=True)
class Layout:
    """The candidates of a fleet: what stays the same from decision to decision.

    Attributes:
        names: (C,) display names, such as `medium/1`, `api`, `cache`, `defer`, `shed`.
        kind: (C,) index into `KINDS`.
        station: (C,) index of the pool or provider that does the work (pools first, then providers); S for none.
        tier: (C,) index of the model that answers; -1 where that is not known in advance.
        station_names, tier_names, class_names, task_names: what the indices mean.
    """

    names: tuple[str, ...]
    kind: Array
    station: Array
    tier: Array
    station_names: tuple[str, ...]
    tier_names: tuple[str, ...]
    class_names: tuple[str, ...]
    task_names: tuple[str, ...]

    @property
    def n_candidates(self) -> int:
        """C."""
        return len(self.names)

    @cached_property
    def n_replicas(self) -> int:
        """R, the candidates that are replicas; they come first."""
        return int((self.kind == REPLICA).sum())

    @cached_property
    def n_answering(self) -> int:
        """Candidates that answer; they come before *defer* and *shed*."""
        return int((self.kind <= CACHE).sum())

    @cached_property
    def answers(self) -> Array:
        """(C,) 1.0 for candidates that answer the request, 0.0 for *defer* and *shed*."""
        return (self.kind <= CACHE).astype(np.float64)

    @cached_property
    def class_and_task(self) -> Array:
        """(K, J, K + J) float32: one-hot of the class, then of the task."""
        k, j = len(self.class_names), len(self.task_names)
        table = np.zeros((k, j, k + j), dtype=np.float32)
        table[:, :, :k] = np.eye(k)[:, None]
        table[:, :, k:] = np.eye(j)
        return table

    @cached_property
    def one_hot(self) -> Array:
        """(5 + T, C) float32: kind, then tier."""
        kinds = self.kind == np.arange(len(KINDS))[:, None]
        tiers = self.tier == np.arange(len(self.tier_names))[:, None]
        return np.concatenate([kinds, tiers]).astype(np.float32)

    def to_dict(self) -> dict[str, list[Any]]:
        """Plain lists, for a bundle's manifest."""
        return {
            "names": list(self.names),
            "kind": self.kind.tolist(),
            "station": self.station.tolist(),
            "tier": self.tier.tolist(),
            "station_names": list(self.station_names),
            "tier_names": list(self.tier_names),
            "class_names": list(self.class_names),
            "task_names": list(self.task_names),
        }

    @staticmethod
    def from_dict(data: dict[str, list[Any]]) -> Layout:
        """The inverse of `to_dict`."""
        return Layout(
            names=tuple(data["names"]),
            kind=np.array(data["kind"], dtype=np.int64),
            station=np.array(data["station"], dtype=np.int64),
            tier=np.array(data["tier"], dtype=np.int64),
            station_names=tuple(data["station_names"]),
            tier_names=tuple(data["tier_names"]),
            class_names=tuple(data["class_names"]),
            task_names=tuple(data["task_names"]),
        )


def answering_tiers(layout: Layout, allowed: Array) -> Array:
    """(K, T) bool: tiers of which a class is entitled to some candidate, by `allowed` (K, C)."""
    models = np.zeros((len(allowed), len(layout.tier_names)), dtype=np.bool_)
    for c in np.flatnonzero(layout.kind <= PROVIDER):
        models[:, layout.tier[c]] |= allowed[:, c]
    return models


@dataclass
class View:
    """One decision's knowledge, or that of N worlds at once.

    Attributes:
        layout: the candidates.
        signals: (S, ..., C) float64, one row per entry of `SIGNALS`.
        request: (Q, ...) float64, one row per entry of `REQUEST`.
        legal: (..., C) bool; at least one candidate (shed) is always legal.
    """

    layout: Layout
    signals: Array
    request: Array
    legal: Array

    def asked(self, row: int) -> Array:
        """One row of the request, as it broadcasts against candidates: (N, 1), or () for one decision.

        NumPy takes a 0-d array with (C,) by its fast path, and (1,) or a Python number by one of three times the cost.
        """
        one: Array = self.request[row, ...]
        return one if one.ndim == 0 else one[..., None]

    def __getitem__(self, world: int) -> View:
        """The view of one world of a batched view."""
        return View(self.layout, self.signals[:, world], self.request[:, world], self.legal[world])

    def copy(self) -> View:
        """A view that the simulator will not overwrite."""
        return View(self.layout, self.signals.copy(), self.request.copy(), self.legal.copy())
