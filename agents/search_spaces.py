"""What is searched of each rule: its parameters with their ranges, from the fleet and the requests of a scenario."""

from __future__ import annotations

import itertools

import numpy as np
import optuna

from agents.objective import Rule
from envs.plant import Plant
from marginroute import quality
from marginroute import view as v
from marginroute.margin_rule import MarginParameters, MarginRule
from marginroute.rules import Cascade, DifficultyThreshold
from marginroute.view import Array

CASCADE_TIERS = 3  # models in a cascade at most, as in FrugalGPT


def margin_rule(
    name: str, trial: optuna.Trial, plant: Plant, priced: bool, fitted: quality.FittedQuality | None
) -> Rule:
    """A margin rule as a trial has it: with prices of congestion if `priced`, and fitted P(good) if given."""
    scarce = [True] * len(plant.spec.pools) + [provider.rate_limit.limited for provider in plant.spec.providers]
    prices = [
        10.0 ** trial.suggest_float(f"log10_price_{station}", -5.0, 0.0) if priced and is_scarce else 0.0
        for station, is_scarce in zip(plant.layout.station_names, scarce, strict=True)
    ]
    parameters = MarginParameters(
        station_usd_per_s=tuple(prices),
        fill_power=trial.suggest_float("fill_power", 0.0, 4.0) if priced else 1.0,
        ttft_scale=2.0 ** trial.suggest_float("log2_ttft_scale", -2.0, 3.0),
        tpot_scale=2.0 ** trial.suggest_float("log2_tpot_scale", -1.0, 2.0),
        sharpness=2.0 ** trial.suggest_float("log2_sharpness", 0.0, 4.0),
        defer_share=trial.suggest_float("defer_share", 0.5, 1.1),
        cap_share=2.0 ** trial.suggest_float("log2_cap_share", -4.0, 2.0),
        cache_similarity=(
            trial.suggest_float("cache_similarity", 0.4, 1.0) if is_semantic(plant) and fitted is None else 0.0
        ),
    )
    return MarginRule(name, parameters, fitted)


def is_semantic(plant: Plant) -> bool:
    """Whether the response cache finds prompts that only mean the same."""
    return bool(plant.config[0]["cache_semantic"])


def tier_ranks(plant: Plant) -> tuple[int, ...]:
    """(T,) rank of each tier by its prior P(good) on an average request, 0 for the weakest."""
    workload = plant.scenario.generate(0, "train")
    return tuple(int(rank) for rank in workload.p_good_prior.mean(axis=0).argsort().argsort())


def difficulty_threshold(trial: optuna.Trial, plant: Plant) -> Rule:
    """*difficulty-threshold* as a trial has it."""
    ranks = tier_ranks(plant)
    cutoffs = sorted(trial.suggest_float(f"cutoff_{i}", -3.0, 3.0) for i in range(len(ranks) - 1))
    shift = trial.suggest_float("load_shift", 0.0, 4.0)
    return DifficultyThreshold("difficulty-threshold", ranks, tuple(cutoffs), shift)


def tier_prices(plant: Plant) -> Array:
    """(T,) USD that an average answer of each tier costs the operator at its cheapest candidate."""
    layout, static = plant.layout, plant.static_signals
    workload = plant.scenario.generate(0, "train")
    prompt_tokens, output_tokens = workload.prompt_tokens.mean(), plant.output_tokens.mean()
    usd = static[v.CALL_USD] + prompt_tokens * static[v.INPUT_USD] + output_tokens * static[v.OUTPUT_USD]
    tiers = range(len(layout.tier_names))
    return np.array([usd[layout.tier == t].min() if (layout.tier == t).any() else np.inf for t in tiers])


def cascades(plant: Plant) -> list[Cascade]:
    """FrugalGPT's lists: every choice of up to `CASCADE_TIERS` models, cheapest first; thresholds in the middle."""
    prices = tier_prices(plant)
    cheapest_first = [int(t) for t in np.argsort(prices, kind="stable") if np.isfinite(prices[t])]
    lists = [x for m in range(1, CASCADE_TIERS + 1) for x in itertools.combinations(cheapest_first, m)]
    return [Cascade("cascade", order, (0.5,) * (len(order) - 1)) for order in lists]


def has_verifiers(plant: Plant) -> bool:
    """Whether anybody looks at answers: without, a cascade ends with its first model."""
    return bool(plant.verifiers["max_attempts"].any())
