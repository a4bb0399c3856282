"""The rows of benchmarks/results.py: what trained policies earn in a scenario and under its held-out conditions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from agents.baselines import baselines_for
from agents.run import load_bundle
from agents.workers import Crew
from envs.scenario import Scenario
from evaluation.conditions import ITSELF
from evaluation.contest import Play, choose_best, enter
from evaluation.controls import CONTROLS
from evaluation.deciders import Deciders
from evaluation.protocol import evaluate_policies
from evaluation.report import PER_1K, shed_shares
from evaluation.results import EpisodeResults
from evaluation.statistics import holm, paired_estimate, sign_flip_p_value
from marginroute.bundle import Bundle
from marginroute.control_policy import LearnedController
from marginroute.margin_rule import MarginRule
from marginroute.policy import Policy

SHIPPED = "shipped"
CHAIN = ("bid-price", "bid-price-fitted", "bid-price-adaptive")
HEADS = ("episodes", "learned", "margin", "best heuristic", "gain", "95 %", "%", "p Holm", "by seed")
MORE_HEADS = ("over shipped", "%", "SLO", "good", "lost")


def rows(
    scenario: Scenario, runs: Sequence[Path], episodes: int, condition_episodes: int, workers: Crew | int | None = 1
) -> list[dict[str, Any]]:
    """A row for the scenario as it is, and one per condition; the best heuristic is chosen on validation, once."""
    bundles = {f"seed {i}": load_bundle(run, scenario) for i, run in enumerate(runs)}
    exported = {name: _learned(bundle) for name, bundle in bundles.items()}
    rules = [name for name in bundles if not exported[name]]  # all of them decide alike: the first plays for all
    plays = {name: name if exported[name] else rules[0] for name in bundles}
    decide = {name: _decides(bundles[name]) for name in sorted(set(plays.values()))}
    keep = _kept if scenario.control is None else _kept_controlled
    best, kept = keep(scenario, runs[0], Play(episodes, workers=workers))
    found = []
    for condition in (ITSELF, *(scenario.conditions if condition_episodes else ())):
        world = scenario if condition == ITSELF else scenario.under(condition)
        played = episodes if condition == ITSELF else condition_episodes
        rivals = kept if condition == ITSELF else {name: kept[name] for name in (best, SHIPPED) if name in kept}
        results = evaluate_policies(world, {**decide, **rivals}, played, workers=workers)
        results |= {name: results[of] for name, of in plays.items()}
        row = _row(results, list(bundles), best)
        found.append(
            {
                "scenario": scenario.name,
                "condition": condition,
                "episodes": played,
                "exported": [*exported.values()],
                **row,
            }
        )
    return found


def _learned(bundle: Bundle) -> bool:
    return bundle.learned != "none" or isinstance(bundle.controller, LearnedController)


def _decides(bundle: Bundle) -> Policy:
    """What a gateway runs of a bundle; the guard of one with a controller only where a network routes."""
    if bundle.controller is None:
        return bundle.guarded()
    return Deciders(bundle.controller, bundle.policy if isinstance(bundle.policy, MarginRule) else bundle.guarded())


def _kept(scenario: Scenario, run: Path, play: Play) -> tuple[str, dict[str, Policy]]:
    """The best heuristic, chosen on validation, and those that the table needs."""
    heuristics = {k: p for k, p in baselines_for(scenario, run_dir=run).items() if k not in CONTROLS}
    best = str(choose_best(scenario, heuristics, play))
    return best, {name: heuristics[name] for name in {best, SHIPPED, *CHAIN} if name in heuristics}


def _kept_controlled(scenario: Scenario, run: Path, play: Play) -> tuple[str, dict[str, Policy]]:
    """The rule that was best on validation, and Kubernetes', beside the tuned router."""
    entrants = enter(scenario, [str(run)], "all")
    pairs = {pair.controller.name: pair for pair in entrants.heuristics.values() if isinstance(pair, Deciders)}
    best = entrants.heuristics[str(entrants.best)]
    return str(entrants.best), {str(entrants.best): best, SHIPPED: pairs["hpa"]}


def _row(results: Mapping[str, EpisodeResults], seeds: Sequence[str], best: str) -> dict[str, Any]:
    """Gains of the mean over training seeds, paired by episode."""
    theirs, calls = results[best], results[best].first_calls
    margin_usd = np.mean([results[seed].margin_usd for seed in seeds], axis=0)
    base_usd = float(theirs.contribution_usd.mean())
    row: dict[str, Any] = {"margin_usd_per_1k": PER_1K * float(margin_usd.sum() / calls.sum()), "best_heuristic": best}
    for name, key in ((best, "gain"), (SHIPPED, "over_shipped")):
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


def markdown(found: Sequence[Mapping[str, Any]], command: str) -> str:
    """The rows as a page that names the command and the commits that they were played at."""
    commits = ", ".join(dict.fromkeys(row["commit"] for row in found))
    whole = [row for row in found if row["condition"] == ITSELF]
    changed = [row for row in found if row["condition"] != ITSELF]
    lines = [
        "# Results",
        "",
        f"    {command}",
        "",
        f"Written by it; played at commit {commits}. Gains are USD per 1k",
        "first calls, mean over training seeds, paired by held-out episode, of the policies as exported and by argmax",
        "(where the gate did not let the network pass, the bundle is the heuristic itself, and says so); %: of the",
        "contribution margin; p: sign-flip test, adjusted over all rows of this page (Holm); learned: seeds whose",
        "gates exported a network. SLO, good, lost: points by which the class that fares worst differs from the best",
        "heuristic. Where there is a controller, an episode is a day, and shipped is Kubernetes' rule beside the",
        "tuned router.",
        "",
        *_summary(found),
        "",
        *_table(whole, "scenario"),
    ]
    lines += ["", "## What the margin comes from", "", *_chain(whole)]
    if changed:
        lines += ["", "## Held-out conditions", "", *_table(changed, "condition")]
    return "\n".join(lines) + "\n"


def _summary(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the rows say together."""
    whole = [row for row in found if row["condition"] == ITSELF]
    ahead = [row for row in whole if any(row["exported"]) and _significant(row) > 0]
    behind = [row for row in found if _significant(row) < 0]
    exported = sum(sum(row["exported"]) for row in whole)
    trained = sum(len(row["exported"]) for row in whole)
    pct = [row["gain"]["pct"] for row in whole if row["gain"]["pct"] is not None]
    over = [row["over_shipped"]["pct"] for row in whole if row.get("over_shipped", {}).get("pct") is not None]
    names = ", ".join(f"{row['scenario']} ({_pct(row['gain']['pct'])} %)" for row in ahead) or "none"
    apart = holm([row["gain"]["p"] for row in whole])
    alone = [
        row["scenario"] for row, p in zip(whole, apart, strict=True) if p < 0.05 and row["gain"]["usd_per_1k"] > 0.0
    ]
    worse = ", ".join(f"{row['scenario']}, {row['condition']}" for row in behind) or "none"
    lines = [
        f"- Gates exported a network in {exported} of {trained} trainings.",
        f"- Significantly better by what was learned: {names}.",
        f"- With the scenarios as they are for a family of their own: {', '.join(alone) or 'none'}.",
        f"- Significantly worse than the best tuned heuristic, of {len(found)} rows: {worse}.",
        f"- Median of the scenarios: {np.median(pct):+.1f} % over the best tuned heuristic.",
    ]
    return lines + ([f"- Over the best shipped composite, tuned: {np.median(over):+.1f} %."] if over else [])


def _significant(row: Mapping[str, Any]) -> int:
    """1 or -1 where a gain differs from zero, else 0."""
    return int(np.sign(row["gain"]["usd_per_1k"])) if row["gain"]["p_holm"] < 0.05 else 0


def _table(found: Sequence[Mapping[str, Any]], first: str) -> list[str]:
    heads = (first, *HEADS, *MORE_HEADS)
    lines = ["| " + " | ".join(heads) + " |", "| --- | " + " | ".join(["---:"] * (len(heads) - 1)) + " |"]
    return lines + ["| " + " | ".join(_cells(row)) + " |" for row in found]


def _chain(found: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = ["| scenario | bid price | fitted | adaptive | exported |", "| --- | ---: | ---: | ---: | ---: |"]
    for row in found:
        usd = row["chain_usd_per_1k"]
        chain = [f"{usd[name]:.3f}" if name in usd else "-" for name in CHAIN]
        lines.append(f"| {row['scenario']} | {' | '.join(chain)} | {row['margin_usd_per_1k']:.3f} |")
    return lines


def _cells(row: Mapping[str, Any]) -> list[str]:
    gain, shipped, change = row["gain"], row.get("over_shipped"), row["class_change"]
    name = row["scenario"] if row["condition"] == ITSELF else f"{row['scenario']}, {row['condition']}"
    return [
        name,
        str(row["episodes"]),
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
