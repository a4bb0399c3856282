"""Searches the training configuration: Optuna's TPE over trainings, one folder and one row of a database each.

A trial trains with its settings and is scored by what its policy earns more than its advice on validation episodes that
no checkpoint, and no gate, is chosen on. The first trial has the settings as they are. Trials are suggested `BATCH` at
a time and carried out side by side, so that what is suggested does not depend on how many workers there are. Trials
that were interrupted count as failed and are made again; the study goes on where its database stops.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna

from agents.config import TrainingConfig
from agents.export import residual_policy
from agents.objective import Objective
from agents.run import Run
from agents.train import train
from agents.workers import Crew, shared_out
from envs.plant import Plant
from envs.progress import Progress, silent
from envs.scenario import Scenario
from marginroute.margin_rule import MarginRule

STUDY, DATABASE = "training", "optimize.db"
FIRST_SEED, EPISODES = 20_000, 48  # validation episodes that score a trial
BATCH = 4


SEARCHED = (
    "learning_rate",
    "epochs",
    "gae_lambda",
    "clip_range",
    "entropy_coefficient",
    "tau_s",
    "width",
    "temperature_share",
)


def suggest(trial: optuna.Trial, config: TrainingConfig) -> TrainingConfig:
    """Settings of a trial."""
    values: dict[str, Any] = {
        "learning_rate": trial.suggest_float("learning_rate", 1e-4, 5e-3, log=True),
        "epochs": trial.suggest_int("epochs", 1, 8),
        "gae_lambda": trial.suggest_float("gae_lambda", 0.0, 1.0),
        "clip_range": trial.suggest_float("clip_range", 0.05, 0.4, log=True),
        "entropy_coefficient": trial.suggest_float("entropy_coefficient", 0.0, 0.02),
        "tau_s": trial.suggest_float("tau_s", 0.0, 30.0),
        "width": trial.suggest_int("width", 8, 128, log=True),
        "temperature_share": trial.suggest_float("temperature_share", 0.01, 0.1, log=True),
    }
    return TrainingConfig.model_validate({**config.model_dump(), **values})


def open_study(folder: Path, config: TrainingConfig, seed: int) -> optuna.Study:
    """The study of a run folder, begun or gone on with."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    storage = f"sqlite:///{folder / DATABASE}"
    study = optuna.create_study(study_name=STUDY, storage=storage, direction="maximize", load_if_exists=True)
    for trial in study.get_trials(states=(optuna.trial.TrialState.RUNNING,)):
        study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
    study.sampler = optuna.samplers.TPESampler(seed=seed + len(study.trials), constant_liar=True)
    if not study.trials:
        study.enqueue_trial({name: getattr(config, name) for name in SEARCHED})
    return study


def start_trials(
    scenario: Scenario, advice: MarginRule, seed: int, command: str
) -> Callable[[tuple[int, TrainingConfig]], tuple[int, float, dict[str, bytes]]]:
    """What a worker makes trials with: of a number and its settings come the number, its gain, and its run folder."""
    plant = Plant(scenario)
    judge = Objective(plant, "validation", range(FIRST_SEED, FIRST_SEED + EPISODES))
    advice_usd = float(judge([advice])[0])

    def trial(numbered: tuple[int, TrainingConfig]) -> tuple[int, float, dict[str, bytes]]:
        number, settings = numbered
        with tempfile.TemporaryDirectory() as scratch:
            run = Run(Path(scratch) / "trial")
            run.create(scenario, settings, seed, command)
            policy, spec = train(plant, advice, settings, run, seed)
            paths = [path for path in run.folder.rglob("*") if path.is_file()]
            files = {str(path.relative_to(run.folder)): path.read_bytes() for path in paths}
        gain_usd = float(judge([residual_policy(policy, advice, spec)])[0]) - advice_usd  # type: ignore[list-item]
        return number, gain_usd, files

    return trial


def optimize(
    plant: Plant,
    advice: MarginRule,
    config: TrainingConfig,
    run: Run,
    seed: int,
    trials: int,
    progress: Progress = silent,
    workers: int | Crew = 1,
) -> dict[str, Any]:
    """Trains until the study has so many finished trials.

    Args:
        plant: the scenario's constants.
        advice: what the networks correct.
        config: settings to begin with.
        run: folder of the study; trials are in its folder `trials`.
        seed: of all trainings, and of the search.
        trials: finished ones to have in the end.
        progress: called with (finished, trials).
        workers: a crew, or processes, 1 for this one; they share out the trials, with the same numbers.

    Returns:
        settings: the best by name; gain_usd_per_1k: theirs, with the chance of the best of many; as_it_is_usd_per_1k:
        that of the settings that it began with; trials.
    """
    study = open_study(run.folder, config, seed)
    arguments = (plant.scenario, advice, seed, run.info()["command"])
    complete = (optuna.trial.TrialState.COMPLETE,)
    while (done := len(study.get_trials(states=complete))) < trials:
        progress(done, trials)
        asked = [study.ask() for _ in range(min(BATCH, trials - done))]
        items = [(trial.number, suggest(trial, config)) for trial in asked]
        for number, gain_usd, files in shared_out(start_trials, arguments, items, workers):
            for name, content in files.items():
                path = run.folder / "trials" / f"{number:04d}" / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
            study.tell(number, gain_usd)
            done += 1
            progress(done, trials)
    progress(trials, trials)
    first = study.get_trials(states=complete)[0]
    return {
        "settings": dict(study.best_params),
        "gain_usd_per_1k": study.best_value,
        "as_it_is_usd_per_1k": first.value,
        "trials": trials,
    }
