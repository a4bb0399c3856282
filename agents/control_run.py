"""The controller's part of a run folder: tuned rules, training, and what goes into the bundle."""

from __future__ import annotations

import shutil
from typing import Any

from agents import baselines
from agents.control_train import control_parity, load_controller
from agents.control_tuning import control_budget, prices_beside, tune_controllers
from agents.export import PARITY_SAMPLES, Levers
from agents.run import Run
from envs.control_plant import ControlPlant
from envs.progress import Progress
from marginroute.control_rules import RuleController
from marginroute.margin_rule import MarginRule


def tuned_rules(run: Run, plant: ControlPlant, progress: Progress) -> tuple[dict[str, RuleController], str]:
    """The run's tuned controllers, found in its file of baselines or tuned now, and the name of the best."""
    path = run.folder / baselines.FILE
    rules, best = baselines.load_controllers(path, plant.layout)
    if not rules:
        budget = control_budget(run.config().controller.tuning_ticks)
        baselines.save_controllers(path, tune_controllers(plant, budget, progress), budget)
        baselines.remember(plant.plant.scenario, path)
        rules, best = baselines.load_controllers(path, plant.layout)
    return rules, best


def priced_router(run: Run, plant: ControlPlant, rule: RuleController, progress: Progress) -> MarginRule:
    """The run's tuned router at the price of congestion that is best beside a rule; found now if its file lacks it."""
    path, fitted = run.folder / baselines.FILE, run.config().fitted
    if "router" not in baselines.load(path)[0]["controllers"]:
        router = baselines.advice_and_fallback(path, fitted)[0]
        baselines.save_prices_beside(path, prices_beside(plant, router, rule, progress))
        baselines.remember(plant.plant.scenario, path)
    return baselines.router_beside(path, fitted)


def exported_levers(run: Run, plant: ControlPlant) -> Levers:
    """The controller that a finished run exports: as its gate decided."""
    rules, best = baselines.load_controllers(run.folder / baselines.FILE, plant.layout)
    scenario, rule = plant.plant.scenario, rules[best]
    if not run.info()["controller"]["gate"]["learned"]:
        return Levers(scenario, rule)
    controller, policy = load_controller(run.controller_path, rule)
    return Levers(scenario, controller, control_parity(plant, rule, policy, PARITY_SAMPLES))


def keep(run: Run, rule: str, chosen: int | None, found: dict[str, Any]) -> None:
    """Takes down what the engine said, and keeps the chosen archive."""
    if chosen is not None:
        shutil.copyfile(run.controller_checkpoint(chosen), run.controller_path)
    run.update(controller={"rule": rule, "chosen_after_ticks": chosen, **found})
