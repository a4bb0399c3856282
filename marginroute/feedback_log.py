"""`marginroute feedback LOG BUNDLE`: what the feedback in a log of decisions says of P(good answer)."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from marginroute import bundle as bundles
from marginroute import view as v
from marginroute.bundle import Bundle
from marginroute.errors import InputError
from marginroute.feedback import QualityPosterior, load_posterior, shifted
from marginroute.record import unpacked
from marginroute.view import N_STATIC_SIGNALS
from marginroute.whole_file import write_whole


def lines_of(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of a file of JSON lines.

    Raises:
        InputError: unreadable, or a line that is no object with an id.
    """
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                try:
                    data = json.loads(line)
                except ValueError:
                    data = None
                if not isinstance(data, dict) or not isinstance(data.get("id"), str):
                    raise InputError(f"{path}, line {number}: no JSON object with an id; legal is one a line")
                yield number, data
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise InputError(f"{path} cannot be read ({reason}); legal is a file of JSON lines") from None


def read_feedback(path: Path) -> dict[str, dict[str, str]]:
    """Signals by request id; later lines add to earlier ones."""
    found: dict[str, dict[str, str]] = {}
    for number, data in lines_of(path):
        signals = {key: value for key, value in data.items() if key != "id"}
        wrong = next((key for key, value in signals.items() if not isinstance(value, str)), None)
        if wrong is not None:
            raise InputError(f"{path}, line {number}: {wrong} = {signals[wrong]!r}; legal is a word")
        found.setdefault(data["id"], {}).update(signals)
    return found


def learn(
    bundle: Bundle, log: Path, feedback: dict[str, dict[str, str]], start: QualityPosterior | None, half_life: float
) -> tuple[QualityPosterior, int]:
    """The posterior after a log, and the number of answers that had signals.

    Args:
        bundle: that the log was written with.
        log: decision records.
        feedback: signals by request id.
        start: the posterior that was in force; its shifts are taken out of what the log shows. None: none was.
        half_life: of evidence, in answers, where there is no `start`.

    Raises:
        InputError: the log or the feedback is not what it should be.
    """
    layout = bundle.layout
    posterior = start or QualityPosterior(layout.tier_names, layout.task_names, half_life=half_life)
    if (posterior.tiers, posterior.tasks) != (layout.tier_names, layout.task_names):
        raise InputError("the starting posterior is of other tiers or tasks; legal is one of this bundle")
    in_force, used = posterior.shift()[0], 0
    row, position = v.P_GOOD_PRIOR - N_STATIC_SIGNALS, {name: c for c, name in enumerate(layout.names)}
    for number, record in lines_of(log):
        c = position.get(record.get("served_by") or "", -1)
        signals = dict(feedback.get(record["id"], {}))
        if isinstance(record.get("good"), bool):
            signals["label"] = "good" if record["good"] else "bad"
        if c < 0 or layout.tier[c] < 0 or not signals or record.get("status") != "completed":
            continue
        try:
            p_shown = float(unpacked(record["signals"], layout.n_candidates)[row, c])
            task = int(record["request"]["task_index"])
            cell = int(layout.tier[c]), task
            p_good = float(shifted(np.array(p_shown), -in_force[cell]))
        except (KeyError, ValueError, TypeError, IndexError):
            raise InputError(f"{log}, line {number}: not a record of this bundle with its signals") from None
        posterior.update(*cell, p_good, signals)
        used += 1
    return posterior, used


def text_table(posterior: QualityPosterior, used: int) -> str:
    """Shifts by tier and task as text."""
    mean, deviation = posterior.shift()
    width = max(len(name) for name in (*posterior.tiers, "tier"))
    task_width = max(len(name) for name in (*posterior.tasks, "task"))
    lines = [f"{used} answers with feedback", f"{'tier':<{width}}  {'task':<{task_width}}  answers  shift of log-odds"]
    for t, tier in enumerate(posterior.tiers):
        for j, task in enumerate(posterior.tasks):
            shift = f"{mean[t, j]:+.3f} +- {deviation[t, j]:.3f}" if posterior.answers[t, j] else "none"
            lines.append(f"{tier:<{width}}  {task:<{task_width}}  {posterior.answers[t, j]:7d}  {shift}")
    return "\n".join(lines) + "\n"


def run(arguments: argparse.Namespace) -> int:
    """Learns, prints and, if asked, writes."""
    start = None if arguments.start is None else load_posterior(arguments.start)
    feedback = {} if arguments.feedback is None else read_feedback(arguments.feedback)
    posterior, used = learn(bundles.load(arguments.bundle), arguments.log, feedback, start, arguments.half_life)
    sys.stdout.write(text_table(posterior, used))
    if arguments.out is not None:
        write_whole(arguments.out, json.dumps(posterior.to_dict()) + "\n")
    return 0
