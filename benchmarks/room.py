"""How much there is to learn: what the tuned, fitted bid price would earn if it knew what no gateway is told.

Three rules play the same validation episodes, paired with the fitted bid price:

- *answers*: its P(good) is Bayes' rule on the request's task and difficulty signal, with every model's true abilities
  and what drift has made of them by now. No record of judged answers, however long, tells more.
- *one price*: all its prices of congestion times the factor that is best on the other half of the episodes.
- *price by member*: the same for each draw from the scenario's ranges by itself, as if load, prices and contracts of
  the draw were known and the rule tuned for them: what adapting to a member of the family can bring.

A network that corrects the rule by what it hears of answers stays below the first; what the third exceeds the second by
is what context could tell. Scenarios with a controller are left out: a router decides little there (docs/control.md).

Try:
  python -m benchmarks.room
  python -m benchmarks.room seats_quota --episodes 384
"""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from typing import Any

import numpy as np

from benchmarks import common
from marginroute.cli import main_guard

FACTORS = (0.35, 0.5, 0.7, 1.0, 1.4, 2.0, 3.0)
FIRST_SEED = 70_000  # of validation episodes that choose nothing else
Array = np.ndarray[Any, Any]


@main_guard
def main(argv: list[str] | None = None) -> int:
    """Prints the figures."""
    parse = common.parser(__doc__)
    parse.add_argument("scenarios", nargs="*", help="with tuned baselines (default: all of configs/scenarios)")
    parse.add_argument("--episodes", type=int, default=192, metavar="N", help="validation episodes (default: 192)")
    args = parse.parse_args(argv)
    from agents.baselines import find
    from envs.scenario import load_scenario
    from evaluation.suite import scenario_names

    rows = []
    for name in args.scenarios or scenario_names():
        scenario = load_scenario(name)
        if scenario.control is None and (args.scenarios or find(scenario)):
            rows.append(row(scenario, 24 if args.quick else args.episodes))
            common.note(f"| {' | '.join(str(x) for x in rows[-1].values())} |")
    common.emit("room", {"rows": rows}, episodes=args.episodes)
    return 0


def row(scenario: Any, episodes: int) -> dict[str, Any]:
    """Gains of one scenario in per cent of the fitted bid price's margin, with their standard errors."""
    from agents.baselines import baselines_for
    from agents.objective import Objective
    from envs.plant import Plant

    rule = baselines_for(scenario)["bid-price-fitted"]
    objective = Objective(Plant(scenario), "validation", range(FIRST_SEED, FIRST_SEED + episodes))
    own = objective.each(rule)
    priced = np.stack([objective.each(rule.at_price(factor)) for factor in FACTORS]) - own
    member = np.array([workload.variant for workload in objective.workloads])
    half = np.arange(episodes) // len(np.unique(member)) % 2
    objective.workloads = [replace(x, p_good_prior=known_p_good(scenario, x)) for x in objective.workloads]
    found = {
        "answers": objective.each(replace(rule, quality=as_told(rule.quality))) - own,
        "one_price": chosen(priced, np.zeros_like(member), half),
        "price_by_member": chosen(priced, member, half),
    }
    figures = {"scenario": scenario.name, "usd_per_1k": round(float(own.mean()), 3)}
    for name, gains in found.items():
        unit = 100.0 / abs(float(own.mean()))
        figures[f"{name}_pct"] = round(unit * float(gains.mean()), 2)
        figures[f"{name}_se"] = round(unit * float(gains.std()) / math.sqrt(episodes), 2)
    return figures


def chosen(gains: Array, group: Array, half: Array) -> Array:
    """(E,) of gains (L, E) those of choices, each the best on the other `half` (E,), 0 or 1, of an episode's group."""
    found = np.zeros(gains.shape[1])
    for g in np.unique(group):
        for side in (0, 1):
            there, other = (group == g) & (half == side), (group == g) & (half != side)
            if there.any() and other.any():
                found[there] = gains[gains[:, other].mean(axis=1).argmax(), there]
    return found


def known_p_good(scenario: Any, workload: Any) -> Array:
    """(M, T) P(good) of requests given task, difficulty signal, and every model's true ability at that moment."""
    from marginroute.quality import prior_p_good

    truth = scenario.variants[workload.variant].workload_spec.quality
    ability = np.array(truth.ability).T[workload.task_index]
    if workload.ability_shift.size:
        ability = ability + workload.ability_shift
    slope, rho = np.array(truth.slope), truth.signal_correlation
    nobody_can = truth.nobody_can(workload.task_index)
    return prior_p_good(ability, slope, workload.difficulty_signal, rho, nobody_can, truth.unseen_variance)


def as_told(quality: Any) -> Any:
    """A fit that takes P(good) as it is told; stored answers keep theirs."""
    ones = np.ones_like(quality.slope)
    return replace(quality, intercept=0.0 * ones, slope=ones, length=np.zeros_like(quality.length), fit_worth=math.inf)


if __name__ == "__main__":
    sys.exit(main())
