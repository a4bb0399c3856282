"""Trained policy -> bundle: the only place that turns torch weights into what a gateway runs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from agents.network import ScorerPolicy, to_numpy
from agents.onnx_graph import to_onnx
from envs.plant import Plant
from envs.scenario import Scenario
from envs.vector_env import ObservedWorlds
from marginroute import bundle
from marginroute.bundle import Bundle
from marginroute.control_rules import Controller
from marginroute.drift import histograms_of
from marginroute.features import FeatureSpec, split
from marginroute.guard import GuardLimits
from marginroute.margin_rule import MarginRule
from marginroute.policy import Policy, ResidualPolicy
from marginroute.predictor import QualityPredictor
from marginroute.rules import RuleOfThumb
from marginroute.view import Array

NAME = "marginroute"  # the exported policy's name in tables, learned or not
PARITY_SAMPLES = 64
HISTOGRAM_SAMPLES = 4096  # requests whose distribution a gateway judges drift by
STALE_SCRAPES = 10.0  # scrape intervals after which telemetry is stale


@dataclass(frozen=True, eq=False)
class Levers:
    """The controller of a bundle.

    Attributes:
        scenario: that both deciders are for; the router's plant holds stretches of it.
        controller: the rule, or the network that corrects it.
        parity: `inputs` and `correction` of a learned one.
    """

    scenario: Scenario
    controller: Controller
    parity: dict[str, Array] | None = None


def residual_policy(policy: ScorerPolicy, advice: MarginRule, spec: FeatureSpec) -> ResidualPolicy:
    """The trained scorer as the numpy runtime runs it."""
    return ResidualPolicy(NAME, advice, spec, to_numpy(policy.scorer))


def torch_logits(policy: ScorerPolicy, observation: Array) -> Array:
    """Log-probabilities up to a constant as torch computes them: what the runtime has to reproduce, (B, C)."""
    return policy.scorer.run(torch.as_tensor(observation))[0]


def sample_observations(plant: Plant, advice: MarginRule, spec: FeatureSpec, samples: int) -> Array:
    """(B, D) observations of training episodes under the advice, spread over their length."""
    worlds = ObservedWorlds(plant, 8, advice, spec)
    worlds.load_all([plant.scenario.generate(seed, "train") for seed in range(8)])
    steps = int(worlds.desks["n_roots"].min())
    every = max(steps * 8 // samples, 1)
    rows = []
    for step in range(steps):
        if step % every == 0:
            rows.append(worlds.observe())
        worlds.step(advice.decide_batch(worlds.view()))
    return np.concatenate(rows)[:samples]


def make_bundle(
    plant: Plant,
    policy: Policy,
    fallback: MarginRule | RuleOfThumb,
    evaluation: dict[str, Any],
    provenance: dict[str, Any],
    predictor: QualityPredictor | None = None,
    levers: Levers | None = None,
) -> Bundle:
    """A bundle for a scenario's fleet and contracts."""
    scenario, terms = plant.scenario if levers is None else levers.scenario, plant.terms
    assert terms.dtype.names is not None
    return Bundle(
        policy=policy,
        fallback=fallback,
        limits=GuardLimits(telemetry_age_s=STALE_SCRAPES * plant.spec.scrape_interval_s),
        layout=plant.layout,
        static_signals=plant.static_signals,
        slots=plant.slots,
        terms={
            name: {key: float(terms[k][key]) for key in terms.dtype.names}
            for k, name in enumerate(scenario.class_names)
        },
        allowed=plant.agreed.allowed,
        output_tokens=plant.output_tokens,
        prior=plant.prior,
        scenario={"name": scenario.name, "hash": scenario.hash},
        evaluation=evaluation,
        provenance=provenance,
        predictor=predictor,
        controller=None if levers is None else levers.controller,
        rate_limits={provider.name: provider.rate_limit for provider in plant.spec.providers},
    )


def export(
    plant: Plant,
    learned: ScorerPolicy | None,
    advice: MarginRule,
    spec: FeatureSpec | None,
    fallback: MarginRule | RuleOfThumb,
    folder: Path,
    evaluation: dict[str, Any],
    provenance: dict[str, Any],
    predictor: QualityPredictor | None = None,
    levers: Levers | None = None,
) -> Bundle:
    """Writes a bundle: the learned policy, or the advice itself where the gate refused it (`learned` None).

    `levers` is the controller beside it, where the scenario has one.
    """
    control_parity = None if levers is None else levers.parity
    if learned is None or spec is None:
        made = make_bundle(plant, replace(advice, name=NAME), fallback, evaluation, provenance, predictor, levers)
        bundle.save(made, folder, control_parity=control_parity)
        return made
    policy = residual_policy(learned, advice, spec)
    made = make_bundle(plant, policy, fallback, evaluation, provenance, predictor, levers)
    observation = sample_observations(plant, advice, spec, HISTOGRAM_SAMPLES)
    context = split(observation, plant.layout.n_candidates, spec)[1]
    made = replace(made, histograms=histograms_of(context, spec))
    observation = observation[:: max(len(observation) // PARITY_SAMPLES, 1)][:PARITY_SAMPLES]
    parity = {"observation": observation, "logits": torch_logits(learned, observation)}
    bundle.save(made, folder, parity, to_onnx(policy.network, spec), control_parity)
    return made
