"""An OpenTelemetry span per decision, by the semantic conventions for generative AI; no text of a prompt or answer.

Spans are made of records when these are written, off the path of requests, and batched by OpenTelemetry's own SDK,
which takes its endpoint, headers and sampling from the usual OTEL_* variables. The span lasts from the decision to the
end of the request; its parent is the caller's span where the caller passes a W3C `traceparent` along.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, Protocol

from marginroute import __version__
from marginroute.errors import InputError
from marginroute.record import DecisionRecord

MOST_PARENTS = 20_000  # requests under way whose parent is remembered
ERRORS = ("failed",)


class Records(Protocol):
    """Where records go."""

    def write(self, record: DecisionRecord) -> bool:
        """Takes one."""

    def close(self) -> None:
        """Ends."""


class TracedRecords:
    """Records that leave a span each.

    Args:
        records: where they go as well.

    Raises:
        InputError: the packages are missing.
    """

    def __init__(self, records: Records) -> None:
        self._records, self._provider = records, _exporting()
        self._tracer = self._provider.get_tracer("marginroute", __version__)
        self._parents: OrderedDict[str, str] = OrderedDict()

    def note(self, id: str, traceparent: str) -> None:
        """The caller's span of a request."""
        self._parents[id] = traceparent
        while len(self._parents) > MOST_PARENTS:
            self._parents.popitem(last=False)

    def write(self, record: DecisionRecord) -> bool:
        """Appends the record and ends its span."""
        written = self._records.write(record)
        parent = self._parents.pop(record.id, "") if record.status else self._parents.get(record.id, "")
        self._span(record, parent)
        return written

    def close(self) -> None:
        """Exports what is left, for two seconds at most, and closes the log."""
        self._provider.force_flush(2000)
        self._provider.shutdown()
        self._records.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._records, name)

    def _span(self, record: DecisionRecord, parent: str) -> None:
        from opentelemetry.trace import SpanKind, Status, StatusCode
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        context = TraceContextTextMapPropagator().extract({"traceparent": parent}) if parent else None
        start_s = record.decided_at_s
        span = self._tracer.start_span(
            f"route {record.choice}",
            context=context,
            kind=SpanKind.INTERNAL,
            attributes=attributes_of(record),
            start_time=int(1e9 * start_s),
        )
        if record.status in ERRORS:
            span.set_status(Status(StatusCode.ERROR))
        arrived_s = start_s - (record.request.get("waited_s") or 0.0)
        span.end(int(1e9 * max(start_s, arrived_s + (record.e2e_s or 0.0))))


def attributes_of(record: DecisionRecord) -> dict[str, Any]:
    """Attributes of a record's span; what is not known is left out."""
    said = {
        "gen_ai.operation.name": "chat",
        "gen_ai.usage.input_tokens": record.prompt_tokens,
        "gen_ai.usage.output_tokens": record.output_tokens,
        "gen_ai.response.time_to_first_chunk": record.ttft_s,
        "marginroute.request_id": record.id,
        "marginroute.mode": record.mode,
        "marginroute.policy": record.policy,
        "marginroute.bundle": record.bundle,
        "marginroute.choice": record.choice,
        "marginroute.kind": record.kind,
        "marginroute.probability": record.probability,
        "marginroute.runner_up": record.runner_up,
        "marginroute.runner_up_usd": record.runner_up_usd,
        "marginroute.guard": record.guard,
        "marginroute.served_by": record.served_by,
        "marginroute.status": record.status,
        "marginroute.cost_usd": record.cost_usd,
        **{f"marginroute.reason_usd.{part}": usd for part, usd in record.reason_usd.items()},
    }
    return {name: value for name, value in said.items() if value is not None and value != ""}


def _exporting() -> Any:
    """A provider that exports by OTLP over HTTP, as JSON: OTLP's protobuf classes are others in `xds-protos`, which
    `marginroute[envoy]` brings.
    """
    try:
        from opentelemetry.exporter.otlp.json.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise InputError(f"{error.name} is not installed; pip install 'marginroute[otel]'") from None
    provider = TracerProvider(resource=Resource.create({"service.name": "marginroute", "service.version": __version__}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider
