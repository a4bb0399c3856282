"""A configuration of Envoy for a picker: what `marginroute envoy --print-envoy MODE` prints.

Complete enough to run as it is in front of the picker's endpoints, and to copy its pieces from. The modes differ in
what the picker is shown:

    observe        request and response, copied to it while they pass: Envoy waits for nothing (shadow mode)
    headers        request headers; how a request ended comes by the access log
    buffered       the whole request, response headers
    full-duplex    request and response, piece by piece
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from marginroute.adapters import envoy_messages as em
from marginroute.adapters.listen import Listen
from marginroute.errors import InputError

MODES = ("observe", "headers", "buffered", "full-duplex")
PROCESSING = {
    "observe": ("SEND", "STREAMED", "STREAMED"),
    "headers": ("SKIP", "NONE", "NONE"),
    "buffered": ("SEND", "BUFFERED", "NONE"),
    "full-duplex": ("SEND", "FULL_DUPLEX_STREAMED", "FULL_DUPLEX_STREAMED"),
}  # response headers, request body, response body
PICKER, POOL = "marginroute", "pool"
MOST = 100_000  # requests and connections under way: Envoy's own limit of 1,024 is low for answers that take minutes
FLUSH_S = "0.05s"  # of the access log


def _any(kind: str, **values: Any) -> dict[str, Any]:
    return {"@type": f"type.googleapis.com/envoy.{kind}", **values}


def _extension(name: str, kind: str, **values: Any) -> dict[str, Any]:
    return {"name": f"envoy.{name}", "typed_config": _any(kind, **values)}


def _address(text: str) -> dict[str, Any]:
    host, _, port = text.rpartition(":")
    if not host or not port.isdigit():
        raise InputError(f"endpoints: {text!r} is not legal; legal is ip:port, or cluster:NAME")
    return {"socket_address": {"address": host.strip("[]"), "port_value": int(port)}}


def _cluster(name: str, addresses: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    most = dict.fromkeys(("max_connections", "max_pending_requests", "max_requests"), MOST)
    endpoints = [{"lb_endpoints": [{"endpoint": {"address": address}} for address in addresses]}]
    return {
        "name": name,
        "connect_timeout": "1s",
        "circuit_breakers": {"thresholds": [most]},
        "load_assignment": {"cluster_name": name, "endpoints": endpoints},
        **more,
    }


def _pool(addresses: list[str]) -> dict[str, Any]:
    """The engines: the endpoint that the picker names, or the least busy one if it names none."""
    least_busy = _extension(
        "load_balancing_policies.least_request",
        "extensions.load_balancing_policies.least_request.v3.LeastRequest",
    )
    override = _extension(
        "load_balancing_policies.override_host",
        "extensions.load_balancing_policies.override_host.v3.OverrideHost",
        override_host_sources=[{"metadata": {"key": em.NAMESPACE, "path": [{"key": em.DESTINATION}]}}],
        fallback_policy={"policies": [{"typed_extension_config": least_busy}]},
    )
    policy = {"policies": [{"typed_extension_config": override}]}
    return _cluster(POOL, [_address(address) for address in addresses], load_balancing_policy=policy)


def _picker(listen: Listen) -> dict[str, Any]:
    http2 = _any(
        "extensions.upstreams.http.v3.HttpProtocolOptions", explicit_http_config={"http2_protocol_options": {}}
    )
    path = os.path.abspath(listen.uds)
    address = {"pipe": {"path": path}} if listen.uds else _address(f"{listen.host}:{listen.port}")
    options = {"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": http2}
    if listen.tls is None:
        return _cluster(PICKER, [address], typed_extension_protocol_options=options)
    tls = _extension("transport_sockets.tls", "extensions.transport_sockets.tls.v3.UpstreamTlsContext")
    return _cluster(PICKER, [address], typed_extension_protocol_options=options, transport_socket=tls)


def _ext_proc(mode: str, hold_s: float) -> dict[str, Any]:
    response_headers, request_body, response_body = PROCESSING[mode]
    trailers = "SEND" if mode == "full-duplex" else "SKIP"
    return _extension(
        "filters.http.ext_proc",
        "extensions.filters.http.ext_proc.v3.ExternalProcessor",
        grpc_service={"envoy_grpc": {"cluster_name": PICKER}},
        failure_mode_allow=mode != "full-duplex",
        observability_mode=mode == "observe",
        message_timeout="0.2s",
        **({"max_message_timeout": f"{hold_s + 1.0:g}s"} if hold_s and mode in ("headers", "buffered") else {}),
        processing_mode={
            "request_header_mode": "SEND",
            "response_header_mode": response_headers,
            "request_body_mode": request_body,
            "response_body_mode": response_body,
            "request_trailer_mode": trailers,
            "response_trailer_mode": trailers,
        },
        response_attributes=["upstream.address"],
        metadata_options={
            "forwarding_namespaces": {"untyped": [em.NAMESPACE, em.SUBSET_NAMESPACE]},
            "receiving_namespaces": {"untyped": [em.NAMESPACE]},
        },
    )


def _manager(mode: str, clusters: list[str], stripped: list[str], hold_s: float) -> dict[str, Any]:
    retry = {"retry_on": "connect-failure,refused-stream,reset-before-request", "num_retries": 1}
    route = {"timeout": "0s", "retry_policy": retry}
    routes = [
        {
            "match": {"prefix": "/", "headers": [{"name": em.CLUSTER_HEADER, "string_match": {"exact": name}}]},
            "route": {"cluster": name, **route},
        }
        for name in clusters
    ]
    routes.append({"match": {"prefix": "/"}, "route": {"cluster": POOL, **route}})
    access_log = _extension(
        "access_loggers.http_grpc",
        "extensions.access_loggers.grpc.v3.HttpGrpcAccessLogConfig",
        common_config={
            "log_name": "marginroute",
            "transport_api_version": "V3",
            "grpc_service": {"envoy_grpc": {"cluster_name": PICKER}},
            "buffer_flush_interval": FLUSH_S,
        },
    )
    strip = _extension(
        "http.early_header_mutation.header_mutation",
        "extensions.http.early_header_mutation.header_mutation.v3.HeaderMutation",
        mutations=[{"remove": name} for name in stripped],
    )
    return _extension(
        "filters.network.http_connection_manager",
        "extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        stat_prefix="ingress",
        use_remote_address=True,
        stream_idle_timeout="0s",
        early_header_mutation_extensions=[strip],
        access_log=[access_log],
        route_config={"virtual_hosts": [{"name": "all", "domains": ["*"], "routes": routes}]},
        http_filters=[
            _ext_proc(mode, hold_s),
            _extension("filters.http.router", "extensions.filters.http.router.v3.Router"),
        ],
    )


def bootstrap(
    mode: str,
    endpoints: Mapping[str, str],
    listen: Listen,
    port: int,
    trusted_headers: list[str],
    hold_s: float = 0.0,
) -> dict[str, Any]:
    """A whole configuration.

    Args:
        mode: one of `MODES`.
        endpoints: of the picker: `ip:port`, or `cluster:NAME` for clusters that are added by hand.
        listen: where the picker listens.
        port: of Envoy, on loopback.
        trusted_headers: that filters of Envoy set for the picker; taken away from what clients send.
        hold_s: that the picker may hold a request back; 0: not at all.

    Raises:
        InputError: an endpoint that is neither.
    """
    clusters = sorted({a.partition(":")[2] for a in endpoints.values() if a.startswith("cluster:")})
    addresses = [address for address in endpoints.values() if not address.startswith("cluster:")]
    stripped = [em.DESTINATION, em.CLUSTER_HEADER, *trusted_headers]
    listener = {
        "name": "ingress",
        "address": _address(f"127.0.0.1:{port}"),
        "filter_chains": [{"filters": [_manager(mode, clusters, stripped, hold_s)]}],
    }
    return {"static_resources": {"listeners": [listener], "clusters": [_pool(addresses), _picker(listen)]}}
