"""Rules of thumb as they come, for a scenario that nothing was tuned for; and those that have nothing to tune.

Providers are a last resort of them, as in `marginroute.gateway_rules`, and thresholds stand in the middle.
"""

from __future__ import annotations

from agents.objective import Rule
from agents.search_spaces import cascades, has_verifiers, is_semantic, tier_ranks
from agents.tuning_shipped import default, spread_evenly
from envs.plant import Plant
from marginroute.gateway_rules import REPLICA_RULES, TIER_RULES
from marginroute.rules import FixedTier, LeastInFlight, Random, RoundRobin


def as_they_come(plant: Plant) -> dict[str, Rule]:
    """Every rule of thumb of a scenario, untuned, by name."""
    rules: list[Rule] = [FixedTier(f"fixed-{tier}", t) for t, tier in enumerate(plant.layout.tier_names)]
    rules += [Random("random"), RoundRobin("round-robin")]
    rules += [LeastInFlight("least-in-flight"), spread_evenly(tier_ranks(plant))]
    rules += [default(name) for name in (*REPLICA_RULES, *TIER_RULES)]
    lists = cascades(plant)
    rules.append(max(lists, key=lambda rule: len(rule.order)) if has_verifiers(plant) else lists[0])
    return {rule.name: rule for rule in rules}


def nothing_to_tune(plant: Plant) -> dict[str, Rule]:
    """Rules that have nothing to tune in a scenario, by name; none where stored answers have a threshold."""
    if is_semantic(plant):
        return {}
    names = ("session-affinity",) if has_verifiers(plant) else ("session-affinity", "cascade")
    return {name: rule for name, rule in as_they_come(plant).items() if name in names}
