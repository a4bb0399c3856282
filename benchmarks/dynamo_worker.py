"""Runs Dynamo's offline replay in whatever Python has it: python dynamo_worker.py CASE.json; prints one JSON object.

Standard library and `dynamo` alone, since it runs in an environment of its own (see benchmarks/dynamo_replay.py).
CASE.json holds `trace` (a file in Mooncake's format), `profile` (an .npz of iteration times), `engine` (arguments of
MockEngineArgs), `workers`, `repeats`, and `hash_block_tokens`.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

NOT_INSTALLED = 3


def run(case: dict[str, Any]) -> dict[str, Any]:
    """Replays the trace `repeats` times without records, for the times, and once with them, for the outcome."""
    from dynamo._core import MockEngineArgs, run_mocker_trace_replay

    engine = MockEngineArgs(planner_profile_data=case["profile"], **case["engine"])

    def replay(records: bool) -> Any:
        return run_mocker_trace_replay(
            [case["trace"]],
            engine,
            num_workers=case["workers"],
            router_mode="round_robin",
            trace_block_size=case["hash_block_tokens"],
            capture_per_request=records,
            capture_planner_details=False,
        )

    cpu_s, replay_s = [], []
    for _ in range(case["repeats"]):
        start, start_wall = time.process_time(), time.perf_counter()
        summary = replay(False).summary
        cpu_s.append(time.process_time() - start)
        share = summary["wall_time_ms"] / 1e3 / (time.perf_counter() - start_wall)
        replay_s.append(cpu_s[-1] * min(share, 1.0))
    records = replay(True).per_request
    records.sort(key=lambda record: record["arrival_time_ms"])
    return {
        "cpu_s": cpu_s,
        "replay_s": replay_s,
        "duration_s": summary["duration_ms"] / 1e3,
        "completed": summary["completed_requests"],
        "ttft_s": [record["ttft_ms"] / 1e3 for record in records],
        "e2e_s": [record["e2e_latency_ms"] / 1e3 for record in records],
        "worker": [record["decode_worker_idx"] for record in records],
        "reused_tokens": [record["reused_input_tokens"] for record in records],
        "readmissions": sum(record["readmission_count"] for record in records),
    }


def main() -> int:
    """Reads the case, prints the outcome; 3 if this Python has no Dynamo."""
    try:
        import dynamo._core  # noqa: F401
    except ImportError as error:
        print(error, file=sys.stderr)
        return NOT_INSTALLED
    with open(sys.argv[1], encoding="utf-8") as file:
        case = json.load(file)
    json.dump(run(case), sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
