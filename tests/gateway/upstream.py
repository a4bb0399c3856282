"""A small OpenAI-compatible upstream for gateway tests: streams or not, slow or not, and fails when told to.

The last user message may carry orders, word by word: `fail` answers 500, `fail:NAME` does so only at the upstream of
that name, `refuse` answers 400, `limit` 429 with a Retry-After of 2 s, `break` closes a stream after its first chunk,
`slow` waits 0.5 s before the first token, `long` streams 40 words.
"""

from __future__ import annotations

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TTFT_S = 0.03
GAP_S = 0.005
PROMPT_TOKENS = 21


def read_body(handler: BaseHTTPRequestHandler) -> bytes:
    """The body of a request, in one piece or in chunks."""
    if "Content-Length" in handler.headers:
        return handler.rfile.read(int(handler.headers["Content-Length"]))
    data = b""
    while size := int(handler.rfile.readline(), 16):
        data += handler.rfile.read(size)
        handler.rfile.readline()
    handler.rfile.readline()
    return data


class Upstream:
    """Serves `/v1/chat/completions` on a free loopback port until `close`."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.headers: dict[str, str] = {}  # of answers
        self.calls: list[tuple[str, int]] = []  # last message and status, in order
        self.lock, self.busy, self.peak = threading.Lock(), 0, 0  # calls before their first token, and the most of them
        upstream = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def do_POST(self):
                upstream.answer(self, json.loads(read_body(self)))

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self.thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}/v1"

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def answer(self, handler: BaseHTTPRequestHandler, body: dict) -> None:
        message = body["messages"][-1]["content"]
        orders = message.split()
        told = {"refuse": 400, "limit": 429, "fail": 500, f"fail:{self.name}": 500}
        status = next((code for order, code in told.items() if order in orders), 200)
        self.calls.append((message, status))
        if status != 200:
            self._json(handler, status, {"error": {"message": "as told", "type": "server_error", "code": status}})
            return
        words = [f"{self.name} "] * (40 if "long" in orders else 8)
        with self.lock:
            self.busy += 1
            self.peak = max(self.peak, self.busy)
        time.sleep(0.5 if "slow" in orders else TTFT_S)
        with self.lock:
            self.busy -= 1
        usage = {"prompt_tokens": PROMPT_TOKENS, "completion_tokens": len(words)}
        usage["total_tokens"] = sum(usage.values())
        if body.get("stream"):
            self._stream(handler, body, words, usage, broken="break" in orders)
            return
        time.sleep(GAP_S * len(words))
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "".join(words)}}
        self._json(handler, 200, self._head("chat.completion", body) | {"choices": [choice], "usage": usage})

    def _head(self, kind: str, body: dict) -> dict:
        return {"id": "chatcmpl-1", "object": kind, "created": int(time.time()), "model": body["model"]}

    def _head_of(self, handler: BaseHTTPRequestHandler, status: int) -> None:
        for name, value in {**self.headers, **({"Retry-After": "2"} if status == 429 else {})}.items():
            handler.send_header(name, value)

    def _json(self, handler: BaseHTTPRequestHandler, status: int, data: dict) -> None:
        payload = json.dumps(data).encode()
        handler.send_response(status)
        handler.send_header("Content-Type", "application/json")
        self._head_of(handler, status)
        handler.send_header("Content-Length", str(len(payload)))
        handler.end_headers()
        handler.wfile.write(payload)

    def _stream(self, handler: BaseHTTPRequestHandler, body: dict, words: list[str], usage: dict, broken: bool) -> None:
        handler.send_response(200)
        handler.send_header("Content-Type", "text/event-stream")
        handler.send_header("Transfer-Encoding", "chunked")
        self._head_of(handler, 200)
        handler.end_headers()
        head = self._head("chat.completion.chunk", body)

        def send(data: dict | str) -> None:
            text = data if isinstance(data, str) else json.dumps(data)
            event = f"data: {text}\n\n".encode()
            handler.wfile.write(f"{len(event):x}\r\n".encode() + event + b"\r\n")
            handler.wfile.flush()

        try:
            for word in words:
                delta = {"role": "assistant", "content": word}
                send(head | {"choices": [{"index": 0, "delta": delta, "finish_reason": None}]})
                time.sleep(GAP_S)
                if broken:
                    time.sleep(0.5)  # whoever reads has had the chunk by then, on a busy machine too
                    handler.close_connection = True
                    return
            send(head | {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
            if (body.get("stream_options") or {}).get("include_usage"):
                send(head | {"choices": [], "usage": usage})
            send("[DONE]")
            handler.wfile.write(b"0\r\n\r\n")
        except OSError:
            handler.close_connection = True
