"""The stages of a training, where what learns meets who examines: see train.py for their order.

Each shows its progress. The router and the controller are trained, chosen and asked by their gate; a gateway's log
teaches before that and judges after it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from agents import control_run
from agents.control_train import train_controller
from agents.export import Levers
from agents.floors import Floor, Kept
from agents.network import ScorerPolicy
from agents.objective import Rule
from agents.run import Run, Training, load_bundle
from agents.run_lines import refit_line
from agents.train import choose_strength, train
from agents.watch import Parity
from agents.workers import Crew
from envs.control_plant import ControlPlant
from envs.plant import Plant
from envs.scenario import Scenario
from evaluation.control_gate import choose, control_gate
from evaluation.gate import gate
from evaluation.log_training import judge, judged_line, refit
from evaluation.progress import progress_bar
from marginroute.features import FeatureSpec
from marginroute.margin_rule import MarginRule

NOT_TRAINED = {"learned": False, "refused": ["not trained (training.deciders)"]}

Log = Callable[[dict[str, Any]], None]  # takes metrics of a training


def refit_on(log: Path, scenario: Scenario) -> dict[str, Any]:
    """What the outcomes of a log change in the scenario, by dotted key; prints how much."""
    with progress_bar(f"reading {log.name} (bytes)") as progress:
        overrides, fit = refit(scenario, log, progress)
    print(refit_line(log, fit, scenario))
    return overrides


class Router(NamedTuple):
    """A trained router, its feature spec, and what the gate says of it."""

    policy: ScorerPolicy | None
    spec: FeatureSpec | None
    verdict: dict[str, Any]


def router_stage(
    training: Training,
    plant: Plant,
    advice: MarginRule,
    fallback: Rule,
    kept: Kept | None,
    floors: Sequence[Floor],
    log: Log,
    crew: Crew | None,
) -> Router:
    """Trains the router, chooses on validation how far its correction is followed, and asks the gate."""
    run, config = training.run, training.config
    with progress_bar("training (decisions)") as progress:
        policy, spec = train(
            plant,
            advice,
            config,
            run,
            training.seed,
            resume=training.resumed,
            progress=progress,
            log=log,
            kept=kept,
            parity=Parity(fallback, training.started_s),
            crew=crew,
        )
    with progress_bar("strength of the correction (validation episodes)") as progress:
        choose_strength(plant, policy, advice, spec, config, run, progress)
    with progress_bar("gate (validation episodes)") as progress:
        return Router(policy, spec, gate(plant.scenario, policy, advice, spec, config, progress, floors))


def controller_stage(training: Training, log: Log) -> Levers:
    """Tunes the heuristic controllers, trains one, and asks the engine: what the bundle holds beside its router.

    On the engine the tuned router decides on requests, at the price that is best beside the tuned controller.
    """
    run, scenario, settings = training.run, training.scenario, training.config.controller
    plant = ControlPlant(scenario)
    with progress_bar(f"tuning the controllers ({settings.tuning_ticks:,} ticks per restart)") as progress:
        rules, best = control_run.tuned_rules(run, plant, progress)
    rule = rules[best]
    with progress_bar("price of congestion beside the controller (validation days)") as progress:
        router = control_run.priced_router(run, plant, rule, progress)
    if training.config.deciders == "router":
        control_run.keep(run, best, None, {"gate": dict(NOT_TRAINED)})
        return control_run.exported_levers(run, plant)
    with progress_bar("training the controller (ticks)") as progress:
        candidates = train_controller(
            plant, rule, settings, run, training.seed, resume=training.resumed, progress=progress, log=log
        )
    with progress_bar("choosing on the engine (validation days)") as progress:
        chosen, gains = choose(scenario, candidates, rule, router, settings.choice_episodes, progress)
    with progress_bar("gate on the engine (validation days)") as progress:
        verdict = control_gate(scenario, candidates[chosen], rule, router, settings, progress)
    control_run.keep(run, best, chosen, {"gains_usd_per_1k": {str(k): x for k, x in gains.items()}, "gate": verdict})
    return control_run.exported_levers(run, plant)


def judge_on(log: Path, run: Run) -> None:
    """Says off-policy what the exported policy would have earned on the part of a log that nothing was fitted on."""
    with progress_bar("off-policy (bytes)") as progress:
        judged = judge(log, load_bundle(run.folder), progress)
    run.update(off_policy=judged)
    print(judged_line(judged))
