"""What train.py says of a finished run, in one line each."""

from __future__ import annotations

from typing import Any


def controller_line(controller: dict[str, Any]) -> str:
    """What the engine said of the controller, in one line."""
    verdict, rule = controller["gate"], controller["rule"]
    if "vs" not in verdict:
        return f"controller: {rule} (learned: none; not trained)"
    interval = "none" if verdict["ci95"] is None else "[{:+z.4f}, {:+z.4f}]".format(*verdict["ci95"])
    exported = "the learned controller" if verdict["learned"] else f"{rule} (learned: none)"
    why = f"; refused: {'; '.join(verdict['refused'])}" if verdict["refused"] else ""
    return (
        f"controller gate: learned minus {rule} = {verdict['delta_usd_per_1k']:+z.4f} USD per 1k requests of "
        f"{verdict['episodes']} validation days on the engine, 95 % {interval}; exported: {exported}{why}"
    )


def parity_line(info: dict[str, Any]) -> str:
    """When the policy reached the tuned bid price on validation episodes, and when it passed it."""
    parity = info.get("parity")
    if parity is None:
        return "parity: not timed in a run that was resumed before its first validation"
    found = []
    for words, key in (("within 0.5 %", "reached"), ("above it", "passed")):
        moment = parity.get(key)
        found.append(
            f"{words} {'never' if moment is None else 'after {s:.0f} s ({steps:,} decisions)'.format(**moment)}"
        )
    return f"tuned bid price on validation: {parity['bid_price_usd_per_1k']:.4f} USD per 1k; policy {', '.join(found)}"


def verdict_line(verdict: dict[str, Any], advice: str) -> str:
    """What the gate found, in one line."""
    interval = "none" if verdict["ci95"] is None else "[{:+z.4f}, {:+z.4f}]".format(*verdict["ci95"])
    exported = "the learned policy" if verdict["learned"] else f"{advice} (learned: none)"
    floors = "".join(
        f"; {key} {x['learned']:.4f} (heuristic {x['heuristic']:.4f}, floor {x['limit']:g})"
        for key, x in verdict.get("floors", {}).items()
    )
    why = f"; refused: {'; '.join(verdict['refused'])}" if verdict["refused"] else ""
    return (
        f"gate: learned minus {advice} = {verdict['delta_usd_per_1k']:+z.4f} USD per 1k validation requests, 95 % "
        f"{interval} of {verdict['observations']} observations{floors}; exported: {exported}{why}"
    )
