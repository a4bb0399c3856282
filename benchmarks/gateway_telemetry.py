"""CPU time of scraping 100 metrics pages a second, served by another process."""

from __future__ import annotations

import asyncio
import multiprocessing
import time
from typing import Any

from benchmarks import common
from envs.emulator_metrics import _TTFT_S, Histogram
from marginroute.metric_pages import engine_load
from marginroute.scrape import Scraper

ENDPOINTS = 100
HISTOGRAMS = 14  # as many lines as a vLLM server's page


def page() -> bytes:
    """A page as long as vLLM's."""
    labels = 'engine="0",model_name="meta-llama/Llama-3.1-8B-Instruct"'
    lines = [
        f"vllm:{name}{{{labels}}} {value}"
        for name, value in (("num_requests_running", 7.0), ("num_requests_waiting", 3.0), ("kv_cache_usage_perc", 0.2))
    ]
    for number in range(HISTOGRAMS):
        lines += Histogram(f"vllm:histogram_{number}_seconds", "Seconds.", _TTFT_S).lines(labels)
    return "\n".join(lines).encode() + b"\n"


def _serve(port: Any, data: bytes) -> None:
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nContent-Type: text/plain\r\n\r\n" % len(data) + data

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await reader.readuntil(b"\r\n\r\n"):
                writer.write(answer)
                await writer.drain()
        except (OSError, asyncio.IncompleteReadError):
            writer.close()

    async def run() -> None:
        server = await asyncio.start_server(talk, "127.0.0.1", 0, backlog=2 * ENDPOINTS)
        port.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(run())


class _Layout:
    names = tuple(f"r/{i}" for i in range(ENDPOINTS))
    n_replicas = ENDPOINTS


class _Bundle:
    layout = _Layout


class _Gateway:
    """Takes what was scraped; the time of a real one's few array writes is in `decision`."""

    bundle = _Bundle

    def scraped(self, *load: Any) -> None:
        """One page."""


def figures(seconds: float) -> dict[str, float]:
    """Share of a core, and microseconds per page in all and for parsing alone."""
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    data = page()
    server = multiprocessing.get_context("spawn").Process(target=_serve, args=(theirs, data), daemon=True)
    server.start()
    url = f"http://127.0.0.1:{ours.recv()}/metrics"
    scraper = Scraper(_Gateway(), dict.fromkeys(_Layout.names, url), every_s=1.0)  # type: ignore[arg-type]
    common.note("scraping")
    try:
        scraper.start()
        time.sleep(1.5)  # connections are open
        before, began_s, cpu_s = scraper.scrapes, time.perf_counter(), time.process_time()
        time.sleep(seconds)
        wall_s, cpu_s, pages = time.perf_counter() - began_s, time.process_time() - cpu_s, scraper.scrapes - before
    finally:
        scraper.stop()
        server.terminate()
        server.join()
    if not pages:
        raise RuntimeError(f"no page was scraped: {scraper.failing}")
    began_s = time.process_time()
    for _ in range(200):
        engine_load(data)
    return {
        "telemetry_core_pct": 100.0 * cpu_s / wall_s,
        "telemetry_us_per_page": 1e6 * cpu_s / pages,
        "telemetry_parse_us": 1e6 * (time.process_time() - began_s) / 200,
        "telemetry_pages_per_s": pages / wall_s,
    }
