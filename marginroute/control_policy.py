"""The learned controller, run by NumPy: a network that corrects a tuned rule; and how bundles hold controllers.

    x = (observation | the rule's action - mean) / std             (D + A,)
    h = relu(relu(x W1 + b1) W2 + b2)
    z = h head                                                     in units of `step`
    action = clip(rule's action + step * REACH tanh(z / REACH), -1, 1)

`step` (A,) is what training explores by; it is 0 for levers that the rule keeps to itself. The correction of a lever
never exceeds REACH steps, so the rule bounds what a network can do. The head starts at zero in training: the untrained
controller is the rule.

A gateway calls one function per tick, `bundle.controller.decide(view)`, whatever the bundle holds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from marginroute.control import CONTROL_VERSION, Array, ControlLayout, ControlView, Levers, decode, observe
from marginroute.control_rules import Controller, RuleController
from marginroute.errors import InputError

REACH = 4.0  # steps that a lever can be corrected by
WEIGHT_NAMES = ("first", "bias_1", "second", "bias_2", "head", "mean", "std", "step")
WEIGHTS_FILE, PARITY_FILE = "controller.npz", "controller_parity.npz"
PARITY_TOLERANCE = 1e-5


@dataclass(frozen=True, eq=False)
class ControlNetwork:
    """Weights of the correction, float32.

    Attributes:
        first: (D + A, H); bias_1: (H,); second: (H, H); bias_2: (H,); head: (H, A).
        mean, std: (D + A,) normaliser of the inputs.
        step: (A,) unit of the correction in lever units; 0 where the rule decides alone.
    """

    first: Array
    bias_1: Array
    second: Array
    bias_2: Array
    head: Array
    mean: Array
    std: Array
    step: Array

    def arrays(self) -> dict[str, Array]:
        """The weights by name."""
        return {name: getattr(self, name) for name in WEIGHT_NAMES}

    def correction(self, inputs: Array) -> Array:
        """(N, A) what is added to the rule's action, from inputs (N, D + A)."""
        x = (inputs - self.mean) / self.std
        h = np.maximum(x @ self.first + self.bias_1, 0.0)
        h = np.maximum(h @ self.second + self.bias_2, 0.0)
        return np.asarray(self.step * REACH * np.tanh(h @ self.head / REACH))


def network_inputs(view: ControlView, advice: Array) -> Array:
    """(N, D + A) float32: the observation, then the rule's action (N, A)."""
    return np.concatenate([observe(view), advice.astype(np.float32)], axis=-1)


@dataclass(frozen=True, eq=False)
class LearnedController:
    """A tuned rule corrected by a trained network.

    Attributes:
        name: its name.
        advice: the rule.
        network: the weights.
    """

    name: str
    advice: RuleController
    network: ControlNetwork

    @property
    def layout(self) -> ControlLayout:
        """What it controls."""
        return self.advice.layout

    def act(self, view: ControlView) -> Array:
        """Actions (N, A) in [-1, 1]."""
        advice = self.advice.act(view)
        return np.clip(advice + self.network.correction(network_inputs(view, advice)), -1.0, 1.0)

    def decide(self, view: ControlView) -> Levers:
        """The levers of this tick in physical units."""
        return decode(self.layout, self.act(view))

    def anew(self) -> LearnedController:
        """The same without memory of earlier ticks."""
        return LearnedController(self.name, self.advice.anew(), self.network)


def rule_of(controller: Controller) -> RuleController:
    """The rule that a controller is or corrects: what a gateway falls back to.

    Raises:
        InputError: another kind of controller, which a gateway cannot run.
    """
    rule = controller.advice if isinstance(controller, LearnedController) else controller
    if not isinstance(rule, RuleController):
        raise InputError(
            f"controller {controller.name!r} needs the simulator for every decision; legal in a bundle is a tuned "
            "rule, or a network that corrects one"
        )
    return rule


def learned_of(controller: Controller) -> str:
    """`residual` if a network corrects the rule, `none` if it is the rule itself."""
    return "residual" if isinstance(controller, LearnedController) else "none"


def described(controller: Controller) -> dict[str, Any]:
    """What a bundle's manifest says of its controller."""
    return {
        "version": CONTROL_VERSION,
        "name": controller.name,
        "learned": learned_of(controller),
        "rule": rule_of(controller).to_dict(),
        "layout": controller.layout.to_dict(),
    }


def read(data: Mapping[str, Any], arrays: Callable[[str], dict[str, Array]], place: str) -> Controller:
    """The controller of a bundle.

    Args:
        data: what `described` wrote.
        arrays: reads one of the bundle's archives by name.
        place: the bundle, for errors.

    Raises:
        InputError: another version, or a network that does not reproduce its parity vectors.
    """
    if data["version"] != CONTROL_VERSION:
        raise InputError(
            f"{place} holds a controller of version {data['version']}; this marginroute runs version "
            f"{CONTROL_VERSION}; train and export it again"
        )
    layout = ControlLayout.from_dict(data["layout"])
    rule = RuleController.from_dict(data["rule"], layout)
    if data["learned"] == "none":
        return rule
    weights, parity = arrays(WEIGHTS_FILE), arrays(PARITY_FILE)
    network = ControlNetwork(*(weights[name] for name in WEIGHT_NAMES))
    ours = network.correction(parity["inputs"])
    if not np.allclose(ours, parity["correction"], rtol=0.0, atol=PARITY_TOLERANCE):
        raise InputError(
            f"{place} does not reproduce its controller's parity vectors to {PARITY_TOLERANCE} on this machine"
        )
    return LearnedController(data["name"], rule, network)
