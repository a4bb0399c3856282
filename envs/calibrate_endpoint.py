"""`python -m envs calibrate endpoint URL --out PROFILE.yaml`: an engine profile from a running endpoint."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import datetime
import math
import os
import re
import sys
import time
from typing import Any

import numpy as np

from envs.calibrate import profile_text
from envs.endpoint_client import Client, HttpError
from envs.endpoint_measure import Bench, Row, first_model
from envs.endpoint_plan import Step, expected_s, plan
from envs.fleet.calibrate import Measured, fit_iterations
from envs.fleet.iteration import batch_seconds
from envs.fleet.profile import Profile, compact_profile
from marginroute.cli import QUIET, note, verbosity
from marginroute.errors import InputError
from marginroute.whole_file import write_whole

LONGEST_PROMPT = 32768  # until which a second chunk is looked for
AGREE = 0.015  # relative difference of two measurements above which there is a third
MOST_BUDGET_TRIES = 12
BAR = 30


class _Progress:
    """A bar on a terminal, a line every ten seconds elsewhere."""

    def __init__(self, total: int, expected_s: float) -> None:
        self._total, self._expected_s, self._done = total, expected_s, 0
        self._started_s = self._line_s = time.monotonic()
        note(f"{total} measurements, about {expected_s:.0f} s")

    def step(self, words: str, share_done: float) -> None:
        """One more measurement; `share_done` of the expected duration."""
        self._done += 1
        now_s = time.monotonic()
        left_s = (now_s - self._started_s) * (1.0 / max(share_done, 1e-3) - 1.0)
        text = f"{self._done}/{self._total} {words}, about {left_s:.0f} s left"
        if sys.stderr.isatty() and verbosity() > QUIET:
            full = round(BAR * share_done)
            end = "\n" if self._done == self._total else ""
            print(f"\r[{'#' * full}{' ' * (BAR - full)}] {text:<50}", end=end, file=sys.stderr, flush=True)
        elif now_s - self._line_s > 10.0 or self._done == self._total:
            self._line_s = now_s
            note(text)


async def _find_budget(bench: Bench, max_context: int, max_model_len: int | None) -> None:
    """Longer and longer prompts, until one is prefilled in several chunks, twice alike."""
    prompt_tokens, found = max_context, 0
    limit = min(LONGEST_PROMPT, (max_model_len or LONGEST_PROMPT) - 64)
    for _ in range(MOST_BUDGET_TRIES):
        if await bench.find_budget(prompt_tokens):
            if bench.budget_tokens == found:
                return
            found = bench.budget_tokens
        elif prompt_tokens >= limit:
            break
        else:
            prompt_tokens = min(2 * prompt_tokens, limit)
    raise InputError(
        f"{bench.client.url}: prompts of up to {prompt_tokens} tokens were not seen to be prefilled in chunks; "
        "legal is an engine with chunked prefill and a max_num_batched_tokens below that"
    )


async def _rows(bench: Bench, step: Step, repeats: int) -> list[Row]:
    """One measurement; none where it is too long or too much for the endpoint."""
    try:
        if step.kind == "decode":
            return await bench.decode(step.batch, step.tokens)
        return await bench.prefill(step.tokens, step.batch, repeats, step.prefills)
    except HttpError as error:
        if error.status not in (400, 413, 429, 503):
            raise
        return []


def _disagree(passes: list[list[Row]]) -> bool:
    """Whether measurements of one step differ by more than noise should."""
    seconds = [[row.seconds for row in rows] for rows in passes]
    return (
        len(seconds) > 1
        and len(set(map(len, seconds))) == 1
        and bool(np.any(np.ptp(seconds, 0) > AGREE * np.min(seconds, 0)))
    )


def _median_rows(passes: list[list[Row]]) -> list[Row]:
    """One row per iteration; passes that found another number of chunks than the last are left out."""
    same = [rows for rows in passes if len(rows) == len(passes[-1])]
    return [
        dataclasses.replace(rows[0], seconds=float(np.median([row.seconds for row in rows])))
        for rows in zip(*same, strict=True)
    ]


async def _measure(bench: Bench, arguments: argparse.Namespace, max_model_len: int | None) -> list[tuple[Step, Row]]:
    """Runs the plan twice, and a third time where the two differ; limits cut it short."""
    await bench.probe()
    await _find_budget(bench, arguments.max_context, max_model_len)
    _, ttft_s = await bench.overhead_s(arguments.max_context, 1)
    per_token_s = ttft_s / arguments.max_context
    steps = plan(arguments.max_concurrency, arguments.max_context, bench.budget_tokens)
    costs = {step: expected_s(step, bench, per_token_s, arguments.repeats) / bench.speed for step in steps}
    progress, spent_s, passes = (
        _Progress(2 * len(steps), 2.0 * sum(costs.values())),
        0.0,
        {step: list[list[Row]]() for step in steps},
    )
    total_s = 2.0 * sum(costs.values())
    for number in range(3):
        again = steps if number < 2 else [step for step in steps if _disagree(passes[step])]
        for step in again:
            if bench.exhausted:
                note("limit of requests or seconds reached: the rest is left out")
                return [(step, row) for step, found in passes.items() if found for row in _median_rows(found)]
            if rows := await _rows(bench, step, arguments.repeats):
                passes[step].append(rows)
            spent_s += costs[step]
            if number < 2:
                progress.step(f"{step.kind} {step.batch} x {step.tokens}", spent_s / total_s)
    return [(step, row) for step, found in passes.items() if found for row in _median_rows(found)]


def measured(rows: list[Row]) -> Measured:
    """Rows as the fit takes them."""
    names = ("batch", "kv", "chunk", "prefix", "seconds", "prefills")
    batch, kv, chunk, prefix, seconds, prefills = np.array(
        [[getattr(row, name) for name in names] for row in rows], dtype=np.float64
    ).T
    prefills = prefills * (chunk > 0)
    product = prefills * chunk * prefix
    return Measured(prefills, prefills * chunk, prefills * chunk**2, product, prefills * prefix, batch, kv, seconds)


def predicted_s(profile: Profile, row: Row) -> float:
    """What a profile says of a measured iteration."""
    decodes = np.full(row.batch, round(row.kv / row.batch), dtype=np.int64)
    return batch_seconds(profile, decodes, [(row.chunk, row.prefix)] * row.prefills if row.chunk else [])


async def _cache(client: Client) -> dict[str, Any]:
    """KV-cache figures of the metrics page, where there is one."""
    try:
        page = (await client.get("/metrics")).decode("utf-8", "replace")
    except InputError:
        return {}
    line = re.search(r"^vllm:cache_config_info\{(.*)\}", page, re.MULTILINE)
    found = dict(re.findall(r'(block_size|num_gpu_blocks)="(\d+)"', line.group(1) if line else ""))
    if len(found) < 2:
        return {}
    return {"kv_cache": {"block_size_tokens": int(found["block_size"]), "blocks": int(found["num_gpu_blocks"])}}


def _without_decodes(rows: list[Row]) -> list[Row]:
    """Iterations that only prefill, derived from those beside one stream: its attention, in proportion to its length.

    From outside they cannot be seen alone: nothing tells them from the time that a request is under way.
    """
    alone = [row for row in rows if row.batch == 1 and not row.chunk]
    kv, seconds = np.array([[row.kv, row.seconds] for row in alone]).T
    per_token_s = max(float(np.polyfit(kv, seconds, 1)[0]), 0.0)
    beside = [row for row in rows if row.batch == 1 and row.chunk]
    return [dataclasses.replace(row, batch=0, kv=0.0, seconds=row.seconds - per_token_s * row.kv) for row in beside]


def fit(found: list[tuple[Step, Row]], facts: dict[str, Any]) -> tuple[dict[str, Any], Profile]:
    """The profile, with its errors on what it was not fitted on.

    Raises:
        InputError: Too little could be measured.
    """
    rows = [row for step, row in found if not step.held_out]
    if len(rows) < 20 or sum(row.batch == 1 and not row.chunk for row in rows) < 2:
        raise InputError(
            f"{len(rows)} iterations could be measured; legal is 20 or more of all kinds: raise the limits"
        )
    content = fit_iterations(measured([*rows, *_without_decodes(rows)]), facts)
    profile = compact_profile("endpoint", content)
    apart = [row for step, row in found if step.held_out]
    if apart:
        errors = [abs(predicted_s(profile, row) / row.seconds - 1.0) * 100.0 for row in apart]
        content["fit"] |= {"held_out_rows": len(apart), "held_out_max_error_pct": round(max(errors), 2)}
    return content, profile


async def calibrate_endpoint(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measures and fits; the content of the profile file."""
    key = os.environ.get(arguments.api_key_env) if arguments.api_key_env else None
    if arguments.api_key_env and not key:
        raise InputError(f"--api-key-env {arguments.api_key_env}: is not set; legal is a variable that holds the key")
    client = Client(arguments.url, key, min(arguments.max_seconds, 300.0))
    model, max_model_len = (arguments.model, None) if arguments.model else await first_model(client)
    bench = Bench(client, model, arguments.speed, arguments.max_requests, arguments.max_seconds)
    found = await _measure(bench, arguments, max_model_len)
    day = datetime.datetime.now(datetime.UTC).date().isoformat()
    facts: dict[str, Any] = {
        "title": arguments.title or f"{model} at an endpoint",
        "source": f"measured with python -m envs calibrate endpoint, {day}, {client.requests} requests",
        **await _cache(client),
    }
    content, profile = fit(found, facts)
    prompt_tokens, ttft_s = await bench.overhead_s(256, 5)
    chunks = bench.chunks(prompt_tokens, 0)
    inside_s = sum(batch_seconds(profile, [], [chunk]) for chunk in chunks)
    measured_in = {
        "max_num_batched_tokens": bench.budget_tokens,
        "largest_batch": max(row.batch for _, row in found),
        "longest_mean_kv_tokens": round(max(row.kv / row.batch for _, row in found)),
        "overhead_s": round(max(ttft_s - inside_s, 0.0), 6),
    }
    return {**content, "endpoint": measured_in}


def _check(arguments: argparse.Namespace) -> None:
    limits = {
        "speed": 0.0,
        "max_seconds": 0.0,
        "max_concurrency": 3,
        "max_context": 255,
        "repeats": 2,
        "max_requests": 0,
    }
    for name, above in limits.items():
        value = getattr(arguments, name)
        if not (math.isfinite(value) and value > above):
            raise InputError(f"--{name.replace('_', '-')} {value:g}; legal is above {above:g}")


def run(arguments: argparse.Namespace) -> int:
    """Measures, fits, writes, and says how well the profile describes what was measured."""
    _check(arguments)
    profile = asyncio.run(calibrate_endpoint(arguments))
    write_whole(arguments.out, profile_text(profile))
    fitted = profile["fit"]
    note(
        f"{arguments.out}: {fitted['rows']} rows; error of rows not seen: median {fitted['median_error_pct']} %, p95 "
        f"{fitted['p95_error_pct']} %; held out: largest {fitted.get('held_out_max_error_pct', 'none')} %; "
        f"overhead of a request {profile['endpoint']['overhead_s'] * 1e3:.1f} ms"
    )
    return 0
