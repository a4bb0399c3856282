"""The named heuristics: what gateways ship, and the bid price that a learned policy has to beat.

Two families. *Rules of thumb* rank candidates without money: they serve an exact cache hit when there is one, never
defer, and shed only when nothing else is legal. *Margin rules* put USD on every candidate:

    margin = (1 - leave) * (revenue - refunds - credits) - leave * unserved credit - cost        expected margin
    score  = margin - price[station] * work_s * fill ** power                                    bid price

with P(good), TTFT and TPOT estimated from the View, `leave` the chance that the user's patience ends first, and the
price of a station (USD per second of engine work) tuned; it stands for the requests that would be displaced
(revenue management's bid price, Talluri & van Ryzin, The Theory and Practice of Revenue Management, ch. 3).
All functions work on (..., C) arrays.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from marginroute import latency, pricing
from marginroute import view as v
from marginroute.decision import Decision, best_legal, explain
from marginroute.errors import InputError
from marginroute.quality import FittedQuality
from marginroute.view import DEFER, PROVIDER, SHED, Array, Layout, View

LAST_RESORT = 1e6  # score distance that separates what a rule of thumb wants from what it takes only if it must
MAX_FILL = 2.0  # fill of a replica beyond which its congestion price no longer rises


@dataclass(frozen=True)
class Assessment:
    """Expected USD of each candidate for a request, part by part; every array is (..., C).

    Attributes:
        p_good: probability of a good answer.
        ttft_s, tpot_s: estimated latency, in seconds (TTFT counts from now).
        value_usd: (..., 1) value of the request when answered, the base of refunds and credits.
        revenue_usd, refund_usd, credit_usd, unserved_usd, cost_usd: expected parts of the margin.
        bad_usd: what a bad answer loses, weighted with the chance that the user stays for it.
        congestion_usd: price of the capacity taken; not a cash flow.
        idle_usd: margin if no queue, no missed SLO and no impatience stood in the way.
        margin_usd: sum of the cash parts.
        score_usd: margin minus congestion; what the rule ranks by.
    """

    p_good: Array
    ttft_s: Array
    tpot_s: Array
    value_usd: Array
    revenue_usd: Array
    refund_usd: Array
    credit_usd: Array
    unserved_usd: Array
    cost_usd: Array
    bad_usd: Array
    congestion_usd: Array
    idle_usd: Array
    margin_usd: Array
    score_usd: Array

    def parts(self) -> dict[str, Array]:
        """The reason of a decision, in USD by part; the cash parts add up to the margin."""
        return {
            "revenue": self.revenue_usd,
            "refunds": -self.refund_usd,
            "service_credits": -self.credit_usd,
            "unserved_credits": -self.unserved_usd,
            "cost": -self.cost_usd,
            "margin": self.margin_usd,
            "congestion": -self.congestion_usd,
        }


@dataclass(frozen=True)
class MarginParameters:
    """Parameters of a margin rule, all tunable.

    Each may also hold one value per world, (N, S) for the stations and (N, 1) for the others: tuning plays many
    candidates at once.

    Attributes:
        station_usd_per_s: price of a second of engine work, one per station (pools, then providers); zeros make the
            rule myopic (*expected margin*).
        fill_power: how the price rises with in-flight requests per slot.
        ttft_scale, tpot_scale: multiply the estimates before they meet an SLO (a hidden congestion price).
        sharpness: of the miss probability r**a / (1 + r**a) at r = estimate / limit.
        defer_share: hold a delay-tolerant request unless its best candidate earns this share of its idle margin.
        cap_share: in-flight cap of a replica as a multiple of its sequence slots.
    """

    station_usd_per_s: tuple[float, ...]
    fill_power: float = 1.0
    ttft_scale: float = 1.0
    tpot_scale: float = 1.0
    sharpness: float = 4.0
    defer_share: float = 0.9
    cap_share: float = 2.0


def p_exceeds(estimate: Array, limit: Array, sharpness: float) -> Array:
    """Probability that a latency ends above `limit` when `estimate` is expected; 0 where the limit is infinite."""
    ratio = np.power(estimate / limit, sharpness)
    return ratio / (1.0 + ratio)


def assess(view: View, parameters: MarginParameters, quality: FittedQuality | None = None) -> Assessment:
    """Puts USD on every candidate of a view."""
    s, q = view.signals, view.request[..., None]
    a = parameters.sharpness
    p_good = s[v.P_GOOD_PRIOR] if quality is None else quality.p_good(view)
    ttft_s, tpot_s, work_s = latency.estimate(view)
    output_tokens = q[v.EXPECTED_OUTPUT_TOKENS]
    usage_usd = pricing.tokens_usd(q[v.PROMPT_TOKENS], output_tokens, q[v.INPUT_PRICE_USD], q[v.OUTPUT_PRICE_USD])
    value_usd = usage_usd + q[v.REQUEST_VALUE_USD]
    bad_usd = pricing.refund_usd(value_usd, q[v.REFUND_SHARE], q[v.BAD_ANSWER_USD])
    cost_usd = pricing.tokens_usd(q[v.PROMPT_TOKENS], output_tokens, s[v.INPUT_USD], s[v.OUTPUT_USD]) + s[v.CALL_USD]
    ttft_seen_s = q[v.WAITED_S] + ttft_s * parameters.ttft_scale
    tpot_seen_s = tpot_s * parameters.tpot_scale
    credit_usd = pricing.service_credit_usd(
        value_usd,
        p_exceeds(ttft_seen_s, q[v.SLO_TTFT_S], a),
        p_exceeds(tpot_seen_s, q[v.SLO_TPOT_S], a),
        p_exceeds(ttft_seen_s + tpot_seen_s * output_tokens, q[v.SLO_E2E_S], a),
        q[v.TTFT_CREDIT_SHARE],
        q[v.TPOT_CREDIT_SHARE],
        q[v.E2E_CREDIT_SHARE],
    )
    unserved_usd = pricing.unserved_credit_usd(value_usd, q[v.UNSERVED_CREDIT_SHARE], q[v.UNSERVED_CREDIT_USD])
    stay = 1.0 - p_exceeds(ttft_seen_s, q[v.PATIENCE_S], a)
    station_usd_per_s = np.asarray(parameters.station_usd_per_s)
    no_station = np.zeros((*station_usd_per_s.shape[:-1], 1))
    price = np.concatenate([station_usd_per_s, no_station], axis=-1)[..., view.layout.station]
    fill = np.minimum(s[v.IN_FLIGHT] / s[v.SLOTS], MAX_FILL)
    congestion_usd = price * work_s * np.power(fill, parameters.fill_power)
    idle_usd = usage_usd - (1.0 - p_good) * bad_usd - cost_usd

    kind = view.layout.kind
    answers = (kind != DEFER) & (kind != SHED)
    serve_idle = np.where(view.legal & (kind <= PROVIDER), idle_usd, -np.inf).max(axis=-1, keepdims=True)
    deferred = parameters.defer_share * np.maximum(serve_idle, -unserved_usd)
    revenue_usd = np.where(answers, stay * usage_usd, 0.0)
    bad_usd = np.where(answers, stay * bad_usd, 0.0)
    refund_usd = (1.0 - p_good) * bad_usd
    credit_usd = np.where(answers, stay * credit_usd, 0.0)
    lost_usd = np.where(answers, (1.0 - stay) * unserved_usd, np.where(kind == SHED, unserved_usd, 0.0))
    margin_usd = revenue_usd - refund_usd - credit_usd - lost_usd - cost_usd
    margin_usd = np.where(kind == DEFER, deferred, margin_usd)
    return Assessment(
        p_good=p_good,
        ttft_s=ttft_s,
        tpot_s=tpot_s,
        value_usd=value_usd,
        revenue_usd=revenue_usd,
        refund_usd=refund_usd,
        credit_usd=credit_usd,
        unserved_usd=lost_usd,
        cost_usd=cost_usd,
        bad_usd=bad_usd,
        congestion_usd=congestion_usd,
        idle_usd=idle_usd,
        margin_usd=margin_usd,
        score_usd=margin_usd - congestion_usd,
    )


@dataclass(frozen=True)
class MarginRule:
    """*expected-margin*, *bid-price* and *bid-price-fitted*: rank candidates by expected USD."""

    name: str
    parameters: MarginParameters
    quality: FittedQuality | None = None

    def assess(self, view: View) -> Assessment:
        """USD by part for every candidate."""
        return assess(view, self.parameters, self.quality)

    def decide_batch(self, view: View) -> Array:
        """Candidate with the highest score in each view."""
        return best_legal(self.assess(view).score_usd, view.legal)

    def decide(self, view: View) -> Decision:
        """The best candidate, with its reason in USD."""
        assessment = self.assess(view)
        return explain(self.name, view, assessment.score_usd, assessment.parts())

    def in_flight_caps(self, layout: Layout, slots: Array) -> Array | None:
        """Caps per station: a tuned multiple of the sequence slots."""
        return np.maximum(np.round(self.parameters.cap_share * slots), 1.0)


_FALLBACK_ORDER = LAST_RESORT * np.array([0.0, 0.0, 2.0, -2.0, -3.0])
"""What a rule of thumb thinks of each kind: a cached answer above all replicas and providers, defer and shed below."""


@dataclass(frozen=True)
class RuleOfThumb:
    """Base of the rules without money: subclasses rank replicas and providers by `preference`."""

    name: str

    def preference(self, view: View) -> Array:
        """Higher is better, (..., C); read for replicas and providers only, within +-LAST_RESORT."""
        raise NotImplementedError

    def scores(self, view: View) -> Array:
        """A cached answer first, then by preference, then defer, then shed."""
        kind = view.layout.kind
        return np.where(kind <= PROVIDER, self.preference(view), _FALLBACK_ORDER[kind])

    def decide_batch(self, view: View) -> Array:
        """The candidate it ranks first in each view."""
        return best_legal(self.scores(view), view.legal)

    def decide(self, view: View) -> Decision:
        """The candidate it ranks first; rules of thumb give no reason in USD."""
        return explain(self.name, view, self.scores(view), {}, scale_usd=0.0)

    def in_flight_caps(self, layout: Layout, slots: Array) -> Array | None:
        """Leaves the configured caps."""
        return None


def tier_preference(view: View, wanted_rank: Array, rank_of_tier: Array) -> Array:
    """Least in-flight inside the wanted tier; the nearest tier by rank if it has no legal candidate.

    Args:
        view: the view.
        wanted_rank: (..., 1) or scalar rank.
        rank_of_tier: (T,) rank of each tier.
    """
    rank = rank_of_tier[view.layout.tier]
    return -np.abs(rank - wanted_rank) * (LAST_RESORT / 100.0) - view.signals[v.IN_FLIGHT]


@dataclass(frozen=True)
class FixedTier(RuleOfThumb):
    """*fixed-<tier>*: one tier always, least in-flight inside it."""

    tier: int

    def preference(self, view: View) -> Array:
        """The tier first, then fewest in flight."""
        wanted = view.layout.tier == self.tier
        return np.where(wanted, 0.0, -LAST_RESORT / 2.0) - view.signals[v.IN_FLIGHT]


def uniform(view: View, seed: int) -> Array:
    """A reproducible uniform in [0, 1) per candidate and decision, (..., C): a hash of seed, request and candidate."""
    with np.errstate(over="ignore"):
        sequence = view.request[v.SEQUENCE][..., None].astype(np.uint64)
        content = np.ascontiguousarray(view.request[v.DIFFICULTY_SIGNAL])[..., None].view(np.uint64)
        x = sequence * np.uint64(0x9E3779B97F4A7C15) + np.uint64(seed) * np.uint64(0xD1B54A32D192ED03) + content
        x = x + np.arange(1, view.layout.n_candidates + 1, dtype=np.uint64) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x = x ^ (x >> np.uint64(31))
    return (x >> np.uint64(11)).astype(np.float64) / float(1 << 53)


def _spill(view: View, use_providers: bool) -> Array:
    """Penalty that keeps a rule off third-party providers unless nothing else is legal."""
    return np.where((view.layout.kind == PROVIDER) & (not use_providers), -LAST_RESORT / 2.0, 0.0)


@dataclass(frozen=True)
class Random(RuleOfThumb):
    """*random*: uniform over replicas (and providers)."""

    use_providers: bool = False
    seed: int = 0

    def preference(self, view: View) -> Array:
        """A fresh uniform number for each candidate."""
        return uniform(view, self.seed) + _spill(view, self.use_providers)


@dataclass(frozen=True)
class RoundRobin(RuleOfThumb):
    """*round-robin*: replicas (and providers) in turn; an illegal one passes its turn to the next."""

    use_providers: bool = False

    def preference(self, view: View) -> Array:
        """How soon the candidate's turn comes."""
        n = view.layout.n_replicas + (int((view.layout.kind == PROVIDER).sum()) if self.use_providers else 0)
        turn = view.request[v.SEQUENCE][..., None] % n
        return -((np.arange(view.layout.n_candidates) - turn) % n) + _spill(view, self.use_providers)


@dataclass(frozen=True)
class LeastInFlight(RuleOfThumb):
    """*least-in-flight*: the candidate with the fewest requests in flight."""

    use_providers: bool = False

    def preference(self, view: View) -> Array:
        """Fewest in flight."""
        return -view.signals[v.IN_FLIGHT] + _spill(view, self.use_providers)


@dataclass(frozen=True)
class DifficultyThreshold(RuleOfThumb):
    """*difficulty-threshold*: stronger tiers for harder requests, then least in-flight (RouteLLM's threshold).

    Attributes:
        rank_of_tier: (T,) 0 for the weakest tier.
        cutoffs: (T - 1,) ascending difficulty above which the next stronger tier is wanted.
        load_shift: how far the cut-offs move up per unit of mean fill (0: RouteLLM's rule).
    """

    rank_of_tier: tuple[int, ...] = ()
    cutoffs: tuple[float, ...] = ()
    load_shift: float = 0.0

    def preference(self, view: View) -> Array:
        """Nearest to the wanted tier, then fewest in flight."""
        replicas = view.layout.n_replicas
        fill = (view.signals[v.IN_FLIGHT][..., :replicas] / view.signals[v.SLOTS][..., :replicas]).mean(axis=-1)
        difficulty = view.request[v.DIFFICULTY_SIGNAL] - self.load_shift * fill
        wanted = (difficulty[..., None] > np.asarray(self.cutoffs)).sum(axis=-1)
        return tier_preference(view, wanted[..., None], np.asarray(self.rank_of_tier))


@dataclass(frozen=True)
class ShuffledMix(RuleOfThumb):
    """*shuffled-mix*: the content-blind control: the same tier shares as a policy under test, at random.

    Attributes:
        tier_shares: (T,) shares of answered requests by tier.
        seed: of the assignment.
    """

    tier_shares: tuple[float, ...] = ()
    seed: int = 0

    def preference(self, view: View) -> Array:
        """Least in-flight inside a tier drawn by its share."""
        draw = uniform(view, self.seed)[..., :1]
        edges = np.cumsum(self.tier_shares) / max(sum(self.tier_shares), 1e-12)
        tier = np.minimum((draw >= edges).sum(axis=-1), len(self.tier_shares) - 1)
        wanted = view.layout.tier == tier[..., None]
        return np.where(wanted, 0.0, -LAST_RESORT / 2.0) - view.signals[v.IN_FLIGHT]


RULES: dict[str, type[MarginRule] | type[RuleOfThumb]] = {
    "margin": MarginRule,
    "fixed-tier": FixedTier,
    "random": Random,
    "round-robin": RoundRobin,
    "least-in-flight": LeastInFlight,
    "difficulty-threshold": DifficultyThreshold,
    "shuffled-mix": ShuffledMix,
}
"""The rule behind each policy name, as files name it."""


def to_dict(policy: MarginRule | RuleOfThumb) -> dict[str, Any]:
    """A heuristic with its parameters as plain data, for YAML and bundles."""
    rule = next(name for name, cls in RULES.items() if type(policy) is cls)
    data: dict[str, Any] = {"rule": rule}
    for f in fields(policy):
        value = getattr(policy, f.name)
        if isinstance(value, MarginParameters):
            value = {p.name: getattr(value, p.name) for p in fields(value)}
            value = {key: list(x) if isinstance(x, tuple) else x for key, x in value.items()}
        elif isinstance(value, FittedQuality):
            value = value.to_dict()
        elif isinstance(value, tuple):
            value = list(value)
        data[f.name] = value
    return data


def from_dict(data: dict[str, Any]) -> MarginRule | RuleOfThumb:
    """The inverse of `to_dict`.

    Raises:
        InputError: an unknown rule, or a parameter that the rule does not have.
    """
    arguments = {key: tuple(x) if isinstance(x, list) else x for key, x in data.items() if key != "rule"}
    rule = RULES.get(data.get("rule", ""))
    if rule is None:
        raise InputError(f"unknown heuristic rule {data.get('rule')!r}; legal: {', '.join(RULES)}")
    try:
        if rule is MarginRule:
            parameters = {k: tuple(x) if isinstance(x, list) else x for k, x in data["parameters"].items()}
            arguments["parameters"] = MarginParameters(**parameters)
            if data.get("quality") is not None:
                arguments["quality"] = FittedQuality.from_dict(data["quality"])
        return rule(**arguments)
    except (TypeError, KeyError, AttributeError) as error:
        raise InputError(f"heuristic {data.get('name')!r} has a missing or unknown parameter: {error}") from None
