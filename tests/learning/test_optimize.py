"""--optimize: a study that can be interrupted, and what it prints."""

import json
import shlex

import optuna
from jobs import Here

import train
from agents.config import load_training
from agents.optimize import DATABASE, SEARCHED, STUDY, open_study, optimize, suggest
from agents.run import Run
from agents.workers import Crew


def test_the_search_is_resumable_and_prints_a_command(tmp_path, tiny_arguments, tuned_cache, capsys):
    run = tmp_path / "search"
    assert train.main([*tiny_arguments, "-n", "256", "--optimize", "2", "--workers", "1", "--out", str(run)]) == 0
    storage = f"sqlite:///{run / DATABASE}"
    study = optuna.load_study(study_name=STUDY, storage=storage)
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "COMPLETE"]
    config = Run(run).config()
    assert study.trials[0].params == {name: getattr(config, name) for name in SEARCHED}  # as they are
    study.ask()  # an interrupted training
    info = Run(run).info() | {"optimize": 3}
    (run / "run.json").write_text(json.dumps(info))
    assert train.main(["--resume", str(run), "--workers", "1"]) == 0
    states = [trial.state.name for trial in optuna.load_study(study_name=STUDY, storage=storage).trials]
    assert states == ["COMPLETE", "COMPLETE", "FAIL", "COMPLETE"]
    command = capsys.readouterr().out.splitlines()[-1]
    words = train.parser().parse_args(shlex.split(command)[2:])
    assert words.scenario == "quickstart" and {word.split("=")[0] for word in words.set} == {
        "horizon_s", "requests_per_episode", *(f"training.{name}" for name in SEARCHED)
    }  # fmt: skip


def test_workers_change_no_number(tmp_path, tiny_plant, tiny_tuned, tiny_config):
    """Three trials one after the other, or by two workers of which one dies."""
    advice = tiny_tuned[0]["bid-price-fitted"].policy
    config = tiny_config.model_copy(update={"steps": 256})
    found = {}
    for name, workers in (("one", 1), ("two", Crew(Here(2, dies_of=[2])))):
        run = Run(tmp_path / name)
        run.create(tiny_plant.scenario, config, 0, "a test")
        optimize(tiny_plant, advice, config, run, 0, 3, workers=workers)
        trials = open_study(run.folder, config, 0).trials
        found[name] = [(trial.number, trial.params, trial.value) for trial in trials]
        assert Run(run.folder / "trials" / "0002").config().learning_rate == trials[2].params["learning_rate"]
    assert found["one"] == found["two"] and [number for number, *_ in found["one"]] == [0, 1, 2]


def test_every_suggestion_is_legal(tmp_path):
    config = load_training(None, {})
    study = open_study(tmp_path, config, 0)
    for _ in range(8):
        changed = suggest(study.ask(), config)
        assert changed.steps == config.steps and changed.minibatch == config.minibatch


def test_bad_numbers_and_floors_are_refused(tmp_path, capsys):
    assert train.main(["--optimize", "0", "--out", str(tmp_path / "a")]) == 2
    assert train.main(["--optimize", "2", "--floor", "slo.team=0.9", "--out", str(tmp_path / "b")]) == 2
    assert "legal is" in capsys.readouterr().err and not (tmp_path / "b").exists()
