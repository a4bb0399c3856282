"""Same seed, same bytes: a training can be repeated from its folder."""

import json
import zipfile

import numpy as np
import pytest
import torch

from agents.config import TrainingConfig
from agents.export import export
from agents.run import Run
from agents.train import train

KEEPS_TIME = ("provenance", "digest")  # the command is in the one, and the one is in the other


def make(folder, plant, tuned, config, seed):
    """Trains and exports the learned policy, gate or no gate; (weights, folder of the bundle)."""
    rules = {name: found.policy for name, found in tuned.items()}
    run = Run(folder)
    run.create(plant.scenario, config, seed, f"a test in {folder}")
    advice = rules["bid-price-fitted"]
    policy, spec = train(plant, advice, config, run, seed)
    command = {"command": run.info()["command"]}
    export(plant, policy, advice, spec, rules["bid-price"], run.bundle_path, {}, command)
    newest = run.newest_checkpoint()
    with zipfile.ZipFile(newest) as archive, archive.open("policy.pth") as file:
        weights = torch.load(file, weights_only=True)
    return weights, run


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_plant, tiny_tuned, tiny_config):
    """Twice with seed 1, once with seed 2."""
    folder = tmp_path_factory.mktemp("same")
    seeds = {"a": 1, "b": 1, "c": 2}
    return [make(folder / name, tiny_plant, tiny_tuned[0], tiny_config, seed) for name, seed in seeds.items()]


def test_same_seed_same_weights(runs):
    (first, _), (again, _), (other, _) = runs
    assert set(first) == set(again)
    assert all(torch.equal(first[name], again[name]) for name in first)
    moved = [name for name in first if not torch.equal(first[name], other[name])]
    assert "scorer.head.weight" in moved and "scorer.candidate.weight" in moved


def test_training_moved_the_head(runs):
    assert runs[0][0]["scorer.head.weight"].abs().max() > 0.0


def test_same_seed_same_bundle(runs):
    (_, first), (_, again), (_, other) = runs
    for name in ("weights.npz", "parity.npz"):
        assert (first.bundle_path / name).read_bytes() == (again.bundle_path / name).read_bytes(), name
    assert (first.bundle_path / "weights.npz").read_bytes() != (other.bundle_path / "weights.npz").read_bytes()
    manifests = [json.loads((run.bundle_path / "manifest.json").read_text()) for _, run in runs[:2]]
    assert manifests[0]["digest"] != manifests[1]["digest"]  # the commands differ
    for manifest in manifests:
        for name in KEEPS_TIME:
            del manifest[name]
    assert manifests[0] == manifests[1]


def test_same_seed_same_history(runs):
    histories = [run.info()["history"] for _, run in runs]
    assert histories[0] == histories[1]
    steps = [row["steps"] for row in histories[0]]
    assert steps[0] == 0 and steps[-1] == 1024 and steps == sorted(steps)


def test_the_folder_holds_what_it_takes_to_repeat(runs, tiny_plant, tiny_config):
    _, run = runs[0]
    assert run.config() == tiny_config and isinstance(run.config(), TrainingConfig)
    assert run.scenario().hash == tiny_plant.scenario.hash == run.info()["scenario"]["hash"]
    assert run.info()["seed"] == 1
    ours, theirs = run.scenario().generate(3, "heldout"), tiny_plant.scenario.generate(3, "heldout")
    for name in ours.array_names():
        np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))
    assert {"python", "torch", "numpy", "stable-baselines3"} <= set(run.info()["versions"])
