"""Margin rules: heuristics that put USD on every candidate.

*Bid price* is the one that a learned policy has to beat:

    margin = (1 - leave) * (revenue - refunds - credits) - leave * unserved credit - cost        expected margin
    score  = margin - price[station] * work_s * fill ** power                                    bid price

with P(good), TTFT and TPOT estimated from the View, `leave` the chance that the user's patience ends first or the call
fails (the recent share of errors there: that a failed call may be tried again elsewhere is not counted), and the price
of a station (USD per second of engine work, or of a provider's rate limit) tuned; it stands for the requests that
would be displaced (revenue management's bid price, Talluri & van Ryzin, The Theory and Practice of Revenue Management,
ch. 3).
A *floor* (a class must reach an SLO attainment or an answer quality, or may lose only so many requests) enters the
score as its multiplier: so many USD per call of the class that meets its SLOs, gets a good answer, or gets one at all.
At a hedge timer the candidates that would get a second call are worth what `marginroute.hedging` says.
All functions work on (..., C) arrays.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from marginroute import hedging, latency, pricing
from marginroute import view as v
from marginroute.assessment import Assessment
from marginroute.decision import Decision, best_legal, explain
from marginroute.quality import FittedQuality
from marginroute.view import PROVIDER, Array, Layout, View

CACHE_COLUMN, DEFER_COLUMN = -3, -2  # candidates end with cache, defer, shed
NEVER_USD = 1e3  # what a rule adds to the price of a candidate that it does not consider
MAX_FILL = 2.0  # fill of a replica or of a rate limit beyond which its congestion price no longer rises
_MAX_FILL, _ZERO, _ONE, _NEVER = (np.array(x) for x in (MAX_FILL, 0.0, 1.0, -np.inf))  # see `View.asked`


@dataclass(frozen=True)
class MarginParameters:
    """Parameters of a margin rule, all tunable.

    Each may also hold one value per world, (N, S) for the stations and (N, 1) for the others: tuning plays many
    candidates at once.

    Attributes:
        station_usd_per_s: price of a second of engine work, or of a provider's rate limit, one per station (pools, then
            providers); zeros make the rule myopic (*expected margin*).
        fill_power: how the price rises with in-flight requests per slot, or with the share of the limit that is spent.
        ttft_scale, tpot_scale: multiply the estimates before they meet an SLO (a hidden congestion price).
        sharpness: of the miss probability r**a / (1 + r**a) at r = estimate / limit.
        defer_share: hold a delay-tolerant request unless its best candidate earns this share of its idle margin.
        cap_share: in-flight cap of a replica as a multiple of its sequence slots.
        cache_similarity: below which a stored answer is not considered.
        slo_usd, good_usd, served_usd: multipliers of floors, USD per call that meets its SLOs, gets a good answer, gets
            an answer, one per class (K,); empty: no floors.
    """

    station_usd_per_s: tuple[float, ...]
    fill_power: float = 1.0
    ttft_scale: float = 1.0
    tpot_scale: float = 1.0
    sharpness: float = 4.0
    defer_share: float = 0.9
    cap_share: float = 2.0
    cache_similarity: float = 0.0
    slo_usd: tuple[float, ...] = ()
    good_usd: tuple[float, ...] = ()
    served_usd: tuple[float, ...] = ()

    @cached_property
    def multipliers(self) -> Array | None:
        """(3, K) or (3, N, K) USD per SLO met, good answer and answer; None without floors."""
        given = np.array([self.slo_usd, self.good_usd, self.served_usd], dtype=np.float64)
        return given if given.size else None

    @cached_property
    def has_threshold(self) -> bool:
        """Whether `cache_similarity` says anything."""
        return bool(np.any(np.asarray(self.cache_similarity) > 0.0))

    @cached_property
    def price(self) -> Array:
        """(..., S + 1) price per second of work by station; 0 for candidates without one."""
        prices = np.asarray(self.station_usd_per_s, dtype=np.float64)
        return np.concatenate([prices, np.zeros((*prices.shape[:-1], 1))], axis=-1)


def p_exceeds(estimate: Array, limit: Array, sharpness: Array | float) -> Array:
    """Probability that a latency ends above `limit` when `estimate` is expected; 0 where the limit is infinite."""
    ratio = np.power(estimate / limit, sharpness)
    return ratio / (ratio + _ONE)


def best_score(score_usd: Array, legal: Array) -> Array:
    """(..., 1), or () for one decision: the highest score of a legal candidate."""
    ranked = np.where(legal, score_usd, _NEVER)
    if ranked.ndim == 1:
        return ranked[ranked.argmax(), ...]
    best: Array = np.maximum.reduce(ranked, axis=-1, keepdims=True)
    return best


def assess(view: View, parameters: MarginParameters, quality: FittedQuality | None = None) -> Assessment:
    """Puts USD on every candidate of a view."""
    s, layout, asked = view.signals, view.layout, view.asked
    p_good = s[v.P_GOOD_PRIOR] if quality is None else quality.p_good(view)
    latency_s, work_s = latency.estimate(view)
    pair = hedging.pair_of(view, latency_s[0], parameters.sharpness)
    prompt_tokens, output_tokens = asked(v.PROMPT_TOKENS), asked(v.EXPECTED_OUTPUT_TOKENS)
    usage_usd = np.asarray(
        asked(v.REQUEST_USD)
        + pricing.tokens_usd(prompt_tokens, output_tokens, asked(v.INPUT_PRICE_USD), asked(v.OUTPUT_PRICE_USD))
    )
    value_usd = np.asarray(usage_usd + asked(v.REQUEST_VALUE_USD))
    unserved_usd = np.asarray(
        pricing.unserved_credit_usd(value_usd, asked(v.UNSERVED_CREDIT_SHARE), asked(v.UNSERVED_CREDIT_USD))
    )
    bad_now_usd = np.asarray(pricing.refund_usd(value_usd, asked(v.REFUND_SHARE), asked(v.BAD_ANSWER_USD)))

    missed = np.empty((4, *work_s.shape))  # TTFT, TPOT and E2E as their SLOs see them, TTFT as patience sees it
    np.add(latency_s[0] * parameters.ttft_scale, asked(v.WAITED_S), out=missed[0])
    np.multiply(latency_s[1], parameters.tpot_scale, out=missed[1])
    np.add(missed[0], missed[1] * output_tokens, out=missed[2])
    missed[3] = missed[0]
    missed = p_exceeds(missed, view.request[v.SLO_TTFT_S : v.PATIENCE_S + 1, ..., None], parameters.sharpness)
    errors = s[v.RECENT_ERRORS]
    if pair is not None:
        ttft, tpot, e2e, patience = missed
        missed = np.array([pair.both(ttft), pair.of_winner(tpot), pair.both(e2e), pair.both(patience)])
        errors, p_good = pair.both(errors), pair.of_winner(p_good)
    stay = (_ONE - missed[3]) * ((_ONE - errors) * layout.answers)
    bad_usd = stay * bad_now_usd
    fill = s[v.IN_FLIGHT] / s[v.SLOTS] + s[v.LIMIT_SPENT]

    parts_usd = np.empty((4, *work_s.shape))
    cost_usd, credit_usd, refund_usd, congestion_usd = parts_usd
    paid_usd = pricing.answer_usd(
        prompt_tokens, s[v.CACHED_TOKENS], output_tokens, s[v.INPUT_USD], s[v.CACHED_INPUT_USD], s[v.OUTPUT_USD]
    )
    np.add(paid_usd, s[v.CALL_USD], out=cost_usd)
    cost_usd += s[v.CACHED_TOKENS] * np.asarray(asked(v.INPUT_PRICE_USD) - asked(v.CACHED_INPUT_PRICE_USD))
    if pair is not None:
        prompt_usd = pricing.answer_usd(
            prompt_tokens, s[v.CACHED_TOKENS], 0.0, s[v.INPUT_USD], s[v.CACHED_INPUT_USD], s[v.OUTPUT_USD]
        )
        cost_usd[...] = pair.of_winner(cost_usd) + pair.of_loser(prompt_usd)
    credited_share = missed[0] * asked(v.TTFT_CREDIT_SHARE) + missed[1] * asked(v.TPOT_CREDIT_SHARE)
    credited_share += missed[2] * asked(v.E2E_CREDIT_SHARE)
    np.multiply(stay, pricing.service_credit_usd(value_usd, credited_share), out=credit_usd)
    if view.request[v.MISS_USD].any():
        met = (_ONE - missed[0]) * (_ONE - missed[1]) * (_ONE - missed[2])
        credit_usd += stay * (_ONE - met) * asked(v.MISS_USD)
    bad_share = _ONE - p_good
    np.multiply(bad_share, bad_usd, out=refund_usd)
    rise = np.power(np.minimum(fill, _MAX_FILL), parameters.fill_power)
    np.multiply(parameters.price.take(layout.station, axis=-1) * work_s, rise, out=congestion_usd)

    if pair is not None:
        congestion_usd[...] = pair.taken(congestion_usd)

    margin_usd = stay * np.asarray(usage_usd + unserved_usd)
    margin_usd -= unserved_usd
    margin_usd -= cost_usd + credit_usd + refund_usd
    may_defer = view.legal[..., DEFER_COLUMN]
    if may_defer.any():
        idle_usd = usage_usd - bad_share * bad_now_usd - cost_usd
        able = view.legal & (layout.kind <= PROVIDER)
        later_usd = np.where(able, idle_usd, -unserved_usd).max(axis=-1, keepdims=True)
        later_usd = (parameters.defer_share * later_usd)[..., 0]
        margin_usd[..., DEFER_COLUMN] = np.where(may_defer, later_usd, margin_usd[..., DEFER_COLUMN])
    score_usd = margin_usd - congestion_usd
    if parameters.has_threshold:
        too_far = s[v.SIMILARITY, ..., CACHE_COLUMN] < np.asarray(parameters.cache_similarity).reshape(-1)
        score_usd[..., CACHE_COLUMN] -= NEVER_USD * too_far.reshape(score_usd.shape[:-1])
    kept = floor_usd = None
    if parameters.multipliers is not None:
        kept = kept_floors(view, stay, missed, p_good, parameters.defer_share)
        floor_usd = usd_of(parameters.multipliers, asked(v.CLASS_INDEX), kept)
        score_usd += floor_usd
        bad_usd += stay * by_class(parameters.multipliers[1], asked(v.CLASS_INDEX))
    best_usd = best_score(score_usd, view.legal)
    return Assessment(
        p_good, latency_s, stay, fill, value_usd, usage_usd, unserved_usd, bad_usd, parts_usd, margin_usd, score_usd,
        best_usd, kept, floor_usd,
    )  # fmt: skip


def by_class(usd: Array, class_index: Array) -> Array:
    """(..., 1) or (): the entry of each decision's class in (K,), or in (N, K) with one row per world."""
    k = class_index.astype(np.int64)
    found: Array = usd[k] if usd.ndim == 1 else np.take_along_axis(usd, k, axis=-1)
    return found


def usd_of(multipliers: Array, class_index: Array, kept: Array) -> Array:
    """(..., C) USD that multipliers (3, K) or (3, N, K) put on the chances `kept` (3, ..., C)."""
    total = by_class(multipliers[0], class_index) * kept[0]
    total += by_class(multipliers[1], class_index) * kept[1]
    total += by_class(multipliers[2], class_index) * kept[2]
    return total


def kept_floors(view: View, stay: Array, missed: Array, p_good: Array, defer_share: Array | float) -> Array:
    """(3, ..., C) chances that the call meets all its SLOs, gets a good answer, gets any answer.

    A deferred call is taken to meet its SLOs later and to get the best answer there is now, all times `defer_share`,
    which is how far the rule trusts a later answer.
    """
    kept = np.empty((3, *stay.shape))
    kept[0] = stay * (_ONE - missed[0]) * (_ONE - missed[1]) * (_ONE - missed[2])
    kept[1] = stay * p_good
    kept[2] = stay
    may_defer = view.legal[..., DEFER_COLUMN]
    if may_defer.any():
        able = view.legal & (view.layout.kind <= PROVIDER)
        later = np.ones((3, *may_defer.shape))
        later[1] = np.where(able, p_good, _ZERO).max(axis=-1)
        later *= np.asarray(defer_share)[..., 0] if np.ndim(defer_share) else defer_share
        kept[..., DEFER_COLUMN] = np.where(may_defer, later, kept[..., DEFER_COLUMN])
    return kept


@dataclass(frozen=True)
class MarginRule:
    """*expected-margin*, *bid-price* and *bid-price-fitted*: rank candidates by expected USD."""

    name: str
    parameters: MarginParameters
    quality: FittedQuality | None = None

    def at_price(self, share: float) -> MarginRule:
        """The rule with so much of its price of congestion."""
        usd_per_s = tuple(share * usd for usd in self.parameters.station_usd_per_s)
        return replace(self, parameters=replace(self.parameters, station_usd_per_s=usd_per_s))

    def assess(self, view: View) -> Assessment:
        """USD by part for every candidate."""
        return assess(view, self.parameters, self.quality)

    def decide_batch(self, view: View) -> Array:
        """Candidate with the highest score in each view."""
        return best_legal(self.assess(view).score_usd, view.legal)

    def decide(self, view: View) -> Decision:
        """The best candidate, with its reason in USD."""
        assessment = self.assess(view)
        return explain(self.name, view, assessment.score_usd, assessment.parts)

    def in_flight_caps(self, layout: Layout, slots: Array) -> Array | None:
        """Caps per station: a tuned multiple of the sequence slots."""
        return np.maximum(np.round(self.parameters.cap_share * slots), 1.0)
