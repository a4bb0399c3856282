"""What the tuned advice thinks of a decision, against what the decision was worth: is its price of congestion right?

The tuned, fitted bid price plays training episodes. At random decisions another candidate is put in the place of its
choice, one that it ranks not far behind, and the episode is played again with all other decisions as they were
(evaluation/counterfactual.py). The difference of the two margins, with the luck of the swapped answer's quality taken
out, is what the choice was worth: its own cash, and what it does to everybody else's latency. Beside it stands what the
advice expected, its difference in score. `slope` is that of worth on score: 1 where a USD of score is worth a USD.

A network that corrects the advice can only gain where the two differ in a way that it sees.

Try:
  python -m benchmarks.worth
  python -m benchmarks.worth enterprise_slo --episodes 60
"""

from __future__ import annotations

import itertools
import sys
from typing import Any

import numpy as np

from benchmarks import common
from marginroute.cli import main_guard

NEAR = 0.25  # of the request's value, that another candidate may rank below the choice
TYPICAL = 0.05  # of it: others are drawn with exp(-gap / this)
GAPS = (0.0, 0.2, 0.5, 1.0, 2.0, 5.0)  # USD per 1k requests
FIRST_SEED = 300_000  # of training episodes, beyond those of any tuning or training


@main_guard
def main(argv: list[str] | None = None) -> int:
    """Prints the figures."""
    parse = common.parser(__doc__)
    parse.add_argument("scenario", nargs="?", default="quickstart", help="with tuned baselines (default: quickstart)")
    parse.add_argument("--episodes", type=int, default=40, metavar="N", help="training episodes (default: 40)")
    parse.add_argument("--swaps", type=int, default=150, metavar="K", help="decisions swapped in each (default: 150)")
    args = parse.parse_args(argv)
    from agents.baselines import baselines_for
    from envs.plant import Plant
    from envs.scenario import load_scenario

    plant = Plant(load_scenario(args.scenario))
    advice = baselines_for(plant.scenario)["bid-price-fitted"]
    episodes, swaps = (2, 20) if args.quick else (args.episodes, args.swaps)
    rng, parts = np.random.default_rng(0), []
    for number in range(episodes):
        parts.append(_swapped(plant, advice, FIRST_SEED + number, swaps, rng))
        common.note(f"{number + 1} of {episodes} episodes")
    score, worth = 1e3 * np.concatenate(parts, axis=1)
    common.emit("worth", figures(score, worth), scenario=args.scenario, episodes=episodes)
    return 0


def figures(score: np.ndarray[Any, Any], worth: np.ndarray[Any, Any]) -> dict[str, Any]:
    """Of differences in score and what they were worth, (K,) USD per 1k requests: overall and by size."""

    def row(these: np.ndarray[Any, Any]) -> dict[str, Any]:
        half = 1.96 * float(worth[these].std(ddof=1)) / np.sqrt(these.sum())
        return {
            "swaps": int(these.sum()),
            "expected_usd_per_1k": round(float(score[these].mean()), 3),
            "worth_usd_per_1k": round(float(worth[these].mean()), 3),
            "ci95": [round(float(worth[these].mean() + sign * half), 3) for sign in (-1.0, 1.0)],
        }

    found: dict[str, Any] = {"slope": round(float(np.polyfit(score, worth, 1)[0]), 3), "all": row(score == score)}
    for low, high in itertools.pairwise(GAPS):
        these = (score >= low) & (score < high)
        if these.sum() > 1:
            found[f"expected_{low:g}_to_{high:g}"] = row(these)
    return found


def _swapped(plant: Any, advice: Any, seed: int, swaps: int, rng: Any) -> np.ndarray[Any, Any]:
    """(2, K) USD: by how much the choice leads in score, and what it was worth."""
    from envs.worlds import FleetWorlds
    from evaluation.counterfactual import worth_usd

    workload, layout = plant.scenario.generate(seed, "train"), plant.layout
    worlds, seen = FleetWorlds(plant, 1), []
    worlds.load(0, workload)
    while not worlds.done[0]:
        view = worlds.view()[0]
        assessed, request = advice.assess(view), int(worlds.desks["current"][0])
        score = np.where(view.legal, assessed.score_usd, -np.inf)
        choice = int(score.argmax())
        gap = (score[choice] - score) / max(float(assessed.value_usd), 1e-9)
        gap[choice] = np.inf
        weight = np.where(gap < NEAR, np.exp(-gap / TYPICAL), 0.0)
        if weight.any():
            other = int(rng.choice(len(weight), p=weight / weight.sum()))
            luck = sum(
                sign * assessed.bad_usd[c] * (float(workload.good[request, tier]) - workload.p_good[request, tier])
                for sign, c in ((1.0, choice), (-1.0, other))
                if (tier := layout.tier[c]) >= 0
            )
            seen.append((len(seen), other, score[choice] - score[other], luck))
        else:
            seen.append((len(seen), -1, 0.0, 0.0))
        worlds.step(np.array([choice]))
    able = [row for row in seen if row[1] >= 0]
    chosen = [able[i] for i in rng.permutation(len(able))[:swaps]]
    number, other, score, luck = (np.array(column) for column in zip(*chosen, strict=True))
    return np.stack([score, worth_usd(plant, advice, workload, number, other) - luck])


if __name__ == "__main__":
    sys.exit(main())
