"""DecisionRecord: one schema for the audit log, the trace reader and off-policy evaluation.

One JSON object per line. Prompts and answers are never part of a record.

What the gateway knew of each candidate is in `signals`, so that a log can be decided again: the rows of
`marginroute.view.SIGNALS` behind the constant ones, as little-endian float32, row by row, in base64. The constants are
in the bundle.
"""

from __future__ import annotations

import base64
import json
import math
from dataclasses import dataclass, field

import numpy as np

from marginroute.decision import Decision
from marginroute.features import FEATURE_VERSION
from marginroute.view import N_STATIC_SIGNALS, REQUEST_NAMES, SIGNALS, Array, Layout, View

SCHEMA = 1
_FLOAT32 = np.dtype("<f4")
_ENCODER = json.JSONEncoder(separators=(",", ":"), allow_nan=False)  # json.dumps would make one for every record


@dataclass
class DecisionRecord:
    """What was known, chosen and seen to happen for one request.

    Attributes:
        id: the gateway's request id.
        decided_at_s: Unix time of the decision.
        mode: `shadow` (the gateway did as it would have without us) or `live`.
        policy, bundle: name of the policy and digest of its bundle (first 12 hex digits).
        choice, kind, probability: candidate chosen, its kind, and with what probability.
        reason_usd: expected USD of the choice by part; runner_up, runner_up_usd: the next best and the difference.
        guard: why the fallback decided; empty if it did not.
        request: visible request signals by name (units in `marginroute.view.REQUEST`).
        legal: names of the legal candidates.
        support: names of the candidates that might have been chosen; empty: only `choice`.
        signals: what was known of each candidate, see above; empty if it was not logged.
        feature_version: of the View that `request` and `signals` hold.
        served_by: candidate that really answered (shadow: the gateway's own choice); empty if unknown.
        status: `completed`, `abandoned`, `failed`, or `shed`; empty where this decision did not settle the request.
        ttft_s, e2e_s, prompt_tokens, output_tokens, cost_usd: the outcome, None where unknown.
        good: whether the answer was good, where feedback says so.
    """

    id: str
    decided_at_s: float
    mode: str
    policy: str
    bundle: str
    choice: str
    kind: str
    probability: float
    reason_usd: dict[str, float]
    runner_up: str
    runner_up_usd: float
    guard: str
    request: dict[str, float]
    legal: list[str]
    support: list[str] = field(default_factory=list)
    signals: str = ""
    feature_version: int = FEATURE_VERSION
    served_by: str = ""
    status: str = ""
    ttft_s: float | None = None
    e2e_s: float | None = None
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    cost_usd: float | None = None
    good: bool | None = None
    schema: int = field(default=SCHEMA)

    def to_json(self) -> str:
        """One line of strict JSON; infinities become null."""
        data = dict(vars(self))  # `asdict` copies deeply, at fifty times the cost
        data["request"] = {k: x if math.isfinite(x) else None for k, x in data["request"].items()}
        return _ENCODER.encode(data)


def record_of(
    decision: Decision, view: View, *, id: str, decided_at_s: float, mode: str, bundle: str
) -> DecisionRecord:
    """A record of a decision that has no outcome yet."""
    rows = changing_rows(view.signals)
    known = view.layout, view.request, view.legal, rows
    return record_known(decision, *known, id=id, decided_at_s=decided_at_s, mode=mode, bundle=bundle)


def record_known(
    decision: Decision,
    layout: Layout,
    request: Array,
    legal: Array,
    changing: Array,
    *,
    id: str,
    decided_at_s: float,
    mode: str,
    bundle: str,
) -> DecisionRecord:
    """The same of what a record holds of a View: request (Q,), legal (C,), and `changing_rows`."""
    return DecisionRecord(
        id=id,
        decided_at_s=decided_at_s,
        mode=mode,
        policy=decision.policy,
        bundle=bundle,
        choice=decision.name,
        kind=decision.kind,
        probability=decision.probability,
        reason_usd={part: round(usd, 9) + 0.0 for part, usd in decision.reason_usd.items()},
        runner_up=decision.runner_up,
        runner_up_usd=round(decision.runner_up_usd, 9),
        guard=decision.guard,
        request=dict(zip(REQUEST_NAMES, request.tolist(), strict=True)),
        legal=[name for name, ok in zip(layout.names, legal.tolist(), strict=True) if ok],
        support=list(decision.support),
        signals=packed(changing),
    )


def changing_rows(signals: Array) -> Array:
    """(S - S_static, C) float32 copy of what a record holds of one view's signals (S, C)."""
    return signals[N_STATIC_SIGNALS:].astype(_FLOAT32)


def packed(changing: Array) -> str:
    """The changing rows of one view's signals as text."""
    return base64.b64encode(changing.tobytes()).decode()


def unpacked(text: str, n_candidates: int) -> Array:
    """The inverse of `packed`: (S - S_static, C) float32.

    Raises:
        ValueError: not such a text for this number of candidates.
    """
    rows = len(SIGNALS) - N_STATIC_SIGNALS
    flat = np.frombuffer(base64.b64decode(text, validate=True), dtype="<f4")
    return flat.reshape(rows, n_candidates)
