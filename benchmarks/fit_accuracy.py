"""Errors of fitted profiles over whole runs at many loads, the edge of stability included.

`--tables DIR` holds HARDWARE_tables.npz, Vidur's look-up tables, and HARDWARE_grid.csv[.gz], designed batches from
them. The truth of each run is the engine on the tables themselves; the same run on the profile that was fitted to the
grid is compared with it by percentiles of TTFT, TPOT and E2E. Loads are shares of the throughput that the truth reaches
when all requests wait from the start. Above about 0.9 a run amplifies a bias of the iteration times five to fifty
times: waiting grows like 1 / (1 - load).
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

from benchmarks import common
from marginroute.cli import main_guard

LOADS = (0.5, 0.85, 0.95, 1.0, 1.1)
BATCHING = (("vllm", 2048), ("vllm", 4096), ("sarathi", 256), ("sarathi", 512), ("sarathi", 1024), ("sarathi", 2048))
PROMPT, OUTPUT = (1000.0, 0.7, 3500), (150.0, 0.8, 590)  # median, sigma of the logarithm, most tokens
KV_TOKENS = 150_000
TOLERANCE_PCT = 3.0


def errors_of_runs(exact: Any, fitted: Any, n: int) -> dict[float, list[float]]:
    """Load to the errors in per cent of all percentiles of all runs at it."""
    import numpy as np

    from benchmarks.vidur_parity import PERCENTILES, SCHEDULERS
    from envs.fleet.replay import replay
    from envs.fleet.spec import FleetSpec, PoolSpec

    def latencies(profile: Any, batching: tuple[str, int], cap: int, block: int, at: Any) -> list[Any]:
        pool = PoolSpec(
            "pool",
            profile,
            kv_blocks=KV_TOKENS // block,
            block_size_tokens=block,
            max_num_seqs=cap,
            max_num_batched_tokens=batching[1],
            scheduler=SCHEDULERS[batching[0]][0],
            vidur_quirks=True,
        )
        done = replay(FleetSpec((pool,), scrape_interval_s=1e12), at, prompts, outputs).requests[0]
        ttft_s, e2e_s = done["first_token_at_s"] - at, done["completed_at_s"] - at
        return [ttft_s, e2e_s, (e2e_s - ttft_s) / np.maximum(outputs - 1, 1)]

    rng = np.random.default_rng(5)
    found: dict[float, list[float]] = {load: [] for load in LOADS}
    for batching, load in itertools.product(BATCHING, LOADS):
        cap, block = int(rng.choice([32, 48, 128])), int(rng.choice([16, 32]))
        prompts, outputs = (
            np.clip(rng.lognormal(np.log(median), sigma, n), 2, most).astype(np.int64)
            for median, sigma, most in (PROMPT, OUTPUT)
        )
        capacity = n / latencies(exact, batching, cap, block, np.zeros(n))[1].max()
        at = np.cumsum(rng.exponential(1.0 / (load * capacity), n))
        pairs = zip(*(latencies(profile, batching, cap, block, at) for profile in (exact, fitted)), strict=True)
        for truth, ours in pairs:
            ratios = np.percentile(ours, PERCENTILES) / np.percentile(truth, PERCENTILES)
            found[load] += (100.0 * np.abs(ratios - 1.0)).tolist()
    return found


def _summary(errors: list[float]) -> dict[str, float]:
    import numpy as np

    runs = np.array(errors).reshape(-1, 9).max(axis=1)
    return {
        "runs": len(runs),
        "runs_above_3_pct": int((runs > TOLERANCE_PCT).sum()),
        **{f"p{q}_error_pct": round(float(np.percentile(errors, q)), 2) for q in (50, 90, 99)},
        "largest_error_pct": round(max(errors), 2),
    }


@main_guard
def main(argv: list[str] | None = None) -> int:
    """Fits, runs and prints."""
    parser = common.parser(__doc__)
    parser.add_argument("--tables", type=Path, required=True, metavar="DIR", help="Vidur's tables and the grids")
    arguments = parser.parse_args(argv)
    from benchmarks.vidur_parity import fit_grid, load_tables
    from marginroute.errors import InputError

    paths = sorted(arguments.tables.glob("*_tables.npz"))
    if not paths:
        raise InputError(f"{arguments.tables}: no HARDWARE_tables.npz; legal is a folder with tables and grids")
    by_load: dict[float, list[float]] = {load: [] for load in LOADS}
    for path in paths:
        name = path.name.removesuffix("_tables.npz")
        fitted = fit_grid(arguments.tables, name)
        for load, errors in errors_of_runs(load_tables(path), fitted, 200 if arguments.quick else 1500).items():
            by_load[load] += errors
    figures = {"all": _summary([error for errors in by_load.values() for error in errors])}
    common.emit("fit_accuracy", figures | {f"load_{load}": _summary(errors) for load, errors in by_load.items()})
    return 0


if __name__ == "__main__":
    sys.exit(main())
