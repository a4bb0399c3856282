"""What customers of a world have agreed: contracts by class, and who may answer whom."""

# ruff: noqa: ANN001, ANN201 (Numba infers the types of kernels)
from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from envs.kernels import kernel
from marginroute import view as v
from marginroute.view import Array, Layout, answering_tiers

if TYPE_CHECKING:
    from envs.scenario import Scenario


class Terms(NamedTuple):
    """Agreements as the kernels take them. K classes, C candidates, T tiers."""

    by_class: Any  # (K,) envs.economics.plans.TERMS; (F, K) for the members of a family of scenarios
    allowed: Array  # (K, C) bool, candidates that a class is entitled to
    models: Array  # (K, T) bool, tiers whose stored answers it may get
    last_provider: Array  # (K,) i8 or (F, K), settles its held work at the horizon; -1: none may
    accounts: Any = None  # (N, G) envs.economics.accounts.ACCOUNT, see world_accounts.py
    windows: Any = None  # (N, K) envs.economics.accounts.WINDOW


def entitled(scenario: Scenario, layout: Layout) -> Array:
    """(K, C) bool: candidates that each class is entitled to; nobody loses *defer* or *shed*.

    A provider's batch endpoint is for classes that may wait.
    """
    classes = scenario.plans.classes.values()
    allowed = np.ones((len(classes), layout.n_candidates), dtype=np.bool_)
    serving = np.flatnonzero(layout.kind <= v.PROVIDER)
    batch = [name for name, provider in scenario.fleet.providers.items() if provider.batch_discount is not None]
    for row, customer in zip(allowed, classes, strict=True):
        tiers, stations = customer.entitlements.tiers, customer.entitlements.stations
        for c in serving:
            row[c] = tiers is None or layout.tier_names[layout.tier[c]] in tiers
            row[c] &= stations is None or layout.station_names[layout.station[c]] in stations
            row[c] &= customer.delay_tolerant is not None or layout.station_names[layout.station[c]] not in batch
        row[layout.kind == v.CACHE] = customer.entitlements.cache
    return allowed


def terms_of(scenario: Scenario, layout: Layout) -> Terms:
    """The agreements of a scenario."""
    allowed = entitled(scenario, layout)
    providers = scenario.fleet.providers.values()
    price = [(p.input_usd_per_mtok or 0.0) + (p.output_usd_per_mtok or 0.0) for p in providers]
    may = allowed[:, layout.kind == v.PROVIDER] & np.array([p.batch_discount is None for p in providers], dtype=bool)
    dearest = np.where(may, np.array(price), -1.0).argmax(axis=1) if price else np.zeros(len(may), dtype=np.int64)
    return Terms(
        by_class=scenario.terms(),
        allowed=allowed,
        models=answering_tiers(layout, allowed),
        last_provider=np.where(may.any(axis=1), dearest, -1).astype(np.int64),
    )


@kernel
def of_member(terms, member):
    """The agreements of one member of a family."""
    return Terms(
        terms.by_class[member], terms.allowed, terms.models, terms.last_provider[member], terms.accounts, terms.windows
    )
