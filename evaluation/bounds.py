"""Upper bounds on the margin of any policy, episode by episode.

*Clairvoyant*: no policy, whatever it knows, earns more in this episode. *Same information*: P(good | task, difficulty
signal) stands in place of the outcomes, since no gateway sees them: a bound on the expected margin of any policy that
decides from what a gateway sees, hence for means over episodes only; arrivals, lengths, patience and provider latency
stay known. Both hold to the model of `evaluation.bound_options`; what that model does not cover is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from agents.workers import Crew, shared_out, usable_cores
from envs.progress import Progress, silent
from marginroute.errors import InputError

if TYPE_CHECKING:
    from envs.plant import Plant
    from envs.scenario import Scenario, Split

Floats = NDArray[np.float64]

MODELLED = frozenset(
    """
    input_usd_per_token output_usd_per_token seat_usd_per_s request_value_usd refund_share
    bad_answer_usd slo_ttft_s slo_tpot_s slo_e2e_s ttft_credit_share tpot_credit_share
    e2e_credit_share unserved_credit_share unserved_credit_usd patience_s delay_tolerant name
    profile replicas tier kv_blocks block_size_tokens max_num_seqs max_num_batched_tokens scheduler
    watermark_share vidur_quirks skip_iterations prefix_caching ttft_s ttft_sigma tpot_s tpot_sigma
    requests_per_minute burst_requests max_replicas reserved_replicas spot_replicas speculation
    request_usd commitment_usd_per_s committed_usd quota_requests beyond overage_usd beyond_factor prepaid_usd
    rate_per_s context_tokens
    """.split()  # noqa: SIM905
)
"""Contract terms and settings of pools and providers that the options are made of."""
HARMLESS = frozenset(
    """
    period_s rate_burst window_s window_target window_share window_low_target window_low_share
    bad_lifetime_usd missed_lifetime_usd unserved_lifetime_usd in_flight_cap min_replicas provision_s load_s
    paid_from_load detect_s connection_errors notice_s scheduling_policy tokens_per_minute burst_tokens error_after_s
    """.split()  # noqa: SIM905
)
"""Those that can only lower what is earned."""


@dataclass(frozen=True)
class Bounds:
    """Bounds of E episodes, in USD of margin.

    Attributes:
        seeds: (E,).
        clairvoyant_usd, same_information_usd: (E,).
        gpu_usd: (E,) GPU-hours in them that are paid whatever is decided, at most 0.
    """

    seeds: NDArray[np.int64]
    clairvoyant_usd: Floats
    same_information_usd: Floats
    gpu_usd: Floats


def uncovered(plant: Plant) -> list[str]:
    """What a scenario uses that the bounds do not model; with any of it they could be too low."""
    terms = plant.terms
    rows: list[tuple[str, Any]] = [
        ("contract term", {name: value for name, value in zip(terms.dtype.names, row, strict=True)})
        for row in terms.tolist()
    ]
    rows += [("pool setting", vars(pool)) for pool in plant.spec.pools]
    rows += [("provider setting", vars(provider)) for provider in plant.spec.providers]
    found: list[str] = []
    for kind, row in rows:
        for name, value in row.items():
            if name in MODELLED or name in HARMLESS:
                continue
            if name == "cached_input_usd_per_token" and value <= row["input_usd_per_token"]:
                continue
            found.append(f"{kind} {name}")
    quality = plant.scenario.workload_spec.quality
    if quality.sees_task and quality.loadings and any(item.tier for item in plant.scenario.drift.values()):
        found.append("drift of ability beside a predictor of several factors")
    if (plant.hedge_after_s < np.inf).any():
        found.append("class setting hedge_after_s")
    return list(dict.fromkeys(found))


def episode_bounds(plant: Plant, seed: int, split: Split = "heldout") -> tuple[int, float, float, float]:
    """Seed, clairvoyant and same-information bound, and GPU-hours paid in any case, of one episode in USD."""
    from evaluation.bound_dual import DualBound
    from evaluation.bound_options import make_options, observed_p_good, stations_of

    workload = plant.scenario.generate(seed, split)
    plant = plant.members[workload.variant]
    stations = stations_of(plant, workload)
    options = make_options(plant, workload, None, stations)
    same = make_options(plant, workload, observed_p_good(plant, workload), stations)
    return seed, DualBound(options).search().bound_usd, DualBound(same).search().bound_usd, options.gpu_usd


def bound_episodes(
    scenario: Scenario,
    seeds: Sequence[int],
    *,
    split: Split = "heldout",
    progress: Progress = silent,
    workers: int | Crew | None = None,
) -> Bounds:
    """Bounds of the given episodes.

    Args:
        scenario: the world.
        seeds: of the episodes.
        split: of the workloads.
        progress: called with (episodes done, episodes in all).
        workers: a crew, or processes; None for one per core.

    Raises:
        InputError: the scenario uses something that the bounds do not model.
    """
    from envs.plant import Plant

    found = uncovered(Plant(scenario))
    if found:
        raise InputError(f"scenario {scenario.name!r} has no upper bound yet: it uses {', '.join(found)}")
    shared = min(usable_cores(), len(seeds)) if workers is None else workers
    rows = shared_out(start_bounds, (scenario, split), seeds, shared)
    done = []
    for row in rows:
        done.append(row)
        progress(len(done), len(seeds))
    seed, clairvoyant, same, gpu = (np.array(column) for column in zip(*sorted(done), strict=True))
    return Bounds(seed, clairvoyant, same, gpu)


def start_bounds(scenario: Scenario, split: Split) -> Callable[[int], tuple[int, float, float, float]]:
    """What a process bounds its episodes with."""
    from envs.plant import Plant

    plant = Plant(scenario)
    return lambda seed: episode_bounds(plant, seed, split)
