"""Entrants of a scenario with a controller: every one is a router and a controller together.

The chain that a learned bundle is judged by, all on the same days:

    tuned router + tuned rules      one entrant per heuristic controller; the best on the surrogate is the reference
    tuned router + mpc              plans around the best rule (`envs.control_mpc`); slow, so only where it is named
    router network + best rule      what the router learned
    tuned router + control network  what the controller learned
    router network + control network  both, as the bundle ships them

What was not learned (`learned: none`) is left out: it would be the reference again.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from evaluation.arguments import check_names, names_of, untuned_error
from evaluation.deciders import Deciders
from marginroute.bundle import Bundle
from marginroute.control_policy import LearnedController, rule_of
from marginroute.control_rules import RuleController, standard_rules
from marginroute.errors import InputError
from marginroute.policy import Policy, ResidualPolicy

if TYPE_CHECKING:
    from envs.scenario import Scenario

Names = dict[str, Policy]


def enter_controlled(
    scenario: Scenario, runs: list[str], baselines: str
) -> tuple[Names, Names, tuple[()], str | None, bool]:
    """Examined deciders, heuristic ones, no content-blind controls, the best tuned one's name, whether any is tuned.

    Where nothing was tuned, rules that are asked for by name are played as they come, beside the plain gateway.

    Args:
        scenario: the world.
        runs: run folders or bundles.
        baselines: "all" (tuned rules), "none", or names of controllers separated by commas.

    Raises:
        InputError: an unknown name, a bundle without a controller, nothing tuned, or nobody.
    """
    from agents.run import load_bundle

    bundles = {run: load_bundle(Path(run), scenario) for run in runs}
    for run, bundle in bundles.items():
        if bundle.controller is None:
            raise InputError(f"{run} has no controller, scenario {scenario.name!r} has one; train on it again")
    named = names_of(baselines)
    rules, best, router = _rules(scenario, Path(runs[0]) if runs else None, named)
    tuned = {name: Deciders(rule, router) for name, rule in rules.items()}
    if best:
        from envs.control_mpc import NAME, MpcController

        tuned[NAME] = Deciders(MpcController(scenario, rules[best]), router)
    wanted = list(rules) if baselines == "all" else named
    check_names("--baselines", wanted, ["all", "none", *tuned], "is no controller")
    heuristics: Names = {tuned[name].name: tuned[name] for name in wanted}
    examined: Names = {}
    for run, bundle in bundles.items():
        suffix = "" if len(bundles) == 1 else f":{run}"
        assert router is not None, "runs are compared with tuned rules"
        examined |= {f"{pair.name}{suffix}": pair for pair in _chain(bundle, router)}
    if not examined and not heuristics:
        raise InputError("nothing to compare: give at least one --policy or one of --baselines")
    reference = tuned[best].name if best in wanted else None
    return examined, heuristics, (), reference, router is not None


def _chain(bundle: Bundle, tuned_router: Policy) -> list[Deciders]:
    """What a bundle learned: both deciders, then each alone beside what was tuned."""
    assert bundle.controller is not None
    rule, both = rule_of(bundle.controller), Deciders(bundle.controller, bundle.guarded())
    chain = [both]
    learned_controller = isinstance(bundle.controller, LearnedController)
    if isinstance(bundle.policy, ResidualPolicy):
        if learned_controller:
            chain += [Deciders(rule, bundle.guarded()), Deciders(bundle.controller, tuned_router)]
    elif learned_controller:
        chain = [Deciders(bundle.controller, tuned_router)]
    return chain


def _rules(
    scenario: Scenario, run: Path | None, named: list[str]
) -> tuple[dict[str, RuleController], str, Policy | None]:
    """Tuned controllers by name, the best one's name, and the tuned router; untuned ones, "" and None without those."""
    from agents import baselines
    from envs.control_plant import ControlPlant

    layout = ControlPlant(scenario).layout
    try:
        path = baselines.file_for(scenario, run)
    except baselines.UntunedError as error:
        plain = standard_rules(layout)
        if run is None and named and set(named) <= set(plain):
            return plain, "", None
        raise untuned_error(error, named, plain) from None
    rules, best = baselines.load_controllers(path, layout)
    if not rules:
        raise InputError(f"{path} holds no tuned controllers; tune them with train.py on the same scenario")
    return rules, best, baselines.router_beside(path)
