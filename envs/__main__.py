# PYTHON_ARGCOMPLETE_OK
"""`python -m envs COMMAND`: tools around the world. Each command is a module that is imported only when it runs.

A command module has `run(arguments) -> int`; its flags stand here, so that `--help` imports nothing heavy.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable
from pathlib import Path

from marginroute.cli import Parser, main_guard

CALIBRATE = {
    "endpoint": "python -m envs calibrate endpoint http://127.0.0.1:8000 --out profile.yaml",
    "iterations": "python -m envs calibrate iterations table.csv --out profile.yaml",
    "quality": "python -m envs calibrate quality outcomes.csv --out quality.yaml",
    "aiconfigurator": "python -m envs calibrate aiconfigurator Qwen/Qwen3-32B --system h200_sxm --gpu-memory-gb 141 "
    "--out profile.yaml",
}


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
    table = kinds.add_parser(
        "iterations", help="engine profile from a table of measured iterations", examples=CALIBRATE["iterations"]
    )
    table.add_argument("table", type=Path, metavar="TABLE.csv", help="CSV, may be gzipped")
    table.add_argument("--out", type=Path, required=True, metavar="PROFILE.yaml", help="profile to write")
    table.add_argument("--title", default="", help="model and hardware in words")
    table.add_argument("--source", default="", help="where the table comes from, with its licence")
    cache = table.add_argument_group("KV cache (all four together: writes the blocks that one replica has)")
    cache.add_argument("--kv-bytes-per-token", type=int, help="layers x 2 x KV heads x head size x bytes")
    cache.add_argument("--weights-gb", type=float, help="weights of the model over all GPUs")
    cache.add_argument("--gpu-memory-gb", type=float, help="memory of one GPU")
    cache.add_argument("--gpus", type=int, help="GPUs of one replica")

    quality = kinds.add_parser(
        "quality", help="abilities and difficulty of tiers from a table of outcomes", examples=CALIBRATE["quality"]
    )
    quality.add_argument("table", type=Path, metavar="TABLE", help="outcomes: CSV (also .gz), JSON lines or Parquet")
    quality.add_argument("--out", type=Path, required=True, metavar="QUALITY.yaml", help="figures to write")
    quality.add_argument("--item", metavar="COLUMN", help="prompt, or whatever identifies it (default: prompt, ...)")
    quality.add_argument("--category", metavar="COLUMN", help="kind of task (default: one for all)")
    quality.add_argument("--models", metavar="A,B", help="models to keep (default: all)")
    quality.add_argument("--factors", type=int, default=2, metavar="K", help="latent factors, 1 to 3 (default 2)")
    quality.add_argument("--good-from", type=float, default=0.5, metavar="SCORE", help="least good score (default 0.5)")
    quality.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of the quarter of items held out (default 0)"
    )
    quality.add_argument("--title", default="", help="the table in words")
    quality.add_argument("--source", default="", help="where the table comes from, with its licence")

    endpoint = kinds.add_parser(
        "endpoint",
        help="engine profile from measurements of a running OpenAI-compatible URL",
        examples=CALIBRATE["endpoint"],
    )
    endpoint.add_argument("url", metavar="URL", help="base URL; /v1 is added where it is missing")
    endpoint.add_argument("--out", type=Path, required=True, metavar="PROFILE.yaml", help="profile to write")
    endpoint.add_argument("--title", default="", help="model and hardware in words")
    endpoint.add_argument("--model", help="model to ask for (default: the first that the endpoint lists)")
    endpoint.add_argument("--api-key-env", metavar="NAME", help="environment variable that holds the API key")
    endpoint.add_argument(
        "--speed", type=float, default=1.0, help="speed of an emulator: seconds are multiplied by it (default 1)"
    )
    endpoint.add_argument("--max-concurrency", type=int, default=64, metavar="N", help="largest batch (default 64)")
    endpoint.add_argument("--max-context", type=int, default=4096, metavar="TOKENS", help="longest (default 4096)")
    endpoint.add_argument("--repeats", type=int, default=6, metavar="N", help="prompts per measured prefill (6)")
    endpoint.add_argument("--max-requests", type=int, default=3000, metavar="N", help="most requests sent (3000)")
    endpoint.add_argument("--max-seconds", type=float, default=900.0, metavar="S", help="longest duration (900)")

    kernels = kinds.add_parser(
        "aiconfigurator",
        help="engine profile from NVIDIA's measured kernels, any model and GPU",
        examples=CALIBRATE["aiconfigurator"],
    )
    kernels.add_argument(
        "model", metavar="MODEL", help="name on the Hugging Face hub, or a folder with its config.json"
    )
    kernels.add_argument("--out", type=Path, required=True, metavar="PROFILE.yaml", help="profile to write")
    kernels.add_argument("--system", required=True, metavar="GPU", help="as the library calls it: h200_sxm, l40s, ...")
    kernels.add_argument("--backend", default="vllm", help="vllm, sglang or trtllm (default: vllm)")
    kernels.add_argument("--gpus", type=int, default=1, metavar="N", help="GPUs of one replica, tensor parallel (1)")
    kernels.add_argument("--gpu-memory-gb", type=float, required=True, metavar="GB", help="memory of one GPU")


def _emulate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("fleet", metavar="FLEET", help="name in configs/fleets, or a YAML file")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, metavar="N", help="port, 0 for any free one (default 8000)")
    parser.add_argument("--speed", type=float, default=1.0, metavar="X", help="fleet's seconds per second (default 1)")
    parser.add_argument(
        "--output-median", type=float, default=200.0, metavar="TOKENS", help="of output lengths not given (200)"
    )
    parser.add_argument(
        "--output-sigma", type=float, default=0.8, metavar="S", help="standard deviation of their logarithm (0.8)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of lengths and provider latencies (0)")


def _fetch(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", nargs="?", help="public set; left out: lists them")
    parser.add_argument("--out", type=Path, default=Path("data"), metavar="DIR", help="folder to write to (data)")
    parser.add_argument("--list", action="store_true", help="list the sets with licence and home")


def _describe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "what", metavar="TRACE|SCENARIO", help="file of recorded requests, or a scenario's name or file"
    )
    parser.add_argument(
        "--against",
        metavar="TRACE|SCENARIO|fit",
        help="a second one, beside it; fit: what is fitted to the first",
    )
    parser.add_argument("--out", type=Path, metavar="FILE.html", help="write plots to a self-contained page")
    parser.add_argument("--trace-format", metavar="NAME", help="layout of traces (default: told from them)")
    parser.add_argument("--columns", metavar="OURS=THEIRS,...", help="csv: our column names to the file's")
    parser.add_argument("--from-s", type=float, default=0.0, metavar="S", help="start of the stretch of traces (0)")
    parser.add_argument("--to-s", type=float, metavar="S", help="its end (default: the trace's)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of what is drawn (0)")
    parser.add_argument(
        "--draws", type=int, default=8, metavar="N", help="streams drawn, whose figures are averaged (8)"
    )
    parser.add_argument(
        "--duration-s", type=float, metavar="S", help="seconds drawn from a scenario (default: as long as the other)"
    )


def _schema(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", type=Path, default=Path("configs/schema"), metavar="DIR", help="folder to write to (configs/schema)"
    )


COMMANDS: dict[str, tuple[str, str, Callable[[argparse.ArgumentParser], None], str]] = {
    "simulate": (
        "envs.simulate",
        "what-if: latency of every request on a fleet",
        _simulate,
        """
        python -m envs simulate starter --requests requests.csv --out latencies.csv
        python -m envs simulate my_fleet.yaml --requests mooncake.jsonl --pool large --out latencies.csv
        """,
    ),
    "emulate": (
        "envs.emulator",
        "serve a fleet as OpenAI-compatible endpoints",
        _emulate,
        """
        python -m envs emulate starter --port 8000
        curl http://127.0.0.1:8000/
        """,
    ),
    "describe": (
        "envs.describe",
        "statistics of recorded or generated requests",
        _describe,
        """
        python -m envs describe quickstart
        python -m envs describe log.csv --against azure_conversation --out beside.html
        python -m envs describe log.csv --against fit
        """,
    ),
    "fetch": (
        "envs.fetch",
        "download a public set of recorded requests",
        _fetch,
        """
        python -m envs fetch --list
        python -m envs fetch azure-2023-conversation --out data
        """,
    ),
    "calibrate": (
        "envs.calibrate",
        "fit an engine profile, or who answers what well",
        _calibrate,
        "\n".join(CALIBRATE.values()),
    ),
    "schema": (
        "agents.schema",
        "JSON Schema of the configuration files, for editors",
        _schema,
        """
        python -m envs schema
        """,
    ),
}


def parser() -> Parser:
    """The command line."""
    parser = Parser(
        prog="python -m envs",
        description="Tools around the simulated fleet.",
        examples="python -m envs describe quickstart\npython -m envs COMMAND --help",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (_, words, add_arguments, examples) in COMMANDS.items():
        command = commands.add_parser(
            name, help=words, description=words[0].upper() + words[1:] + ".", examples=examples
        )
        add_arguments(command)
        kinds = getattr(command._subparsers, "_group_actions", [])
        for one in kinds[0].choices.values() if kinds else (command,):
            one.add_verbosity()
    return parser


@main_guard
def main(argv: list[str] | None = None) -> int:
    """Runs one command."""
    arguments = parser().parse_args(argv)
    return int(importlib.import_module(COMMANDS[arguments.command][0]).run(arguments))


if __name__ == "__main__":
    sys.exit(main())
