"""A margin rule that decides between two calls from Python: worlds and rule in one compiled loop.

`marginroute.margin_rule` is what a gateway runs. `envs.observe_kernel` repeats its formulas, and here they choose: the
same decisions (tests/parity/test_rule_kernel.py) without a call of NumPy for each. Requests that may be hedged are
assessed by formulas of their own, which are not repeated.
"""

# ruff: noqa: ANN001, ANN201 (Numba infers the types of kernels)
from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, TypeGuard

import numpy as np

from envs import observe_kernel, world
from envs.kernels import kernel
from marginroute.features import feature_spec
from marginroute.margin_rule import MarginParameters, MarginRule

if TYPE_CHECKING:
    from envs.plant import Plant
    from envs.worlds import FleetWorlds


def is_compiled(policy: object, worlds: FleetWorlds) -> TypeGuard[MarginRule]:
    """Whether a policy's decisions in these worlds can be made here."""
    return type(policy) is MarginRule and not worlds.hedges


def default_advice(plant: Plant) -> MarginRule:
    """The untuned expected margin."""
    return MarginRule("expected-margin", MarginParameters(station_usd_per_s=(0.0,) * len(plant.layout.station_names)))


def arguments_of(rule: MarginRule, worlds: FleetWorlds) -> tuple[Any, ...]:
    """What the kernels here take of a rule: its constants, and room for what it finds."""
    layout = worlds.plant.layout
    spec = feature_spec(layout)
    features = np.zeros((worlds.n_worlds, spec.n_candidate), dtype=np.float32)  # of no use here
    seen = observe_kernel.buffers(worlds.n_worlds, layout.n_candidates, features)
    return observe_kernel.rule_of(rule, layout, spec), seen


@kernel
def choice(rule, signals, request_view, legal, w, seen):
    """The legal candidate of world `w` with the highest score, the first of those."""
    observe_kernel.assess(rule, signals, request_view, legal, w, 0, seen)
    best, best_usd = legal.shape[1] - 1, -math.inf
    for c in range(legal.shape[1]):
        if legal[w, c] and seen.score_usd[w, c] > best_usd:
            best, best_usd = c, seen.score_usd[w, c]
    return best


@kernel
def run(
    config, terms, static, sigmas, kinds, tiers, pools, tables, worlds, replicas, slots, providers, requests,
    desks, loads, index, prior, truth, good, own, entries, follow, lengths, ledger_usd, counts, changes, actions,
    signals, request_view, legal, p_true, rule, seen, choices, decisions,
):  # fmt: skip
    """Lets a rule decide in every world until it is done, or for so many `decisions`."""
    choices[:] = world.WAIT
    for w in range(desks.shape[0]):
        left = decisions
        while desks[w].done == 0 and left > 0:
            left -= 1
            choices[w] = choice(rule, signals, request_view, legal, w, seen)
            world.step(
                config, terms, static, sigmas, kinds, tiers, pools, tables, worlds, replicas, slots, providers,
                requests, desks, loads, index, prior, truth, good, own, entries, follow, lengths, ledger_usd, counts,
                changes, actions, signals, request_view, legal, p_true, choices,
            )  # fmt: skip
            choices[w] = world.WAIT
