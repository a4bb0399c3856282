"""`python -m envs simulate FLEET --requests FILE.csv --out FILE`: what if this fleet had served these requests?"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError

from envs import scenario_compile, scenario_files
from envs.fleet.replay import replay
from envs.fleet.state import COMPLETED, FleetSpec
from envs.scenario_fleet import FleetSection
from envs.tables import read_columns, write_whole
from marginroute.errors import InputError

COLUMNS = ("arrived_at", "prompt_tokens", "output_tokens")
MOST_TOKENS = 10_000_000


@dataclasses.dataclass(frozen=True)
class _FleetOnly:
    """As much of a scenario as the fleet's compilation looks at."""

    fleet: FleetSection
    tier_names: tuple[str, ...]


def fleet_section(name_or_path: str) -> FleetSection:
    """A fleet from configs/fleets or a file, checked, with its engine profiles filled in and without prices looked up.

    Raises:
        InputError: One sentence: file, key path, value, what is legal.
    """
    path = scenario_files.locate(name_or_path, "fleet")
    data, files = scenario_files.read_yaml(path), {"": str(path)}
    try:
        section = FleetSection.model_validate(data)
    except ValidationError as error:
        raise scenario_files.input_error(error, FleetSection, data, files, ()) from None
    for kind in ("pools", "providers"):
        for name, item in getattr(section, kind).items():
            if item.tier not in section.tiers:
                legal = ", ".join(section.tiers)
                raise InputError(f"{path}: {kind}.{name}.tier: {item.tier!r} is not a tier; legal is {legal}")

    def place(*keys: str) -> str:
        return scenario_files.place(list(keys), files, ())

    return scenario_compile.with_profiles(section, place)


def load_fleet(name_or_path: str) -> FleetSpec:
    """A fleet from configs/fleets or a file, without plans and workload.

    Raises:
        InputError: One sentence: file, key path, value, what is legal.
    """
    return compiled(fleet_section(name_or_path))


def compiled(section: FleetSection) -> FleetSpec:
    """The engine's fleet; prices take no part in it."""
    only: Any = _FleetOnly(section, tuple(section.tiers))
    return scenario_compile.fleet_spec(only)


def read_requests(path: Path) -> dict[str, npt.NDArray[np.float64]]:
    """Arrival times and token counts, checked.

    Raises:
        InputError: A cell is no number, time goes backwards, or a count is not a whole number of 1 or more.
    """
    columns = read_columns(path, COLUMNS)
    arrived_at = columns["arrived_at"]
    if arrived_at[0] < 0.0:
        raise InputError(f"{path}, line 2: arrived_at = {arrived_at[0]:g}; legal is 0 or later")
    back = np.flatnonzero(np.diff(arrived_at) < 0.0)
    if back.size:
        row = int(back[0]) + 1
        before, value = arrived_at[row - 1], arrived_at[row]
        raise InputError(
            f"{path}, request {row + 1}: arrived_at = {value:g} after {before:g}; legal is ascending order"
        )
    for name in COLUMNS[1:]:
        values = columns[name]
        bad = np.flatnonzero((values < 1) | (values > MOST_TOKENS) | (values != np.floor(values)))
        if bad.size:
            row, value = int(bad[0]), values[bad[0]]
            legal = f"legal is a whole number from 1 to {MOST_TOKENS}"
            raise InputError(f"{path}, request {row + 1}: {name} = {value:g}; {legal}")
    return columns


def _pool_index(spec: FleetSpec, name: str | None) -> int:
    names = [pool.name for pool in spec.pools]
    if name is None:
        return 0
    if name not in names:
        raise InputError(f"--pool {name!r} is not in the fleet; legal is {', '.join(names)}")
    return names.index(name)


def _cell(value: float) -> str:
    return "" if np.isnan(value) else repr(float(value))


def run(arguments: argparse.Namespace) -> int:
    """Simulates and writes one row per request; a request whose context cannot fit has empty cells."""
    spec = load_fleet(arguments.fleet)
    pool = _pool_index(spec, arguments.pool)
    columns = read_requests(arguments.requests)
    arrived_at, output_tokens = columns["arrived_at"], columns["output_tokens"].astype(np.int64)
    fleet = replay(spec, arrived_at, columns["prompt_tokens"].astype(np.int64), output_tokens, pool=pool)
    done = fleet.requests[0]
    served = done["status"] == COMPLETED
    ttft_s = np.where(served, done["first_token_at_s"] - arrived_at, np.nan)
    e2e_s = np.where(served, done["completed_at_s"] - arrived_at, np.nan)
    tpot_s = np.where(output_tokens > 1, (e2e_s - ttft_s) / np.maximum(output_tokens - 1, 1), 0.0 * ttft_s)
    lines = ["arrived_at,prompt_tokens,output_tokens,replica,ttft_s,tpot_s,e2e_s,restarts"]
    for i in range(len(arrived_at)):
        times = ",".join(_cell(value) for value in (ttft_s[i], tpot_s[i], e2e_s[i]))
        lines.append(
            f"{float(arrived_at[i])!r},{int(columns['prompt_tokens'][i])},{output_tokens[i]},{done['replica'][i]},"
            f"{times},{done['restarts'][i]}"
        )
    write_whole(arguments.out, "\n".join(lines) + "\n")
    print(_summary(ttft_s, tpot_s, e2e_s, served), file=sys.stderr)
    return 0


def _summary(ttft_s: Any, tpot_s: Any, e2e_s: Any, served: Any) -> str:
    """Percentiles of the requests served, in words."""
    words = [f"{int(served.sum())} of {served.size} requests served"]
    if served.any():
        for name, values in (("TTFT", ttft_s), ("TPOT", tpot_s), ("E2E", e2e_s)):
            p50, p95, p99 = np.percentile(values[served], [50, 95, 99])
            words.append(f"{name} p50 {p50:.3g} s, p95 {p95:.3g} s, p99 {p99:.3g} s")
    return "; ".join(words)
