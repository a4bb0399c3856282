"""LiteLLM's standard logging payload, one JSON object per line.

LiteLLM writes a line when a call ends, so lines are put in order of `startTime` here. Failed calls and calls that
generate no text (embeddings, images, ...) are left out and counted.

Source of the layout: docs.litellm.ai/docs/proxy/logging_spec (StandardLoggingPayload).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from envs.workload.traces import ReadOptions, Trace
from envs.workload.traces_files import json_lines
from envs.workload.traces_links import dense, link, shared
from envs.workload.traces_values import Place, bad, instant, optional, tokens
from marginroute.errors import InputError

Row = tuple[float, int, int, str, str, str, str, str, float, float, float, bool]

_NO_TEXT = ("embedding", "image", "speech", "transcription", "moderation", "rerank")


def read_litellm(path: Path, options: ReadOptions) -> Trace:
    """A file of standard logging payloads.

    The class is the team alias of the virtual key, or the key's own alias where there is no team; the tenant is the
    key's alias or hash; calls that share a `trace_id` are a session.
    """
    rows: list[Row] = []
    skipped = 0
    no_text_calls: dict[str, bool] = {}
    for line, payload in json_lines(path):
        wrapped = payload.get("standard_logging_object")
        payload = wrapped if isinstance(wrapped, dict) else payload
        empty = payload.get("completion_tokens") == 0  # such as an answer from LiteLLM's own cache
        call = str(payload.get("call_type"))
        if call not in no_text_calls:
            no_text_calls[call] = any(word in call for word in _NO_TEXT)
        no_text = no_text_calls[call]
        if payload.get("status") == "failure" or empty or no_text:
            skipped += 1
        else:
            rows.append(_row((path, line), payload))
    if not rows:
        raise InputError(f"{path}: has no answered call ({skipped} skipped); legal is at least one")
    rows.sort(key=lambda row: row[0])
    start, prompt, output, names, tenants, models, keys, traces, ttft, e2e, cost, hit = zip(*rows, strict=True)
    arrived_at_s, e2e_s = np.array(start) - start[0], np.array(e2e)
    session = dense(shared(traces))
    parent, think_s = link(session, arrived_at_s, e2e_s) if session is not None else (None, None)
    return Trace(
        path=str(path),
        arrived_at_s=arrived_at_s,
        prompt_tokens=np.array(prompt, dtype=np.int32),
        output_tokens=np.array(output, dtype=np.int32),
        class_name=np.array(names) if any(names) else None,
        tenant_name=np.array(tenants) if any(tenants) else None,
        model=np.array(models),
        prompt_key=dense(keys),
        session_index=session,
        parent_index=parent,
        think_s=think_s,
        ttft_s=np.array(ttft),
        e2e_s=e2e_s,
        cost_usd=np.array(cost),
        cache_hit=np.array(hit),
        skipped_rows=skipped,
    )


def _row(place: Place, payload: Mapping[str, Any]) -> Row:
    start_s = instant(place, payload, "startTime")
    metadata = payload.get("metadata")
    metadata = metadata if isinstance(metadata, dict) else {}
    key = metadata.get("user_api_key_alias") or ""
    return (
        start_s,
        tokens(place, payload, "prompt_tokens"),
        tokens(place, payload, "completion_tokens"),
        str(metadata.get("user_api_key_team_alias") or key),
        str(key or metadata.get("user_api_key_hash") or ""),
        str(payload.get("model_group") or payload.get("model") or ""),
        str(payload.get("cache_key") or ""),
        str(payload.get("trace_id") or ""),
        _ttft_s(place, payload, start_s),
        _e2e_s(place, payload, start_s),
        optional(payload.get("response_cost")),
        payload.get("cache_hit") in (True, "True", "true"),
    )


def _ttft_s(place: Place, payload: Mapping[str, Any], start_s: float) -> float:
    """Seconds to the first token; nan where it is unknown, or that of a call before (an answer from a cache)."""
    if not payload.get("completionStartTime"):
        return math.nan
    since_s = instant(place, payload, "completionStartTime") - start_s
    return since_s if since_s >= 0.0 else math.nan


def _e2e_s(place: Place, payload: Mapping[str, Any], start_s: float) -> float:
    if not payload.get("endTime"):
        return math.nan
    since_s = instant(place, payload, "endTime") - start_s
    if since_s < 0.0:
        raise bad(place, "endTime", payload["endTime"], f"a time after the start, {payload['startTime']}")
    return since_s
