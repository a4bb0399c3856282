"""What a report page shows beside the comparison: time within episodes, decisions that differ, other conditions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from agents.workers import Crew
from envs.plant import Plant
from envs.progress import Progress, silent
from envs.scenario import Scenario
from envs.scenario_family import changed
from evaluation.cache import cached_play
from evaluation.counterfactual import differences, worth_usd
from evaluation.report import PER_1K
from evaluation.sensitivity import Bar, inputs, tornado
from evaluation.statistics import Estimate, paired_estimate
from evaluation.timeline import Timeline, record_timeline
from marginroute import view as v
from marginroute.policy import Policy

TIMELINE_EPISODES = 16
TORNADO_EPISODES = 16
SWAPPED = 200
TOP = 8
LOADS = {"load x0.7": 0.7, "load x1.3": 1.3, "load x1.6": 1.6}
"""Held-out conditions beside the scenario's own: what its load is multiplied by, every world alike as under those."""


@dataclass(frozen=True)
class Swap:
    """A decision in which two policies differ.

    Attributes:
        decision: its number in the episode.
        request: what the gateway saw, in words.
        choice, other: candidates of the policy and of the reference.
        worth_usd: margin of the episode less that with the reference's choice in its place.
    """

    decision: int
    request: str
    choice: str
    other: str
    worth_usd: float


@dataclass(frozen=True)
class Swaps:
    """The decisions of one held-out episode in which a policy differs from the reference.

    Attributes:
        policy, reference: names.
        share: of the policy's decisions that differ.
        examined: how many of them were played both ways, drawn at random.
        worth_usd: mean worth of one of those.
        by_pair: mean worth and number by (choice, other) kinds of station.
        top: the most and the least valuable.
    """

    policy: str
    reference: str
    share: float
    examined: int
    worth_usd: Estimate
    by_pair: Mapping[tuple[str, str], tuple[float, int]]
    top: list[Swap]


@dataclass(frozen=True)
class PageData:
    """Everything that takes simulation beyond the comparison; nothing of it in a scenario with a controller.

    Attributes:
        reference: name of the policy that the shown one is set beside.
        timelines: by policy name.
        swaps: of the policy shown first against its reference; None without two policies.
        robustness: paired gain over the reference in USD per 1k requests, by condition.
        tornado: how that gain follows the most influential inputs.
    """

    reference: str
    timelines: Mapping[str, Timeline]
    swaps: Swaps | None
    robustness: Mapping[str, Estimate]
    tornado: Sequence[Bar] = ()


def collect(
    scenario: Scenario,
    policies: Mapping[str, Policy],
    shown: str,
    reference: str,
    *,
    episodes: int,
    seed: int = 0,
    progress: Progress = silent,
    workers: int | Crew | None = None,
    use_cache: bool = True,
) -> PageData:
    """Simulates what the page needs.

    Args:
        scenario: the world.
        policies: by name; `shown` and `reference` among them.
        shown: the policy of the headline.
        reference: what it is compared with.
        episodes: of every condition.
        seed: first held-out seed.
        progress: called with (steps done, steps in all).
        workers: a crew, or processes.
        use_cache: whether episodes that were played before are looked up.
    """
    if scenario.control is not None:  # a decision's worth, and days under other conditions, are a router's
        return PageData(reference, {}, None, {})
    plant = Plant(scenario)
    names = list(dict.fromkeys((shown, reference)))
    worlds = other_worlds(scenario)
    steps, done = len(names) + 1 + len(worlds) + len(inputs(scenario)), 0

    def report() -> None:
        nonlocal done
        done += 1
        progress(done, steps)

    workloads = [scenario.generate(seed + e, "heldout") for e in range(min(episodes, TIMELINE_EPISODES))]
    timelines = {}
    for name in names:
        timelines[name] = record_timeline(plant, policies[name], workloads)
        report()
    swaps, robustness, bars = None, {}, []
    if shown != reference:
        swaps = find_swaps(plant, policies[shown], policies[reference], shown, reference, seed)
        two = {name: policies[name] for name in names}
        for condition, world in worlds.items():
            results = cached_play(world, two, episodes, seed, None, workers, use_cache)
            gain_usd = results[shown].margin_usd - results[reference].margin_usd
            robustness[condition] = paired_estimate(gain_usd, results[shown].first_calls, scale=PER_1K)
            report()
        bars = tornado(
            scenario,
            two,
            shown,
            reference,
            episodes=min(episodes, TORNADO_EPISODES),
            seed=seed,
            workers=workers,
            use_cache=use_cache,
            step=report,
        )
    progress(steps, steps)
    return PageData(reference, timelines, swaps, robustness, bars)


def other_worlds(scenario: Scenario) -> dict[str, Scenario]:
    """Where the gain is looked at again: other loads and the scenario's own conditions, by name."""
    load = scenario.load_scale
    worlds = {name: changed(scenario, {"load_scale": load * times}, name) for name, times in LOADS.items()}
    return worlds | {name: scenario.under(name) for name in scenario.conditions}


def find_swaps(plant: Plant, policy: Policy, reference: Policy, name: str, other: str, seed: int) -> Swaps | None:
    """Plays decisions in which the two differ both ways; None where they never do."""
    workload = plant.scenario.generate(seed, "heldout")
    found = differences(plant, policy, reference, workload)
    if len(found.decision) == 0:
        return None
    drawn = np.random.default_rng(seed).permutation(len(found.decision))[:SWAPPED]
    worth = worth_usd(plant, policy, workload, found.decision[drawn], found.other[drawn])
    layout = plant.layout
    groups = [*layout.station_names, ""]

    def group(candidate: int) -> str:
        return groups[layout.station[candidate]] or layout.names[candidate]

    by_pair: dict[tuple[str, str], list[float]] = {}
    for d, usd in zip(drawn.tolist(), worth.tolist(), strict=True):
        by_pair.setdefault((group(found.choice[d]), group(found.other[d])), []).append(usd)
    order = np.argsort(worth)
    kept = [*order[::-1][:TOP].tolist(), *order[:TOP][::-1].tolist()] if len(order) > 2 * TOP else order[::-1].tolist()
    top = []
    for k in kept:
        d, request = int(drawn[k]), found.view.request[:, drawn[k]]
        words = (
            f"{layout.class_names[int(request[v.CLASS_INDEX])]}, {layout.task_names[int(request[v.TASK_INDEX])]}, "
            f"{int(request[v.PROMPT_TOKENS]):,} tokens, difficulty {request[v.DIFFICULTY_SIGNAL]:+z.1f}"
        )
        names = layout.names[found.choice[d]], layout.names[found.other[d]]
        top.append(Swap(int(found.decision[d]), words, *names, float(worth[k])))
    pairs = {pair: (float(np.mean(usd)), len(usd)) for pair, usd in by_pair.items()}
    share = len(found.decision) / found.decisions
    return Swaps(name, other, share, len(drawn), paired_estimate(worth), pairs, top)
