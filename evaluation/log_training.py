"""Training from a gateway's own log: P(good) of the scenario refitted on its outcomes, and the result held against it.

The log is cut by lines: the first `FIT_SHARE` teaches, the rest judges. What is refitted are the abilities of the
scenario's tiers by task (`agents.log_quality`); the public prior stays what the gateway shows. Tuning, training and the
gate then take place in the refitted world, and the policy that comes out is evaluated off-policy on the lines that
nothing was fitted on.
"""

from __future__ import annotations

import contextlib
import itertools
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from agents.log_quality import FittedAbilities, Labels, fit_abilities
from envs.plant import Plant
from envs.progress import Progress, silent
from envs.scenario import Scenario
from evaluation.decision_log import ShadowError
from evaluation.logged_requests import read_requests
from evaluation.off_policy import evaluate_log
from evaluation.off_policy_show import overlap_words
from marginroute import view as v
from marginroute.bundle import Bundle
from marginroute.errors import InputError
from marginroute.view import Layout

FIT_SHARE = 0.7  # of the lines
LEAST_LABELS = 100


def refit(scenario: Scenario, log: Path, progress: Progress = silent) -> tuple[dict[str, Any], FittedAbilities]:
    """What a log says about who answers what well.

    Args:
        scenario: whose candidates the log names.
        log: DecisionRecords, one per line.
        progress: called with bytes read and bytes in all.

    Returns:
        Overrides of the scenario by dotted key, and the fit behind them.

    Raises:
        InputError: a line that cannot be used, or too few labelled answers.
    """
    with _part(log, first=True) as part:
        labels = read_labels(part, Plant(scenario).layout, progress)
    if len(labels) < LEAST_LABELS:
        raise InputError(
            f"{log}: its first {FIT_SHARE:.0%} hold {len(labels)} answers of which it says whether they were good; "
            f"legal are {LEAST_LABELS} or more"
        )
    truth = scenario.workload_spec.quality
    found = fit_abilities(truth, labels)
    overrides: dict[str, Any] = {}
    for t, tier in enumerate(scenario.tier_names):
        key = f"fleet.tiers.{tier}.quality"
        overrides[f"{key}.prior_ability"] = round(float(truth.prior_ability[t]), 6)
        for k, task in enumerate(scenario.task_names):
            overrides[f"{key}.ability.{task}"] = round(float(found.ability[t, k]), 6)
    return overrides, found


def read_labels(log: Path, layout: Layout, progress: Progress = silent) -> Labels:
    """The labelled answers of a log, whoever chose who gives them: shadow mode serves."""
    candidates = [name for name, kind in zip(layout.names, layout.kind, strict=True) if kind <= v.PROVIDER]
    found = read_requests(log, candidates, layout.class_names, layout.task_names, progress)
    known = found.completed & ~np.isnan(found.good) & ~np.isnan(found.difficulty_signal) & (found.candidate >= 0)
    tier = layout.tier[found.candidate[known]]
    return Labels(tier, found.task_index[known], found.difficulty_signal[known], found.good[known])


def judge(log: Path, bundle: Bundle, progress: Progress = silent) -> dict[str, Any]:
    """Off-policy evaluation of a bundle on the part of the log that nothing was fitted on; as `evaluate_log`.

    Of a log of shadow mode only the `refusal`.
    """
    with _part(log, first=False) as part:
        try:
            return evaluate_log(part, bundle, progress)
        except ShadowError:
            return {"refusal": "it was written in shadow mode, where choices have no probabilities"}


def judged_line(judged: dict[str, Any]) -> str:
    """What the log says about the policy, in one line."""
    if judged["refusal"]:
        return f"off-policy on the log's last {1 - FIT_SHARE:.0%}: no answer, {judged['refusal']}"
    usd = judged["usd_per_1k_decisions"]
    gain, logged = usd["gain"], usd["logged"]
    return (
        f"off-policy on the log's last {1 - FIT_SHARE:.0%}: gain {gain['mean']:+z.3f} [{gain['low']:+z.3f}, "
        f"{gain['high']:+z.3f}] over {logged['mean']:.3f} USD per 1k decisions; {overlap_words(judged)}"
    )


@contextlib.contextmanager
def _part(log: Path, first: bool) -> Iterator[Path]:
    """A temporary file with the first or the last lines of a log."""
    with tempfile.TemporaryDirectory() as folder:
        part = Path(folder) / log.name
        try:
            with open(log, "rb") as file:
                cut = int(FIT_SHARE * sum(1 for _ in file))
                file.seek(0)
                with open(part, "wb") as out:
                    out.writelines(itertools.islice(file, cut) if first else itertools.islice(file, cut, None))
        except OSError as error:
            raise InputError(f"{log}: cannot be read ({error.strerror}); legal is a log of decisions") from None
        try:
            yield part
        except InputError as error:  # names the file that was given
            raise InputError(str(error).replace(str(part), str(log) if first else f"the last part of {log}")) from None
