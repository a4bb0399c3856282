"""A running `python -m envs emulate` for tests: `with served(fleet, *flags) as base_url`."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

FLEET = """
tiers: {m: {title: M, quality: {slope: 0.7, ability: {chat: 0.85}}}}
pools:
  pool: {tier: m, profile: llama-3.1-8b-h100, replicas: 2, gpus_per_replica: 1, gpu_usd_per_hour: 1.0,
         kv_blocks: 2000, max_num_seqs: 64, max_num_batched_tokens: 512}
providers:
  api: {tier: m, input_usd_per_mtok: 1.0, output_usd_per_mtok: 1.0, ttft_median_s: 0.1, ttft_sigma: 0.0,
        tpot_median_s: 0.01, tpot_sigma: 0.0, requests_per_minute: 12}
"""


@contextlib.contextmanager
def served(fleet, *flags):
    """Yields (base URL, process); interrupts the server at the end if the test has not."""
    process = subprocess.Popen(
        [sys.executable, "-m", "envs", "emulate", str(fleet), "--port", "0", *flags],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        line = process.stdout.readline()
        assert line.startswith("http://"), process.stderr.read()
        yield line.split("/pool-0")[0], process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
        process.communicate(timeout=120)
