"""Where tuned baselines are kept: in a run folder, in the cache, or committed beside the scenarios.

A file of tuned baselines names the scenario (by hash) that it was tuned for, the budget, the command, and for each
baseline its parameters, validation margin and the spread between restarts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from agents.objective import Rule
from agents.rules_of_thumb import nothing_to_tune
from agents.search import AGREEMENT, Budget, Tuned
from envs import scenario_files
from envs.plant import Plant
from envs.scenario import Scenario
from marginroute import heuristics
from marginroute.cli import note
from marginroute.control import ControlLayout
from marginroute.control_rules import RuleController
from marginroute.errors import InputError
from marginroute.margin_rule import MarginRule
from marginroute.whole_file import replacing

SCHEMA = 1
FILE = "baselines.yaml"
CACHE = scenario_files.CONFIGS.parent / ".marginroute_cache" / "baselines"
SHIPPED = scenario_files.CONFIGS / "baselines"


class UntunedError(InputError):
    """No baselines were tuned for a scenario."""


def save(path: Path, scenario: Scenario, tuned: dict[str, Tuned], budget: Budget, command: str) -> None:
    """Writes tuned baselines, before those that the file holds already."""
    kept = load(path)[0] if path.is_file() else {}
    before = kept.get("baselines", {})
    data = {
        **kept,
        "schema": SCHEMA,
        "scenario": scenario.name,
        "scenario_hash": scenario.hash,
        "command": command,
        "budget": {name: getattr(budget, name) for name in budget.__dataclass_fields__},
        "baselines": {
            name: _evidence(x, "requests") | {"policy": heuristics.to_dict(x.policy)} for name, x in tuned.items()
        }
        | before,
    }
    _write(path, data)


def _write(path: Path, data: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        partial.write_text(yaml.safe_dump(data, sort_keys=False, default_flow_style=None, width=120))


def _evidence(tuned: Tuned, unit: str) -> dict[str, Any]:
    return {
        "validation_usd_per_1k": round(tuned.validation_usd_per_1k, 6),
        "spread_pct": round(tuned.spread_pct, 4),
        unit: tuned.requests,
        "restarts_usd_per_1k": [round(usd, 6) for usd in tuned.restarts_usd_per_1k],
    }


def save_controllers(path: Path, tuned: dict[str, Tuned], budget: Budget) -> None:
    """Adds the tuned controllers to a file of tuned baselines; their budget counts control ticks on the surrogate."""
    data = load(path)[0]
    limits = {"ticks" if name == "requests" else name: x for name, x in vars(budget).items()}
    rows = {name: _evidence(x, "ticks") | {"policy": x.policy.to_dict()} for name, x in tuned.items()}
    data["controllers"] = {"budget": limits, "rules": rows}
    _write(path, data)


def save_prices_beside(path: Path, usd_per_1k: Mapping[float, float]) -> None:
    """Adds what the router earned beside the best of the tuned controllers, by share of its price of congestion."""
    data = load(path)[0]
    rows = {share: round(usd, 6) for share, usd in usd_per_1k.items()}
    best = max(usd_per_1k, key=lambda share: usd_per_1k[share])
    data["controllers"]["router"] = {"price_share": best, "validation_usd_per_1k": rows}
    _write(path, data)


def router_beside(path: Path, fitted: bool = True) -> MarginRule:
    """The tuned router; beside a controller at the price of congestion that is best there.

    Raises:
        InputError: as `advice_and_fallback`.
    """
    router = advice_and_fallback(path, fitted)[0]
    chosen = load(path)[0].get("controllers", {}).get("router")
    return router if chosen is None else router.at_price(float(chosen["price_share"]))


def load_controllers(path: Path, layout: ControlLayout) -> tuple[dict[str, RuleController], str]:
    """The tuned controllers of a file, and the name of the best on validation; ({}, "") where it holds none.

    Raises:
        InputError: as `load`, or a rule is incomplete.
    """
    rows = load(path)[0].get("controllers", {}).get("rules", {})
    try:
        rules = {name: RuleController.from_dict(row["policy"], layout) for name, row in rows.items()}
        return rules, max(rows, key=lambda name: rows[name]["validation_usd_per_1k"], default="")
    except (TypeError, KeyError, ValueError) as error:
        raise InputError(f"{path} is incomplete ({error}); tune the baselines again with train.py --retune") from None


def load(path: Path) -> tuple[dict[str, Any], dict[str, Rule]]:
    """The file's content and its policies by name.

    Raises:
        InputError: unreadable, malformed, or of another schema.
    """
    data = scenario_files.read_yaml(path)
    if data.get("schema") != SCHEMA or not isinstance(data.get("baselines"), dict):
        raise InputError(f"{path} holds no tuned baselines of schema {SCHEMA}; tune them again with train.py --retune")
    try:
        return data, {name: heuristics.from_dict(row["policy"]) for name, row in data["baselines"].items()}
    except (TypeError, KeyError) as error:
        raise InputError(f"{path} is incomplete ({error}); tune the baselines again with train.py --retune") from None


def is_whole(path: Path) -> bool:
    """Whether a file of tuned baselines holds more than the margin rules that a training starts from."""
    return "expected-margin" in load(path)[1]


def tell_loose(document: Mapping[str, Any]) -> None:
    """Says which baselines' best restarts do not agree: they may earn more than is shown; `document` as of `load`."""
    rows = document["baselines"].items()
    loose = {name: row["spread_pct"] for name, row in rows if row.get("spread_pct", 0.0) > 100.0 * AGREEMENT}
    if loose:
        said = ", ".join(f"{name} ({pct:.1f} %)" for name, pct in loose.items())
        note(f"note: restarts of the tuning differ for {said}: more training.tuning_requests may find better ones")


def margin_rules(path: Path) -> dict[str, MarginRule]:
    """The margin rules of a file of tuned baselines, by name."""
    return {name: rule for name, rule in load(path)[1].items() if isinstance(rule, MarginRule)}


def replace_rules(path: Path, rules: Mapping[str, Rule]) -> None:
    """Puts other parameters behind some of a file's baselines: what their tuning measured no longer holds for them."""
    data = load(path)[0]
    for name, rule in rules.items():
        data["baselines"][name]["policy"] = heuristics.to_dict(rule)
    _write(path, data)


def advice_and_fallback(path: Path, fitted: bool = True) -> tuple[MarginRule, Rule]:
    """The rule that a network corrects and the one that the guard hands over to, from a file of tuned baselines.

    Args:
        path: the file.
        fitted: whether the first one has P(good) fitted on outcomes.

    Raises:
        InputError: as `load`, or one of the two is missing.
    """
    rules = load(path)[1]
    advice, fallback = rules.get("bid-price-fitted" if fitted else "bid-price"), rules.get("bid-price")
    if not isinstance(advice, MarginRule) or fallback is None:
        raise InputError(f"{path} lacks bid-price or bid-price-fitted; tune the baselines again with train.py --retune")
    return advice, fallback


def find(scenario: Scenario) -> Path | None:
    """The file with baselines tuned for exactly this scenario, cached or shipped: the one with the larger budget."""
    files = [path for path in (CACHE / f"{scenario.hash}.yaml", *sorted(SHIPPED.glob("*.yaml"))) if path.is_file()]
    fitting = [path for path in files if scenario_files.read_yaml(path).get("scenario_hash") == scenario.hash]
    return max(fitting, key=_budget, default=None)


def _budget(path: Path) -> int:
    """Simulated requests per restart that a file's baselines were tuned with."""
    return int((scenario_files.read_yaml(path).get("budget") or {}).get("requests", 0))


def remember(scenario: Scenario, path: Path) -> None:
    """Keeps tuned baselines for later runs of the scenario, unless better tuned ones are known; quiet if it cannot."""
    known = find(scenario)
    if known is None or _budget(known) <= _budget(path):
        with contextlib.suppress(OSError):
            CACHE.mkdir(parents=True, exist_ok=True)
            with replacing(CACHE / f"{scenario.hash}.yaml") as partial:
                partial.write_text(path.read_text())


def baselines_for(scenario: Scenario, run_dir: Path | None = None) -> dict[str, Rule]:
    """Tuned baselines of a scenario: a run's own if it is of this scenario, else cached or shipped ones.

    Raises:
        InputError: as `file_for`, or they do not fit the scenario's fleet.
    """
    path = file_for(scenario, run_dir)
    document, rules = load(path)
    tell_loose(document)
    plant = Plant(scenario)
    rules |= {name: rule for name, rule in nothing_to_tune(plant).items() if name not in rules and "shipped" in rules}
    stations = len(scenario.pool_names) + len(scenario.provider_names)
    for name, rule in rules.items():
        if isinstance(rule, MarginRule) and len(rule.parameters.station_usd_per_s) != stations:
            raise InputError(
                f"{path}: {name} has prices for {len(rule.parameters.station_usd_per_s)} pools and providers, "
                f"scenario {scenario.name!r} has {stations}; tune again with train.py --retune"
            )
    return rules


def file_for(scenario: Scenario, run_dir: Path | None = None) -> Path:
    """The file of tuned baselines of a scenario: a run's own if it is of this scenario, else a cached or shipped one.

    Raises:
        UntunedError: none were tuned for this scenario.
    """
    path = find(scenario)
    if run_dir is not None and (run_dir / FILE).is_file():
        own = run_dir / FILE
        path = own if scenario_files.read_yaml(own).get("scenario_hash") == scenario.hash else path
    if path is None:
        raise UntunedError(
            f"no tuned baselines for scenario {scenario.name!r} (hash {scenario.hash}); "
            "tune them with train.py on the same scenario, trace and --set values"
        )
    return path
