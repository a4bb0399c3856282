"""OpenTelemetry spans of GenAI calls in OTLP's JSON encoding: one export request per line, or one document.

Attributes of the semantic conventions (opentelemetry.io/docs/specs/semconv/gen-ai/gen-ai-spans, status Development):
gen_ai.operation.name, gen_ai.usage.input_tokens and output_tokens (before v1.27 prompt_tokens and completion_tokens),
gen_ai.request.model, gen_ai.conversation.id, gen_ai.agent.name. OTLP writes 64-bit integers as strings.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from envs.workload.traces import ReadOptions, Trace
from envs.workload.traces_files import json_lines, opened
from envs.workload.traces_links import dense, link, names, shared
from envs.workload.traces_values import Place, bad, objects, seconds, tokens
from marginroute.errors import InputError

_TEXT_OPERATIONS = ("chat", "text_completion", "generate_content")
_INPUT = ("gen_ai.usage.input_tokens", "gen_ai.usage.prompt_tokens")
_OUTPUT = ("gen_ai.usage.output_tokens", "gen_ai.usage.completion_tokens")
_ERROR = (2, "STATUS_CODE_ERROR")
_OLDEST_NS = 10**16  # 1970-04-26 in nanoseconds; smaller figures are in another unit

Row = tuple[int, int, int, str, str, str, str, str, float, float]


def read_otel(path: Path, options: ReadOptions) -> Trace:
    """GenAI client spans; other spans, failed calls and calls that generate no text are left out.

    A call belongs to its conversation, or else to its trace where the trace has several calls. Class is the attribute
    `marginroute.class` where a gateway sets it, tenant the service's name, task the agent's name.
    """
    rows: list[Row] = []
    skipped = 0
    for place, service, span in _spans(path):
        attributes = _attributes(place, span)
        operation = attributes.get("gen_ai.operation.name")
        if operation is None and not any(key in attributes for key in _INPUT):
            continue
        row = None if operation not in (None, *_TEXT_OPERATIONS) else _row(place, service, span, attributes)
        if row is None:
            skipped += 1
        else:
            rows.append(row)
    if not rows:
        raise InputError(f"{path}: has no answered GenAI call ({skipped} skipped); legal is at least one")
    rows.sort(key=lambda row: row[0])
    start, prompt, output, sessions, classes, tenants, tasks, models, ttft, e2e = zip(*rows, strict=True)
    arrived_at_s = (np.array(start, dtype=np.int64) - start[0]) / 1e9
    alone = shared([name if name.startswith("t") else "" for name in sessions])
    session = dense(own if own.startswith("c") else trace for own, trace in zip(sessions, alone, strict=True))
    e2e_s = np.array(e2e)
    parent, think_s = link(session, arrived_at_s, e2e_s) if session is not None else (None, None)
    return Trace(
        path=str(path),
        arrived_at_s=arrived_at_s,
        prompt_tokens=np.array(prompt, dtype=np.int32),
        output_tokens=np.array(output, dtype=np.int32),
        class_name=names(classes),
        tenant_name=names(tenants),
        task_name=names(tasks),
        model=names(models),
        session_index=session,
        parent_index=parent,
        think_s=think_s,
        ttft_s=np.array(ttft),
        e2e_s=e2e_s,
        skipped_rows=skipped,
    )


def _spans(path: Path) -> Iterator[tuple[Place, str, dict[str, Any]]]:
    """Place, service name and span of every span of the file."""
    for line, document in _documents(path):
        if document.get("resourceSpans") is None:
            raise bad((path, line), "resourceSpans", None, "OTLP JSON with a list of them")
        place = (path, line)
        for resource in objects(place, document, "resourceSpans"):
            service = str(_attributes(place, _object(place, resource, "resource")).get("service.name", ""))
            for scope in objects(place, resource, "scopeSpans"):
                for span in objects(place, scope, "spans"):
                    yield place, service, span


def _documents(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Export requests: one a line, or the whole file where its first line is not a whole object."""
    with opened(path) as file:
        try:
            json.loads(file.readline())
            lines = True
        except ValueError:
            lines = False
    if lines:
        yield from json_lines(path)
        return
    with opened(path) as file:
        try:
            document = json.load(file)
        except ValueError as error:
            raise InputError(f"{path}, line 1: is not JSON ({error}); legal is OTLP JSON") from None
    if not isinstance(document, dict):
        raise InputError(f"{path}, line 1: is {type(document).__name__}; legal is OTLP JSON, an object")
    yield 1, document


def _attributes(place: Place, holder: Mapping[str, Any]) -> dict[str, Any]:
    """Attributes of OTLP's list of key and typed value; arrays and maps are left out."""
    found: dict[str, Any] = {}
    for pair in objects(place, holder, "attributes"):
        key, value = str(pair.get("key")), _object(place, pair, "value")
        for kind in ("stringValue", "doubleValue", "boolValue"):
            if kind in value:
                found[key] = value[kind]
        if "intValue" in value:
            try:
                found[key] = int(value["intValue"])
            except (TypeError, ValueError, OverflowError):
                raise bad(place, key, value["intValue"], "a whole number") from None
    return found


def _object(place: Place, holder: Mapping[str, Any], key: str) -> dict[str, Any]:
    """An object; missing and null are an empty one."""
    value = holder.get(key)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise bad(place, key, value, "an object")
    return value


def _row(place: Place, service: str, span: Mapping[str, Any], attributes: dict[str, Any]) -> Row | None:
    """A call, or None where it failed or generated nothing."""
    output = next((attributes[key] for key in _OUTPUT if key in attributes), 0)
    if _object(place, span, "status").get("code") in _ERROR or output == 0:
        return None
    key = next((key for key in _INPUT if key in attributes), _INPUT[0])
    start, end = _nanoseconds(place, span, "startTimeUnixNano"), _nanoseconds(place, span, "endTimeUnixNano")
    if end < start:
        raise bad(place, "endTimeUnixNano", end, f"a time after the start, {start}")
    conversation = attributes.get("gen_ai.conversation.id")
    model = attributes.get("gen_ai.request.model") or attributes.get("gen_ai.response.model") or ""
    return (
        start,
        tokens(place, attributes, key),
        tokens(place, {_OUTPUT[0]: output}, _OUTPUT[0]),
        f"c{conversation}" if conversation else f"t{span.get('traceId', '')}",
        str(attributes.get("marginroute.class", "")),
        service,
        str(attributes.get("gen_ai.agent.name", "")),
        str(model),
        seconds(place, attributes, "gen_ai.response.time_to_first_chunk"),
        (end - start) / 1e9,
    )


def _nanoseconds(place: Place, span: Mapping[str, Any], key: str) -> int:
    value = span.get(key)
    try:
        figure = int(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        figure = 0
    if figure < _OLDEST_NS:
        raise bad(place, key, value, "nanoseconds since 1970")
    return figure
