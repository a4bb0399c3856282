"""Envoy's gRPC access log: how each request ended, for requests whose end ext_proc is not shown.

Envoy sends an entry when a request is over, whatever became of it, off the path of requests. It tells code, times and
who answered, but neither tokens nor, for a stream, when its first token came.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from marginroute.adapters.envoy_exchange import status_of
from marginroute.facts import Outcome

if TYPE_CHECKING:
    from marginroute.adapters.envoy import Picker

Entry = Any  # an HTTPAccessLogEntry


def outcome_of(entry: Entry, served_by: str) -> Outcome:
    """What an entry says of a request that `served_by` answered, as far as is known."""
    common, code = entry.common_properties, entry.response.response_code.value
    flags = common.response_flags
    status = status_of(code)
    if flags.downstream_connection_termination:
        status = "abandoned"
    duration = common.duration if common.HasField("duration") else common.time_to_last_downstream_tx_byte
    e2e_s = duration.seconds + 1e-9 * duration.nanos
    return Outcome(status, served_by=served_by if status == "completed" else "", e2e_s=e2e_s, attempt_e2e_s=e2e_s)


def address_of(entry: Entry) -> str:
    """`ip:port` of who answered; empty if nobody did."""
    address = entry.common_properties.upstream_remote_address.socket_address
    return f"{address.address}:{address.port_value}" if address.address else ""


def take(picker: Picker, message: Any) -> int:
    """Ends the requests that a message of the access log is about; returns how many it was."""
    ended = 0
    for entry in message.http_logs.log_entry:
        exchange = picker.live.get(entry.request.request_id)
        if exchange is None:
            continue
        served = picker.name_at(address_of(entry)) or exchange.served
        exchange.over(outcome_of(entry, served))
        exchange.settle()
        ended += 1
    return ended
