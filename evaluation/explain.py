"""Why a request went where it went: every candidate, what the policy expected of it, and what it would have brought.

Expectations are the margin rule's (that of the policy, or of the advice that it corrects); a rule of thumb has none.
What a candidate would have brought is simulated: the episode again with that candidate taken, same requests, same luck,
all other decisions as they were.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from envs.plant import Plant
from envs.scenario import Scenario
from evaluation.columns import print_columns, stdout_console
from evaluation.counterfactual import view_of_decision, worth_usd
from marginroute import view as v
from marginroute.decision import Decision
from marginroute.errors import InputError
from marginroute.margin_rule import MarginRule
from marginroute.policy import Policy, ResidualPolicy
from marginroute.view import View

HEADS = ("candidate", "expected USD", "P(good)", "TTFT s", "TPOT s", "probability", "episode USD")


@dataclass(frozen=True)
class Candidate:
    """One legal candidate of a decision.

    Attributes:
        name: such as `medium/0`.
        expected_usd: expected margin of the request there; NaN where the policy puts no USD on it.
        ttft_s, tpot_s, p_good: what the rule estimates; NaN likewise.
        probability: with which the policy takes it.
        counterfactual_usd: margin of the whole episode with it, less that with the policy's choice.
    """

    name: str
    expected_usd: float
    ttft_s: float
    tpot_s: float
    p_good: float
    probability: float
    counterfactual_usd: float


@dataclass(frozen=True)
class Explanation:
    """A decision explained: the chosen candidate first, then by what they would have brought.

    Attributes:
        decision: what the policy decided, with its reason in USD by part.
        request: what the gateway saw of the request, by name.
        candidates: all legal ones.
    """

    decision: Decision
    request: dict[str, float | str]
    candidates: list[Candidate]


def explain_decision(scenario: Scenario, policy: Policy, number: int, seed: int = 0) -> Explanation:
    """Explains decision `number` (from 0) of a held-out episode.

    Raises:
        InputError: the episode has fewer decisions.
    """
    plant = Plant(scenario)
    workload = scenario.generate(seed, "heldout")
    view, decisions = view_of_decision(plant, policy, workload, number)
    if view is None:
        raise InputError(f"--explain {number} is not legal; legal is 0 to {decisions - 1} in episode {seed}")
    decision = policy.decide(view)
    legal = np.flatnonzero(view.legal)
    others = legal[legal != decision.candidate]
    worth = worth_usd(plant, policy, workload, np.full(len(others), number), others)
    brought = dict(zip(others.tolist(), (-worth).tolist(), strict=True))
    rule, probability = margin_rule(policy), probabilities(policy, view)
    assessment = rule.assess(view) if rule is not None else None
    rows = [
        Candidate(
            name=view.layout.names[c],
            expected_usd=float(assessment.margin_usd[c]) if assessment else math.nan,
            ttft_s=float(assessment.latency_s[0, c]) if assessment and view.layout.answers[c] else math.nan,
            tpot_s=float(assessment.latency_s[1, c]) if assessment and view.layout.answers[c] else math.nan,
            p_good=float(assessment.p_good[c]) if assessment and view.layout.answers[c] else math.nan,
            probability=float(probability[c]),
            counterfactual_usd=brought.get(c, 0.0),
        )
        for c in legal.tolist()
    ]
    rows.sort(key=lambda row: (row.name != decision.name, -row.counterfactual_usd))
    return Explanation(decision, _request(view), rows)


def margin_rule(policy: Policy) -> MarginRule | None:
    """The rule that puts USD on candidates: the policy itself, its advice, or none."""
    inner: Any = getattr(policy, "policy", policy)
    if isinstance(inner, ResidualPolicy):
        return inner.advice
    return inner if isinstance(inner, MarginRule) else None


def probabilities(policy: Policy, view: View) -> Any:
    """(C,) the network's softmax over legal candidates; 1 for the choice of a policy without one."""
    inner: Any = getattr(policy, "policy", policy)
    share = np.zeros(view.layout.n_candidates)
    if isinstance(inner, ResidualPolicy):
        logits = np.where(view.legal, inner.logits(inner.inputs(view)), -np.inf)
        weight = np.exp(logits - logits.max())
        return weight / weight.sum()
    share[policy.decide(view).candidate] = 1.0
    return share


def print_explanation(explanation: Explanation, number: int, seed: int) -> None:
    """Prints the request, the candidates, and the choice's parts in USD."""
    console, decision = stdout_console(), explanation.decision
    facts = ", ".join(f"{name} {value}" for name, value in explanation.request.items())
    console.print(f"Decision {number} of held-out episode {seed}: {facts}\n", markup=False)
    console.print(f"{decision.policy} chose {decision.name}; runner-up {decision.runner_up or '-'}\n", markup=False)
    rows = [
        [
            row.name + (" *" if row.name == decision.name else ""),
            _figure(row.expected_usd, 5),
            _figure(row.p_good, 2),
            _figure(row.ttft_s, 2),
            _figure(row.tpot_s, 4),
            _figure(row.probability, 3),
            "" if row.name == decision.name else f"{row.counterfactual_usd:+z.5f}",
        ]
        for row in explanation.candidates
    ]
    print_columns(console, HEADS, rows, [1] * len(HEADS))
    parts = ", ".join(f"{name} {usd:+z.5f}" for name, usd in decision.reason_usd.items() if usd)
    if parts:
        console.print(f"\nExpected USD of the choice by part: {parts}", markup=False)
    console.print(
        "\nepisode USD: margin of the whole episode with that candidate in place of *, all others as they were",
        markup=False,
    )


def _figure(value: float, digits: int) -> str:
    return "-" if math.isnan(value) else f"{value:.{digits}f}"


def _request(view: View) -> dict[str, float | str]:
    request, layout = view.request, view.layout
    return {
        "class": layout.class_names[int(request[v.CLASS_INDEX])],
        "task": layout.task_names[int(request[v.TASK_INDEX])],
        "prompt tokens": int(request[v.PROMPT_TOKENS]),
        "expected output tokens": round(float(request[v.EXPECTED_OUTPUT_TOKENS])),
        "difficulty signal": round(float(request[v.DIFFICULTY_SIGNAL]), 2),
    }
