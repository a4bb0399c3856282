"""The named heuristics, as files name them: what gateways ship, and what a learned policy has to beat.

Two families. *Rules of thumb* rank candidates without money (`marginroute.rules`, and what gateways ship in
`marginroute.gateway_rules`). *Margin rules* put USD on every candidate (`marginroute.margin_rule`).
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from marginroute.errors import InputError
from marginroute.gateway_rules import SHIPPED_RULES, Composite
from marginroute.margin_rule import MarginParameters, MarginRule
from marginroute.quality import FittedQuality
from marginroute.rules import (
    Cascade,
    DifficultyThreshold,
    FixedTier,
    LeastInFlight,
    Random,
    RoundRobin,
    RuleOfThumb,
    ShuffledMix,
)

Rule = MarginRule | RuleOfThumb
RULES: dict[str, type[MarginRule] | type[RuleOfThumb]] = {
    "margin": MarginRule,
    "fixed-tier": FixedTier,
    "random": Random,
    "round-robin": RoundRobin,
    "least-in-flight": LeastInFlight,
    "difficulty-threshold": DifficultyThreshold,
    "cascade": Cascade,
    "shuffled-mix": ShuffledMix,
    "composite": Composite,
    **SHIPPED_RULES,
}
"""The rule behind each policy name, as files name it."""


def to_dict(policy: Rule) -> dict[str, Any]:
    """A heuristic with its parameters as plain data, for YAML and bundles."""
    rule = next(name for name, cls in RULES.items() if type(policy) is cls)
    return {"rule": rule, **{f.name: _plain(getattr(policy, f.name)) for f in fields(policy)}}


def _plain(value: Any) -> Any:
    if isinstance(value, MarginParameters):
        return {p.name: _plain(getattr(value, p.name)) for p in fields(value) if getattr(value, p.name) != ()}
    if isinstance(value, FittedQuality):
        return value.to_dict()
    if isinstance(value, RuleOfThumb):
        return to_dict(value)
    return list(value) if isinstance(value, tuple) else value


def from_dict(data: dict[str, Any]) -> Rule:
    """The inverse of `to_dict`.

    Raises:
        InputError: an unknown rule, or a parameter that the rule does not have.
    """
    if not isinstance(data, dict):
        raise InputError(f"heuristic {data!r} is no mapping; legal is a rule with its parameters")
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
        if rule is Composite:
            arguments |= {part: from_dict(data[part]) for part in ("tier_rule", "replica_rule")}
        return rule(**arguments)
    except (TypeError, KeyError, AttributeError) as error:
        raise InputError(f"heuristic {data.get('name')!r} has a missing or unknown parameter: {error}") from None
