"""Planning: the same policies and seeds under other settings (capacity, prices, promises), with break-even points."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from envs.scenario import Scenario
from evaluation.cache import cached_play
from evaluation.contest import Entrants, Play, choose_best
from evaluation.progress import progress_bar
from evaluation.report import SECONDS_PER_HOUR, shed_shares
from evaluation.results import EpisodeResults
from evaluation.statistics import Estimate, paired_estimate, zeros
from marginroute.errors import InputError
from marginroute.policy import Policy

MOST_SETTINGS = 200


@dataclass(frozen=True)
class Row:
    """One policy under one setting.

    Attributes:
        setting: value by key.
        policy: name.
        margin_usd_per_hour: with its interval.
        change_usd_per_hour: paired, from the first setting; None for that one.
        slo_pct: lowest SLO attainment of a class.
        lost_pct: highest share of requests without an answer of a class.
        busy_pct: mean utilisation of pools, by replicas.
    """

    setting: Mapping[str, str]
    policy: str
    margin_usd_per_hour: Estimate
    change_usd_per_hour: Estimate | None
    slo_pct: float
    lost_pct: float
    busy_pct: float


def settings(words: Sequence[str]) -> list[dict[str, str]]:
    """All combinations of `KEY=A..B` (whole numbers) and `KEY=V1,V2`.

    Raises:
        InputError: a word of another form, a key twice, or too many combinations.
    """
    keys: list[str] = []
    values: list[list[str]] = []
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not key or not text:
            raise InputError(f"--vary {word!r} is not legal; legal is KEY=V1,V2 or KEY=A..B")
        if key in keys:
            raise InputError(f"--vary {key} stands twice; legal is all its values after one {key}=")
        keys.append(key)
        values.append(_values(word, text))
    combinations = [dict(zip(keys, chosen, strict=True)) for chosen in itertools.product(*values)]
    if len(combinations) > MOST_SETTINGS:
        raise InputError(f"--vary makes {len(combinations)} settings; legal is {MOST_SETTINGS} or fewer")
    return combinations


def _values(word: str, text: str) -> list[str]:
    low, dots, high = text.partition("..")
    if not dots:
        values = [value.strip() for value in text.split(",")]
        if not all(values):
            raise InputError(f"--vary {word!r} has an empty value; legal is KEY=V1,V2")
        return values
    try:
        first, last = int(low), int(high)
    except ValueError:
        raise InputError(f"--vary {word!r} is not legal; legal is a range of whole numbers, or V1,V2") from None
    if last < first:
        raise InputError(f"--vary {word!r} is empty; legal is a range that ascends")
    return [str(value) for value in range(first, last + 1)]


def vary(
    load: Callable[[Mapping[str, str]], Scenario], entrants: Entrants, chosen: Sequence[Mapping[str, str]], play: Play
) -> list[Row]:
    """Plays the examined policies and the best heuristic under every setting.

    Policies stay as they were tuned for the scenario itself: what changes is the world around them.

    Args:
        load: makes the scenario of a setting.
        entrants: of the scenario itself.
        chosen: settings; the first is what the others are compared with.
        play: how.

    Raises:
        InputError: a setting that makes no scenario, before anything is played.
    """
    scenarios = [_loaded(load, setting) for setting in chosen]
    best = choose_best(load({}), entrants.heuristics, play)
    policies: dict[str, Policy] = dict(entrants.examined)
    if best is not None:
        policies[best] = entrants.heuristics[best]
    rows: list[Row] = []
    first: dict[str, EpisodeResults] = {}
    with progress_bar("settings") as progress:
        for number, (setting, scenario) in enumerate(zip(chosen, scenarios, strict=True), start=1):
            results = cached_play(scenario, policies, play.episodes, play.seed, None, play.workers, play.use_cache)
            first = first or results
            rows += [_row(setting, name, result, first[name]) for name, result in results.items()]
            progress(number, len(chosen))
    return rows


def _loaded(load: Callable[[Mapping[str, str]], Scenario], setting: Mapping[str, str]) -> Scenario:
    """The scenario of a setting; what is wrong with a key is said of --vary, which set it."""
    try:
        return load(setting)
    except InputError as error:
        for key in setting:
            if str(error).startswith(f"--set {key}"):
                raise InputError(str(error).replace("--set", "--vary", 1)) from None
        raise


def _row(setting: Mapping[str, str], name: str, result: EpisodeResults, first: EpisodeResults) -> Row:
    hours = result.horizon_s / SECONDS_PER_HOUR
    change = None
    if result is not first:
        base_usd = first.margin_usd / (first.horizon_s / SECONDS_PER_HOUR) * hours
        change = paired_estimate(result.margin_usd - base_usd, hours)
    busy = np.average(result.utilisation.mean(axis=0), weights=result.pool_replicas)
    return Row(
        setting,
        name,
        paired_estimate(result.margin_usd, hours),
        change,
        100.0 * float(np.nanmin(result.share("slo_ok"))),
        100.0 * float(np.nanmax(shed_shares(result))),
        100.0 * float(busy),
    )


def break_even(rows: Sequence[Row], key: str) -> dict[str, list[float]]:
    """By policy: values of a numeric key at which the margin is zero, linear between neighbours; {} of other keys."""
    found: dict[str, list[float]] = {}
    for name in dict.fromkeys(row.policy for row in rows):
        points = [(_number(row.setting[key]), row.margin_usd_per_hour.mean) for row in rows if row.policy == name]
        if not all(math.isfinite(x) for x, _ in points):
            return {}
        found[name] = zeros(points)
    return found


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def to_plan_document(scenario: str, rows: Sequence[Row]) -> dict[str, Any]:
    """The rows as plain data."""
    return {
        "schema": 1,
        "scenario": scenario,
        "settings": [
            {
                "setting": dict(row.setting),
                "policy": row.policy,
                "margin_usd_per_hour": row.margin_usd_per_hour.to_dict(),
                "change_usd_per_hour": row.change_usd_per_hour and row.change_usd_per_hour.to_dict(),
                "slo_attainment_min": row.slo_pct / 100.0,
                "lost_max": row.lost_pct / 100.0,
                "utilisation": row.busy_pct / 100.0,
            }
            for row in rows
        ],
        "break_even": {key: break_even(rows, key) for key in rows[0].setting} if len(rows[0].setting) == 1 else {},
    }
