"""Closed loop: the same requests to LiteLLM in front of an emulated fleet, and to the simulated world.

One episode of the Azure conversation service at twice its traffic, on the starter fleet. Both sides are judged by the
same sum per request: usage and credits by the latency that its user saw, refunds by the episode's own outcomes, cost
by the tokens. What the gateway cannot do (hold, answer from a cache) is taken out of the world, and so is the
difficulty signal, which no gateway has. Seats are paid either way; GPU hours are the same for all.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from agents.export import make_bundle
from benchmarks import common, gateway_processes
from benchmarks.gateway_client import Seen, ask, chat_body, play, within
from envs.fleet.state import COMPLETED
from envs.plant import Plant
from envs.scenario import load_scenario
from envs.workload.requests import Workload
from envs.worlds import FleetWorlds
from marginroute import bundle as bundles
from marginroute import earnings, heuristics
from marginroute import view as v
from marginroute.bundle import Bundle
from marginroute.errors import InputError
from marginroute.telemetry import GatewayState

SCENARIO = """
description: The conversation service of Azure at twice its traffic on the starter fleet, for the closed loop
fleet: starter
plans: conversation
workload: azure_conversation
horizon_s: {horizon_s}
load_scale: {load_scale}
"""
WITHOUT = {"fleet.response_cache": None, "fleet.batch_queue": None, "workload.difficulty.signal_correlation": 0.001}
LOAD_SCALE = 2.0
SEED = 1
SCRAPE_S = 2.0
SHARED_S = 0.2
WARM_UP_S = 300.0  # that a proxy's first requests may take, on the wall's clock
STRATEGIES = ("simple-shuffle", "least-busy", "latency-based-routing", "cost-based-routing")


def plant_of(folder: Path, horizon_s: float) -> Plant:
    """The scenario, compiled."""
    path = folder / "closed_loop.yaml"
    path.write_text(SCENARIO.format(horizon_s=horizon_s, load_scale=LOAD_SCALE))
    return Plant(load_scenario(str(path), WITHOUT))


def bundle_of(plant: Plant) -> Bundle:
    """The tuned bid price of `azure_conversation`, the same fleet, as a bundle."""
    path = common.ROOT / "configs" / "baselines" / "azure_conversation.yaml"
    baselines = yaml.safe_load(path.read_text())["baselines"]
    rules = [heuristics.from_dict(baselines[name]["policy"]) for name in ("bid-price", "least-in-flight")]
    return make_bundle(plant, rules[0], rules[1], {}, {"command": "python -m benchmarks.gateway"})


class Ledger:
    """Margin of requests whose outcome is known.

    Args:
        plant: contracts and prices.
        workload: the episode.
    """

    def __init__(self, plant: Plant, workload: Workload) -> None:
        self._plant, self._workload = plant, workload
        self._state = GatewayState(bundle_of(plant))
        terms = plant.terms
        self.seats_usd = float(terms["seat_usd_per_s"].sum()) * workload.horizon_s

    def request_usd(self, i: int, c: int | None, ttft_s: float | None, e2e_s: float | None) -> float:
        """USD of a request that candidate `c` answered in these times, None: of one that got no answer."""
        workload, layout = self._workload, self._plant.layout
        names = layout.class_names[workload.class_index[i]], layout.task_names[workload.task_index[i]]
        prompt_tokens, output_tokens = int(workload.prompt_tokens[i]), int(workload.output_tokens[i])
        request = self._state.view(prompt_tokens, *names).request
        if c is None or ttft_s is None or e2e_s is None:
            return float(earnings.unserved_usd(request))
        static, good = self._plant.static_signals[:, c], float(workload.good[i, layout.tier[c]])
        cost_usd = static[v.CALL_USD] + static[v.INPUT_USD] * prompt_tokens + static[v.OUTPUT_USD] * output_tokens
        answered_usd = earnings.answered_usd(request, ttft_s, e2e_s, prompt_tokens, output_tokens, good)
        return float(answered_usd - cost_usd)


def predicted(plant: Plant, workload: Workload, bundle: Bundle) -> dict[str, Any]:
    """What the world says: the bundle decides, no cap is kept."""
    worlds, ledger, policy = FleetWorlds(plant, 1), Ledger(plant, workload), bundle.guarded()
    worlds.load(0, workload)
    served: dict[int, int] = {}
    while not worlds.done.all():
        choice = policy.decide_batch(worlds.view())
        served[int(worlds.desks["current"][0])] = int(choice[0])
        worlds.step(choice)
    rows = worlds.fleet.requests[0]
    usd, seen = [], []
    for i in range(len(workload.arrived_at_s)):
        c, arrived_s = served.get(i), float(workload.arrived_at_s[i])
        done = c is not None and plant.layout.kind[c] <= v.PROVIDER and rows[i]["status"] == COMPLETED
        times = (float(rows[i][name]) - arrived_s for name in ("first_token_at_s", "completed_at_s"))
        ttft_s, e2e_s = times if done else (None, None)
        usd.append(ledger.request_usd(i, c if done else None, ttft_s, e2e_s))
        seen.append(Seen(200 if done else 429, plant.layout.names[c] if done and c is not None else "", ttft_s, e2e_s))
    row = _row(plant, usd, seen, ledger.seats_usd)
    gpu_usd = -float(worlds.ledger_usd[0].sum(axis=-1)[_account("gpu_hours")])
    row["of_its_own_ledger_usd_per_1k"] = 1e3 * (float(worlds.ledger_usd[0].sum()) + gpu_usd) / len(usd)
    return row


def _account(name: str) -> int:
    from envs.economics.ledger import ACCOUNTS

    return ACCOUNTS.index(name)


def _row(plant: Plant, usd: list[float], seen: list[Seen], seats_usd: float) -> dict[str, Any]:
    """Margin and what lies behind it."""
    answered = [s for s in seen if s.e2e_s is not None]
    names = [n for n in plant.layout.names if any(s.served_by == n for s in answered)]
    ttft_s = [s.ttft_s for s in answered if s.ttft_s is not None]
    return {
        "margin_usd_per_1k": 1e3 * (sum(usd) + seats_usd) / len(usd),
        "without_seats_usd_per_1k": 1e3 * sum(usd) / len(usd),
        "requests": len(usd),
        "answered": len(answered),
        "given_up": sum(s.late for s in seen),
        "ttft_s_p50": float(np.median(ttft_s)) if ttft_s else None,
        "ttft_s_p95": float(np.percentile(ttft_s, 95)) if ttft_s else None,
        "shares": {name: sum(s.served_by == name for s in answered) / len(usd) for name in names},
    }


def _deployments(plant: Plant, base_url: str) -> list[dict[str, Any]]:
    """One of LiteLLM's deployments for every replica and provider, with its price."""
    layout, made = plant.layout, []
    for c, name in enumerate(layout.names):
        if layout.kind[c] > v.PROVIDER:
            continue
        static, path = plant.static_signals[:, c], name.replace("/", "-")
        prices = {"input_cost_per_token": static[v.INPUT_USD], "output_cost_per_token": static[v.OUTPUT_USD]}
        tier = layout.tier_names[layout.tier[c]]
        params = {"model": f"hosted_vllm/{tier}", "api_base": f"{base_url}/{path}/v1", "api_key": "none"}
        info = {"id": name, "marginroute_candidate": name}
        made.append({"model_name": "chat", "litellm_params": {**params, **prices}, "model_info": info})
    return made


def measured(
    python: str,
    folder: Path,
    horizon_s: float,
    speed: float,
    strategies: Sequence[str] = STRATEGIES,
    workers: int = 1,
) -> dict[str, Any]:
    """The table: the bundle in the world and in the proxy, and LiteLLM's own strategies, all at the same time.

    Several `workers` of a proxy share their counters through Redis, as often in the fleet's time as in an operator's.
    """
    plant = plant_of(folder, horizon_s)
    workload, bundle = plant.scenario.generate(SEED, "heldout"), bundle_of(plant)
    bundles.save(bundle, folder / "bundle")
    common.note(f"{len(workload.arrived_at_s)} requests in {horizon_s / speed:.0f} s")
    table, running, urls = {"world": predicted(plant, workload, bundle)}, [], {}
    server, shared = gateway_processes.redis(folder) if workers > 1 else (None, "")
    try:
        for strategy in ("marginroute", *strategies):
            where = folder / strategy
            fleet, base_url = gateway_processes.emulator(where / "fleet", "starter", speed, SEED)
            running.append(fleet)
            replicas = plant.layout.names[: plant.layout.n_replicas]
            pages = {name: f"{base_url}/{name.replace('/', '-')}/metrics" for name in replicas}
            ours = {
                "bundle": str(folder / "bundle"), "log": str(where / "decisions.jsonl"), "mode": "live",
                "telemetry": pages, "telemetry_s": SCRAPE_S / speed, "telemetry_timeout_s": SCRAPE_S / speed,
                "rollback": dict.fromkeys(("error_rate", "slo_attainment", "margin_loss", "guard_share")),
            }  # fmt: skip
            if shared:
                ours |= {"shared": shared, "shared_s": SHARED_S / speed}
            acts = strategy == "marginroute"
            process, urls[strategy] = gateway_processes.proxy(
                python,
                where / "proxy",
                _deployments(plant, base_url),
                "simple-shuffle" if acts else strategy,
                "benchmarks.gateway_callback.router" if acts else None,
                ours,
                {"LOOP_SPEED": str(speed)},
                workers,
            )
            running.append(process)
        for process in running:
            process.wait()
        common.note("playing")
        for strategy, seen in asyncio.run(_all(urls, workload, plant, speed, workers)).items():
            ledger, index = Ledger(plant, workload), {name: c for c, name in enumerate(plant.layout.names)}
            done = [index.get(s.served_by) if s.e2e_s is not None else None for s in seen]
            usd = [ledger.request_usd(i, c, seen[i].ttft_s, seen[i].e2e_s) for i, c in enumerate(done)]
            table[strategy] = _row(plant, usd, seen, ledger.seats_usd)
    finally:
        for process in running:
            process.stop()
        if server is not None:
            server.kill()
            server.wait()
    return table


async def _all(
    urls: dict[str, str], workload: Workload, plant: Plant, speed: float, workers: int
) -> dict[str, list[Seen]]:
    """The episode through every gateway at once."""
    short = chat_body("warm-up ", 16, 2, plant.scenario.task_names[0])
    key = f"sk-{plant.scenario.class_names[0]}"
    for name, url in urls.items():  # the first request of a worker is slow
        count = 4 * workers if workers > 1 else 1
        first = await within(WARM_UP_S, [ask(url, short, key, math.inf, speed) for _ in range(count)])
        failed = [seen for seen in first if seen.e2e_s is None]
        if failed:
            raise InputError(
                f"{len(failed)} of {count} first requests through {name} got no answer in {WARM_UP_S:g} s (status "
                f"{failed[0].status}); a busy machine needs a lower --speed, fewer --workers or --strategies"
            )
    seen = await asyncio.gather(*(play(url, workload, plant.scenario, speed) for url in urls.values()))
    return dict(zip(urls, seen, strict=True))
