"""The rows of benchmarks/results.py: what trained policies earn in a scenario and under its held-out conditions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from agents.baselines import baselines_for
from agents.run import load_bundle
from envs.scenario import Scenario
from evaluation.conditions import ITSELF
from evaluation.contest import Play, choose_best
from evaluation.controls import CONTROLS
from evaluation.protocol import evaluate_policies
from evaluation.report import PER_1K, shed_shares
from evaluation.results import EpisodeResults
from evaluation.statistics import holm, paired_estimate, sign_flip_p_value

CHAIN = ("bid-price", "bid-price-fitted", "bid-price-adaptive")
HEADS = ("scenario, condition", "learned", "margin", "best heuristic", "gain", "95 %", "%", "p Holm", "by seed")
MORE_HEADS = ("over shipped", "%", "SLO", "good", "lost")


def rows(scenario: Scenario, runs: Sequence[Path], episodes: int, conditions: bool = True) -> list[dict[str, Any]]:
    """A row for the scenario as it is, and one per condition; the best heuristic is chosen on validation, once."""
    bundles = {f"seed {i}": load_bundle(run, scenario) for i, run in enumerate(runs)}
    learned = {name: bundle.guarded() for name, bundle in bundles.items()}
    heuristics = {k: p for k, p in baselines_for(scenario, run_dir=runs[0]).items() if k not in CONTROLS}
    best = str(choose_best(scenario, heuristics, Play(episodes)))
    kept = {name: heuristics[name] for name in {best, "shipped", *CHAIN} if name in heuristics}
    found = []
    for condition in (ITSELF, *(scenario.conditions if conditions else ())):
        world = scenario if condition == ITSELF else scenario.under(condition)
        results = evaluate_policies(world, {**learned, **kept}, episodes)
        row = _row(results, list(learned), best)
        exported = [bundle.learned != "none" for bundle in bundles.values()]
        found.append({"scenario": scenario.name, "condition": condition, "exported": exported, **row})
    return found


def _row(results: Mapping[str, EpisodeResults], seeds: Sequence[str], best: str) -> dict[str, Any]:
    """Gains of the mean over training seeds, paired by episode."""
    theirs, calls = results[best], results[best].first_calls
    margin_usd = np.mean([results[seed].margin_usd for seed in seeds], axis=0)
    base_usd = float(theirs.contribution_usd.mean())
    row: dict[str, Any] = {"margin_usd_per_1k": PER_1K * float(margin_usd.sum() / calls.sum()), "best_heuristic": best}
    for name, key in ((best, "gain"), ("shipped", "over_shipped")):
        if name not in results:
            continue
        gain_usd = margin_usd - results[name].margin_usd
        estimate = paired_estimate(gain_usd, calls, scale=PER_1K)
        row[key] = {
            "usd_per_1k": estimate.mean,
            "ci95": [estimate.low, estimate.high],
            "pct": 100.0 * float(gain_usd.mean()) / base_usd if base_usd > 0.0 else None,
            "p": sign_flip_p_value(gain_usd),
        }
    row["gain_by_seed"] = [
        PER_1K * float((results[seed].margin_usd - theirs.margin_usd).sum() / calls.sum()) for seed in seeds
    ]
    row["chain_usd_per_1k"] = {
        name: PER_1K * float(results[name].margin_usd.sum() / calls.sum()) for name in CHAIN if name in results
    }
    return row | {"class_change": _class_change([results[seed] for seed in seeds], theirs)}


def _class_change(ours: Sequence[EpisodeResults], theirs: EpisodeResults) -> dict[str, float]:
    """Points by which the class that fares worst differs from the best heuristic: SLOs, good answers, no answer."""
    joined = replace(ours[0], counts=np.concatenate([x.counts for x in ours]))
    change = {
        "slo": float(np.nanmin(joined.share("slo_ok") - theirs.share("slo_ok"))),
        "good": float(np.nanmin(joined.share("good", "served") - theirs.share("good", "served"))),
        "lost": float(np.nanmax(shed_shares(joined) - shed_shares(theirs))),
    }
    return {name: 100.0 * x for name, x in change.items()}


def adjust(found: Sequence[dict[str, Any]]) -> None:
    """Adds p-values adjusted over all rows."""
    for row, p in zip(found, holm([row["gain"]["p"] for row in found]), strict=True):
        row["gain"]["p_holm"] = float(p)


def markdown(found: Sequence[Mapping[str, Any]], commit: str, command: str) -> str:
    """The rows as a page that names the command and the commit they come from."""
    lines = [
        "# Results",
        "",
        f"    {command}",
        "",
        f"Written by it at commit {commit}. Gains are USD per 1k",
        "first calls, mean over training seeds, paired by held-out episode, of the policies as exported and by argmax",
        "(where the gate did not let the network pass, the bundle is the heuristic itself, and says so); %: of",
        "contribution margin; p: sign-flip test, adjusted over all rows (Holm); learned: seeds whose gates exported",
        "a network. SLO, good, lost: points by which the class that fares worst differs from the best heuristic.",
        "",
        "| " + " | ".join(HEADS + MORE_HEADS) + " |",
        "| --- | " + " | ".join(["---:"] * (len(HEADS + MORE_HEADS) - 1)) + " |",
    ]
    lines += ["| " + " | ".join(_cells(row)) + " |" for row in found]
    lines += [
        "",
        "## What the margin comes from",
        "",
        "| scenario | bid price | fitted | adaptive | exported |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for row in found:
        if row["condition"] == ITSELF:
            chain = [
                f"{row['chain_usd_per_1k'][name]:.3f}" if name in row["chain_usd_per_1k"] else "-" for name in CHAIN
            ]
            lines.append(f"| {row['scenario']} | {' | '.join(chain)} | {row['margin_usd_per_1k']:.3f} |")
    return "\n".join(lines) + "\n"


def _cells(row: Mapping[str, Any]) -> list[str]:
    gain, shipped, change = row["gain"], row.get("over_shipped"), row["class_change"]
    name = row["scenario"] if row["condition"] == ITSELF else f"· {row['condition']}"
    return [
        name,
        f"{sum(row['exported'])} of {len(row['exported'])}",
        f"{row['margin_usd_per_1k']:.2f}",
        row["best_heuristic"],
        f"{gain['usd_per_1k']:+z.3f}",
        "[{:+z.3f}, {:+z.3f}]".format(*gain["ci95"]),
        _pct(gain["pct"]),
        "<.001" if gain["p_holm"] < 0.001 else f"{gain['p_holm']:.3f}",
        ", ".join(f"{x:+z.3f}" for x in row["gain_by_seed"]),
        "-" if shipped is None else f"{shipped['usd_per_1k']:+z.2f}",
        "-" if shipped is None else _pct(shipped["pct"]),
        *(f"{change[key]:+z.1f}" for key in ("slo", "good", "lost")),
    ]


def _pct(x: float | None) -> str:
    return "-" if x is None else f"{x:+z.1f}"
