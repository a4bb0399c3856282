"""The envelope that every benchmark prints: one JSON object with machine, commit and figures."""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

from marginroute.cli import Parser

ROOT = Path(__file__).resolve().parent.parent


def parser(doc: str | None) -> Parser:
    """A command line with `--quick`; its examples are those of the module's docstring, or the plain call."""
    prog = f"python -m benchmarks.{Path(sys.argv[0]).stem}"
    parse = Parser.from_doc(prog, doc if "Try:\n" in (doc or "") else f"{doc}\nTry:\n{prog}\n{prog} --quick")
    parse.add_argument("--quick", action="store_true", help="a short run, for a smoke test; figures are rough")
    return parse


def cpu_s(pid: int) -> float:
    """CPU seconds of a process so far, to a hundredth; NaN where the system has no /proc."""
    try:
        words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return math.nan
    return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")


def commit() -> str:
    """The checkout's commit, with + if files differ from it."""
    try:
        head = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
        )
        dirty = subprocess.run(
            ["git", "status", "--porcelain", "-uno"], cwd=ROOT, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("+" if dirty.stdout.strip() else "")


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    model = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    except OSError:
        pass
    import os

    return {"cpu": model, "cores": os.cpu_count(), "python": platform.python_version(), "system": platform.system()}


def emit(benchmark: str, figures: dict[str, Any], **more: Any) -> None:
    """Prints the one JSON object."""
    json.dump(
        {"benchmark": benchmark, "machine": machine(), "commit": commit(), "figures": figures, **more},
        sys.stdout,
        indent=1,
    )
    print()


def note(text: str) -> None:
    """Progress, on stderr."""
    print(text, file=sys.stderr, flush=True)
