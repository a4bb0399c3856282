"""Controllers in bundles: what was exported decides the same when it is loaded, and spoiled archives are refused."""

import dataclasses
import shutil

import numpy as np
import pytest
from bundles import small_bundle

from marginroute import bundle as bundles
from marginroute.card import model_card
from marginroute.control import AGES, ControlLayout, ControlView, Levels, observation_names
from marginroute.control_policy import ControlNetwork, LearnedController, network_inputs
from marginroute.control_rules import standard_rules
from marginroute.errors import InputError

LAYOUT = ControlLayout(
    pool_names=("small", "large"),
    class_names=("standard", "premium", "batch"),
    provider_names=("api",),
    tick_s=60.0,
    min_replicas=np.array([1.0, 0.0]),
    max_replicas=np.array([4.0, 2.0]),
    start_replicas=np.array([2.0, 1.0]),
    slots=np.array([8.0, 8.0]),
    lag_s=np.array([240.0, 360.0]),
    requests_per_s=np.array([2.0, 1.5]),
    deadline_s=np.array([np.inf, np.inf, 7200.0]),
    season_per_s=np.random.default_rng(0).uniform(0.5, 3.0, (24, 3)),
    allowance=np.array([10.0]),
    refill_per_s=np.array([1.0]),
)


def random_views(n, seed=0, fresh=True):
    """Views as a gateway or N worlds could have them."""
    rng, levels = np.random.default_rng(seed), Levels(LAYOUT, n)
    levels.reset(slice(None), rng.uniform(0.0, 86400.0, n))
    return ControlView(
        layout=LAYOUT,
        time_s=rng.uniform(0.0, 86400.0, n),
        fresh=np.full(n, fresh),
        pools=rng.uniform(0.0, 8.0, (n, 2, 8)),
        classes=rng.uniform(0.0, 100.0, (n, 3, 4)),
        held=rng.uniform(0.0, 500.0, (n, 3, AGES)),
        fast=levels.fast,
        slow=levels.slow,
        allowance=rng.uniform(0.0, 10.0, (n, 1)),
    )


def random_controller(seed=0):
    """A learned controller with random weights that corrects everything but shedding."""
    rng, width = np.random.default_rng(seed), 16
    d, a = len(observation_names(LAYOUT)) + len(LAYOUT.lever_names), len(LAYOUT.lever_names)
    shapes = {"first": (d, width), "bias_1": width, "second": (width, width), "bias_2": width, "head": (width, a)}
    weights = {name: rng.normal(0.0, 0.4, shape).astype(np.float32) for name, shape in shapes.items()}
    step = np.where([name.startswith("shed") for name in LAYOUT.lever_names], 0.0, 0.1).astype(np.float32)
    normaliser = {"mean": np.zeros(d, np.float32), "std": np.ones(d, np.float32)}
    network = ControlNetwork(**weights, **normaliser, step=step)
    return LearnedController("marginroute", standard_rules(LAYOUT)["predictive-edf"], network)


@pytest.fixture
def exported(tmp_path):
    controller = random_controller()
    view = random_views(5)
    inputs = network_inputs(view, controller.advice.anew().act(view))
    parity = {"inputs": inputs, "correction": controller.network.correction(inputs)}
    made = dataclasses.replace(small_bundle(), controller=controller)
    bundles.save(made, tmp_path / "bundle", control_parity=parity)
    return made, tmp_path / "bundle"


def test_the_loaded_controller_decides_as_the_exported_one(exported):
    made, folder = exported
    ours, theirs = made.controller.anew(), bundles.load(folder).controller
    for tick in range(4):
        view = random_views(3, seed=tick, fresh=tick == 0)
        for one, other in zip(vars(ours.decide(view)).values(), vars(theirs.decide(view)).values(), strict=True):
            np.testing.assert_array_equal(one, other)


def test_a_correction_never_exceeds_its_reach_and_leaves_the_rules_own_levers(exported):
    controller, view = exported[0].controller, random_views(200)
    wild = dataclasses.replace(controller.network, head=controller.network.head * 1e4)
    moved = LearnedController("wild", controller.advice.anew(), wild).act(view) - controller.advice.anew().act(view)
    shed = np.array([name.startswith("shed") for name in LAYOUT.lever_names])
    assert np.abs(moved[:, shed]).max() == 0.0 and 0.3 < np.abs(moved).max() <= 0.4 + 1e-6


def test_worlds_decide_alone_as_together(exported):
    controller, view = exported[0].controller, random_views(6)
    together = controller.anew().act(view)
    for w in range(6):
        arrays = {name: array for name, array in vars(view).items() if name != "layout" and array is not None}
        rows = {name: array[w : w + 1] for name, array in arrays.items()}
        alone = controller.anew().act(dataclasses.replace(view, **rows))
        np.testing.assert_allclose(alone[0], together[w], atol=1e-6)


def test_a_rule_travels_without_archives(tmp_path):
    rule = standard_rules(LAYOUT)["hpa-edf"].with_parameters(target=0.55, hold_down_s=900.0)
    bundles.save(dataclasses.replace(small_bundle(), controller=rule), tmp_path / "rule")
    assert {path.name for path in (tmp_path / "rule").iterdir()} == {"manifest.json"}
    read = bundles.load(tmp_path / "rule").controller
    assert read.to_dict() == rule.to_dict() and read.layout.to_dict() == LAYOUT.to_dict()
    card = model_card(tmp_path / "rule")
    assert "nothing learned: a rule" in card and "small: 1 to 4, 8 slots each" in card


def test_spoiled_archives_are_refused(exported, tmp_path):
    made, folder = exported
    copy = shutil.copytree(folder, tmp_path / "copy")
    data = bytearray((copy / "controller.npz").read_bytes())
    data[len(data) // 2] ^= 1
    (copy / "controller.npz").write_bytes(bytes(data))
    with pytest.raises(InputError, match=r"controller\.npz does not match the sha256"):
        bundles.load(copy)
    view = random_views(2)
    inputs = network_inputs(view, made.controller.advice.anew().act(view))
    wrong = {"inputs": inputs, "correction": made.controller.network.correction(inputs) + 1e-3}
    with pytest.raises(InputError, match="controller's parity vectors"):
        bundles.save(made, tmp_path / "wrong", control_parity=wrong)


def test_bundles_without_a_controller_have_none(tmp_path):
    bundles.save(small_bundle(), tmp_path / "plain")
    assert bundles.load(tmp_path / "plain").controller is None
