"""The verdict of the last backtest of a scenario, which heads every later report on it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[1] / ".marginroute_cache" / "backtests"
SHOWN = 3  # reasons that a heading names


def remember(document: Mapping[str, Any]) -> None:
    """Keeps a verdict for later reports on the scenario; quiet where it cannot."""
    from evaluation.document import write_json

    with contextlib.suppress(OSError):
        FOLDER.mkdir(parents=True, exist_ok=True)
        write_json(FOLDER / f"{document['hash']}.json", document)


def verdict(scenario_hash: str) -> dict[str, Any] | None:
    """The last backtest of a scenario: log, calibrated, outside; None where there was none."""
    try:
        document = json.loads((FOLDER / f"{scenario_hash}.json").read_text())
        return {key: document[key] for key in ("log", "requests", "calibrated", "outside")}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def verdict_words(found: Mapping[str, Any] | None) -> str:
    """What a report is headed by; empty where no backtest was made."""
    if found is None:
        return ""
    if found["calibrated"]:
        return f"Calibrated: the world predicts {found['requests']:,} requests of {found['log']} within the tolerances."
    reasons = "; ".join(found["outside"][:SHOWN]) + (", and more" if len(found["outside"]) > SHOWN else "")
    return f"NOT CALIBRATED against {found['log']}: {reasons}."
