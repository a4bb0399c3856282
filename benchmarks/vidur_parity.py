"""The engine against Vidur, request by request, on recorded runs of Vidur.

`--truth DIR` holds pairs CASE.csv[.gz] (one row per request) and CASE.json (Vidur's configuration and `result`);
`--tables DIR` holds HARDWARE_tables.npz, Vidur's own iteration times; the longest HARDWARE that begins a case's name is
its table. The engine runs in parity mode (Vidur's scheduler with its quirks) on those tables.

`--fitted DIR` repeats every case with a compact profile fitted to HARDWARE_grid.csv[.gz] of that folder, which is how
the engine is meant to be used; then the errors of the percentiles are what counts.
"""

from __future__ import annotations

import json
import sys
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks import common
from envs.fleet.profile import Profile, compact_profile, tables_profile
from envs.tables import FloatArray, read_columns
from marginroute.cli import main_guard
from marginroute.errors import InputError

if TYPE_CHECKING:
    from envs.fleet.spec import FleetSpec

SCHEDULERS = {"vllm": ("prefill-first", "max_tokens_in_batch"), "sarathi": ("sarathi", "chunk_size")}
COLUMNS = ("arrived_at", "prompt_tokens", "output_tokens", "ttft", "e2e", "restarts")
PERCENTILES = (50, 95, 99)


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error}); legal is a JSON file") from None


def load_tables(path: Path) -> Profile:
    """Vidur's look-up tables as a profile."""
    try:
        with np.load(path) as arrays:
            tables = dict(arrays)
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile):
        raise InputError(f"{path}: cannot be read; legal is an .npz file of numeric arrays") from None
    return tables_profile(str(path), tables)


def _entry(path: Path, place: dict[str, Any], key: str, kind: type) -> Any:
    """A number of a configuration."""
    value = place[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or value != kind(value):
        words = "a whole number" if kind is int else "a number"
        raise InputError(f"{path}: {key} = {value!r}; legal is {words}")
    return kind(value)


def parity_spec(path: Path, profile: Profile, quirks: bool = True) -> FleetSpec:
    """The fleet that a case's configuration describes.

    Raises:
        InputError: An entry is missing, or the case is outside what the engine models.
    """
    from envs.fleet.spec import FleetSpec, PoolSpec

    data = _json(path)
    try:
        cluster, result = data["config"]["cluster_config"], data["result"]
        scheduler, replica = cluster["replica_scheduler_config"], cluster["replica_config"]
        if scheduler["name"] not in SCHEDULERS:
            raise InputError(f"{path}: scheduler {scheduler['name']!r}; legal is {', '.join(SCHEDULERS)}")
        if cluster["num_replicas"] != 1 or replica["num_pipeline_stages"] != 1:
            raise InputError(f"{path}: several replicas or pipeline stages; legal is one of each")
        mode, budget = SCHEDULERS[scheduler["name"]]
        pool = PoolSpec(
            name=path.stem,
            profile=profile,
            kv_blocks=_entry(path, result, "num_blocks", int),
            block_size_tokens=_entry(path, scheduler, "block_size", int),
            max_num_seqs=_entry(path, scheduler, "batch_size_cap", int),
            max_num_batched_tokens=_entry(path, scheduler, budget, int),
            scheduler=mode,
            watermark_share=_entry(path, scheduler, "watermark_blocks_fraction", float),
            vidur_quirks=quirks,
        )
    except (KeyError, TypeError) as error:
        what = f"entry {error} is missing" if isinstance(error, KeyError) else "is no configuration"
        raise InputError(f"{path}: {what}; legal is Vidur's configuration with its result") from None
    return FleetSpec((pool,), scrape_interval_s=1e12)


def _errors_pct(ours: FloatArray, truth: FloatArray) -> dict[str, float]:
    ratios = np.percentile(ours, PERCENTILES) / np.percentile(truth, PERCENTILES) - 1.0
    return {f"p{p}": round(float(100.0 * ratio), 6) + 0.0 for p, ratio in zip(PERCENTILES, ratios, strict=True)}


def compare(truth: dict[str, FloatArray], spec: FleetSpec) -> dict[str, Any]:
    """Differences between the engine and the recorded run."""
    from envs.fleet.replay import replay
    from envs.fleet.state import COMPLETED, FAILED

    arrived_at, output_tokens = truth["arrived_at"], truth["output_tokens"].astype(np.int64)
    fleet = replay(spec, arrived_at, truth["prompt_tokens"].astype(np.int64), output_tokens)
    done = fleet.requests[0]
    failed = int((done["status"] == FAILED).sum())
    if failed:
        raise InputError(
            f"{spec.pools[0].name}: {failed} requests are longer than the KV cache; legal is a run that Vidur finished"
        )
    ttft_s, e2e_s = done["first_token_at_s"] - arrived_at, done["completed_at_s"] - arrived_at
    steps = np.maximum(output_tokens - 1, 1)
    several = output_tokens > 1
    pairs = {"ttft": (ttft_s, truth["ttft"]), "e2e": (e2e_s, truth["e2e"])}
    if several.any():
        pairs["tpot"] = (((e2e_s - ttft_s) / steps)[several], ((truth["e2e"] - truth["ttft"]) / steps)[several])
    return {
        "requests": len(arrived_at),
        "completed": int((done["status"] == COMPLETED).sum()),
        "restarts": int(done["restarts"].sum()),
        "max_abs_dttft_s": float(np.abs(ttft_s - truth["ttft"]).max()),
        "max_rel_de2e": float(np.abs(e2e_s / truth["e2e"] - 1.0).max()),
        "restarts_equal": bool((done["restarts"] == truth["restarts"]).all()),
        "percentile_errors_pct": {name: _errors_pct(*pair) for name, pair in pairs.items()},
    }


def _recorded(rows: Path) -> dict[str, FloatArray]:
    """Columns of a recorded run; TTFT from the instant where it is there, which has a fixed number of decimals."""
    columns = read_columns(rows)
    missing = [name for name in COLUMNS if name not in columns]
    if missing:
        raise InputError(f"{rows}: column {missing[0]!r} is missing; legal is {', '.join(COLUMNS)}")
    if "prefill_completed_at" in columns:
        columns["ttft"] = columns["prefill_completed_at"] - columns["arrived_at"]
    for name, least in (("arrived_at", 0), ("prompt_tokens", 1), ("output_tokens", 1), ("ttft", 1e-12), ("e2e", 1e-12)):
        values = columns[name]
        wrong = values < least
        if name.endswith("tokens"):
            wrong |= (values != np.floor(values)) | (values >= 2**30)
        if wrong.any():
            row = int(np.argmax(wrong))
            legal = "a whole number from 1 to 2^30" if name.endswith("tokens") else "0 or more"
            raise InputError(f"{rows}: {name} = {values[row]:g} in row {row + 1}; legal is {legal}")
    order = np.argsort(columns["arrived_at"], kind="stable")
    return {name: values[order] for name, values in columns.items()}


def _hardware(case: str, names: list[str], folder: Path) -> str:
    fitting = [name for name in names if case.startswith(f"{name}_")]
    if not fitting:
        raise InputError(f"{folder}: no table for case {case!r}; legal is a name that it begins with")
    return max(fitting, key=len)


def find_cases(folder: Path) -> dict[str, tuple[Path, Path]]:
    """Case name to its configuration and rows."""
    cases = {}
    for path in sorted(folder.glob("*.json")):
        rows = [folder / f"{path.stem}{ending}" for ending in (".csv.gz", ".csv")]
        found = [row for row in rows if row.is_file()]
        if found:
            cases[path.stem] = (path, found[0])
    if not cases:
        raise InputError(f"{folder}: no case; legal is a folder with pairs CASE.json and CASE.csv[.gz]")
    return cases


def run_cases(truth: Path, tables: Path, fitted: Path | None = None) -> dict[str, Any]:
    """All cases of a folder, and those with fitted profiles where asked for."""
    names = [path.name.removesuffix("_tables.npz") for path in sorted(tables.glob("*_tables.npz"))]
    profiles: dict[str, tuple[Profile, Profile | None]] = {}
    exact, compact = {}, {}
    for case, (configuration, rows) in find_cases(truth).items():
        name = _hardware(case, names, tables)
        if name not in profiles:
            profiles[name] = (load_tables(tables / f"{name}_tables.npz"), fit_grid(fitted, name))
        recorded = _recorded(rows)
        exact[case] = compare(recorded, parity_spec(configuration, profiles[name][0]))
        figures = exact[case]
        common.note(f"{case}: dTTFT {figures['max_abs_dttft_s']:.1e} s, dE2E {figures['max_rel_de2e']:.1e}")
        if profiles[name][1] is not None:
            compact[case] = compare(recorded, parity_spec(configuration, profiles[name][1]))
    return {"cases": exact, **({"fitted_cases": compact, **_worst(compact)} if compact else {})}


def fit_grid(folder: Path | None, name: str) -> Profile | None:
    """A compact profile fitted to HARDWARE_grid.csv[.gz] of a folder; None without a folder."""
    if folder is None:
        return None
    paths = [path for ending in (".csv.gz", ".csv") if (path := folder / f"{name}_grid{ending}").is_file()]
    if not paths:
        raise InputError(f"{folder}: no {name}_grid.csv[.gz]; legal is a folder with one grid per table")
    from envs.calibrate import calibrate_iterations

    common.note(f"fitting {name}")
    return compact_profile(name, calibrate_iterations(paths[0], {}))


def _worst(cases: dict[str, Any]) -> dict[str, float]:
    errors = [
        abs(value)
        for case in cases.values()
        for percentiles in case["percentile_errors_pct"].values()
        for value in percentiles.values()
    ]
    return {
        "fitted_median_error_pct": round(float(np.median(errors)), 3),
        "fitted_largest_error_pct": round(max(errors), 3),
    }


@main_guard
def main(argv: list[str] | None = None) -> int:
    """Compares and prints."""
    parser = common.parser(__doc__)
    parser.add_argument("--truth", type=Path, required=True, metavar="DIR", help="recorded runs of Vidur")
    parser.add_argument("--tables", type=Path, required=True, metavar="DIR", help="Vidur's look-up tables")
    parser.add_argument("--fitted", type=Path, metavar="DIR", help="grids to fit compact profiles to")
    arguments = parser.parse_args(argv)
    common.emit("vidur_parity", run_cases(arguments.truth, arguments.tables, arguments.fitted))
    return 0


if __name__ == "__main__":
    sys.exit(main())
