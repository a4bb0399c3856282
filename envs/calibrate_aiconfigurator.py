"""`python -m envs calibrate aiconfigurator`: an engine profile from the kernels that NVIDIA has measured.

The optional library aiconfigurator-core (Apache-2.0) adds measured operator times up to the seconds of an iteration.
An iteration with a chunk and decodes is the sum of what every token pays, the chunk's attention and the decodes'
attention; the library asks for one length for both kinds, so the two attentions come from two queries.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from envs.calibrate import kv_cache, profile_text
from envs.fleet.calibrate import SINGLE_COLUMNS, FloatArray, fit_iterations, measured_from_columns
from envs.fleet.profile import compact_profile
from marginroute.cli import note
from marginroute.errors import InputError
from marginroute.whole_file import write_whole

BATCHES = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 80, 96, 128, 160, 192, 224, 256)
MEAN_KV = (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
CHUNKS = (16, 32, 64, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 8192)
PREFIXES = (0, 512, 2048, 4096, 8192)
MIXED_CHUNKS = (64, 128, 256, 512, 1024, 1536, 2048)
MIXED_BATCHES = (1, 4, 16, 32, 64, 128, 256)
MIXED_KV = (256, 1024, 4096, 8192)


def _rows(engine: Any) -> Iterator[tuple[float, ...]]:
    """(prefill_tokens, prefill_prefix, decode_batch, mean_kv, iter_ms) over the grids above."""
    for batch, mean in itertools.product(BATCHES, MEAN_KV):
        yield 0, 0, batch, mean, engine.decode_step_latency(batch, mean, 2)
    for chunk, prefix in itertools.product(CHUNKS, PREFIXES):
        yield chunk, prefix, 0, 0, engine.predict_prefill_latency(1, chunk + prefix, prefix)
    for chunk, batch in itertools.product(MIXED_CHUNKS, MIXED_BATCHES):
        _, shared, context, _ = engine.mixed_step_breakdown(chunk, batch, chunk, 2)
        for mean in MIXED_KV:
            decode = engine.mixed_step_breakdown(chunk, batch, mean, 2)[3]
            yield chunk, 0, batch, mean, shared + context + decode


def table_of(engine: Any) -> dict[str, FloatArray]:
    """Columns of `SINGLE_COLUMNS` from a compiled engine of the library."""
    return dict(zip(SINGLE_COLUMNS, np.array(list(_rows(engine)), dtype=np.float64).T, strict=True))


def _library() -> Any:
    try:
        from aiconfigurator_core.sdk import engine, memory
    except ImportError as error:
        raise InputError(
            f"aiconfigurator: cannot be imported ({error}); legal is an environment with `pip install "
            'aiconfigurator-core`, or the extra: pip install -e ".[aiconfigurator]"'
        ) from None
    logging.getLogger("aiconfigurator_core").setLevel(logging.ERROR)
    return engine, memory


def _asked(what: str, question: Callable[[], Any]) -> Any:
    """The library's answer; whatever it raises becomes one sentence."""
    try:
        return question()
    except Exception as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"aiconfigurator: {what} has no answer ({reason}); legal is a model, system and backend that the library "
            "has measured, such as Qwen/Qwen3-8B, h200_sxm, vllm"
        ) from None


def calibrate(model: str, system: str, backend: str, gpus: int, gpu_memory_gb: float) -> dict[str, Any]:
    """The profile of a model on `gpus` GPUs of a kind (tensor parallel), checked by loading it.

    Args:
        model: Name on the Hugging Face hub, or a folder with its config.json.
        system: The library's name of the GPU, such as h200_sxm.
        backend: vllm, sglang or trtllm.
        gpus: GPUs of one replica.
        gpu_memory_gb: Memory of one GPU.

    Raises:
        InputError: The library is missing, has no data for the combination, or the model does not fit into the memory.
    """
    engines, memory = _library()
    what = f"{model} on {gpus} {system} with {backend}"
    compiled = _asked(
        what, lambda: engines.EngineHandle.compile(model, system, backend, tp_size=gpus, moe_tp_size=gpus)
    )
    columns = _asked(what, lambda: table_of(compiled))
    figures = _asked(
        what,
        lambda: memory.NaiveKVCacheEstimator.from_model_path(
            model, tp_size=1, pp_size=1, allow_hf_config_download=True
        ),
    )
    version = importlib.metadata.version("aiconfigurator-core")
    facts = {
        "title": f"{model.rpartition('/')[2]} on {gpus} {system}, {backend}",
        "source": f"NVIDIA's measured kernels through aiconfigurator-core {version} (Apache-2.0), {backend} backend",
        "kv_cache": kv_cache(
            int(_asked(what, figures.kv_bytes_per_token)),
            round(_asked(what, figures.weight_bytes) / 1e9, 1),
            gpu_memory_gb,
            gpus,
        ),
    }
    profile = fit_iterations(measured_from_columns(columns, what), facts)
    compact_profile(model, profile)
    return profile


def run(arguments: argparse.Namespace) -> int:
    """Asks, fits, writes and says how well the profile describes the library's answers."""
    out: Path = arguments.out
    profile = calibrate(arguments.model, arguments.system, arguments.backend, arguments.gpus, arguments.gpu_memory_gb)
    write_whole(out, profile_text(profile))
    fit = profile["fit"]
    note(
        f"{out}: {fit['rows']} iterations, {fit['unknowns']} unknowns; error of iterations not seen: median "
        f"{fit['median_error_pct']} %, p95 {fit['p95_error_pct']} %, largest {fit['max_error_pct']} %; "
        f"{profile['kv_cache']['blocks']} KV blocks"
    )
    return 0
