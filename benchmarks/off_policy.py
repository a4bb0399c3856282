"""Off-policy evaluation against the truth: where the states of a log are those of the policy, and where queues are not.

For each load, episodes of `quickstart` are logged by the tuned bid price with guarded exploration (30 %), the fitted
bid price is evaluated on the log (doubly robust), and then it is played on the same episodes, which is the truth. What
is left is the bias of evaluating at logged states: queues that the policy itself would have built are not in the log.
Also how many records are read and judged per CPU-second.
"""

from __future__ import annotations

import math
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import common
from marginroute.cli import main_guard

LOADS = (0.3, 1.0, 2.0, 3.0)
EXPLORE, LIMIT_USD = 0.3, 0.02
REQUESTS = 4_000  # of one log; each holds as many episodes as that takes


def bias(load_scale: float, logs: int, folder: Path) -> tuple[dict[str, float], Path, Path]:
    """Estimate less truth over the logs that are answered, with its 95 % interval; the last log, and the bundle."""
    from agents.baselines import baselines_for
    from agents.export import make_bundle
    from envs.plant import Plant
    from envs.scenario import load_scenario
    from evaluation.off_policy import evaluate_log
    from evaluation.simulated_log import write_log
    from marginroute import bundle as bundles
    from marginroute.exploration import ExploringPolicy

    rules = baselines_for(load_scenario("quickstart"))
    plant = Plant(load_scenario("quickstart", {"load_scale": load_scale}))
    saved = folder / f"bundle-{load_scale}"
    bundles.save(make_bundle(plant, rules["bid-price-fitted"], rules["least-in-flight"], {}, {}), saved)
    bundle = bundles.load(saved)
    logger = ExploringPolicy(rules["bid-price"], rules["bid-price"], EXPLORE, LIMIT_USD)
    rows, log = [], folder / "log.jsonl"
    each = math.ceil(REQUESTS / (load_scale * (plant.scenario.requests_per_episode or 1)))
    for number in range(logs):
        log, truth = folder / f"log-{load_scale}-{number}.jsonl", folder / f"truth-{load_scale}-{number}.jsonl"
        seeds = range(number * each, (number + 1) * each)
        write_log(log, plant, logger, seeds, "heldout")
        write_log(truth, plant, bundle.guarded(), seeds, "heldout")
        judged = evaluate_log(log, bundle)
        if judged["refusal"]:
            common.note(f"load x{load_scale}, log {number}: {judged['refusal']}")
            continue
        rows.append((_usd(judged, "dr"), _usd(evaluate_log(truth, bundle), "logged")))
        common.note(f"load x{load_scale}, log {number}: estimate {rows[-1][0]:.2f}, truth {rows[-1][1]:.2f}")
    if len(rows) < 2:
        return {"logs_refused": logs - len(rows)}, log, saved
    estimate, truth_usd = np.array(rows).T
    error = estimate - truth_usd
    half = 1.96 * float(error.std(ddof=1)) / math.sqrt(len(error))
    figures = {
        "logs_refused": logs - len(rows),
        "dr_usd_per_1k": round(float(estimate.mean()), 3),
        "truth_usd_per_1k": round(float(truth_usd.mean()), 3),
        "bias_usd_per_1k": round(float(error.mean()), 3),
        "bias_ci95_half_width": round(half, 3),
        "bias_pct": round(100.0 * float(error.mean() / truth_usd.mean()), 1),
    }
    return figures, log, saved


def _usd(document: dict[str, Any], name: str) -> float:
    """USD per 1k decisions."""
    return float(document["usd_per_1k_decisions"][name]["mean"])


def records_per_cpu_s(log: Path, saved: Path, records: int) -> int:
    """Records of a long log that are read and judged per CPU-second."""
    from evaluation.off_policy import evaluate_log
    from marginroute import bundle as bundles

    lines = log.read_text().splitlines()
    long = log.with_name("long.jsonl")
    with open(long, "w") as file:
        for n in range(records):
            record = lines[n % len(lines)]
            start = record.index('"id":"') + 6
            file.write(f"{record[:start]}{n // len(lines)}-{record[start:]}\n")
    start_s = time.process_time()
    evaluate_log(long, bundles.load(saved))
    return round(records / (time.process_time() - start_s))


@main_guard
def main(argv: list[str] | None = None) -> int:
    """Prints bias by load, and records per CPU-second."""
    args = common.parser(__doc__).parse_args(argv)
    logs = 2 if args.quick else 12
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        log, saved = Path(), Path()
        for load_scale in LOADS[1:2] if args.quick else LOADS:
            figures[f"load_x{load_scale}"], log, saved = bias(load_scale, logs, Path(scratch))
        figures["records_per_cpu_s"] = records_per_cpu_s(log, saved, 20_000 if args.quick else 200_000)
    common.emit("off_policy", figures, logs=logs, exploration=EXPLORE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
