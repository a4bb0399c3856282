"""`python -m envs calibrate quality TABLE --out QUALITY.yaml`: who answers what well, from a table of outcomes.

Factors are fitted to three quarters of the items and judged on the rest: accuracy of each model, share of items that at
least one model answers (the oracle), and the distribution of the number of models that are right. The figures written
are fitted to all items, as sections of a scenario: `fleet.tiers`, `workload.tasks`, `workload.difficulty`.
"""

from __future__ import annotations

import argparse
import re
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
import yaml

from envs.workload.quality_fit import GRID, FactorModel, fit_factors
from envs.workload.traces_outcomes import Columns, OutcomeTable, read_outcomes
from marginroute.cli import note
from marginroute.errors import InputError
from marginroute.whole_file import write_whole

Array = np.ndarray[Any, Any]
HELD_OUT = 4  # one item in so many
MIN_ITEMS = 100


@dataclass(frozen=True, eq=False)
class Items:
    """N items, J categories, T models.

    Attributes:
        good: (N, T) 1, 0 or NaN.
        category: (N,) index.
        names: (J,) of the categories.
        models: (T,) names that a scenario takes.
    """

    good: Array
    category: Array
    names: tuple[str, ...]
    models: tuple[str, ...]

    def share(self, rows: Array) -> Array:
        """(J,) shares of the categories among some rows."""
        return np.bincount(self.category[rows], minlength=len(self.names)) / len(rows)


def items_of(table: OutcomeTable, good_from: float) -> Items:
    """The table as indices and legal names.

    Raises:
        InputError: too few items, or names that fall together.
    """
    if len(table.prompts) < MIN_ITEMS:
        raise InputError(f"the table has {len(table.prompts)} items; legal is at least {MIN_ITEMS}")
    words = [word or "all" for word in table.category]
    names, category = np.unique([_legal(word) for word in words], return_inverse=True)
    models = tuple(_legal(name) for name in table.models)
    if len(set(models)) < len(models):
        raise InputError(f"models {', '.join(table.models)} fall together as {', '.join(models)}; rename them")
    return Items(table.good(good_from), category, tuple(str(name) for name in names), models)


def _legal(name: str) -> str:
    """A name as scenarios take it."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip("-_.") or "unnamed"


def judged(items: Items, n_factors: int, seed: int) -> dict[str, Any]:
    """Prediction and observation on the items held out, for this fit and for simpler ones."""
    fold = np.random.default_rng(seed).permutation(len(items.good)) % HELD_OUT
    inside, outside = np.flatnonzero(fold), np.flatnonzero(fold == 0)
    for j, name in enumerate(items.names):
        if not (items.category[inside] == j).any():
            raise InputError(f"category {name} has too few items; legal is at least {HELD_OUT} or one category for all")
    complete = outside[~np.isnan(items.good[outside]).any(axis=1)]
    share, good = items.share(outside), items.good[outside]
    seen: dict[str, Any] = {"items": len(outside), "accuracy": _rounded(np.nanmean(good, axis=0))}
    counts = np.bincount(items.good[complete].sum(axis=1).astype(int), minlength=good.shape[1] + 1)
    if len(complete):
        seen |= {"oracle": _rounded(1.0 - counts[0] / len(complete)), "number_right": _rounded(counts / len(complete))}
    found = {"observed": seen}
    for k in sorted({1, n_factors}):
        model = fit_factors(items.good[inside], items.category[inside], k, seed, _note)
        for luck in ("independent", "shared"):
            found[f"{k} factor{'s' * (k > 1)}, {luck} luck"] = _predicted(model, share, luck == "shared", seen)
    return found


def _predicted(model: FactorModel, share: Array, shared: bool, seen: dict[str, Any]) -> dict[str, Any]:
    accuracy, count = model.accuracy(share, shared)
    error = np.abs(accuracy - np.array(seen["accuracy"])).mean()
    found = {"mean_accuracy_error": _rounded(error), "oracle": _rounded(1.0 - count[0])}
    if "number_right" in seen:
        distance = np.abs(np.cumsum(count) - np.cumsum(seen["number_right"])).max()
        found |= {"number_right": _rounded(count), "largest_distance": _rounded(distance)}
    return found


def _rounded(value: Any) -> Any:
    return np.round(np.asarray(value, dtype=np.float64), 4).tolist()


def sections(model: FactorModel, items: Items) -> dict[str, Any]:
    """The fitted figures as sections of a scenario."""
    share = items.share(np.arange(len(items.good)))
    tasks = {
        name: {"share": _rounded(share[j]), "nobody_can_share": _rounded(model.nobody[j])}
        for j, name in enumerate(items.names)
    }
    tiers = {}
    for t, name in enumerate(items.models):
        slope, *others = _rounded(model.loading[t])
        if slope < 0.0:
            raise InputError(
                f"model {name} does better on harder items (slope {slope}); legal is a model that does not"
            )
        ability = dict(zip(items.names, _rounded(model.ability[t]), strict=True))
        tiers[name] = {"title": name, "quality": {"slope": slope, "loadings": others, "ability": ability}}
    return {"tiers": tiers, "tasks": tasks, "difficulty": {"luck": "independent"}}


def _text(document: dict[str, Any]) -> str:
    return yaml.safe_dump(document, sort_keys=False, width=116, default_flow_style=None, allow_unicode=True)


def _note(text: str) -> None:
    note(text)


def _report(found: dict[str, Any]) -> str:
    seen = found["observed"]
    lines = [f"{seen['items']} items held out; at least one model right: {seen.get('oracle', float('nan')):.3f}"]
    lines.append(f"{'fit':<30}  oracle  mean error of accuracy  largest distance of number right")
    for name, figures in found.items():
        if name != "observed":
            distance = figures.get("largest_distance", float("nan"))
            lines.append(
                f"{name:<30}  {figures['oracle']:6.3f}  {figures['mean_accuracy_error']:22.4f}  {distance:32.4f}"
            )
    return "\n".join(lines) + "\n"


def run(arguments: argparse.Namespace) -> int:
    """Fits, judges, prints and writes."""
    if arguments.factors not in GRID:
        raise InputError(f"--factors {arguments.factors}: legal is 1 to {max(GRID)}")
    models = tuple(arguments.models.split(",")) if arguments.models else None
    table = read_outcomes(arguments.table, Columns(prompt=arguments.item, category=arguments.category, models=models))
    items = items_of(table, arguments.good_from)
    found = judged(items, arguments.factors, arguments.seed)
    model = fit_factors(items.good, items.category, arguments.factors, arguments.seed, _note)
    head = {"title": arguments.title or arguments.table.name}
    if arguments.source:
        head["source"] = arguments.source
    fit = {"items": len(items.good), "held_out": found}
    write_whole(arguments.out, _text(head | sections(model, items) | {"fit": fit}))
    sys.stdout.write(_report(found))
    return 0
