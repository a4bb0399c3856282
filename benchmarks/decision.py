"""Microseconds of one bundle decision at the gateway: View in, guarded and explained Decision out.

Measured on views of simulated training episodes of `quickstart`, copied as a gateway would hold them; the network has
the default width and random weights (the time does not depend on their values). The larger fleet is the same one with
more replicas. `with_view_` makes the View first, from a gateway's own counters, after some judged answers;
`untold_with_view_` where there were none, so that the network may change nothing; `general_path_` is the same policy
without preparation. Of a decision's time, `breakdown_us` is what the View takes, and the advice alone with its
explanation; the rest are features and network. `quality_us` is P(good answer) of nine models from the text of a prompt
of so many bytes, which a bundle with a predictor adds; weights and letters are random.
"""

from __future__ import annotations

import sys

from benchmarks import common
from marginroute.cli import main_guard


@main_guard
def main(argv: list[str] | None = None) -> int:
    """Prints median and p99 at 16 and 256 candidates, and where the time goes."""
    arguments = common.parser(__doc__).parse_args(argv)
    from benchmarks import decision_cost, quality_cost

    common.emit(
        "decision",
        decision_cost.figures(arguments.quick) | {"quality_us": quality_cost.figures(arguments.quick)},
        network=f"scorer, width {decision_cost.WIDTH}",
        policy="guarded residual policy with reason in USD",
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
