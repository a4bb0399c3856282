"""Off-policy evaluation: what would another policy have earned on the decisions of a log?

Each decision x was made by a logging policy that chose candidate a with probability p(a | x) and earned r USD. For a
target policy pi, with weights w = pi(a | x) / p(a | x) and a model q(x, c) of what candidate c earns,

    IPS     mean(w r)                                    Horvitz & Thompson, JASA 1952
    SNIPS   sum(w r) / sum(w)                            Swaminathan & Joachims, NeurIPS 2015
    DM      mean(sum_c pi(c | x) q(x, c))
    DR      DM + mean(w (r - q(x, a)))                   Dudik, Langford & Li, ICML 2011
    switch  DR with w where w <= tau, and without the correction elsewhere    Wang, Agarwal & Dudik, ICML 2017

IPS, SNIPS and DR are consistent when the probabilities are right and p > 0 wherever pi > 0; DM when q is right; switch
trades a bias bounded by q's errors for variance. What is estimated is the *own margin at logged states*: the decisions
that pi would have met had it ruled from the start, with its own queues behind it, are not in the log.

The intervals are normal ones of the mean of each estimator's influence values, which is enough at the sample sizes for
which an answer is given at all: below `MIN_EFFECTIVE` effective decisions, or with more than `MAX_UNCOVERED` of the
target's decisions on candidates that the log could not have chosen, there is none.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from envs.progress import Progress, silent
from evaluation.decision_log import Decisions, read_decisions
from evaluation.report import PER_1K
from evaluation.statistics import Estimate
from marginroute.bundle import Bundle
from marginroute.errors import InputError
from marginroute.margin_rule import MarginRule
from marginroute.policy import ResidualPolicy

Floats = NDArray[np.float64]

MIN_EFFECTIVE = 200.0
MAX_UNCOVERED = 0.02
MAX_WEIGHT = 20.0  # tau of switch


@dataclass(frozen=True)
class Overlap:
    """How much of the target policy a log can speak about.

    Attributes:
        decisions: n.
        effective: (sum w)^2 / sum w^2, decisions of the target's own that the log is worth.
        mean_weight: mean(w), 1 where the log covers the target.
        largest_weight: max(w).
        uncovered: share of the target's probability on candidates that the log had none for.
        agreement: share of the decisions in which the logged candidate is the target's most probable one.
    """

    decisions: int
    effective: float
    mean_weight: float
    largest_weight: float
    uncovered: float
    agreement: float

    @property
    def refusal(self) -> str:
        """Why there is no answer; empty if there is one."""
        if self.uncovered > MAX_UNCOVERED:
            return (
                f"{self.uncovered:.1%} of the policy's decisions are ones that the log could not have made (at most "
                f"{MAX_UNCOVERED:.0%}); log with exploration on the candidates it wants"
            )
        if self.effective < MIN_EFFECTIVE:
            return (
                f"the log is worth {self.effective:.0f} decisions of the policy's own (at least {MIN_EFFECTIVE:.0f}); "
                "log more, or explore more"
            )
        return ""


@dataclass
class Totals:
    """Sums over decisions from which every estimator follows; logs are read in pieces.

    Attributes:
        n: decisions.
        largest: largest weight.
        uncovered: sum of the target's probability on candidates that the log had none for.
        agreed: decisions in which the logged candidate is the target's most probable one.
        sums: (6,) of w, w r and the terms of DM, DR, switch and r; products: (6, 6) of their products.
    """

    n: int = 0
    largest: float = 0.0
    uncovered: float = 0.0
    agreed: float = 0.0
    sums: Floats | None = None
    products: Floats | None = None

    def add(self, weight: Floats, reward_usd: Floats, model_usd: Floats, target: Floats, choice: NDArray[np.int64],
            uncovered: Floats) -> None:  # fmt: skip
        """Takes in decisions.

        Args:
            weight: (n,) pi / p of the logged candidate.
            reward_usd: (n,) what it earned.
            model_usd: (n, C) model of what every candidate earns; 0 for those that are not legal.
            target: (n, C) probabilities of the target policy.
            choice: (n,) logged candidate.
            uncovered: (n,) share of the target's probability on candidates that the log had none for.
        """
        rows = np.arange(len(weight))
        direct = (target * model_usd).sum(axis=1)
        residual = weight * (reward_usd - model_usd[rows, choice])
        terms = np.stack([
            weight,
            weight * reward_usd,
            direct,
            direct + residual,
            direct + np.where(weight <= MAX_WEIGHT, residual, 0.0),
            reward_usd,
        ])  # fmt: skip
        if self.sums is None or self.products is None:
            self.sums, self.products = np.zeros(len(terms)), np.zeros((len(terms), len(terms)))
        self.n += len(weight)
        self.largest = max(self.largest, float(weight.max(initial=0.0)))
        self.uncovered += float(uncovered.sum())
        self.agreed += float((target.argmax(axis=1) == choice).sum())
        self.sums += terms.sum(axis=1)
        self.products += terms @ terms.T

    def overlap(self) -> Overlap:
        """Diagnostics; raises InputError for an empty log."""
        if self.n == 0 or self.sums is None or self.products is None:
            raise InputError("the log has no decision with an outcome; legal is at least one")
        second = float(self.products[0, 0])
        return Overlap(
            decisions=self.n,
            effective=float(self.sums[0]) ** 2 / second if second > 0.0 else 0.0,
            mean_weight=float(self.sums[0]) / self.n,
            largest_weight=self.largest,
            uncovered=self.uncovered / self.n,
            agreement=self.agreed / self.n,
        )

    def estimates(self, level: float = 0.95) -> dict[str, Estimate]:
        """Every estimator in USD per 1k decisions; `logged`, what the log itself earned; `gain`, DR less that.

        One decision has no interval.
        """
        self.overlap()
        assert self.sums is not None and self.products is not None
        mean = self.sums / self.n
        covariance = self.products / self.n - np.outer(mean, mean)
        w, wr, dm, dr, switch, r = range(6)
        found = {
            name: (mean[i], covariance[i, i])
            for name, i in (("ips", wr), ("dm", dm), ("dr", dr), ("switch", switch), ("logged", r))
        }
        ratio = mean[wr] / mean[w] if mean[w] > 0.0 else np.nan
        spread = covariance[wr, wr] - 2.0 * ratio * covariance[wr, w] + ratio**2 * covariance[w, w]
        found["snips"] = (ratio, spread / mean[w] ** 2 if mean[w] > 0.0 else np.nan)
        found["gain"] = (mean[dr] - mean[r], covariance[dr, dr] - 2.0 * covariance[dr, r] + covariance[r, r])
        z = NormalDist().inv_cdf(0.5 + level / 2.0)
        result = {}
        for name, (value, variance) in found.items():
            half = z * np.sqrt(max(variance, 0.0) / self.n) if self.n > 1 else np.nan
            result[name] = Estimate(*(PER_1K * float(x) for x in (value, value - half, value + half)))
        return result

    def to_dict(self) -> dict[str, Any]:
        """Diagnostics and estimates as plain data; estimates are null where overlap is too small."""
        overlap = self.overlap()
        refusal = overlap.refusal
        estimates = {
            name: {key: None if math.isnan(usd) else usd for key, usd in asdict(x).items()}
            for name, x in self.estimates().items()
        }
        answered = estimates if not refusal else {"logged": estimates["logged"]}
        return {"overlap": asdict(overlap), "refusal": refusal, "usd_per_1k_decisions": answered}


def evaluate_log(path: Path, bundle: Bundle, progress: Progress = silent) -> dict[str, Any]:
    """What a bundle's policy would have earned on the decisions of a log, see the module's text.

    The model of DM, DR and switch is the bundle's own expected margin; where the log does not say whether an answer was
    good, its P(good) stands in.

    Returns:
        policy, learned, scenario, overlap, refusal, usd_per_1k_decisions: {estimator: {mean, low, high}} (null
        where there is none), skipped:
        decisions without an outcome or of shadow mode, labelled: share of answers of which the log says whether they
        were good.

    Raises:
        InputError: a line that cannot be used, or a bundle without a margin rule.
    """
    model = _margin_rule(bundle)
    policy, totals = bundle.guarded(), Totals()
    labelled = answered = skipped = 0
    for piece in read_decisions(path, bundle, progress):
        chosen = policy.decide_batch(piece.view)
        _add(totals, piece, np.eye(bundle.layout.n_candidates)[chosen], model)
        labelled += int((piece.completed & ~np.isnan(piece.good)).sum())
        answered += int(piece.completed.sum())
        skipped = piece.skipped
    if totals.n == 0:
        raise InputError(f"{path}: has no decision with an outcome; legal is at least one")
    return {
        "policy": bundle.policy.name,
        "learned": bundle.learned,
        "scenario": dict(bundle.scenario),
        **totals.to_dict(),
        "skipped": skipped,
        "labelled": labelled / max(answered, 1),
    }


def _add(totals: Totals, piece: Decisions, target: Floats, model: MarginRule) -> None:
    assessment = model.assess(piece.view)
    rows = np.arange(len(piece.choice))
    reward_usd = piece.reward_usd(assessment.p_good[rows, piece.choice])
    model_usd = np.where(piece.view.legal, assessment.margin_usd, 0.0)
    weight = target[rows, piece.choice] / piece.probability
    uncovered = (target * ~piece.support).sum(axis=1)
    totals.add(weight, reward_usd, model_usd, target, piece.choice, uncovered)


def _margin_rule(bundle: Bundle) -> MarginRule:
    """The rule that a bundle puts USD on candidates with."""
    policy = bundle.policy.advice if isinstance(bundle.policy, ResidualPolicy) else bundle.policy
    for rule in (policy, bundle.fallback):
        if isinstance(rule, MarginRule):
            return rule
    raise InputError(f"policy {bundle.policy.name!r} has no estimate in USD; legal is a bundle with a margin rule")
