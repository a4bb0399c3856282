"""What train.py says of a run and its stages, in one line each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from agents.log_quality import FittedAbilities
from envs.scenario import Scenario


def refit_line(log: Path, fit: FittedAbilities, scenario: Scenario) -> str:
    """How much the outcomes of a log change who answers what well."""
    moved = np.abs(fit.ability - np.array(scenario.workload_spec.quality.ability))
    return (
        f"{log.name}: {fit.labels.sum():,} labelled answers move the tiers' abilities by {moved.mean():.2f} probits on "
        f"average, {moved.max():.2f} at most; their standard errors are {fit.sd.min():.2f} to {fit.sd.max():.2f}"
    )


def search_line(found: dict[str, Any], advice: str) -> str:
    """What a search of the training's settings has found."""
    return (
        f"best of {found['trials']} trainings: {found['gain_usd_per_1k']:+z.4f} USD per 1k over {advice} on "
        f"validation, settings as they are {found['as_it_is_usd_per_1k']:+z.4f}; train with it on other seeds:"
    )


def out_of_reach(verdict: dict[str, Any]) -> str:
    """Why neither the learned policy nor the heuristic may be exported: a sentence for an `InputError`."""
    return (
        "no policy keeps the floors on validation episodes: of the heuristic "
        f"{'; '.join(verdict['heuristic_breaks'])}; the learned policy was refused since "
        f"{'; '.join(verdict['refused'])}; nothing is exported, legal are floors within reach"
    )


def controller_line(controller: dict[str, Any]) -> str:
    """What the engine said of the controller, in one line."""
    verdict, rule = controller["gate"], controller["rule"]
    if "vs" not in verdict:
        return f"controller: {rule} (learned: none; not trained)"
    interval = "none" if verdict["ci95"] is None else "[{:+z.4f}, {:+z.4f}]".format(*verdict["ci95"])
    exported = "the learned controller" if verdict["learned"] else f"{rule} (learned: none)"
    why = f"; refused: {'; '.join(verdict['refused'])}" if verdict["refused"] else ""
    return (
        f"controller gate: learned minus {rule} = {verdict['delta_usd_per_1k']:+z.4f} USD per 1k requests of "
        f"{verdict['episodes']} validation days on the engine, 95 % {interval}; exported: {exported}{why}"
    )


def parity_line(info: dict[str, Any]) -> str:
    """When the policy reached the tuned bid price on validation episodes, and when it passed it."""
    parity = info.get("parity")
    if parity is None:
        return "parity: not timed in a run that was resumed before its first validation"
    found = []
    for words, key in (("within 0.5 %", "reached"), ("above it", "passed")):
        moment = parity.get(key)
        found.append(
            f"{words} {'never' if moment is None else 'after {s:.0f} s ({steps:,} decisions)'.format(**moment)}"
        )
    return f"tuned bid price on validation: {parity['bid_price_usd_per_1k']:.4f} USD per 1k; policy {', '.join(found)}"


def verdict_line(verdict: dict[str, Any], advice: str) -> str:
    """What the gate found, in one line."""
    interval = "none" if verdict["ci95"] is None else "[{:+z.4f}, {:+z.4f}]".format(*verdict["ci95"])
    exported = "the learned policy" if verdict["learned"] else f"{advice} (learned: none)"
    floors = "".join(
        f"; {key} {x['learned']:.4f} (heuristic {x['heuristic']:.4f}, floor {x['limit']:g})"
        for key, x in verdict.get("floors", {}).items()
    )
    why = f"; refused: {'; '.join(verdict['refused'])}" if verdict["refused"] else ""
    return (
        f"gate: learned minus {advice} = {verdict['delta_usd_per_1k']:+z.4f} USD per 1k validation requests, 95 % "
        f"{interval} of {verdict['observations']} observations{floors}; exported: {exported}{why}"
    )
