"""A stand-in for an engine, to try the proxy without GPUs: `python upstream.py PORT TTFT_S TPOT_S`."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

ANSWER = ["All", " is", " well", "."] * 8


class Engine(BaseHTTPRequestHandler):
    """Answers `/v1/chat/completions`, streamed or not, at a fixed TTFT and TPOT."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or head and body wait 40 ms for each other
    ttft_s, tpot_s = 0.1, 0.01

    def do_GET(self) -> None:
        """The list of models, which LiteLLM looks at when it starts."""
        self._json({"object": "list", "data": [{"id": "stand-in", "object": "model"}]})

    def log_message(self, *_: Any) -> None:
        """Keeps quiet."""

    def do_POST(self) -> None:
        """One chat completion."""
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt_tokens = len(json.dumps(body["messages"])) // 4
        usage = {"prompt_tokens": prompt_tokens, "completion_tokens": len(ANSWER)}
        usage["total_tokens"] = sum(usage.values())
        head = {"id": "chatcmpl-0", "created": int(time.time()), "model": body["model"]}
        time.sleep(self.ttft_s)
        if body.get("stream"):
            self._stream(head | {"object": "chat.completion.chunk"}, usage)
            return
        time.sleep(self.tpot_s * len(ANSWER))
        message = {"role": "assistant", "content": "".join(ANSWER)}
        choice = {"index": 0, "finish_reason": "stop", "message": message}
        self._json(head | {"object": "chat.completion", "choices": [choice], "usage": usage})

    def _json(self, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _stream(self, head: dict[str, Any], usage: dict[str, int]) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        for token in ANSWER:
            delta = {"role": "assistant", "content": token}
            self._event(head | {"choices": [{"index": 0, "delta": delta, "finish_reason": None}]})
            time.sleep(self.tpot_s)
        self._event(head | {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
        self._event(head | {"choices": [], "usage": usage})
        self.wfile.write(b"data: [DONE]\n\n")
        self.close_connection = True

    def _event(self, data: dict[str, Any]) -> None:
        self.wfile.write(f"data: {json.dumps(data)}\n\n".encode())
        self.wfile.flush()


if __name__ == "__main__":
    try:
        port, Engine.ttft_s, Engine.tpot_s = map(float, sys.argv[1:])
        server = ThreadingHTTPServer(("127.0.0.1", int(port)), Engine)
    except ValueError:
        raise SystemExit(__doc__) from None
    except (OSError, OverflowError) as error:
        raise SystemExit(f"error: port {sys.argv[1]}: {error}") from None
    with contextlib.suppress(KeyboardInterrupt):
        server.serve_forever()
