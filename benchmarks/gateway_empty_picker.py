"""An endpoint picker that does nothing, in Python's gRPC: `python -m benchmarks.gateway_empty_picker SOCKET`.

It answers every message of ext_proc with the same bytes, and reads what the access log says: what Envoy and gRPC alone
take of a call.
"""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from typing import Any

import grpc
from envoy.service.ext_proc.v3 import external_processor_pb2

from marginroute.adapters.envoy import PROCESSOR
from marginroute.adapters.listen import run_loop

ACCESS_LOG = "envoy.service.accesslog.v3.AccessLogService"


async def _serve(uds: str) -> None:
    go_on = external_processor_pb2.ProcessingResponse()
    go_on.request_headers.response.SetInParent()
    answer = go_on.SerializeToString()

    async def process(_: AsyncIterator[bytes], context: Any) -> None:
        while await context.read() is not grpc.aio.EOF:
            await context.write(answer)

    async def follow(entries: AsyncIterator[bytes], _: Any) -> bytes:
        async for _entry in entries:
            pass
        return b""

    methods = {
        PROCESSOR: {"Process": grpc.stream_stream_rpc_method_handler(process)},
        ACCESS_LOG: {"StreamAccessLogs": grpc.stream_unary_rpc_method_handler(follow)},
    }
    server = grpc.aio.server()
    server.add_generic_rpc_handlers(
        [grpc.method_handlers_generic_handler(service, handlers) for service, handlers in methods.items()]
    )
    server.add_insecure_port(f"unix:{uds}")
    await server.start()
    await server.wait_for_termination()


if __name__ == "__main__":
    run_loop(_serve(sys.argv[1]))
