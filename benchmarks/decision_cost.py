"""The measurements of benchmarks/decision.py."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from functools import partial

import numpy as np

from agents.export import NAME, make_bundle
from envs.plant import Plant
from envs.scenario import load_scenario
from envs.vector_env import ObservedWorlds, default_advice
from marginroute import features
from marginroute.bundle import Bundle
from marginroute.guard import GuardedPolicy
from marginroute.policy import Network, ResidualPolicy
from marginroute.telemetry import GatewayState
from marginroute.view import View

WIDTH = 32
EVERY_S = 0.01
REPLICAS = {16: (4, 4, 4), 256: (84, 84, 84)}  # small, medium, large: candidates less provider, cache, defer, shed


def views_of(plant: Plant, n: int) -> list[View]:
    """Views of the middle of an episode."""
    worlds = ObservedWorlds(plant, 1, None, None)
    worlds.load_all([plant.scenario.generate(0, "train")])
    found = []
    for step in range(200 + n):
        if step >= 200:
            found.append(worlds.view()[0].copy())
        worlds.step(worlds.advice.decide_batch(worlds.view()))
    return found


def policy_of(plant: Plant) -> ResidualPolicy:
    """A residual policy with random weights."""
    rng = np.random.default_rng(0)
    spec = features.feature_spec(plant.layout)
    f, g, h = spec.n_candidate, spec.n_context, WIDTH

    def weights(*shape: int) -> np.ndarray:
        return rng.normal(0.0, 0.1, shape).astype(np.float32)

    kappa, trust = np.ones(1, "f4"), np.array([0.0, 1.0], "f4")
    network = Network(weights(f, h), weights(g, h), weights(h), weights(h, h), weights(h), weights(h), kappa, trust)
    return ResidualPolicy(NAME, default_advice(plant), spec, network)


def measure(calls: int, function: Callable[[View], object], views: list[View]) -> np.ndarray:
    """(calls,) microseconds of single calls."""
    times = np.empty(calls)
    for i in range(calls):
        view = views[i % len(views)]
        start = time.perf_counter_ns()
        function(view)
        times[i] = time.perf_counter_ns() - start
    return times / 1e3


def gateway(bundle: Bundle) -> GatewayState:
    """State of a gateway that decides every `EVERY_S` by its own clock."""
    ticks = itertools.count()
    return GatewayState(bundle, clock=lambda: EVERY_S * next(ticks), can=("shed",))


def _ignoring_view(function: Callable[..., object], *arguments: object) -> object:
    """Calls with all arguments but the last, the view."""
    return function(*arguments[:-1])


def figures(quick: bool) -> dict[str, object]:
    """Quantiles at 16 and 256 candidates: prepared, with the View that it needs, and by the general path."""
    calls = 500 if quick else 5000
    found: dict[str, object] = {}
    for candidates, replicas in REPLICAS.items():
        names = ("small", "medium", "large")
        overrides = {f"fleet.pools.{name}.replicas": n for name, n in zip(names, replicas, strict=True)}
        plant = Plant(load_scenario("quickstart", overrides))
        assert plant.layout.n_candidates == candidates
        policy = policy_of(plant)
        views = views_of(plant, 100)
        bundle = make_bundle(plant, policy, policy.advice, {}, {})
        general, guarded = GuardedPolicy(policy, policy.advice, bundle.limits), bundle.guarded()
        told, untold = gateway(bundle), gateway(bundle)
        for tier in range(len(plant.layout.tier_names)):
            told.judged(tier, 0, 0.1)
        asked = 800, plant.layout.class_names[0], plant.layout.task_names[0]
        paths = {
            "": guarded.decide,
            "with_view_": lambda _: guarded.decide(told.view(*asked)),  # noqa: B023 (called at once)
            "untold_with_view_": lambda _: guarded.decide(untold.view(*asked)),  # noqa: B023
            "general_path_": general.decide,
        }
        for name, decide in paths.items():
            measure(200, decide, views)
            times = measure(calls, decide, views)
            for figure, q in (("median", 0.5), ("p99", 0.99), ("p5", 0.05)):
                found[f"{name}{figure}_us_{candidates}"] = round(float(np.quantile(times, q)), 1)
        without = make_bundle(plant, policy.advice, policy.advice, {}, {}).guarded()
        parts = {"view": lambda _: told.view(*asked), "advice_and_explanation": without.decide}  # noqa: B023
        found[f"breakdown_us_{candidates}"] = {
            name: round(float(np.median(measure(calls, part, views))), 1) for name, part in parts.items()
        }
        inputs = policy.inputs(views[0])
        parts = {
            "advice": policy.advice.assess,
            "advice_and_features": policy.inputs,
            "network": partial(_ignoring_view, policy.logits, inputs),
            "guard": partial(_ignoring_view, guarded.drift, inputs.context, policy.spec),
        }
        found[f"general_path_breakdown_us_{candidates}"] = {
            name: round(float(np.median(measure(calls, part, views))), 1) for name, part in parts.items()
        }
    return found
