"""The tuned baselines of a run: found where they were kept before or tuned now, and held to floors."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from agents import baselines
from agents.floors import Floor, Kept, keep_floors
from agents.run import Run
from agents.search import Budget
from agents.tuning import tune_margin_rules, tune_others
from agents.workers import Crew
from envs.plant import Plant
from envs.progress import Bar


def tuned_baselines(run: Run, plant: Plant, whole: bool, bar: Bar, crew: Crew | None = None) -> Path:
    """The run's file of tuned baselines: the margin rules at least, all of them if `whole`.

    Args:
        run: whose file it is.
        plant: of what a router learns in.
        whole: whether the other baselines are needed, too.
        bar: shows how far the tuning is.
        crew: shares it out.
    """
    scenario, target = run.scenario(), run.folder / baselines.FILE
    budget, command = Budget.of(run.config().tuning_requests, plant.scenario), run.info()["command"]
    if not target.is_file():
        found = None if run.info().get("retune") else baselines.find(scenario)
        if found is not None:
            shutil.copyfile(found, target)
            baselines.tell_loose(baselines.load(target)[0])
            return target
        with bar(f"tuning the bid price ({budget.requests:,} requests per restart)") as progress:
            baselines.save(target, scenario, tune_margin_rules(plant, budget, progress, crew), budget, command)
        baselines.tell_loose(baselines.load(target)[0])
    if whole and not baselines.is_whole(target):
        with bar(f"tuning the other baselines ({budget.requests:,} requests per restart)") as progress:
            baselines.save(target, scenario, tune_others(plant, budget, progress, crew), budget, command)
        baselines.remember(scenario, target)
    return target


def hold_floors(run: Run, plant: Plant, path: Path, floors: Sequence[Floor]) -> dict[str, Kept]:
    """Gives the margin rules of a run's file the multipliers that keep the floors, and takes down how far that goes.

    Returns:
        What was found, by the rule's name; nothing without floors.
    """
    if not floors:
        return {}
    held = {name: keep_floors(plant, rule, floors) for name, rule in baselines.margin_rules(path).items()}
    baselines.replace_rules(path, {name: x.rule for name, x in held.items()})
    run.update(heuristic_floors={name: {"kept": x.found.kept, "reached": x.found.shares} for name, x in held.items()})
    return held
