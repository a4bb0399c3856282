"""Whether the parts of a bundle fit one another: a manifest can be whole and signed, and still describe no fleet."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from marginroute import view as v
from marginroute.errors import InputError

if TYPE_CHECKING:
    from marginroute.bundle import Bundle
    from marginroute.predictor import QualityPredictor

LAST = (v.CACHE, v.DEFER, v.SHED)  # candidates that every layout ends with


def check_shape(bundle: Bundle, place: str) -> None:
    """Raises InputError at the first part that does not fit the candidates, classes and tasks; `place`: the bundle."""
    problem = _layout_problem(bundle.layout) or _array_problem(bundle)
    if problem:
        raise InputError(f"{place}: {problem}; export it again")


def check_predictor(predictor: QualityPredictor, layout: v.Layout) -> None:
    """Raises InputError unless at least one of the predictor's models is a tier."""
    if not set(predictor.models) & set(layout.tier_names):
        raise InputError(
            f"the quality predictor knows {', '.join(predictor.models)}; legal is at least one of the tiers "
            f"{', '.join(layout.tier_names)}: fit it with --tier TIER=MODEL"
        )


def _layout_problem(layout: v.Layout) -> str:
    c = layout.n_candidates
    if any(len(row) != c for row in (layout.kind, layout.station, layout.tier)):
        return f"kind, station and tier are not of its {c} candidates"
    if c < len(LAST) or (np.diff(layout.kind) < 0).any() or tuple(layout.kind[-len(LAST) :]) != LAST:
        return "its candidates are not replicas, then providers, then cache, defer and shed"
    for what in ("names", "class_names", "task_names", "tier_names", "station_names"):
        if len(set(getattr(layout, what))) != len(getattr(layout, what)):
            return f"its {what} are not all different"
    if not (layout.class_names and layout.task_names):
        return "it has no customer class or no task"
    serving = layout.kind <= v.PROVIDER
    tiers, stations = layout.tier[serving], layout.station[serving]
    if (tiers < 0).any() or (layout.tier >= len(layout.tier_names)).any():
        return "a candidate is of a tier that it does not name"
    if (stations < 0).any() or (stations >= len(layout.station_names)).any():
        return "a candidate is of a pool or provider that it does not name"
    return ""


def _array_problem(bundle: Bundle) -> str:
    layout = bundle.layout
    k, j, c = len(layout.class_names), len(layout.task_names), layout.n_candidates
    pools = len(np.unique(layout.station[layout.kind == v.REPLICA]))
    for what, array, shape in (
        ("static_signals", bundle.static_signals, (v.N_STATIC_SIGNALS, c)),
        ("output_tokens", bundle.output_tokens, (k, j)),
        ("slots", bundle.slots, (max(pools, bundle.slots.size),)),
    ):
        if array.shape != shape:
            return f"{what} is {' x '.join(map(str, array.shape))}; legal is {' x '.join(map(str, shape))}"
        if np.isnan(array).any():
            return f"{what} holds a NaN"
    return next((f"it has no terms of class {name!r}" for name in layout.class_names if name not in bundle.terms), "")
