"""Sends the requests of an episode to a gateway at their times, and notes what came of each."""

from __future__ import annotations

import asyncio
import json
import time
import urllib.parse
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

from envs.workload.requests import Workload

LONGEST_S = 600.0  # wait for one answer, in the fleet's seconds
DRAIN_S, LATE_S = 120.0, 60.0  # after the horizon, in the fleet's seconds and in ours, everything is over
CONNECT_S = 60.0


@dataclass
class Seen:
    """One request as its client saw it; times in the fleet's seconds.

    Attributes:
        status: HTTP status; 0: the connection broke.
        served_by: id of the deployment, as LiteLLM says.
        ttft_s, e2e_s: from sending; None: nothing came.
        left: the user lost patience.
        late: it was not over when the episode was.
    """

    status: int = 0
    served_by: str = ""
    ttft_s: float | None = None
    e2e_s: float | None = None
    left: bool = False
    late: bool = False


def body_of(workload: Workload, i: int, task: str) -> bytes:
    """A chat completion whose prompt is as long as the request's, and that tells the emulator the true lengths."""
    return chat_body(f"{i} ", int(workload.prompt_tokens[i]), int(workload.output_tokens[i]), task)


def chat_body(start: str, prompt_tokens: int, output_tokens: int, task: str) -> bytes:
    """The same of any lengths."""
    words = start + "word " * ((4 * prompt_tokens) // 5)
    return json.dumps(
        {
            "model": "chat",
            "messages": [{"role": "user", "content": words}],
            "stream": True,
            "max_tokens": output_tokens,
            "metadata": {"task_type": task},
            "emulate": {"prompt_tokens": prompt_tokens, "output_tokens": output_tokens},
        }
    ).encode()


async def ask(url: str, body: bytes, key: str, patience_s: float, speed: float) -> Seen:
    """One request, streamed."""
    parts, seen = urllib.parse.urlsplit(url), Seen()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Type: application/json\r\n"
    head += f"Authorization: Bearer {key}\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    began_s = time.perf_counter()

    def now_s() -> float:
        return (time.perf_counter() - began_s) * speed

    try:
        async with asyncio.timeout(CONNECT_S):
            reader, writer = await asyncio.open_connection(parts.hostname, parts.port, limit=1 << 20)
    except OSError:  # TimeoutError is one
        return seen
    try:
        writer.write(head.encode() + body)
        async with asyncio.timeout(min(patience_s, LONGEST_S) / speed):
            lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
            seen.status = int(lines[0].split(" ")[1])
            fields = dict(line.lower().split(": ", 1) for line in lines[1:] if ": " in line)
            seen.served_by = fields.get("x-litellm-model-id", "")
            while seen.status == 200 and b"data:" not in (line := await reader.readline()):
                if not line:
                    return seen
        seen.ttft_s = now_s() if seen.status == 200 else None
        async with asyncio.timeout(LONGEST_S / speed):
            while line := await reader.readline():
                if b"[DONE]" in line:
                    seen.e2e_s = now_s()
                    break
    except TimeoutError:
        seen.left = True
    except (OSError, asyncio.IncompleteReadError):
        pass
    finally:
        writer.close()
    return seen


async def play(url: str, workload: Workload, scenario: Any, speed: float) -> list[Seen]:
    """All requests of an episode, each at its time; what is not over some time after the horizon is given up."""
    loop = asyncio.get_running_loop()
    began_s = loop.time()

    async def one(i: int) -> Seen:
        await asyncio.sleep(began_s + float(workload.arrived_at_s[i]) / speed - loop.time())
        key = f"sk-{scenario.class_names[workload.class_index[i]]}"
        body = body_of(workload, i, scenario.task_names[workload.task_index[i]])
        return await ask(url, body, key, float(workload.patience_s[i]), speed)

    calls = [one(i) for i in range(len(workload.arrived_at_s))]
    return await within((workload.horizon_s + DRAIN_S) / speed + LATE_S, calls)


async def within(longest_s: float, calls: Sequence[Coroutine[Any, Any, Seen]]) -> list[Seen]:
    """What came of calls; those that are not over by then are given up."""
    tasks = [asyncio.ensure_future(call) for call in calls]
    await asyncio.wait(tasks, timeout=longest_s)
    for task in tasks:
        task.cancel()
    ends = await asyncio.gather(*tasks, return_exceptions=True)
    broken = next((end for end in ends if isinstance(end, Exception)), None)
    if broken is not None:
        raise broken
    return [end if isinstance(end, Seen) else Seen(late=True) for end in ends]
