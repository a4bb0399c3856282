"""Tunes the rules that gateways ship (`marginroute.gateway_rules`), and puts their best combination together.

The composite is found in two steps, as an operator would: the rule for the model, with the least loaded replica behind
it, then the rule for the replica. Each is tuned alone before; beside it stands the best composite of untuned defaults.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import optuna

from agents.objective import Objective, Rule
from agents.search import Suggest, Tuned
from envs.plant import Plant
from marginroute.gateway_rules import REPLICA_RULES, SHIPPED_RULES, TIER_RULES, Composite, LeastLoaded, ShippedRule
from marginroute.rules import DifficultyThreshold

RANGES: dict[str, dict[str, tuple[float, float]]] = {
    "cache-aware": {"balance_abs": (0.0, 128.0), "balance_rel": (1.0, 4.0), "cache_threshold": (0.0, 1.0)},
    "llm-d": {"queue_weight": (0.0, 6.0), "kv_weight": (0.0, 6.0), "prefix_weight": (0.0, 6.0)},
    "dynamo-kv": {"active_weight": (0.0, 256.0)},
    "litellm-shuffle": {"api_weight": (0.0, 8.0)},
    "litellm-latency": {"buffer": (0.0, 8.0)},
    "multi-factor": {
        "quality_weight": (0.0, 1.0),
        "latency_weight": (0.0, 1.0),
        "cost_weight": (0.0, 1.0),
        "load_weight": (0.0, 1.0),
        "p95_over_mean": (1.0, 8.0),
    },
    "cheapest-able": {"threshold": (0.3, 0.98)},
}
"""What is tuned of each rule."""
GRID = 16  # values tried of a single parameter

Search = Callable[[Suggest], Tuned]


def default(name: str) -> ShippedRule:
    """A shipped rule as it comes."""
    return SHIPPED_RULES[name](name)


def spread_evenly(rank_of_tier: tuple[int, ...]) -> DifficultyThreshold:
    """*difficulty-threshold* as it comes: cut-offs spread evenly about the average request."""
    cutoffs = tuple(np.linspace(-1.0, 1.0, len(rank_of_tier) - 1).tolist())
    return DifficultyThreshold("difficulty-threshold", rank_of_tier, cutoffs)


def tune_rule(name: str, objective: Objective, validation: Objective, search: Search) -> Tuned:
    """A shipped rule with its parameters tuned; third-party providers in or out, whichever earns more by default."""
    rule = default(name)
    spent = 0
    if not rule.use_providers and objective.plant.spec.providers:
        variants = [replace(rule, use_providers=flag) for flag in (False, True)]
        rule = variants[int(np.argmax([objective([variant])[0] for variant in variants]))]
        spent = 2 * objective.requests
    ranges = RANGES.get(name, {})
    if len(ranges) == 1:
        ((parameter, (low, high)),) = ranges.items()
        rules: list[Rule] = [replace(rule, **{parameter: float(x)}) for x in np.linspace(low, high, GRID)]
        rule = rules[int(objective(rules).argmax())]  # type: ignore[assignment]
        spent += GRID * objective.requests
    elif ranges:

        def suggest(trial: optuna.Trial, plant: Plant) -> Rule:
            return replace(rule, **{key: trial.suggest_float(key, *limits) for key, limits in ranges.items()})

        found = search(suggest)
        found.requests += spent
        return found
    return Tuned(rule, float(validation([rule])[0]), requests=spent)


def compose(
    name: str,
    tier_rules: list[ShippedRule | DifficultyThreshold],
    replica_rules: list[ShippedRule],
    objective: Objective,
    validation: Objective,
) -> Tuned:
    """The best rule for the model, then the best for the replica behind it (if any pool has a choice of replicas)."""
    composites = [Composite(name, rule, LeastLoaded("least-request")) for rule in tier_rules]
    best = composites[int(np.argmax([objective([rule])[0] for rule in composites]))]
    tried = len(composites)
    if max(pool.replicas for pool in objective.plant.spec.pools) > 1:
        composites = [replace(best, replica_rule=rule) for rule in replica_rules]
        best = composites[int(np.argmax([objective([rule])[0] for rule in composites]))]
        tried += len(composites)
    return Tuned(best, float(validation([best])[0]), requests=tried * objective.requests)


def tune_shipped(
    objective: Objective, validation: Objective, search: Search, threshold: DifficultyThreshold
) -> dict[str, Tuned]:
    """All shipped rules tuned, the best composite of them, and the best of untuned ones.

    Args:
        objective: training episodes.
        validation: episodes on which what was found is measured.
        search: tunes a rule with several parameters.
        threshold: the tuned difficulty threshold, which chooses models too.
    """
    names = [name for name in (*REPLICA_RULES, *TIER_RULES) if name != "least-request"]
    tuned = {name: tune_rule(name, objective, validation, search) for name in names}
    least = LeastLoaded("least-request")
    policies = {name: x.policy for name, x in tuned.items() if isinstance(x.policy, ShippedRule)}
    tuned["shipped"] = compose(
        "shipped",
        [threshold, *(policies[name] for name in TIER_RULES)],
        [least, *(policies[name] for name in REPLICA_RULES if name in policies)],
        objective,
        validation,
    )
    untuned = spread_evenly(threshold.rank_of_tier)
    tuned["shipped-default"] = compose(
        "shipped-default",
        [untuned, *map(default, TIER_RULES)],
        [*map(default, REPLICA_RULES)],
        objective,
        validation,
    )
    return tuned
