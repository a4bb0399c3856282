"""The rules that gateways ship, and their best combination: a rule for the model, then one for the replica.

| name | source (November 2026) |
| --- | --- |
| power-of-two | vllm-project/router `src/policies/power_of_two.rs`; Mitzenmacher (2001) |
| cache-aware | sglang `sgl-model-gateway/src/policies/cache_aware.rs` |
| prefix-aware | vllm-project/production-stack `src/vllm_router/routers/routing_logic.py` |
| session-affinity | vllm-project/router session map; production-stack `routing_logic.py`, session router |
| llm-d | llm-d/llm-d-router `config/charts/routerlib/templates/_config.yaml` |
| dynamo-kv | ai-dynamo/dynamo `lib/kv-router/src/scheduling/selector/default.rs` |
| litellm-shuffle, litellm-latency, litellm-cost | litellm `litellm/router_strategy/` |
| multi-factor | vllm-project/semantic-router `src/semantic-router/pkg/selection/multi_factor.go` |
| cheapest-able | the cheapest model whose predicted quality passes a threshold |

A rule ranks *among* some candidates: alone, all legal replicas (and providers); in a composite, those of the model that
the other rule chose. Prefix matches are what the gateway expects to be cached (`CACHED_TOKENS`). Ties are broken at
random where the source does so.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import numpy as np

from marginroute import view as v
from marginroute.rules import LAST_RESORT, DifficultyThreshold, RuleOfThumb, _spill, uniform
from marginroute.view import PROVIDER, Array, View

BLOCK_TOKENS = 16.0  # KV block of Dynamo's cost
TIE = 1e-9  # weight of the random number that breaks ties


def within(values: Array, among: Array, *, highest: bool) -> Array:
    """(..., 1) largest or smallest value among the marked candidates; 0 where none is."""
    edge = np.where(among, values, -np.inf if highest else np.inf)
    best = edge.max(axis=-1, keepdims=True) if highest else edge.min(axis=-1, keepdims=True)
    return np.where(among.any(axis=-1, keepdims=True), best, 0.0)


def cheapness(values: Array, among: Array) -> Array:
    """1 for the lowest of the marked candidates, 0 for the highest, 1 if all are equal."""
    high, low = within(values, among, highest=True), within(values, among, highest=False)
    span = high - low
    return np.where(span > 0.0, (high - values) / np.where(span > 0.0, span, 1.0), 1.0)


@dataclass(frozen=True)
class ShippedRule(RuleOfThumb):
    """Base: subclasses rank candidates among some of them.

    Attributes:
        use_providers: whether third-party providers take part; otherwise they are a last resort.
        seed: of random ties.
    """

    use_providers: bool = False
    seed: int = 0

    @abstractmethod
    def rank(self, view: View, among: Array) -> Array:
        """Higher is better, (..., C), read where `among` (..., C); within +-LAST_RESORT / 4."""

    def preference(self, view: View) -> Array:
        """The rank among all that are legal."""
        able = view.legal & (view.layout.kind <= PROVIDER)
        own = able & (view.layout.kind != PROVIDER)
        among = able if self.use_providers else np.where(own.any(axis=-1, keepdims=True), own, able)
        return self.rank(view, among) + _spill(view, self.use_providers)

    def ties(self, view: View) -> Array:
        """A small random number per candidate."""
        return TIE * uniform(view, self.seed)


@dataclass(frozen=True)
class LeastLoaded(ShippedRule):
    """*least-request*: fewest requests in flight (Envoy's LEAST_REQUEST over all hosts, LiteLLM's least-busy)."""

    def rank(self, view: View, among: Array) -> Array:
        """Minus the requests in flight."""
        return -view.signals[v.IN_FLIGHT] + self.ties(view)


@dataclass(frozen=True)
class PowerOfTwo(ShippedRule):
    """*power-of-two*: of two distinct candidates drawn at random, the one with fewer requests in flight."""

    def rank(self, view: View, among: Array) -> Array:
        """The drawn ones by load, the others far below."""
        draw = np.where(among, uniform(view, self.seed), -1.0)
        second = np.sort(draw, axis=-1)[..., -2:-1] if draw.shape[-1] > 1 else draw
        drawn = among & (draw >= second)
        return np.where(drawn, 0.0, -LAST_RESORT / 8.0) - view.signals[v.IN_FLIGHT]


@dataclass(frozen=True)
class CacheAware(ShippedRule):
    """*cache-aware*: where load is balanced, the replica that holds enough of the prompt; otherwise the least loaded.

    Attributes:
        balance_abs, balance_rel: load is unbalanced if max - min > abs and max > rel * min.
        cache_threshold: share of the prompt that must match.
    """

    balance_abs: float = 64.0
    balance_rel: float = 1.5
    cache_threshold: float = 0.3

    def rank(self, view: View, among: Array) -> Array:
        """The best match above all, if it counts; then fewest in flight."""
        load = view.signals[v.IN_FLIGHT]
        high, low = within(load, among, highest=True), within(load, among, highest=False)
        unbalanced = (high - low > self.balance_abs) & (high > self.balance_rel * low)
        match = view.signals[v.CACHED_TOKENS] / view.request[v.PROMPT_TOKENS][..., None]
        best = within(match, among, highest=True)
        matched = (match == best) & (best > self.cache_threshold) & ~unbalanced
        return np.where(matched, LAST_RESORT / 8.0, 0.0) - load


@dataclass(frozen=True)
class PrefixAware(ShippedRule):
    """*prefix-aware*: the replica with the longest match, whatever its load; ties at random."""

    def rank(self, view: View, among: Array) -> Array:
        """Share of the prompt that matches."""
        return view.signals[v.CACHED_TOKENS] / view.request[v.PROMPT_TOKENS][..., None] + self.ties(view)


@dataclass(frozen=True)
class SessionAffinity(ShippedRule):
    """*session-affinity*: where the session's last call went, for `ttl_s`; fewest in flight otherwise.

    A map from session to worker, as in vLLM's router; production-stack's hash ring sends a session to the same worker,
    too, and requests without one to the least busy. Where the map's worker is not legal, the call goes as a new one.
    """

    ttl_s: float = 3600.0

    def rank(self, view: View, among: Array) -> Array:
        """The session's own above all, then minus the requests in flight."""
        own = view.signals[v.SESSION_IDLE_S] <= self.ttl_s
        return np.where(own, LAST_RESORT / 8.0, 0.0) - view.signals[v.IN_FLIGHT] + self.ties(view)


@dataclass(frozen=True)
class LlmD(ShippedRule):
    """*llm-d*: sum of weights times scores in [0, 1] of queue, KV use and prefix.

    queue = (max - q) / (max - min) over the candidates, 1 if all are equal; kv = 1 - use; prefix = matched share.
    """

    queue_weight: float = 2.0
    kv_weight: float = 2.0
    prefix_weight: float = 3.0

    def rank(self, view: View, among: Array) -> Array:
        """The weighted sum."""
        s = view.signals
        match = s[v.CACHED_TOKENS] / view.request[v.PROMPT_TOKENS][..., None]
        return (
            self.queue_weight * np.clip(cheapness(s[v.WAITING], among), 0.0, 1.0)
            + self.kv_weight * np.clip(1.0 - s[v.KV_USAGE], 0.0, 1.0)
            + self.prefix_weight * np.clip(match, 0.0, 1.0)
            + self.ties(view)
        )


@dataclass(frozen=True)
class DynamoKv(ShippedRule):
    """*dynamo-kv*: least max(0, prefill blocks - cached) + decode blocks + w * active, ties at random.

    Prefill blocks are those of the prompts in flight without a first token and of this one; decode blocks those of the
    requests that are streaming.
    """

    active_weight: float = 0.0

    def rank(self, view: View, among: Array) -> Array:
        """Minus the cost in blocks of 16 tokens."""
        s = view.signals
        new_tokens = view.request[v.PROMPT_TOKENS][..., None] - s[v.CACHED_TOKENS]
        prefill_blocks = np.maximum(s[v.PENDING_PREFILL_TOKENS] + new_tokens, 0.0) / BLOCK_TOKENS
        decode_blocks = s[v.DECODING_TOKENS] / BLOCK_TOKENS
        return self.ties(view) - prefill_blocks - decode_blocks - self.active_weight * s[v.IN_FLIGHT]


@dataclass(frozen=True)
class LiteLlmShuffle(ShippedRule):
    """*litellm-shuffle*: at random, by weight (simple-shuffle).

    Attributes:
        api_weight: weight of a provider beside 1 for a replica.
    """

    use_providers: bool = True
    api_weight: float = 1.0

    def rank(self, view: View, among: Array) -> Array:
        """An exponential race: the winner is drawn with probability in proportion to its weight."""
        weight = np.where(view.layout.kind == PROVIDER, self.api_weight, 1.0)
        return np.log(np.maximum(uniform(view, self.seed), 1e-300)) / np.maximum(weight, 1e-9)


@dataclass(frozen=True)
class LiteLlmLatency(ShippedRule):
    """*litellm-latency*: lowest mean TTFT of the last ten answers; within `buffer` of the lowest, at random.

    LiteLLM takes TTFT for streams and seconds per token otherwise; every call here streams.
    """

    use_providers: bool = True
    buffer: float = 0.0

    def rank(self, view: View, among: Array) -> Array:
        """The fast enough ones in random order, then by latency."""
        latency_s = view.signals[v.RECENT_TTFT_S]
        fast = latency_s <= (1.0 + self.buffer) * within(latency_s, among, highest=False)
        return np.where(fast, LAST_RESORT / 8.0 + uniform(view, self.seed), -latency_s)


@dataclass(frozen=True)
class LiteLlmCost(ShippedRule):
    """*litellm-cost*: lowest input plus output price; the least loaded of equals."""

    use_providers: bool = True

    def rank(self, view: View, among: Array) -> Array:
        """Minus USD per million tokens in and out."""
        price_usd = (view.signals[v.INPUT_USD] + view.signals[v.OUTPUT_USD]) * 1e6
        return -price_usd - 1e-6 * np.minimum(view.signals[v.IN_FLIGHT], 1e3)


@dataclass(frozen=True)
class MultiFactor(ShippedRule):
    """*multi-factor*: ceilings on latency, then equal weights of quality, latency, cost and load; else the cheapest.

    A candidate whose p95 TTFT, taken as `p95_over_mean` times the recent mean, is above the SLO is out. Latency,
    cost and load are scaled to [0, 1] over the candidates, 1 for the lowest.
    """

    use_providers: bool = True
    quality_weight: float = 0.25
    latency_weight: float = 0.25
    cost_weight: float = 0.25
    load_weight: float = 0.25
    p95_over_mean: float = 3.0

    def rank(self, view: View, among: Array) -> Array:
        """The weighted sum of those below the ceiling; the cheapest where there is none."""
        s, slo_s = view.signals, view.request[v.SLO_TTFT_S][..., None]
        price_usd = s[v.INPUT_USD] + s[v.OUTPUT_USD]
        fast = among & (self.p95_over_mean * s[v.RECENT_TTFT_S] <= slo_s)
        score = (
            self.quality_weight * s[v.P_GOOD_PRIOR]
            + self.latency_weight * cheapness(s[v.RECENT_TTFT_S], fast)
            + self.cost_weight * cheapness(price_usd, fast)
            + self.load_weight * cheapness(s[v.IN_FLIGHT] / s[v.SLOTS], fast)
        )
        return np.where(fast, LAST_RESORT / 8.0 + score, cheapness(price_usd, among)) + self.ties(view)


@dataclass(frozen=True)
class CheapestAble(ShippedRule):
    """*cheapest-able*: the cheapest whose predicted quality passes a threshold, else the best; then by load."""

    use_providers: bool = True
    threshold: float = 0.7

    def rank(self, view: View, among: Array) -> Array:
        """Minus the price of those that pass; the quality of the others far below."""
        s = view.signals
        price_usd = (s[v.INPUT_USD] + s[v.OUTPUT_USD]) * 1e6
        able = s[v.P_GOOD_PRIOR] >= self.threshold
        return np.where(able, -price_usd, s[v.P_GOOD_PRIOR] - LAST_RESORT / 8.0) - 1e-6 * s[v.IN_FLIGHT]


@dataclass(frozen=True)
class Composite(RuleOfThumb):
    """*shipped*: one rule chooses the pool or provider, another the replica in it.

    Attributes:
        tier_rule: its best candidate names the pool.
        replica_rule: ranks the candidates of that pool.
    """

    tier_rule: ShippedRule | DifficultyThreshold
    replica_rule: ShippedRule

    def preference(self, view: View) -> Array:
        """The candidates of the chosen pool by the replica rule, then the others by the tier rule."""
        able = view.legal & (view.layout.kind <= PROVIDER)
        wanted = self.tier_rule.scores(view)
        station = view.layout.station[np.where(able, wanted, -np.inf).argmax(axis=-1)]
        among = able & (view.layout.station == station[..., None])
        rank = np.clip(self.replica_rule.rank(view, among), -LAST_RESORT / 4.0, LAST_RESORT / 4.0)
        return np.where(among, rank, np.clip(wanted, -LAST_RESORT, LAST_RESORT) - LAST_RESORT)


SHIPPED_RULES: dict[str, type[ShippedRule]] = {
    "least-request": LeastLoaded,
    "power-of-two": PowerOfTwo,
    "cache-aware": CacheAware,
    "prefix-aware": PrefixAware,
    "session-affinity": SessionAffinity,
    "llm-d": LlmD,
    "dynamo-kv": DynamoKv,
    "litellm-shuffle": LiteLlmShuffle,
    "litellm-latency": LiteLlmLatency,
    "litellm-cost": LiteLlmCost,
    "multi-factor": MultiFactor,
    "cheapest-able": CheapestAble,
}
"""By name; the first seven choose replicas, the others models."""
REPLICA_RULES = (
    *("least-request", "power-of-two", "cache-aware", "prefix-aware"),
    *("session-affinity", "llm-d", "dynamo-kv"),
)
TIER_RULES = ("litellm-shuffle", "litellm-latency", "litellm-cost", "multi-factor", "cheapest-able")
