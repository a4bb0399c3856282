"""The same load on the engine, request by request, and on the fluid surrogate, tick by tick."""

# ruff: noqa: ANN001, ANN202 (Numba infers the types of kernels)
from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from envs.economics import ledger as books
from envs.economics.accounts import expected_value_usd
from envs.economics.plans import TERMS
from envs.fleet.allocation import allocate
from envs.fleet.engine import advance, busy_seconds, pop_finished, reset_world, set_in_flight_cap, submit
from envs.fleet.fluid_curves import E2E_S, Curves, calibrate
from envs.fleet.fluid_loop import Sample
from envs.fleet.fluid_state import Fluid, FluidSpec, allocate_fluid
from envs.fleet.profile import compact_profile
from envs.fleet.replay import least_in_flight
from envs.fleet.spec import FleetSpec, PoolSpec
from envs.fleet.state import ABANDONED, COMPLETED, NO_CAP, record_array
from envs.fluid_money import ANSWER, PRICE, step
from envs.kernels import kernel
from envs.scenario_files import locate, read_yaml
from marginroute import pricing
from marginroute.contracts import WITHIN

Array = np.ndarray[Any, Any]

CLASSES = ("chat", "writer", "batch")
SHARE = (0.5, 0.3, 0.2)
PROMPT_MEDIAN, PROMPT_SIGMA = (800.0, 400.0, 2500.0), 0.8
OUTPUT_MEDIAN, OUTPUT_SIGMA = (150.0, 300.0, 100.0), 0.7
PATIENCE_S = (12.0, 20.0, np.inf)
SLO_S = {  # of a GPU that decodes fast, and of one that decodes slowly
    "llama-3.1-8b-h100": ((1.0, 0.03, np.inf), (3.0, 0.05, np.inf), (np.inf, np.inf, 60.0)),
    "qwen3-32b-h100-tp2": ((2.0, 0.05, np.inf), (4.0, 0.08, np.inf), (np.inf, np.inf, 90.0)),
}
P_GOOD, GPU_USD_PER_HOUR = 0.9, 2.95
LOADS = (0.3, 0.5, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2)
KNEE = (0.85, 1.1)  # loads in between are near the knee
CAP, REPLICAS, HORIZON_S, TICK_S = 48, 4, 600.0, 15.0


def pool_of(profile: str) -> PoolSpec:
    """A replica as its maker runs it."""
    data = read_yaml(locate(profile, "profile"))
    return PoolSpec(
        profile,
        compact_profile(profile, data),
        kv_blocks=data["kv_cache"]["blocks"],
        max_num_seqs=256,
        max_num_batched_tokens=2048,
    )


def terms_of(profile: str) -> Any:
    """(3,) contracts: by token, with credits for TTFT and TPOT; a dearer one; and work at half price."""
    terms = record_array(len(CLASSES), TERMS)
    terms["input_usd_per_token"] = (3e-6, 4e-6, 1.5e-6)
    terms["output_usd_per_token"] = (12e-6, 15e-6, 6e-6)
    for column, name in enumerate(("ttft", "tpot", "e2e")):
        terms[f"slo_{name}_s"] = [slo[column] for slo in SLO_S[profile]]
    terms["ttft_credit_share"], terms["tpot_credit_share"] = (0.2, 0.1, 0.0), (0.2, 0.1, 0.0)
    terms["e2e_credit_share"] = (0.0, 0.0, 0.5)
    terms["refund_share"], terms["unserved_credit_share"] = 0.5, (0.2, 0.2, 0.0)
    return terms


def sample_of(profile: str, n: int = 20_000) -> Sample:
    """Requests of the three classes."""
    rng, terms = np.random.default_rng(5), terms_of(profile)
    k = rng.choice(len(CLASSES), n, p=SHARE)
    prompts = np.clip(np.array(PROMPT_MEDIAN)[k] * np.exp(PROMPT_SIGMA * rng.standard_normal(n)), 8, 8000).astype(int)
    outputs = np.clip(np.array(OUTPUT_MEDIAN)[k] * np.exp(OUTPUT_SIGMA * rng.standard_normal(n)), 2, 2000).astype(int)
    prices = (terms["input_usd_per_token"][k], terms["output_usd_per_token"][k])
    return Sample(
        class_index=k,
        prompt_tokens=prompts,
        output_tokens=outputs,
        patience_s=np.array(PATIENCE_S)[k] * np.exp(0.6 * rng.standard_normal(n)),
        slo_s=np.array(SLO_S[profile]),
        credit_share=np.stack([terms[f"{name}_credit_share"] for name in ("ttft", "tpot", "e2e")], axis=1),
        value_usd=pricing.tokens_usd(prompts, outputs, *prices),
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Plant:
    """One profile with its sample, contracts and curves."""

    profile: str
    pool: PoolSpec
    sample: Sample
    terms: Any
    curves: Curves

    def requests_per_s(self, cap: int) -> float:
        """Throughput of one replica that is full up to its in-flight cap."""
        curves = self.curves
        levels = np.geomspace(1.0, curves.slots, len(curves.curves))
        full = min(float(cap), curves.slots)
        return full / float(np.interp(full, levels, curves.curves[:, :, E2E_S] @ curves.class_share))


def plant_of(profile: str) -> Plant:
    """Measures the curves; about a second."""
    pool, sample = pool_of(profile), sample_of(profile)
    return Plant(profile, pool, sample, terms_of(profile), calibrate(pool, sample))


@dataclasses.dataclass(frozen=True)
class Case:
    """A load on a pool.

    Attributes:
        load: arrivals over the throughput of the replicas at the start, full up to the cap.
        shape: the rate in each third of the horizon, times the load.
        cap: in-flight cap per replica from the start.
        new_cap: cap from the middle on.
        new_replicas: replicas from the middle on.
        seed: of the arrivals.
        only: classes that arrive, by index; none: all, in the mix that the curves were measured with.
    """

    load: float
    shape: tuple[float, float, float] = (1.0, 1.0, 1.0)
    cap: int = NO_CAP
    new_cap: int = 0
    new_replicas: int = REPLICAS
    seed: int = 0
    only: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        """What the table calls it."""
        words = [f"load {self.load:g}", "steady" if len(set(self.shape)) == 1 else "steps"]
        words += [" and ".join(CLASSES[k] for k in self.only) + " only"] * bool(self.only)
        words += [f"cap {self.cap}"] * (self.cap < NO_CAP) + [f"then cap {self.new_cap}"] * (self.new_cap > 0)
        return ", ".join(words + [f"then {self.new_replicas} replicas"] * (self.new_replicas != REPLICAS))


def arrivals_of(plant: Plant, case: Case) -> tuple[Array, Array]:
    """(M,) arrival times, and (M,) rows of the sample."""
    rng = np.random.default_rng([17, case.seed, int(1000 * case.load)])
    per_s = case.load * REPLICAS * plant.requests_per_s(case.cap)
    third_s = HORIZON_S / 3.0
    times = [third_s * (i + rng.random(rng.poisson(per_s * factor * third_s))) for i, factor in enumerate(case.shape)]
    arrived_at_s = np.sort(np.concatenate(times))
    classes = case.only or tuple(range(len(CLASSES)))
    return arrived_at_s, rng.choice(np.flatnonzero(np.isin(plant.sample.class_index, classes)), len(arrived_at_s))


@kernel
def _run_engine(
    pools,
    tables,
    worlds,
    replicas,
    slots,
    providers,
    requests,
    arrived_at_s,
    before,
    after,
    new_cap,
    switch_s,
    horizon_s,
):
    reset_world(pools, tables, worlds, replicas, slots, providers, requests, 0)
    active, switched = before, False
    for i in range(arrived_at_s.shape[0] + 1):
        now_s = arrived_at_s[i] if i < arrived_at_s.shape[0] else horizon_s
        if now_s >= switch_s and not switched:
            advance(pools, tables, worlds, replicas, slots, providers, requests, 0, switch_s)
            active, switched = after, True
            if new_cap > 0:
                for r in range(replicas.shape[1]):
                    set_in_flight_cap(
                        pools, tables, worlds, replicas, slots, providers, requests, 0, r, new_cap, switch_s
                    )
        advance(pools, tables, worlds, replicas, slots, providers, requests, 0, now_s)
        while pop_finished(worlds, requests, 0) >= 0:
            pass
        if i < arrived_at_s.shape[0]:
            r = least_in_flight(replicas, 0, 0, active)
            submit(pools, tables, worlds, replicas, slots, providers, requests, 0, r, i, now_s)
    busy_s = 0.0
    for r in range(replicas.shape[1]):
        busy_s += busy_seconds(replicas[0, r], horizon_s)
    return busy_s


@kernel
def _post_requests(ledger_usd, counts, terms, requests, class_index, good, arrived_at_s, horizon_s):
    for i in range(class_index.shape[0]):
        row, k = requests[0, i], class_index[i]
        if not row.completed_at_s <= horizon_s:
            continue
        value_usd = expected_value_usd(terms, k, WITHIN, row.prompt_tokens, row.output_tokens)
        if row.status == COMPLETED:
            tail_s = row.completed_at_s - row.first_token_at_s
            ttft_s = row.first_token_at_s - arrived_at_s[i]
            usage_usd = value_usd - terms[k].request_value_usd
            books.post_served(
                ledger_usd, counts, terms, 0, k, books.USAGE_REVENUE, usage_usd, value_usd, True, row.prompt_tokens,
                row.output_tokens, ttft_s, tail_s / max(row.output_tokens - 1, 1), ttft_s + tail_s, good[i],
                books.ENERGY, 0.0,
            )  # fmt: skip
        elif row.status == ABANDONED:
            books.post_unserved(
                ledger_usd, counts, terms, 0, k, books.ABANDONED, value_usd, True, books.ENERGY, 0.0,
            )  # fmt: skip


def _figures(case: Case, ledger_usd: Array, counts: Array, busy_s: float, latency_s: Array) -> dict[str, Any]:
    served = counts[books.SERVED].astype(float)
    paid = 0.5 * (REPLICAS + case.new_replicas) * HORIZON_S
    return {
        **dict(zip(("ttft_s", "tpot_s", "e2e_s"), latency_s.tolist(), strict=True)),
        "served_per_s": float(served.sum()) / HORIZON_S,
        "abandoned_per_s": float(counts[books.ABANDONED].sum()) / HORIZON_S,
        "utilisation": busy_s / paid,
        "slo_attainment": float(counts[books.SLO_OK].sum() / max(served.sum(), 1e-9)),
        "slo_attainment_by_class": (counts[books.SLO_OK] / np.maximum(served, 1e-9)).tolist(),
        "margin_usd_per_hour": float(ledger_usd.sum() - paid * GPU_USD_PER_HOUR / 3600.0) * 3600.0 / HORIZON_S,
        "revenue_usd_per_hour": float(ledger_usd[books.USAGE_REVENUE].sum()) * 3600.0 / HORIZON_S,
    }


def run_engine(plant: Plant, case: Case) -> dict[str, Any]:
    """What ended on the engine within the horizon."""
    arrived_at_s, rows = arrivals_of(plant, case)
    most = max(REPLICAS, case.new_replicas)
    pool = dataclasses.replace(plant.pool, replicas=most, in_flight_cap=case.cap)
    fleet = allocate(FleetSpec((pool,), scrape_interval_s=1e12), 1, len(rows))
    requests, sample = fleet.requests[0], plant.sample
    requests["prompt_tokens"], requests["output_tokens"] = sample.prompt_tokens[rows], sample.output_tokens[rows]
    requests["patience_until_s"] = arrived_at_s + sample.patience_s[rows]
    busy_s = _run_engine(
        *fleet.arrays, arrived_at_s, REPLICAS, case.new_replicas, case.new_cap, HORIZON_S / 2.0, HORIZON_S
    )
    ledger_usd = np.zeros((1, len(books.ACCOUNTS), len(CLASSES) + 1))
    counts = np.zeros((1, len(books.COUNTS), len(CLASSES)), dtype=np.int64)
    good = np.random.default_rng(case.seed).random(len(rows)) < P_GOOD
    classes = sample.class_index[rows]
    _post_requests(ledger_usd, counts, plant.terms, fleet.requests, classes, good, arrived_at_s, HORIZON_S)
    first_s = requests["first_token_at_s"] - arrived_at_s
    tail_s = requests["completed_at_s"] - requests["first_token_at_s"]
    tpot_s = tail_s / np.maximum(requests["output_tokens"] - 1, 1)
    done = (requests["status"] == COMPLETED) & (requests["completed_at_s"] <= HORIZON_S)
    latency_s = np.stack([first_s, tpot_s, first_s + tail_s], axis=1)[done].mean(axis=0)
    return _figures(case, ledger_usd[0], counts[0], busy_s, latency_s)


def run_fluid(plant: Plant, case: Case) -> dict[str, Any]:
    """The same on the surrogate, from requests per class and tick."""
    arrived_at_s, rows = arrivals_of(plant, case)
    fluid, ledger_usd, counts, levers, prices, answers = worlds_of(plant, 1, REPLICAS, case.cap)
    margins, rewards, class_levers = np.zeros(1), np.zeros(1), np.zeros((1, len(CLASSES), 2))
    ticks = round(HORIZON_S / TICK_S)
    amounts = np.zeros((ticks, len(CLASSES)))
    np.add.at(amounts, ((arrived_at_s / TICK_S).astype(int), plant.sample.class_index[rows]), 1.0)
    busy_s, latency_s, stayed = 0.0, np.zeros(3), 0.0
    for t in range(ticks):
        if t == ticks // 2:
            levers[0, 0, 0] = case.new_cap or case.cap
            levers[0, 0, 1] = case.new_replicas
        arrays = (plant.terms[None], prices, answers, np.zeros(1, np.int64), ledger_usd, counts, margins, rewards)
        step(*fluid.arrays, *arrays, amounts[t][None, None], levers, class_levers, TICK_S, np.ones(1, dtype=np.bool_))
        busy_s += float(fluid.stations["busy_share"][0, 0] * fluid.stations["ready"][0, 0]) * TICK_S
        latency_s += [fluid.flows[f"{name}_sum"].sum() for name in ("ttft", "tpot", "e2e")]
        stayed += float(fluid.flows["stayed"].sum())
    return _figures(case, ledger_usd[0], counts[0], busy_s, latency_s / stayed)


def worlds_of(plant: Plant, n_worlds: int, replicas: int, cap: int) -> tuple[Fluid, Array, Array, Array, Any, Any]:
    """Fluid worlds of the plant without scaling lag, a ledger for them, their levers, and prices without GPU cost."""
    spec = FluidSpec((plant.curves,), (replicas,), (cap,), (0.0,), (np.inf,) * len(CLASSES))
    prices, answers = record_array((1, 1), PRICE), record_array((1, 1, len(CLASSES)), ANSWER)
    answers["prompt_tokens"][0, 0], answers["output_tokens"][0, 0] = plant.curves.mean_tokens.T
    answers["p_good"] = P_GOOD
    ledger_usd = np.zeros((n_worlds, len(books.ACCOUNTS), len(CLASSES) + 1))
    counts = np.zeros((n_worlds, len(books.COUNTS), len(CLASSES)))
    levers = np.tile(np.array([float(cap), float(replicas), np.inf]), (n_worlds, 1, 1))
    return allocate_fluid(spec, n_worlds), ledger_usd, counts, levers, prices, answers


def errors(engine: dict[str, Any], fluid: dict[str, Any]) -> dict[str, float]:
    """Fluid less engine, in the units of the names."""
    by_class = np.subtract(fluid["slo_attainment_by_class"], engine["slo_attainment_by_class"])
    margin_usd = fluid["margin_usd_per_hour"] - engine["margin_usd_per_hour"]
    return {
        "throughput_pct": 100.0 * (fluid["served_per_s"] / engine["served_per_s"] - 1.0),
        "utilisation_points": 100.0 * (fluid["utilisation"] - engine["utilisation"]),
        "slo_attainment_points": 100.0 * (fluid["slo_attainment"] - engine["slo_attainment"]),
        "slo_attainment_of_worst_class_points": 100.0 * float(by_class[np.argmax(np.abs(by_class))]),
        "margin_pct": 100.0 * margin_usd / abs(engine["margin_usd_per_hour"]),
    }


def cases() -> list[Case]:
    """The grid: loads, steady and in steps, with and without a cap; nearly idle ones; levers moved in the middle."""
    grid = [
        Case(load, shape, cap)
        for shape in ((1.0, 1.0, 1.0), (0.5, 1.2, 0.7))
        for cap in (NO_CAP, CAP)
        for load in LOADS
    ]
    moved = [Case(load, new_replicas=6) for load in (0.7, 0.9, 1.1)] + [Case(0.9, cap=CAP, new_cap=96)]
    return [*grid, Case(0.05), Case(0.1), *moved]


def other_mixes() -> list[Case]:
    """Loads of another mix than that of the curves."""
    return [Case(load, only=(2,)) for load in (0.45, 0.6)] + [Case(load, only=(0, 1)) for load in (1.1, 1.3)]


def near_knee(case: Case) -> bool:
    """Whether the load comes near what the replicas can take in any part of the horizon."""
    return any(KNEE[0] <= case.load * factor <= KNEE[1] for factor in case.shape)
