"""How a gateway asks the sidecar, and goes on without it: standard library only.

Try:
  marginroute serve bundle --log decisions.jsonl --uds sidecar.sock
  python examples/http/client.py sidecar.sock "How are you?"
"""

from __future__ import annotations

import http.client
import json
import socket
import sys
import threading
import time
from typing import Any


class _Connection(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: str, timeout_s: float) -> None:
        super().__init__("sidecar", timeout=timeout_s)
        self._path = path

    def connect(self) -> None:
        """Opens the socket."""
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


class Sidecar:
    """Asks the sidecar, with one kept connection per thread.

    Args:
        path: of its Unix socket.
        timeout_s: after which the gateway routes by itself.
        rest_s: after a failure, for which it is not asked again: a sidecar that hangs delays one request, not all.
    """

    def __init__(self, path: str, timeout_s: float = 0.05, rest_s: float = 1.0) -> None:
        self._path, self._timeout_s, self._rest_s = path, timeout_s, rest_s
        self._local = threading.local()
        self._ask_again_s = 0.0

    def decide(self, **request: Any) -> dict[str, Any] | None:
        """The decision; None: route as without it."""
        return self._post("/v1/decide", request)

    def tell(self, *events: dict[str, Any]) -> None:
        """What became of requests; lost if nobody listens."""
        self._post("/v1/events", {"events": events})

    def _post(self, call: str, body: Any) -> dict[str, Any] | None:
        if time.monotonic() < self._ask_again_s:
            return None
        for attempt in (1, 2):  # a kept connection may have been closed meanwhile: the second one is fresh
            connection = getattr(self._local, "connection", None) if attempt == 1 else None
            if connection is None:
                connection = _Connection(self._path, self._timeout_s)
            try:
                connection.request("POST", call, json.dumps(body), {"Content-Type": "application/json"})
                response = connection.getresponse()
                data = response.read()
                self._local.connection = connection
                return json.loads(data) if response.status == 200 else None
            except (OSError, http.client.HTTPException, ValueError) as error:
                connection.close()
                self._local.connection = None
                if isinstance(error, TimeoutError):
                    break  # it hangs, or has decided and says so too late: asking again would decide twice
        self._ask_again_s = time.monotonic() + self._rest_s
        return None


def main() -> int:
    """Asks about one prompt and reports its answer."""
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    sidecar = Sidecar(sys.argv[1], timeout_s=1.0)
    decision = sidecar.decide(prompt=sys.argv[2], explain=True)
    if decision is None:
        print("no decision: route as without it")
        return 1
    print(json.dumps(decision, indent=1))
    end = {"status": "completed", "served_by": decision["candidate"], "prompt_tokens": 5, "output_tokens": 20}
    sidecar.tell({"event": "finished", "id": decision["id"], "e2e_s": 0.6, **end})
    return 0


if __name__ == "__main__":
    sys.exit(main())
