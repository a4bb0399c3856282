"""What the fast path needs of a fleet and of a network, worked out once: rows of its buffer, constants, weights."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from marginroute import view as v
from marginroute.features import CANDIDATE_FEATURES, CONTEXT_FEATURES
from marginroute.heuristics import MarginRule
from marginroute.policy import ResidualPolicy
from marginroute.view import Array, Layout

_COPIED = """
    in_flight decoding in_flight_cap decoding_tokens limit_spent p_good recent_errors kv_usage surprise confidence
    tier_surprise tier_confidence similarity fill legal cached_share barred stay cost congestion credit refund
    below_best recent_ttft_s recent_tpot_s entry_age_s held pending_prefill waiting telemetry_age_s tried
"""
_COMPUTED = "one ttft_s tpot_s ttft_to_slo tpot_to_slo keep_patience keep_ttft keep_tpot keep_e2e one_again"
COPIED_ROWS = tuple(_COPIED.split())
"""Copied from the view in one call; those that are no signal are computed later and hold anything till then."""
ROWS = (*COPIED_ROWS, *_COMPUTED.split())
"""All rows; `keep_*` are first (estimate / limit) ** sharpness, then the chance that the limit is kept."""
AT = {name: row for row, name in enumerate(ROWS)}
SHOWN = slice(AT["p_good"], AT["tpot_to_slo"] + 1)  # to the network
LOGS = slice(AT["below_best"] - SHOWN.start, None)  # of those: transformed by a logarithm
SIGNAL_OF = {"cached_share": "cached_tokens", "pending_prefill": "pending_prefill_tokens", "p_good": "p_good_prior"}
NOT_FEATURES = ("barred", "stay", "one")  # rows that stand among the shown ones for the sake of a product
CONTEXT = """
    difficulty_signal fleet_fill urgency prompt_tokens expected_output_tokens waited_s arrival_rate_per_s value_usd
    turned_down verifier_score task_value_usd
"""
SHIFTS = {"identity": 0.0, "ln(x + 0.001)": 1e-3, "ln(1 + x)": 1.0}  # before the logarithm, by transform


def covers_features() -> bool:
    """Whether the features are those that the rows stand for."""
    candidate = {feature.name for feature in CANDIDATE_FEATURES}
    context = [feature.name for feature in CONTEXT_FEATURES]
    return candidate == set(ROWS[SHOWN]) - set(NOT_FEATURES) and context == CONTEXT.split()


def signals_of_copied_rows() -> Array:
    """The signal that each of them is copied from; 0 for those that are no signal."""
    named = (SIGNAL_OF.get(row, row) for row in COPIED_ROWS)
    return np.array([v.SIGNAL_NAMES.index(name) if name in v.SIGNAL_NAMES else 0 for name in named])


@dataclass(frozen=True, eq=False)
class Fleet:
    """What a rule and the candidates fix; arrays are rows (C,) or stacks of rows.

    Attributes:
        rule: that puts USD on candidates.
        layout: the candidates.
        static: (S_static, C) their constants.
    """

    rule: MarginRule
    layout: Layout
    static: Array

    def linear(self) -> Array:
        """(4, 2 C) of 1, P, O and O (P + O / 2): USD of an answer, and of the work that it takes, nothing cached."""
        s, zero = self.static, np.zeros(self.layout.n_candidates)
        per_prompt_s = s[v.PREFILL_TOKEN_S] + s[v.LIMIT_TOKEN_S]
        per_output_s = s[v.DECODE_SEQ_S] + s[v.BASE_S] / s[v.SLOTS] + s[v.LIMIT_TOKEN_S]
        work_s = np.stack([s[v.LIMIT_CALL_S], per_prompt_s, per_output_s, s[v.KV_TOKEN_S]])
        usd = np.stack([s[v.CALL_USD], s[v.INPUT_USD], s[v.OUTPUT_USD], zero])
        return np.concatenate([usd, work_s * self.price], axis=1)

    def saved(self) -> Array:
        """(2, C) of the same per cached token."""
        s = self.static
        return np.stack([s[v.CACHED_INPUT_USD] - s[v.INPUT_USD], -self.price * s[v.PREFILL_TOKEN_S]])

    @property
    def price(self) -> Array:
        """(C,) USD per second of work."""
        return self.rule.parameters.price[self.layout.station]


class Buffer:
    """Rows (C,) of one thread, by the names in `ROWS`, and the numbers of the request that products weigh them with.

    Args:
        n: C, candidates.

    Attributes:
        rows: (len(ROWS), C) float64.
        row: each of them by name.
        numbers: (38,), written in one go; `prompt` to `score_by` are parts of them.
        score_usd, floor_usd: (C,) what a rule ranks by, and what floors add to it.
        credited_bad_ok: (3, C) credits in USD, P(bad answer), P(no error), before anybody leaves.
    """

    def __init__(self, n: int) -> None:
        self.rows = np.zeros((len(ROWS), n))
        self.row = dict(zip(ROWS, self.rows, strict=True))
        self.row["one"][:] = self.row["one_again"][:] = 1.0
        self.numbers = numbers = np.zeros(38)
        self.prompt, self.output, self.crowd_by = numbers[0, ...], numbers[1, ...], numbers[2:5]
        self.linear_by, self.ratios_by = numbers[5:9], numbers[9:27].reshape(6, 3)
        self.credit_by, self.score_by = numbers[27:32], numbers[32:38]
        self.score_usd, self.floor_usd = np.empty((2, n))
        self.credited_bad_ok = np.empty((3, n))

    def span(self, first: str, last: str, step: int = 1) -> Array:
        """Rows that go through a call together."""
        return self.rows[AT[first] : AT[last] + 1 : step]


@dataclass(frozen=True, eq=False)
class Scorer:
    """The network's weights in the order of `ROWS`, transposed, float32; see `policy.Network`.

    Attributes:
        first: (shown rows + 5 + T, H) for the rows and the one-hots of kind and tier.
        context: (K, J, H, 1 + 11) for a class and task: bias, then numbers of the context.
        second: (H, H + 1), its bias last.
        head: (H,).
        kappa: weight of the advice; trust: (a, b) of the correction, as `policy.Network`.
        shift: (log rows, 1) added before the logarithm.
        temperature_share: of the advice.
        far: (K, J) context columns of class and task that lie far outside training.
        near: for the other columns, the bounds within which they do not.
    """

    first: Array
    context: Array
    second: Array
    head: Array
    kappa: float
    trust: tuple[float, float]
    shift: Array
    temperature_share: float
    far: Array
    near: tuple[tuple[float, float], ...]


def scorer_of(policy: ResidualPolicy, layout: Layout) -> Scorer:
    """Rearranges a policy's weights."""
    spec, net = policy.spec, policy.folded
    row_of = {f.name: i for i, f in enumerate(spec.candidate)}
    hidden, shown = len(net.head), ROWS[SHOWN]
    constant = net.candidate[len(CANDIDATE_FEATURES) :]
    dynamic = np.zeros((len(shown), hidden), dtype=np.float32)
    shift = np.zeros((len(shown), 1), dtype=np.float32)
    for at, name in enumerate(shown):
        if name not in NOT_FEATURES:
            dynamic[at] = net.candidate[row_of[name]]
            shift[at] = SHIFTS[spec.candidate[row_of[name]].transform]
    table = layout.class_and_task
    n = table.shape[-1]
    bias = table @ net.context[:n] + net.bias_1
    numbers = np.broadcast_to(net.context[n:].T, (*bias.shape, len(CONTEXT_FEATURES)))
    mean, limit = spec.context_mean, spec.drift_limit
    return Scorer(
        first=np.concatenate([dynamic, constant]),
        context=np.ascontiguousarray(np.concatenate([bias[..., None], numbers], axis=-1)),
        second=np.ascontiguousarray(np.concatenate([net.hidden, net.bias_2[None]]).T),
        head=net.head,
        kappa=float(net.kappa[0]),
        trust=(float(net.trust[0]), float(net.trust[1])),
        shift=shift[LOGS].copy(),
        temperature_share=spec.temperature_share,
        far=(np.abs(table - mean[:n]) >= limit[:n]).sum(axis=-1),
        near=tuple(zip((mean - limit)[n:].tolist(), (mean + limit)[n:].tolist(), strict=True)),
    )
