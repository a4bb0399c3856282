"""What an engine's metrics page says of its load: vLLM, SGLang and TensorRT-LLM, found by the names they give it.

The page is searched for a handful of names instead of being parsed: a page of a hundred histograms costs as much as
its bytes take to look through. A server of several engines (data parallel ranks) has a line for each: requests add up,
KV use is their mean. What a page does not have is None.

Names as of vLLM `vllm/v1/metrics/loggers.py`, SGLang `sglang/srt/metrics/collector.py` and TensorRT-LLM
`tensorrt_llm/serve` (November 2026), older ones included.
"""

from __future__ import annotations

import math
import re
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
HITS = ("vllm:prefix_cache_hits", "sglang:cached_tokens")
QUERIES = ("vllm:prefix_cache_queries", "sglang:prompt_tokens")
PREEMPTIONS = ("vllm:num_preemptions",)

_NAMES = (WAITING, RUNNING, KV_USAGE, HITS, QUERIES, PREEMPTIONS)
_FIELD = {name.encode(): group for group, names in enumerate(_NAMES) for name in names}
# The names above with their common beginnings taken out, which is twice as fast on a line that is none of them
_LINE = re.compile(
    rb"^(vllm:(?:num_(?:requests_(?:waiting|running)|preemptions)|(?:kv|gpu)_cache_usage_perc|prefix_cache_(?:hits|queries))"
    rb"|sglang:(?:num_(?:queue|running)_reqs|token_usage|cached_tokens|prompt_tokens)"
    rb"|trtllm_(?:num_requests_(?:waiting|running)|kv_cache_utilization))"
    rb"(?:_total)?(?:\{[^\n]*\})?[ \t]+([^\s]+)",
    re.MULTILINE,
)


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """Load of an engine.

    Attributes:
        waiting: requests in line.
        running: requests in the batch.
        kv_usage: share of KV blocks in use, 0 to 1.
        prefix_hits: prompt tokens found in the prefix cache so far; None: not told.
        prefix_queries: prompt tokens looked up so far; None: not told.
        preemptions: requests that have lost their blocks so far; None: not told.
    """

    waiting: float
    running: float
    kv_usage: float
    prefix_hits: float | None = None
    prefix_queries: float | None = None
    preemptions: float | None = None


def engine_load(page: bytes) -> EngineLoad:
    """Reads a metrics page.

    Raises:
        InputError: the page is of none of the engines, too long, or holds something that is no number.
    """
    if len(page) > MOST_PAGE_BYTES:
        raise InputError(f"a metrics page of {len(page)} bytes; legal is {MOST_PAGE_BYTES} at most")
    sums, counts = [0.0] * len(_NAMES), [0] * len(_NAMES)
    for name, text in _LINE.findall(page):
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and value >= 0.0):
            raise InputError(f"{name.decode()} = {text[:40].decode('ascii', 'replace')!r}; legal is a number from 0 up")
        group = _FIELD[name]
        sums[group] += value
        counts[group] += 1
    for group, what in ((0, WAITING), (1, RUNNING), (2, KV_USAGE)):
        if counts[group] == 0:
            raise InputError(f"the metrics page has none of {', '.join(what)}; legal is a page of one of the engines")
    hits, queries, preemptions = (sums[group] if counts[group] else None for group in (3, 4, 5))
    kv_usage = min(sums[2] / counts[2], 1.0)
    return EngineLoad(sums[0], sums[1], kv_usage, hits, queries, preemptions)
