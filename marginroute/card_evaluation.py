"""The evaluation of a bundle as lines of its card: what it earned against whom, and what that was not bought with."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

HEADS = ("policy", "margin [95 %]", "delta [95 %]", "p Holm", "contrib.", "SLO %", "good %", "lost %")


def evaluation_lines(evaluation: dict[str, Any]) -> list[str]:
    """Lines of a document that `export.py --evaluation` put into the manifest."""
    best = evaluation["best_heuristic"]
    lines = [f"  {evaluation['scenario']}, {evaluation['episodes']} held-out episodes, USD per 1,000 requests"]
    calibration = evaluation.get("calibration")
    if calibration is not None:
        words = "calibrated against" if calibration["calibrated"] else "NOT CALIBRATED against"
        lines.append(f"  {words} {calibration['log']}")
    rows = [list(HEADS), *_rows(evaluation, best)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEADS))]
    lines += ["  " + "  ".join(_aligned(row, widths)).rstrip() for row in rows]
    lines.append("  * best heuristic, chosen on other episodes; SLO and good of the lowest class, lost of the highest")
    bounds = evaluation.get("bounds") or {}
    if bounds.get("clairvoyant") is not None:
        lines.append(
            f"  no policy earns more than {bounds['clairvoyant']:.2f} on these episodes, none without knowledge of "
            f"outcomes more than {bounds['same_information']:.2f} on average"
        )
    kinds = [item["kind"] for item in evaluation.get("assumptions") or []]
    if kinds:
        counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
        lines.append(f"  inputs: {counts}")
        lines += [f"    {item['name']}: {item['kind']}, {item['value']}" for item in evaluation["assumptions"]]
    return lines


def _rows(evaluation: dict[str, Any], best: str | None) -> Iterator[list[str]]:
    for name, policy in evaluation["policies"].items():
        paired = evaluation["paired"].get(name)
        delta = "" if paired is None else _figure(paired["delta_usd_per_1k_requests"], paired["ci95"], "+")
        margin = policy["margin_usd_per_1k_requests"]
        yield [
            f"{name} *" if name == best else name,
            _figure(margin["mean"], margin["ci95"], ""),
            delta,
            "" if paired is None else f"{paired['p_holm']:.3f}",
            f"{policy['contribution_margin_usd_per_1k_requests']['mean']:.2f}",
            _worst(policy["slo_attainment"], min),
            _worst(policy["quality"], min),
            _worst(policy["shed"], max),
        ]


def _aligned(row: list[str], widths: list[int]) -> list[str]:
    return [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]


def _figure(mean: float, interval: list[float] | None, sign: str) -> str:
    if interval is None:
        return f"{mean:{sign}.2f}"
    return f"{mean:{sign}.2f} [{interval[0]:{sign}.2f}, {interval[1]:{sign}.2f}]"


def _worst(shares: dict[str, float | None], choose: Any) -> str:
    known = [100.0 * share for share in shares.values() if share is not None]
    return f"{choose(known):.1f}" if known else "-"
