"""What the fast path needs of a fleet and of a network, worked out once: rows of its buffer, constants, weights."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from marginroute import view as v
from marginroute.features import CANDIDATE_FEATURES, CLIP, CONTEXT_FEATURES, MIN_LOGIT
from marginroute.margin_rule import MarginRule
from marginroute.policy import ResidualPolicy
from marginroute.view import Array, Layout

_WORKED_OUT = """
    token_budget one_more crowded pending prefill_s one_more_decoding decode_s fill cached_share cost congestion
    credit refund stay barred legal advice below_best one ttft_s tpot_s ttft_to_slo tpot_to_slo
"""
_COPIED = """
    recent_ttft_s recent_tpot_s entry_age_s held pending_prefill waiting telemetry_age_s tried
    p_good kv_usage surprise confidence tier_surprise tier_confidence similarity recent_errors errors_again
    limit_spent in_flight_cap in_flight decoding_tokens of_pending of_prefill decoding of_decode of_fill cached
    of_cost of_congestion p_good_again
"""
_KEPT = "one_again keep_e2e keep_tpot keep_ttft keep_patience patience_again over_ttft_slo over_tpot_slo"
COPIED = tuple(_COPIED.split())
"""Rows copied from the view in one call; of `in_flight` to `of_congestion` come `one_more` to `congestion`."""
ROWS = (*_WORKED_OUT.split(), *COPIED, *_KEPT.split())
"""All rows; `keep_*` are first (estimate / limit) ** sharpness, then the chance that the limit is kept."""
AT = {name: row for row, name in enumerate(ROWS)}
SHOWN = slice(AT["fill"], AT["recent_errors"] + 1)  # to the network
LOGS = slice(AT["below_best"] - SHOWN.start, AT["tried"] + 1 - SHOWN.start)  # of those: transformed by a logarithm
SIGNAL_OF = {
    "pending_prefill": "pending_prefill_tokens",
    "p_good": "p_good_prior",
    "p_good_again": "p_good_prior",
    "errors_again": "recent_errors",
    "of_pending": "pending_prefill_tokens",
    "of_prefill": "pending_prefill_tokens",
    "of_decode": "decoding_tokens",
    "of_fill": "in_flight",
    "cached": "cached_tokens",
    "of_cost": "cached_tokens",
    "of_congestion": "cached_tokens",
}
NOT_FEATURES = ("stay", "barred", "advice", "one")  # among the shown ones for the sake of a product
CONTEXT = """
    difficulty_signal fleet_fill urgency prompt_tokens expected_output_tokens waited_s arrival_rate_per_s value_usd
    turned_down verifier_score task_value_usd
"""
BARRED = 1e18  # by how much, in values of the request, an illegal candidate ranks below the others
SHIFTS = {"identity": 0.0, "ln(x + 0.001)": 1e-3, "ln(1 + x)": 1.0}  # before the logarithm, by transform


def covers_features() -> bool:
    """Whether the features are those that the rows stand for."""
    candidate = {feature.name for feature in CANDIDATE_FEATURES}
    context = [feature.name for feature in CONTEXT_FEATURES]
    return candidate == set(ROWS[SHOWN]) - set(NOT_FEATURES) and context == CONTEXT.split()


def signals_of_copied_rows() -> Array:
    """The signal that each of them is copied from."""
    return np.array([v.SIGNAL_NAMES.index(SIGNAL_OF.get(row, row)) for row in COPIED])


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
        """(4, 10 C) of 1, P, O and O (P + O / 2): `one_more` to `congestion` as far as nothing else is in them."""
        s, rows = self.static, np.zeros((4, 10, self.layout.n_candidates))
        (one_more, crowded, pending, prefill_s, decoding, decode_s, _, _, usd, work) = rows.swapaxes(0, 1)
        one_more[0] = decoding[0] = pending[1] = crowded[1] = 1.0
        crowded[0] = -s[v.KV_CAPACITY_TOKENS]
        prefill_s[:2] = s[[v.FIXED_TTFT_S, v.PREFILL_TOKEN_S]]
        decode_s[:2] = s[[v.BASE_S, v.KV_TOKEN_S]]
        usd[:3] = s[[v.CALL_USD, v.INPUT_USD, v.OUTPUT_USD]]
        work[:2] = s[v.LIMIT_CALL_S], s[v.PREFILL_TOKEN_S] + s[v.LIMIT_TOKEN_S]
        work[2] = s[v.DECODE_SEQ_S] + s[v.BASE_S] / s[v.SLOTS] + s[v.LIMIT_TOKEN_S]
        work[3] = s[v.KV_TOKEN_S]
        work *= self.price
        return rows.reshape(4, -1)

    def per_unit(self) -> Array:
        """(10, C) what each of `in_flight` to `of_congestion` adds; that of `cached` is the request's."""
        s, one = self.static, np.ones(self.layout.n_candidates)
        saved_usd, saved_work_usd = s[v.CACHED_INPUT_USD] - s[v.INPUT_USD], -self.price * s[v.PREFILL_TOKEN_S]
        per_prefill_token, per_token, per_request = s[v.PREFILL_TOKEN_S], s[v.KV_TOKEN_S], 1.0 / s[v.SLOTS]
        return np.stack([one, one, one, per_prefill_token, one, per_token, per_request, one, saved_usd, saved_work_usd])

    @property
    def price(self) -> Array:
        """(C,) USD per second of work."""
        return self.rule.parameters.price[self.layout.station]


class Buffer:
    """Rows (C,) of one thread, by the names in `ROWS`, and the numbers of the request that products weigh them with.

    Args:
        n: C, candidates.

    Attributes:
        rows: (len(ROWS), C) float64; what is in USD is a share of the request's value.
        row: each of them by name.
        numbers: (47,), written in one go; `linear_by` to `per_value` are parts of them.
        one_and_score: (2, C) 1, and `score`, what a rule ranks by.
        floors: (C,) what floors add to it.
    """

    def __init__(self, n: int) -> None:
        self.rows = np.zeros((len(ROWS), n))
        self.row = dict(zip(ROWS, self.rows, strict=True))
        self.numbers = numbers = np.zeros(47)
        self.linear_by, self.crowd_by, self.turns_by = numbers[:4], numbers[4:6], numbers[6:9]
        self.ratios_by, self.credit_by = numbers[9:30].reshape(7, 3), numbers[30:40].reshape(2, 5)
        self.score_by, self.per_value = numbers[40:46], numbers[46, ...]
        self.one_and_score, self.floors = np.ones((2, n)), np.empty(n)
        self.score = self.one_and_score[1]
        self.row["one"][:] = self.row["one_again"][:] = 1.0

    def span(self, first: str, last: str) -> Array:
        """Rows that go through a call together."""
        return self.rows[AT[first] : AT[last] + 1]


@dataclass(frozen=True, eq=False)
class Scorer:
    """The network's weights in the order of `ROWS`, transposed, float32; see `policy.Network`.

    Attributes:
        first: (shown rows + 5 + T + 1, H + 2) for the rows, the one-hots of kind and tier, and bias and context, which
            the request fills in. Its last two columns hand `advice` and `barred` on, and so do those of `second`.
        context: (K, J, H, 1 + 11) for a class and task: bias, then numbers of the context.
        second: (H + 2, H + 3), its bias last.
        head: (2, H + 2) of the correction, and of the advice among legal candidates.
        trust: (a, b) of the correction, as `policy.Network`; (0, 1) where `head` holds all of it.
        shift: (log rows, 1) added before the logarithm.
        temperature_share: of the advice.
        far: (K, J) context columns of class and task that lie far outside training.
        near: lower and upper bounds within which the other columns do not.
    """

    first: Array
    context: Array
    second: Array
    head: Array
    trust: tuple[float, float]
    shift: Array
    temperature_share: float
    far: Array
    near: tuple[list[float], list[float]]


def scorer_of(policy: ResidualPolicy, layout: Layout) -> Scorer:
    """Rearranges a policy's weights."""
    spec, net = policy.spec, policy.folded
    row_of = {f.name: i for i, f in enumerate(spec.candidate)}
    hidden, shown = len(net.head), ROWS[SHOWN]
    constant = net.candidate[len(CANDIDATE_FEATURES) :]
    first = np.zeros((len(shown) + len(constant) + 1, hidden + 2), dtype=np.float32)
    shift = np.zeros((len(shown), 1), dtype=np.float32)
    for at, name in enumerate(shown):
        if name not in NOT_FEATURES:
            first[at, :hidden] = net.candidate[row_of[name]]
            shift[at] = SHIFTS[spec.candidate[row_of[name]].transform]
    first[len(shown) : -1, :hidden] = constant
    first[shown.index("advice"), hidden], first[shown.index("barred"), hidden + 1] = 1.0, -1.0
    second = np.eye(hidden + 2, hidden + 3, dtype=np.float32)
    second[:hidden, :hidden], second[:hidden, -1] = net.hidden.T, net.bias_2
    always, told = trust = float(net.trust[0]), float(net.trust[1])
    head = np.zeros((2, hidden + 2), dtype=np.float32)
    head[0, :hidden], head[1, hidden:] = net.head, (float(net.kappa[0]) * MIN_LOGIT / CLIP, -BARRED)
    if always == 0.0:
        head[0], trust = told * head[0], (0.0, 1.0)
    table = layout.class_and_task
    n = table.shape[-1]
    bias = table @ net.context[:n] + net.bias_1
    numbers = np.broadcast_to(net.context[n:].T, (*bias.shape, len(CONTEXT_FEATURES)))
    mean, limit = spec.context_mean, spec.drift_limit
    return Scorer(
        first=first,
        context=np.ascontiguousarray(np.concatenate([bias[..., None], numbers], axis=-1)),
        second=second,
        head=head,
        trust=trust,
        shift=shift[LOGS].copy(),
        temperature_share=spec.temperature_share,
        far=(np.abs(table - mean[:n]) >= limit[:n]).sum(axis=-1),
        near=((mean - limit)[n:].tolist(), (mean + limit)[n:].tolist()),
    )
