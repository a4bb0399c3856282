"""Median latency that marginroute adds to a LiteLLM proxy: three proxies before one upstream, called in turn.

The bare one has no callback, that of `empty` does nothing, that of `hook` is ours.
"""

from __future__ import annotations

import http.client
import json
import time
import urllib.parse
from pathlib import Path

import numpy as np

from benchmarks import common, gateway_processes
from marginroute import bundle as bundles

WARM_UP = 20
CALLBACKS = {"bare": None, "empty": "benchmarks.gateway_empty.callback", "hook": "marginroute.adapters.litellm.router"}


def figures(python: str, folder: Path, calls: int) -> dict[str, float]:
    """Milliseconds of a call that is not streamed; those of CPU time with what happens after the answer."""
    folder.mkdir()
    from benchmarks.gateway_loop import bundle_of, plant_of

    bundles.save(bundle_of(plant_of(folder, 10.0)), folder / "bundle")
    engine, base_url = gateway_processes.upstream(folder / "upstream")
    running, urls = [engine], {}
    deployments = [
        {
            "model_name": "chat",
            "litellm_params": {"model": "hosted_vllm/m", "api_base": f"{base_url}/v1", "api_key": "none"},
            "model_info": {"id": name, "marginroute_candidate": name},
        }
        for name in ("small/0", "medium/0", "large/0")
    ]
    try:
        for name, callback in CALLBACKS.items():
            settings = {"bundle": str(folder / "bundle"), "log": str(folder / "decisions.jsonl"), "mode": "live"}
            process, urls[name] = gateway_processes.proxy(
                python, folder / name, deployments, callback=callback, settings=settings
            )
            running.append(process)
        for process in running:
            process.wait()
        common.note("timing calls")
        before_s = [process.cpu_s() for process in running[1:]]
        seconds = _in_turn(urls, calls)
        bare_s, empty_s, hook_s = (process.cpu_s() - s for process, s in zip(running[1:], before_s, strict=True))
    finally:
        for process in running:
            process.stop()
    median = {f"litellm_{name}_ms": 1e3 * float(np.median(taken)) for name, taken in seconds.items()}
    paired = 1e3 * float(np.median(np.array(seconds["hook"]) - np.array(seconds["bare"])))
    cpu = {
        "litellm_bare_cpu_ms": bare_s,
        "litellm_empty_added_cpu_ms": empty_s - bare_s,
        "litellm_added_cpu_ms": hook_s - bare_s,
    }
    return median | {"litellm_added_ms": paired} | {name: 1e3 * s / (WARM_UP + calls) for name, s in cpu.items()}


def _in_turn(urls: dict[str, str], calls: int) -> dict[str, list[float]]:
    body = json.dumps({"model": "chat", "messages": [{"role": "user", "content": "How are you? " * 40}]}).encode()
    headers = {"Authorization": "Bearer sk-team", "Content-Type": "application/json"}
    connections = {name: http.client.HTTPConnection(urllib.parse.urlsplit(url).netloc) for name, url in urls.items()}
    seconds: dict[str, list[float]] = {name: [] for name in urls}
    for number in range(WARM_UP + calls):
        order = list(connections) if number % 2 == 0 else list(connections)[::-1]
        for name in order:
            began_s = time.perf_counter()
            connections[name].request("POST", "/v1/chat/completions", body, headers)
            response = connections[name].getresponse()
            response.read()
            if number >= WARM_UP and response.status == 200:
                seconds[name].append(time.perf_counter() - began_s)
    for connection in connections.values():
        connection.close()
    if len(set(map(len, seconds.values()))) != 1 or not seconds["hook"]:
        raise RuntimeError(f"calls failed: {[len(s) for s in seconds.values()]} of {calls} were answered")
    return seconds
