"""Rules of thumb: heuristics that rank candidates without money.

They answer from the response cache whatever is similar enough (the same prompt always is; the threshold is what
semantic caches of gateways ship), never defer, and shed only when nothing else is legal. Where a verifier has turned an
answer down they ask again; *cascade* alone may deliver it. A candidate whose recent
calls failed cools down: it ranks behind all others until its errors fade (LiteLLM does so too). Their parameters may
also hold one value per world, (N, 1), as in tuning.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import numpy as np

from marginroute import view as v
from marginroute.decision import Decision, best_legal, explain
from marginroute.quality import FittedQuality
from marginroute.response_cache import SHIPPED_SIMILARITY
from marginroute.view import CACHE, PROVIDER, Array, Layout, View

LAST_RESORT = 1e6  # score distance that separates what a rule of thumb wants from what it takes only if it must
COOLDOWN_SHARE = 0.3  # share of recent errors above which a rule of thumb avoids a candidate: two in a row


_FALLBACK_ORDER = LAST_RESORT * np.array([0.0, 0.0, 2.0, -2.0, -3.0])
"""What a rule of thumb thinks of each kind: a cached answer above all replicas and providers, defer and shed below."""
_TOO_FAR = -2.5 * LAST_RESORT  # of an answer to another question: better than none


@dataclass(frozen=True)
class RuleOfThumb(ABC):
    """Base of the rules without money: subclasses rank replicas and providers by `preference`.

    Attributes:
        name: of the policy.
        cache_similarity: from which a stored answer is given.
    """

    name: str
    cache_similarity: float = field(default=SHIPPED_SIMILARITY, kw_only=True)

    @abstractmethod
    def preference(self, view: View) -> Array:
        """Higher is better, (..., C); read for replicas and providers only, within +-LAST_RESORT."""

    def scores(self, view: View) -> Array:
        """A cached answer first, if it is similar enough, then by preference, then defer, then shed."""
        kind = view.layout.kind
        cooling = (view.signals[v.RECENT_ERRORS] > COOLDOWN_SHARE) * (-0.75 * LAST_RESORT)
        turned_down = view.request[v.TURNED_DOWN][..., None] > 0.0  # the stored answer is the one in hand
        too_far = (kind == CACHE) & ((view.signals[v.SIMILARITY] < self.cache_similarity) | turned_down)
        other = np.where(too_far, _TOO_FAR, _FALLBACK_ORDER[kind])
        return np.where(kind <= PROVIDER, self.preference(view) + cooling, other)

    def decide_batch(self, view: View) -> Array:
        """The candidate it ranks first in each view."""
        return best_legal(self.scores(view), view.legal)

    def decide(self, view: View) -> Decision:
        """The candidate it ranks first; rules of thumb give no reason in USD."""
        return explain(self.name, view, self.scores(view), lambda _: {}, scale_usd=0.0)

    def in_flight_caps(self, layout: Layout, slots: Array) -> Array | None:
        """Leaves the configured caps."""
        return None

    @property
    def quality(self) -> FittedQuality | None:
        """None: it goes by the public prior, if at all."""
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
        content = np.array(view.request[v.DIFFICULTY_SIGNAL], dtype=np.float64)[..., None].view(np.uint64)
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
class Cascade(RuleOfThumb):
    """*cascade*: ask a list of models in turn, the cheapest first, until an answer scores high enough (FrugalGPT).

    Chen, Zaharia and Zou (2023), `src/FrugalGPT/llmcascade.py`: the answer of the i-th model is accepted if its score
    is at least the i-th threshold, that of the last model in any case. An answer that passes the verifier itself is
    delivered before anybody asks. Least in-flight inside a tier; the next of the list where a tier has no legal
    candidate.

    Attributes:
        order: (m,) tiers, in the order in which they are asked.
        thresholds: (m - 1,) scores from which their answers are delivered.
    """

    order: tuple[int, ...] = ()
    thresholds: tuple[float, ...] = ()

    def preference(self, view: View) -> Array:
        """The model whose turn it is, then those nearest to it in the list."""
        rank = np.full(len(view.layout.tier_names) + 1, 2.0 * len(view.layout.tier_names))  # the last: no tier
        rank[list(self.order)] = np.arange(len(self.order))
        turn = np.minimum(view.request[v.TURNED_DOWN], len(self.order) - 1.0)
        return tier_preference(view, turn[..., None], rank)

    def scores(self, view: View) -> Array:
        """As any rule of thumb, but an answer in hand that scores high enough is above all."""
        scores = super().scores(view)
        asked = view.request[v.TURNED_DOWN].astype(np.int64)
        least = np.append(
            np.asarray(self.thresholds, dtype=np.float64), np.zeros((*np.shape(self.thresholds)[:-1], 1)), -1
        )
        at = np.clip(asked - 1, 0, len(self.order) - 1)
        wanted = least[at] if least.ndim == 1 else np.take_along_axis(least, at[..., None], axis=-1)[..., 0]
        deliver = (asked > 0) & (view.request[v.VERIFIER_SCORE] >= wanted)
        return np.where(deliver[..., None] & (view.layout.kind == CACHE), 3.0 * LAST_RESORT, scores)


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
