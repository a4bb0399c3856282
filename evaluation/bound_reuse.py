"""What a clairvoyant could make of stored answers: who may share them, and what they are worth to each request.

A request may get an answer that was given to another prompt of its intent. In the operator's favour every other prompt
of the intent that may have been answered before is in the cache, never evicted or outdated, and its answer is as young
as one likes; the right one of them is taken that pays most. Without knowledge of outcomes the nearest is taken, right
with the probability of the task's true curve.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from envs.plant import Plant
from envs.workload.requests import Workload
from evaluation.bound_terms import relaxed
from marginroute import pricing
from marginroute.response_cache import p_reuse

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def is_near(plant: Plant, workload: Workload) -> bool:
    """Whether prompts that only mean the same share answers."""
    return bool(plant.config[0]["cache_semantic"]) and workload.has_families


def groups(plant: Plant, workload: Workload) -> Ints:
    """(M,) dense index of requests that may share a stored answer, by tenant unless shared; -1: with nobody."""
    group = np.full(workload.n_requests, -1, dtype=np.int64)
    config = plant.config[0]
    if config["cache_capacity"] == 0:
        return group
    number = workload.family_index if is_near(plant, workload) else workload.prompt_key
    allowed = plant.cache_access["allowed"][workload.class_index] == 1
    rows = np.flatnonzero((number >= 0) & allowed)
    tenant = np.zeros(workload.n_requests, dtype=np.int64) if config["cache_shared"] else workload.tenant_index
    pairs = number[rows].astype(np.int64) * (int(tenant.max(initial=0)) + 1) + tenant[rows]
    _, inverse, counts = np.unique(pairs, return_inverse=True, return_counts=True)
    repeated = counts > 1
    dense = np.cumsum(repeated) - 1
    group[rows] = np.where(repeated[inverse], dense[inverse], -1)
    return group


def best_stored(workload: Workload, group: Ints, good: Floats, one_answer: bool = True) -> Floats:
    """(M, T) outcomes, or their probabilities, of the best answer of each tier that a request's group may have stored.

    Those of a prompt are all alike, unless a model's ability drifts or a verifier has it asked anew.
    """
    if one_answer and not workload.ability_shift.shape[1]:
        return good
    best = np.full((int(group.max(initial=-1)) + 1, good.shape[1]), -np.inf)
    rows = group >= 0
    np.maximum.at(best, group[rows], good[rows])
    return np.where(rows[:, None], best[group], good) if len(best) else good


def lookups_usd(plant: Plant, workload: Workload) -> float:
    """USD that embedding and looking up every request costs, whatever is decided."""
    if not plant.config[0]["cache_semantic"]:
        return 0.0
    access = plant.cache_access[workload.class_index]
    usd = access["lookup_usd"] + workload.prompt_tokens * access["embed_usd_per_token"]
    return float(usd[(workload.prompt_key >= 0) & (workload.parent_index < 0)].sum())


def cached_usd(plant: Plant, workload: Workload, good: Floats, known: bool) -> Floats:
    """(M, T) most that an answer of each tier from the cache can be worth to each request.

    Args:
        plant: the scenario's constants.
        workload: the episode.
        good: (M, T) outcomes, or their probabilities.
        known: whether it is known for which requests an answer is right, too.
    """
    right, right_tokens, most_tokens = _best_reuse(plant, workload, known)
    term, prompt = relaxed(plant.terms)[workload.class_index], workload.prompt_tokens

    def worth(output_tokens: Floats, share_good: Floats) -> Floats:
        usage_usd = term["request_usd"] + pricing.tokens_usd(
            prompt, output_tokens, term["input_usd_per_token"], term["output_usd_per_token"]
        )
        bad_usd = pricing.refund_usd(
            usage_usd + term["request_value_usd"], term["refund_share"], term["bad_answer_usd"]
        )
        return np.asarray(usage_usd[:, None] - (1.0 - share_good) * bad_usd[:, None])

    as_right = worth(right_tokens, good * right[:, None])
    value_usd = np.maximum(as_right, worth(most_tokens, np.zeros_like(good)))
    return np.where(most_tokens[:, None] > 0.0, value_usd, -np.inf)


def _best_reuse(plant: Plant, workload: Workload, known: bool) -> tuple[Floats, Floats, Floats]:
    """(M,) P(right) of the best stored answer, its longest output, and the longest of any that is found."""
    config, output = plant.config[0], workload.output_tokens.astype(np.float64)
    later = bool(config["hold_s"] < np.inf or config["elastic"] or len(workload.faults))
    reuse = plant.scenario.workload_spec.reuse
    half, width = np.array([(item.half_similarity, item.width) for item in reuse])[workload.task_index].T
    right, right_tokens, most_tokens = np.zeros(len(output)), np.zeros(len(output)), np.zeros(len(output))
    group = groups(plant, workload)
    order = np.argsort(group, kind="stable")
    order = order[group[order] >= 0]
    for rows in np.split(order, np.flatnonzero(np.diff(group[order])) + 1):
        if not len(rows):
            continue
        near = workload.embedding[rows].astype(np.float64) @ workload.embedding[rows].T.astype(np.float64)
        near[workload.prompt_key[rows][:, None] == workload.prompt_key[rows]] = 1.0
        before = ~np.eye(len(rows), dtype=np.bool_) if later else np.tri(len(rows), k=-1, dtype=np.bool_)
        near = np.where(before & (near >= config["cache_min_similarity"] - 1e-6), near, -1.0)
        most_tokens[rows] = np.where(near >= 0.0, output[rows], 0.0).max(axis=1)
        if known:
            fits = near >= workload.needed_similarity[rows][:, None] - 1e-6
            right[rows] = fits.any(axis=1)
            right_tokens[rows] = np.where(fits, output[rows], 0.0).max(axis=1)
        else:
            nearest = near.max(axis=1)
            right[rows] = np.where(nearest >= 0.0, p_reuse(nearest, half[rows], width[rows]), 0.0)
            right_tokens[rows] = most_tokens[rows]
    return right, right_tokens, most_tokens
