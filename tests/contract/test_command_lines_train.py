"""train.py from start to export: what a run leaves, interruption by Ctrl-C, and going on."""

import json
import os
import shutil
import signal
import threading

import numpy as np
import pytest
import torch

import evaluate
import export
import train
from agents import baselines, run_lines
from agents.archive import load_archive
from agents.run import Run, load_bundle
from envs.worlds import FleetWorlds
from marginroute import bundle

BID_PRICES = ("bid-price", "bid-price-fitted", "bid-price-adaptive")


def test_what_a_run_leaves(finished_run):
    left = {path.name for path in finished_run.iterdir()}
    assert {"run.json", "scenario.json", "training.json", "baselines.yaml", "policy.zip", "checkpoints"} <= left
    assert not [name for name in left if name.startswith((".", "tmp"))]
    assert not [path for path in (finished_run / "checkpoints").iterdir() if path.suffix != ".zip"]
    info = Run(finished_run).info()
    assert info["status"] == "finished" and info["seed"] == 0
    assert info["command"].startswith("python train.py quickstart --set horizon_s=5")
    assert [row["steps"] for row in info["history"]] == sorted(row["steps"] for row in info["history"])
    assert info["gate"]["learned"] in (True, False) and info["gate"]["episodes"] == 2
    assert np.isfinite(info["gate"]["ci95"]).all()


def test_tensorboard_has_the_fleets_metrics(finished_run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    [folder] = (finished_run / "tb").iterdir()
    events = EventAccumulator(str(folder))
    events.Reload()
    assert {"fleet/margin_usd_per_1k", "fleet/validation_margin_usd_per_1k"} <= set(events.Tags()["scalars"])


def test_checkpoints_come_at_the_stated_interval(finished_run):
    steps = [int(path.stem.removeprefix("step_")) for path in sorted((finished_run / "checkpoints").iterdir())]
    assert steps[-1] == 1024 and 512 in steps


def test_the_gate_decides_what_is_exported(finished_run):
    read = bundle.load(finished_run / "bundle")
    assert (read.learned == "residual") == Run(finished_run).info()["gate"]["learned"]
    assert read.scenario == Run(finished_run).info()["scenario"]
    assert read.fallback.name == "bid-price"


@pytest.mark.parametrize("learned", [True, False])
def test_export_writes_what_the_gate_said(finished_run, tmp_path, learned, capsys):
    """The same run with either verdict: the network, or the advice under the policy's name."""
    run = shutil.copytree(finished_run, tmp_path / "run")
    info = json.loads((run / "run.json").read_text())
    info["gate"]["learned"] = learned
    (run / "run.json").write_text(json.dumps(info))
    assert export.main([str(run), "--out", str(tmp_path / "bundle")]) == 0
    assert ("residual" if learned else "none") in capsys.readouterr().out
    read = bundle.load(tmp_path / "bundle")
    assert read.learned == ("residual" if learned else "none")
    assert read.policy.name == load_bundle(run).guarded().name == "marginroute"


def test_export_again_gives_the_runs_own_bundle(finished_run, tmp_path):
    assert export.main([str(finished_run), "--out", str(tmp_path / "bundle")]) == 0
    ours, theirs = tmp_path / "bundle", finished_run / "bundle"
    assert {path.name: path.read_bytes() for path in ours.iterdir()} == {
        path.name: path.read_bytes() for path in theirs.iterdir()
    }


def test_evaluation_takes_a_run_and_a_bundle(finished_run, tmp_path, capsys):
    words = ["quickstart", "--set", "horizon_s=5", "requests_per_episode=25", "--episodes", "2", "--workers", "1"]
    report = tmp_path / "report.json"
    policies = ["--policy", str(finished_run), "--baselines", "bid-price,random", "--json", str(report)]
    assert evaluate.main([*words, *policies]) == 0
    document = json.loads(report.read_text())
    assert set(document["policies"]) == {"marginroute", "bid-price", "random"}
    capsys.readouterr()
    assert export.main([str(finished_run), "--out", str(tmp_path / "b"), "--evaluation", str(report)]) == 0
    assert bundle.load(tmp_path / "b").evaluation["policies"].keys() == document["policies"].keys()


def test_evaluation_plays_what_a_run_was_trained_on(finished_run, capsys):
    """Without a scenario its own is played, overrides included; another one is played, and said to be another."""
    words = ["--policy", str(finished_run), "--baselines", "none", "--episodes", "2", "--workers", "1"]
    trained_on = json.loads((finished_run / "scenario.json").read_text())
    for more, note in (([], ""), (["--set", "horizon_s=7"], "another quickstart")):
        assert evaluate.main([*words, *more]) == 0
        out, err = capsys.readouterr()
        assert f"{2 * trained_on['requests_per_episode']} requests" in out
        assert note in err


def test_a_finished_run_can_be_resumed(finished_run, tmp_path, tuned_cache):
    """Nothing is left to learn: gate and export are repeated, with the same result."""
    run = shutil.copytree(finished_run, tmp_path / "run")
    assert train.main(["--resume", str(run)]) == 0
    assert (run / "bundle" / "manifest.json").read_bytes() == (finished_run / "bundle" / "manifest.json").read_bytes()


LONG = 65_536  # steps, long enough to be interrupted


def interrupted_when(ready, main, words):
    """Runs a command and presses Ctrl-C, so to speak, as soon as `ready()` holds; returns its exit code."""
    over = threading.Event()

    def wait():
        while not over.wait(0.005):
            if ready():
                os.kill(os.getpid(), signal.SIGINT)
                return

    thread = threading.Thread(target=wait, daemon=True)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it for what runs in background
    thread.start()
    try:
        return main(words)
    finally:
        over.set()
        thread.join()
        signal.signal(signal.SIGINT, before)


def first_validation(run):
    """Whether the first validation has been noted, before anything was learned."""
    try:
        return bool(json.loads((run / "run.json").read_text())["history"])
    except (OSError, ValueError):
        return False


def first_checkpoint(run):
    """Whether some of the steps have been learned."""
    return any((run / "checkpoints").glob("step_*.zip"))


@pytest.fixture(scope="module", params=[first_validation, first_checkpoint], ids=lambda moment: moment.__name__)
def interrupted(request, tmp_path_factory, tiny_arguments, tuned_cache):
    """(exit code, folder) of a run that was interrupted at the given moment."""
    run = tmp_path_factory.mktemp("runs") / "interrupted"
    words = [*tiny_arguments, "--out", str(run), "-n", str(LONG)]
    return interrupted_when(lambda: request.param(run), train.main, words), run


def test_interruption_leaves_a_usable_checkpoint(interrupted, capsys):
    code, run = interrupted
    assert code == 130
    assert Run(run).info()["status"] == "interrupted"
    model = load_archive(Run(run).newest_checkpoint(), None)
    assert 0 <= model.num_timesteps < LONG
    assert all(torch.isfinite(x).all() for x in model.policy.state_dict().values())
    assert {path.suffix for path in (run / "checkpoints").iterdir()} == {".zip"}
    assert not (run / "bundle").exists()
    assert export.main([str(run), "--out", str(run / "never")]) == 2
    assert not (run / "never").exists()


def test_resume_finishes(interrupted, tmp_path, tuned_cache, capsys):
    run = shutil.copytree(interrupted[1], tmp_path / "run")
    before = load_archive(Run(run).newest_checkpoint(), None).num_timesteps
    assert train.main(["--resume", str(run)]) == 0
    assert f"run folder {run}" in capsys.readouterr().out
    info = Run(run).info()
    assert info["status"] == "finished"
    steps = [row["steps"] for row in info["history"]]
    assert steps == sorted(steps) and steps[0] == 0 and steps[-1] >= LONG
    assert before < load_archive(Run(run).newest_checkpoint(), None).num_timesteps
    policy = load_bundle(run).guarded()
    worlds = FleetWorlds(Run(run).scenario(), 1)
    worlds.load(0, worlds.plant.scenario.generate(0, "heldout"))
    worlds.run(policy)
    assert worlds.done.all()


def test_a_run_interrupted_before_learning_can_be_resumed(tmp_path, tiny_arguments, tuned_cache, monkeypatch):
    """Ctrl-C while the normaliser is fitted: there is no checkpoint yet, and nothing is lost by starting over."""

    def interrupt(*_):
        raise KeyboardInterrupt

    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr("agents.train.fit_normaliser", interrupt)
        assert train.main([*tiny_arguments, "--out", str(run)]) == 130
    assert Run(run).info()["status"] in ("started", "interrupted")
    assert train.main(["--resume", str(run)]) == 0
    assert Run(run).info()["status"] == "finished"


def test_tuning_is_part_of_a_run_without_tuned_values(tmp_path, tiny_arguments, tiny_tuned, monkeypatch):
    """No cache: margin rules are tuned before the training and the others after it, all are kept in the run and in the
    cache, and found there by the next run."""
    calls = []

    def tuner(margin):
        def tune(plant, budget, progress, crew):
            assert crew is None
            calls.append(budget.requests)
            progress(1, 1)
            return {name: x for name, x in tiny_tuned[0].items() if (name in BID_PRICES) == margin}

        return tune

    monkeypatch.setattr("agents.baselines.CACHE", tmp_path / "cache")
    monkeypatch.setattr("agents.run_baselines.tune_margin_rules", tuner(True))
    monkeypatch.setattr("agents.run_baselines.tune_others", tuner(False))
    words = [*tiny_arguments, "training.tuning_requests=777"]
    assert train.main([*words, "--out", str(tmp_path / "one")]) == 0
    assert calls == [777, 777]
    assert set(baselines.load(tmp_path / "one" / "baselines.yaml")[1]) == set(tiny_tuned[0])
    [cached] = (tmp_path / "cache").iterdir()
    assert cached.read_text() == (tmp_path / "one" / "baselines.yaml").read_text()
    assert train.main([*words, "--out", str(tmp_path / "two")]) == 0
    assert calls == [777, 777]
    assert train.main([*words, "--out", str(tmp_path / "three"), "--retune"]) == 0
    assert calls == [777] * 4


def test_a_run_says_when_it_reached_the_tuned_bid_price(finished_run):
    info = Run(finished_run).info()
    reached = info["parity"].get("reached")
    if reached is None:
        assert max(row["margin_usd_per_1k"] for row in info["history"]) < 0.995 * info["parity"]["bid_price_usd_per_1k"]
        assert "never" in run_lines.parity_line(info)
    else:
        assert reached["steps"] in [row["steps"] for row in info["history"]] and reached["s"] > 0.0
        assert f"after {reached['s']:.0f} s" in run_lines.parity_line(info)


def test_list_names_every_shipped_scenario(capsys):
    assert train.main(["--list"]) == 0
    shown = capsys.readouterr().out
    assert "quickstart" in shown and "azure_conversation" in shown
