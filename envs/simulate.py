"""`python -m envs simulate FLEET --requests FILE.csv --out FILE`: what if this fleet had served these requests?"""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

import numpy as np
from pydantic import ValidationError

from envs import scenario_compile, scenario_files
from envs.fleet.hashes import Ragged, engine_hashes
from envs.fleet.replay import replay
from envs.fleet.spec import FleetSpec
from envs.fleet.state import COMPLETED
from envs.request_files import Requests, read_requests
from envs.scenario_fleet import FleetSection
from marginroute.cli import note
from marginroute.errors import InputError
from marginroute.whole_file import write_whole


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


def _pool_index(spec: FleetSpec, name: str | None) -> int:
    names = [pool.name for pool in spec.pools]
    if name is None:
        return 0
    if name not in names:
        raise InputError(f"--pool {name!r} is not in the fleet; legal is {', '.join(names)}")
    return names.index(name)


def _cell(value: float) -> str:
    return "" if np.isnan(value) else repr(float(value))


def _with_prefix_caching(
    spec: FleetSpec, pool: int, requests: Requests, hash_block_tokens: int
) -> tuple[FleetSpec, Ragged]:
    """The fleet with prefix caching in one pool, and the requests' hashes in that pool's blocks."""
    caching = dataclasses.replace(spec.pools[pool], prefix_caching=True)
    hashes = engine_hashes(
        requests.prompt_tokens,
        requests.output_tokens,
        (requests.hash_counts, requests.hash_ids),
        hash_block_tokens,
        caching.block_size_tokens,
    )
    return dataclasses.replace(spec, pools=(*spec.pools[:pool], caching, *spec.pools[pool + 1 :])), hashes


def run(arguments: argparse.Namespace) -> int:
    """Simulates and writes one row per request; a request whose context cannot fit has empty cells."""
    spec = load_fleet(arguments.fleet)
    pool = _pool_index(spec, arguments.pool)
    requests, hashes = read_requests(arguments.requests), None
    if requests.hash_ids is not None and not arguments.no_prefix_caching:
        spec, hashes = _with_prefix_caching(spec, pool, requests, arguments.hash_block_tokens)
    arrived_at, output_tokens = requests.arrived_at_s, requests.output_tokens
    fleet = replay(spec, arrived_at, requests.prompt_tokens, output_tokens, pool=pool, hashes=hashes)
    done = fleet.requests[0]
    served = done["status"] == COMPLETED
    ttft_s = np.where(served, done["first_token_at_s"] - arrived_at, np.nan)
    e2e_s = np.where(served, done["completed_at_s"] - arrived_at, np.nan)
    tpot_s = np.where(output_tokens > 1, (e2e_s - ttft_s) / np.maximum(output_tokens - 1, 1), 0.0 * ttft_s)
    lines = ["arrived_at,prompt_tokens,output_tokens,replica,ttft_s,tpot_s,e2e_s,restarts,cached_tokens"]
    for i in range(len(arrived_at)):
        times = ",".join(_cell(value) for value in (ttft_s[i], tpot_s[i], e2e_s[i]))
        lines.append(
            f"{float(arrived_at[i])!r},{requests.prompt_tokens[i]},{output_tokens[i]},{done['replica'][i]},"
            f"{times},{done['restarts'][i]},{done['cached_tokens'][i]}"
        )
    write_whole(arguments.out, "\n".join(lines) + "\n")
    words = _summary(ttft_s, tpot_s, e2e_s, served)
    if hashes is not None:
        prompts = requests.prompt_tokens[served].sum()
        words += f"; {done['cached_tokens'][served].sum() / max(prompts, 1):.1%} of their prompt tokens cached"
    note(words)
    return 0


def _summary(ttft_s: Any, tpot_s: Any, e2e_s: Any, served: Any) -> str:
    """Percentiles of the requests served, in words."""
    words = [f"{int(served.sum())} of {served.size} requests served"]
    if served.any():
        for name, values in (("TTFT", ttft_s), ("TPOT", tpot_s), ("E2E", e2e_s)):
            p50, p95, p99 = np.percentile(values[served], [50, 95, 99])
            words.append(f"{name} p50 {p50:.3g} s, p95 {p95:.3g} s, p99 {p99:.3g} s")
    return "; ".join(words)
