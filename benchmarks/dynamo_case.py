"""The workload of benchmarks/dynamo_replay.py and both of its runs."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks import common, dynamo_worker
from benchmarks.simulator_fleet import OUTPUT, PROMPT, lengths
from envs.fleet.allocation import Fleet, allocate
from envs.fleet.engine import advance, drain, pop_finished, reset_world, submit
from envs.fleet.hashes import engine_hashes, load_hashes
from envs.fleet.profile import compact_profile
from envs.fleet.spec import FleetSpec, PoolSpec
from envs.fleet.state import COMPLETED
from envs.kernels import kernel
from marginroute.errors import InputError

REPLICAS = (1, 16)
BASE_S, PREFILL_TOKEN_S, KV_TOKEN_S = 6e-3, 2e-5, 4e-8
KV_BLOCKS, BLOCK_SIZE_TOKENS, MAX_NUM_SEQS, MAX_NUM_BATCHED_TOKENS = 25_701, 16, 256, 2048
REQUESTS_PER_S = 16.0  # per replica: about 80 % of what one can serve
SYSTEM_PROMPTS, SYSTEM_BLOCKS = 32, (16, 64)  # each request begins with one of them, as far as its prompt reaches
FOLLOW_UPS, RECENT = 0.4, 200  # share that goes on from the prompt of one of the last requests

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


@dataclasses.dataclass(frozen=True)
class Requests:
    """One workload: arrived_at_s, prompt_tokens, output_tokens (M,) and ragged hashes of the prompts' full blocks."""

    arrived_at_s: FloatArray
    prompt_tokens: IntArray
    output_tokens: IntArray
    counts: IntArray
    hashes: IntArray


def draw_requests(n: int, requests_per_s: float, seed: int = 20_261_123) -> Requests:
    """Poisson arrivals of lognormal prompts and outputs that share beginnings."""
    rng = np.random.default_rng(seed)
    prompts, outputs = lengths(rng, PROMPT, n), lengths(rng, OUTPUT, n)
    arrived_at_s = np.cumsum(rng.exponential(1.0 / requests_per_s, n)).round(6)
    sizes = rng.integers(*SYSTEM_BLOCKS, SYSTEM_PROMPTS)
    starts = np.cumsum(sizes) - sizes
    system = [np.arange(start, start + size) for start, size in zip(starts, sizes, strict=True)]
    fresh, lists = int(sizes.sum()), []
    for blocks in prompts // BLOCK_SIZE_TOKENS:
        past = lists[-RECENT:] if lists and rng.random() < FOLLOW_UPS else system
        shared = past[rng.integers(len(past))][:blocks]
        lists.append(np.concatenate([shared, np.arange(fresh, fresh + blocks - len(shared))]))
        fresh += int(blocks)
    counts = np.array([len(own) for own in lists])
    return Requests(arrived_at_s, prompts, outputs, counts, np.concatenate(lists))


def fleet_spec(replicas: int) -> FleetSpec:
    """The engines, with the iteration times of `dynamo_profile`.

    Dynamo counts a request whose prompt is complete among the decodes of that iteration, so its prompt is attended to
    once more: KV_TOKEN_S per prefill token and per token of its prefix.
    """
    per_token_s = PREFILL_TOKEN_S + KV_TOKEN_S
    batches, means = np.array([1, MAX_NUM_SEQS]), np.array([64, 65_536])
    profile = compact_profile(
        "linear",
        {
            "token_knots": [1, 2 * MAX_NUM_BATCHED_TOKENS],
            "token_s": [BASE_S + per_token_s, BASE_S + 2 * MAX_NUM_BATCHED_TOKENS * per_token_s],
            "decode_batch_knots": batches.tolist(),
            "decode_mean_kv_knots": means.tolist(),
            "decode_s": (batches[:, None] * (KV_TOKEN_S * means - per_token_s)).tolist(),
            "prefill_prefix_s": KV_TOKEN_S,
        },
    )
    pool = PoolSpec(
        "gpu",
        profile,
        replicas=replicas,
        kv_blocks=KV_BLOCKS,
        block_size_tokens=BLOCK_SIZE_TOKENS,
        max_num_seqs=MAX_NUM_SEQS,
        max_num_batched_tokens=MAX_NUM_BATCHED_TOKENS,
        prefix_caching=True,
    )
    return FleetSpec((pool,), scrape_interval_s=1e12)


def dynamo_profile(path: Path) -> None:
    """The same iteration times as an .npz that Dynamo interpolates, in milliseconds."""
    tokens, kv, context = np.array([0.0, 1e5]), np.array([0.0, 1e8]), np.array([0.0, 1e6])
    decode_s = np.repeat((BASE_S + KV_TOKEN_S * kv)[:, None], 2, axis=1)
    np.savez(
        path,
        prefill_isl=tokens,
        prefill_ttft_ms=1e3 * PREFILL_TOKEN_S * tokens,
        decode_active_kv_tokens=kv,
        decode_context_length=context,
        decode_itl=1e3 * decode_s,
    )


def write_trace(path: Path, requests: Requests) -> None:
    """Mooncake's JSON lines; a prompt's last, partial block gets a hash of its own."""
    ends = np.cumsum(requests.counts)
    fresh = int(requests.hashes.max(initial=0)) + 1
    with path.open("w", encoding="utf-8") as file:
        for i, end in enumerate(ends):
            own = requests.hashes[end - requests.counts[i] : end].tolist()
            if requests.prompt_tokens[i] % BLOCK_SIZE_TOKENS:
                own.append(fresh + i)
            row = {
                "timestamp": 1e3 * float(requests.arrived_at_s[i]),
                "input_length": int(requests.prompt_tokens[i]),
                "output_length": int(requests.output_tokens[i]),
                "hash_ids": own,
            }
            file.write(json.dumps(row) + "\n")


@kernel
def run_round_robin(pools, tables, worlds, replicas, slots, providers, requests, w, arrived_at_s):  # noqa: ANN001, ANN201
    """One episode in which request i goes to replica i modulo their number; returns how many requests ended."""
    reset_world(pools, tables, worlds, replicas, slots, providers, requests, w)
    ended = 0
    for i in range(arrived_at_s.shape[0]):
        now_s = arrived_at_s[i]
        advance(pools, tables, worlds, replicas, slots, providers, requests, w, now_s)
        while pop_finished(worlds, requests, w) >= 0:
            ended += 1
        submit(pools, tables, worlds, replicas, slots, providers, requests, w, i % replicas.shape[1], i, now_s)
    drain(pools, tables, worlds, replicas, slots, providers, requests, w)
    while pop_finished(worlds, requests, w) >= 0:
        ended += 1
    return ended


def _filled(replicas: int, requests: Requests) -> Fleet:
    """A fleet with the requests and their blocks in its arrays."""
    given = (requests.counts, requests.hashes)
    hashes = engine_hashes(requests.prompt_tokens, requests.output_tokens, given, BLOCK_SIZE_TOKENS, BLOCK_SIZE_TOKENS)
    n = len(requests.arrived_at_s)
    fleet = allocate(fleet_spec(replicas), 1, n, len(hashes[1]))
    rows = fleet.requests[0]
    rows["prompt_tokens"], rows["output_tokens"] = requests.prompt_tokens, requests.output_tokens
    rows["patience_until_s"] = np.inf
    load_hashes(fleet, 0, hashes, check=False)
    return fleet


def run_ours(replicas: int, requests: Requests, repeats: int) -> dict[str, Any]:
    """Times and outcome of our engine, in the worker's format."""
    cpu_s, replay_s = [], []
    for _ in range(repeats):
        start = time.process_time()
        fleet = _filled(replicas, requests)
        begun = time.process_time()
        run_round_robin(*fleet.arrays, 0, requests.arrived_at_s)
        end = time.process_time()
        cpu_s.append(end - start)
        replay_s.append(end - begun)
    rows = fleet.requests[0]
    return {
        "cpu_s": cpu_s,
        "replay_s": replay_s,
        "duration_s": float(rows["completed_at_s"].max() - requests.arrived_at_s[0]),
        "completed": int((rows["status"] == COMPLETED).sum()),
        "ttft_s": rows["first_token_at_s"] - requests.arrived_at_s,
        "e2e_s": rows["completed_at_s"] - requests.arrived_at_s,
        "worker": rows["replica"],
        "reused_tokens": rows["cached_tokens"],
        "readmissions": int(rows["restarts"].sum()),
    }


def run_dynamo(python: str, replicas: int, trace: Path, profile: Path, repeats: int) -> dict[str, Any]:
    """Times and outcome of Dynamo's replay, from a process of its own.

    Raises:
        InputError: The interpreter does not run, has no Dynamo, or its replay fails.
    """
    case = {
        "trace": str(trace),
        "profile": str(profile),
        "workers": replicas,
        "repeats": repeats,
        "hash_block_tokens": BLOCK_SIZE_TOKENS,
        "engine": {
            "num_gpu_blocks": KV_BLOCKS,
            "block_size": BLOCK_SIZE_TOKENS,
            "max_num_seqs": MAX_NUM_SEQS,
            "max_num_batched_tokens": MAX_NUM_BATCHED_TOKENS,
        },
    }
    path = trace.with_suffix(".case.json")
    path.write_text(json.dumps(case), encoding="utf-8")
    command = [python, dynamo_worker.__file__, str(path)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise InputError(f"--dynamo-python {python}: {error.strerror}; legal is a Python interpreter") from None
    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
    if done.returncode == dynamo_worker.NOT_INSTALLED:
        raise InputError(
            f"--dynamo-python {python}: {last}; legal is a Python in which "
            "`python -m pip install ai-dynamo-runtime==1.5.0` has been run"
        )
    if done.returncode:
        raise InputError(f"--dynamo-python {python}: Dynamo's replay failed ({last}); legal is ai-dynamo-runtime 1.5.0")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def _side(found: dict[str, Any], requests: Requests) -> dict[str, Any]:
    n = len(requests.arrived_at_s)
    ttft_s, e2e_s = np.asarray(found["ttft_s"]), np.asarray(found["e2e_s"])
    tpot_s = (e2e_s - ttft_s) / np.maximum(requests.output_tokens - 1, 1)
    return {
        "requests_per_cpu_s": round(n / float(np.median(found["replay_s"]))),
        "requests_per_cpu_s_whole_call": round(n / float(np.median(found["cpu_s"]))),
        "outcome": {
            "completed": found["completed"],
            "requests_per_simulated_s": round(n / found["duration_s"], 3),
            "prefix_hit_rate": round(float(np.sum(found["reused_tokens"]) / requests.prompt_tokens.sum()), 4),
            "preemptions": found["readmissions"],
            "ttft_p50_s": round(float(np.median(ttft_s)), 5),
            "ttft_p99_s": round(float(np.percentile(ttft_s, 99)), 5),
            "tpot_p50_s": round(float(np.median(tpot_s)), 6),
            "e2e_p50_s": round(float(np.median(e2e_s)), 4),
        },
    }


def _row(ours: dict[str, Any], dynamo: dict[str, Any], requests: Requests, replicas: int) -> dict[str, Any]:
    apart_s = np.abs(np.asarray(ours["ttft_s"]) - np.asarray(dynamo["ttft_s"]))
    row: dict[str, Any] = {
        "replicas": replicas,
        "requests": len(apart_s),
        "marginroute": _side(ours, requests),
        "dynamo": _side(dynamo, requests),
    }
    for name in ("requests_per_cpu_s", "requests_per_cpu_s_whole_call"):
        key = name.replace("requests_per_cpu_s", "ratio")
        row[key] = round(row["marginroute"][name] / row["dynamo"][name], 1)
    row["same_replica_share"] = round(float(np.mean(np.asarray(ours["worker"]) == np.asarray(dynamo["worker"]))), 4)
    row["same_reuse_share"] = round(
        float(np.mean(np.asarray(ours["reused_tokens"]) == np.asarray(dynamo["reused_tokens"]))), 4
    )
    row["ttft_apart_s"] = {f"p{p}": round(float(np.percentile(apart_s, p)), 6) for p in (50, 95, 99)}
    return row


def figures(python: str, quick: bool) -> dict[str, Any]:
    """Both sides at every number of replicas."""
    repeats = 1 if quick else 5
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        profile = Path(folder) / "profile.npz"
        dynamo_profile(profile)
        for replicas in REPLICAS:
            n = 500 * replicas if quick else max(10_000, 1_500 * replicas)
            requests = draw_requests(n, REQUESTS_PER_S * replicas)
            trace = Path(folder) / f"trace{replicas}.jsonl"
            write_trace(trace, requests)
            dynamo = run_dynamo(python, replicas, trace, profile, repeats)
            run_ours(replicas, requests, 1)  # compiles
            rows.append(_row(run_ours(replicas, requests, repeats), dynamo, requests, replicas))
            common.note(f"{replicas} replicas: {rows[-1]['ratio']} times Dynamo's requests per CPU-second")
    return {
        **{f"ratio_{row['replicas']}": row["ratio"] for row in rows},
        "iteration_s": {"base": BASE_S, "per_prefill_token": PREFILL_TOKEN_S, "per_kv_token": KV_TOKEN_S},
        "engine": {
            "kv_blocks": KV_BLOCKS,
            "block_size_tokens": BLOCK_SIZE_TOKENS,
            "max_num_seqs": MAX_NUM_SEQS,
            "max_num_batched_tokens": MAX_NUM_BATCHED_TOKENS,
        },
        "workload": {"prompt": PROMPT, "output": OUTPUT, "requests_per_s_per_replica": REQUESTS_PER_S},
        "rows": rows,
    }
