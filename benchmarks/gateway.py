"""What a gateway pays for decisions, and whether it earns what the world predicts.

`litellm_added_ms`: median latency that the callback adds to a LiteLLM proxy, against a bare one in the same run, calls
in turn. `telemetry_core_pct`: CPU time of scraping 100 metrics pages of 27 KB a second. `closed_loop`: margin of the
same requests in the simulated world and through LiteLLM in front of the emulated fleet, beside LiteLLM's own
strategies; `closed_loop_margin_error_pct` compares the first two.

Real gateways are needed: MARGINROUTE_LITELLM_PYTHON names a Python that has litellm[proxy]. The figures of Envoy's
picker and of the sidecar are those of `benchmarks.gateway_envoy` and `benchmarks.gateway_http`; they are left out where
their libraries are not installed.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import common
from marginroute.cli import main_guard
from marginroute.errors import InputError

PARTS = ("telemetry", "latency", "envoy", "http", "loop")


@main_guard
def main(argv: list[str] | None = None) -> int:
    """Prints added latencies, the cost of telemetry, and the closed loop."""
    parser = common.parser(__doc__)
    parser.add_argument("--only", choices=PARTS, help="one part alone")
    parser.add_argument("--strategies", metavar="NAME,...", help="LiteLLM's own to compare with (default: all four)")
    parser.add_argument("--horizon", type=float, default=None, metavar="S", help="of the closed loop's episode")
    parser.add_argument(
        "--speed", type=float, default=0.5, help="the fleet's seconds per second: slow motion spares a busy machine"
    )
    parser.add_argument("--workers", type=int, default=1, help="of each proxy in the closed loop (default: 1)")
    arguments = parser.parse_args(argv)
    if not 1 <= arguments.workers <= 64:
        raise InputError(f"--workers {arguments.workers}; legal is 1 to 64")
    for name in ("horizon", "speed"):
        value = getattr(arguments, name)
        if value is not None and not value > 0.0:
            raise InputError(f"--{name} {value:g}; legal is a number above 0")
    wanted = (arguments.only,) if arguments.only else PARTS
    python = os.environ.get("MARGINROUTE_LITELLM_PYTHON", "")
    if not python and {"latency", "loop"} & set(wanted):
        raise InputError("MARGINROUTE_LITELLM_PYTHON is not set; name a Python that has litellm[proxy]")
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if "telemetry" in wanted:
            from benchmarks import gateway_telemetry

            figures |= gateway_telemetry.figures(3.0 if arguments.quick else 20.0)
        if "latency" in wanted:
            from benchmarks import gateway_latency

            figures |= gateway_latency.figures(python, folder / "latency", 40 if arguments.quick else 400)
        figures |= _others(wanted, folder, 300 if arguments.quick else 3000, required=arguments.only is not None)
        if "loop" in wanted:
            from benchmarks import gateway_loop

            horizon_s = arguments.horizon or (10.0 if arguments.quick else 60.0)
            strategies = gateway_loop.STRATEGIES[: 1 if arguments.quick else None]
            if arguments.strategies is not None:
                strategies = tuple(name for name in arguments.strategies.split(",") if name)
            unknown = next((name for name in strategies if name not in gateway_loop.STRATEGIES), None)
            if unknown is not None:
                raise InputError(f"--strategies {unknown!r}; legal: {', '.join(gateway_loop.STRATEGIES)}")
            table = gateway_loop.measured(python, folder, horizon_s, arguments.speed, strategies, arguments.workers)
            world, ours = (table[name]["margin_usd_per_1k"] for name in ("world", "marginroute"))
            figures["closed_loop"] = table
            figures["closed_loop_margin_error_pct"] = 100.0 * (ours - world) / abs(world)
    common.emit("gateway", figures, speed=arguments.speed, workers=arguments.workers)
    return 0


def _others(wanted: tuple[str, ...], folder: Path, calls: int, required: bool) -> dict[str, Any]:
    """Figures of the other adapters; what is not installed is noted and left out, unless it was asked for alone."""
    found: dict[str, Any] = {}
    try:
        if "envoy" in wanted:
            from benchmarks import gateway_envoy

            (folder / "envoy").mkdir()
            found |= gateway_envoy.figures(gateway_envoy.binary(), folder / "envoy", calls)
        if "http" in wanted:
            from benchmarks import gateway_http

            (folder / "http").mkdir()
            found |= gateway_http.figures(folder / "http", calls)
    except (ImportError, InputError) as error:
        if required:
            raise InputError(f"an adapter cannot be measured: {error}") from None
        common.note(f"left out: {error}")
    return found


if __name__ == "__main__":
    sys.exit(main())
