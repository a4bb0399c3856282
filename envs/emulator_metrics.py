"""The metrics page of an emulated replica, under the names that vLLM gives them; seconds are those on the wall."""

from __future__ import annotations

import bisect
import math
from typing import Any

from envs.emulator_world import Answer, LiveFleet, Station

# Buckets as in vllm/v1/metrics/loggers.py (Apache-2.0)
_TTFT_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)
_ITL_S = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)
_E2E_S = (0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0)


class Histogram:
    """Cumulative buckets, sum and count."""

    def __init__(self, name: str, words: str, edges: tuple[float, ...]) -> None:
        self.name, self.words, self.edges = name, words, edges
        self.counts, self.sum_s = [0] * (len(edges) + 1), 0.0

    def add(self, seconds: float, times: int = 1) -> None:
        """Counts a value, `times` times."""
        self.counts[bisect.bisect_left(self.edges, seconds)] += times
        self.sum_s += seconds * times

    def lines(self, labels: str) -> list[str]:
        """In the text format of Prometheus."""
        lines, below = [f"# HELP {self.name} {self.words}", f"# TYPE {self.name} histogram"], 0
        for edge, count in zip((*map(str, self.edges), "+Inf"), self.counts, strict=True):
            below += count
            lines.append(f'{self.name}_bucket{{{labels},le="{edge}"}} {below}')
        return [*lines, f"{self.name}_sum{{{labels}}} {self.sum_s!r}", f"{self.name}_count{{{labels}}} {below}"]


class ReplicaMetrics:
    """What one replica has served so far."""

    def __init__(self) -> None:
        self.ttft = Histogram("vllm:time_to_first_token_seconds", "Time to first token.", _TTFT_S)
        self.itl = Histogram("vllm:inter_token_latency_seconds", "Time between two tokens of an answer.", _ITL_S)
        self.e2e = Histogram("vllm:e2e_request_latency_seconds", "Arrival to last token.", _E2E_S)
        self.prompt_tokens = self.generation_tokens = self.ended = 0

    def saw(self, answer: Answer, new_tokens: int, at_s: float, speed: float) -> None:
        """New tokens of an answer, the last of them at the world's time `at_s`."""
        self.generation_tokens += new_tokens
        if math.isnan(at_s):
            return
        gaps, since_s = new_tokens, answer.last_token_s
        if answer.tokens == 0:
            self.prompt_tokens += answer.prompt_tokens
            first_s = at_s if new_tokens == 1 else answer.submitted_s + (at_s - answer.submitted_s) / new_tokens
            self.ttft.add((first_s - answer.submitted_s) / speed)
            gaps, since_s = new_tokens - 1, first_s
        if gaps > 0 and not math.isnan(since_s):
            self.itl.add((at_s - since_s) / gaps / speed, gaps)
        if answer.tokens + new_tokens == answer.output_tokens:
            self.ended += 1
            self.e2e.add((at_s - answer.submitted_s) / speed)


def metrics_page(live: LiveFleet, station: Station, metrics: ReplicaMetrics) -> str:
    """The page of one replica, as of the world's clock."""
    rep: Any = live.fleet.replicas[0][station.replica]
    pool = live.spec.pools[int(rep["pool"])]
    labels = f'engine="0",model_name="{station.model}"'
    config = f'block_size="{pool.block_size_tokens}",engine="0",num_gpu_blocks="{pool.kv_blocks}"'
    prompt, written = metrics.prompt_tokens, metrics.generation_tokens
    values: list[tuple[str, str, str, float]] = [
        ("num_requests_running", "gauge", "Requests in the batch.", int(rep["running"])),
        ("num_requests_waiting", "gauge", "Requests in line.", int(rep["waiting"])),
        ("kv_cache_usage_perc", "gauge", "Share of KV blocks in use.", float(rep["kv_used_blocks"]) / pool.kv_blocks),
        ("prefix_cache_queries_total", "counter", "Prompt tokens looked up in the prefix cache.", prompt),
        ("prefix_cache_hits_total", "counter", "Prompt tokens found there (none: it is not modelled).", 0),
        ("num_preemptions_total", "counter", "Requests that lost their blocks.", int(rep["restarts"])),
        ("prompt_tokens_total", "counter", "Prompt tokens prefilled.", prompt),
        ("generation_tokens_total", "counter", "Tokens written.", written),
        ("request_success_total", "counter", "Answers written to their end.", metrics.ended),
    ]
    lines = ["# HELP vllm:cache_config_info KV cache.", "# TYPE vllm:cache_config_info gauge"]
    lines.append(f"vllm:cache_config_info{{{config}}} 1.0")
    for name, kind, words, value in values:
        plain = name.removesuffix("_total")
        more = ',finished_reason="length"' if plain == "request_success" else ""
        lines += [f"# HELP vllm:{plain} {words}", f"# TYPE vllm:{plain} {kind}"]
        lines.append(f"vllm:{name}{{{labels}{more}}} {float(value)!r}")
    for histogram in (metrics.ttft, metrics.itl, metrics.e2e):
        lines += histogram.lines(labels)
    return "\n".join(lines) + "\n"
