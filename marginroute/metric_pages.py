"""What an engine's metrics page says of its load: vLLM, SGLang and TensorRT-LLM, found by the names they give it.

The page is searched for a handful of names instead of being parsed: a page of a hundred histograms costs as much as
its bytes take to look through. A server of several engines (data parallel ranks) has a line for each: requests add up,
KV use is their mean.

Names as of vLLM `vllm/v1/metrics/loggers.py`, SGLang `sglang/srt/metrics/collector.py` and TensorRT-LLM
`tensorrt_llm/serve` (November 2026), older ones included.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

from marginroute.errors import InputError

MOST_PAGE_BYTES = 8 << 20

WAITING = ("vllm:num_requests_waiting", "sglang:num_queue_reqs", "trtllm_num_requests_waiting")
RUNNING = ("vllm:num_requests_running", "sglang:num_running_reqs", "trtllm_num_requests_running")
KV_USAGE = (
    "vllm:kv_cache_usage_perc",
    "vllm:gpu_cache_usage_perc",
    "sglang:token_usage",
    "trtllm_kv_cache_utilization",
)
_VALUE = re.compile(rb"(?:\{.*\})?[ \t]+([^\s]+)(?:[ \t]+[^\s]+)?[ \t\r]*")  # behind the name, a time may follow


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """Load of an engine.

    Attributes:
        waiting: requests in line.
        running: requests in the batch.
        kv_usage: share of KV blocks in use, 0 to 1.
    """

    waiting: float
    running: float
    kv_usage: float


def engine_load(page: bytes) -> EngineLoad:
    """Reads a metrics page.

    Raises:
        InputError: the page is of none of the engines, too long, or holds something that is no number.
    """
    if len(page) > MOST_PAGE_BYTES:
        raise InputError(f"a metrics page of {len(page)} bytes; legal is {MOST_PAGE_BYTES} at most")
    page = b"\n" + page
    waiting, running, kv_usage = (_values(page, names) for names in (WAITING, RUNNING, KV_USAGE))
    return EngineLoad(sum(waiting), sum(running), min(sum(kv_usage) / len(kv_usage), 1.0))


def _values(page: bytes, names: tuple[str, ...]) -> list[float]:
    """The values of the first of the names that the page has."""
    for name in names:
        if found := [_number(name, text) for text in _found(page, b"\n" + name.encode())]:
            return found
    raise InputError(f"the metrics page has none of {', '.join(names)}; legal is a page of one of the engines")


def _found(page: bytes, start: bytes) -> Iterator[bytes]:
    """Values of the lines that begin so, name and labels taken off."""
    at = page.find(start)
    while at >= 0:
        end = page.find(b"\n", at + 1)
        if match := _VALUE.fullmatch(page[at + len(start) : end if end >= 0 else len(page)]):
            yield match[1]
        at = page.find(start, end) if end >= 0 else -1


def _number(name: str, text: bytes) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= 0.0):
        raise InputError(f"{name} = {text[:40].decode('ascii', 'replace')!r}; legal is a number from 0 up")
    return value
