"""`marginroute replay LOG BUNDLE`: decides a log again with a bundle and shows what changes.

Every decision is made on what was known then (`request`, `signals` and `legal` of its record) with the constants, the
policy and the guard of the bundle. What the choices are expected to earn is the bundle's own estimate for both, the
logged and the new ones, so that the difference is one of decisions alone. Nothing that happened is part of it: that is
`evaluate.py --log`.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from marginroute import bundle as bundles
from marginroute.bundle import Bundle
from marginroute.errors import InputError
from marginroute.features import FEATURE_VERSION
from marginroute.feedback_log import lines_of
from marginroute.record import unpacked
from marginroute.view import CLASS_INDEX, N_STATIC_SIGNALS, REQUEST_NAMES, SIGNALS, TASK_INDEX, Array, View

PIECE = 2000  # decisions made in one call
MOST_CHANGES = 10  # kinds of change that are printed


@dataclass
class Replay:
    """What a log and a bundle decide.

    Attributes:
        decisions: compared.
        skipped: records without the signals that a decision needs.
        logged, replayed: choices by candidate.
        changes: (logged, replayed) where they differ.
        classes: by customer class: decisions, changed ones, and the change of expected USD.
        logged_usd, replayed_usd: expected margin of all choices; NaN if the bundle cannot estimate it.
        gain_usd2: sum of the squared differences.
        handed_over: decisions that the bundle's guard takes.
    """

    decisions: int = 0
    skipped: int = 0
    logged: Counter[str] = field(default_factory=Counter)
    replayed: Counter[str] = field(default_factory=Counter)
    changes: Counter[tuple[str, str]] = field(default_factory=Counter)
    classes: dict[str, list[float]] = field(default_factory=dict)
    logged_usd: float = 0.0
    replayed_usd: float = 0.0
    gain_usd2: float = 0.0
    handed_over: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Plain data; USD per 1,000 decisions, None where unknown."""
        n = max(self.decisions, 1)
        gain = (self.replayed_usd - self.logged_usd) / n
        error = math.sqrt(max(self.gain_usd2 / n - gain**2, 0.0) / n)
        usd = {
            "logged_usd_per_1k": 1e3 * self.logged_usd / n,
            "replayed_usd_per_1k": 1e3 * self.replayed_usd / n,
            "gain_usd_per_1k": 1e3 * gain,
            "gain_error_usd_per_1k": 1e3 * error,
        }
        return {
            "decisions": self.decisions,
            "skipped": self.skipped,
            "same": self.decisions - sum(self.changes.values()),
            "handed_over": self.handed_over,
            "logged": {name: count / n for name, count in self.logged.items()},
            "replayed": {name: count / n for name, count in self.replayed.items()},
            "changes": [[*pair, count] for pair, count in self.changes.most_common()],
            "classes": {
                name: {"decisions": int(count), "changed": int(changed), "gain_usd_per_1k": _finite(1e3 * usd_ / count)}
                for name, (count, changed, usd_) in self.classes.items()
            },
            **{key: _finite(value) for key, value in usd.items()},
        }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def replay(log: Path, bundle: Bundle) -> Replay:
    """Decides every record of a log again.

    Args:
        log: decision records, JSON lines.
        bundle: made for the same candidates, in the same order.

    Raises:
        InputError: a line that is no record, or one of other candidates.
    """
    result, piece = Replay(), []
    for number, record in lines_of(log):
        if not record.get("signals"):
            result.skipped += 1
            continue
        piece.append(_parsed(log, number, record, bundle))
        if len(piece) == PIECE:
            _decide(piece, bundle, result)
            piece = []
    if piece:
        _decide(piece, bundle, result)
    return result


Parsed = tuple[Array, Array, Array, int]  # request (Q,), changing (S - S_static, C), legal (C,), choice


def _parsed(log: Path, number: int, record: dict[str, Any], bundle: Bundle) -> Parsed:
    names = bundle.layout.names
    if record.get("feature_version") != FEATURE_VERSION:
        theirs = record.get("feature_version")
        raise InputError(f"{log}, line {number}: feature version {theirs!r}; legal is {FEATURE_VERSION}")
    try:
        told = [math.inf if record["request"][x] is None else record["request"][x] for x in REQUEST_NAMES]
        request = np.array(told, dtype=np.float64)
        changing = unpacked(record["signals"], len(names))
        legal = np.zeros(len(names), dtype=np.bool_)
        legal[[names.index(name) for name in record["legal"]]] = True
        choice = names.index(record["choice"])
    except (KeyError, ValueError, TypeError):
        raise InputError(
            f"{log}, line {number}: no record of this bundle's candidates; legal are, in this order, {', '.join(names)}"
        ) from None
    for row, known in ((CLASS_INDEX, bundle.layout.class_names), (TASK_INDEX, bundle.layout.task_names)):
        if request[row] not in range(len(known)):
            raise InputError(
                f"{log}, line {number}: {REQUEST_NAMES[row]} {request[row]:g} is none of this bundle's; legal are 0 to "
                f"{len(known) - 1}: {', '.join(known)}"
            )
    return request, changing, legal, choice


def _decide(piece: list[Parsed], bundle: Bundle, result: Replay) -> None:
    layout, n = bundle.layout, len(piece)
    signals = np.empty((len(SIGNALS), n, layout.n_candidates))
    signals[:N_STATIC_SIGNALS] = bundle.static_signals[:, None, :]
    signals[N_STATIC_SIGNALS:] = np.stack([changing for _, changing, _, _ in piece], axis=1)
    request = np.stack([p[0] for p in piece], axis=1)
    legal = np.stack([p[2] for p in piece]) & bundle.allowed[request[CLASS_INDEX].astype(np.int64)]
    legal[:, -1] |= ~legal.any(axis=1)
    view = View(layout, signals, request, legal)
    policy, old = bundle.guarded(), np.array([p[3] for p in piece])
    new = policy.decide_batch(view)
    result.handed_over += int(policy.objects(view).sum())
    gain_usd = np.full(n, math.nan)
    if bundle.estimate is not None:
        margin_usd, rows = bundle.estimate.assess(view).margin_usd, np.arange(n)
        gain_usd = margin_usd[rows, new] - margin_usd[rows, old]
        result.logged_usd += float(margin_usd[rows, old].sum())
        result.replayed_usd += float(margin_usd[rows, new].sum())
        result.gain_usd2 += float((gain_usd**2).sum())
    else:
        result.logged_usd = result.replayed_usd = math.nan
    result.decisions += n
    for was, is_, k, usd in zip(old, new, view.request[CLASS_INDEX], gain_usd, strict=True):
        before, after = layout.names[was], layout.names[is_]
        result.logged[before] += 1
        result.replayed[after] += 1
        if was != is_:
            result.changes[before, after] += 1
        sums = result.classes.setdefault(layout.class_names[int(k)], [0.0, 0.0, 0.0])
        for i, value in enumerate((1.0, float(was != is_), float(usd))):
            sums[i] += value


def text_of(result: Replay, bundle: Bundle) -> str:
    """The result as text."""
    return "\n".join(_lines(result.to_dict(), bundle)) + "\n"


def _lines(data: dict[str, Any], bundle: Bundle) -> Iterator[str]:
    n = data["decisions"]
    if n == 0:
        yield f"no decision to replay ({data['skipped']} records without signals)"
        return
    skipped = f", {data['skipped']} records without signals left out" if data["skipped"] else ""
    yield f"{n} decisions by {bundle.policy.name} ({bundle.digest[:12]}){skipped}"
    yield f"{data['same']} as logged ({data['same'] / n:.1%}), {data['handed_over']} by the guard's fallback"
    width = max(len(name) for name in (*bundle.layout.names, "candidate"))
    yield f"\n{'candidate':<{width}}    logged  replayed"
    for name in bundle.layout.names:
        if data["logged"].get(name) or data["replayed"].get(name):
            yield f"{name:<{width}}  {data['logged'].get(name, 0.0):8.1%}  {data['replayed'].get(name, 0.0):8.1%}"
    if data["changes"]:
        yield "\nchanges"
        yield from (f"{count:8}  {old} -> {new}" for old, new, count in data["changes"][:MOST_CHANGES])
    if data["gain_usd_per_1k"] is None:
        yield "\nno expected margin: the bundle's policy puts no USD on candidates"
        return
    yield "\nexpected margin by this bundle's estimate, USD per 1,000 decisions"
    yield f"  logged {data['logged_usd_per_1k']:.4f}, replayed {data['replayed_usd_per_1k']:.4f}"
    yield f"  difference {data['gain_usd_per_1k']:+.4f} +- {1.96 * data['gain_error_usd_per_1k']:.4f} (95 %)"
    for name, of in data["classes"].items():
        yield f"  {name}: {of['decisions']} decisions, {of['changed']} changed, {of['gain_usd_per_1k']:+.4f}"


def run(arguments: argparse.Namespace) -> int:
    """Replays and prints."""
    bundle = bundles.load(arguments.bundle)
    result = replay(arguments.log, bundle)
    sys.stdout.write(json.dumps(result.to_dict()) + "\n" if arguments.json else text_of(result, bundle))
    return 0
