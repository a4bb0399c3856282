"""Who takes part in a comparison, and how long it is played."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from agents.workers import Crew
from envs.plant import Plant
from envs.scenario import Scenario
from evaluation.arguments import check_names, names_of, untuned_error
from evaluation.cache import cached_play
from evaluation.controls import CONTROLS, MATCHED_COST, SHUFFLED_MIX, matched_mixes, shuffled_mixes
from evaluation.progress import progress_bar
from evaluation.report import PER_1K
from evaluation.results import EpisodeResults, concatenate
from evaluation.statistics import confidence_sequence
from marginroute.bundle import Bundle
from marginroute.cli import note
from marginroute.errors import InputError
from marginroute.policy import Policy

MAX_VALIDATION_EPISODES = 16
BATCH_EPISODES = 16
MOST_EPISODES = 4096
EPISODES, EPISODES_CONTROLLED = 32, 8
"""Held-out episodes where none are asked for; those of a controller are whole days."""


@dataclass(frozen=True)
class Entrants:
    """Policies by name.

    Attributes:
        examined: of run folders and bundles.
        heuristics: tuned for the scenario.
        controls: names of the content-blind controls that take part.
        best: the best heuristic, where its tuning has said so already; None: chosen on validation episodes.
        tuned: False: the heuristics are rules of thumb as they come, since nothing was tuned for the scenario.
    """

    examined: Mapping[str, Policy]
    heuristics: Mapping[str, Policy]
    controls: tuple[str, ...] = ()
    best: str | None = None
    tuned: bool = True

    @property
    def all(self) -> dict[str, Policy]:
        """Everybody but the controls."""
        return {**self.examined, **self.heuristics}


@dataclass(frozen=True)
class Contest:
    """A comparison that was played.

    Attributes:
        best: the heuristic chosen on validation episodes; None if none took part.
        heuristics: names of the tuned heuristics.
        policies, results: by name, controls included.
        tuned: as `Entrants.tuned`.
    """

    best: str | None
    heuristics: tuple[str, ...]
    policies: Mapping[str, Policy]
    results: Mapping[str, EpisodeResults]
    tuned: bool = True

    @property
    def shown(self) -> str:
        """The policy of the headline: the first examined one, or the best heuristic."""
        first = next(iter(self.results))
        return first if self.best is None or first not in self.heuristics else self.best

    @property
    def reference(self) -> str:
        """What the headline's policy is set beside: the best heuristic; for that one, what gateways ship."""
        if self.best is not None and self.best != self.shown:
            return self.best
        others = [name for name in ("shipped", *self.results) if name in self.results and name != self.shown]
        return next(iter(others), self.shown)


@dataclass(frozen=True)
class Play:
    """How the held-out episodes are played.

    Attributes:
        episodes: how many; with `until_usd` at most.
        seed: the first.
        workers: a crew, or processes.
        use_cache: whether episodes that were played before are looked up.
        until_usd: stop as soon as every examined policy's gain is known to +- so many USD per 1k requests.
    """

    episodes: int
    seed: int = 0
    workers: int | Crew | None = None
    use_cache: bool = True
    until_usd: float | None = None


def usual_episodes(scenario: Scenario) -> int:
    """Held-out episodes where none are asked for."""
    return EPISODES if scenario.control is None else EPISODES_CONTROLLED


def load_policies(runs: list[str], scenario: Scenario) -> dict[str, Policy]:
    """Policies of run folders or bundles by name; runs whose policies share a name are told apart by folder."""
    if not runs:
        return {}
    from agents.run import load_bundle

    read = [(Path(run), load_bundle(Path(run), scenario)) for run in runs]
    for run, found in read:
        if found.scenario["hash"] != scenario.hash:
            note(f"note: {run} was trained on {_described(found, scenario)}; it plays {scenario.name} as given here")
    policies = [(run, found.guarded()) for run, found in read]
    names = [policy.name for _, policy in policies]
    return {
        policy.name if names.count(policy.name) == 1 else f"{policy.name}:{run}": policy for run, policy in policies
    }


def _described(read: Bundle, scenario: Scenario) -> str:
    name = read.scenario["name"]
    return f"another {name}: other keys or overrides" if name == scenario.name else name


def enter(scenario: Scenario, runs: list[str], baselines: str) -> Entrants:
    """The policies asked for.

    Args:
        scenario: the world.
        runs: run folders or bundles.
        baselines: "all", "none", or names separated by commas.

    Raises:
        InputError: an unknown name, or nobody.
    """
    if scenario.control is not None:
        from evaluation.controlled import enter_controlled

        return Entrants(*enter_controlled(scenario, runs, baselines))
    examined = load_policies(runs, scenario)
    heuristics, controls, tuned = _baselines(scenario, baselines, runs)
    if not examined and not heuristics:
        raise InputError("nothing to compare: give at least one --policy or one of --baselines")
    return Entrants(examined, heuristics, controls, tuned=tuned)


def hold(scenario: Scenario, entrants: Entrants, play: Play, best: str | None = None) -> Contest:
    """Chooses the best heuristic on validation episodes, unless it is given; then plays everybody on held-out ones."""
    best = best or entrants.best or choose_best(scenario, entrants.heuristics, play)
    if play.until_usd is None:
        with progress_bar("held-out episodes") as progress:
            results = cached_play(
                scenario, entrants.all, play.episodes, play.seed, progress, play.workers, play.use_cache
            )
    else:
        results = _until(scenario, entrants, best, play, play.until_usd)
    policies = entrants.all
    of = list(entrants.examined) or [str(best)]
    controls: dict[str, Policy] = {}
    if SHUFFLED_MIX in entrants.controls:
        controls |= shuffled_mixes(results, of)
    if MATCHED_COST in entrants.controls:
        mixes = matched_mixes(scenario, policies, results, of, play)
        controls |= mixes
        if not mixes:
            note(f"note: no {MATCHED_COST}: no model is clearly dearer than the others, so there is no cost to match")
    if controls:
        episodes = len(next(iter(results.values())).seeds)
        with progress_bar("content-blind controls") as progress:
            results |= cached_play(scenario, controls, episodes, play.seed, progress, play.workers, play.use_cache)
    return Contest(best, tuple(entrants.heuristics), policies | controls, results, entrants.tuned)


def choose_best(scenario: Scenario, heuristics: Mapping[str, Policy], play: Play) -> str | None:
    """The heuristic that earns most on validation episodes; None without any."""
    if len(heuristics) < 2:
        return next(iter(heuristics), None)
    episodes = min(play.episodes, MAX_VALIDATION_EPISODES)
    with progress_bar("choosing the best heuristic (validation)") as progress:
        results = cached_play(
            scenario, heuristics, episodes, 0, progress, play.workers, play.use_cache, split="validation"
        )
    return max(results, key=lambda name: float(results[name].margin_usd.sum()))


def _baselines(scenario: Scenario, wanted: str, runs: list[str]) -> tuple[dict[str, Policy], tuple[str, ...], bool]:
    """The heuristics asked for, which controls are among them, and whether they are tuned."""
    if wanted == "none":
        return {}, (), True
    from agents.baselines import UntunedError, baselines_for

    names, tuned = names_of(wanted), True
    try:
        known: dict[str, Policy] = {**baselines_for(scenario, run_dir=Path(runs[0]) if runs else None)}
    except UntunedError as error:
        from agents.rules_of_thumb import as_they_come

        known, tuned = {**as_they_come(Plant(scenario))}, False
        if not names or not set(names) <= {*known, *CONTROLS}:
            raise untuned_error(error, names, known) from None
    for control in CONTROLS:
        known.pop(control, None)
    if wanted == "all":
        return known, CONTROLS, tuned
    check_names("--baselines", names, ["all", "none", *known, *CONTROLS])
    return {name: known[name] for name in names if name in known}, tuple(set(CONTROLS) & set(names)), tuned


def _until(
    scenario: Scenario, entrants: Entrants, best: str | None, play: Play, until_usd: float
) -> dict[str, EpisodeResults]:
    """Plays batches until the gains over the best heuristic are known well enough, or the episodes are spent."""
    if best is None or not (set(entrants.all) - {best}):
        raise InputError("--until-ci needs two policies, one of them a heuristic; legal is --policy with --baselines")
    watched = list(entrants.examined) or [name for name in entrants.heuristics if name != best]
    parts: dict[str, list[EpisodeResults]] = {name: [] for name in entrants.all}
    episodes = 0
    with progress_bar("held-out episodes until the gain is known") as progress:
        while True:
            batch = min(BATCH_EPISODES, play.episodes - episodes)
            more = cached_play(scenario, entrants.all, batch, play.seed + episodes, None, play.workers, play.use_cache)
            episodes += batch
            for name, of_name in more.items():
                parts[name].append(of_name)
            results = {name: concatenate(of_name) for name, of_name in parts.items()}
            calls = results[best].first_calls
            widths = [
                confidence_sequence(results[name].margin_usd - results[best].margin_usd, calls, scale=PER_1K)
                for name in watched
            ]
            progress(episodes, play.episodes)
            widest = max((interval.high - interval.low) / 2.0 for interval in widths)
            if not math.isnan(widest) and widest <= until_usd:
                return results
            if episodes >= play.episodes:
                reached = "not known at all" if math.isnan(widest) else f"known to +- {widest:.3g} USD per 1k requests"
                note(f"note: after {episodes} episodes the gain is {reached}, --until-ci asks for +- {until_usd:g}")
                return results
