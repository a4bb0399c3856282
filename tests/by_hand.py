"""A scenario and workloads small enough to work out with pencil and paper.

Engines take exactly 10 ms per iteration whatever is in the batch, so a request alone on a replica has its first token
after 0.01 s and its last after 0.01 s times its output tokens. Round prices make every posting a round number.
"""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import yaml

from envs.economics.ledger import ACCOUNTS, COUNTS
from envs.fleet_env import FleetEnv
from envs.scenario import Scenario, load_scenario
from envs.scenario_plans import MONTH_S
from envs.workload.requests import Workload
from envs.worlds import FleetWorlds

STEP_S = 0.01

SCENARIO = {
    "horizon_s": 60.0,
    "requests_per_episode": 40,
    "fleet": {
        "tiers": {
            "weak": {"title": "weak", "quality": {"slope": 0.5, "ability": {"chat": 0.5, "code": -0.5}}},
            "strong": {"title": "strong", "quality": {"slope": 0.5, "ability": {"chat": 1.5, "code": 1.5}}},
            "hosted": {"title": "hosted", "quality": {"slope": 0.5, "ability": {"chat": 1.6, "code": 1.6}}},
        },
        "profiles": {
            "flat": {
                "token_knots": [0, 1],
                "token_s": [STEP_S, STEP_S],
                "decode_batch_knots": [1, 2],
                "decode_mean_kv_knots": [1, 1024],
                "decode_s": [[0.0, 0.0], [0.0, 0.0]],
            }
        },
        "pools": {
            "one": {
                "tier": "weak",
                "profile": "flat",
                "replicas": 1,
                "gpus_per_replica": 1,
                "gpu_usd_per_hour": 3.6,
                "energy_input_usd_per_mtok": 10.0,
                "energy_output_usd_per_mtok": 20.0,
                "kv_blocks": 1000,
                "max_num_seqs": 8,
                "max_num_batched_tokens": 1000,
            },
            "two": {
                "tier": "strong",
                "profile": "flat",
                "replicas": 2,
                "gpus_per_replica": 2,
                "gpu_usd_per_hour": 3.6,
                "energy_input_usd_per_mtok": 30.0,
                "energy_output_usd_per_mtok": 40.0,
                "kv_blocks": 1000,
                "max_num_seqs": 8,
                "max_num_batched_tokens": 1000,
            },
        },
        "providers": {
            "api": {
                "tier": "hosted",
                "input_usd_per_mtok": 50.0,
                "output_usd_per_mtok": 100.0,
                "ttft_median_s": 0.5,
                "ttft_sigma": 0.0,
                "tpot_median_s": 0.02,
                "tpot_sigma": 0.0,
                "requests_per_minute": 6.0,
                "burst_requests": 2.0,
            }
        },
        "response_cache": {"capacity_entries": 2, "ttl_s": 20.0, "lookup_s": 0.005, "entry_usd": 0.001},
        "telemetry": {"scrape_interval_s": 1.0},
        "batch_queue": {"hold_s": 4.0},
    },
    "plans": {
        "plans": {
            "metered": {"kind": "usage", "input_usd_per_mtok": 1000.0, "output_usd_per_mtok": 10000.0},
            "seats": {
                "kind": "seat",
                "seat_usd_per_month": 0.5 * 1000.0,
                "seats": 4,
                "included_requests_per_month": 1000.0,
            },
            "night": {"kind": "usage", "input_usd_per_mtok": 500.0, "output_usd_per_mtok": 5000.0},
        },
        "classes": {
            "metered": {
                "plan": "metered",
                "slo": {"ttft_s": 0.4, "ttft_credit_share": 0.2, "tpot_s": 0.015, "tpot_credit_share": 0.1},
                "remedies": {
                    "refund_share": 0.5,
                    "bad_answer_usd": 0.02,
                    "unserved_credit_share": 0.25,
                    "unserved_credit_usd": 0.03,
                },
                "patience": {"median_s": 30.0, "sigma": 0.0},
            },
            "seats": {
                "plan": "seats",
                "slo": {"ttft_s": 0.4, "ttft_credit_share": 0.3},
                "remedies": {"refund_share": 1.0, "unserved_credit_share": 1.0},
            },
            "night": {
                "plan": "night",
                "slo": {"e2e_s": 30.0, "e2e_credit_share": 0.5},
                "remedies": {"refund_share": 1.0, "unserved_credit_share": 0.5},
                "delay_tolerant": {"deadline_s": 20.0},
            },
        },
    },
    "workload": {
        "arrivals": {"kind": "gamma", "rate_per_s": 1.0, "gap_cv": 1.0},
        "class_share": {"metered": 0.5, "seats": 0.3, "night": 0.2},
        "tasks": {"chat": {"share": 0.5}, "code": {"share": 0.5}},
        "prompt_tokens": {"components": [{"weight": 1.0, "median_tokens": 200, "sigma": 0.5}], "max_tokens": 800},
        "output_tokens": {"components": [{"weight": 1.0, "median_tokens": 100, "sigma": 0.5}], "max_tokens": 400},
        "recurring": {"share": 0.3, "prompts_per_tenant": 3, "zipf_exponent": 1.0},
        "difficulty": {"nobody_can_share": 0.0, "signal_correlation": 0.6},
    },
}

ONE, TWO_A, TWO_B, API, CACHE, DEFER, SHED = range(7)  # candidates of this scenario
METERED, SEATS, NIGHT = range(3)  # its classes
GPU_USD_PER_S = (1 * 3.6 + 2 * 2 * 3.6) / 3600.0
SEAT_USD_PER_S = 4 * 500.0 / MONTH_S
SEAT_REQUEST_USD = 0.5


def scenario(folder, overrides=None, **top) -> Scenario:
    """The scenario above with some top-level values replaced, through the same door as any other."""
    data = copy.deepcopy(SCENARIO) | top
    path = folder / "by_hand.yaml"
    path.write_text(yaml.safe_dump(data, sort_keys=False))
    return load_scenario(path, overrides)


def workload(scenario: Scenario, *rows: dict, horizon_s: float = 60.0) -> Workload:
    """Requests with the given fields; the rest is harmless: nobody leaves, every answer is good, nothing recurs."""
    tiers = len(scenario.tier_names)
    deadlines = {k: 20.0 if name == "night" else np.inf for k, name in enumerate(scenario.class_names)}
    default = {
        "arrived_at_s": 0.0,
        "class_index": METERED,
        "task_index": 0,
        "tenant_index": 0,
        "prompt_tokens": 100,
        "output_tokens": 11,
        "patience_s": np.inf,
        "deadline_s": None,
        "prompt_key": -1,
        "difficulty_signal": 0.0,
        "p_good_prior": [0.5] * tiers,
        "p_good": [0.7] * tiers,
        "good": [1] * tiers,
        "provider_noise": [0.0, 0.0],
        "session_index": -1,
        "parent_index": -1,
        "think_s": 0.0,
    }
    full = [default | row for row in rows]
    for row in full:
        row["deadline_s"] = deadlines[row["class_index"]] if row["deadline_s"] is None else row["deadline_s"]
    integers = ("class_index", "task_index", "tenant_index", "prompt_tokens", "output_tokens", "prompt_key")
    kinds = {"good": "u1"} | dict.fromkeys((*integers, "session_index", "parent_index"), "i4")
    columns = {
        name: np.array([row[name] for row in full], dtype=kinds.get(name, "f8")).reshape(len(full), *np.shape(value))
        for name, value in default.items()
    }
    return Workload(**columns, horizon_s=horizon_s)


def as_sessions(episode: Workload, seed: int, share: float = 0.6, block_tokens: int = 16) -> Workload:
    """The episode with most requests following an earlier one, whose prompt they repeat as far as theirs is long."""
    rng, m = np.random.default_rng([seed, 1]), episode.n_requests
    parent, session, think_s = np.full(m, -1), np.arange(m), rng.choice([0.0, 0.02, 0.5, 3.0], m) * rng.random(m)
    lists: list[list[int]] = []
    for i, prompt_tokens in enumerate(episode.prompt_tokens.tolist()):
        past: list[int] = []
        if i > 0 and rng.random() < share:
            parent[i] = int(rng.integers(max(i - 8, 0), i))
            session[i], past = session[parent[i]], lists[parent[i]]
        shared = past[: prompt_tokens // block_tokens]
        fresh = 10_000 * i
        lists.append([*shared, *range(fresh, fresh + prompt_tokens // block_tokens - len(shared))])
    return dataclasses.replace(
        episode,
        prefix_block_tokens=block_tokens,
        prefix_count=[len(own) for own in lists],
        prefix_hash=np.array([block for own in lists for block in own], dtype=np.int64),
        session_index=session,
        parent_index=parent,
        think_s=think_s,
    )


class Played:
    """An episode of `FleetEnv` played with the given candidates, one per decision.

    Attributes: rewards (list of USD), infos, views (before each decision), usd and count look-ups by name.
    """

    def __init__(self, env: FleetEnv, workload: Workload, choices, **options) -> None:
        env.reset(options={"workload": workload, **options})
        self.env, self.rewards, self.views, self.infos = env, [], [], []
        done = False
        choices = iter(choices)
        while not done:
            self.views.append(env.view)
            _, reward, _, done, info = env.step(next(choices))
            self.rewards.append(reward)
            self.infos.append(info)
        assert next(choices, None) is None, "the episode ended before all choices were made"
        self.ledger_usd = env.worlds.ledger_usd[0].copy()
        self.counts = env.worlds.counts[0].copy()
        self.actions = env.worlds.action_counts[0].copy()

    def usd(self, account: str, k: int | None = None) -> float:
        """USD in an account, of one class (-1: what no class causes) or of all."""
        row = self.ledger_usd[ACCOUNTS.index(account)]
        return float(row.sum() if k is None else row[k])

    def count(self, name: str, k: int | None = None) -> int:
        """A count, of one class or of all."""
        row = self.counts[COUNTS.index(name)]
        return int(row.sum() if k is None else row[k])


def play_timed(scenario: Scenario, episode: Workload, choices: list[int]) -> tuple[Played, list[float]]:
    """A played episode and the times of its decisions."""
    worlds = FleetWorlds(scenario, 1)
    worlds.load(0, episode)
    times = []
    for choice in choices:
        assert not worlds.done[0], "the episode ended before all choices were made"
        times.append(float(worlds.desks["now_s"][0]))
        worlds.step(np.array([choice]))
    assert worlds.done[0]
    return Played(FleetEnv(scenario), episode, choices), times
