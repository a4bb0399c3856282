"""What the sidecar costs its caller: microseconds of a call over a Unix socket, and of the decision inside it.

`sidecar_uds_us` is the median round trip of a decision (`sidecar_round_trip_us`) less the median time of the same
decision, counted as sent, in process (`sidecar_decision_us`): what socket, HTTP, checks and JSON add.
`sidecar_empty_us` is the round trip of `GET /health`. `sidecar_cpu_us` is the server's CPU time of all three calls
(decision, end, empty).
"""

from __future__ import annotations

import json
import socket
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks import common
from benchmarks.gateway_adapters import adapter, small_bundle_folder
from marginroute.cli import main_guard

WARM_UP = 100


def _round_trip(connection: socket.socket, request: bytes) -> tuple[float, bytes]:
    began_s = time.perf_counter()
    connection.sendall(request)
    data = connection.recv(65536)
    while not _whole(data):
        data += connection.recv(65536)
    return time.perf_counter() - began_s, data


def _whole(data: bytes) -> bool:
    head, found, body = data.partition(b"\r\n\r\n")
    return bool(found) and len(body) >= int(head.partition(b"content-length: ")[2].partition(b"\r\n")[0])


def _post(path: str, body: object) -> bytes:
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: sidecar\r\ncontent-type: application/json\r\ncontent-length: {len(data)}"
    return head.encode() + b"\r\n\r\n" + data


class _InProcess:
    """The same decisions without a server, taken in turn with those of the server."""

    def __init__(self, bundle: Path, folder: Path) -> None:
        from marginroute.adapters.desk import Desk
        from marginroute.adapters.http import HttpSettings

        self.desk = Desk(HttpSettings(str(bundle), str(folder / "in-process.jsonl"), mode="live"), "http")

    def decide_s(self, id: str) -> float:
        """Seconds of one decision, counted as sent."""
        from marginroute.facts import Facts, Outcome

        gateway = self.desk.gateway
        facts = Facts(id=id, prompt_tokens=100, class_name="team", task_name="chat")
        began_s = time.perf_counter()
        name = self.desk.decide(facts).decision.name
        gateway.sent(id, name, False)
        taken_s = time.perf_counter() - began_s
        gateway.finished(id, Outcome("completed", name, output_tokens=12))
        return taken_s


def figures(folder: Path, calls: int) -> dict[str, float]:
    """Microseconds."""
    bundle = small_bundle_folder(folder)
    server = adapter("serve", bundle, folder, {"mode": "live"})
    in_process = _InProcess(bundle, folder)
    seconds: dict[str, list[float]] = {"decide": [], "empty": [], "decision": []}
    try:
        server.wait()
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(server.uds)
            before_s = server.cpu_s()
            for number in range(WARM_UP + calls):
                asked = {"id": f"r{number}", "prompt_tokens": 100, "class": "team", "task": "chat"}
                taken_s, answer = _round_trip(connection, _post("/v1/decide", asked))
                served_by = json.loads(answer.partition(b"\r\n\r\n")[2])["candidate"]
                end = {"event": "finished", "id": f"r{number}", "status": "completed", "output_tokens": 12}
                _round_trip(connection, _post("/v1/events", {"events": [{**end, "served_by": served_by}]}))
                seconds["decide"].append(taken_s)
                seconds["decision"].append(in_process.decide_s(f"r{number}"))
                seconds["empty"].append(_round_trip(connection, b"GET /health HTTP/1.1\r\nhost: sidecar\r\n\r\n")[0])
            used_s = server.cpu_s() - before_s
    finally:
        server.stop()
        in_process.desk.close()
    us = {name: 1e6 * float(np.median(taken[WARM_UP:])) for name, taken in seconds.items()}
    return {
        "sidecar_uds_us": us["decide"] - us["decision"],
        "sidecar_round_trip_us": us["decide"],
        "sidecar_decision_us": us["decision"],
        "sidecar_empty_us": us["empty"],
        "sidecar_cpu_us": 1e6 * used_s / (WARM_UP + calls),
    }


@main_guard
def main(argv: list[str] | None = None) -> int:
    """Prints this part of `python -m benchmarks.gateway` alone."""
    arguments = common.parser(__doc__).parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        common.emit("gateway", figures(Path(scratch), 300 if arguments.quick else 5000))
    return 0


if __name__ == "__main__":
    sys.exit(main())
