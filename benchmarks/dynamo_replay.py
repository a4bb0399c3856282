"""Simulated requests per CPU-second beside NVIDIA Dynamo's offline replay, on one workload with prefix caching.

Both sides get the same requests (arrival, prompt and output tokens, block hashes), the same engines (KV blocks, block
size, most sequences, token budget) behind a round robin, and the same iteration times: base + prefill tokens x a +
tokens attended to x b, near an 8B model on an H100, once in Dynamo's `planner_profile_data` and once in our profile.

`requests_per_cpu_s` is the engine alone: of Dynamo the CPU time of the call times the share that its own clock gives to
the replay (`wall_time_ms`), of ours the compiled run. `whole_call` adds what it takes to get there: Dynamo's reading of
its JSON lines; our turning of hashes into blocks and filling of arrays. The outcomes stand beside each other under
`outcome`.

Dynamo is no dependency. It runs in a Python of its own, named by --dynamo-python:

    python -m venv DIR && DIR/bin/pip install ai-dynamo-runtime==1.5.0
    python -m benchmarks.dynamo_replay --dynamo-python DIR/bin/python
"""

from __future__ import annotations

import sys

from benchmarks import common
from marginroute.cli import main_guard


@main_guard
def main(argv: list[str] | None = None) -> int:
    """Compares and prints."""
    parser = common.parser(__doc__)
    parser.add_argument(
        "--dynamo-python",
        default=sys.executable,
        metavar="PYTHON",
        help="interpreter in whose environment ai-dynamo-runtime is installed (default: this one)",
    )
    arguments = parser.parse_args(argv)
    from benchmarks import dynamo_case

    common.emit("dynamo_replay", dynamo_case.figures(arguments.dynamo_python, arguments.quick))
    return 0


if __name__ == "__main__":
    sys.exit(main())
