"""Time of a training and of an evaluation whose work one and two members of a Ray cluster share, and a projection.

A round of training is a rollout and the update after it. With n members it takes, by the model,

    seconds(n) = update_s + handling_s + play_s * share(n) + bytes / link

where `share(n)` is the largest part of the worlds that one of them plays (worlds go in pieces), `play_s` the members'
CPU time of a whole rollout, `handling_s` the trainer's to send orders and take buffers in, and `bytes` what travels
both ways. All four are measured. Measured, too, is what one and two members make of it: `round_cpu_s` and
`evaluation_cpu_s` are CPU seconds on the longest path (the trainer's and the busiest member's), and `_wall_s` means
something on idle cores only. The projection extends the model to more members over a link of 10 Gbit/s, for the
standard training and for one with 1,024 worlds; it knows nothing of stragglers.

Try:
python -m benchmarks.cluster
python -m benchmarks.cluster --quick
python -m benchmarks.cluster --ray 10.0.0.5:6379
"""

from __future__ import annotations

import sys

from benchmarks import common
from marginroute.cli import main_guard


@main_guard
def main(argv: list[str] | None = None) -> int:
    """Prints the figures."""
    parser = common.parser(__doc__)
    parser.add_argument("--ray", default="local", metavar="ADDRESS", help="the cluster (default: local)")
    arguments = parser.parse_args(argv)
    from benchmarks import cluster_runs

    figures, settings = cluster_runs.measured(arguments.ray, arguments.quick)
    common.emit("cluster", figures, **settings)
    return 0


if __name__ == "__main__":
    sys.exit(main())
