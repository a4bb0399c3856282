"""`python -m envs calibrate iterations TABLE.csv | endpoint URL | aiconfigurator MODEL | quality TABLE --out FILE`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import yaml

from envs.fleet.calibrate import fit_iterations, measured_from_columns
from envs.fleet.profile import compact_profile
from envs.tables import read_columns
from marginroute.cli import note
from marginroute.errors import InputError
from marginroute.whole_file import write_whole

UTILISATION = 0.9  # of the GPUs' memory, vLLM's default gpu_memory_utilization
ACTIVATIONS_GB = 2.0  # per GPU: workspace, CUDA graphs
BLOCK_SIZE_TOKENS = 16


class _Flow(list):
    """A list that YAML writes in one line."""


class _Dumper(yaml.SafeDumper):
    pass


_Dumper.add_representer(_Flow, lambda dumper, data: dumper.represent_sequence("tag:yaml.org,2002:seq", data, True))


def _flowing(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _flowing(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_flowing(item) for item in value] if isinstance(value[0], list) else _Flow(value)
    return value


def kv_cache(bytes_per_token: int, weights_gb: float, gpu_memory_gb: float, gpus: int) -> dict[str, Any]:
    """KV-cache figures of one replica: what the weights and activations leave of the memory.

    Raises:
        InputError: Nothing is left.
    """
    if min(bytes_per_token, weights_gb, gpu_memory_gb, gpus) <= 0:
        raise InputError("KV cache: a figure of 0 or less; legal is above 0")
    free_gb = UTILISATION * gpu_memory_gb * gpus - weights_gb - ACTIVATIONS_GB * gpus
    blocks = int(free_gb * 1e9 / (bytes_per_token * BLOCK_SIZE_TOKENS))
    if blocks < 1:
        raise InputError(
            f"KV cache: weights of {weights_gb:g} GB leave nothing of {gpus} x {gpu_memory_gb:g} GB; legal is a model "
            f"that fits into {UTILISATION:.0%} of the memory less {ACTIVATIONS_GB:g} GB per GPU"
        )
    return {
        "bytes_per_token": bytes_per_token,
        "weights_gb": weights_gb,
        "gpu_memory_gb": gpu_memory_gb,
        "gpus": gpus,
        "memory_utilisation": UTILISATION,
        "block_size_tokens": BLOCK_SIZE_TOKENS,
        "blocks": blocks,
    }


def _facts(arguments: argparse.Namespace) -> dict[str, Any]:
    facts: dict[str, Any] = {"title": arguments.title or arguments.table.name.split(".csv")[0]}
    if arguments.source:
        facts["source"] = arguments.source
    figures = (arguments.kv_bytes_per_token, arguments.weights_gb, arguments.gpu_memory_gb, arguments.gpus)
    if any(figure is not None for figure in figures):
        if any(figure is None for figure in figures):
            raise InputError(
                "KV cache: some figures are missing; legal is all of --kv-bytes-per-token, --weights-gb, "
                "--gpu-memory-gb, --gpus, or none"
            )
        facts["kv_cache"] = kv_cache(*figures)
    return facts


def calibrate_iterations(table: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """The profile fitted to a table of measured iterations, checked by loading it."""
    columns = read_columns(table, text=("kind",))
    profile = fit_iterations(measured_from_columns(columns, str(table)), facts)
    compact_profile(table.name, profile)
    return profile


def profile_text(profile: dict[str, Any]) -> str:
    """A profile as YAML, with one line per row of numbers."""
    return yaml.dump(_flowing(profile), Dumper=_Dumper, sort_keys=False, width=116, allow_unicode=True)


def run(arguments: argparse.Namespace) -> int:
    """Fits, writes and says how well the profile describes the table."""
    if arguments.kind == "endpoint":
        from envs import calibrate_endpoint

        return calibrate_endpoint.run(arguments)
    if arguments.kind == "aiconfigurator":
        from envs import calibrate_aiconfigurator

        return calibrate_aiconfigurator.run(arguments)
    if arguments.kind == "quality":
        from envs import calibrate_quality

        return calibrate_quality.run(arguments)
    profile = calibrate_iterations(arguments.table, _facts(arguments))
    write_whole(arguments.out, profile_text(profile))
    fit = profile["fit"]
    note(
        f"{arguments.out}: {fit['rows']} rows, {fit['unknowns']} unknowns; error of rows not seen: median "
        f"{fit['median_error_pct']} %, p95 {fit['p95_error_pct']} %, largest {fit['max_error_pct']} %"
    )
    return 0
