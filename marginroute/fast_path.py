"""One decision of a margin rule, with or without the network that corrects it, prepared for the candidates of a fleet.

`latency`, `heuristics`, `features` and `policy.Network` are the home of the formulas, over any batch shape. On a dozen
candidates they spend their time in calls of NumPy and little of it in loops. Here the same sums are arranged anew for
a single decision:

- What the fleet fixes is worked out once: reciprocals, differences of prices, one-hots, and the normaliser, which is
  folded into the first layer.
- What the request fixes are Python numbers, worked out before any array is touched.
- The rest runs over rows (C,) of one buffer per thread, in such an order that neighbours go through a call together,
  and that a sum of rows, weighted by numbers of the request, is one product of a vector and a matrix.

A fast path says None wherever it does not apply (other constants, stale telemetry, drift, a hedge timer, a number that
is not finite): then the general path decides. A property test holds the two to each other.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import numpy as np

from marginroute import fast_network, fast_parts, features
from marginroute import view as v
from marginroute.decision import Decision
from marginroute.fast_rows import Buffer, Fleet, Scorer, covers_features, scorer_of
from marginroute.margin_rule import MarginRule
from marginroute.policy import ResidualPolicy
from marginroute.view import Array, Layout, View

COVERED_VERSION = 7  # of the features; any other takes the general path
PER_ITEM = ("station_usd_per_s", "slo_usd", "good_usd", "served_usd")  # parameters with one value per station or class

Worker = Callable[[View], Decision | None]


def worker_of(name: str, fleet: Fleet, scorer: Scorer | None, max_age_s: float, max_far: int) -> Worker:
    """The function that decides in one thread; its arrays are made here, once."""
    buffer = Buffer(fleet.layout.n_candidates)
    read, ask = fast_parts.reader(fleet, buffer, max_age_s), fast_parts.asker(fleet, buffer)
    estimate, assess = fast_parts.estimator(fleet, buffer), fast_parts.assessor(fleet, buffer)
    later, explain = fast_parts.later_and_floors(fleet, buffer), fast_parts.explainer(name, fleet, buffer)
    rank = None if scorer is None else fast_network.ranker(fleet, buffer, scorer, max_far)
    temperature_share = 0.0 if scorer is None else scorer.temperature_share
    scores, shed = buffer.score, fleet.layout.n_candidates - 1

    def decide(view: View) -> Decision | None:
        if not view.legal.item(shed):
            return None  # a hedge timer
        found = read(view)
        if found is None:
            return None
        request, mean_by = found
        usd = ask(request)
        estimate(request)
        assess(view, request, usd)
        later_usd = later(view, request, usd)
        choice = int(scores.argmax())
        best = scores.item(choice)
        if rank is None:
            return explain(scores, choice, 1.0 / usd[4], best, usd, later_usd)
        logits = rank(request, mean_by, usd, best)
        if logits is None:
            return None
        return explain(logits, int(logits.argmax()), temperature_share * usd[1], best, usd, later_usd)

    return decide


class FastPath:
    """A policy prepared for one fleet; shared by threads, each with buffers of its own.

    Args:
        policy: a margin rule, or a network that corrects one.
        layout: the candidates.
        static: (S_static, C) their constants.
        max_age_s: oldest scrape, and
        max_far: most context features far outside training, that it decides on.
    """

    def __init__(
        self, policy: MarginRule | ResidualPolicy, layout: Layout, static: Array, max_age_s: float, max_far: int
    ) -> None:
        rule = policy if isinstance(policy, MarginRule) else policy.advice
        self._name, self._limits = policy.name, (max_age_s, max_far)
        self._fleet = Fleet(rule, layout, static)
        self._scorer = None if isinstance(policy, MarginRule) else scorer_of(policy, layout)
        self._static = static.astype(np.float64).tobytes()
        self._threads = threading.local()

    def __getstate__(self) -> dict[str, Any]:
        return {name: part for name, part in vars(self).items() if name != "_threads"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._threads = threading.local()

    def decide(self, view: View) -> Decision | None:
        """The decision, or None where the general path must decide."""
        if view.layout is not self._fleet.layout or view.signals[: v.N_STATIC_SIGNALS].tobytes() != self._static:
            return None
        try:
            worker: Worker = self._threads.worker
        except AttributeError:
            worker = self._threads.worker = worker_of(self._name, self._fleet, self._scorer, *self._limits)
        try:
            return worker(view)
        except (ValueError, ZeroDivisionError, OverflowError, IndexError):  # NaN for a class, a length of 0, ...
            return None


def prepared(policy: object, layout: Layout, static: Array, max_age_s: float, max_far: int) -> FastPath | None:
    """The fast path of a policy, or None where it has none."""
    rule = policy.advice if isinstance(policy, ResidualPolicy) else policy
    if not isinstance(rule, MarginRule) or features.FEATURE_VERSION != COVERED_VERSION or not covers_features():
        return None
    if not isinstance(policy, MarginRule | ResidualPolicy) or (np.diff(layout.kind) < 0).any():
        return None
    if isinstance(policy, ResidualPolicy) and policy.spec.candidate != features.feature_spec(layout).candidate:
        return None
    several = any(
        np.ndim(value) > (name in PER_ITEM)
        for name, value in ((f.name, getattr(rule.parameters, f.name)) for f in fields(rule.parameters))
    )
    return None if several else FastPath(policy, layout, static, max_age_s, max_far)
