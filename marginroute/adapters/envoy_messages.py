"""The messages of Envoy's external processing that an endpoint picker reads and writes; free of decisions.

Protocol: the Endpoint Picker Protocol of the Gateway API Inference Extension (kubernetes-sigs/
gateway-api-inference-extension, docs/proposals/004-endpoint-picker-protocol) over Envoy's ext_proc v3. The classes come
from the package `xds-protos`, generated from envoyproxy/data-plane-api.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from typing import Any

Message = Any  # a protobuf message

DESTINATION = "x-gateway-destination-endpoint"
SERVED = "x-gateway-destination-endpoint-served"
SUBSET = "x-gateway-destination-endpoint-subset"
SUBSET_NAMESPACE = "envoy.lb.subset_hint"
NAMESPACE = "envoy.lb"
CLUSTER_HEADER = "x-marginroute-cluster"
ATTRIBUTES = "envoy.filters.http.ext_proc"

NONE, STREAMED, BUFFERED, BUFFERED_PARTIAL, FULL_DUPLEX = range(5)  # ext_proc v3 ProcessingMode.BodySendMode
MOST_PICKS = 4096  # of them that are kept
CHUNK_BYTES = 62_000  # of a body in one message: Envoy takes 64 KiB with what is around it


def headers(message: Message) -> dict[str, str]:
    """Header values by lower-case name of an HttpHeaders message; the last one wins."""
    return {h.key.lower(): (h.raw_value.decode("latin-1") if h.raw_value else h.value) for h in message.headers.headers}


def subset(request: Message) -> list[str] | None:
    """Endpoints that the data plane allows for a request; None: all."""
    spaces = request.metadata_context.filter_metadata
    if SUBSET_NAMESPACE not in spaces or SUBSET not in spaces[SUBSET_NAMESPACE].fields:
        return None
    value = spaces[SUBSET_NAMESPACE].fields[SUBSET]
    if value.WhichOneof("kind") == "string_value":
        parts: Iterable[str] = value.string_value.split(",")
    else:
        parts = (item.string_value for item in value.list_value.values)
    return [part.strip() for part in parts if part.strip()]


def served_by(request: Message) -> str:
    """Endpoint that answered, as the data plane reports it with a response; empty if it does not."""
    spaces = request.metadata_context.filter_metadata
    if NAMESPACE in spaces and SERVED in spaces[NAMESPACE].fields:
        return str(spaces[NAMESPACE].fields[SERVED].string_value)
    if ATTRIBUTES in request.attributes:
        return str(request.attributes[ATTRIBUTES].fields["upstream.address"].string_value)
    return ""


class Messages:
    """Makes responses; those that are the same for many requests are made once, and must not be changed.

    Raises:
        ImportError: `xds-protos` is not installed.
    """

    def __init__(self) -> None:
        from envoy.service.ext_proc.v3 import external_processor_pb2

        self._protos = external_processor_pb2
        self.go_on = {
            name: self._go_on(name) for name in ("request_headers", "request_body", "response_headers", "response_body")
        }
        for name in ("request_trailers", "response_trailers"):
            self.go_on[name] = self._protos.ProcessingResponse()
            getattr(self.go_on[name], name).SetInParent()
        self._picks: dict[tuple[str, str, str], Message] = {}

    def _go_on(self, name: str) -> Message:
        response = self._protos.ProcessingResponse()
        getattr(response, name).response.SetInParent()
        return response

    def pick(self, part: str, endpoints: str, cluster: str = "", body: bytes | None = None) -> Message:
        """Sends the request to endpoints; `part` is `request_headers` or `request_body`, whichever is being answered.

        Args:
            part: what is answered.
            endpoints: `ip:port`, or several with commas, the first one first; empty: `cluster` says where.
            cluster: to send it to by a route of Envoy; empty: none.
            body: to put in place of the request's; None: leaves it.
        """
        if body is not None:
            response = self._pick(part, endpoints, cluster)
            getattr(response, part).response.body_mutation.body = body
            return response
        key = part, endpoints, cluster
        if key not in self._picks:
            if len(self._picks) >= MOST_PICKS:
                self._picks.clear()
            self._picks[key] = self._pick(*key)
        return self._picks[key]

    def _pick(self, part: str, endpoints: str, cluster: str) -> Message:
        response = self._protos.ProcessingResponse()
        common = getattr(response, part).response
        for name, value in ((DESTINATION, endpoints), (CLUSTER_HEADER, cluster)):
            if value:
                option = common.header_mutation.set_headers.add()
                option.header.key, option.header.raw_value = name, value.encode("latin-1", "replace")
                option.append_action = 2  # OVERWRITE_IF_EXISTS_OR_ADD: a client cannot pick for itself
        common.clear_route_cache = bool(cluster)
        if endpoints:
            response.dynamic_metadata[NAMESPACE] = {DESTINATION: endpoints}
        return response

    def patience(self, seconds: float) -> Message:
        """Asks Envoy to wait for the answer for longer than its `message_timeout`, within `max_message_timeout`."""
        response = self._protos.ProcessingResponse()
        response.override_message_timeout.FromMilliseconds(max(int(1e3 * seconds), 1))
        return response

    def refuse(self, status: int, message: str, retry_after_s: float | None = None) -> Message:
        """Answers the request at once, with an error as OpenAI's API words it."""
        response = self._protos.ProcessingResponse()
        answer = response.immediate_response
        answer.status.code = status
        kind = "rate_limit_exceeded" if status == 429 else "service_unavailable"
        answer.body = json.dumps({"error": {"message": message, "type": kind, "code": status}}).encode()
        told = {"content-type": "application/json"}
        if retry_after_s is not None:
            told["retry-after"] = str(max(math.ceil(retry_after_s), 1))
        for name, value in told.items():
            option = answer.headers.set_headers.add()
            option.header.key, option.header.raw_value = name, value.encode()
        answer.details = "marginroute"
        return response

    def stream(self, part: str, body: bytes, end: bool) -> Iterator[Message]:
        """Passes a piece of a body on in full-duplex mode; `part` is `request_body` or `response_body`."""
        for at in range(0, max(len(body), 1), CHUNK_BYTES):
            response = self._protos.ProcessingResponse()
            piece = getattr(response, part).response.body_mutation.streamed_response
            piece.body = body[at : at + CHUNK_BYTES]
            piece.end_of_stream = end and at + CHUNK_BYTES >= len(body)
            yield response
