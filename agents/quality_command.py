"""`python -m agents quality TABLE --out FILE.npz`: fit, judge on prompts held out, fit on all, write.

The figures are of a fit on the other prompts; the predictor written is the same fit on all of them.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from agents.prompt_quality import auc_of, check, fit_predictor, folds_of, log_loss
from envs.workload.traces_outcomes import Columns, OutcomeTable, read_outcomes
from marginroute.cli import note
from marginroute.errors import InputError, nearest
from marginroute.predictor import QualityPredictor
from marginroute.view import Array
from marginroute.whole_file import check_target, write_whole

BINS = 5
MIN_PROMPTS = 50


@dataclass(frozen=True, eq=False)
class Judgement:
    """How a predictor does on rows held out; T models.

    Attributes:
        n: (T,) outcomes.
        share_good: (T,).
        auc: (T,) of the predictor.
        auc_length: (T,) of the prompt's length alone, in the better direction.
        loss: (T,) mean log loss in nats.
        loss_constant: (T,) of the fitted rows' share of good answers, the same for every prompt.
        curve: (T, BINS, 2) mean prediction and share of good answers, by fifths of the predictions.
    """

    n: Array
    share_good: Array
    auc: Array
    auc_length: Array
    loss: Array
    loss_constant: Array
    curve: Array

    def to_dict(self, models: tuple[str, ...]) -> dict[str, Any]:
        """Figures by model, for JSON; null where a figure is not defined."""
        names = ("n", "share_good", "auc", "auc_length", "loss", "loss_constant")
        return {
            model: {name: _json(getattr(self, name)[t]) for name in names}
            | {"calibration": [[_json(x) for x in pair] for pair in self.curve[t]]}
            for t, model in enumerate(models)
        }


def _json(value: float) -> float | None:
    return round(float(value), 6) if np.isfinite(value) else None


def judge(predictor: QualityPredictor, texts: list[str], good: Array, fitted: Array) -> Judgement:
    """A predictor on (N, T) outcomes that it was not fitted on; `fitted` are those that it was."""
    logit = np.array([predictor.logit(text) for text in texts])
    length = np.tile(np.log1p([[len(text)] for text in texts]), len(predictor.models))
    by_length = auc_of(length, good)
    share = (np.nansum(fitted, axis=0) + 0.5) / ((~np.isnan(fitted)).sum(axis=0) + 1.0)
    constant = np.broadcast_to(np.log(share / (1.0 - share)), good.shape)
    return Judgement(
        n=(~np.isnan(good)).sum(axis=0),
        share_good=np.nanmean(good, axis=0),
        auc=auc_of(logit, good),
        auc_length=np.maximum(by_length, 1.0 - by_length),
        loss=log_loss(logit, good),
        loss_constant=log_loss(constant, good),
        curve=np.array([_curve(logit[:, t], good[:, t]) for t in range(len(share))]),
    )


def _curve(logit: Array, good: Array) -> Array:
    """(BINS, 2) mean prediction and share of good answers by quantile of the prediction; NaN of parts without any."""
    known = np.flatnonzero(~np.isnan(good))
    order = known[np.argsort(logit[known], kind="stable")]
    p = 1.0 / (1.0 + np.exp(-logit))
    parts = np.array_split(order, BINS)
    return np.array([(p[part].mean(), good[part].mean()) if len(part) else (np.nan, np.nan) for part in parts])


def held_out(table: OutcomeTable, share: float, good_from: float, seed: int) -> tuple[QualityPredictor, Judgement]:
    """The predictor fitted on all prompts, with the AUC of the same fit on the others, and that fit's judgement.

    Raises:
        InputError: too few prompts or outcomes.
    """
    good, n = table.good(good_from), len(table.prompts)
    if n < MIN_PROMPTS:
        raise InputError(f"the table has {n} prompts; legal is at least {MIN_PROMPTS}")
    check(table.models, good)
    _note(f"{n} prompts, {len(table.models)} models: {', '.join(table.models)}")
    fold = folds_of(n, round(1.0 / share), seed + 1)
    inside, outside = np.flatnonzero(fold), np.flatnonzero(fold == 0)
    for t, name in enumerate(table.models):
        if np.isnan(good[outside, t]).all():
            raise InputError(f"model {name!r} has no outcome among the prompts held out; legal is a larger --held-out")
    part = fit_predictor([table.prompts[i] for i in inside], table.models, good[inside], seed, _note)
    judgement = judge(part, [table.prompts[i] for i in outside], good[outside], good[inside])
    _note("the same on all prompts")
    return replace(fit_predictor(table.prompts, table.models, good, seed, _note), auc=judgement.auc), judgement


def mean_auc(judged: Judgement) -> float:
    """Mean over the models whose AUC is defined; NaN where none is."""
    known = judged.auc[~np.isnan(judged.auc)]
    return float(known.mean()) if len(known) else float("nan")


def _figure(value: float) -> str:
    return "-" if np.isnan(value) else f"{value:.3f}"


def text_table(models: tuple[str, ...], judged: Judgement) -> str:
    """The judgement as text."""
    width = max(len(name) for name in (*models, "model"))
    head = f"{'model':<{width}}      n  good %    AUC  AUC of length  log loss  of a constant"
    lines = ["Prompts held out:", head]
    for t, name in enumerate(models):
        lines.append(
            f"{name:<{width}}  {judged.n[t]:5d}  {100 * judged.share_good[t]:6.1f}  {_figure(judged.auc[t]):>5}  "
            f"{_figure(judged.auc_length[t]):>13}  {judged.loss[t]:8.3f}  {judged.loss_constant[t]:13.3f}"
        )
    lines.append(f"{'mean':<{width}}  {'':5}  {'':6}  {_figure(mean_auc(judged)):>5}")
    if np.isnan(judged.auc).any():
        lines.append("-: answers of one kind alone were held out; a larger --held-out may have both")
    lines += ["", f"Calibration: predicted -> good %, by {BINS} equal parts of the predictions"]
    for t, name in enumerate(models):
        pairs = "   ".join(f"{100 * p:3.0f} -> {100 * y:3.0f}" for p, y in judged.curve[t] if np.isfinite(p))
        lines.append(f"{name:<{width}}  {pairs}")
    return "\n".join(lines) + "\n"


def _named(table: OutcomeTable, tiers: list[str]) -> OutcomeTable:
    """The table with models called as the scenario's tiers; those without a tier keep their names."""
    called = {}
    for item in tiers:
        tier, equals, model = item.partition("=")
        if not equals or not tier or model not in table.models:
            legal = f"legal is TIER=MODEL with one of the models {', '.join(table.models)}"
            raise InputError(f"--tier {item}:{nearest(model, table.models)} {legal}")
        if model in called:
            raise InputError(f"--tier {item}: {model} is called {called[model]} already; legal is a name for each")
        called[model] = tier
    models = tuple(called.get(name, name) for name in table.models)
    if len(set(models)) < len(models):
        raise InputError(f"--tier: two models would share a name ({', '.join(models)}); legal is a name for each")
    return replace(table, models=models)


def _note(text: str) -> None:
    note(text)


def run(arguments: argparse.Namespace) -> int:
    """Fits, judges, prints and writes."""
    if not 0.0 < arguments.held_out <= 0.5:
        raise InputError(f"--held-out {arguments.held_out}: legal is above 0 and at most 0.5")
    if not 0.0 < arguments.good_from <= 1.0:
        raise InputError(f"--good-from {arguments.good_from}: legal is above 0 and at most 1")
    if arguments.seed < 0:
        raise InputError(f"--seed {arguments.seed}: legal is 0 or more")
    for target in (arguments.out, arguments.json):
        if target is not None:
            check_target(target)
    models = None if arguments.models is None else tuple(name.strip() for name in arguments.models.split(","))
    if models is not None and ("" in models or len(set(models)) < len(models)):
        raise InputError(f"--models {arguments.models!r}: legal are names separated by commas, each once")
    columns = Columns(prompt=arguments.prompt, model=arguments.model, outcome=arguments.outcome, models=models)
    table = _named(read_outcomes(arguments.table, columns), arguments.tier)
    predictor, judged = held_out(table, arguments.held_out, arguments.good_from, arguments.seed)
    source = f"{arguments.table.name}, {len(table.prompts)} prompts, good from {arguments.good_from:g}"
    data = replace(predictor, source=source).to_bytes()
    write_whole(arguments.out, data)
    sys.stdout.write(text_table(table.models, judged))
    into = "into a bundle with python export.py RUN --out DIR --quality FILE"
    print(f"\n{arguments.out}: {len(data) / 1e3:,.0f} kB; {into}")
    if arguments.json is not None:
        figures = {"table": source, "mean_auc": _json(mean_auc(judged)), "models": judged.to_dict(table.models)}
        write_whole(arguments.json, json.dumps(figures, indent=1) + "\n")
    return 0
