"""`python -m envs COMMAND`: tools around the world. Each command is a module that is imported only when it runs.

A command module has `run(arguments) -> int`; its flags stand here, so that `--help` imports nothing heavy.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable
from pathlib import Path

from marginroute.cli import main_guard


def _simulate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("fleet", metavar="FLEET", help="name in configs/fleets, or a YAML file")
    parser.add_argument(
        "--requests",
        type=Path,
        required=True,
        metavar="FILE",
        help="CSV with arrived_at, prompt_tokens, output_tokens and optionally hash_ids (numbers between spaces), "
        "or JSON lines as in Mooncake's traces (timestamp in ms, input_length, output_length, hash_ids)",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="CSV to write")
    parser.add_argument("--pool", metavar="NAME", help="pool that serves the requests (default: the first)")
    parser.add_argument(
        "--hash-block-tokens", type=int, default=512, metavar="N", help="prompt tokens per hash id (default: 512)"
    )
    parser.add_argument("--no-prefix-caching", action="store_true", help="ignore hash_ids: every prompt is prefilled")


def _calibrate(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    table = kinds.add_parser("iterations", help="engine profile from a table of measured iterations")
    table.add_argument("table", type=Path, metavar="TABLE.csv", help="CSV, may be gzipped")
    table.add_argument("--out", type=Path, required=True, metavar="PROFILE.yaml", help="profile to write")
    table.add_argument("--title", default="", help="model and hardware in words")
    table.add_argument("--source", default="", help="where the table comes from, with its licence")
    cache = table.add_argument_group("KV cache (all four together: writes the blocks that one replica has)")
    cache.add_argument("--kv-bytes-per-token", type=int, help="layers x 2 x KV heads x head size x bytes")
    cache.add_argument("--weights-gb", type=float, help="weights of the model over all GPUs")
    cache.add_argument("--gpu-memory-gb", type=float, help="memory of one GPU")
    cache.add_argument("--gpus", type=int, help="GPUs of one replica")


COMMANDS: dict[str, tuple[str, str, Callable[[argparse.ArgumentParser], None]]] = {
    "simulate": ("envs.simulate", "what-if: latency of every request on a fleet", _simulate),
    "calibrate": ("envs.calibrate", "fit an engine profile", _calibrate),
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m envs", description="Tools around the simulated fleet.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (_, words, add_arguments) in COMMANDS.items():
        add_arguments(commands.add_parser(name, help=words, description=words[0].upper() + words[1:] + "."))
    return parser


@main_guard
def main(argv: list[str] | None = None) -> int:
    """Runs one command."""
    arguments = _parser().parse_args(argv)
    return int(importlib.import_module(COMMANDS[arguments.command][0]).run(arguments))


if __name__ == "__main__":
    sys.exit(main())
