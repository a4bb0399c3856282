"""What a clairvoyant could do with each request of a workload, as flat arrays: value, work, and until when.

A request can be left unserved, answered from the response cache, or answered by a station (pools, then providers) in
one of several ways, one for every set of SLOs that the answer keeps. Keeping more SLOs pays fewer credits and leaves
less time: an option is its value in USD, the least work of its prefill and of its decode (`evaluation.hull`; a
provider's call is one unit of prefill work, of its rate limit), and the last moment for each. Everything is taken in
the operator's favour:

- work may be spread over all of its window, in any order, on any replica of the pool;
- users leave only if no schedule can reach them before their patience ends; deferred requests come back at any time;
- the mean output length that prices an unserved request is the lowest that the gateway's counter could have reached;
- a stored answer is never evicted or outdated (`evaluation.bound_reuse`);
- a prompt's cached blocks are all those that anyone could have left;
- replicas come and go as `evaluation.bound_capacity` says; nothing fails or is slow, but where failures are due a
  request may be sent again at any time;
- a controller's caps, spills and releases of held work are free;
- an API is as fast and as cheap as at the best moment at which the request may be sent;
- what contracts keep beside single requests is taken as `evaluation.bound_terms` says;
- a follow-up of a session may come as early as its user and an idle fleet allow, as late as one likes, or not at all;
- answers that a verifier turns down are taken as `evaluation.bound_verifiers` says, tasks as `evaluation.bound_tasks`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from envs.plant import Plant
from envs.workload.requests import Workload
from evaluation import bound_reuse
from evaluation.bound_capacity import Capacity, capacity_of
from evaluation.bound_money import Money
from evaluation.bound_stations import Stations, least_cost_usd
from evaluation.bound_tasks import Tasks, tasks_of
from evaluation.bound_verifiers import Turn, best_outcomes, known_outcomes, turns
from evaluation.hull import Hull, pool_hull
from marginroute.quality import prior_p_good

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

COLUMNS = (
    *("request", "station", "tier", "value_usd", "good"),
    *("prefill_s", "decode_s", "from_s", "prefill_until_s", "decode_until_s"),
)
"""What `Options` say of each option."""


@dataclass(frozen=True)
class Options:
    """Ways to answer requests, ordered by request and tier; O options of M requests.

    Attributes:
        request: (O,) request that an option answers.
        station: (O,) pool or provider.
        tier: (O,) model.
        value_usd: (O,) revenue - cost - refund - credits.
        good: (O,) whether the answer is good, or with what probability.
        prefill_s, decode_s: (O,) least work; for a provider 1 call and 0.
        from_s: (O,) earliest time of the work.
        prefill_until_s, decode_until_s: (O,) latest, inf: whenever.
        unserved_usd: (M,) value of not answering, at most 0.
        cached_usd: (M, T) value of repeating an answer of each tier from the cache.
        group: (M,) requests that may share a stored answer (same tenant, prompt or meaning); -1: none.
        tasks: calls that are paid together.
        shared_usd: what no decision changes: seats, GPU-hours that are paid in any case, and look-ups.
        capacity: what stations sell.
        horizon_s: end of the episode; engines run on, calls do not.
        gpu_usd: the GPU-hours in `shared_usd`, at most 0.
    """

    request: Ints
    station: Ints
    tier: Ints
    value_usd: Floats
    good: Floats
    prefill_s: Floats
    decode_s: Floats
    from_s: Floats
    prefill_until_s: Floats
    decode_until_s: Floats
    unserved_usd: Floats
    cached_usd: Floats
    group: Ints
    tasks: Tasks
    shared_usd: float
    capacity: Capacity
    horizon_s: float
    gpu_usd: float

    def where(self, kept: NDArray[np.bool_]) -> Options:
        """With some of the options only, (O,)."""
        return replace(self, **{name: getattr(self, name)[kept] for name in COLUMNS})


def observed_p_good(plant: Plant, workload: Workload) -> Floats:
    """(M, T) P(good answer) given all that a gateway could know of a request: its task and what predicts difficulty.

    What drifts is known, too: no gateway can infer more of it from what it sees.
    """
    quality = plant.scenario.workload_spec.quality
    drifts = workload.ability_shift.shape[1] > 0
    if quality.sees_task and not drifts:
        return np.asarray(workload.p_good_prior)  # the predictor's figure follows from all its signals by Bayes' rule
    ability = np.array(quality.ability).T[workload.task_index]
    return np.asarray(
        prior_p_good(
            ability + workload.ability_shift if drifts else ability,
            np.array(quality.slope),
            workload.difficulty_signal,
            quality.signal_correlation,
            quality.nobody_can(workload.task_index),
            quality.unseen_variance,
        )
    )


def stations_of(plant: Plant, workload: Workload) -> Stations:
    """What stations can do in an episode, whatever is known of outcomes."""
    group = bound_reuse.groups(plant, workload)
    return Stations(plant, workload, Money(plant, workload), hulls(plant, workload), group)


def make_options(
    plant: Plant, workload: Workload, p_good: Floats | None = None, stations: Stations | None = None
) -> Options:
    """Every option of every request.

    Args:
        plant: the scenario's constants.
        workload: the episode.
        p_good: (M, T) probabilities in place of the outcomes; None: the outcomes themselves.
        stations: of the episode, if they are there already.
    """
    good, known = workload.good.astype(np.float64), np.ones(workload.n_requests, dtype=np.bool_)
    if p_good is not None:
        known = known_outcomes(plant, workload)
        good = np.where(known[:, None], good, p_good)
    stations = stations or stations_of(plant, workload)
    money, group = stations.money, stations.group
    found = turns(plant, workload, good, least_cost_usd(plant, workload, money))
    best_good = best_outcomes(found)
    stored = bound_reuse.best_stored(workload, group, best_good, one_answer=len(found) == 1)
    tasks = tasks_of(plant, workload, group, best_good, known)
    flat = _all_options(stations, found)
    flat["value_usd"] += tasks.alone_usd[flat["request"]]
    cached_usd = money.revenue_usd[:, None] - (1.0 - stored) * money.bad_usd[:, None]
    if bound_reuse.is_near(plant, workload):
        cached_usd = bound_reuse.cached_usd(plant, workload, stored, p_good is None)
    capacity = capacity_of(plant, workload)
    gpu_usd = -capacity.gpu_usd_per_s * workload.horizon_s
    cached_usd = np.where(stations.comes[:, None], cached_usd + tasks.alone_usd[:, None], -np.inf)
    return Options(
        **flat,
        unserved_usd=np.where(workload.parent_index >= 0, 0.0, -money.unserved_usd),
        cached_usd=cached_usd,
        group=group,
        tasks=tasks,
        shared_usd=float((plant.terms["seat_usd_per_s"] + plant.terms["commitment_usd_per_s"]).sum())
        * workload.horizon_s
        + gpu_usd
        - bound_reuse.lookups_usd(plant, workload),
        capacity=capacity,
        horizon_s=workload.horizon_s,
        gpu_usd=gpu_usd,
    )


def _all_options(stations: Stations, found: list[Turn]) -> dict[str, Any]:
    """Columns of `Options` over all stations and turns, ordered by request and tier."""
    columns: list[dict[str, Any]] = []
    for turn in found:
        for station, pool in enumerate(stations.plant.spec.pools):
            columns += stations.pool(station, pool.tier, turn)
        for p, provider in enumerate(stations.plant.spec.providers):
            columns += stations.provider(p, provider.tier, turn)
    flat = {name: np.concatenate([column[name] for column in columns]) for name in columns[0]}
    order = np.lexsort((flat["tier"], flat["request"]))
    return {name: values[order] for name, values in flat.items()}


def hulls(plant: Plant, workload: Workload) -> list[Hull]:
    """The floor of every pool, steepest for this workload's mix."""
    prompt, output = workload.prompt_tokens.astype(np.float64), workload.output_tokens.astype(np.float64)
    steps = output - 1.0
    prefill, decode = float(prompt.sum()), float(steps.sum())
    attended = float((steps * prompt + 0.5 * steps * output).sum())
    least = int(prompt.min(initial=1e9))
    return [
        pool_hull(pool, prefill, decode, attended, None if pool.prefix_caching else least) for pool in plant.spec.pools
    ]
