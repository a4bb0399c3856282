"""Content-blind controls: what is a policy's choice of content worth, at the same shares and at the same cost?

- *shuffled-mix*: the policy's own tier shares, given out at random.
- *matched-cost*: a random mix that spends as much on answers (API, energy, cache) as the policy did. What it sends to
  the tier that is dearest per use is adjusted until the money agrees on the held-out episodes themselves; the rest goes
  to the other tiers in the policy's own proportions, or to any single one of them, whichever earns most on validation
  episodes. Gains that vanish against it were bought, not routed (semantic-router issue 2513, arXiv 2608.14641).

GPU-hours are paid whatever is decided and play no part in the matching.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from evaluation.cache import cached_play
from evaluation.report import PER_1K
from evaluation.results import EpisodeResults
from evaluation.statistics import ratio_of_sums
from marginroute import view as v
from marginroute.policy import Policy
from marginroute.rules import ShuffledMix

if TYPE_CHECKING:
    from envs.scenario import Scenario
    from evaluation.contest import Play

SHUFFLED_MIX = "shuffled-mix"
MATCHED_COST = "matched-cost"
CONTROLS = (SHUFFLED_MIX, MATCHED_COST)
ANSWER_COST_ACCOUNTS = ("api_spend", "energy", "cache")
EPISODES = 8  # of the validation split, on which the proportions are chosen
CORRECTIONS = 2
CLOSE = 0.02  # share of the cost within which two count as equal
LEAST_RATIO = 2.0  # between the dearest tier and the next, below which there is nothing to match


@dataclass(frozen=True)
class Mix:
    """A mix in the course of being matched.

    Attributes:
        rest: (T,) proportions of the tiers but the dearest; sum 1.
        share: what goes to the dearest tier.
    """

    rest: tuple[float, ...]
    share: float

    def shares(self, dearest: int) -> tuple[float, ...]:
        """(T,) shares of all tiers."""
        shares = np.array(self.rest) * (1.0 - self.share)
        shares[dearest] += self.share
        return tuple(shares.tolist())


def named(control: str, of: Sequence[str]) -> list[str]:
    """Names of a control for each policy: the plain one where there is only one policy."""
    return [control] if len(of) == 1 else [f"{control}:{name}" for name in of]


def shuffled_mixes(results: Mapping[str, EpisodeResults], of: list[str]) -> dict[str, Policy]:
    """For each policy of `of`, its tier shares given out at random."""
    return {
        name: ShuffledMix(name, tier_shares=results[policy].tier_shares)
        for name, policy in zip(named(SHUFFLED_MIX, of), of, strict=True)
    }


def matched_mixes(
    scenario: Scenario,
    policies: Mapping[str, Policy],
    results: Mapping[str, EpisodeResults],
    of: list[str],
    play: Play,
) -> dict[str, Policy]:
    """For each policy of `of`, the best random mix found that costs as much; none where no tier is dearer per use.

    Args:
        scenario: the world.
        policies: by name.
        results: of the same policies on held-out episodes.
        of: names of the policies to match.
        play: how.
    """
    unit_usd = unit_cost_usd(scenario)
    dearest = int(np.argmax(unit_usd))
    others = np.delete(unit_usd, dearest)
    if len(others) == 0 or unit_usd[dearest] < LEAST_RATIO * max(float(others.max()), 1e-12):
        return {}

    def validation(chosen: Mapping[str, Policy]) -> dict[str, EpisodeResults]:
        return cached_play(scenario, chosen, EPISODES, 0, None, play.workers, play.use_cache, split="validation")

    def held_out(chosen: Mapping[str, Policy]) -> dict[str, EpisodeResults]:
        episodes = len(next(iter(results.values())).seeds)
        return cached_play(scenario, chosen, episodes, play.seed, None, play.workers, play.use_cache)

    found: dict[str, Policy] = {}
    for name, policy in zip(named(MATCHED_COST, of), of, strict=True):
        target = validation({policy: policies[policy]})[policy]
        mixes = _matched(_starts(target, dearest), target, unit_usd, dearest, validation)
        best = max(mixes, key=lambda pair: float(pair[1].margin_usd.sum()))[0]
        mix = _matched([best], results[policy], unit_usd, dearest, held_out)[0][0]
        found[name] = _policy(name, mix, dearest)
    return found


def unit_cost_usd(scenario: Scenario) -> np.ndarray[Any, Any]:
    """(T,) variable cost of an average request of the scenario at each tier, by its cheapest candidate."""
    from envs.plant import Plant

    plant = Plant(scenario)
    workload = scenario.generate(0, "validation")
    prompt, output = workload.prompt_tokens.mean(), workload.output_tokens.mean()
    static, layout = plant.static_signals, plant.layout
    each = static[v.CALL_USD] + static[v.INPUT_USD] * prompt + static[v.OUTPUT_USD] * output
    costs = [each[(layout.tier == t) & (layout.kind <= v.PROVIDER)] for t in range(len(layout.tier_names))]
    return np.array([usd.min() if len(usd) else 0.0 for usd in costs])


def answer_cost_usd(results: EpisodeResults) -> float:
    """What answers cost per 1k first calls, a positive number."""
    usd = -results.accounts_usd(ANSWER_COST_ACCOUNTS).sum(axis=-1)
    return float(ratio_of_sums(usd, results.first_calls, PER_1K))


def _starts(target: EpisodeResults, dearest: int) -> list[Mix]:
    """The policy's own proportions of the other tiers, and each of them alone."""
    own = np.array(target.tier_shares)
    own[dearest] = 0.0
    rests = [tuple((own / own.sum()).tolist())] if own.sum() > 0.0 else []
    rests += [tuple(np.eye(len(own))[t].tolist()) for t in range(len(own)) if t != dearest]
    return [Mix(rest, target.tier_shares[dearest]) for rest in dict.fromkeys(rests)]


def _matched(
    mixes: list[Mix],
    target: EpisodeResults,
    unit_usd: np.ndarray[Any, Any],
    dearest: int,
    play: Callable[[Mapping[str, Policy]], dict[str, EpisodeResults]],
) -> list[tuple[Mix, EpisodeResults]]:
    """The mixes with their shares of the dearest tier adjusted to the target's cost, and what they did."""
    wanted_usd = answer_cost_usd(target)
    for correction in range(CORRECTIONS + 1):
        played = play({str(i): _policy(str(i), mix, dearest) for i, mix in enumerate(mixes)})
        costs_usd = [answer_cost_usd(played[str(i)]) for i in range(len(mixes))]
        close = all(abs(usd - wanted_usd) <= CLOSE * wanted_usd for usd in costs_usd)
        if close or correction == CORRECTIONS:
            break
        mixes = [_corrected(mix, usd, wanted_usd, unit_usd, dearest) for mix, usd in zip(mixes, costs_usd, strict=True)]
    return [(mix, played[str(i)]) for i, mix in enumerate(mixes)]


def _corrected(mix: Mix, usd: float, wanted_usd: float, unit_usd: np.ndarray[Any, Any], dearest: int) -> Mix:
    """A share of the dearest tier at which the cost should agree: cost is close to linear in it."""
    step_usd = PER_1K * (unit_usd[dearest] - float(np.dot(unit_usd, mix.rest)))
    if mix.share > 0.0:
        step_usd = max((usd - PER_1K * float(np.dot(unit_usd, mix.rest))) / mix.share, 0.2 * step_usd)
    return Mix(mix.rest, float(np.clip(mix.share + (wanted_usd - usd) / step_usd, 0.0, 1.0)))


def _policy(name: str, mix: Mix, dearest: int) -> ShuffledMix:
    return ShuffledMix(name, tier_shares=mix.shares(dearest))
