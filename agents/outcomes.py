"""Outcomes as a gateway would log them, from training episodes with some exploration: what P(good) is fitted on."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from agents.objective import Exploring, Rule
from envs.plant import Plant
from envs.worlds import FleetWorlds
from marginroute import view as v
from marginroute.view import Array

REUSED_SHARE = 0.5  # of the stored answers found that are given while outcomes are logged
EXPLORED_SHARE = 0.2  # of decisions made at random while outcomes are logged for the fit of P(good)


def log_outcomes(plant: Plant, rule: Rule, seeds: Iterable[int]) -> dict[str, Array]:
    """Plays training episodes with some exploration and returns resolved outcomes as `fit_quality` takes them."""
    worlds = FleetWorlds(plant, len(list(seeds)))
    worlds.load_all([plant.scenario.generate(seed, "train") for seed in seeds])
    worlds.run(Exploring(rule, EXPLORED_SHARE, seed=0))
    request, load = worlds.fleet.requests, worlds.loads
    w, i = np.nonzero((request["status"] == 2) & (np.arange(load.shape[1]) < worlds.desks["n_requests"][:, None]))
    tier = plant.layout.tier[load["answered_by"][w, i]]
    trials = worlds.books.arrays.trials
    if trials.shape[1]:  # of what was asked again, the first answer counts: later ones have a history
        tier = np.where(load["turned_down"][w, i] > 0, trials["first_tier"][w, i], tier)
    return {
        "tier": tier,
        "task": load["task_index"][w, i].astype(np.int64),
        "prior": worlds.prior[w, i, tier],
        "prompt_tokens": load["prompt_tokens"][w, i].astype(np.float64),
        "good": worlds.good[w, i, tier].astype(np.float64),
    }


def log_reuse(plant: Plant, rule: Rule, seeds: Iterable[int]) -> dict[str, Array]:
    """Plays training episodes, gives half of what the cache finds, and returns the outcomes as `fit_reuse` takes them.

    A gateway learns them from feedback, or from a sample that is answered anew and compared.
    """
    worlds = FleetWorlds(plant, len(list(seeds)))
    worlds.load_all([plant.scenario.generate(seed, "train") for seed in seeds])
    worlds.follow(rule)
    rng, c = np.random.default_rng(0), plant.layout.names.index("cache")
    rows: list[Array] = []
    while not worlds.done.all():
        view = worlds.view()
        give = view.legal[:, c] & ~worlds.done & (rng.random(worlds.n_worlds) < REUSED_SHARE)
        seen = view.signals[[v.P_GOOD_PRIOR, v.SIMILARITY, v.ENTRY_AGE_S], :, c]
        rows.append(np.stack([view.request[v.TASK_INDEX], *seen, worlds.p_true[:, c]])[:, give])
        worlds.step(np.where(give, c, rule.decide_batch(view)))
    task, prior, similarity, age_s, good = np.concatenate(rows, axis=1)
    return {"task": task.astype(np.int64), "prior": prior, "similarity": similarity, "age_s": age_s, "good": good}
